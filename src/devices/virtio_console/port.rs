//! A port with a name, which is a Unix socket of the host: what can be said of it, and the device without its queues.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::control::Talk;
use super::port_client::{Home, Port};
use super::port_worker::Running;
use super::{DEVICE_TYPE, F_MULTIPORT, configuration};
use crate::devices::kind::{CliOption, DeviceConfig, NotPatchable};
use crate::devices::{check_id, copy_config};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::host::listener::Listener;
use crate::metrics::{Counter, Group, metrics};
use crate::snapshot::Snapshot;
use crate::virtio::{Io, VirtioDevice, Worker};

/// The form of the value of `--port`.
const FORM: &str = "NAME=PATH";
/// The longest name, in bytes: a file of that name, and a message to the guest, have room for it.
const NAME_MAX: usize = 64;

/// Bytes that the guest receives and sends, and messages of the port that it receives and sends.
const QUEUE_SIZES: [u16; 4] = [64, 64, 16, 16];

/// Body of `PUT /ports/{id}`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Port"))]
#[serde(deny_unknown_fields, expecting = "struct PortDeviceConfig")]
pub struct Config {
    /// The port's id in the API.
    pub id: String,
    /// By this name the guest finds it (`/dev/virtio-ports/NAME`): 1 to 64 letters, digits, `.`, `-` and `_`; none: the id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The path of the Unix socket that programs of the host connect to, which is made. One at a time is let in.
    pub uds_path: PathBuf,
}

impl Config {
    /// The name by which the guest finds it.
    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.id)
    }

    /// The name of the socket in errors.
    fn socket(&self) -> String {
        format!("the socket of port `{}`", self.name())
    }
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "ports";
    const MANY: bool = true;
    const NOUN: &'static str = "port";
    const FAULT: &'static str = "Port config error";
    const OPTION: CliOption = CliOption {
        name: "port",
        value: FORM,
        help: "\
A port between the guest, which finds it as /dev/virtio-ports/NAME, and
who connects to the Unix socket PATH, which is made. Nothing is lost while
nobody is connected. May be repeated (docs/console.md)",
    };
    const EXAMPLE: &'static str = r#"{"id": "agent", "uds_path": "agent.sock"}"#;
    const PUBLISHED: &'static [&'static str] = &[];
    type Patch = NotPatchable;

    fn id(&self) -> &str {
        &self.id
    }

    fn from_option(text: &str, _: usize) -> Result<Self, String> {
        let parts = text.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty());
        let Some((name, path)) = parts else {
            let is_number =
                |part: &str| part.split('/').next().is_some_and(|part| part.parse::<u16>().is_ok());
            let hint = match text.split(':').all(is_number) {
                true => " (is `--publish`, a port of a network, meant?)",
                false => "",
            };
            return Err(format!("expected {FORM}{hint}"));
        };
        // An id has no dots and hyphens.
        let id: String = name.chars().map(|it| if it.is_alphanumeric() { it } else { '_' }).collect();
        let name = (name != id).then(|| name.to_owned());
        Ok(Self { id, name, uds_path: path.into() })
    }

    fn check(&self) -> Result<()> {
        check_id(&self.id)?;
        let name = self.name();
        let is_right = |it: char| it.is_ascii_alphanumeric() || matches!(it, '.' | '-' | '_');
        // The names of folders are no names of files.
        if name.is_empty()
            || name.len() > NAME_MAX
            || !name.chars().all(is_right)
            || [".", ".."].contains(&name)
        {
            return Err(Error::config(format!(
                "`{name}` cannot be the `name` of a port: it has 1 to {NAME_MAX} letters, digits, `.`, `-` and `_`"
            )));
        }
        Listener::check(&self.socket(), &self.uds_path)
    }

    fn check_beside(&self, other: &Self) -> Result<()> {
        let same = |what: &str, value: &str| {
            Err(Error::config(format!(
                "the ports `{}` and `{}` have the same {what}, `{value}`: give each one of its own",
                other.id, self.id
            )))
        };
        if self.name() == other.name() {
            return same("name", self.name());
        }
        match self.uds_path == other.uds_path {
            true => same("`uds_path`", &self.uds_path.display().to_string()),
            false => Ok(()),
        }
    }

    fn hold(&self, host: &mut Host) -> Result<()> {
        host.hold_listener(&self.socket(), &self.uds_path)
    }

    /// Nothing is made: the path is looked at.
    fn look(&self) -> Result<()> {
        Listener::look(&self.socket(), &self.uds_path)
    }

    fn open(&self, _: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        let listener = host.listener(&self.socket(), &self.uds_path)?;
        let port = Port::new(self.name().to_owned(), listener);
        Ok(Box::new(Device { metrics: Arc::default(), home: Arc::new(Mutex::new(Some(Box::new(port)))) }))
    }
}

metrics! {
    /// Counts of what went through the port. Directions are the guest's.
    pub struct Metrics {
        /// Bytes that the guest was given.
        rx_bytes_count: Counter,
        /// Bytes that a program of the host has taken from the guest.
        tx_bytes_count: Counter,
        /// Programs of the host that were let in.
        clients_count: Counter,
        /// Messages of the guest about its ports that make no sense.
        control_fails: Counter,
    }
}

/// The device.
struct Device {
    metrics: Arc<Metrics>,
    home: Home,
}

impl Device {
    /// Does something with the port, which no worker has.
    fn with<T>(&self, act: impl FnOnce(&mut Port) -> T) -> Option<T> {
        self.home.lock().unwrap_or_else(PoisonError::into_inner).as_deref_mut().map(act)
    }
}

/// The port as it is saved: all that the guest sees of it beyond its configuration and its queues. The program that is
/// connected is not saved: the guest is told, where it goes on, that the program has left.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    talk: Talk,
    gone: u64,
}

impl Snapshot for Device {
    type State = State;

    fn save(&self) -> Result<State> {
        let state = self.with(|port| State { talk: port.talk, gone: port.gone });
        state.ok_or_else(|| Error::host("a worker still has the port"))
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let State { talk, gone } = state;
        self.with(|port| (port.talk, port.gone) = (talk, gone));
        Ok(())
    }
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn has_steady_configuration(&self) -> bool {
        true
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&configuration((0, 0)), offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        Ok(vec![Box::new(Running::new(io, &self.home, &self.metrics)?)])
    }

    /// The program stays: the guest that comes is told of it.
    fn reset(&mut self) {
        self.with(|port| (port.talk, port.gone) = (Talk::default(), 0));
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_described_in_one_word() {
        let port = Config::from_option("org.qemu.guest_agent.0=/run/a=b", 0).unwrap();
        assert_eq!((&port.id[..], port.name()), ("org_qemu_guest_agent_0", "org.qemu.guest_agent.0"));
        assert_eq!(port.uds_path.to_str(), Some("/run/a=b"));
        let plain = Config { id: "agent".to_owned(), name: None, uds_path: "agent.sock".into() };
        assert_eq!(Config::from_option("agent=agent.sock", 0), Ok(plain));
        for (text, expected) in [
            ("", "expected NAME=PATH"),
            ("=p", "expected NAME=PATH"),
            ("n=", "expected NAME=PATH"),
            ("n", "expected NAME=PATH"),
            ("8080:80", "expected NAME=PATH (is `--publish`, a port of a network, meant?)"),
            ("53:53/udp", "expected NAME=PATH (is `--publish`, a port of a network, meant?)"),
        ] {
            assert_eq!(Config::from_option(text, 0).unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn a_name_that_is_no_files_or_is_there_twice_is_refused() {
        let port = |id: &str, name: &str, path: &str| Config {
            id: id.to_owned(),
            name: Some(name.to_owned()),
            uds_path: path.into(),
        };
        port("a", &"x".repeat(NAME_MAX), "p").check().unwrap();
        for name in ["", ".", "..", "a/b", "a b", "ä", "a\n", &"x".repeat(NAME_MAX + 1)] {
            let error = port("a", name, "p").check().unwrap_err().to_string();
            assert!(error.contains("cannot be the `name` of a port: it has 1 to 64"), "{error}");
        }
        let error = port("a", "n", "").check().unwrap_err().to_string();
        assert_eq!(error, "listen on the socket of port `n` ``: its path is empty: give it one");
        let first = port("a", "n", "p");
        let error = first.check_beside(&port("b", "n", "q")).unwrap_err().to_string();
        assert_eq!(error, "the ports `b` and `a` have the same name, `n`: give each one of its own");
        let error = first.check_beside(&port("b", "m", "p")).unwrap_err().to_string();
        assert!(error.contains("the same `uds_path`, `p`"), "{error}");
        first.check_beside(&port("b", "m", "q")).unwrap();
    }
}
