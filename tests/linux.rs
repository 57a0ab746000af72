//! Stock Debian kernels. They need a KVM that runs them and the assets of `scripts/guest` in
//! ALULA_GUEST: `scripts/test` runs these cases on this machine's KVM or in a rig.
//!
//! A boot is what costs time in a rig, so what needs the same devices shares one: a guest does the words
//! that it is given (`boot`), one after the other, and names each before it begins. For a new case add a word
//! to resources/guest-init, and say it in a boot below that has what the word needs.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use alula::config::Config;
use alula::machine::Exit;
use common::disk::Disk;
use common::suspend::{self, Random, Screen, Suspended};
use common::{Ended, Folder, Process, Service, network, run, wait_for};
use serde_json::json;

const X86_64: bool = cfg!(target_arch = "x86_64");
const ARCH: &str = std::env::consts::ARCH;
const KERNELS: &[&str] = if X86_64 { &["vmlinux", "bzImage"] } else { &["Image", "Image.gz", "Image.zst"] };

fn asset(name: &str) -> PathBuf {
    let folder =
        std::env::var_os("ALULA_GUEST").expect("ALULA_GUEST names the folder that scripts/guest made");
    Path::new(&folder).join(name)
}

fn command_line(what: &str) -> String {
    command_line_with(if X86_64 { "reboot=k" } else { "" }, what)
}

fn command_line_with(words: &str, what: &str) -> String {
    format!("console=ttyS0 panic=-1 quiet {words} alula.run={what}")
}

fn boot(kernel: &str, cpus: u32, what: &str) -> Ended {
    boot_with(kernel, cpus, what, &[])
}

fn boot_with(kernel: &str, cpus: u32, what: &str, more: &[&str]) -> Ended {
    let (kernel, initrd) = (asset(kernel), asset("initramfs.cpio"));
    let (cpus, line) = (cpus.to_string(), command_line(what));
    let mut arguments = vec!["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
    arguments.extend(["--cpus", &cpus, "--memory", "256M", "--cmdline", &line]);
    arguments.extend(more);
    run(arguments)
}

fn line_of<'a>(text: &'a str, label: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.trim().strip_prefix(label))
        .unwrap_or_else(|| panic!("no `{label}`: {text}"))
        .trim()
}

/// Boots `kernel`, whose guest does `words` after it has listed its CPUs, which are as they should be.
fn lscpu_shows_the_cpus_given(kernel: &str, cpus: u32, words: &str) -> Ended {
    let ended = boot(kernel, cpus, &format!("lscpu,{words}"));
    let text = &ended.text;
    let version = std::fs::read_to_string(asset("version")).unwrap();
    let said = format!("guest: {ARCH} Linux {}, {cpus} CPUs, 256 MiB", version.trim());
    assert!(text.contains(&said), "{text}");
    assert_eq!(line_of(text, "CPU(s):"), cpus.to_string(), "{text}");
    if X86_64 {
        assert_eq!(line_of(text, "Core(s) per socket:"), cpus.to_string());
        assert_eq!(line_of(text, "Thread(s) per core:"), "1");
        assert_eq!(line_of(text, "Hypervisor vendor:"), "KVM");
        assert!(text.contains("tsc_deadline_timer") && text.contains("kvm-clock"), "{text}");
    }
    ended
}

fn ends(ended: &Ended, code: i32, line: &str) {
    assert_eq!(ended.code, Some(code), "{}", ended.text);
    assert!(ended.text.contains(&format!("alula: the guest {line}")), "{}", ended.text);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_with_one_cpu_knows_what_time_it_is() {
    let ended = lscpu_shows_the_cpus_given(KERNELS[0], 1, "modules,clock");
    ends(&ended, 0, "powered off\n");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (_, rest) = ended.text.split_once("guest: does clock").unwrap();
    let told = rest.lines().find_map(|line| line.trim().parse::<u64>().ok());
    // A power-off lies between the two. Linux takes its clock to be in the middle of a second (rtc_hctosys), so
    // it is ahead by half of one at most.
    assert!(told.is_some_and(|told| told <= now + 1 && now < told + 300), "{now}: {}", ended.text);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn every_kernel_format_boots_with_two_cpus() {
    for kernel in KERNELS {
        let ended = lscpu_shows_the_cpus_given(kernel, 2, "exit=5");
        ends(&ended, 5, "ended with code 5\n");
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_kernel_alone_needs_no_further_option() {
    let initrd = asset("initramfs.cpio");
    let ended = run(["run", asset(KERNELS[0]).to_str().unwrap(), "--initrd", initrd.to_str().unwrap()]);
    ends(&ended, 0, "powered off\n");
    assert!(ended.text.contains("1 CPUs, 128 MiB"), "{}", ended.text);
}

// An arm64 Linux spins when it halts.
#[cfg(target_arch = "x86_64")]
#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_that_halts_has_ended() {
    ends(&boot(KERNELS[0], 2, "halt"), 121, "halted for good: no CPU can wake any more\n");
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn every_way_that_linux_reboots_ends_the_guest() {
    let reset = "alula: the guest asked for a reset";
    // panic=-1: a panic reboots at once. Only x86_64's kernel has a driver for pvpanic.
    let ways: &[_] = match X86_64 {
        true => &[
            ("", "reboot", 120, reset),
            ("", "crash", 120, "alula: the guest panicked and asked for a reset"),
            ("reboot=b", "reboot", 120, reset),
            ("reboot=a", "reboot", 120, reset),
            ("reboot=k", "reboot", 120, reset),
            ("reboot=t", "reboot", 122, "alula: the guest crashed: triple fault"),
        ],
        false => &[
            ("", "reboot", 120, reset),
            ("", "crash", 120, "Kernel panic - not syncing: sysrq triggered crash"),
        ],
    };
    let (kernel, initrd) = (asset(KERNELS[0]), asset("initramfs.cpio"));
    for (words, what, code, said) in ways {
        let line = command_line_with(words, what);
        let arguments = ["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
        // One CPU boots sooner; Linux' own choice has another CPU to stop, too.
        let cpus = if words.is_empty() { "2" } else { "1" };
        let ended = run([&arguments[..], &["--cpus", cpus, "--memory", "256M", "--cmdline", &line]].concat());
        assert_eq!(ended.code, Some(*code), "{what} {words}: {}", ended.text);
        assert!(ended.text.contains(said), "{what} {words}: {}", ended.text);
    }
}

/// A guest's network device.
const MAC: &str = "06:00:ac:10:00:02";

/// Both transports.
const TRANSPORTS: [&[&str]; 2] = [&[], &["--enable-pci"]];

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_uses_disk_network_and_entropy() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let random = TRANSPORTS.map(|transport| {
        let folder = Folder::new();
        let disk = folder.path("disk");
        std::fs::File::create(&disk).unwrap().set_len(32 << 20).unwrap();
        let disk = format!("{},id=data", disk.display());
        let net = "tap=tap0,mac=06:00:ac:10:00:02";
        let metadata = json!({ "name": "web1", "long": "x".repeat(40_000), "more": {} }).to_string();
        let metadata = folder.write("metadata.json", metadata);
        let told = ["--metadata", metadata.to_str().unwrap()];
        let devices = ["--disk", &disk, "--net", net, "--entropy"];
        let Ended { code, text } = boot_with(
            KERNELS[0],
            2,
            "disk-write,network,metadata,entropy",
            &[transport, &devices, &told].concat(),
        );
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("disk: read and written, 65536 sectors"), "{text}");
        assert!(text.contains("network: pinged, 06:00:ac:10:00:02"), "{text}");
        assert!(text.contains("metadata: web1, 40000 bytes, 48 digits, long more/ name"), "{text}");
        assert!(text.contains("virtio_rng.0"), "{text}");

        let disk = format!("{disk},ro");
        let again = boot_with(KERNELS[0], 1, "disk-check", &[transport, &["--disk", &disk]].concat());
        assert_eq!(again.code, Some(0), "{}", again.text);
        assert!(again.text.contains("disk: read and written, 65536 sectors"), "{}", again.text);
        line_of(&text, "0000000").to_owned()
    });
    assert!(random[0].len() > 40 && random[0] != random[1], "{random:?}");
}

/// Sends datagrams to every guest, whether it wants them or not, and takes what is sent, until `over`.
fn traffic(over: &Arc<AtomicBool>) -> [JoinHandle<()>; 2] {
    let host = UdpSocket::bind("172.16.0.1:9").unwrap();
    // To everybody: none of them waits until a guest has said that it has the address.
    host.set_broadcast(true).unwrap();
    host.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let (taker, sender) = (host.try_clone().unwrap(), host);
    let (over, ends) = (over.clone(), over.clone());
    let send = move || {
        while !over.load(Ordering::Relaxed) {
            // A TAP that is full takes no more.
            let _ = sender.send_to(&[0x5a; 1400], "172.16.0.255:9");
            // The buffers that a driver has left to a device last until the next kernel is up.
            std::thread::sleep(Duration::from_millis(40));
        }
    };
    let take = move || {
        while !ends.load(Ordering::Relaxed) {
            // Nothing came for a while.
            let _ = taker.recv(&mut [0; 2048]);
        }
    };
    [std::thread::spawn(send), std::thread::spawn(take)]
}

/// How many times as often drivers go and come back, if that is told.
const TIMES: &str = "ALULA_TEST_TIMES";

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn drivers_and_a_kernel_come_and_go_under_traffic() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let times = std::env::var(TIMES).map_or(1, |times| times.parse().unwrap());
    // Eight times five devices, six times five modules.
    let (rebind, reload) = (vec!["rebind=8"; times], vec!["reload=6"; times]);
    let words = [&["disk-write"], &rebind[..], &["network"], &reload, &["disk-check", "next-kernel"]];
    let over = Arc::new(AtomicBool::new(false));
    let threads = traffic(&over);
    for transport in TRANSPORTS {
        let folder = Folder::new();
        let disk = |name: &str, size: u64| {
            let path = folder.path(name);
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            path
        };
        let (data, big) = (disk("data", 32 << 20), disk("big", 16 << 30));
        let (kernel, initrd) = (asset(KERNELS[0]), asset("initramfs-kexec.cpio"));
        // Grace periods that do not wait, and no memory that is kept for devices' long buffers.
        let more = "rcupdate.rcu_expedited=1 cma=0 log_buf_len=1M";
        let next = "alula.next=fill,disk-check,network,entropy,filled";
        let line = format!("{} {more} {next}", command_line(&words.concat().join(",")));
        let arguments = ["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
        let machine = ["--memory", "256M", "--cmdline", &line, "--entropy"];
        let net = format!("tap=tap0,mac={MAC}");
        let disks = ["--disk", data.to_str().unwrap(), "--disk", big.to_str().unwrap(), "--net", &net];
        let mut guest = Process::start([&arguments[..], &machine, &disks, transport].concat());
        for word in rebind.iter().chain(&reload) {
            let (what, rounds) = word.split_once('=').unwrap();
            // Some rounds at least came while a reader was at work: how many, the machine's speed decides.
            let line = guest.expect(&format!(" of {rounds} times under traffic"));
            let cut = line.trim().strip_prefix(&format!("{what}: ")).and_then(|rest| rest.split(' ').next());
            assert!(cut.is_some_and(|cut| cut != "0"), "{line}");
            assert_eq!(guest.expect("kernel: ").trim(), "kernel: no complaint", "{}", guest.drain());
        }
        guest.expect("guest: does fill");
        let Ended { code, text } = guest.end();
        assert_eq!(code, Some(0), "{text}");
        let again = text.split_once("guest: does next-kernel").unwrap().1;
        for said in
            ["guest: does fill", "disk: read and", "network: pinged", "virtio_rng.0", " 0 bytes changed"]
        {
            assert!(again.contains(said), "no `{said}`: {text}");
        }
        assert_eq!(text.matches("disk: read and written").count(), 3, "{text}");
        assert_eq!(text.matches("network: pinged").count(), 2, "{text}");
        assert!(!text.contains("waits for a reset"), "{text}");
        let mut written = vec![0; 4 << 20];
        std::fs::File::open(&big).unwrap().read_exact(&mut written).unwrap();
        assert!(b"alula\n".iter().cycle().take(written.len()).eq(&written), "the second disk's head changed");
    }
    over.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// What the writers of `alula.run=disk-scatter=write` (resources/guest-init) leave on a disk of 32 MiB.
fn scattered() -> Vec<u8> {
    const PIECE: usize = 64 << 10;
    let mut content = vec![0; 32 << 20];
    for writer in 0..4 {
        let mut state = writer as u64;
        for round in 1..=12 {
            state = (state * 1_103_515_245 + 12345) & 0x7fff_ffff;
            let piece = (state / 65536 % 24) as usize;
            let line = format!("{writer} {piece} {round}\n");
            let bytes: Vec<u8> = line.bytes().cycle().take(PIECE).collect();
            content[(writer * 24 + piece) * PIECE..][..PIECE].copy_from_slice(&bytes);
        }
    }
    content
}

/// An empty qcow2 image of 32 MiB: header, table of reference counts, their one block, table of clusters.
fn qcow2() -> Vec<u8> {
    let mut image = vec![0; 4 << 16];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    for (at, word) in [(4, 3), (20, 16), (36, 1), (56, 1), (96, 4), (100, 104)] {
        put(at, &u32::to_be_bytes(word));
    }
    for (at, long) in [(24, 32 << 20), (40, 3 << 16), (48, 1 << 16), (1 << 16, 2 << 16)] {
        put(at, &u64::to_be_bytes(long));
    }
    put(2 << 16, &[0, 1, 0, 1, 0, 1, 0, 1]);
    image
}

/// What a guest sees of an image.
fn content_of(path: &Path, format: &str) -> Vec<u8> {
    let config = json!({
        "drive_id": "d", "is_root_device": false, "is_read_only": true, "path_on_host": path,
        "format": format,
    });
    let mut disk = Disk::new(config).unwrap();
    (0..32 << 20 >> 16).flat_map(|piece| disk.read(piece << 7, 64 << 10).unwrap()).collect()
}

/// The host checks every byte that the guest wrote; another guest does where `checked` says so.
fn what_four_writers_wrote_is_there_after_a_restart(format: &str, engine: &str, checked: bool) {
    let expected = scattered();
    for (queues, transport) in [(1, TRANSPORTS[0]), (2, TRANSPORTS[1])] {
        let folder = Folder::new();
        let image = if format == "qcow2" { qcow2() } else { Vec::new() };
        let path = folder.write("disk", image);
        if format == "raw" {
            std::fs::File::options().write(true).open(&path).unwrap().set_len(32 << 20).unwrap();
        }
        let disk = format!("{},format={format},engine={engine},queues={queues}", path.display());
        for what in if checked && queues == 1 { &["write", "check"][..] } else { &["write"] } {
            let word = format!("disk-scatter={what}");
            let ended = boot_with(KERNELS[0], 2, &word, &[transport, &["--disk", &disk]].concat());
            assert_eq!(ended.code, Some(0), "{}", ended.text);
            let said = format!("disk: four writers, {what} done, {queues} queues");
            assert!(ended.text.contains(&said) && !ended.text.contains("is not as it was"), "{}", ended.text);
            assert!(!ended.text.contains("instead of Async") || format == "qcow2", "{}", ended.text);
        }
        assert!(content_of(&path, format) == expected, "{format} {engine} {queues}");
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn four_writers_on_a_raw_disk_by_the_sync_engine() {
    what_four_writers_wrote_is_there_after_a_restart("raw", "sync", false);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn four_writers_on_a_raw_disk_by_the_async_engine() {
    what_four_writers_wrote_is_there_after_a_restart("raw", "async", true);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn four_writers_on_a_qcow2_disk_by_the_sync_engine() {
    what_four_writers_wrote_is_there_after_a_restart("qcow2", "sync", true);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn four_writers_on_a_qcow2_disk_by_the_async_engine() {
    what_four_writers_wrote_is_there_after_a_restart("qcow2", "async", false);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn what_a_guest_gives_back_is_free_on_the_host() {
    use std::os::unix::fs::MetadataExt;
    for (format, engine) in [("raw", "async"), ("qcow2", "sync")] {
        let folder = Folder::new();
        let path = folder.write("disk", if format == "qcow2" { qcow2() } else { Vec::new() });
        if format == "raw" {
            std::fs::File::options().write(true).open(&path).unwrap().set_len(32 << 20).unwrap();
        }
        let disk = format!("{},format={format},engine={engine}", path.display());
        let (kernel, initrd) = (asset(KERNELS[0]), asset("initramfs.cpio"));
        let line = command_line("disk-give-back");
        let arguments = ["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
        let machine = ["--cpus", "2", "--memory", "256M", "--disk", &disk, "--cmdline", &line];
        let mut guest = Process::start([&arguments[..], &machine].concat());
        // What the image takes when the guest has done that; the guest goes on with a line.
        let mut taken = |done: &str| {
            let said = guest.expect(done);
            let taken = std::fs::metadata(&path).unwrap().blocks() >> 11;
            guest.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
            (said, taken)
        };
        let (_, filled) = taken("disk: filled");
        assert!(filled >= 16, "{filled} MiB");
        let (_, trimmed) = taken("disk: trimmed");
        assert!(trimmed <= filled - 15, "{trimmed} MiB of {filled}");
        let (text, discarded) = taken("disk: discarded,");
        assert!(line_of(&text, "disk: discarded,") == "0" && discarded == 0, "{discarded} MiB: {text}");
        ends(&guest.end(), 0, "powered off\n");
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_disk_is_swapped_while_the_guest_runs() {
    for transport in TRANSPORTS {
        let mut service = Service::start(transport);
        let mut client = service.client();
        let boot = json!({
            "kernel_image_path": asset(KERNELS[0]),
            "initrd_path": asset("initramfs.cpio"),
            "boot_args": command_line("disk-swap"),
        });
        client.ok("PUT", "/boot-source", &boot.to_string());
        let empty = service.folder.write("empty", "");
        let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": empty });
        client.ok("PUT", "/drives/d", &drive.to_string());
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        service.process.expect("disk: 0 sectors");
        let mut content = b"another image...".to_vec();
        content.resize(1 << 20, 0);
        let other = service.folder.write("other", content);
        client.ok("PATCH", "/drives/d", &json!({ "drive_id": "d", "path_on_host": other }).to_string());
        service.process.expect("disk: now 2048 sectors, another image...");
        let Service { process, folder, .. } = service;
        assert_eq!(process.end().code, Some(0));
        drop(folder);
    }
}

/// What a service says whose guest switches to the root file system on `disk`.
fn switch_root(transport: &[&str], mut drive: serde_json::Value, disk: &Path) -> String {
    let boot = json!({
        "kernel_image_path": asset(KERNELS[0]),
        "initrd_path": asset("initramfs.cpio"),
        "boot_args": command_line("root"),
    });
    for (field, value) in [("drive_id", json!("root")), ("is_root_device", json!(true))] {
        drive[field] = value;
    }
    drive["path_on_host"] = json!(disk);
    let folder = Folder::new();
    let config = json!({
        "boot-source": boot,
        "drives": [drive],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 256 },
    });
    let config = folder.write("config.json", config.to_string());
    let arguments = ["serve", "--no-api", "--config-file", config.to_str().unwrap()];
    let ended = run([&arguments, transport].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    ended.text
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_root_device_is_mounted_as_it_is_configured() {
    let folder = Folder::new();
    let disk = folder.write("root", std::fs::read(asset("root.ext4")).unwrap());
    let text = switch_root(TRANSPORTS[0], json!({}), &disk);
    assert!(text.contains("root: /dev/vda ext4 rw") && text.contains("root: written to"), "{text}");
    let written = std::fs::read(&disk).unwrap();
    let text = switch_root(TRANSPORTS[1], json!({ "is_read_only": true }), &disk);
    assert!(text.contains("root: /dev/vda ext4 ro") && text.contains("root: was written to"), "{text}");
    assert!(!text.contains("root: written to"), "{text}");
    assert!(std::fs::read(&disk).unwrap() == written, "a read-only disk was written to");
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_root_partition_is_found_by_its_partuuid() {
    const SECTOR: usize = 512;
    const START: usize = 2048;
    let root = std::fs::read(asset("root.ext4")).unwrap();
    // An MBR: the disk's signature, then one Linux partition by its first sector and length, no CHS.
    let mut disk = vec![0; START * SECTOR];
    disk[440..444].copy_from_slice(&0x5eed_1234_u32.to_le_bytes());
    let second = 446 + 16;
    disk[second + 4] = 0x83;
    disk[second + 8..second + 12].copy_from_slice(&(START as u32).to_le_bytes());
    disk[second + 12..second + 16].copy_from_slice(&((root.len() / SECTOR) as u32).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(root);
    let folder = Folder::new();
    let disk = folder.write("disk", &disk);
    let text = switch_root(TRANSPORTS[1], json!({ "partuuid": "5eed1234-02" }), &disk);
    assert!(text.contains("root: /dev/vda2 ext4 rw") && text.contains("root: written to"), "{text}");
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn bulk_data_crosses_a_tap_unharmed_in_both_directions() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    // Numbers that do not repeat: a lost, doubled or swapped segment shows.
    let data: Vec<u8> =
        (0..1_u32 << 20).flat_map(|number| number.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
    for transport in TRANSPORTS {
        let [down, up] = [5001, 5002].map(|port| TcpListener::bind(("172.16.0.1", port)).unwrap());
        let (kernel, initrd) = (asset(KERNELS[0]), asset("initramfs.cpio"));
        let line = command_line("bulk");
        let mut arguments = vec!["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
        arguments.extend(["--cpus", "2", "--memory", "256M", "--net", "tap=tap0", "--cmdline", &line]);
        arguments.extend(transport);
        let mut guest = Process::start(arguments);
        network::accept(&down).write_all(&data).unwrap();
        let mut back = Vec::new();
        network::accept(&up).read_to_end(&mut back).unwrap();
        assert!(back == data, "{} bytes came back changed", back.len());
        guest.expect("network: 4194304 bytes came and went");
        assert_eq!(guest.end().code, Some(0));
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn bulk_data_is_unharmed_on_several_queues_while_limits_change() {
    network::enter();
    network::add_interface("tap0", network::TAP | libc::IFF_MULTI_QUEUE);
    common::output("ip", &["addr", "add", "172.16.0.1/24", "dev", "tap0"]);
    common::output("ip", &["link", "set", "tap0", "up"]);
    let data: Vec<u8> =
        (0..1_u32 << 20).flat_map(|number| number.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
    let [down, up] = [5001, 5002].map(|port| TcpListener::bind(("172.16.0.1", port)).unwrap());
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let boot = json!({
        "kernel_image_path": asset(KERNELS[0]),
        "initrd_path": asset("initramfs.cpio"),
        "boot_args": command_line("bulk"),
    });
    client.ok("PUT", "/boot-source", &boot.to_string());
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 256}"#);
    let net = json!({ "iface_id": "n", "host_dev_name": "tap0", "queue_pairs": 2, "threads": 2 });
    client.ok("PUT", "/network-interfaces/n", &net.to_string());
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let mut down = network::accept(&down);
    let sent = data.clone();
    let sender = std::thread::spawn(move || down.write_all(&sent).unwrap());
    let limits = [
        json!({ "rx_rate_limiter": { "bandwidth": { "size": 200_000, "refill_time": 100 } } }),
        json!({ "rx_rate_limiter": { "ops": { "size": 20, "refill_time": 20 } } }),
        json!({ "tx_rate_limiter": { "ops": { "size": 50, "refill_time": 20, "one_time_burst": 100 } } }),
        json!({ "tx_rate_limiter": { "bandwidth": { "size": 400_000, "refill_time": 100 } } }),
    ];
    let none =
        json!({ "bandwidth": { "size": 0, "refill_time": 0 }, "ops": { "size": 0, "refill_time": 0 } });
    let done = json!({ "iface_id": "n", "rx_rate_limiter": none, "tx_rate_limiter": none });
    let mut change = |limit: &serde_json::Value| {
        let mut body = limit.clone();
        body["iface_id"] = json!("n");
        client.ok("PATCH", "/network-interfaces/n", &body.to_string());
        std::thread::sleep(Duration::from_millis(100));
    };
    limits.iter().for_each(&mut change);
    sender.join().unwrap();
    let mut up = network::accept(&up);
    let receiver = std::thread::spawn(move || {
        let mut back = Vec::new();
        up.read_to_end(&mut back).unwrap();
        back
    });
    limits.iter().for_each(&mut change);
    change(&done);
    let back = receiver.join().unwrap();
    assert!(back == data, "{} bytes came back changed", back.len());
    service.process.expect("network: 4194304 bytes came and went");
    let Service { process, folder, .. } = service;
    assert_eq!(process.end().code, Some(0));
    drop(folder);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn an_ordinary_users_guest_has_a_network_by_passt() {
    network::enter();
    network::add_uplink();
    common::open_devices();
    let page = TcpListener::bind("127.0.0.1:8000").unwrap();
    let folder = Folder::new();
    let (kernel, initrd, line) = (asset(KERNELS[0]), asset("initramfs.cpio"), command_line("user-network"));
    let arguments =
        ["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap(), "--memory", "256M"];
    let net = ["--net", "user,loopback", "--publish", "8080:80", "--cmdline", &line];
    let mut guest = Process::spawn(common::as_nobody(&folder, &[&arguments[..], &net].concat()));
    // The address of the host's own uplink.
    guest.expect("user network: 10.9.8.2/24");
    let mut client = network::accept(&page);
    client.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 13\r\n\r\na host's page").unwrap();
    drop(client);
    guest.expect("fetched: a host's page");
    let mut answer = String::new();
    common::wait_for(|| {
        // The guest may not listen yet: then the connection ends at once.
        let mut stream = std::net::TcpStream::connect("127.0.0.1:8080").unwrap();
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        // Debian 12's passt passes on what the guest says only when the client has spoken.
        stream.write_all(b"hello\n").is_ok()
            && std::io::BufReader::new(stream).read_line(&mut answer).is_ok_and(|count| count > 0)
    });
    assert_eq!(answer.trim(), "a guest's answer");
    let ended = guest.end();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_boots_pauses_and_ends_over_the_api() {
    // The kernel complains of CPUs that do nothing for 3 s.
    const STALL: &str = "reboot=k rcupdate.rcu_cpu_stall_timeout=3";
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let boot = json!({
        "kernel_image_path": asset(KERNELS[0]),
        "initrd_path": asset("initramfs.cpio"),
        "boot_args": command_line_with(STALL, "count"),
    });
    client.ok("PUT", "/boot-source", &boot.to_string());
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 200}"#);
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("2 CPUs, 200 MiB");
    service.process.expect("tick 3");
    // An arm64 guest cannot be told that it stood still.
    let pause = Duration::from_millis(if X86_64 { 10_000 } else { 500 });
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    service.process.drain();
    std::thread::sleep(pause);
    assert_eq!(service.process.drain(), "", "a paused guest ticks");
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    let tick = |process: &mut Process| (0..10).for_each(|_| drop(process.expect("tick")));
    tick(&mut service.process);
    service.process.send(libc::SIGSTOP);
    std::thread::sleep(pause);
    service.process.send(libc::SIGCONT);
    service.process.drain();
    tick(&mut service.process);
    if X86_64 {
        client.ok("PUT", "/actions", r#"{"action_type": "SendCtrlAltDel"}"#);
        let Service { process, folder, .. } = service;
        let ended = process.end();
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains("alula: the guest asked for a reset"), "{}", ended.text);
        assert!(!ended.text.contains("rcu: "), "it was not told that it stood still: {}", ended.text);
        drop(folder);
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_that_is_asked_to_shut_down_hears_it() {
    let (kernel, initrd, what, waits, end) = match X86_64 {
        true => {
            (KERNELS[0], "initramfs.cpio", "cad", "waiting for Ctrl-Alt-Del", "the guest asked for a reset")
        }
        // Debian's cloud kernel has no driver for keys on GPIO lines; the one for all machines has.
        false => (
            "Image-full",
            "initramfs-full.cpio",
            "power-key",
            "waiting for the power key",
            "the guest powered off",
        ),
    };
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let boot = json!({
        "kernel_image_path": asset(kernel),
        "initrd_path": asset(initrd),
        "boot_args": command_line(what),
    });
    client.ok("PUT", "/boot-source", &boot.to_string());
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 256}"#);
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect(waits);
    client.ok("PUT", "/actions", r#"{"action_type": "Shutdown"}"#);
    let Service { process, folder, .. } = service;
    let ended = process.end();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains(&format!("alula: {end}")), "{}", ended.text);
    if !X86_64 {
        // EV_KEY, KEY_POWER: 1, then 0.
        let said = ended.text;
        assert!(said.contains("press: 1 116 1 0") && said.contains("release: 1 116 0 0"), "{said}");
    }
    drop(folder);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_goes_on_in_a_machine_built_anew() {
    let mut random = Random::default();
    for (pci, cpus) in [(false, 2), (true, 2)] {
        let folder = Folder::new();
        let disk = folder.write("disk", []);
        std::fs::File::options().write(true).open(&disk).unwrap().set_len(16 << 20).unwrap();
        let config = json!({
            "boot-source": {
                "kernel_image_path": asset(KERNELS[0]),
                "initrd_path": asset("initramfs.cpio"),
                "boot_args": command_line("disk-write,entropy,disk-write,clock,disk-check,exit=5"),
            },
            "machine-config": { "vcpu_count": cpus, "mem_size_mib": 256 },
            "drives": [{ "drive_id": "disk", "path_on_host": disk, "is_root_device": false }],
            "entropy": {},
        });
        let mut config = Config::parse(config.to_string().as_bytes()).unwrap();
        config.pci = pci;
        let screen = Screen::default();
        let mut machine = suspend::boot(&config, &screen);
        // Each time somewhere in what the guest does then: writing, reading, or waiting for a timer.
        for done in ["guest: does disk-write", "guest: does entropy", "guest: does clock"] {
            wait_for(|| screen.text().contains(done) || machine.exit().is_some());
            std::thread::sleep(Duration::from_millis(random.below(300)));
            machine.pause().unwrap();
            if machine.exit().is_none() {
                machine = Suspended::new(machine).go_on(&screen);
            }
        }
        wait_for(|| machine.exit().is_some());
        let text = screen.text();
        assert_eq!(machine.exit(), Some(Exit::Code(5)), "{text}");
        assert_eq!(text.matches("disk: read and written, 32768 sectors").count(), 3, "{text}");
        for complaint in ["rcu:", "stall", "lockup", "BUG", "WARNING"] {
            assert!(!text.contains(complaint), "{complaint}: {text}");
        }
    }
}

#[test]
#[ignore = "a stock kernel on a software KVM: scripts/test runs it where there is one"]
fn a_stock_kernel_on_a_software_kvm_is_told_what_that_kvm_needs() {
    let Ended { code, text } = boot("vmlinux", 1, "poweroff");
    assert_eq!(code, Some(123), "{text}");
    assert!(
        text.contains("alula: the guest could not go on: KVM could not emulate the instruction `"),
        "{text}"
    );
    assert!(text.contains("it runs only kernels built for it; run a stock kernel on a host with"), "{text}");
}
