//! The guest's console on this terminal: what can be said of it, and the device without its queues.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::console_worker::Running;
use super::{DEVICE_TYPE, F_SIZE, configuration};
use crate::devices::copy_config;
use crate::devices::kind::{CliOption, DeviceConfig, NotPatchable};
use crate::error::Result;
use crate::host::Host;
use crate::host::line::{TYPED_MAX, UserLine};
use crate::limiter::{self, Limiter, RateLimiter, TokenBucket};
use crate::metrics::{Counter, Group, metrics};
use crate::snapshot::{Snapshot, at_most};
use crate::virtio::{Io, VirtioDevice, Worker};

/// The only value of `--console`.
const VIRTIO: &str = "virtio";

/// The sizes of the queues by which the guest receives and sends; its driver fills the first with buffers of a page.
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// Body of `PUT /console`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Console"))]
#[serde(deny_unknown_fields, expecting = "struct ConsoleDeviceConfig")]
pub struct Config {
    /// The limit of what goes out, in bytes in a time; more is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "console";
    const MANY: bool = false;
    const NOUN: &'static str = "virtio console";
    const FAULT: &'static str = "Console config error";
    const OPTION: CliOption = CliOption {
        name: "console",
        value: VIRTIO,
        help: "\
The guest has a virtio console, too, Linux' `hvc0`, which has the keys and
knows the size of this terminal; it and the serial port, which stays for
what a kernel says first, both write here (docs/console.md)",
    };
    const EXAMPLE: &'static str = "{}";
    const PUBLISHED: &'static [&'static str] = &[];
    type Patch = NotPatchable;

    fn from_option(text: &str, _: usize) -> Result<Self, String> {
        match text {
            VIRTIO => Ok(Self::default()),
            "serial" => Err("the serial port is always there: leave the option out for it alone".to_owned()),
            _ => Err(format!("expected `{VIRTIO}`")),
        }
    }

    fn open(&self, _: &str, _: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        let limiter = Limiter::new(RateLimiter { bandwidth: self.rate_limiter, ops: None });
        let home = Arc::new(Mutex::new(Sent { gone: 0, size: (0, 0), limiter }));
        Ok(Box::new(Console { line: UserLine::new()?, metrics: Arc::default(), home }))
    }
}

metrics! {
    /// Counts of what went through the console. Directions are the guest's.
    pub struct Metrics {
        /// Bytes that were typed and that the guest was given.
        rx_bytes_count: Counter,
        /// Bytes that the guest sent.
        tx_bytes_count: Counter,
        /// Bytes that the terminal, or what is in its place, did not take.
        missed_write_count: Counter,
        /// Bytes that the rate limiter dropped.
        rate_limiter_dropped_bytes: Counter,
    }
}

/// How far the device is with its driver.
pub struct Sent {
    /// How many bytes of the first request are gone already.
    pub gone: u64,
    /// The size of the terminal that the driver was told last; 0: none.
    pub size: (u16, u16),
    /// The limit of the guest's output. A reset by the driver gives back nothing of what was used.
    pub limiter: Limiter,
}

/// The device.
struct Console {
    line: Arc<UserLine>,
    metrics: Arc<Metrics>,
    home: Arc<Mutex<Sent>>,
}

impl Console {
    fn sent<T>(&self, act: impl FnOnce(&mut Sent) -> T) -> T {
        act(&mut self.home.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The console as it is saved: what was typed and the guest has not been given, and how far its output is.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    #[serde(deserialize_with = "at_most::<TYPED_MAX, _, _>")]
    typed: Vec<u8>,
    gone: u64,
    size: (u16, u16),
    limits: limiter::State,
}

impl Snapshot for Console {
    type State = State;

    fn save(&self) -> Result<State> {
        self.sent(|sent| {
            let limits = sent.limiter.save()?;
            Ok(State { typed: self.line.typed(), gone: sent.gone, size: sent.size, limits })
        })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let State { typed, gone, size, limits } = state;
        self.line.set_typed(&typed);
        self.sent(|sent| {
            (sent.gone, sent.size) = (gone, size);
            sent.limiter.restore(limits)
        })
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&configuration(self.line.size()), offset, data);
    }

    fn line(&self) -> Option<Arc<UserLine>> {
        Some(self.line.clone())
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        Ok(vec![Box::new(Running::new(io, &self.line, &self.home, &self.metrics)?)])
    }

    fn reset(&mut self) {
        self.sent(|sent| (sent.gone, sent.size) = (0, (0, 0)));
    }

    /// Forgets what was typed: that was for the guest before the reset.
    fn power_on(&mut self) {
        self.reset();
        self.line.set_typed(&[]);
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_is_asked_for_by_its_kind() {
        assert_eq!(Config::from_option("virtio", 0), Ok(Config::default()));
        for (text, expected) in [
            ("", "expected `virtio`"),
            ("hvc0", "expected `virtio`"),
            ("serial", "the serial port is always there: leave the option out"),
        ] {
            let error = Config::from_option(text, 0).unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
