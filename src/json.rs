//! Values in JSON bodies, read as Firecracker's clients know it: by the names that its types have in
//! messages, and with null where it takes null.

pub mod words;

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};

/// Reads a value from a text, byte by byte as the bodies of requests are read. serde_json's own reader of texts
/// would do the same, but the compiler would make a second copy of all code that reads our types.
///
/// # Errors
/// The text is not JSON, or not that of such a value.
pub fn from_text<'de, T: Deserialize<'de>>(text: &'de str) -> serde_json::Result<T> {
    serde_json::from_slice(text.as_bytes())
}

/// A value that may be null, which is its default.
pub fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A path. serde's own `PathBuf` would say `path string` in its messages, where clients expect `a string`.
pub fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    String::deserialize(deserializer).map(PathBuf::from)
}

/// A path, or null.
pub fn path_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(PathBuf::from))
}

/// How many CPUs: called `u8`, though we can have more.
pub fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    deserializer.deserialize_u16(Whole("u8", PhantomData))
}

/// The same, or null.
pub fn cpus_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    deserializer.deserialize_option(OrNull(Whole("u8", PhantomData)))
}

/// A size, called `usize`.
pub fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    deserializer.deserialize_u64(Whole("usize", PhantomData))
}

/// The same, or null.
pub fn size_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    deserializer.deserialize_option(OrNull(Whole("usize", PhantomData)))
}

/// A whole number of the type `T`, which has this name in messages.
struct Whole<T>(&'static str, PhantomData<T>);

impl<T: TryFrom<u64>> Visitor<'_> for Whole<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
    fn visit_u64<E: Error>(self, value: u64) -> Result<T, E> {
        T::try_from(value).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
    }
    fn visit_i64<E: Error>(self, value: i64) -> Result<T, E> {
        Err(E::invalid_value(Unexpected::Signed(value), &self))
    }
}

/// What `V` reads, or null.
struct OrNull<V>(V);

impl<'de, V: Visitor<'de>> Visitor<'de> for OrNull<V> {
    type Value = Option<V::Value>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }
    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_u64(self.0).map(Some)
    }
}
