//! Network interfaces: what they are made of, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::File;

use alula::host::tap::Tap;
use common::{Process, Service, network, run};
use serde_json::json;

const MAC: &str = "06:00:ac:10:00:02";

/// Both transports.
const TRANSPORTS: [&[&str]; 2] = [&[], &["--enable-pci"]];

#[test]
fn a_tap_may_come_as_an_open_descriptor() {
    network::enter();
    for (name, transport) in ["tap0", "tap1"].into_iter().zip(TRANSPORTS) {
        let tap = network::open_tap(name, network::TAP);
        common::output("ip", &["link", "set", name, "up"]);
        let wire = network::Wire::new(name, 0x88b5);
        let net = format!("fd={},mac={MAC}", network::hand_over(&tap));
        let mut guest =
            Process::start([&["run"], transport, &["--net", &net, "--cmdline", "case=net"]].concat());
        network::answer(&wire);
        guest.expect("bytes in)");
        assert_eq!(guest.end().code, Some(0));
    }
}

#[test]
fn the_log_tells_of_a_tap_that_goes_down_and_up() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let mut guest = Process::start(["run", "--net", "tap=tap0", "--cmdline", "case=net"]);
    guest.expect("alula firmware");
    // At once if the guest has begun to use the interface, and when it does if not.
    for (state, told) in [("down", "no link: its TAP is down or gone"), ("up", "a link again")] {
        common::output("ip", &["link", "set", "tap0", state]);
        guest.expect(&format!("network interface `net0` has {told}"));
    }
    guest.send(libc::SIGTERM);
    guest.end();
}

#[test]
fn what_is_no_tap_of_ours_is_refused_with_a_way_on() {
    network::enter();
    network::add_tap("mine0", "172.16.0.1/24");
    network::add_interface("several0", network::TAP | libc::IFF_MULTI_QUEUE);
    network::add_interface("tun0", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let busy = network::open_tap("busy0", network::TAP);
    let tun = network::open_tap("tun1", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let plain = network::open_tap("plain0", libc::IFF_TAP | libc::IFF_NO_PI);
    let unattached = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let null = File::open("/dev/null").unwrap();
    let [null, unattached, tun, plain] =
        [&null, &unattached, &tun, &plain].map(|file| format!("fd:{}", network::hand_over(file)));
    let service = Service::start(&[]);
    let mut client = service.client();
    for (name, expected) in [
        ("none%d".to_owned(), "`%` in the name of an interface"),
        ("busy0".to_owned(), "open TAP interface `busy0` (`host_dev_name`, --net): another process uses it"),
        ("lo".to_owned(), "it is not a TAP interface: name one that is"),
        ("tun0".to_owned(), "it is not a TAP interface: name one that is"),
        ("".to_owned(), "interface names have 1 to 15 characters"),
        ("fd:250".to_owned(), "take over descriptor 250: no descriptor of this number was inherited"),
        ("fd:x".to_owned(), "`x` is not the number of a descriptor"),
        (null, "it is not a TAP interface"),
        (unattached, "it is /dev/net/tun without an interface"),
        (tun, "it is a TUN interface"),
        (plain, "it was attached without IFF_VNET_HDR"),
    ] {
        let body = json!({ "iface_id": "n", "host_dev_name": name }).to_string();
        let fault = client.request("PUT", "/network-interfaces/n", &body).fault();
        assert!(fault.starts_with("Network config error: ") && fault.contains(expected), "{name}: {fault}");
    }
    // One queue of a TAP that has several is as good as a TAP that has one.
    for name in ["several0", "mine0"] {
        let body = json!({ "iface_id": "n", "host_dev_name": name }).to_string();
        client.ok("PUT", "/network-interfaces/n", &body);
    }
    drop(busy);
}

#[test]
fn another_count_of_queues_is_had_or_the_tap_is_kept() {
    const SEVERAL: i32 = network::TAP | libc::IFF_MULTI_QUEUE;
    network::enter();
    network::add_tap("single0", "172.16.0.1/24");
    network::add_interface("several0", SEVERAL);
    let service = Service::start(&[]);
    let mut client = service.client();
    let pid = service.process.child.id();
    let attached = |name: &str| {
        let infos = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
        let is_its = |info: &String| info.lines().any(|line| line == format!("iff:\t{name}"));
        infos.filter_map(|info| std::fs::read_to_string(info.unwrap().path()).ok()).filter(is_its).count()
    };
    let mut put = |name: &str, queues: usize| {
        let body = json!({ "iface_id": "n", "host_dev_name": name, "queue_pairs": queues }).to_string();
        client.request("PUT", "/network-interfaces/n", &body)
    };
    for queues in [2, 4, 4, 1, 3] {
        assert_eq!(put("several0", queues).status(), "204");
        assert_eq!(attached("several0"), queues);
    }
    // Somebody else comes: nothing can be added to what we have, which stays.
    let other = network::open_tap("several0", SEVERAL);
    let fault = put("several0", 4).fault();
    assert!(fault.contains("another process uses it"), "{fault}");
    assert_eq!(attached("several0"), 3);
    drop(other);
    assert_eq!(put("single0", 1).status(), "204");
    assert_eq!((attached("several0"), attached("single0")), (0, 1));
    let fault = put("single0", 2).fault();
    assert!(fault.contains("it is not a TAP interface with several queues"), "{fault}");
    assert_eq!(attached("single0"), 1);
    // One that is made for the interface is made again for more queues.
    for queues in [1, 2, 1] {
        assert_eq!(put("made0", queues).status(), "204");
        assert_eq!((attached("single0"), attached("made0")), (0, queues));
    }
}

#[test]
fn a_tap_that_is_not_there_is_made_and_goes_again() {
    network::enter();
    let is_there = |name: &str| {
        let name = std::ffi::CString::new(name).unwrap();
        let listed = std::process::Command::new("ip").args(["link", "show", name.to_str().unwrap()]).output();
        listed.unwrap().status.success()
    };
    let mut service = Service::start(&[]);
    let mut client = service.client();
    for (name, pairs) in [("new0", 1), ("new0", 1), ("new1", 2), ("new2", 1)] {
        let body = json!({ "iface_id": "n", "host_dev_name": name, "queue_pairs": pairs }).to_string();
        client.ok("PUT", "/network-interfaces/n", &body);
        let there: Vec<_> = ["new0", "new1", "new2"].into_iter().filter(|name| is_there(name)).collect();
        assert_eq!(there, [name]);
    }
    service.process.expect("TAP interface `new2` was not there: made, down, without an address");
    service.process.send(libc::SIGTERM);
    assert_eq!(service.process.end().code, Some(128 + libc::SIGTERM));
    assert!(!is_there("new2"));
}

#[test]
fn a_tap_of_several_queues_has_one_user_as_any_other() {
    network::enter();
    network::add_interface("several0", network::TAP | libc::IFF_MULTI_QUEUE);
    let put = |service: &Service, queue_pairs: u16| {
        let body = json!({ "iface_id": "n", "host_dev_name": "several0", "queue_pairs": queue_pairs });
        service.client().request("PUT", "/network-interfaces/n", &body.to_string())
    };
    let refused = "open TAP interface `several0` (`host_dev_name`, --net): another process uses it";
    let (first, second) = (Service::start(&[]), Service::start(&[]));
    for (ours, theirs) in [(1, 1), (2, 1), (1, 2), (3, 2)] {
        // The same one may ask again, also for more or for less.
        for again in [ours, 4, ours] {
            assert_eq!(put(&first, again).status(), "204", "{again}");
        }
        let fault = put(&second, theirs).fault();
        assert!(fault.contains(refused), "{ours} and {theirs}: {fault}");
    }
    // Attached or not: a queue that is left to others for now is somebody's all the same.
    let other = network::open_tap("several0", network::TAP | libc::IFF_MULTI_QUEUE);
    let fault = put(&first, 2).fault();
    assert!(fault.contains(refused), "{fault}");
    network::detach_queue(&other);
    let fault = put(&first, 2).fault();
    assert!(fault.contains(refused), "{fault}");
    drop(other);
    // What was refused took nothing from the first one.
    let fault = put(&second, 2).fault();
    assert!(fault.contains(refused), "{fault}");
    assert_eq!(put(&first, 16).status(), "204");
    drop(first);
    assert_eq!(put(&second, 2).status(), "204");
}

#[test]
fn of_two_that_come_at_once_at_most_one_gets_a_tap() {
    network::enter();
    network::add_interface("several0", network::TAP | libc::IFF_MULTI_QUEUE);
    let mut had = 0;
    for _ in 0..100 {
        let both = std::sync::Barrier::new(2);
        let open = || {
            both.wait();
            let taps = Tap::open("several0", 2);
            // Until the other one has looked, too.
            both.wait();
            taps.is_ok()
        };
        let got = std::thread::scope(|scope| {
            let other = scope.spawn(open);
            [open(), other.join().unwrap()]
        });
        assert_ne!(got, [true, true]);
        had += usize::from(got.contains(&true));
    }
    println!("one of both had it in {had} rounds of 100");
    // A process that another test starts has our descriptors until it runs its program.
    common::wait_for(|| Tap::open("several0", 2).is_ok_and(|taps| taps.len() == 2));
}

#[test]
fn passt_lives_as_long_as_the_monitor_whatever_ends_it() {
    network::enter();
    network::add_uplink();
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let mut guest = Process::start(["run", "--net", "user", "--cmdline", "hello"]);
        guest.expect("A");
        let parent = guest.child.id();
        common::wait_for(|| network::passts(parent).len() == 1);
        let passt = network::passts(parent)[0];
        // Who ends it by itself can: no signal is blocked there as it is in the monitor.
        let status = std::fs::read_to_string(format!("/proc/{passt}/status")).unwrap();
        assert!(status.contains("SigBlk:\t0000000000000000\n"), "{status}");
        guest.send(signal);
        guest.end();
        common::wait_for(|| common::ended::is_over(passt));
    }
}

#[test]
fn a_guest_goes_on_without_a_link_when_passt_dies() {
    network::enter();
    network::add_uplink();
    let mut guest = Process::start(["run", "--net", "user,id=lan", "--cmdline", "case=serial end=idle"]);
    guest.expect("1 cases, 0 failed");
    let parent = guest.child.id();
    common::wait_for(|| network::passts(parent).len() == 1);
    network::kill(network::passts(parent)[0]);
    assert!(guest.is_running());
    guest.send(libc::SIGTERM);
    guest.end();
}

#[test]
fn a_user_network_that_cannot_be_is_refused_with_a_way_on() {
    network::enter();
    network::add_uplink();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("{}:80", listener.local_addr().unwrap());
    for (options, expected) in [
        (
            &["--net", "user", "--publish", &taken][..],
            "another process uses this port: publish at another one",
        ),
        (&["--net", "user", "--publish", "80"], "`80` is not of the form [ADDRESS:]HOST:GUEST[/udp]"),
        (&["--net", "user", "--publish", "0:80"], "`0` in `0:80` is not a port from 1 to 65535"),
        (&["--publish", "8080:80"], "--publish is for a network of passt: add `--net user`"),
        (&["--net", "user", "--publish", "8:80", "--publish", "8:81"], "published already"),
        (&["--net", "user,publish=8:80", "--net", "user,publish=8:81"], "published already"),
        (&["--net", "user,tap=tap0"], "`host_dev_name` and `user` exclude each other"),
    ] {
        let ended = run([&["run", "--cmdline", "case=serial"], options].concat());
        assert!([Some(125), Some(153)].contains(&ended.code), "{options:?}: {}", ended.text);
        assert!(ended.text.contains(expected), "{options:?}: {}", ended.text);
    }
    let mut command = std::process::Command::new(common::alula());
    command.args(["run", "--net", "user", "--cmdline", "case=serial"]).env("PATH", "/nowhere");
    let ended = Process::spawn(command).end();
    assert_eq!(ended.code, Some(125), "{}", ended.text);
    assert!(
        ended.text.contains("`passt` is in no folder of PATH")
            && ended.text.contains("apt-get install passt")
    );
}

#[test]
fn an_ordinary_user_is_told_what_makes_a_tap_its_own() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    common::open_devices();
    let folder = common::Folder::new();
    let command = common::as_nobody(&folder, &["run", "--net", "tap=tap0", "--cmdline", "case=serial"]);
    let ended = Process::spawn(command).end();
    assert_eq!(ended.code, Some(125), "{}", ended.text);
    let expected = "this user may not use it: `ip tuntap add dev tap0 mode tap user $(id -un)` creates one";
    assert!(ended.text.contains(expected), "{}", ended.text);
}

#[test]
fn interfaces_that_cannot_be_told_apart_are_refused() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    network::add_tap("tap1", "172.16.1.1/24");
    for (first, second, expected) in [
        ("tap=tap0,id=a", "tap=tap1,id=a", "--net: two of them are the network interface `a`"),
        ("tap=tap0,mac=06:00:ac:10:00:02", "tap=tap1,mac=06:00:AC:10:00:02", "MAC address is already in use"),
        ("tap=tap0", "tap=tap0", "two network interfaces use the TAP `tap0`"),
    ] {
        let ended = run(["run", "--net", first, "--net", second, "--cmdline", "case=serial"]);
        assert!([Some(125), Some(153)].contains(&ended.code), "{}", ended.text);
        assert!(ended.text.contains(expected), "{}", ended.text);
    }
}

#[test]
fn a_hostile_driver_of_an_interface_breaks_nothing_else() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    for transport in TRANSPORTS {
        let options = ["--net", "tap=tap0,id=lan", "--entropy", "--cmdline", "case=hostile-net"];
        let ended = run([&["run"], transport, &options].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains("hostile-net: ok (19 breaches)"), "{}", ended.text);
        let expected = "network interface `lan` stopped and waits for a reset: the driver gave";
        assert!(ended.text.contains(expected), "{}", ended.text);
        let lines = ended.text.lines().filter(|line| line.contains("waits for a reset")).count();
        assert!(lines <= 40, "log lines that a guest causes are bounded: {lines}");
    }
}
