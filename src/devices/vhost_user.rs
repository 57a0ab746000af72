//! A device of any type whose work, and whose configuration, is the business of another process (vhost-user): a file
//! system of virtiofsd, a sound card, what somebody has written.

use std::any::Any;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::kind::{self, CliOption, DeviceConfig};
use super::remote::Remote;
use super::{check_id, copy_config};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::host::vhost_user::{Backend, CONFIG_MAX};
use crate::log;
use crate::snapshot::Snapshot;
use crate::virtio::{Io, VirtioDevice, Worker};

/// The form of the value of `--vhost-user`.
const FORM: &str = "TYPE,socket=PATH[,id=ID][,tag=TAG][,queues=N][,queue-size=N][,config-size=N]";
/// Each queue costs an interrupt, two event descriptors and what is in flight on it.
const QUEUES_MAX: u16 = 16;
/// The largest queue that a driver is offered; of each, a backend may be handed so many requests at once.
const QUEUE_SIZE_MAX: u16 = 1024;
/// The longest name of a file system, in bytes, with what ends it: struct virtio_fs_config (virtio 1.2, 5.11.4).
const TAG_SIZE: usize = 36;
/// Features of devices: those beside are of rings and transports, which a backend knows nothing of (virtio 1.2, 2.2).
const DEVICE_FEATURES: u64 = ((1 << 24) - 1) | (!0 << 50);

/// A type of device (virtio 1.2, 5), and what its driver expects.
struct Type {
    name: &'static str,
    number: u32,
    /// How many queues its driver needs at least.
    queues: u16,
    /// How many bytes of configuration it has.
    config_size: usize,
    /// Linux's module of its driver.
    driver: &'static str,
}

const fn known(
    name: &'static str,
    number: u32,
    queues: u16,
    config_size: usize,
    driver: &'static str,
) -> Type {
    Type { name, number, queues, config_size, driver }
}

const FS: u32 = 26;
const TYPES: [Type; 10] = [
    known("net", 1, 2, 24, "virtio_net"),
    known("block", 2, 1, 60, "virtio_blk"),
    known("console", 3, 2, 12, "virtio_console"),
    known("entropy", 4, 1, 0, "virtio_rng"),
    known("scsi", 8, 3, 36, "virtio_scsi"),
    known("input", 18, 2, 136, "virtio_input"),
    known("sound", 25, 4, 12, "virtio_snd"),
    known("fs", FS, 2, TAG_SIZE + 4, "virtiofs"),
    known("i2c", 34, 1, 0, "i2c_virtio"),
    known("gpio", 41, 2, 8, "gpio_virtio"),
];

/// Body of `PUT /vhost-user/{id}`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "VhostUserDevice"))]
#[serde(deny_unknown_fields, expecting = "struct VhostUserDeviceConfig")]
pub struct Config {
    /// The device's name: letters, digits and underscores.
    pub id: String,
    /// The path of the Unix socket where the backend listens: the program that does the device's work in the guest's
    /// memory.
    pub socket: PathBuf,
    /// Its type: `net`, `block`, `console`, `entropy`, `scsi`, `input`, `sound`, `fs`, `i2c` or `gpio`, or the number that
    /// the type has in virtio 1.2, 5.
    pub device_type: String,
    /// Of a file system: the name by which the guest mounts it, at most 36 bytes; left out: the backend tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// How many queues the guest can use, 1 to 16; left out: as many as a driver of the type needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// How many requests fit into a queue: a power of two, at most 1024.
    #[serde(default = "queue_size", skip_serializing_if = "is_queue_size")]
    pub queue_size: u16,
    /// How many bytes of configuration the backend is asked for, at most 256; left out: as many as the type has, and none if
    /// that is a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_size: Option<u16>,
}

fn queue_size() -> u16 {
    256
}

fn is_queue_size(size: &u16) -> bool {
    *size == queue_size()
}

impl Config {
    /// The type that the device has; None: there is no such type.
    fn known(&self) -> Option<Type> {
        let number = self.device_type.parse().ok().filter(|number| (1..=u32::from(u8::MAX)).contains(number));
        match TYPES.into_iter().find(|known| known.name == self.device_type || Some(known.number) == number) {
            None => number.map(|number| known("", number, 1, 0, "")),
            known => known,
        }
    }

    /// Linux's module of its driver, if that is known.
    pub fn driver(&self) -> Option<&'static str> {
        self.known().map(|known| known.driver).filter(|driver| !driver.is_empty())
    }

    fn number(&self) -> u32 {
        self.known().map_or(0, |known| known.number)
    }

    fn queues(&self) -> u16 {
        self.num_queues.unwrap_or_else(|| self.known().map_or(1, |known| known.queues))
    }

    /// How many bytes of configuration the backend is asked for: none, if all that there is was given.
    fn config_size(&self) -> usize {
        let size = || self.known().map_or(0, |known| known.config_size);
        if self.tag.is_some() { 0 } else { self.config_size.map_or_else(size, usize::from) }
    }

    fn whose(&self) -> String {
        format!("{} `{}`", Self::NOUN, self.id)
    }

    fn check_backend(&self, backend: &Backend) -> Result<()> {
        let wanted = self.queues();
        match backend.queues() {
            Some(there) if u64::from(wanted) > there => Err(Error::config(format!(
                "the device has {wanted} queues (`num_queues`), and the vhost-user backend has {there} at most"
            ))),
            _ => Ok(()),
        }
    }

    fn meet(&self, host: &mut Host) -> Result<Backend> {
        let mut backend = host.backend(&self.whose(), &self.socket, self.config_size())?;
        self.check_backend(&backend)?;
        backend.note_inflight(self.queues(), self.queue_size)?;
        Ok(backend)
    }

    /// The configuration of a file system with a name of ours: the name, and the number of queues for requests, which come
    /// after the one for what is urgent (virtio 1.2, 5.11.2 and 5.11.4).
    fn of_file_system(&self, tag: &str) -> Vec<u8> {
        let mut space = tag.as_bytes().to_vec();
        space.resize(TAG_SIZE, 0);
        space.extend((u32::from(self.queues()) - 1).to_le_bytes());
        space
    }
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "vhost-user";
    const METRICS: &'static str = "vhost_user";
    const MANY: bool = true;
    const NOUN: &'static str = "vhost-user device";
    const FAULT: &'static str = "vhost-user device config error";
    const OPTION: CliOption = CliOption {
        name: "vhost-user",
        value: FORM,
        help: "\
A device whose work another program does in the guest's memory, which
listens at the Unix socket PATH. TYPE: net, block, console, entropy, scsi,
input, sound, fs, i2c, gpio, or a number of virtio's; TAG: by this name the
guest mounts a file system. May be repeated (docs/vhost-user.md)",
    };
    const EXAMPLE: &'static str =
        r#"{"id": "share", "socket": "virtiofsd.sock", "device_type": "fs", "tag": "share"}"#;
    const PUBLISHED: &'static [&'static str] = &[];
    type Patch = Patch;

    fn id(&self) -> &str {
        &self.id
    }

    fn from_option(text: &str, number: usize) -> Result<Self, String> {
        let (device_type, words) = text.split_once(',').unwrap_or((text, ""));
        let mut config = Self {
            id: format!("device{number}"),
            socket: PathBuf::new(),
            device_type: device_type.to_owned(),
            tag: None,
            num_queues: None,
            queue_size: queue_size(),
            config_size: None,
        };
        let count =
            |value: &str| value.parse().map_err(|_| format!("`{value}` is no number: expected {FORM}"));
        for word in words.split(',').filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                Some(("socket", value)) => config.socket = value.into(),
                Some(("id", value)) => config.id = value.to_owned(),
                Some(("tag", value)) => config.tag = Some(value.to_owned()),
                Some(("queues", value)) => config.num_queues = Some(count(value)?),
                Some(("queue-size", value)) => config.queue_size = count(value)?,
                Some(("config-size", value)) => config.config_size = Some(count(value)?),
                _ => return Err(format!("`{word}` is not understood: expected {FORM}")),
            }
        }
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        check_id(&self.id)?;
        let refuse = |reason: String| Err(Error::config(reason));
        let Some(known) = self.known() else {
            let names = TYPES.map(|known| known.name).join(", ");
            return refuse(format!(
                "`device_type` is `{}`: it is one of {names}, or a number of virtio's, 1 to 255",
                self.device_type
            ));
        };
        if self.socket.as_os_str().is_empty() {
            return refuse("`socket` is missing: it names where a vhost-user backend listens".to_owned());
        }
        if !(1..=QUEUES_MAX).contains(&self.queues()) {
            return refuse(format!("`num_queues` is {}: it is 1 to {QUEUES_MAX}", self.queues()));
        }
        if !self.queue_size.is_power_of_two() || self.queue_size > QUEUE_SIZE_MAX {
            let size = self.queue_size;
            return refuse(format!("`queue_size` is {size}: it is a power of two, at most {QUEUE_SIZE_MAX}"));
        }
        if self.config_size.is_some_and(|size| usize::from(size) > CONFIG_MAX) {
            return refuse(format!(
                "`config_size` is more than {CONFIG_MAX}, the most that a backend is asked for"
            ));
        }
        match &self.tag {
            Some(_) if known.number != FS => {
                refuse("`tag` is given, and the device is no file system (`device_type`: `fs`)".to_owned())
            }
            Some(_) if self.config_size.is_some() => refuse(
                "`tag` is given beside `config_size`: by one the backend is asked, by the other it is not: leave one of \
                 both out"
                    .to_owned(),
            ),
            Some(tag) if tag.is_empty() || tag.len() > TAG_SIZE || tag.contains('\0') => {
                refuse(format!("`tag` is `{}`: it has 1 to {TAG_SIZE} bytes", log::in_one_line(tag)))
            }
            Some(_) if self.queues() < 2 => {
                refuse("`num_queues` is 1: a file system has a queue for requests after the first".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn shares_memory(&self) -> bool {
        true
    }

    /// A backend that hangs holds up no other device.
    fn threads(&self) -> usize {
        1
    }

    fn hold(&self, host: &mut Host) -> Result<()> {
        host.hold_backend(&self.whose(), &self.socket, self.config_size(), |backend| {
            self.check_backend(backend)
        })
    }

    fn look(&self) -> Result<()> {
        Backend::look_for(&self.whose(), &self.socket)
    }

    fn open(&self, _: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        let remote = Remote::new(self.whose(), self.meet(host)?, DEVICE_FEATURES);
        let queue_sizes = vec![self.queue_size; self.queues().into()];
        Ok(Box::new(VhostUser { config: self.clone(), remote, queue_sizes }))
    }

    fn patched(&self, _: &Patch) -> Result<Self> {
        Ok(self.clone())
    }
}

/// Body of `PATCH /vhost-user/{id}`: the configuration of the backend is read again, and a backend that was started again is
/// met.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "PartialVhostUserDevice"))]
#[serde(deny_unknown_fields, expecting = "struct VhostUserDeviceUpdateConfig")]
pub struct Patch {
    /// The device.
    pub id: String,
}

impl kind::Patch for Patch {
    fn id(&self) -> &str {
        &self.id
    }
    fn parse(_: &str, body: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }
}

/// The device.
struct VhostUser {
    config: Config,
    remote: Remote,
    queue_sizes: Vec<u16>,
}

impl Snapshot for VhostUser {
    type State = ();

    fn save(&self) -> Result<()> {
        self.remote.save()
    }

    fn restore(&mut self, state: ()) -> Result<()> {
        self.remote.restore(state)
    }
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        self.config.number()
    }

    fn features(&self) -> u64 {
        self.remote.device_features()
    }

    fn ring_features(&self) -> u64 {
        self.remote.ring_features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        match &self.config.tag {
            Some(tag) => copy_config(&self.config.of_file_system(tag), offset, data),
            None => copy_config(self.remote.backend().config(), offset, data),
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // A backend that is lost by this has its worker see that.
        if let Err(error) = self.remote.backend().write_config(offset, data) {
            log::guest_line(format_args!("{}: write its configuration: {error}", self.config.whose()));
        }
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        self.remote.start(io)
    }

    fn reset(&mut self) {
        self.remote.reset();
    }

    fn patch(&mut self, _: &dyn Any, host: &mut Host) -> Result<bool> {
        self.remote.read_again(|| self.config.meet(host)).map(|()| true)
    }
}
