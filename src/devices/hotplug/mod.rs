//! Memory hotplug (virtio-mem; virtio 1.2, 5.15): a driver in the guest plugs blocks of memory, and unplugs them, until
//! the guest has as much as the host asks for. This file is what can be said of the device; [`device`] is the device,
//! [`blocks`] the state of its blocks, [`worker`] what it does.
//!
//! The guest finds a slot of memory as soon as one of its blocks is plugged, whole, and nothing there once none is: the
//! host protects slots, not blocks. What a guest touches of unplugged blocks beside plugged ones is its own memory, which
//! the next request for these blocks gives back; the most that a guest can have so is what was requested at most, in
//! whole slots ([`blocks::State::usable`]).

mod blocks;
mod device;
mod worker;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::kind::{self, CliOption, DeviceConfig, check_words};
#[cfg(test)]
use super::{change::PatchSchemas, kind::ToldSchemas};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::json;
use crate::memory::slots::{Room, SLOTS_MAX};
use crate::units::mebibytes;
use crate::virtio::VirtioDevice;

/// The form of the value of `--hotplug-memory`.
const FORM: &str = "SIZE[,slot=SIZE][,block=SIZE]";

/// The sizes that are taken where none is given, and the smallest ones, in MiB, as in Firecracker: Linux plugs by pieces
/// of 128 MiB at least (the sections of its memory map).
const SLOT_MIB: u64 = 128;
const BLOCK_MIB: u64 = 2;
/// The state of each block is one bit, which saved state has, too.
const BLOCKS_MAX: u64 = 1 << 20;
/// The room begins at a multiple of this: Linux on a large machine takes memory by pieces of up to 2 GiB.
const ALIGNMENT: u64 = 2 << 30;

/// Body of `PUT /hotplug/memory`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "MemoryHotplugConfig"))]
#[serde(deny_unknown_fields, expecting = "struct MemoryHotplugConfig")]
pub struct Config {
    /// The memory that can be plugged at most, in MiB: a multiple of the slots' size.
    #[serde(deserialize_with = "json::size")]
    pub total_size_mib: u64,
    /// The smallest piece that the guest plugs, in MiB: a power of two.
    #[serde(default = "block_size_mib", deserialize_with = "json::size")]
    pub block_size_mib: u64,
    /// The smallest piece that the guest finds or does not find, in MiB: a multiple of the blocks' size, and at least 128.
    #[serde(default = "slot_size_mib", deserialize_with = "json::size")]
    pub slot_size_mib: u64,
}

fn block_size_mib() -> u64 {
    BLOCK_MIB
}

fn slot_size_mib() -> u64 {
    SLOT_MIB
}

/// Body of `PATCH /hotplug/memory`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "MemoryHotplugSizeUpdate"))]
#[serde(deny_unknown_fields, expecting = "struct MemoryHotplugSizeUpdate")]
pub struct Patch {
    /// The memory that the guest is to have plugged from now on, in MiB: a multiple of the blocks' size.
    #[serde(deserialize_with = "json::size")]
    requested_size_mib: u64,
}

impl kind::Patch for Patch {
    fn id(&self) -> &str {
        ""
    }

    fn parse(_: &str, body: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }

    #[cfg(test)]
    fn schemas(generator: &mut schemars::SchemaGenerator) -> PatchSchemas {
        vec![("", Some("Set how much memory the guest is to plug"), Some(generator.subschema_for::<Self>()))]
    }
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "memory-hotplug";
    const PATH: &'static str = "hotplug/memory";
    const METRICS: &'static str = "memory_hotplug";
    const MANY: bool = false;
    const NOUN: &'static str = "memory hotplug device";
    const FAULT: &'static str = "Memory hotplug config error";
    const UPDATE_FAULT: &'static str = "Memory hotplug update error";
    const TOLD: &'static [&'static str] = &[""];
    const TELLS_ITSELF: bool = true;
    const OPTION: CliOption = CliOption {
        name: "hotplug-memory",
        value: FORM,
        help: "\
Memory that the guest can have beside its own, M or G: none at first, and
`alula ctl ID hotplug-memory SIZE` says how much. It comes and goes in
slots of 128M, and the guest takes it by blocks of 2M (docs/elastic.md)",
    };
    const EXAMPLE: &'static str = r#"{"total_size_mib": 1024}"#;
    const PUBLISHED: &'static [&'static str] = &["total_size_mib", "block_size_mib", "slot_size_mib"];
    type Patch = Patch;

    fn from_option(text: &str, _: usize) -> Result<Self, String> {
        let mut words = text.split(',');
        let size = words.next().unwrap_or_default();
        let total_size_mib =
            mebibytes(size).map_err(|error| format!("`{size}`: {error}: expected {FORM}"))?;
        let mut config = Self { total_size_mib, block_size_mib: BLOCK_MIB, slot_size_mib: SLOT_MIB };
        check_words(words.clone(), &[])?;
        for word in words {
            let field = match word.split_once('=') {
                Some(("block", size)) => (&mut config.block_size_mib, size),
                Some(("slot", size)) => (&mut config.slot_size_mib, size),
                _ => return Err(format!("`{word}` is unknown: expected {FORM}")),
            };
            *field.0 = mebibytes(field.1).map_err(|error| format!("`{word}`: {error}"))?;
        }
        Ok(config)
    }

    /// The messages have Firecracker's words, and the field that is meant.
    fn check(&self) -> Result<()> {
        let Self { total_size_mib: total, block_size_mib: block, slot_size_mib: slot } = *self;
        let wrong = |message: String| Err(Error::config(message));
        if block < BLOCK_MIB {
            return wrong(format!("Block size must not be lower than {BLOCK_MIB} MiB (`block_size_mib`)"));
        }
        if !block.is_power_of_two() {
            return wrong("Block size must be a power of 2 (`block_size_mib`)".to_owned());
        }
        if slot < SLOT_MIB {
            return wrong(format!("Slot size must not be lower than {SLOT_MIB} MiB (`slot_size_mib`)"));
        }
        if !slot.is_multiple_of(block) {
            return wrong(format!(
                "Slot size must be a multiple of block size ({block} MiB) (`slot_size_mib`)"
            ));
        }
        if total < slot {
            return wrong(format!(
                "Total size must not be lower than slot size ({slot} MiB) (`total_size_mib`)"
            ));
        }
        if !total.is_multiple_of(slot) {
            return wrong(format!(
                "Total size must be a multiple of slot size ({slot} MiB) (`total_size_mib`)"
            ));
        }
        if total.checked_mul(1 << 20).is_none() {
            return wrong("Total size in bytes must fit 64 bits (`total_size_mib`)".to_owned());
        }
        if total / slot > SLOTS_MAX {
            return wrong(format!(
                "Total size has {} slots, and a guest at most {SLOTS_MAX}: make them larger (`slot_size_mib`)",
                total / slot
            ));
        }
        match total / block > BLOCKS_MAX {
            true => wrong(format!(
                "Total size has {} blocks, and a guest at most {BLOCKS_MAX}: make them larger (`block_size_mib`)",
                total / block
            )),
            false => Ok(()),
        }
    }

    fn room(&self) -> Option<Room> {
        let [size, slot, block] =
            [self.total_size_mib, self.slot_size_mib, self.block_size_mib].map(|mib| mib << 20);
        Some(Room { size, slot, alignment: block.max(ALIGNMENT) })
    }

    fn open(&self, _: &str, _: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        Ok(Box::new(device::Hotplug::new(self.clone(), Arc::default())))
    }

    fn patched(&self, Patch { requested_size_mib: size }: &Patch) -> Result<Self> {
        let (block, total) = (self.block_size_mib, self.total_size_mib);
        if *size > total || !size.is_multiple_of(block) {
            // Firecracker's words, which tell the size in bytes, and then what is the case.
            return Err(Error::config(format!(
                "Size {} is invalid: it must be a multiple of block size and less than the total size \
                 (`requested_size_mib`: {size}, with blocks of {block} MiB and {total} MiB in all)",
                size.saturating_mul(1 << 20)
            )));
        }
        Ok(self.clone())
    }

    #[cfg(test)]
    fn told_schemas(generator: &mut schemars::SchemaGenerator) -> ToldSchemas {
        vec![("", "How much memory is plugged", generator.subschema_for::<device::Status>())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_what_the_file_would_say() {
        let parse = |text: &str| Config::from_option(text, 0);
        let plain: Config = serde_json::from_str(Config::EXAMPLE).unwrap();
        assert_eq!(parse("1G"), Ok(plain));
        let all = Config { total_size_mib: 4096, block_size_mib: 4, slot_size_mib: 256 };
        assert_eq!(parse("4G,block=4M,slot=256M"), Ok(all));
        for (text, expected) in [
            ("", "expected a size like 256M or 2G: expected SIZE[,slot="),
            ("slot=1G", "expected a size"),
            ("1G,block", "`block` is unknown"),
            ("1G,slot=x", "`slot=x`: expected a size"),
            ("1G,slot=1G,slot=1G", "`slot` is given twice"),
            ("1G,colour=2", "`colour=2` is unknown"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_that_do_not_go_together_are_refused_by_name() {
        let check = |total_size_mib, slot_size_mib, block_size_mib| {
            let config = Config { total_size_mib, slot_size_mib, block_size_mib };
            config.check().map_err(|error| error.to_string())
        };
        for (total, slot, block) in [(128, 128, 2), (1024, 128, 128), (3 << 20, 1024, 4), (260, 130, 2)] {
            assert_eq!(check(total, slot, block), Ok(()), "{total} {slot} {block}");
        }
        for (total, slot, block, expected) in [
            (1024, 128, 0, "Block size must not be lower than 2 MiB"),
            (1024, 128, 1, "Block size must not be lower than 2 MiB"),
            (1024, 128, 6, "Block size must be a power of 2"),
            (1024, 64, 2, "Slot size must not be lower than 128 MiB"),
            (1024, 130, 4, "Slot size must be a multiple of block size (4 MiB)"),
            (0, 128, 2, "Total size must not be lower than slot size (128 MiB)"),
            (1000, 128, 2, "Total size must be a multiple of slot size (128 MiB)"),
            (128 << 13, 128, 2, "Total size has 8192 slots, and a guest at most 4096"),
            (1 << 40, 1 << 39, 2, "blocks, and a guest at most 1048576"),
            (1 << 44, 1 << 43, 2, "must fit 64 bits"),
        ] {
            let error = check(total, slot, block).unwrap_err();
            assert!(error.contains(expected), "{total} {slot} {block}: {error}");
        }
    }

    #[test]
    fn a_request_is_whole_blocks_of_what_there_is() {
        let config = Config::from_option("1G,block=4M", 0).unwrap();
        for (size, is_right) in
            [(0, true), (4, true), (1024, true), (6, false), (1028, false), (u64::MAX, false)]
        {
            let patched = config.patched(&Patch { requested_size_mib: size });
            assert_eq!(patched.is_ok(), is_right, "{size}: {patched:?}");
        }
    }
}
