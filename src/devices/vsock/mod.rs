//! The socket device (virtio 1.2, 5.10): connections between programs of the host, by Unix sockets, and programs
//! of the guest, by AF_VSOCK. A program of the host connects to the device's socket, says `CONNECT <port>` and a
//! line end, and is answered `OK <port of its own>`; a program of the guest that connects to a port of the host
//! (CID 2) reaches who listens at the socket's path with an underscore and the port after it. This file is its
//! configuration; [`device`] is the device.
//!
//! Headers of packets are read and written here and not by the crate virtio-vsock: what that reads of a request
//! it reads from the ring itself, a second time, and it knows of no bytes in more than one descriptor, as Linux
//! sends them since 6.7.

mod backlog;
mod connection;
mod device;
mod flow;
mod guest;
mod host;
mod metrics;
mod mux;
mod packet;
mod receive;
mod socket;
mod stream;
mod transmit;
mod worker;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::kind::{CliOption, DeviceConfig, NotPatchable, check_words};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::host::listener::Listener;
use crate::virtio::VirtioDevice;

/// The first address that a guest can have: 0 and 1 mean a machine itself, 2 its host (vsock(7)).
const CID_MIN: u32 = 3;
/// The address of a guest of which nothing else is said.
const CID: u32 = CID_MIN;
/// The address that means any (VMADDR_CID_ANY).
const CID_ANY: u32 = u32::MAX;

/// The form of the value of `--vsock`.
const FORM: &str = "PATH[,cid=N]";

/// Body of `PUT /vsock`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Vsock"))]
#[serde(deny_unknown_fields, expecting = "struct VsockDeviceConfig")]
pub struct Config {
    /// The guest's address: 3 to 4294967294.
    #[cfg_attr(test, schemars(range(min = 3, max = 4_294_967_294_u32)))]
    pub guest_cid: u32,
    /// The path of the Unix socket that programs of the host connect to, which is made. Those that the guest
    /// connects to listen at this path with an underscore and the port after it.
    pub uds_path: PathBuf,
    /// Not used any more: there is one such device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "vsock";
    const MANY: bool = false;
    const NOUN: &'static str = "vsock device";
    const FAULT: &'static str = "Vsock config error";
    const OPTION: CliOption = CliOption {
        name: "vsock",
        value: FORM,
        help: "\
Sockets between this host and the guest (AF_VSOCK). Who connects to the
Unix socket PATH, which is made, and writes `CONNECT 1234` and a line end
reaches the guest's port 1234; the guest reaches port 1234 of CID 2 where
somebody listens at PATH_1234. N is the guest's own CID [default: 3]",
    };
    const EXAMPLE: &'static str = r#"{"guest_cid": 3, "uds_path": "v.sock"}"#;
    const PUBLISHED: &'static [&'static str] = &["guest_cid", "uds_path", "vsock_id"];
    type Patch = NotPatchable;

    fn from_option(text: &str, _: usize) -> Result<Self, String> {
        let mut words = text.split(',');
        let path = words.next().filter(|path| !path.is_empty()).ok_or(format!("expected {FORM}"))?;
        let mut config = Self { guest_cid: CID, uds_path: path.into(), vsock_id: None };
        check_words(words.clone(), &[])?;
        for word in words {
            match word.split_once('=') {
                Some(("cid", cid)) => {
                    config.guest_cid = cid.parse().map_err(|error| format!("`{word}`: {error}"))?;
                }
                _ => return Err(format!("`{word}` is unknown: expected {FORM}")),
            }
        }
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let Self { guest_cid, uds_path, .. } = self;
        if *guest_cid < CID_MIN || *guest_cid == CID_ANY {
            let last = CID_ANY - 1;
            return Err(Error::config(format!(
                "a `guest_cid` of {guest_cid} cannot be a guest's address: {CID_MIN} to {last} can"
            )));
        }
        Listener::check("vsock socket", uds_path)
    }

    fn is_deprecated(&self) -> bool {
        self.vsock_id.is_some()
    }

    fn hold(&self, host: &mut Host) -> Result<()> {
        host.hold_listener("vsock socket", &self.uds_path)
    }

    /// Nothing is made: the path is looked at.
    fn look(&self) -> Result<()> {
        Listener::look("vsock socket", &self.uds_path)
    }

    fn open(&self, _: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        let listener = host.listener("vsock socket", &self.uds_path)?;
        Ok(Box::new(device::Vsock::new(self.guest_cid, self.uds_path.clone(), listener)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_described_in_one_word() {
        let config = Config::from_option("/run/v.sock,cid=52", 0).unwrap();
        assert_eq!((config.guest_cid, config.uds_path.to_str()), (52, Some("/run/v.sock")));
        assert_eq!(Config::from_option("v", 0).unwrap().guest_cid, CID);
        for (text, expected) in [
            ("", "expected PATH[,cid=N]"),
            (",cid=3", "expected PATH[,cid=N]"),
            ("v,cid=", "`cid=`: cannot parse integer from empty string"),
            ("v,cid=4294967296", "`cid=4294967296`: number too large"),
            ("v,cid=3,cid=4", "`cid=4`: `cid` is given twice: give it once"),
            ("v,port=3", "`port=3` is unknown: expected PATH[,cid=N]"),
        ] {
            let error = Config::from_option(text, 0).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn an_address_that_is_no_guests_is_refused() {
        for (cid, is_right) in
            [(0, false), (1, false), (2, false), (3, true), (u32::MAX - 1, true), (u32::MAX, false)]
        {
            let config = Config { guest_cid: cid, uds_path: "v.sock".into(), vsock_id: None };
            let checked = config.check().map_err(|error| error.to_string());
            let expected = format!("a `guest_cid` of {cid} cannot be a guest's address");
            assert!(checked.is_ok() == is_right, "{cid}");
            assert!(checked.err().is_none_or(|error| error.starts_with(&expected)));
        }
        for cid in ["-1", "4294967296", "\"3\"", "3.5", "null"] {
            let text = format!(r#"{{"guest_cid": {cid}, "uds_path": "v"}}"#);
            assert!(serde_json::from_str::<Config>(&text).is_err(), "{cid}");
        }
    }
}
