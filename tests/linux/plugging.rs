//! Devices that come to a Linux guest that runs, and go again. ACPI tells a guest of x86_64 and asks it, the agent one of
//! aarch64, or the port of a PCIe slot.

use super::{shared, *};

/// A guest that is asked to plug what it cannot.
fn refuses(guest: &shared::Guest, path: &str, body: &serde_json::Value) {
    let mut client = guest.client();
    for (method, body) in [("PUT", &*body.to_string()), ("DELETE", "")] {
        let fault = client.request(method, path, body).fault();
        assert!(fault.contains("PCI is not enabled: devices come and go"), "{method}: {fault}");
    }
}

/// Whether the guest's configuration has the device called `id`.
fn has(guest: &shared::Guest, section: &str, field: &str, id: &str) -> bool {
    let config = guest.client().ok("GET", "/vm/config", "").json();
    config[section].as_array().unwrap().iter().any(|device| device[field] == id)
}

/// How often a disk comes and goes.
const ROUNDS: usize = 2;

/// How often a disk comes and goes in a row.
const IN_A_ROW: usize = 20;

/// A disk comes, is read, and goes, again and again: the guest watches, and no program is started in it for that. On aarch64
/// there is one slot for all that come: a port whose device was torn away a moment ago is told of the next one.
pub fn in_a_row(guest: &shared::Guest) {
    if guest.queues == 1 {
        return;
    }
    let mut client = guest.client();
    let plug = |id: &str| {
        let image = disks::image(&guest.folder, id, "raw");
        let body = json!({ "drive_id": id, "path_on_host": image, "is_root_device": false });
        guest.client().ok("PUT", &format!("/drives/{id}"), &body.to_string());
    };
    if !X86_64 {
        plug("beside");
        guest.shell("until grep -qsx beside /sys/block/vd*/serial; do usleep 10000; done");
    }
    let rounds = IN_A_ROW * times();
    let script = format!(
        "cd /sys/block
        known=\" $(echo vd*) \"
        echo watching
        for round in $(seq {rounds}); do
            disk=
            until [ $disk ]; do
                usleep 10000
                for one in vd*; do case $known in *\" $one \"*) ;; *) disk=$one ;; esac; done
            done
            until [ \"$(head -c 4096 /dev/$disk 2>/dev/null | wc -c)\" = 4096 ]; do usleep 10000; done
            echo $round: $(cat $disk/serial) at $(readlink -f $disk)
            while [ -e $disk ]; do usleep 10000; done
            echo $round: gone
        done"
    );
    let mut watching = guest.meanwhile(&script);
    watching.expect("watching");
    for round in 1..=rounds {
        plug("row");
        let line = watching.expect(&format!("{round}: row at "));
        assert!(X86_64 || line.contains("/0000:00:1f.0/0000:02:00.0/"), "{line}");
        client.ok("DELETE", "/drives/row", if round % 2 == 0 { TORN } else { "" });
        watching.expect(&format!("{round}: gone"));
        wait_for(|| !has(guest, "drives", "drive_id", "row"));
        if round % 100 == 0 {
            // A rig that is silent for long counts as one that hangs.
            println!("a disk has come and gone {round} times");
        }
    }
    assert_eq!(watching.end().code, Some(0));
    if !X86_64 {
        client.ok("DELETE", "/drives/beside", "");
    }
}

/// A disk comes several times: it is used, its limits are changed, and it goes.
pub fn disks(guest: &shared::Guest) {
    let path = "/drives/guest";
    let image = disks::image(&guest.folder, "guest", "raw");
    let body = json!({ "drive_id": "guest", "path_on_host": image, "is_root_device": false });
    if guest.queues == 1 {
        return refuses(guest, path, &body);
    }
    let mut client = guest.client();
    for round in 0..ROUNDS {
        client.ok("PUT", path, &body.to_string());
        assert!(client.request("PUT", path, &body.to_string()).fault().contains("Device ID in use"));
        let found = "until grep -lsx guest /sys/block/vd*/serial; do usleep 10000; done";
        assert!(guest.shell(found).contains("/serial"));
        let word = if round == 0 { "disk-write" } else { "disk-check" };
        let text = guest.does("guest", &[word]);
        assert!(text.contains("disk: read and written, 65536 sectors"), "{text}");
        let limit =
            json!({ "drive_id": "guest", "rate_limiter": { "ops": { "size": 100, "refill_time": 10 } } });
        client.ok("PATCH", path, &limit.to_string());
        assert!(client.ok("GET", "/metrics", "").json()["block_guest"]["read_count"].as_u64().unwrap() > 0);
        client.ok("DELETE", path, "");
        guest.shell("while grep -lsx guest /sys/block/vd*/serial; do usleep 10000; done");
        wait_for(|| !has(guest, "drives", "drive_id", "guest"));
        let fault = client.request("DELETE", path, "").fault();
        assert!(fault.contains("there is no disk `guest`"), "{fault}");
    }
    client.send("GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
    client.receive();
    let events = std::io::BufReader::new(client.stream).lines().map(Result::unwrap);
    let of_it = events.filter_map(|line| Some(line.split_once(r#""device":"disk `guest`""#)?.0.to_owned()));
    let round = ["device_plugged", "device_changed", "device_asked_to_go", "device_gone"];
    // No more lines than those are waited for.
    for (event, line) in round.iter().cycle().take(ROUNDS * round.len()).zip(of_it) {
        assert!(line.contains(event), "{line}: no {event}");
    }
}

/// CPUs come, and each of them works; all but the first go, and come again.
pub fn cpus(guest: &shared::Guest) {
    let mut client = guest.client();
    if !X86_64 {
        let fault = client.request("PATCH", "/machine-config", r#"{"vcpu_count": 4}"#).fault();
        assert!(fault.contains("not supported after starting the microVM"), "{fault}");
        return;
    }
    guest.shell("dmesg -c >/dev/null");
    let mut change = |count: u16| {
        client.ok("PATCH", "/machine-config", &json!({ "vcpu_count": count }).to_string());
        // The agent brings up what has come.
        guest.shell(&format!("until [ $(nproc) = {count} ]; do usleep 10000; done"));
        wait_for(|| client.ok("GET", "/machine-config", "").json()["vcpu_count"] == count);
    };
    for _ in 0..ROUNDS {
        change(4);
        let worked =
            guest.shell("for mask in 1 2 4 8; do taskset $mask cut -d ' ' -f 39 /proc/self/stat; done");
        assert_eq!(worked, "0\n1\n2\n3\n");
        change(1);
    }
    change(2);
    // A guest that is given a CPU again before it has looked whether that has gone finds it there, and says so.
    let complaints = guest.shell(
        "dmesg | grep -v 'Eject incomplete - status 0xf' | grep -iE 'eject|failed|stuck|not responding|BUG|WARNING' || :",
    );
    assert_eq!(complaints, "");
}

/// The body of a DELETE that tears a device away.
const TORN: &str = r#"{"force": true}"#;

/// A disk comes in a PCIe slot and is torn out of it, or switched off by the agent, and the guest hears of both by itself:
/// nobody in it is asked to look. In the end both slots are taken, and other devices come on bus 0.
pub fn slots(guest: &shared::Guest) {
    if X86_64 || guest.queues == 1 {
        return;
    }
    let mut client = guest.client();
    let mut plug = |id: &str| {
        let image = disks::image(&guest.folder, id, "raw");
        let body = json!({ "drive_id": id, "path_on_host": image, "is_root_device": false });
        client.ok("PUT", &format!("/drives/{id}"), &body.to_string());
        let found = format!(
            "until grep -lsx {id} /sys/block/vd*/serial; do usleep 10000; done
            readlink -f $(dirname $(grep -lsx {id} /sys/block/vd*/serial))/device/.."
        );
        guest.shell(&found)
    };
    let take = |id: &str, how: &str| {
        guest.client().ok("DELETE", &format!("/drives/{id}"), how);
        guest.shell(&format!("while grep -lsx {id} /sys/block/vd*/serial; do usleep 10000; done"));
        wait_for(|| !has(guest, "drives", "drive_id", id));
    };
    // The ports are the last devices of bus 0, and slots are taken in turn.
    let ports = ["/0000:00:1e.0/0000:01:00.0", "/0000:00:1f.0/0000:02:00.0"];
    for (port, how) in ports.into_iter().zip([TORN, ""]) {
        let path = plug("slot");
        assert!(path.contains(port), "{path}");
        let text = guest.does("slot", &["disk-write"]);
        assert!(text.contains("disk: read and written, 65536 sectors"), "{text}");
        take("slot", how);
    }
    assert!(plug("slot1").contains(ports[0]));
    assert!(plug("slot2").contains(ports[1]));
    let complaints = guest.shell("dmesg | grep -i pciehp | grep -iE 'fail|error|cannot|timeout' || :");
    assert_eq!(complaints, "");
}

/// A network interface comes: the guest reaches the host by it, and it goes.
pub fn interfaces(guest: &shared::Guest) {
    let path = "/network-interfaces/guest";
    let body = json!({ "iface_id": "guest", "host_dev_name": "tap2", "guest_mac": "06:00:ac:11:00:02" });
    if guest.queues == 1 {
        return refuses(guest, path, &body);
    }
    network::add_tap("tap2", "172.18.0.1/24");
    let mut client = guest.client();
    client.ok("PUT", path, &body.to_string());
    let script = "
        until name=$(grep -lx 06:00:ac:11:00:02 /sys/class/net/*/address); do usleep 10000; done
        name=$(basename $(dirname $name))
        ip addr add 172.18.0.2/24 dev $name
        ip link set $name up
        ping -c 3 -W 10 172.18.0.1 >/dev/null && echo pinged by $name";
    let text = guest.shell(script);
    assert!(text.contains("pinged by eth"), "{text}");
    client.ok("DELETE", path, "");
    guest.shell("while grep -lsx 06:00:ac:11:00:02 /sys/class/net/*/address; do usleep 10000; done");
    wait_for(|| !has(guest, "network-interfaces", "iface_id", "guest"));
    // Nobody holds the interface of the host any more.
    common::output("ip", &["link", "del", "tap2"]);
}

/// Persistent memory comes: the guest writes to it, and it goes.
pub fn pmem(guest: &shared::Guest) {
    let path = "/pmem/guest";
    let image = disks::image(&guest.folder, "guest_pmem", "raw");
    let body = json!({ "id": "guest", "path_on_host": image });
    if guest.queues == 1 {
        return refuses(guest, path, &body);
    }
    let mut client = guest.client();
    client.ok("PUT", path, &body.to_string());
    guest.shell(
        "until [ -b /dev/pmem1 ]; do usleep 10000; done
        echo kept by the host | dd of=/dev/pmem1 bs=4096 conv=sync,fsync",
    );
    assert!(std::fs::read(&image).unwrap().starts_with(b"kept by the host\n"));
    client.ok("DELETE", path, "");
    guest.shell("while [ -b /dev/pmem1 ]; do usleep 10000; done");
    wait_for(|| !has(guest, "pmem", "id", "guest"));
}

/// A disk is torn away from its driver, and another one comes at once, which the guest must not take for the one before.
pub fn torn_away(guest: &shared::Guest) {
    let path = "/drives/torn";
    let image = disks::image(&guest.folder, "torn", "raw");
    let body = json!({ "drive_id": "torn", "path_on_host": image, "is_root_device": false });
    if guest.queues == 1 {
        return refuses(guest, path, &body);
    }
    let device = "readlink -f $(dirname $(grep -lsx torn /sys/block/vd*/serial))/device/..";
    let one =
        "until [ $(grep -lsx torn /sys/block/vd*/serial | wc -l) = 1 ]; do usleep 10000; done; echo one";
    let mut client = guest.client();
    client.ok("PUT", path, &body.to_string());
    for _ in 0..ROUNDS * times() {
        assert!(guest.shell(one).contains("one"));
        guest.does("torn", &["disk-write"]);
        let device = guest.shell(device);
        client.ok("DELETE", path, r#"{"force": true}"#);
        assert!(!has(guest, "drives", "drive_id", "torn"));
        // A guest of aarch64 is told by nobody. Whoever asks it for the disk's number waits for the disk.
        if !X86_64 {
            guest.shell(&format!("echo 1 >{}/remove", device.trim()));
        }
        client.ok("PUT", path, &body.to_string());
    }
    assert!(guest.shell(one).contains("one"));
    client.ok("DELETE", path, "");
    guest.shell("while grep -lsx torn /sys/block/vd*/serial; do usleep 10000; done");
}

/// A disk that comes takes hardly more exits than one that the guest finds by itself, and one that goes not many more
/// than one that it forgets. The measure is not a rescan that finds nothing, which takes a tenth of that or less: what
/// the guest reads of the disk it has found, and its driver, take the others.
pub fn exits(guest: &shared::Guest) {
    if guest.queues == 1 {
        return;
    }
    let path = "/drives/counted";
    let image = disks::image(&guest.folder, "counted", "raw");
    let body = json!({ "drive_id": "counted", "path_on_host": image, "is_root_device": false }).to_string();
    let mut client = guest.client();
    let statistics = exits::Statistics::of(guest.process.child.id());
    let mut exits = |what: &str, work: &mut dyn FnMut(&mut common::Client) -> String| {
        let exits::Exits { ports, memory, all } = statistics.during(|| drop(work(&mut client)));
        println!("exits: {what}: {ports} for ports, {memory} for registers in memory, {all} in all");
        ports + memory
    };
    let there = "until grep -lsx counted /sys/block/vd*/serial; do usleep 10000; done";
    let gone = "while grep -lsx counted /sys/block/vd*/serial; do usleep 10000; done";
    let rescan = "echo 1 >/sys/bus/pci/rescan";
    let remove =
        "echo 1 >$(readlink -f $(dirname $(grep -lsx counted /sys/block/vd*/serial))/device/..)/remove";
    let nothing = exits("a rescan that finds nothing", &mut |_| guest.shell(rescan));
    let plugged = exits("a disk that comes", &mut |client| {
        client.ok("PUT", path, &body);
        guest.shell(there)
    });
    let forgotten = exits("a disk that is forgotten", &mut |_| guest.shell(remove));
    let found = exits("a rescan that finds it", &mut |_| guest.shell(&format!("{rescan}; {there}")));
    let unplugged = exits("a disk that goes", &mut |client| {
        client.ok("DELETE", path, "");
        wait_for(|| !has(guest, "drives", "drive_id", "counted"));
        guest.shell(gone)
    });
    assert!(nothing > 0 && plugged * 10 <= found * 13, "{plugged}, and {found} for the guest's own way");
    let own = forgotten + ASKING;
    assert!(unplugged * 10 <= own * 13, "{unplugged}, and {own} for the guest's own way and the asking");
    let version = std::fs::read_to_string(asset("version")).unwrap();
    let Bar { comes, goes } = if !X86_64 {
        AARCH64
    } else if version.starts_with("6.1.") {
        LINUX_6_1
    } else {
        LINUX_7_2
    };
    println!("exits: {plugged} of {comes} at most, and {unplugged} of {goes}: Linux {}", version.trim());
    assert!(plugged <= comes && unplugged <= goes, "{plugged} of {comes}, {unplugged} of {goes}");
}

/// The most accesses that a disk may take that comes, and one that goes.
struct Bar {
    comes: u64,
    goes: u64,
}

impl Bar {
    /// A bar 1.3 times as high as what was first measured.
    const fn first(comes: u64, goes: u64) -> Self {
        Self { comes: comes * 13 / 10, goes: goes * 13 / 10 }
    }
}

/// The bars of Debian's kernels of x86_64, of which the later one reads more of a device that it has found. ACPI asks for a
/// disk and hears that it has gone by accesses, too.
const LINUX_6_1: Bar = Bar::first(623, 171);
const LINUX_7_2: Bar = Bar::first(685, 169);
/// The bar of aarch64, whose guest is told and asked by the agent: here on bus 0, as the slots are taken.
const AARCH64: Bar = Bar::first(332, 33);

/// How many accesses it took, when this was first measured, that ACPI asks for a device and hears that it has gone. An
/// agent is asked by vsock, without any.
const ASKING: u64 = if X86_64 { 131 } else { 0 };
