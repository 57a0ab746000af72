//! Stock Debian kernels. They need a KVM that runs them and the assets of `scripts/guest` in
//! ALULA_GUEST: `scripts/test` runs these cases on this machine's KVM or in a rig.
//!
//! A boot is what costs time in a rig, so what needs the same devices shares a guest (`shared.rs`), in which each case
//! starts programs. A case that is about a boot, an end, or devices of its own has a guest that does the words it is
//! given (`boot`), one after the other, and names each before it begins. What a guest can do is a word in
//! resources/guest-init, for both.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../common/vhost_user.rs"]
#[allow(dead_code, reason = "what is here for backends that are not honest")]
mod backend;
mod clock;
mod clones;
mod commands;
#[path = "../common/mod.rs"]
mod common;
mod consoles;
#[cfg(target_arch = "aarch64")]
mod cpus;
mod cycles;
#[cfg(target_arch = "x86_64")]
mod differences;
mod disks;
mod exits;
mod faults;
mod growing;
#[path = "../common/hold_back.rs"]
mod hold_back;
mod left;
#[path = "../common/left.rs"]
mod left_behind;
mod live;
mod memory;
mod networks;
mod plugging;
mod shared;
#[cfg(target_arch = "x86_64")]
mod sharing;

use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::disk::Disk;
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
    // The kernel's own tests of its ciphers take a tenth of a boot in a rig.
    format!("console=ttyS0 panic=-1 quiet cryptomgr.notests {words} alula.run={what}")
}

fn boot(kernel: &str, cpus: u32, what: &str) -> Ended {
    boot_with(kernel, cpus, what, &[])
}

fn boot_with(kernel: &str, cpus: u32, what: &str, more: &[&str]) -> Ended {
    let mut guest = start_with(kernel, cpus, what, more);
    guest.stdin = None;
    guest.end()
}

fn start_with(kernel: &str, cpus: u32, what: &str, more: &[&str]) -> Process {
    let (kernel, initrd) = (asset(kernel), asset("initramfs.cpio"));
    let (cpus, line) = (cpus.to_string(), command_line(what));
    let mut arguments = vec!["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
    arguments.extend(["--cpus", &cpus, "--memory", "256M", "--cmdline", &line]);
    arguments.extend(more);
    Process::start(arguments)
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

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_that_leaves_its_watchdog_alone_has_ended() {
    let ended = boot_with(KERNELS[0], 1, "watchdog", &["--watchdog", "poweroff"]);
    assert_eq!(ended.code, Some(124), "{}", ended.text);
    assert!(ended.text.contains("alula: the guest's watchdog expired\n"), "{}", ended.text);
    let driver = if X86_64 { "wdat_wdt" } else { "sp805-wdt" };
    assert!(ended.text.contains(&format!("watchdog: {driver}")), "{}", ended.text);
}

/// A guest's network device.
const MAC: &str = "06:00:ac:10:00:02";

/// Both transports.
const TRANSPORTS: [&[&str]; 2] = [&[], &["--enable-pci"]];

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

/// How many times as often what is repeated is done: once, unless that is told.
fn times() -> usize {
    std::env::var("ALULA_TEST_TIMES").map_or(1, |times| times.parse().unwrap())
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn drivers_and_a_kernel_come_and_go_under_traffic() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let times = times();
    // As often five devices, of which a long series has two hundred, and six times five modules.
    let devices = if times > 1 { "rebind=8" } else { "rebind=5" };
    let (rebind, reload) = (vec![devices; times], vec!["reload=6"; times]);
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

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_boots_pauses_and_ends_over_the_api() {
    // The kernel complains of CPUs that do nothing for 3 s, and its notices are shown.
    const STALL: &str = "reboot=k loglevel=6 rcupdate.rcu_cpu_stall_timeout=3";
    // Debian's cloud kernels have no driver for VMGenID; the one for all machines has it, on x86_64. By device
    // tree, Linux knows it since 6.10.
    let kernel = if X86_64 { "bzImage-full" } else { KERNELS[0] };
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let boot = json!({
        "kernel_image_path": asset(kernel),
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
    let snapshot = Folder::new();
    client.ok("PUT", "/snapshot/create", &json!({ "folder": snapshot.0 }).to_string());
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    let tick = |process: &mut Process| (0..10).for_each(|_| drop(process.expect("tick")));
    tick(&mut service.process);
    service.process.send(libc::SIGSTOP);
    std::thread::sleep(pause);
    service.process.send(libc::SIGCONT);
    service.process.drain();
    tick(&mut service.process);
    // In another process it goes on where it was saved.
    let mut restored = Service::start(&[]);
    let load = json!({ "folder": snapshot.0, "resume_vm": true }).to_string();
    restored.client().ok("PUT", "/snapshot/load", &load);
    let first = restored.process.expect("tick");
    let number = first.trim().rsplit(' ').next().and_then(|word| word.parse::<u32>().ok());
    assert!(number.is_some_and(|number| (4..100).contains(&number)), "{first}");
    tick(&mut restored.process);
    for (service, is_clone) in [(service, false), (restored, true)] {
        if !X86_64 {
            continue;
        }
        service.client().ok("PUT", "/actions", r#"{"action_type": "SendCtrlAltDel"}"#);
        let Service { process, folder, .. } = service;
        let ended = process.end();
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains("alula: the guest asked for a reset"), "{}", ended.text);
        assert!(!ended.text.contains("rcu: "), "it was not told that it stood still: {}", ended.text);
        let reseeded = ended.text.contains("random: crng reseeded due to virtual machine fork");
        assert_eq!(reseeded, is_clone, "{}", ended.text);
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
    // A guest that was reset boots the same kernel in a new machine, and hears it, too.
    client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
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
