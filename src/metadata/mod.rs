//! The metadata service: data that the owner of a microVM gives by the API, and that the guest asks for by HTTP at
//! an address that leads nowhere else. [`store`] is the data, [`tokens`] are what version 2 asks for with each
//! request, [`http`] answers one request, [`stack`] is TCP/IP below that.

pub mod http;
pub mod stack;
pub mod store;
pub mod tokens;

use std::net::Ipv4Addr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::json;
use crate::metrics::Counter;
use store::Store;

/// The most bytes of data, unless the command line says otherwise (Firecracker's limit).
pub const SIZE_MAX: usize = 51_200;
/// Where guests of every cloud look for their metadata.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// How requests are made.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "MmdsVersion"))]
pub enum Version {
    /// Each is answered; a token may be got and sent, and is not looked at. Whoever can make a program in the guest
    /// fetch a URL can read the data.
    #[default]
    V1,
    /// Each needs a token, which the guest gets by a PUT.
    V2,
}

/// Body of `PUT /mmds/config`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "MmdsConfig"))]
#[serde(deny_unknown_fields, expecting = "struct MmdsConfig")]
pub struct Config {
    /// The network interfaces, by their `iface_id`, whose guest's side can ask: one at least.
    pub network_interfaces: Vec<String>,
    /// Whether requests need a token.
    #[serde(default, deserialize_with = "json::or_default")]
    pub version: Version,
    /// The link-local address that answers; none: 169.254.169.254.
    #[serde(default = "address", deserialize_with = "address_or_null")]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub ipv4_address: Ipv4Addr,
    /// Answers are plain text whatever the guest says that it accepts, as those of EC2 are.
    #[serde(default, deserialize_with = "json::or_default")]
    pub imds_compat: bool,
}

fn address() -> Ipv4Addr {
    ADDRESS
}

fn address_or_null<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Ipv4Addr, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(ADDRESS))
}

impl Config {
    /// One that makes sense in itself, as JSON.
    pub const EXAMPLE: &'static str = r#"{"network_interfaces": ["eth0"]}"#;

    /// Answers on these interfaces, in the way that is the default.
    pub fn on(network_interfaces: Vec<String>) -> Self {
        Self { version: Version::V1, network_interfaces, ipv4_address: ADDRESS, imds_compat: false }
    }

    /// Whether it makes sense in itself.
    pub fn check(&self) -> Result<()> {
        // RFC 3927, 2.1: the first and the last 256 addresses are reserved.
        let [first, second, third, _] = self.ipv4_address.octets();
        if (first, second) != (169, 254) || third == 0 || third == 255 {
            return Err(Error::config(format!(
                "The MMDS IPv4 address is not link local: {} (`ipv4_address`): 169.254.1.0 to 169.254.254.255 are",
                self.ipv4_address
            )));
        }
        if self.network_interfaces.is_empty() {
            return Err(Error::config(
                "The list of network interface IDs that allow forwarding MMDS requests is empty. \
                 (`network_interfaces`)",
            ));
        }
        Ok(())
    }

    /// Whether all its interfaces are among those that `exists` knows.
    pub fn check_interfaces(&self, exists: impl Fn(&str) -> bool) -> Result<()> {
        match self.network_interfaces.iter().find(|id| !exists(id)) {
            None => Ok(()),
            Some(id) => Err(Error::config(format!(
                "The list of network interface IDs provided contains at least one ID that does not correspond to \
                 any existing network interface: `{id}`"
            ))),
        }
    }
}

/// What answers on the interfaces of a microVM.
pub struct Service {
    /// How.
    pub config: Config,
    /// With what.
    pub store: Arc<Store>,
}

crate::metrics::metrics! {
    /// What the service did, on all interfaces.
    pub struct Metrics {
        /// Frames of guests that were for the service.
        rx_accepted: Counter,
        /// Of those, frames that made no sense.
        rx_accepted_err: Counter,
        /// Frames that were handled.
        rx_count: Counter,
        /// Requests with a token that was not issued here, or has expired.
        rx_invalid_token: Counter,
        /// Requests without the token that they need.
        rx_no_token: Counter,
        /// Frames for guests.
        tx_frames: Counter,
        /// The same.
        tx_count: Counter,
        /// Bytes of them.
        tx_bytes: Counter,
        /// Frames for which the guest's buffers had no room.
        tx_errors: Counter,
        /// Connections that guests opened.
        connections_created: Counter,
        /// Connections that ended, or gave way to new ones.
        connections_destroyed: Counter,
    }
}

/// The one of this process.
pub static METRICS: Metrics = Metrics::new();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_link_local_and_interfaces_are_named() {
        let parse = |text: &str| serde_json::from_str::<Config>(text).unwrap();
        let config = parse(r#"{"network_interfaces": ["a"], "ipv4_address": null, "version": null}"#);
        assert_eq!(config, Config::on(vec!["a".to_owned()]));
        config.check().unwrap();
        config.check_interfaces(|id| id == "a").unwrap();
        let error = config.check_interfaces(|id| id == "b").unwrap_err().to_string();
        assert!(error.contains("does not correspond to any existing network interface: `a`"), "{error}");
        for (text, expected) in [
            (r#"{"network_interfaces": []}"#, "IDs that allow forwarding MMDS requests is empty."),
            (r#"{"network_interfaces": ["a"], "ipv4_address": "10.0.0.1"}"#, "is not link local: 10.0.0.1"),
            (r#"{"network_interfaces": ["a"], "ipv4_address": "169.254.0.9"}"#, "is not link local"),
            (r#"{"network_interfaces": ["a"], "ipv4_address": "169.254.255.1"}"#, "is not link local"),
        ] {
            let error = parse(text).check().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for text in [
            "{}",
            r#"{"network_interfaces": "a"}"#,
            r#"{"network_interfaces": ["a"], "version": "V3"}"#,
            r#"{"network_interfaces": ["a"], "ipv4_address": "169.254.1"}"#,
            r#"{"network_interfaces": ["a"], "port": 81}"#,
        ] {
            assert!(serde_json::from_str::<Config>(text).is_err(), "{text}");
        }
    }
}
