//! A network interface on the command line.

use super::{Config, Publish, User};
use crate::devices::kind::{ConfiguredDevice, check_words};

/// The form of the value of `--net`.
pub const FORM: &str = "tap=NAME|fd=N|user[,mac=MAC][,id=ID][,...]";

/// What it does.
pub const HELP: &str = "\
A network interface over a TAP interface of this host, over an open
descriptor of one, or (`user`) over passt, which needs no rights and gives
the guest its address by DHCP. For `user`: `publish=HOST:GUEST`, as below,
and `loopback`: this host's loopback is the guest's gateway. For all:
`mtu=BYTES`; for a TAP: `queues=N` pairs of queues, moved by `threads=N`
threads of their own. May be repeated";

/// What `--net` says, for the interface of this number.
pub fn parse(text: &str, number: usize) -> Result<Config, String> {
    let mut config = Config::new(format!("net{number}"));
    let unknown = |part: &str| format!("`{part}` is unknown: expected {FORM}");
    check_words(text.split(','), &["publish"])?;
    for part in text.split(',') {
        let (name, value) = part.split_once('=').map_or((part, None), |(name, value)| (name, Some(value)));
        match (name, value) {
            ("tap", Some(name)) => config.host_dev_name = Some(name.to_owned()),
            ("fd", Some(number)) => config.host_dev_name = Some(format!("fd:{number}")),
            ("user", None) => drop(config.user.get_or_insert_default()),
            ("mac", Some(mac)) => config.guest_mac = Some(mac.parse()?),
            ("id", Some(id)) => config.iface_id = id.to_owned(),
            ("mtu", Some(mtu)) => config.mtu = Some(small(part, mtu)?),
            ("queues", Some(pairs)) => config.queue_pairs = Some(small(part, pairs)?),
            ("threads", Some(threads)) => config.threads = Some(small(part, threads)?),
            ("publish" | "loopback", _) => match (&mut config.user, name, value) {
                (None, ..) => {
                    return Err(format!("`{part}` is for a network of passt: write `user` before it"));
                }
                (Some(user), "publish", Some(ports)) => user.publish.push(ports.parse()?),
                (Some(User { loopback, .. }), "loopback", None) => *loopback = true,
                _ => return Err(unknown(part)),
            },
            _ => return Err(unknown(part)),
        }
    }
    if config.host_dev_name.is_none() && config.user.is_none() {
        return Err(format!("expected {FORM}"));
    }
    Ok(config)
}

fn small(part: &str, text: &str) -> Result<u16, String> {
    text.parse().map_err(|error| format!("`{part}`: {error}"))
}

/// `--publish`: more ports for the first network of passt.
pub fn publish(devices: &mut [ConfiguredDevice], ports: &[Publish]) -> Result<(), String> {
    if ports.is_empty() {
        return Ok(());
    }
    for device in devices {
        if let Some(config) = device.config::<Config>()
            && config.user.is_some()
        {
            let mut config = config.clone();
            config.user.get_or_insert_default().publish.extend(ports);
            *device = ConfiguredDevice::new(config);
            return device.check().map_err(|error| format!("--publish: {error}"));
        }
    }
    Err("--publish is for a network of passt: add `--net user`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_described_in_one_word() {
        let net = parse("tap=tap0,mac=06:00:ac:10:00:02,id=lan,mtu=9000", 0).unwrap();
        assert_eq!((net.host_dev_name.as_deref(), net.iface_id.as_str()), (Some("tap0"), "lan"));
        assert_eq!(net.mtu, Some(9000));
        let net = parse("fd=5", 3).unwrap();
        assert_eq!((net.host_dev_name.as_deref(), net.iface_id.as_str()), (Some("fd:5"), "net3"));
        let net = parse("user,publish=8080:80,publish=127.0.0.1:53:53/udp,loopback", 0).unwrap();
        let user = net.user.unwrap();
        assert!(user.loopback && user.publish.len() == 2);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("", "`` is unknown: expected tap=NAME|fd=N|user"),
            ("mac=06:00:ac:10:00:02", "expected tap=NAME|fd=N|user"),
            ("tap=t,speed=9", "`speed=9` is unknown"),
            ("tap=t,mac=zz", "`zz` is not a MAC address"),
            ("tap=t,mtu=65536", "`mtu=65536`: number too large"),
            ("user=me", "`user=me` is unknown"),
            ("tap=t,publish=1:2", "`publish=1:2` is for a network of passt"),
            ("user,publish=80", "`80` is not of the form [ADDRESS:]HOST:GUEST[/udp]"),
            ("user,loopback=1", "`loopback=1` is unknown"),
            ("tap=t,id=a,id=b", "`id=b`: `id` is given twice: give it once"),
        ] {
            let error = parse(text, 0).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
