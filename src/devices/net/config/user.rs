//! The network of an ordinary user: passt(1) gives the guest an address and carries its connections.

use serde::{Deserialize, Serialize};

use super::publish::Publish;
use crate::error::{Error, Result};

/// `user` of a network interface.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "UserNetwork"))]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Ports of the host that lead to the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(test, schemars(with = "Vec<String>"))]
    pub publish: Vec<Publish>,
    /// The guest's gateway is this host's loopback: it reaches what listens on 127.0.0.1. Otherwise
    /// it reaches only what every other machine would.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub loopback: bool,
}

impl User {
    /// Whether it makes sense in itself.
    pub fn check(&self) -> Result<()> {
        let mut ports = self.publish.iter().enumerate();
        ports.try_for_each(|(at, one)| check_free_of(one, &self.publish[..at]))
    }

    /// Whether both can be on one host.
    pub fn check_beside(&self, other: &Self) -> Result<()> {
        self.publish.iter().try_for_each(|one| check_free_of(one, &other.publish))
    }

    /// Whether passt is there, and the ports are free.
    pub fn check_host(&self) -> Result<()> {
        crate::host::passt::find()?;
        self.publish.iter().try_for_each(Publish::check_free)
    }

    /// What passt is told; `mtu` is what the guest is to use.
    pub fn passt_arguments(&self, mtu: Option<u16>) -> Vec<String> {
        let mut arguments: Vec<String> = self.publish.iter().flat_map(Publish::passt_arguments).collect();
        if !self.loopback {
            arguments.push("--no-map-gw".to_owned());
        }
        if let Some(mtu) = mtu {
            arguments.extend(["--mtu".to_owned(), mtu.to_string()]);
        }
        arguments
    }
}

fn check_free_of(one: &Publish, others: &[Publish]) -> Result<()> {
    match others.iter().any(|other| other.collides(one)) {
        true => Err(Error::config(format!("publish `{one}`: this port of the host is published already"))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passt_is_told_what_was_asked_for() {
        let user: User = serde_json::from_str(r#"{"publish": ["8080:80"]}"#).unwrap();
        assert_eq!(user.passt_arguments(None), ["--tcp-ports", "8080:80", "--no-map-gw"]);
        let user = User { publish: Vec::new(), loopback: true };
        assert_eq!(user.passt_arguments(Some(1400)), ["--mtu", "1400"]);
    }

    #[test]
    fn a_port_is_published_once() {
        let user: User = serde_json::from_str(r#"{"publish": ["80:1", "81:1", "127.0.0.1:80:2"]}"#).unwrap();
        let error = user.check().unwrap_err().to_string();
        assert!(
            error.contains("publish `127.0.0.1:80:2`: this port of the host is published already"),
            "{error}"
        );
    }
}
