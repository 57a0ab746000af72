//! Counters: cheap where they count (one relaxed atomic addition, no lock, no allocation), collected
//! into JSON when somebody asks.
//!
//! A device declares its own, next to its code, and shares them with its workers:
//!
//! ```
//! use alula::metrics::{Counter, View, Group};
//! alula::metrics::metrics! {
//!     /// What a lamp did.
//!     pub struct Metrics {
//!         /// How often it was switched on.
//!         on_count: Counter,
//!     }
//! }
//! let metrics = std::sync::Arc::new(Metrics::default());
//! metrics.on_count.add(1);
//! assert_eq!(metrics.collect(View::Total).to_string(), r#"{"on_count":1}"#);
//! ```
//!
//! Names are those of Firecracker's metrics where it counts the same; a name ends with its unit
//! (`_bytes`, `_us`), or it is a count.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::json;

/// Body of `PUT /metrics`: where a line of metrics is written every minute. Fields other than these are
/// ignored, as Firecracker does it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Metrics"))]
#[serde(expecting = "struct MetricsConfig")]
pub struct Config {
    /// A file, created if it is missing, or a FIFO.
    pub metrics_path: PathBuf,
    /// Each line has the microVM's name.
    #[serde(default, deserialize_with = "json::or_default")]
    pub emit_id: bool,
    /// Names and texts that each line has, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

/// Which part of a count is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Everything since the process started.
    Total,
    /// The increase since the last request for `New`: a line of the metrics file. Only that file asks so.
    New,
}

/// One metric, or a group of metrics, that can be written as JSON.
pub trait Group: Send + Sync {
    /// The present value as JSON.
    fn collect(&self, view: View) -> Value;
}

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Counter {
    value: AtomicU64,
    /// The value that was told by the last `View::New`.
    told: AtomicU64,
}

impl Counter {
    /// A counter at 0.
    pub const fn new() -> Self {
        Self { value: AtomicU64::new(0), told: AtomicU64::new(0) }
    }

    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.value.fetch_add(count, Ordering::Relaxed);
    }

    /// The count since the process started.
    pub fn total(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }
}

impl Group for Counter {
    fn collect(&self, view: View) -> Value {
        let value = self.total();
        match view {
            View::Total => value.into(),
            View::New => value.wrapping_sub(self.told.swap(value, Ordering::Relaxed)).into(),
        }
    }
}

/// The last value of something that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// A gauge at 0.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Sets the present value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

impl Group for Gauge {
    fn collect(&self, _: View) -> Value {
        self.0.load(Ordering::Relaxed).into()
    }
}

/// How long something took: the sum of all times, the shortest and the longest since the last line.
#[derive(Debug, Default)]
pub struct Latency {
    sum_us: Counter,
    /// The bitwise complement of the shortest time. "Nothing was timed yet" is 0 in this form, and a static
    /// variable of zeros takes no room in the binary.
    min_us: AtomicU64,
    max_us: AtomicU64,
}

impl Latency {
    /// A latency of which nothing was timed yet.
    pub const fn new() -> Self {
        Self { sum_us: Counter::new(), min_us: AtomicU64::new(0), max_us: AtomicU64::new(0) }
    }

    /// Adds one measured time.
    pub fn add(&self, time: Duration) {
        let us = time.as_micros() as u64;
        self.sum_us.add(us);
        // Most times are neither the shortest nor the longest, and a load costs less than an atomic exchange.
        if !us > self.min_us.load(Ordering::Relaxed) {
            self.min_us.fetch_max(!us, Ordering::Relaxed);
        }
        if us > self.max_us.load(Ordering::Relaxed) {
            self.max_us.fetch_max(us, Ordering::Relaxed);
        }
    }
}

impl Group for Latency {
    fn collect(&self, view: View) -> Value {
        let look = |value: &AtomicU64| match view {
            View::Total => value.load(Ordering::Relaxed),
            View::New => value.swap(0, Ordering::Relaxed),
        };
        let min = match look(&self.min_us) {
            0 => 0,
            complement => !complement,
        };
        let (max, sum) = (look(&self.max_us), self.sum_us.collect(view));
        let fields = [("min_us", min.into()), ("max_us", max.into()), ("sum_us", sum)];
        Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }
}

/// Declares a struct of metrics that implements `Default` (all at 0) and `Group` (its fields by name).
#[macro_export]
macro_rules! metrics {
    ($(#[$meta:meta])* $vis:vis struct $name:ident {
        $($(#[$field_meta:meta])* $field:ident: $kind:ty,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug)]
        $vis struct $name {
            $($(#[$field_meta])* pub $field: $kind,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl $name {
            /// All metrics at 0.
            pub const fn new() -> Self {
                Self { $($field: <$kind>::new(),)* }
            }
        }

        impl $crate::metrics::Group for $name {
            fn collect(&self, view: $crate::metrics::View) -> serde_json::Value {
                let mut fields = serde_json::Map::new();
                $(fields.insert(
                    stringify!($field).to_owned(),
                    $crate::metrics::Group::collect(&self.$field, view),
                );)*
                serde_json::Value::Object(fields)
            }
        }
    };
}
pub use metrics;

/// Adds the metrics `part` of one device to `sum`, the metrics of all devices of its kind: counts are added,
/// shortest and longest times are kept.
pub fn add_up(sum: &mut Map<String, Value>, part: &Map<String, Value>) {
    for (name, value) in part {
        let Some(old) = sum.get_mut(name) else {
            sum.insert(name.clone(), value.clone());
            continue;
        };
        if let (Value::Object(old), Value::Object(new)) = (&mut *old, value) {
            add_up(old, new);
        } else if let (Some(a), Some(b)) = (old.as_u64(), value.as_u64()) {
            *old = match name.as_str() {
                "max_us" => a.max(b),
                // The shortest time is 0 where nothing was timed.
                "min_us" if a == 0 || b == 0 => a.max(b),
                "min_us" => a.min(b),
                _ => a.wrapping_add(b),
            }
            .into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    metrics! {
        /// Two of each.
        struct Metrics {
            read_count: Counter,
            level: Gauge,
            read_agg: Latency,
        }
    }

    fn object(group: &impl Group, view: View) -> Map<String, Value> {
        group.collect(view).as_object().unwrap().clone()
    }

    #[test]
    fn a_line_has_what_came_since_the_last_and_a_total_has_everything() {
        let metrics = Metrics::default();
        metrics.read_count.add(3);
        metrics.level.set(7);
        metrics.read_agg.add(Duration::from_micros(20));
        metrics.read_agg.add(Duration::from_micros(5));
        let agg = json!({ "min_us": 5, "max_us": 20, "sum_us": 25 });
        assert_eq!(metrics.collect(View::New), json!({ "read_count": 3, "level": 7, "read_agg": agg }));
        metrics.read_count.add(2);
        let nothing = json!({ "min_us": 0, "max_us": 0, "sum_us": 0 });
        assert_eq!(metrics.collect(View::New), json!({ "read_count": 2, "level": 7, "read_agg": nothing }));
        let total = metrics.collect(View::Total);
        assert_eq!((&total["read_count"], &total["read_agg"]["sum_us"]), (&json!(5), &json!(25)));
    }

    #[test]
    fn devices_of_a_kind_add_up() {
        let (a, b) = (Metrics::default(), Metrics::default());
        a.read_count.add(1);
        b.read_count.add(2);
        a.read_agg.add(Duration::from_micros(9));
        let mut sum = Map::new();
        add_up(&mut sum, &object(&a, View::Total));
        add_up(&mut sum, &object(&b, View::Total));
        b.read_agg.add(Duration::from_micros(4));
        add_up(&mut sum, &object(&b, View::Total));
        assert_eq!(sum["read_count"], 5);
        assert_eq!(sum["read_agg"], json!({ "min_us": 4, "max_us": 9, "sum_us": 13 }));
    }

    #[test]
    fn many_threads_lose_no_count() {
        let counter = Counter::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| counter.add(1)));
            }
        });
        assert_eq!(counter.total(), 40_000);
    }
}
