//! A config file: one JSON object with a section for each resource. Sections, and the devices in their
//! lists, are read one by one, so that everything wrong is told at once, with its place.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::mend::{Judged, judge};
use super::{
    BOOT_SOURCE, BootSource, CPU_CONFIG, Config, CpuConfig, DEVICES_MAX, LOGGER, MACHINE_CONFIG, METRICS,
    MMDS_CONFIG, MachineConfig, SERIAL,
};
use crate::devices::KINDS;
use crate::devices::kind::DeviceKind;
use crate::dialect::Dialect;
use crate::error::{Context, Error, Result};
use crate::host::{Access, Sharing, file};
use crate::json;
use crate::log;
use crate::metadata;
use crate::spelling;

/// A config file of more bytes is refused before it is read into memory.
const CONFIG_FILE_MAX: u64 = 1 << 20;

/// More problems of one file are not told: a file of CONFIG_FILE_MAX has room for hundreds of thousands, and
/// the place of each is counted from the file's beginning.
const PROBLEMS_MAX: usize = 100;

/// Something wrong with a config file.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// What is wrong, with the section it is in.
    pub message: String,
    /// Line and column, from 1: of what cannot be read, else where what makes no sense begins.
    pub place: Option<(usize, usize)>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        match self.place {
            Some((line, column)) => write!(f, " at line {line} column {column}"),
            None => Ok(()),
        }
    }
}

/// The sections that are read here or in other monitors.
fn known_sections() -> Vec<&'static str> {
    let known = [BOOT_SOURCE, MACHINE_CONFIG, CPU_CONFIG, LOGGER, METRICS, SERIAL, MMDS_CONFIG];
    known.into_iter().chain(KINDS.iter().map(|kind| kind.section)).collect()
}

impl Config {
    /// The text of a config file.
    pub fn read(path: &Path) -> Result<Vec<u8>> {
        Self::read_called("config file", path)
    }

    /// The text of a file of no more than CONFIG_FILE_MAX bytes, which errors call `what`.
    pub fn read_called(what: &str, path: &Path) -> Result<Vec<u8>> {
        let attempt = || format!("read {what} `{}`", path.display());
        let mut file = file::open(path, Access::Read, Sharing::Refused, what, attempt)?;
        let mut text = Vec::new();
        // A file can grow while it is read, and a block device has no length of its own.
        (&mut *file).take(CONFIG_FILE_MAX + 1).read_to_end(&mut text).with_context(attempt)?;
        if text.len() as u64 > CONFIG_FILE_MAX {
            return Err(Error::config(format!("it has more than {CONFIG_FILE_MAX} bytes")))
                .with_context(attempt);
        }
        Ok(text)
    }

    /// Reads and checks a config file.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_file_as(Dialect::Alula, path)
    }

    /// The same, written in this dialect.
    pub fn from_file_as(dialect: Dialect, path: &Path) -> Result<Self> {
        let text = Self::read(path)?;
        for unread in Self::unread(&Self::sections(&text)) {
            log::line(format_args!("config file `{}`: {unread}", path.display()));
        }
        Self::parse_as(dialect, &text)
            .map_err(|problems| {
                let first = problems.first().expect("no configuration without a problem");
                match problems.len() - 1 {
                    0 => Error::config(first.to_string()),
                    more => Error::config(format!("{first} (and {more} more: `alula check` tells all)")),
                }
            })
            .with_context(|| format!("read config file `{}`", path.display()))
    }

    /// The sections that a text has, if it can be read at all, and whether anybody reads them, here or in
    /// other monitors: others are misspelled. Notes begin with `_`, and `$schema` is for editors.
    pub fn sections(text: &[u8]) -> Vec<(String, bool)> {
        let known = known_sections();
        let Sections(sections) = serde_json::from_slice(text).unwrap_or(Sections(Vec::new()));
        let is_note = |name: &String| name.starts_with('_') || name == "$schema";
        let is_known = |name: &String| known.contains(&name.as_str()) || is_note(name);
        sections.into_iter().map(|(name, _)| (name.clone(), is_known(&name))).collect()
    }

    /// A message for each of the `sections` that nobody reads: PROBLEMS_MAX at most, and then one message that
    /// there are more.
    pub fn unread(sections: &[(String, bool)]) -> Vec<String> {
        let known = known_sections();
        let mut unread = sections.iter().filter(|(_, is_known)| !is_known).map(|(section, _)| {
            let message = format!("`{section}` is no section of a config file: nobody reads it");
            spelling::with_hint(message, section, known.iter().copied())
        });
        let mut told: Vec<_> = unread.by_ref().take(PROBLEMS_MAX).collect();
        if unread.next().is_some() {
            told.push("there are more sections that nobody reads".to_owned());
        }
        told
    }

    /// Reads and checks the text of a config file; the error is everything wrong with it, PROBLEMS_MAX at most
    /// and then a word that there are more.
    pub fn parse(text: &[u8]) -> Result<Self, Vec<Problem>> {
        Self::parse_as(Dialect::Alula, text)
    }

    /// The same, written in this dialect.
    pub fn parse_as(dialect: Dialect, text: &[u8]) -> Result<Self, Vec<Problem>> {
        match Self::examine(dialect, text) {
            (config, problems) if problems.is_empty() => Ok(config),
            (_, problems) => Err(problems),
        }
    }

    /// What makes sense of the text of a config file, and everything wrong with it.
    pub fn examine(dialect: Dialect, text: &[u8]) -> (Self, Vec<Problem>) {
        let mut config = Self { dialect, ..Self::default() };
        let mut problems = Vec::new();
        let mut sections = match serde_json::from_slice(text) {
            Ok(Sections(sections)) => sections,
            Err(error) => {
                let place = Some((error.line(), error.column()));
                return (config, vec![Problem { message: json::words::tell(text, &error), place }]);
            }
        };
        if dialect == Dialect::Firecracker && !sections.iter().any(|(name, _)| name == "drives") {
            problems.push(Problem::new("missing field `drives`: give an empty list for none".to_owned()));
        }
        // A device is checked against the memory that the guest has, wherever in the file that stands.
        sections.sort_by_key(|(name, _)| name != MACHINE_CONFIG);
        for (name, value) in sections {
            if value.get() != "null" {
                let wrong = config.read_section(&name, value);
                problems.extend(wrong.into_iter().map(|problem| problem.moved(text, value)));
            }
            if problems.len() > PROBLEMS_MAX {
                problems.truncate(PROBLEMS_MAX);
                let message = "more is wrong with the file: mend this first".to_owned();
                problems.push(Problem { message, place: None });
                break;
            }
        }
        // Of the whole file: interfaces may come after the service that answers on them.
        if let Some(metadata) = config.mmds_config.as_ref().filter(|_| problems.is_empty())
            && let Err(error) = config.check_metadata(metadata)
        {
            problems.push(Problem::new(format!("`{MMDS_CONFIG}`: {error}")));
        }
        (config, problems)
    }

    /// Reads and checks one section of a file. Places in problems count from the section's beginning.
    fn read_section(&mut self, name: &str, value: &RawValue) -> Vec<Problem> {
        let text = value.get();
        if name == BOOT_SOURCE {
            let Judged { value, problems } = section(name, text, BootSource::EXAMPLE, BootSource::check);
            self.boot_source = value;
            problems
        } else if name == MACHINE_CONFIG {
            let dialect = self.dialect;
            let check = |machine: &MachineConfig| machine.check(dialect);
            let Judged { value, problems } = section(name, text, MachineConfig::EXAMPLE, check);
            self.machine_config = value.unwrap_or_default();
            problems
        } else if name == CPU_CONFIG {
            self.read_cpu_config(value)
        } else if name == LOGGER {
            let Judged { value, problems } = section(name, text, "{}", |_| Ok(()));
            self.logger = value;
            problems
        } else if name == METRICS {
            let Judged { value, problems } = section(name, text, r#"{"metrics_path": "m"}"#, |_| Ok(()));
            self.metrics = value;
            problems
        } else if name == SERIAL {
            let Judged { value, problems } = section(name, text, "{}", |_| Ok(()));
            self.serial = value;
            problems
        } else if name == MMDS_CONFIG {
            let Judged { value, problems } =
                section(name, text, metadata::Config::EXAMPLE, metadata::Config::check);
            self.mmds_config = value;
            problems
        } else if let Some(kind) =
            KINDS.iter().find(|kind| kind.section == name && kind.is_known_in(self.dialect))
        {
            self.read_devices(kind, value)
        } else {
            Vec::new()
        }
    }

    /// Reads and checks the changes of the CPUs: an object, or the path of a file that has it.
    fn read_cpu_config(&mut self, value: &RawValue) -> Vec<Problem> {
        let judged = |text: &str| section(CPU_CONFIG, text, CpuConfig::EXAMPLE, CpuConfig::check);
        let Judged { value, problems } = match json::from_text::<PathBuf>(value.get()) {
            Err(_) => judged(value.get()),
            Ok(path) => match Self::read_called("CPU config", &path) {
                Err(error) => Judged { value: None, problems: vec![Problem::new(error.to_string())] },
                Ok(text) => {
                    let Judged { value, problems } = judged(&String::from_utf8_lossy(&text));
                    let of_file = |it: Problem| Problem::new(format!("`{}`: {it}", path.display()));
                    Judged { value, problems: problems.into_iter().map(of_file).collect() }
                }
            },
        };
        self.cpu_config = value;
        problems
    }

    fn read_devices(&mut self, kind: &DeviceKind, value: &RawValue) -> Vec<Problem> {
        let (name, text) = (kind.section, value.get());
        let list: Vec<&RawValue> = match kind.many {
            false => vec![value],
            true => match json::from_text(text) {
                Ok(list) => list,
                Err(error) => return vec![unreadable_in(name, text, &error)],
            },
        };
        if list.len() > DEVICES_MAX {
            let message = format!("`{name}` has {} entries: at most {DEVICES_MAX} are read", list.len());
            return vec![Problem::new(message)];
        }
        let mut problems = Vec::new();
        for one in list {
            problems.extend(self.read_device(kind, one).into_iter().map(|it| it.moved(text.as_bytes(), one)));
            if problems.len() > PROBLEMS_MAX {
                break;
            }
        }
        problems
    }

    fn read_device(&mut self, kind: &DeviceKind, value: &RawValue) -> Vec<Problem> {
        let Judged { value, mut problems } = judge(value.get(), kind.example, |text, made_up| {
            let device = kind
                .parse_as(self.dialect, text.as_bytes())
                .map_err(|error| unreadable_in(kind.section, text, &error))?;
            match device.check() {
                Ok(()) => Ok(device),
                Err(error) if made_up => Err(Problem::new(format!("`{}`: {error}", kind.section))),
                Err(error) => Err(Problem::new(format!("{}: {error}", device.name()))),
            }
        });
        if let Some(device) = value {
            if self.device(kind, device.id()).is_some() {
                let (noun, id) = (kind.noun, device.id());
                let message = format!("two {noun}s are called `{id}`: each needs a name of its own");
                problems.push(Problem::new(message));
            } else if let Err(error) = self.put(device.clone()) {
                problems.push(Problem::new(format!("{}: {error}", device.name())));
            }
        }
        problems
    }
}

/// Judges the text of a section that is one resource.
fn section<T: DeserializeOwned>(
    name: &str,
    text: &str,
    example: &str,
    check: impl Fn(&T) -> Result<()>,
) -> Judged<T> {
    judge(text, example, |text, _| {
        let value = json::from_text(text).map_err(|error| unreadable_in(name, text, &error))?;
        match check(&value) {
            Ok(()) => Ok(value),
            Err(error) => Err(Problem::new(format!("`{name}`: {error}"))),
        }
    })
}

/// A config file's sections as they stand in its text.
struct Sections<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Deserialize<'a> for Sections<'a> {
    fn deserialize<D: serde::Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'a> serde::de::Visitor<'a> for Visitor {
            type Value = Sections<'a>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object with the sections of a configuration")
            }
            fn visit_map<A: serde::de::MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut sections: Vec<(String, &RawValue)> = Vec::new();
                let mut names = BTreeSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format_args!("duplicate field `{name}`")));
                    }
                    sections.push((name, map.next_value()?));
                }
                Ok(Sections(sections))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// With the section, and the field that serde does not always name.
fn unreadable_in(section: &str, text: &str, error: &serde_json::Error) -> Problem {
    let message = json::words::tell(text.as_bytes(), error);
    Problem { message: format!("`{section}`: {message}"), place: Some((error.line(), error.column())) }
}

impl Problem {
    /// Of what begins where places are counted from.
    fn new(message: String) -> Self {
        Self { message, place: Some((1, 1)) }
    }

    /// The same, its place counted from the beginning of `whole` instead of `part`, which is in it.
    pub(super) fn moved(self, whole: &[u8], part: &RawValue) -> Self {
        let start = part.get().as_ptr() as usize - whole.as_ptr() as usize;
        let before = &whole[..start];
        let lines = before.iter().filter(|byte| **byte == b'\n').count();
        let columns = before.iter().rev().take_while(|byte| **byte != b'\n').count();
        let place = self.place.map(|(line, column)| match line {
            1 => (lines + 1, columns + column),
            line => (lines + line, column),
        });
        Self { place, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_keys_of_a_config_file_are_none_of_ours() {
        Config::parse(br#"{"memory-hotplug": null, "x-owner": {"a": 1}, "vsock": null}"#).unwrap();
    }

    #[test]
    fn the_order_of_sections_makes_no_difference() {
        let balloon = r#""balloon": {"amount_mib": 512, "deflate_on_oom": false}"#;
        let machine = r#""machine-config": {"vcpu_count": 1, "mem_size_mib": 1024}"#;
        let parsed =
            |one: &str, other: &str| Config::parse(format!("{{{one}, {other}}}").as_bytes()).unwrap();
        let (first, second) = (parsed(balloon, machine), parsed(machine, balloon));
        assert_eq!(serde_json::to_value(&first).unwrap(), serde_json::to_value(&second).unwrap());
    }

    #[test]
    fn every_problem_of_a_file_is_told_with_its_place() {
        let text = r#"{
  "machine-config": {"vcpu_count": 0, "mem_size_mib": 8},
  "drives": [
    {"drive_id": "a", "is_root_device": true,
     "path": "x"},
    {"drive_id": "b c", "is_root_device": false},
    {"drive_id": "d", "path_on_host": "d", "is_root_device": true},
    {"drive_id": "d", "path_on_host": "e", "is_root_device": false},
    {"drive_id": "f", "path_on_host": "f", "is_root_device": true}
  ],
  "network-interfaces": {},
  "logger": {"module": "a\"level\": b", "level": "loud"},
  "metrics": {"metrics_path": "m", "emit_id": 7}
}"#;
        let problems = Config::parse(text.as_bytes()).unwrap_err();
        let problems: Vec<_> = problems.iter().map(Problem::to_string).collect();
        for (problem, expected) in problems.iter().zip([
            "`machine-config`: The number of vCPUs must be greater than 0",
            "`drives`: unknown field `path`, expected one of",
            "disk `a`: `path_on_host` is missing",
            "disk `b c`: API Resource IDs can only contain alphanumeric characters",
            "`drives`: `path_on_host` is missing",
            "two disks are called `d`: each needs a name of its own",
            "disk `f`: A root block device already exists! (`is_root_device`)",
            "`network-interfaces`: expected a list, found an object",
            "`logger`: `level`: unknown level `loud`",
            "`metrics`: `emit_id`: expected true or false, found `7`",
        ]) {
            assert!(problem.starts_with(expected), "{problem}");
        }
        assert_eq!(problems.len(), 10, "{problems:#?}");
        assert!(problems[1].ends_with(" at line 5 column 11"), "{}", problems[1]);
        assert!(problems[3].ends_with(" at line 6 column 5"), "{}", problems[3]);
        assert!(problems[7].ends_with(" at line 11 column 24"), "{}", problems[7]);
        for (text, expected) in [
            (
                "{\n\"a\": }",
                "expected a value: an object, a list, a string, a number, true, false or null at line 2 column 6",
            ),
            (r#"{"drives": [], "drives": []}"#, "duplicate field `drives` at line 1 column 23"),
            ("[]", "expected an object with the sections of a configuration, found a list"),
        ] {
            let problems = Config::parse(text.as_bytes()).unwrap_err();
            assert!(problems[0].to_string().starts_with(expected), "{text}: {}", problems[0]);
        }
    }

    // Each of these took minutes when names, places or devices were compared with all before them.
    #[test]
    fn a_file_full_of_nonsense_is_read_in_bounded_steps() {
        let list = |count: usize, one: &dyn Fn(usize) -> String| {
            let all: Vec<_> = (0..count).map(one).collect();
            all.join(",")
        };
        let sections = format!("{{{}}}", list(100_000, &|index| format!("\"{index:x}\":0")));
        let sections_found = Config::sections(sections.as_bytes());
        let unread = Config::unread(&sections_found);
        assert_eq!((sections_found.len(), unread.len()), (100_000, PROBLEMS_MAX + 1));
        Config::parse(sections.as_bytes()).unwrap();

        let many = format!(r#"{{"drives": [{}]}}"#, list(100_000, &|_| "{}".to_owned()));
        let problems = Config::parse(many.as_bytes()).unwrap_err();
        assert_eq!(problems[0].message, "`drives` has 100000 entries: at most 1000 are read");
        let wrong = format!(r#"{{"drives": [{}]}}"#, list(1000, &|_| "{}".to_owned()));
        let problems = Config::parse(wrong.as_bytes()).unwrap_err();
        assert_eq!(problems.len(), PROBLEMS_MAX + 1);
        assert_eq!(problems[PROBLEMS_MAX].to_string(), "more is wrong with the file: mend this first");

        // An object is read anew for each of its faults, and for each field that could be at fault: only a
        // short one is.
        let long = |value: usize| {
            let fields = list(30, &|index| format!("\"f{index}\":\"{}\"", "x".repeat(value)));
            let text = format!(r#"{{"drives": [{}]}}"#, list(100, &|_| format!("{{{fields}}}")));
            Config::parse(text.as_bytes()).unwrap_err().len()
        };
        assert_eq!((long(250), long(300)), (PROBLEMS_MAX + 1, 100));
    }
}
