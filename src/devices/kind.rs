//! What all devices that a configuration lists have in common, so that the config file, the API, the
//! command line and the machine know none of them: each describes itself in its own file by
//! [`DeviceConfig`], and [`DeviceKind`] is that description with its type erased.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::KINDS;
#[cfg(test)]
use super::change::PatchSchemas;
use crate::dialect::Dialect;
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::memory::slots::Room;
use crate::virtio::VirtioDevice;

pub use super::change::{Change, NotPatchable, Patch};
pub use super::option::{CliOption, check_words};

/// One device as its owner writes it down: the body of its PUT request, an element of its section of
/// the config file, what its option on the command line comes to.
pub trait DeviceConfig:
    Clone + fmt::Debug + DeserializeOwned + Serialize + Described + Send + Sync + 'static
{
    /// Its section of the config file.
    const SECTION: &'static str;
    /// Its path in the API, without the slash before it.
    const PATH: &'static str = Self::SECTION;
    /// What its metrics are called, with its id after an underscore if there can be many.
    const METRICS: &'static str = Self::SECTION;
    /// There can be many, told apart by `id`: the section is a list, and the id is part of the path.
    const MANY: bool;
    /// What errors and log lines call one: "disk".
    const NOUN: &'static str;
    /// How faults of the API about it begin: "Drive config error".
    const FAULT: &'static str;
    /// How faults of the API about a device in use begin.
    const UPDATE_FAULT: &'static str = Self::FAULT;
    /// The places below a device's path at which GET tells something: at the empty one its configuration, at the
    /// others what [`VirtioDevice::tell`] says.
    const TOLD: &'static [&'static str] = &[];
    /// The guest finds host memory of it at addresses of its own ([`VirtioDevice::view`]).
    const HAS_WINDOW: bool = false;
    /// Once the guest runs, GET at the device's own path tells what the device says ([`VirtioDevice::tell`]), and before
    /// nothing.
    const TELLS_ITSELF: bool = false;
    /// The fault for a second device that the guest is to boot from.
    const SECOND_ROOT: &'static str = "A root block device already exists! (`is_root_device`)";
    /// The option of the command line that adds one.
    const OPTION: CliOption;
    /// One that makes sense in itself, as JSON: for the documentation and the tests.
    const EXAMPLE: &'static str;
    /// The fields that Firecracker's API has; the others are ours, and unknown where that is spoken. None: the kind is ours.
    const PUBLISHED: &'static [&'static str];
    /// The body of its PATCH request; [`NotPatchable`] if there is none.
    type Patch: Patch;

    /// What tells it from others of its kind; empty where there is but one.
    fn id(&self) -> &str {
        ""
    }
    /// From the value of `OPTION`; `number` of its kind have come before. The error says what was
    /// expected.
    fn from_option(text: &str, number: usize) -> Result<Self, String>;
    /// Whether it makes sense in itself, whatever the host can do.
    fn check(&self) -> Result<()> {
        Ok(())
    }
    /// Whether it can be in one machine with `other` of its kind, whose id is another.
    fn check_beside(&self, _other: &Self) -> Result<()> {
        Ok(())
    }
    /// Whether a guest with this much memory, in MiB, can have the device.
    fn check_memory(&self, _memory_mib: u64) -> Result<()> {
        Ok(())
    }
    /// If the guest boots from it: what the kernel's command line must say.
    fn root_words(&self) -> Option<String> {
        None
    }
    /// The addresses of the guest at which the device plugs memory, if it does.
    fn room(&self) -> Option<Room> {
        None
    }
    /// Whether another process works in guest memory for it.
    fn shares_memory(&self) -> bool {
        false
    }
    /// Whether a field is given that newer clients no longer give.
    fn is_deprecated(&self) -> bool {
        false
    }
    /// On how many threads of its own it is to run; 0: on the one that all share.
    fn threads(&self) -> usize {
        0
    }
    /// Opens ahead of the start what must be there when it is named. It was checked before.
    fn hold(&self, _host: &mut Host) -> Result<()> {
        Ok(())
    }
    /// Looks for what it needs of the host, and changes nothing. It was checked before.
    fn look(&self) -> Result<()> {
        self.hold(&mut Host::default())
    }
    /// Opens what it needs of the host; `vm` is the microVM's name. It was checked before.
    fn open(&self, vm: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>>;
    /// This configuration with a change that makes sense; the device itself is changed by
    /// [`VirtioDevice::patch`], which gets the same `Patch`.
    fn patched(&self, _patch: &Self::Patch) -> Result<Self> {
        Err(Error::config("nothing of it can be changed while it runs"))
    }
    /// The places of `TOLD`, each with what GET tells there and its schema.
    #[cfg(test)]
    fn told_schemas(_: &mut schemars::SchemaGenerator) -> ToldSchemas {
        Vec::new()
    }
    /// The fault for a path and a body that name two ids.
    fn id_mismatch(_path: &str, _body: &str) -> String {
        "The id from the path does not match the id from the body!".to_owned()
    }
}

/// The places below a device's path that GET answers at, each with what is told there, in words and as a schema.
#[cfg(test)]
pub type ToldSchemas = Vec<(&'static str, &'static str, schemars::Schema)>;

/// What the schema that is checked in needs: nothing, outside of the tests.
#[cfg(not(test))]
pub trait Described {}
#[cfg(not(test))]
impl<T> Described for T {}
/// The schema of the type.
#[cfg(test)]
pub trait Described: schemars::JsonSchema {}
#[cfg(test)]
impl<T: schemars::JsonSchema> Described for T {}

/// A line of the table of devices.
pub struct DeviceKind {
    /// See [`DeviceConfig`], as for all of these.
    pub section: &'static str,
    /// Its path in the API.
    pub path: &'static str,
    /// What its metrics are called.
    pub metrics: &'static str,
    /// There can be many.
    pub many: bool,
    /// What one is called.
    pub noun: &'static str,
    /// How faults begin.
    pub fault: &'static str,
    /// How faults about a device in use begin.
    pub update_fault: &'static str,
    /// The places below a device's path at which GET tells something.
    pub told: &'static [&'static str],
    /// The guest finds host memory of it at addresses of its own.
    pub has_window: bool,
    /// GET at the device's own path tells what the device says.
    pub tells_itself: bool,
    /// The fault for a second device that the guest is to boot from.
    pub second_root: &'static str,
    /// The command line's option.
    pub option: CliOption,
    /// One as JSON.
    pub example: &'static str,
    /// There is a PATCH request.
    pub patchable: bool,
    /// Firecracker has no such devices.
    pub is_ours: bool,
    /// The fault for two ids.
    pub id_mismatch: fn(&str, &str) -> String,
    /// Whether a PATCH request to a place must have a body.
    pub patch_needs_body: fn(&str) -> bool,
    /// The schema of the body of the kind's PUT request.
    #[cfg(test)]
    pub schema: fn(&mut schemars::SchemaGenerator) -> schemars::Schema,
    /// The PATCH requests to devices of the kind.
    #[cfg(test)]
    pub patches: fn(&mut schemars::SchemaGenerator) -> PatchSchemas,
    /// The places that GET answers at for devices of the kind.
    #[cfg(test)]
    pub told_schemas: fn(&mut schemars::SchemaGenerator) -> ToldSchemas,
    parse: fn(&[u8], Dialect) -> serde_json::Result<ConfiguredDevice>,
    parse_patch: fn(&str, &[u8], Dialect) -> serde_json::Result<Change>,
    from_option: fn(&str, usize) -> Result<ConfiguredDevice, String>,
}

impl DeviceKind {
    /// The description that `C` gives.
    pub const fn of<C: DeviceConfig>() -> Self {
        Self {
            section: C::SECTION,
            path: C::PATH,
            metrics: C::METRICS,
            many: C::MANY,
            noun: C::NOUN,
            fault: C::FAULT,
            update_fault: C::UPDATE_FAULT,
            told: C::TOLD,
            has_window: C::HAS_WINDOW,
            tells_itself: C::TELLS_ITSELF,
            second_root: C::SECOND_ROOT,
            option: C::OPTION,
            example: C::EXAMPLE,
            patchable: C::Patch::EXISTS,
            is_ours: C::PUBLISHED.is_empty(),
            id_mismatch: C::id_mismatch,
            patch_needs_body: C::Patch::needs_body,
            #[cfg(test)]
            schema: |generator| generator.subschema_for::<C>(),
            #[cfg(test)]
            patches: |generator| match C::Patch::EXISTS {
                true => C::Patch::schemas(generator),
                false => Vec::new(),
            },
            #[cfg(test)]
            told_schemas: C::told_schemas,
            parse: |text, dialect| {
                dialect.check_fields(text, C::PUBLISHED)?;
                serde_json::from_slice::<C>(text).map(ConfiguredDevice::new)
            },
            parse_patch: Change::parse::<C>,
            from_option: |text, number| C::from_option(text, number).map(ConfiguredDevice::new),
        }
    }

    /// Whether who speaks this dialect knows such devices.
    pub fn is_known_in(&self, dialect: Dialect) -> bool {
        dialect == Dialect::Alula || !self.is_ours
    }

    /// A device from JSON.
    pub fn parse(&self, text: &[u8]) -> serde_json::Result<ConfiguredDevice> {
        self.parse_as(Dialect::Alula, text)
    }

    /// A device from JSON in this dialect.
    pub fn parse_as(&self, dialect: Dialect, text: &[u8]) -> serde_json::Result<ConfiguredDevice> {
        (self.parse)(text, dialect)
    }

    /// A change to a device from the body of a request, to `place` below the device's path.
    pub fn parse_patch(&self, place: &str, text: &[u8]) -> serde_json::Result<Change> {
        self.parse_patch_as(Dialect::Alula, place, text)
    }

    /// A change from the body of a request in this dialect.
    pub fn parse_patch_as(&self, dialect: Dialect, place: &str, text: &[u8]) -> serde_json::Result<Change> {
        (self.parse_patch)(place, text, dialect)
    }

    /// A device from its option's value; `number` of its kind have come before.
    pub fn from_option(&self, text: &str, number: usize) -> Result<ConfiguredDevice, String> {
        let device = (self.from_option)(text, number)?;
        device.check().map_err(|error| error.to_string())?;
        Ok(device)
    }

    /// What the one called `id` is called.
    pub fn name(&self, id: &str) -> String {
        match self.many {
            true => format!("{} `{id}`", self.noun),
            false => self.noun.to_owned(),
        }
    }
}

impl PartialEq for DeviceKind {
    fn eq(&self, other: &Self) -> bool {
        self.section == other.section
    }
}

/// A device as configured, whatever its kind.
#[derive(Clone)]
pub struct ConfiguredDevice(Arc<dyn AnyConfig>);

/// A device is shown as JSON, as every kind can be: the kinds' own `Debug` would be tables of functions, which each
/// start writes.
impl fmt::Debug for ConfiguredDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.section(), self.0.to_value())
    }
}

impl ConfiguredDevice {
    /// A device of `config`'s kind.
    pub fn new<C: DeviceConfig>(config: C) -> Self {
        Self(Arc::new(config))
    }

    /// Its line of the table.
    pub fn kind(&self) -> &'static DeviceKind {
        KINDS.iter().find(|kind| kind.section == self.0.section()).expect("a device in use is in the table")
    }

    /// What tells it from others of its kind; empty where there is but one.
    pub fn id(&self) -> &str {
        self.0.id()
    }

    /// What log lines and errors call it.
    pub fn name(&self) -> String {
        self.kind().name(self.id())
    }

    /// The groups of metrics that what it counts is added to: its own if there can be many, and its kind's.
    pub fn metrics(&self) -> Vec<String> {
        let kind = self.kind();
        let own = kind.many.then(|| format!("{}_{}", kind.metrics, self.id()));
        own.into_iter().chain([kind.metrics.to_owned()]).collect()
    }

    /// As its own type.
    pub fn config<C: DeviceConfig>(&self) -> Option<&C> {
        (&*self.0 as &dyn Any).downcast_ref()
    }

    /// Whether it makes sense in itself, whatever the host can do.
    pub fn check(&self) -> Result<()> {
        self.0.check()
    }

    /// Both have the same place in a configuration: the one replaces the other.
    pub fn replaces(&self, other: &Self) -> bool {
        self.kind() == other.kind() && self.id() == other.id()
    }

    /// Whether it can be in one machine with `other`, which it does not replace.
    pub fn check_beside(&self, other: &Self) -> Result<()> {
        if self.root_words().is_some() && other.root_words().is_some() {
            return Err(Error::config(self.kind().second_root));
        }
        self.0.check_beside(other)
    }

    /// Whether a guest with this much memory, in MiB, can have the device.
    pub fn check_memory(&self, memory_mib: u64) -> Result<()> {
        self.0.check_memory(memory_mib)
    }

    /// If the guest boots from it: what the kernel's command line must say.
    pub fn root_words(&self) -> Option<String> {
        self.0.root_words()
    }

    /// The addresses of the guest at which the device plugs memory, if it does.
    pub fn room(&self) -> Option<Room> {
        self.0.room()
    }

    /// Whether another process works in guest memory for it.
    pub fn shares_memory(&self) -> bool {
        self.0.shares_memory()
    }

    /// Whether a field is given that newer clients no longer give.
    pub fn is_deprecated(&self) -> bool {
        self.0.is_deprecated()
    }

    /// On how many threads of its own it is to run; 0: on the one that all share.
    pub fn threads(&self) -> usize {
        self.0.threads()
    }

    /// Opens ahead of the start what must be there when it is named.
    pub fn hold(&self, host: &mut Host) -> Result<()> {
        self.0.hold(host)
    }

    /// Looks for what it needs of the host, and changes nothing.
    pub fn look(&self) -> Result<()> {
        self.0.look().with_context(|| self.name())
    }

    /// Opens what it needs of the host; `vm` is the microVM's name.
    pub fn open(&self, vm: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        self.0.open(vm, host).with_context(|| format!("set up {}", self.name()))
    }

    /// This configuration with a change that makes sense.
    pub fn patched(&self, change: &Change) -> Result<Self> {
        (change.apply)(self, change.patch())
    }
}

impl Serialize for ConfiguredDevice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.to_value().serialize(serializer)
    }
}

/// `DeviceConfig` without what has no place in a trait object.
trait AnyConfig: Any + Send + Sync {
    fn section(&self) -> &'static str;
    fn id(&self) -> &str;
    fn check(&self) -> Result<()>;
    fn check_beside(&self, other: &ConfiguredDevice) -> Result<()>;
    fn check_memory(&self, memory_mib: u64) -> Result<()>;
    fn root_words(&self) -> Option<String>;
    fn room(&self) -> Option<Room>;
    fn shares_memory(&self) -> bool;
    fn is_deprecated(&self) -> bool;
    fn threads(&self) -> usize;
    fn hold(&self, host: &mut Host) -> Result<()>;
    fn look(&self) -> Result<()>;
    fn open(&self, vm: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>>;
    fn to_value(&self) -> Value;
}

impl<C: DeviceConfig> AnyConfig for C {
    fn section(&self) -> &'static str {
        C::SECTION
    }
    fn id(&self) -> &str {
        DeviceConfig::id(self)
    }
    fn check(&self) -> Result<()> {
        DeviceConfig::check(self)
    }
    fn check_beside(&self, other: &ConfiguredDevice) -> Result<()> {
        other.config().map_or(Ok(()), |other| DeviceConfig::check_beside(self, other))
    }
    fn check_memory(&self, memory_mib: u64) -> Result<()> {
        DeviceConfig::check_memory(self, memory_mib)
    }
    fn root_words(&self) -> Option<String> {
        DeviceConfig::root_words(self)
    }
    fn room(&self) -> Option<Room> {
        DeviceConfig::room(self)
    }
    fn shares_memory(&self) -> bool {
        DeviceConfig::shares_memory(self)
    }
    fn is_deprecated(&self) -> bool {
        DeviceConfig::is_deprecated(self)
    }
    fn threads(&self) -> usize {
        DeviceConfig::threads(self)
    }
    fn hold(&self, host: &mut Host) -> Result<()> {
        DeviceConfig::hold(self, host)
    }
    fn look(&self) -> Result<()> {
        DeviceConfig::look(self)
    }
    fn open(&self, vm: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        DeviceConfig::open(self, vm, host)
    }
    fn to_value(&self) -> Value {
        serde_json::to_value(self).expect("names and numbers are JSON")
    }
}

/// The value of a property that is true where nobody gives it.
pub fn yes() -> bool {
    true
}

/// Whether a property that is true where nobody gives it need not be written.
pub fn is_yes(value: &bool) -> bool {
    *value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_describes_itself() {
        for kind in KINDS {
            let device = kind.parse(kind.example.as_bytes()).unwrap();
            device.check().unwrap();
            assert!(*device.kind() == *kind && device.id().is_empty() != kind.many, "{}", kind.section);
            assert!(kind.option.help.lines().all(|line| line.len() <= 75), "{}", kind.section);
            let same = |other: &&DeviceKind| other.path == kind.path || other.option.name == kind.option.name;
            assert_eq!(KINDS.iter().filter(same).count(), 1, "{}", kind.section);
        }
    }
}
