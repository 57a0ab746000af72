//! What can be said of a network interface: in a config file, by the API and on the command line.

mod mac;
mod option;
mod publish;
mod user;

use serde::{Deserialize, Serialize};

use super::device;
use crate::devices::kind::{CliOption, DeviceConfig};
use crate::error::{Error, Result};
use crate::host::{Host, tap};
use crate::limiter::RateLimiter;
use crate::metadata::stack::Stack;
use crate::virtio::VirtioDevice;
use crate::walls;
pub use mac::Mac;
pub use option::publish;
pub use publish::Publish;
pub use user::User;

/// The smallest MTU of IPv4 (RFC 791).
const MTU_MIN: u16 = 68;
/// Each takes two queues, their interrupts, and a queue of the TAP's.
const QUEUE_PAIRS_MAX: u16 = 16;
/// Body of `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "NetworkInterface"))]
#[serde(deny_unknown_fields, expecting = "struct NetworkInterfaceConfig")]
pub struct Config {
    /// Its name: letters, digits and underscores.
    pub iface_id: String,
    /// The TAP interface of the host, by its name, or `fd:N`: an open descriptor of one.
    pub host_dev_name: Option<String>,
    /// Instead of a TAP: a network that passt makes, without any rights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<User>,
    /// Its address; none: one derived from the names of the microVM and the interface.
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub guest_mac: Option<Mac>,
    /// The largest packet, in bytes.
    pub mtu: Option<u16>,
    /// So many pairs of queues, each with a queue of the TAP's: what several CPUs of the guest send and
    /// receive at the same time. None: one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_pairs: Option<u16>,
    /// So many threads of its own move its frames. None: the one that all devices share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u16>,
    /// The limit of what the guest receives.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// The limit of what it sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// What carries an interface's frames.
enum CarrierName<'a> {
    /// The TAP that this names.
    Tap(&'a str),
    /// passt.
    User(&'a User),
}

impl Config {
    /// What the interface is called in errors, and whose a TAP is that is held for it.
    fn what(&self) -> String {
        format!("{} `{}`", Self::NOUN, self.iface_id)
    }

    fn new(iface_id: String) -> Self {
        Self {
            iface_id,
            host_dev_name: None,
            user: None,
            guest_mac: None,
            mtu: None,
            queue_pairs: None,
            threads: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }
    }

    /// How many pairs of queues the device has.
    pub fn queue_pairs(&self) -> u16 {
        self.queue_pairs.unwrap_or(1)
    }

    fn carrier(&self) -> Result<CarrierName<'_>> {
        match (&self.host_dev_name, &self.user) {
            (Some(name), None) => Ok(CarrierName::Tap(name)),
            (None, Some(user)) => Ok(CarrierName::User(user)),
            (None, None) => Err(Error::config(
                "`host_dev_name` is missing: it names the TAP interface of the host; or give `user` for a \
                 network without one",
            )),
            (Some(_), Some(_)) => {
                Err(Error::config("`host_dev_name` and `user` exclude each other: give one of them"))
            }
        }
    }
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "network-interfaces";
    const METRICS: &'static str = "net";
    const MANY: bool = true;
    const NOUN: &'static str = "network interface";
    const FAULT: &'static str = "Network config error";
    const OPTION: CliOption = CliOption { name: "net", value: option::FORM, help: option::HELP };
    const EXAMPLE: &'static str =
        r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02"}"#;
    const PUBLISHED: &'static [&'static str] =
        &["iface_id", "host_dev_name", "guest_mac", "rx_rate_limiter", "tx_rate_limiter", "mtu"];
    type Patch = Patch;

    fn id(&self) -> &str {
        &self.iface_id
    }

    fn from_option(text: &str, number: usize) -> Result<Self, String> {
        option::parse(text, number)
    }

    fn check(&self) -> Result<()> {
        crate::devices::check_id(&self.iface_id)?;
        let pairs = self.queue_pairs();
        if let CarrierName::User(user) = self.carrier()? {
            user.check()?;
            if pairs > 1 {
                return Err(Error::config(format!("{pairs} `queue_pairs` are too many: passt has one")));
            }
        }
        if !(1..=QUEUE_PAIRS_MAX).contains(&pairs) {
            let message = format!("{pairs} `queue_pairs` cannot be: 1 to {QUEUE_PAIRS_MAX} can");
            return Err(Error::config(message));
        }
        match (self.threads, self.mtu) {
            (Some(threads), _) if threads > pairs => Err(Error::config(format!(
                "{threads} `threads` are more than the {pairs} `queue_pairs` that they would share"
            ))),
            (_, Some(mtu)) if mtu < MTU_MIN => {
                Err(Error::config(format!("an `mtu` of {mtu} is too small: at least {MTU_MIN}")))
            }
            _ => Ok(()),
        }
    }

    fn check_beside(&self, other: &Self) -> Result<()> {
        if let (Some(mac), Some(other)) = (self.guest_mac, other.guest_mac)
            && mac == other
        {
            return Err(Error::config(format!("The MAC address is already in use: {mac}")));
        }
        match (self.carrier()?, other.carrier()?) {
            (CarrierName::Tap(name), CarrierName::Tap(other)) if name == other => {
                Err(Error::config(format!("two network interfaces use the TAP `{name}`")))
            }
            (CarrierName::User(user), CarrierName::User(other)) => user.check_beside(other),
            _ => Ok(()),
        }
    }

    fn threads(&self) -> usize {
        self.threads.unwrap_or(0).into()
    }

    fn hold(&self, host: &mut Host) -> Result<()> {
        match self.carrier()? {
            CarrierName::Tap(name) => host.hold_tap(&self.what(), name, self.queue_pairs().into()),
            CarrierName::User(user) => {
                user.check_host()?;
                host.release(&self.what());
                Ok(())
            }
        }
    }

    /// A TAP is not attached to: that would keep another from it for a moment.
    fn look(&self) -> Result<()> {
        match self.carrier()? {
            CarrierName::Tap(name) => tap::Tap::look(name, self.queue_pairs().into()),
            CarrierName::User(user) => user.check_host(),
        }
    }

    fn open(&self, vm: &str, host: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        let mac = self.guest_mac.unwrap_or_else(|| Mac::derived(vm, &self.iface_id));
        let mut net = match self.carrier()? {
            CarrierName::Tap(name) => {
                let taps = host.tap(&self.what(), name, self.queue_pairs().into())?;
                device::Net::over_taps(self, mac, taps)
            }
            CarrierName::User(user) => {
                walls::check_may_start("passt")?;
                user.check_host()?;
                device::Net::over_passt(self, mac, host.passt(user.passt_arguments(self.mtu))?)
            }
        };
        if let Some(service) = host.metadata(&self.iface_id) {
            net.answer_by(Stack::new(service, host.random_seed()?));
        }
        Ok(Box::new(net))
    }

    fn patched(&self, patch: &Patch) -> Result<Self> {
        let patched = |old: Option<RateLimiter>, patch: Option<RateLimiter>| match patch {
            Some(patch) => Some(old.unwrap_or_default().patched(patch)),
            None => old,
        };
        Ok(Self {
            rx_rate_limiter: patched(self.rx_rate_limiter, patch.rx_rate_limiter),
            tx_rate_limiter: patched(self.tx_rate_limiter, patch.tx_rate_limiter),
            ..self.clone()
        })
    }

    fn id_mismatch(path: &str, body: &str) -> String {
        format!("The id from the path [{path}] does not match the id from the body [{body}]!")
    }
}

/// Body of `PATCH /network-interfaces/{iface_id}`: with the name alone, nothing changes.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "PartialNetworkInterface"))]
#[serde(deny_unknown_fields, expecting = "struct NetworkInterfaceUpdateConfig")]
pub struct Patch {
    /// The interface.
    pub iface_id: String,
    /// Buckets of what the guest receives.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Buckets of what it sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl crate::devices::kind::Patch for Patch {
    fn id(&self) -> &str {
        &self.iface_id
    }
    fn parse(_: &str, body: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_one_carrier_and_two_have_no_port_in_common() {
        let parse = |text: &str| serde_json::from_str::<Config>(text).unwrap();
        for (text, expected) in [
            (r#"{"iface_id":"a"}"#, "`host_dev_name` is missing"),
            (r#"{"iface_id":"a","host_dev_name":"t","user":{}}"#, "exclude each other"),
            (r#"{"iface_id":"a","user":{},"queue_pairs":2}"#, "passt has one"),
            (r#"{"iface_id":"a","host_dev_name":"t","queue_pairs":17}"#, "17 `queue_pairs` cannot be"),
            (r#"{"iface_id":"a","host_dev_name":"t","queue_pairs":0}"#, "0 `queue_pairs` cannot be"),
            (r#"{"iface_id":"a","host_dev_name":"t","threads":2}"#, "2 `threads` are more than the 1"),
            (r#"{"iface_id":"a","user":{},"mtu":67}"#, "an `mtu` of 67 is too small"),
            (r#"{"iface_id":"a","user":{"publish":["80:1","80:2"]}}"#, "publish `80:2`"),
        ] {
            let error = parse(text).check().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let [a, b] =
            ["a", "b"].map(|id| parse(&format!(r#"{{"iface_id":"{id}","user":{{"publish":["80:1"]}}}}"#)));
        let error = a.check_beside(&b).unwrap_err().to_string();
        assert!(error.contains("publish `80:1`"), "{error}");
    }
}
