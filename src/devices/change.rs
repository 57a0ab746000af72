//! Changes to devices in use: the PATCH requests of the API.

use std::any::Any;

use serde_json::{Value, json};

use super::kind::{ConfiguredDevice, Described, DeviceConfig};
use crate::dialect::Dialect;
use crate::error::Result;

/// Places that PATCH requests go to, each with what a request to it does, if that is not just a change of the device,
/// and the schema of its body.
#[cfg(test)]
pub type PatchSchemas = Vec<(&'static str, Option<&'static str>, Option<schemars::Schema>)>;

/// A PATCH request.
pub trait Patch: Described + Send + Sized + 'static {
    /// Whether devices of the kind have a PATCH request.
    const EXISTS: bool = true;
    /// The fields that Firecracker's request has, where ours has more; else none.
    const PUBLISHED: &'static [&'static str] = &[];
    /// The device that is to be changed; empty where there is but one.
    fn id(&self) -> &str;
    /// Parses the body of a request to `place`, which is what follows the path of a device of which there is but one.
    fn parse(place: &str, body: &[u8]) -> serde_json::Result<Self>;
    /// Whether a request to `place` must have a body.
    fn needs_body(_place: &str) -> bool {
        true
    }
    /// The places that the kind's PATCH requests go to, with their schemas.
    #[cfg(test)]
    fn schemas(generator: &mut schemars::SchemaGenerator) -> PatchSchemas {
        vec![("", None, Some(generator.subschema_for::<Self>()))]
    }
}

/// The PATCH request of a device that cannot be changed while it runs: there is none.
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum NotPatchable {}

impl Patch for NotPatchable {
    const EXISTS: bool = false;
    fn id(&self) -> &str {
        match *self {}
    }
    fn parse(_: &str, _: &[u8]) -> serde_json::Result<Self> {
        Err(serde::de::Error::custom("it cannot be changed"))
    }
}

/// A change to a device, of the same kind as the device.
pub struct Change {
    /// The device's id.
    pub id: String,
    /// The words of the client, for whoever is told of the change.
    pub body: Value,
    /// The change, as the `Patch` of the device's kind.
    patch: Box<dyn Any + Send>,
    pub(super) apply: fn(&ConfiguredDevice, &dyn Any) -> Result<ConfiguredDevice>,
}

impl Change {
    pub(super) fn parse<C: DeviceConfig>(
        place: &str,
        text: &[u8],
        dialect: Dialect,
    ) -> serde_json::Result<Self> {
        if !C::Patch::PUBLISHED.is_empty() {
            dialect.check_fields(text, C::Patch::PUBLISHED)?;
        }
        // The body is parsed as its own type first, which knows of duplicate fields and tells where something is wrong.
        let patch = C::Patch::parse(place, text)?;
        let apply = |device: &ConfiguredDevice, patch: &dyn Any| {
            let config = device.config::<C>().zip(patch.downcast_ref());
            let (config, patch) = config.expect("a device is changed by a change of its kind");
            config.patched(patch).map(ConfiguredDevice::new)
        };
        let body = if text.is_empty() { Value::Null } else { serde_json::from_slice(text)? };
        let body = if place.is_empty() { body } else { json!({ place: body }) };
        let id = patch.id().to_owned();
        Ok(Self { id, body, patch: Box::new(patch), apply })
    }

    /// The change as the kind's `Patch`, which [`patch`](crate::virtio::VirtioDevice::patch) of the device takes.
    pub fn patch(&self) -> &dyn Any {
        &*self.patch
    }
}
