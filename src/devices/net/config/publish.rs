//! Ports of the host that lead to the guest of a user-mode network.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// A port of the host, on all of its addresses or on one, that leads to one of the guest's: written
/// `HOST:GUEST`, `ADDRESS:HOST:GUEST` (IPv6 in brackets), and `/udp` after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    address: Option<IpAddr>,
    host: u16,
    guest: u16,
    udp: bool,
}

impl Publish {
    /// Whether both want the same port of the host.
    pub fn collides(&self, other: &Self) -> bool {
        let same_address = self.address.is_none() || other.address.is_none() || self.address == other.address;
        self.host == other.host && self.udp == other.udp && same_address
    }

    /// Whether the port can be had now. passt would say it later, and not as clearly; it takes it
    /// itself a moment after this.
    pub fn check_free(&self) -> Result<()> {
        let address = self.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        let address = SocketAddr::new(address, self.host);
        let taken = match self.udp {
            true => UdpSocket::bind(address).map(drop),
            false => TcpListener::bind(address).map(drop),
        };
        let why = match taken {
            Ok(()) => return Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EADDRINUSE) => "another process uses this port: publish at another one".to_owned(),
                Some(libc::EACCES) => format!(
                    "this user may not use ports below 1024: publish at a higher one, as {}:{}",
                    u32::from(self.host) + 8000,
                    self.guest
                ),
                Some(libc::EADDRNOTAVAIL) => "this host has no such address".to_owned(),
                _ => error.to_string(),
            },
        };
        Err(Error::config(format!("publish `{self}`: {why}")))
    }

    /// What passt is told: an option and its value.
    pub fn passt_arguments(&self) -> [String; 2] {
        let option = if self.udp { "--udp-ports" } else { "--tcp-ports" };
        let address = self.address.map(|address| format!("{address}/")).unwrap_or_default();
        [option.to_owned(), format!("{address}{}:{}", self.host, self.guest)]
    }
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not of the form [ADDRESS:]HOST:GUEST[/udp], as in 8080:80");
        let (ports, udp) = match text.rsplit_once('/') {
            Some((ports, protocol @ ("tcp" | "udp"))) => (ports, protocol == "udp"),
            Some(_) => return Err(wrong()),
            None => (text, false),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(wrong)?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => {
                let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
                let address: IpAddr = bare.unwrap_or(address).parse().map_err(|_| wrong())?;
                if bare.is_some() != address.is_ipv6() {
                    return Err(wrong());
                }
                (Some(address), host)
            }
            None => (None, rest),
        };
        let port = |text: &str| match text.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(format!("`{text}` in `{text_all}` is not a port from 1 to 65535", text_all = ports)),
        };
        Ok(Self { address, host: port(host)?, guest: port(guest)?, udp })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}{}", self.host, self.guest, if self.udp { "/udp" } else { "" })
    }
}

impl<'de> Deserialize<'de> for Publish {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Publish {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written_the_same_way() {
        for (text, passt) in [
            ("8080:80", ["--tcp-ports", "8080:80"]),
            ("53:5353/udp", ["--udp-ports", "53:5353"]),
            ("127.0.0.1:22:22", ["--tcp-ports", "127.0.0.1/22:22"]),
            ("[::1]:22:22", ["--tcp-ports", "::1/22:22"]),
        ] {
            let publish: Publish = text.parse().unwrap();
            assert_eq!(publish.to_string(), text);
            assert_eq!(publish.passt_arguments(), passt);
        }
        assert_eq!("1:2/tcp".parse::<Publish>().unwrap().to_string(), "1:2");
    }

    #[test]
    fn what_is_no_pair_of_ports_is_refused() {
        for (text, expected) in [
            ("", "`` is not of the form [ADDRESS:]HOST:GUEST[/udp]"),
            ("80", "is not of the form"),
            ("80:80/sctp", "is not of the form"),
            ("localhost:80:80", "is not of the form"),
            ("::1:80:80", "is not of the form"),
            ("[127.0.0.1]:80:80", "is not of the form"),
            ("0:80", "`0` in `0:80` is not a port from 1 to 65535"),
            ("80:", "`` in `80:` is not a port"),
            ("80:65536", "`65536` in `80:65536` is not a port"),
            ("80-90:80", "`80-90` in `80-90:80` is not a port"),
        ] {
            let error = text.parse::<Publish>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn the_same_port_collides_on_the_same_address_and_on_all() {
        let collide = |a: &str, b: &str| a.parse::<Publish>().unwrap().collides(&b.parse().unwrap());
        assert!(collide("80:1", "80:2") && collide("80:1", "127.0.0.1:80:2"));
        assert!(!collide("80:1", "80:1/udp") && !collide("127.0.0.1:80:1", "127.0.0.2:80:1"));
    }

    #[test]
    fn a_port_in_use_is_said_with_a_way_on() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let publish: Publish = format!("127.0.0.1:{port}:80").parse().unwrap();
        let error = publish.check_free().unwrap_err().to_string();
        assert!(error.contains("another process uses this port"), "{error}");
        drop(taken);
        publish.check_free().unwrap();
        let udp: Publish = format!("127.0.0.1:{port}:80/udp").parse().unwrap();
        udp.check_free().unwrap();
    }
}
