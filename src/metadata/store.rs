//! The data of the metadata service: one JSON object, which the API changes and the guest reads.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::json;

/// Why data is not taken.
#[derive(Debug, PartialEq)]
pub enum Refused {
    /// It would be larger than the limit.
    TooLarge(String),
    /// There is nothing yet that could be changed.
    NotInitialized,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TooLarge(message) => f.write_str(message),
            Self::NotInitialized => f.write_str("The MMDS data store is not initialized."),
        }
    }
}

/// The data, and how large it may become: each guest that asks has a copy of what it asks for made.
pub struct Store {
    data: Mutex<Option<Value>>,
    size_max: usize,
}

impl Store {
    /// Nothing yet, and at most `size_max` bytes as JSON.
    pub fn new(size_max: usize) -> Self {
        Self { data: Mutex::default(), size_max }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Value>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it; none: nothing was put yet.
    pub fn get(&self) -> Option<Value> {
        self.lock().clone()
    }

    /// Replaces all of it.
    pub fn put(&self, data: Map<String, Value>) -> Result<(), Refused> {
        let data = Value::Object(data);
        self.check(&data)?;
        *self.lock() = Some(data);
        Ok(())
    }

    /// Changes what `patch` names, and removes what it says is null (RFC 7396). A change that makes the data too
    /// large changes nothing.
    pub fn patch(&self, patch: Map<String, Value>) -> Result<(), Refused> {
        let mut data = self.lock();
        let mut changed = data.clone().ok_or(Refused::NotInitialized)?;
        merge(&mut changed, Value::Object(patch));
        self.check(&changed)?;
        *data = Some(changed);
        Ok(())
    }

    fn check(&self, data: &Value) -> Result<(), Refused> {
        let size = data.to_string().len();
        match size <= self.size_max {
            true => Ok(()),
            false => Err(Refused::TooLarge(format!(
                "The MMDS data store has {size} bytes then, and may have {} (--mmds-size-limit).",
                self.size_max
            ))),
        }
    }

    /// What `find` makes of the value at `path`, whose words are separated by slashes; none: there is none.
    pub fn look_up<T>(&self, path: &str, find: impl FnOnce(&Value) -> T) -> Option<T> {
        let data = self.lock();
        let words = path.split('/').filter(|word| !word.is_empty());
        let value = words.clone().try_fold(data.as_ref()?, |value, word| match value {
            Value::Object(fields) => fields.get(word),
            Value::Array(list) => list.get(word.parse::<usize>().ok()?),
            _ => None,
        })?;
        Some(find(value))
    }

    /// The data as saved state: JSON, or nothing.
    pub fn save(&self) -> Option<String> {
        self.lock().as_ref().map(Value::to_string)
    }

    /// Takes over what [`Self::save`] gave.
    pub fn restore(&self, saved: Option<&str>) -> Result<()> {
        let damaged = |what: &dyn std::fmt::Display| Error::config(format!("the saved metadata: {what}"));
        let data = saved.map(|text| {
            let data: Map<String, Value> = json::from_text(text).map_err(|error| damaged(&error))?;
            let data = Value::Object(data);
            self.check(&data).map_err(|error| damaged(&error))?;
            Ok(data)
        });
        *self.lock() = data.transpose()?;
        Ok(())
    }
}

/// RFC 7396, 2. As deep as the parser lets JSON be.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(fields) = target {
        for (name, value) in patch {
            match value {
                Value::Null => drop(fields.remove(&name)),
                value => merge(fields.entry(name).or_insert(Value::Null), value),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_patch_changes_adds_and_removes() {
        let store = Store::new(1000);
        assert_eq!(store.patch(object(json!({}))), Err(Refused::NotInitialized));
        assert_eq!(store.get(), None);
        store.put(object(json!({ "a": { "b": 1, "c": [1, 2] }, "d": "x" }))).unwrap();
        store
            .patch(object(json!({ "a": { "b": null, "c": "y", "e": { "f": null, "g": 7 } }, "h": [] })))
            .unwrap();
        assert_eq!(store.get(), Some(json!({ "a": { "c": "y", "e": { "g": 7 } }, "d": "x", "h": [] })));
    }

    #[test]
    fn data_over_the_limit_is_refused_and_changes_nothing() {
        let store = Store::new(20);
        let data = json!({ "a": "x".repeat(12) });
        assert_eq!(data.to_string().len(), 20);
        store.put(object(data.clone())).unwrap();
        for refused in
            [store.put(object(json!({ "a": "x".repeat(13) }))), store.patch(object(json!({ "b": 1 })))]
        {
            assert!(matches!(refused, Err(Refused::TooLarge(_))), "{refused:?}");
            assert_eq!(store.get(), Some(data.clone()));
        }
        store.patch(object(json!({ "a": null, "b": 1 }))).unwrap();
        assert_eq!(store.get(), Some(json!({ "b": 1 })));
    }

    #[test]
    fn saved_data_comes_back_or_is_refused() {
        let store = Store::new(100);
        store.restore(None).unwrap();
        assert_eq!(store.save(), None);
        store.put(object(json!({ "a": [1, { "b": "c" }] }))).unwrap();
        let (saved, other) = (store.save(), Store::new(100));
        other.restore(saved.as_deref()).unwrap();
        assert_eq!(other.get(), store.get());
        for damaged in ["", "{", "7", "[]", &json!({ "a": "x".repeat(100) }).to_string()] {
            assert!(other.restore(Some(damaged)).is_err(), "{damaged}");
            assert_eq!(other.get(), store.get());
        }
    }

    #[test]
    fn values_are_found_by_their_path() {
        let store = Store::new(1000);
        assert_eq!(store.look_up("/", |_| ()), None);
        store.put(object(json!({ "a": { "b": ["x", { "c": 1 }], "": 2 }, "0": "y" }))).unwrap();
        let found = |path: &str| store.look_up(path, Value::to_string);
        for (path, expected) in [
            ("/a/b/0", Some(r#""x""#)),
            ("//a//b/1/c/", Some("1")),
            ("/0", Some(r#""y""#)),
            ("/a/b/2", None),
            ("/a/b/-1", None),
            ("/a/b/0/c", None),
            ("/b", None),
        ] {
            assert_eq!(found(path).as_deref(), expected, "{path}");
        }
        assert_eq!(found("/"), found(""));
    }
}
