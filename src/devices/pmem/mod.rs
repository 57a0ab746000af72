//! Persistent memory (virtio 1.2, 5.19): the guest sees a file of the host as memory, without a request for each access
//! and without a copy of its own, and asks by a queue that what it wrote be on stable storage. This file is what can be
//! said of it; [`device`] is the device, [`worker`] what it does.

mod device;
mod worker;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::check_id;
use super::kind::{self, CliOption, DeviceConfig, check_words, is_yes, yes};
use crate::error::{Context, Error, Result};
use crate::host::{Access, Host};
use crate::json;
use crate::limiter::RateLimiter;
use crate::memory::window::EMPTY;
use crate::virtio::VirtioDevice;

/// The form of the value of `--pmem`.
const FORM: &str = "PATH[,ro][,root][,id=ID][,lock=on|off]";

/// Body of `PUT /pmem/{id}`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Pmem"))]
#[serde(deny_unknown_fields, expecting = "struct PmemConfig")]
pub struct Config {
    /// Its name: letters, digits and underscores.
    pub id: String,
    /// The file or block device that the guest sees.
    #[serde(deserialize_with = "json::path")]
    pub path_on_host: PathBuf,
    /// The guest boots from it: `root=/dev/pmem0`.
    #[serde(default)]
    pub root_device: bool,
    /// The guest cannot write to it.
    #[serde(default)]
    pub read_only: bool,
    /// Limits of what the guest has written to stable storage: each time, the file's whole size counts as bytes.
    pub rate_limiter: Option<RateLimiter>,
    /// Whether a file that somebody else uses is refused, if one of both writes; else it is used all the same, with a
    /// warning.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub lock: bool,
}

/// Body of `PATCH /pmem/{id}`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "PartialPmem"))]
#[serde(deny_unknown_fields, expecting = "struct PmemDeviceUpdateConfig")]
pub struct Patch {
    /// The device.
    pub id: String,
    /// Limits from now on; a bucket left out stays, one of 0 is no limit.
    pub rate_limiter: Option<RateLimiter>,
}

impl kind::Patch for Patch {
    fn id(&self) -> &str {
        &self.id
    }
    fn parse(_: &str, body: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "pmem";
    const MANY: bool = true;
    const NOUN: &'static str = "pmem device";
    const FAULT: &'static str = "Pmem config error";
    const HAS_WINDOW: bool = true;
    const SECOND_ROOT: &'static str =
        "A root pmem device already exist, or a root block device (`root_device`, `is_root_device`)";
    const OPTION: CliOption = CliOption {
        name: "pmem",
        value: FORM,
        help: "\
A file that the guest sees as persistent memory (/dev/pmem0); `ro`:
read-only, `root`: the guest boots from it, `lock=off`: also if somebody
else uses it. Flushed data is on stable storage. May be repeated",
    };
    const EXAMPLE: &'static str = r#"{"id": "data", "path_on_host": "data.img"}"#;
    const PUBLISHED: &'static [&'static str] =
        &["id", "path_on_host", "root_device", "read_only", "rate_limiter"];
    type Patch = Patch;

    fn id(&self) -> &str {
        &self.id
    }

    fn from_option(text: &str, number: usize) -> Result<Self, String> {
        let mut words = text.split(',');
        let mut config = Self::new(format!("pmem{number}"), words.next().unwrap_or_default());
        check_words(words.clone(), &[])?;
        for word in words {
            match word.split_once('=').unwrap_or((word, "")) {
                ("ro", "") => config.read_only = true,
                ("root", "") => config.root_device = true,
                ("id", id) => config.id = id.to_owned(),
                ("lock", "on") => config.lock = true,
                ("lock", "off") => config.lock = false,
                _ => return Err(format!("`{word}` is unknown: expected {FORM}")),
            }
        }
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        check_id(&self.id)?;
        match self.path_on_host.as_os_str().is_empty() {
            true => Err(Error::config("`path_on_host` is missing: it names the file")),
            false => Ok(()),
        }
    }

    fn root_words(&self) -> Option<String> {
        let access = if self.read_only { "ro" } else { "rw" };
        self.root_device.then(|| format!("root=/dev/pmem0 {access}"))
    }

    /// The file is opened, as a disk's is. Its lock is taken at the start.
    fn hold(&self, host: &mut Host) -> Result<()> {
        let (what, path, access) = self.file();
        let is_empty = |metadata: &std::fs::Metadata| metadata.is_file() && metadata.len() == 0;
        if std::fs::metadata(path).is_ok_and(|metadata| is_empty(&metadata)) {
            return Err(Error::config(EMPTY)).with_context(|| format!("use `{}`", path.display()));
        }
        host.hold(&[(&what, Some(path))], access, host.sharing(self.lock))
    }

    fn open(&self, _: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        Ok(Box::new(device::Pmem::open(self, host)?))
    }

    fn patched(&self, patch: &Patch) -> Result<Self> {
        let limits = match (self.rate_limiter, patch.rate_limiter) {
            (old, Some(new)) => Some(old.unwrap_or_default().patched(new)),
            (old, None) => old,
        };
        Ok(Self { rate_limiter: limits, ..self.clone() })
    }
}

impl Config {
    /// A writable one without limits.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path_on_host: path.into(),
            root_device: false,
            read_only: false,
            rate_limiter: None,
            lock: true,
        }
    }

    /// The device's name in errors, and its file with how that is opened.
    fn file(&self) -> (String, &Path, Access) {
        let access = if self.read_only { Access::Read } else { Access::ReadWrite };
        (format!("pmem device `{}`", self.id), &self.path_on_host, access)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_what_the_file_would_say() {
        let parse = |text: &str| Config::from_option(text, 3);
        let plain: Config = serde_json::from_str(r#"{"id": "pmem3", "path_on_host": "/d"}"#).unwrap();
        assert_eq!(parse("/d"), Ok(plain.clone()));
        let all = Config {
            id: "d".to_owned(),
            root_device: true,
            read_only: true,
            lock: false,
            ..Config::new("d", "/d")
        };
        assert_eq!(parse("/d,ro,root,id=d,lock=off"), Ok(all.clone()));
        for (text, expected) in [
            ("/d,rw", "`rw` is unknown: expected PATH[,ro][,root]"),
            ("/d,ro=1", "`ro=1` is unknown"),
            ("/d,ro,ro", "`ro` is given twice"),
            ("/d,lock", "`lock` is unknown"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(parse("").unwrap().check().unwrap_err().to_string().starts_with("`path_on_host` is missing"));
        assert!(parse("/d,id=").unwrap().check().is_err());
        assert_eq!(all.root_words().as_deref(), Some("root=/dev/pmem0 ro"));
        let writable = Config { read_only: false, ..all };
        assert_eq!(writable.root_words().as_deref(), Some("root=/dev/pmem0 rw"));
        assert_eq!(plain.root_words(), None);
        let shown = serde_json::to_string(&plain).unwrap();
        let expected =
            r#"{"id":"pmem3","path_on_host":"/d","root_device":false,"read_only":false,"rate_limiter":null}"#;
        assert_eq!(shown, expected);
    }
}
