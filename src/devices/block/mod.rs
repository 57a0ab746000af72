//! The block device (virtio 1.2, 5.2) over a raw file or block device of the host.

mod image;
mod request;

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::GuestAddressSpace;

use super::kind::{CliOption, DeviceConfig};
use crate::error::{Context, Error, Result};
use crate::host::{Access, Host, Local};
use crate::memory::Memory;
use crate::snapshot::Snapshot;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Io, Queue, Registrar, VirtioDevice, Worker};
use image::Image;

/// Requests are counted in sectors of this size, whatever the disk's own is.
pub const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// A request has a header and a status beside its data.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;

/// Body of `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Its name: letters, digits and underscores.
    pub drive_id: String,
    /// The file or block device.
    pub path_on_host: Option<PathBuf>,
    /// The guest boots from it: `root=/dev/vda`, or `root=PARTUUID=` when `partuuid` is given.
    pub is_root_device: bool,
    /// The partition to boot from.
    pub partuuid: Option<String>,
    /// The guest cannot write to it.
    #[serde(default)]
    pub is_read_only: bool,
    /// Whether the guest can have its writes on stable storage.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How the host does the work.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Not implemented yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<Value>,
    /// Not implemented yet: vhost-user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// What becomes of written data that the guest flushes.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub enum CacheType {
    /// It is wherever the host has it; flushes are not offered.
    #[default]
    Unsafe,
    /// A flush is answered when it is on stable storage.
    Writeback,
}

/// How the host does the work.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub enum IoEngine {
    /// One system call after the other.
    #[default]
    Sync,
    /// io_uring; not implemented yet.
    Async,
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "drives";
    const MANY: bool = true;
    const NOUN: &'static str = "disk";
    const FAULT: &'static str = "Drive config error";
    const OPTION: CliOption = CliOption {
        name: "disk",
        value: "PATH[,ro][,root][,id=ID]",
        help: "A disk from a raw image or block device; `ro`: read-only, `root`: the guest\n\
               boots from it. Flushed data is on stable storage. May be repeated",
    };
    const EXAMPLE: &'static str =
        r#"{"drive_id": "root", "path_on_host": "root.img", "is_root_device": true}"#;
    type Patch = Patch;

    fn id(&self) -> &str {
        &self.drive_id
    }

    fn from_option(text: &str, number: usize) -> Result<Self, String> {
        let mut parts = text.split(',');
        let mut disk = Self {
            drive_id: format!("disk{number}"),
            path_on_host: parts.next().filter(|path| !path.is_empty()).map(PathBuf::from),
            is_root_device: false,
            partuuid: None,
            is_read_only: false,
            cache_type: CacheType::Writeback,
            io_engine: IoEngine::Sync,
            rate_limiter: None,
            socket: None,
        };
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => disk.is_read_only = true,
                None if part == "root" => disk.is_root_device = true,
                Some(("id", id)) => disk.drive_id = id.to_owned(),
                _ => return Err(format!("`{part}` is unknown: expected {}", Self::OPTION.value)),
            }
        }
        Ok(disk)
    }

    fn check(&self) -> Result<()> {
        super::check_id(&self.drive_id)?;
        let not_yet =
            |field: &str| Err(Error::config(format!("`{field}` is not implemented yet: leave it out")));
        match self {
            Self { rate_limiter: Some(_), .. } => not_yet("rate_limiter"),
            Self { socket: Some(_), .. } => not_yet("socket"),
            Self { io_engine: IoEngine::Async, .. } => not_yet("io_engine: Async"),
            Self { path_on_host: None, .. } => {
                Err(Error::config("`path_on_host` is missing: it names the disk"))
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

    /// The image is opened, as a kernel is. Its lock is taken at the start.
    fn hold(&self, host: &mut Local) -> Result<()> {
        let (what, path, access) = self.file();
        host.hold(&what, path, access)
    }

    fn open(&self, _: &str, host: &mut dyn Host) -> Result<Box<dyn VirtioDevice>> {
        Ok(Box::new(Block { config: self.clone(), image: Arc::new(self.image(host)?) }))
    }

    fn patched(&self, patch: Patch) -> Result<Self> {
        let path = patch.check()?.to_owned();
        Ok(Self { path_on_host: Some(path), ..self.clone() })
    }
}

impl Config {
    /// What it is called in errors, and how it is opened.
    fn file(&self) -> (String, &std::path::Path, Access) {
        let access = if self.is_read_only { Access::Read } else { Access::ReadWrite };
        let path = self.path_on_host.as_deref().expect("a checked config has it");
        (format!("disk `{}`", self.drive_id), path, access)
    }

    /// The image that it names.
    fn image(&self, host: &mut dyn Host) -> Result<Image> {
        let (what, path, access) = self.file();
        Image::new(host.file(&what, path, access)?, path, access)
    }
}

/// Body of `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Patch {
    /// The disk.
    pub drive_id: String,
    /// What it is made of from now on.
    pub path_on_host: Option<PathBuf>,
    /// Not implemented yet.
    pub rate_limiter: Option<Value>,
}

impl super::kind::Patch for Patch {
    fn id(&self) -> &str {
        &self.drive_id
    }
}

impl Patch {
    /// The path of the new image.
    fn check(&self) -> Result<&std::path::Path> {
        if self.rate_limiter.is_some() {
            return Err(Error::config("`rate_limiter` is not implemented yet: leave it out"));
        }
        let nothing = || Error::config("nothing is to be changed: give `path_on_host`");
        self.path_on_host.as_deref().ok_or_else(nothing)
    }
}

/// The device.
pub struct Block {
    config: Config,
    image: Arc<Image>,
}

/// It has none: what the guest sees is in the configuration and the image.
impl Snapshot for Block {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let read_only = if self.config.is_read_only { F_RO } else { 0 };
        let flush = if self.config.cache_type == CacheType::Writeback { F_FLUSH } else { 0 };
        F_SEG_MAX | read_only | flush
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// struct virtio_blk_config: capacity, size_max, seg_max.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        let sectors = self.image.sectors();
        config[..8].copy_from_slice(&sectors.to_le_bytes());
        config[12..].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        super::copy_config(&config, offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let Io { memory, queues, .. } = io;
        let [queue] = <[Queue; 1]>::try_from(queues).ok().expect("one queue was asked for");
        let buffers = || Buffers::new(memory.clone());
        let disk = request::Disk {
            image: self.image.clone(),
            flushes: self.config.cache_type == CacheType::Writeback,
            id: self.config.drive_id.clone(),
            readable: buffers(),
            writable: buffers(),
        };
        Ok(vec![Box::new(Running { memory, queue, disk })])
    }

    /// Another image, or the same one with another size.
    fn patch(&mut self, body: &Value, host: &mut dyn Host) -> Result<bool> {
        let new = self.config.patched(Patch::deserialize(body).context("read the change")?)?;
        let path = new.path_on_host.as_deref().expect("a change names an image");
        self.image = Arc::new(self.image.again(path).unwrap_or_else(|| new.image(host))?);
        self.config = new;
        Ok(true)
    }
}

struct Running {
    memory: Memory,
    queue: Queue,
    disk: request::Disk,
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.queue, 0)
    }

    fn handle(&mut self, _token: u32) -> Result<()> {
        let memory = self.memory.memory();
        self.queue.serve(&memory, |chain| self.disk.serve(chain))
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}
