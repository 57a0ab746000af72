//! Whose API is spoken: our own, which is Firecracker's and more, or, called by its name, Firecracker's
//! alone. An orchestrator that drives Firecracker then meets nothing that Firecracker would not do.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Whose API is spoken.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub enum Dialect {
    /// Our own.
    #[default]
    Alula,
    /// Firecracker's: what we add to it is unknown.
    Firecracker,
}

impl Dialect {
    /// No microVM may have more CPUs than this.
    pub fn vcpus_max(self) -> Option<u16> {
        (self == Self::Firecracker).then_some(32)
    }

    /// Refuses the fields of a JSON object that are none of this API's; `published` are Firecracker's. What
    /// else is wrong with `text` is for who reads it to say.
    pub fn check_fields(self, text: &[u8], published: &'static [&'static str]) -> serde_json::Result<()> {
        if self == Self::Alula {
            return Ok(());
        }
        match Fields(published).deserialize(&mut serde_json::Deserializer::from_slice(text)) {
            Err(error) if error.to_string().starts_with("unknown field") => Err(error),
            _ => Ok(()),
        }
    }
}

/// Looks at the names in an object.
struct Fields(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for Fields {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if !self.0.contains(&name.as_str()) {
                return Err(Error::unknown_field(&name, self.0));
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}
