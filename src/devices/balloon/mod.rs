//! The memory balloon (virtio 1.2, 5.5): a driver in the guest takes memory out of the guest's use, as much as the
//! host asks for, and the host has it meanwhile. By the same device, a guest can tell how it is off for memory
//! (statistics), and which of its pages are free: whenever there are some (reporting), or once when it is asked
//! (hinting). This file is what can be said of it; [`device`] is the device, [`worker`] what it does.

mod device;
mod statistics;
mod worker;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::kind::{self, CliOption, DeviceConfig, check_words};
#[cfg(test)]
use super::{change::PatchSchemas, kind::ToldSchemas};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::units::mebibytes;
use crate::virtio::VirtioDevice;

/// The form of the value of `--balloon`.
const FORM: &str = "SIZE[,oom][,stats=SECONDS][,hinting][,reporting]";

/// The places below the path of the device that GET and PATCH requests go to.
const STATISTICS: &str = "statistics";
const HINTING_STATUS: &str = "hinting/status";
const HINTING_START: &str = "hinting/start";
const HINTING_STOP: &str = "hinting/stop";

/// Body of `PUT /balloon`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Balloon"))]
#[serde(deny_unknown_fields, expecting = "struct BalloonDeviceConfig")]
pub struct Config {
    /// The amount of memory that the guest is to do without, in MiB.
    pub amount_mib: u32,
    /// A guest that has no memory left may take some back, whatever it is to do without.
    pub deflate_on_oom: bool,
    /// The interval at which the guest tells its statistics, in seconds; 0: it never tells them.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest can be asked which of its pages are free.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// The guest gives free pages back by itself.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Body of `PATCH /balloon`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "BalloonUpdate"))]
#[serde(deny_unknown_fields, expecting = "struct BalloonUpdateConfig")]
pub struct Amount {
    /// The amount of memory that the guest is to do without from now on, in MiB.
    amount_mib: u32,
}

/// Body of `PATCH /balloon/statistics`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "BalloonStatsUpdate"))]
#[serde(deny_unknown_fields, expecting = "struct BalloonUpdateStatsConfig")]
pub struct Interval {
    /// The interval at which the guest tells its statistics from now on, in seconds. A guest that tells them cannot be
    /// made to stop, nor one that does not to begin.
    stats_polling_interval_s: u16,
}

/// Body of `PATCH /balloon/hinting/start`, which may be left out.
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "BalloonStartCmd"))]
#[serde(deny_unknown_fields, expecting = "struct StartHintingCmd")]
pub struct Start {
    /// When the guest has told of all its free pages, it may use them again at once; else it waits for
    /// `/balloon/hinting/stop`. None: it may.
    acknowledge_on_stop: Option<bool>,
}

/// A change of the device.
#[derive(Debug)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Patch {
    /// A new amount of memory that the guest is to do without.
    Amount(Amount),
    /// A new interval at which the guest tells its statistics.
    Interval(Interval),
    /// A request to the guest to tell which of its pages are free.
    Start(Start),
    /// The end of hinting: the guest need not tell of free pages any more, and may use them again.
    Stop,
}

impl kind::Patch for Patch {
    fn id(&self) -> &str {
        ""
    }

    fn parse(place: &str, body: &[u8]) -> serde_json::Result<Self> {
        match place {
            STATISTICS => serde_json::from_slice(body).map(Self::Interval),
            HINTING_START if body.is_empty() => Ok(Self::Start(Start::default())),
            HINTING_START => serde_json::from_slice(body).map(Self::Start),
            HINTING_STOP => Ok(Self::Stop),
            _ => serde_json::from_slice(body).map(Self::Amount),
        }
    }

    fn needs_body(place: &str) -> bool {
        ![HINTING_START, HINTING_STOP].contains(&place)
    }

    #[cfg(test)]
    fn schemas(generator: &mut schemars::SchemaGenerator) -> PatchSchemas {
        vec![
            ("", Some("Set what the guest is to do without"), Some(generator.subschema_for::<Amount>())),
            (
                STATISTICS,
                Some("Set how often the guest tells its statistics"),
                Some(generator.subschema_for::<Interval>()),
            ),
            (
                HINTING_START,
                Some("Ask the guest which of its pages are free, and take those"),
                Some(generator.subschema_for::<Start>()),
            ),
            (HINTING_STOP, Some("Let the guest use the pages that it told of"), None),
        ]
    }
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "balloon";
    const MANY: bool = false;
    const NOUN: &'static str = "balloon device";
    const FAULT: &'static str = "Balloon config error";
    const UPDATE_FAULT: &'static str = "Balloon update error";
    const TOLD: &'static [&'static str] = &["", STATISTICS, HINTING_STATUS];
    const OPTION: CliOption = CliOption {
        name: "balloon",
        value: FORM,
        help: "\
Memory that the guest is to do without, M or G, or 0: none at first;
`alula ctl ID balloon SIZE` changes it. oom: a guest that has none left
may take some back. stats: it says every so often how it is off.
reporting: it gives free memory back by itself. hinting: it can be asked
which memory is free (docs/elastic.md)",
    };
    const EXAMPLE: &'static str = r#"{"amount_mib": 0, "deflate_on_oom": false}"#;
    const PUBLISHED: &'static [&'static str] = &[
        "amount_mib",
        "deflate_on_oom",
        "stats_polling_interval_s",
        "free_page_hinting",
        "free_page_reporting",
    ];
    type Patch = Patch;

    fn from_option(text: &str, _: usize) -> Result<Self, String> {
        let mut words = text.split(',');
        let size = words.next().unwrap_or_default();
        let amount = mebibytes(size).map_err(|error| format!("`{size}`: {error}: expected {FORM}"))?;
        let amount_mib = amount.try_into().map_err(|_| format!("`{size}` is more than any guest has"))?;
        let mut config = Self {
            amount_mib,
            deflate_on_oom: false,
            stats_polling_interval_s: 0,
            free_page_hinting: false,
            free_page_reporting: false,
        };
        check_words(words.clone(), &[])?;
        for word in words {
            match word.split_once('=').unwrap_or((word, "")) {
                ("oom", "") => config.deflate_on_oom = true,
                ("hinting", "") => config.free_page_hinting = true,
                ("reporting", "") => config.free_page_reporting = true,
                ("stats", seconds) => {
                    let seconds = seconds.parse().map_err(|error| format!("`{word}`: {error}"))?;
                    config.stats_polling_interval_s = seconds;
                }
                _ => return Err(format!("`{word}` is unknown: expected {FORM}")),
            }
        }
        Ok(config)
    }

    fn check_memory(&self, memory_mib: u64) -> Result<()> {
        match u64::from(self.amount_mib) > memory_mib {
            // The message has Firecracker's words, and what is wrong.
            true => Err(Error::config(format!(
                "Amount of pages requested is too large. (`amount_mib`: {} of a guest with {memory_mib} MiB)",
                self.amount_mib
            ))),
            false => Ok(()),
        }
    }

    fn open(&self, _: &str, _: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        Ok(Box::new(device::Balloon::new(self.clone(), Arc::default())))
    }

    fn patched(&self, patch: &Patch) -> Result<Self> {
        match patch {
            Patch::Amount(Amount { amount_mib }) => Ok(Self { amount_mib: *amount_mib, ..self.clone() }),
            Patch::Interval(Interval { stats_polling_interval_s: interval }) => {
                match (self.stats_polling_interval_s, *interval) {
                    (0, 1..) | (1.., 0) => {
                        Err(Error::config("Statistics cannot be enabled/disabled after activation."))
                    }
                    _ => Ok(Self { stats_polling_interval_s: *interval, ..self.clone() }),
                }
            }
            Patch::Start(_) | Patch::Stop => self.check_hinting().map(|()| self.clone()),
        }
    }

    #[cfg(test)]
    fn told_schemas(generator: &mut schemars::SchemaGenerator) -> ToldSchemas {
        vec![
            ("", "What the guest is to do without", generator.subschema_for::<Self>()),
            (STATISTICS, "What the guest does without, and what it says of its memory", statistics::schema()),
            (
                HINTING_STATUS,
                "Where the guest is with its free pages",
                generator.subschema_for::<device::Status>(),
            ),
        ]
    }
}

impl Config {
    fn check_hinting(&self) -> Result<()> {
        match self.free_page_hinting {
            true => Ok(()),
            false => Err(Error::config("Attempting to use hinting when not enabled")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_what_the_file_would_say() {
        let parse = |text: &str| Config::from_option(text, 0);
        let plain: Config = serde_json::from_str(Config::EXAMPLE).unwrap();
        assert_eq!(parse("0"), Ok(plain.clone()));
        let all = Config {
            amount_mib: 2048,
            deflate_on_oom: true,
            stats_polling_interval_s: 7,
            free_page_hinting: true,
            free_page_reporting: true,
        };
        assert_eq!(parse("2G,oom,stats=7,hinting,reporting"), Ok(all));
        for (text, expected) in [
            ("", "expected a size like 256M or 2G: expected SIZE"),
            ("oom", "expected a size"),
            ("64M,oom=1", "`oom=1` is unknown"),
            ("64M,stats", "`stats`: cannot parse integer"),
            ("64M,stats=65536", "`stats=65536`: number too large"),
            ("64M,oom,oom", "`oom` is given twice"),
            ("4194304T", "is more than any guest has"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn statistics_do_not_begin_or_end_while_the_guest_runs() {
        let config = |interval| Config::from_option(&format!("0,stats={interval}"), 0).unwrap();
        let patched = |from, to| {
            let patch = Patch::Interval(Interval { stats_polling_interval_s: to });
            config(from).patched(&patch).map(|config| config.stats_polling_interval_s)
        };
        assert_eq!([patched(0, 0).unwrap(), patched(1, 9).unwrap()], [0, 9]);
        for (from, to) in [(0, 1), (1, 0)] {
            let error = patched(from, to).unwrap_err().to_string();
            assert_eq!(error, "Statistics cannot be enabled/disabled after activation.");
        }
    }
}
