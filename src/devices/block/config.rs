//! What can be said of a disk: the bodies of the API, and the words of `--disk`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::qcow2;
use super::vhost_user::Disk;
use crate::devices::check_id;
use crate::devices::kind::{self, CliOption, DeviceConfig, is_yes, yes};
use crate::error::{Context, Error, Result};
use crate::host::vhost_user::Backend;
use crate::host::{Access, Host};
use crate::json;
use crate::limiter::RateLimiter;
use crate::virtio::VirtioDevice;

/// Each queue costs an interrupt, two event descriptors and what is in flight on it.
pub const QUEUES_MAX: u16 = 16;

/// Body of `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Drive"))]
#[serde(deny_unknown_fields, expecting = "struct BlockDeviceConfig")]
pub struct Config {
    /// Its name: letters, digits and underscores.
    pub drive_id: String,
    /// The file or block device.
    #[serde(default, deserialize_with = "json::path_or_null")]
    pub path_on_host: Option<PathBuf>,
    /// The guest boots from it: `root=/dev/vda`, or `root=PARTUUID=` when `partuuid` is given.
    pub is_root_device: bool,
    /// The partition to boot from.
    pub partuuid: Option<String>,
    /// The guest cannot write to it.
    #[serde(default, deserialize_with = "json::or_default")]
    pub is_read_only: bool,
    /// Whether the guest can have its writes on stable storage.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How the host does the work.
    #[serde(default, deserialize_with = "json::or_default")]
    pub io_engine: IoEngine,
    /// Limits of all its queues together; bytes are those read and written.
    pub rate_limiter: Option<RateLimiter>,
    /// In place of `path_on_host`: where a vhost-user backend listens, a program that has the disk and does its work in
    /// the guest's memory.
    pub socket: Option<PathBuf>,
    /// Whether the guest can give blocks back (discard, write zeroes); left out: if the disk can be
    /// written and its file or device takes blocks back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard: Option<bool>,
    /// What the file is. It is never guessed from the content, which a guest may have written.
    #[serde(default, skip_serializing_if = "is_default")]
    pub format: Format,
    /// The images beneath a qcow2 image, the next one first. Left out: those that the images name
    /// themselves, as long as they lie in the folder of the topmost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Vec<Backing>>,
    /// Past the host's page cache (O_DIRECT). Raw images only.
    #[serde(default, skip_serializing_if = "is_default")]
    pub direct_io: bool,
    /// How many queues the guest can use at the same time: 1 to 16, as many as CPUs at best.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub num_queues: u16,
    /// How many threads of its own work on the queues, at most one per queue; 0: the devices' shared
    /// one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub threads: u16,
    /// Whether an image that somebody else uses is refused, if one of both writes; else it is used all
    /// the same, with a warning.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub lock: bool,
}

/// One image beneath a qcow2 image; it is only read.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Backing {
    /// The file or block device.
    pub path_on_host: PathBuf,
    /// What it is.
    #[serde(default)]
    pub format: Format,
}

/// What an image file is.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "ImageFormat"))]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk itself, byte for byte.
    #[default]
    Raw,
    /// QEMU's format with allocation on writing, backing images and compression.
    Qcow2,
}

/// What becomes of written data that the guest flushes.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum CacheType {
    /// It is wherever the host has it; flushes are not offered.
    #[default]
    Unsafe,
    /// A flush is answered when it is on stable storage.
    Writeback,
}

/// How the host does the work.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum IoEngine {
    /// One system call after the other.
    #[default]
    Sync,
    /// Many requests by one system call (io_uring), without waiting for the slowest. Where the host
    /// forbids that, it is said, and the requests are done as by `Sync`.
    Async,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one() -> u16 {
    1
}

fn is_one(value: &u16) -> bool {
    *value == 1
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "drives";
    const METRICS: &'static str = "block";
    const MANY: bool = true;
    const NOUN: &'static str = "disk";
    const FAULT: &'static str = "Drive config error";
    const OPTION: CliOption = CliOption {
        name: "disk",
        value: "PATH[,ro][,root][,id=ID][,...]",
        help: "A disk from an image or a block device; `ro`: read-only, `root`: the guest\n\
               boots from it, `format=qcow2`: not a raw image, `engine=async`: by\n\
               io_uring, `queues=N`, `threads=N`, `direct`: past the host's page cache,\n\
               `nodiscard`: blocks are not given back, `lock=off`: also if somebody\n\
               else uses it; `socket=PATH` instead of PATH: a vhost-user backend's.\n\
               Flushed data is on stable storage. May be repeated",
    };
    const EXAMPLE: &'static str =
        r#"{"drive_id": "root", "path_on_host": "root.img", "is_root_device": true}"#;
    const PUBLISHED: &'static [&'static str] = &[
        "drive_id",
        "partuuid",
        "is_root_device",
        "cache_type",
        "is_read_only",
        "path_on_host",
        "rate_limiter",
        "io_engine",
        "socket",
        "discard",
    ];
    type Patch = Patch;

    fn id(&self) -> &str {
        &self.drive_id
    }

    /// Flushes of the guest are obeyed.
    fn from_option(text: &str, number: usize) -> Result<Self, String> {
        let mut words = text.split(',');
        let first = words.next().unwrap_or_default();
        let mut config = Self::new(format!("disk{number}"), first);
        if let Some(socket) = first.strip_prefix("socket=") {
            (config.path_on_host, config.socket) = (None, Some(socket.into()));
        }
        config.cache_type = CacheType::Writeback;
        kind::check_words(words.clone(), &[])?;
        let count =
            |word: &str, text: &str| text.parse().map_err(|_| format!("`{word}` is not a small number"));
        for word in words {
            match word.split_once('=').unwrap_or((word, "")) {
                ("ro", "") => config.is_read_only = true,
                ("root", "") => config.is_root_device = true,
                ("direct", "") => config.direct_io = true,
                ("nodiscard", "") => config.discard = Some(false),
                ("id", id) => config.drive_id = id.to_owned(),
                ("format", "raw") => config.format = Format::Raw,
                ("format", "qcow2") => config.format = Format::Qcow2,
                ("engine", "sync") => config.io_engine = IoEngine::Sync,
                ("engine", "async") => config.io_engine = IoEngine::Async,
                ("lock", "on") => config.lock = true,
                ("lock", "off") => config.lock = false,
                ("queues", text) => config.num_queues = count(word, text)?,
                ("threads", text) => config.threads = count(word, text)?,
                _ => {
                    let words = "PATH[,ro][,root][,id=ID][,format=raw|qcow2][,engine=sync|async][,queues=N]\
                                 [,threads=N][,direct][,nodiscard][,lock=on|off]";
                    return Err(format!("`{word}` is unknown: expected {words}"));
                }
            }
        }
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        check_id(&self.drive_id)?;
        let refuse = |message: &str| Err(Error::config(message));
        let is_missing = |path: &Path| path.as_os_str().is_empty();
        match self {
            Self { socket: Some(path), .. } if is_missing(path) => {
                refuse("`socket` is empty: it names where a vhost-user backend listens")
            }
            Self { socket: None, path_on_host, .. } if path_on_host.as_deref().is_none_or(is_missing) => {
                refuse("`path_on_host` is missing: it names the disk")
            }
            Self { num_queues, .. } if !(1..=QUEUES_MAX).contains(num_queues) => refuse(&format!(
                "`num_queues` is {num_queues}: a disk has 1 to {QUEUES_MAX} queues, at best one per CPU"
            )),
            Self { socket: Some(_), .. } => self.check_remote(),
            Self { threads, num_queues, .. } if threads > num_queues => refuse(&format!(
                "`threads` is {threads}, but only {num_queues} can have work: there are no more queues \
                 (`num_queues`)"
            )),
            Self { discard: Some(true), is_read_only: true, .. } => {
                refuse("`discard` needs a disk that can be written: leave it or `is_read_only` out")
            }
            Self { format: Format::Raw, backing: Some(_), .. } => {
                refuse("`backing` needs `\"format\": \"qcow2\"`: a raw image has nothing beneath it")
            }
            Self { format: Format::Qcow2, direct_io: true, .. } => {
                refuse("`direct_io` needs a raw image: leave it out")
            }
            _ => Ok(()),
        }
    }

    fn root_words(&self) -> Option<String> {
        let device = match &self.partuuid {
            Some(partuuid) => format!("PARTUUID={partuuid}"),
            None => "/dev/vda".to_owned(),
        };
        let access = if self.is_read_only { "ro" } else { "rw" };
        self.is_root_device.then(|| format!("root={device} {access}"))
    }

    fn shares_memory(&self) -> bool {
        self.socket.is_some()
    }

    /// A backend that hangs holds up no other device.
    fn threads(&self) -> usize {
        if self.socket.is_some() { 1 } else { self.threads.into() }
    }

    /// The image is opened, as a kernel is, and looked at. Its lock is taken at the start.
    fn hold(&self, host: &mut Host) -> Result<()> {
        if self.socket.is_some() {
            return self.hold_remote(host);
        }
        let (what, path, access) = self.file();
        host.hold_if(&what, path, access, host.sharing(self.lock), |file| match self.format {
            Format::Raw => Ok(()),
            Format::Qcow2 => {
                qcow2::look(file).with_context(|| format!("use disk image `{}`", path.display()))
            }
        })
    }

    fn look(&self) -> Result<()> {
        match &self.socket {
            Some(path) => Backend::look_for(&self.whose(), path),
            None => self.hold(&mut Host::default()),
        }
    }

    fn open(&self, _: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        match self.socket {
            Some(_) => Ok(Box::new(Disk::open(self, host)?)),
            None => Ok(Box::new(super::Block::open(self, host)?)),
        }
    }

    fn patched(&self, patch: &Patch) -> Result<Self> {
        let Patch { path_on_host, backing, rate_limiter, .. } = patch.clone();
        if self.socket.is_some() && path_on_host.is_none() && rate_limiter.is_none() && backing.is_none() {
            // Its configuration is read again.
            return Ok(self.clone());
        }
        if path_on_host.is_none() && rate_limiter.is_none() && backing.is_none() {
            return Err(Error::config("nothing is to be changed: give `path_on_host` or `rate_limiter`"));
        }
        let limits = match (self.rate_limiter, rate_limiter) {
            (old, Some(new)) => Some(old.unwrap_or_default().patched(new)),
            (old, None) => old,
        };
        if backing.is_some() && path_on_host.is_none() {
            return Err(Error::config(
                "`backing` is what is beneath the image that `path_on_host` names: give that, too",
            ));
        }
        let new = match path_on_host {
            Some(path) => self.clone().with_image(path, backing),
            None => self.clone(),
        };
        let new = Self { rate_limiter: limits, ..new };
        new.check().map(|()| new)
    }
}

impl Config {
    /// A writable raw disk of one queue.
    pub fn new(drive_id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            drive_id: drive_id.into(),
            path_on_host: Some(path.into()),
            is_root_device: false,
            partuuid: None,
            is_read_only: false,
            cache_type: CacheType::Unsafe,
            io_engine: IoEngine::Sync,
            rate_limiter: None,
            socket: None,
            discard: None,
            format: Format::Raw,
            backing: None,
            direct_io: false,
            num_queues: 1,
            threads: 0,
            lock: true,
        }
    }

    /// This disk with another image, or the same one. What may be beneath an image is said of that image alone: of another
    /// one, it is what `backing` says, or what the image names in its own folder.
    pub fn with_image(self, path: PathBuf, backing: Option<Vec<Backing>>) -> Self {
        let is_same = self.path_on_host.as_ref() == Some(&path);
        let backing = backing.or_else(|| self.backing.clone().filter(|_| is_same));
        Self { path_on_host: Some(path), backing, ..self }
    }

    /// How it is opened.
    pub fn access(&self) -> Access {
        if self.is_read_only { Access::Read } else { Access::ReadWrite }
    }

    /// What it is called in errors, and how it is opened.
    pub fn file(&self) -> (String, &Path, Access) {
        let path = self.path_on_host.as_deref().expect("a checked config has it");
        (format!("disk `{}`", self.drive_id), path, self.access())
    }
}

/// Body of `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "PartialDrive"))]
#[serde(deny_unknown_fields, expecting = "struct BlockDeviceUpdateConfig")]
pub struct Patch {
    /// The disk.
    pub drive_id: String,
    /// What it is made of from now on; the same as before: its size is measured again. Of a disk with a `socket` nothing
    /// but the id is given: what its backend says of it is read again.
    pub path_on_host: Option<PathBuf>,
    /// Ours, with `path_on_host`: the images beneath a qcow2 image, the next one first. Left out: if the path is another
    /// one, those that the images name themselves, as long as they lie in the folder of the topmost.
    pub backing: Option<Vec<Backing>>,
    /// Limits from now on; a bucket left out stays, one of 0 is no limit.
    pub rate_limiter: Option<RateLimiter>,
}

impl kind::Patch for Patch {
    const PUBLISHED: &'static [&'static str] = &["drive_id", "path_on_host", "rate_limiter"];
    fn id(&self) -> &str {
        &self.drive_id
    }
    fn parse(_: &str, body: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(more: &str) -> Result<Config, String> {
        let text = format!(r#"{{"drive_id":"d","is_root_device":false,"path_on_host":"/d"{more}}}"#);
        let config: Config = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn what_a_disk_cannot_be_is_refused_by_the_field_that_asks_for_it() {
        assert_eq!(body(""), Ok(Config::new("d", "/d")));
        for (more, expected) in [
            (r#","num_queues":0"#, "`num_queues` is 0: a disk has 1 to 16 queues"),
            (r#","num_queues":17"#, "`num_queues` is 17: a disk has 1 to 16 queues"),
            (r#","num_queues":65536"#, "invalid value: integer `65536`"),
            (r#","num_queues":2,"threads":3"#, "`threads` is 3, but only 2 can have work"),
            (r#","discard":true,"is_read_only":true"#, "`discard` needs a disk that can be written"),
            (r#","backing":[]"#, "`backing` needs `\"format\": \"qcow2\"`"),
            (r#","format":"qcow2","direct_io":true"#, "`direct_io` needs a raw image"),
            (r#","format":"vmdk""#, "unknown variant `vmdk`, expected `raw` or `qcow2`"),
            (r#","format":"qcow2","backing":["/base"]"#, "invalid type: string"),
            (r#","io_engine":"Uring""#, "unknown variant `Uring`"),
            (r#","path_on_host":"""#, "duplicate field `path_on_host`"),
        ] {
            let error = body(more).unwrap_err();
            assert!(error.contains(expected), "{more}: {error}");
        }
    }

    #[test]
    fn a_config_is_shown_as_it_was_given() {
        for more in [
            "",
            r#","discard":false,"format":"qcow2","backing":[{"path_on_host":"/b","format":"raw"}]"#,
            r#","direct_io":true,"num_queues":4,"threads":2,"lock":false"#,
        ] {
            let config = body(more).unwrap();
            let shown = serde_json::to_string(&config).unwrap();
            assert!(shown.ends_with(&format!(r#""rate_limiter":null,"socket":null{more}}}"#)), "{shown}");
            assert_eq!(serde_json::from_str::<Config>(&shown).unwrap(), config);
        }
    }

    #[test]
    fn the_command_line_says_the_same_in_words() {
        let words = |text: &str| {
            let config = Config::from_option(text, 3)?;
            config.check().map_err(|error| error.to_string())?;
            Ok::<_, String>(config)
        };
        let expected = Config {
            is_read_only: true,
            is_root_device: true,
            io_engine: IoEngine::Async,
            cache_type: CacheType::Writeback,
            num_queues: 2,
            threads: 2,
            discard: Some(false),
            direct_io: true,
            lock: false,
            ..Config::new("x", "/d")
        };
        assert_eq!(
            words("/d,ro,root,id=x,engine=async,queues=2,threads=2,nodiscard,direct,lock=off"),
            Ok(expected)
        );
        let qcow2 = words("/d,format=qcow2").unwrap();
        assert_eq!((qcow2.format, qcow2.drive_id.as_str()), (Format::Qcow2, "disk3"));
        for (text, expected) in [
            ("", "`path_on_host` is missing"),
            (",ro", "`path_on_host` is missing"),
            ("/d,format=vmdk", "`format=vmdk` is unknown: expected PATH[,ro]"),
            ("/d,queues=many", "`queues=many` is not a small number"),
            ("/d,queues=99", "`num_queues` is 99"),
            ("/d,ro=1", "`ro=1` is unknown"),
            ("/d,queues=1,ro,queues=2", "`queues=2`: `queues` is given twice: give it once"),
        ] {
            let error = words(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_patch_changes_what_it_names() {
        let patch = |more: &str| {
            let patch = serde_json::from_str(&format!(r#"{{"drive_id":"d"{more}}}"#)).unwrap();
            let limits = r#","rate_limiter":{"ops":{"size":1,"refill_time":2},"bandwidth":{"size":3,"refill_time":4}}"#;
            let patched = body(limits).unwrap().patched(&patch).map_err(|error| error.to_string())?;
            let limits = serde_json::to_string(&patched.rate_limiter).unwrap();
            Ok::<_, String>((patched.path_on_host.unwrap(), limits))
        };
        let same = r#"{"bandwidth":{"size":3,"one_time_burst":null,"refill_time":4},"ops":{"size":1,"one_time_burst":null,"refill_time":2}}"#;
        assert_eq!(patch(r#","path_on_host":"/e""#), Ok(("/e".into(), same.to_owned())));
        let ops = r#","rate_limiter":{"ops":{"size":0,"refill_time":0}}"#;
        let changed = r#"{"bandwidth":{"size":3,"one_time_burst":null,"refill_time":4},"ops":null}"#;
        assert_eq!(patch(ops), Ok(("/d".into(), changed.to_owned())));
        assert!(patch("").unwrap_err().contains("nothing is to be changed"));
        let list = r#","backing":[{"path_on_host":"/b","format":"raw"}]"#;
        assert!(patch(list).unwrap_err().contains("give that, too"));
    }
}
