//! The firmware guest on real KVM: what it finds, and how it ends.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use common::loopback::BlockDevice;
use common::{Folder, Process, Service, network, run};

const X86_64: bool = cfg!(target_arch = "x86_64");

fn firmware(options: &[&str]) -> common::Ended {
    run([&["run"], options].concat())
}

#[test]
fn it_finds_the_machine_it_was_promised() {
    for (cpus, memory) in [("1", "128M"), ("4", "64M"), ("2", "2M"), ("1", "3M"), ("3", "1G")] {
        let ended = firmware(&["--cpus", cpus, "--memory", memory]);
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains(&format!("cpus: ok ({cpus} started)")), "{}", ended.text);
        for case in ["memory", "tables", "timer", "serial", "exit-register", "nobody-there", "identity"] {
            assert!(ended.text.contains(&format!("\n{case}: ok")), "{}", ended.text);
        }
        assert!(ended.text.contains("8 cases, 0 failed\n"), "{}", ended.text);
        assert!(ended.text.contains("alula: the guest ended with code 0\n"), "{}", ended.text);
    }
}

#[test]
fn the_self_test_checks_devices_alone_and_resets_them() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let folder = Folder::new();
    let disk = folder.write("disk", [0; 4096]);
    let devices = ["--disk", disk.to_str().unwrap(), "--net", "tap=tap0", "--entropy"];
    for transport in TRANSPORTS {
        let ended = firmware(&[&devices[..], transport].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        for said in ["\nblock: ok", "\nnet: ok (a frame of 60 bytes out)", "\nentropy: ok", ", 0 failed\n"] {
            assert!(ended.text.contains(said), "{said}: {}", ended.text);
        }
        // A device that still looked at the rings, which the next one had, would break by them: it looks when
        // the microVM goes on.
        let socket = folder.path("socket");
        let api = ["run", "--cmdline", "end=idle", "--api-sock", socket.to_str().unwrap()];
        let mut process = Process::start([&api[..], &devices[..], transport].concat());
        process.expect(", 0 failed");
        let mut client = common::Client::connect(&socket);
        for state in ["Paused", "Resumed", "Paused", "Resumed"] {
            client.ok("PATCH", "/vm", &format!(r#"{{"state": "{state}"}}"#));
        }
        process.send(libc::SIGTERM);
        let text = process.end().text;
        assert!(!text.contains("waits for a reset"), "{text}");
    }
}

#[test]
fn it_says_what_is_wrong_and_counts_it() {
    let folder = Folder::new();
    let kernel = folder.firmware();
    let ended = firmware(&[kernel.to_str().unwrap(), "--cmdline", "cpus=7 memory=1"]);
    assert_eq!(ended.code, Some(2), "{}", ended.text);
    assert!(ended.text.contains("memory: expected 1 MiB, found 128: FAILED"), "{}", ended.text);
    assert!(ended.text.contains("tables: expected 7 CPUs listed, found 1: FAILED"), "{}", ended.text);
    let ended = firmware(&[kernel.to_str().unwrap(), "--cmdline", "case=none"]);
    assert_eq!(ended.code, Some(1), "{}", ended.text);
    let ended = firmware(&["--cmdline", "case=none"]);
    assert_eq!(ended.code, Some(125), "{}", ended.text);
    assert!(ended.text.contains("does not know `case=none`"), "{}", ended.text);
}

#[test]
fn memory_goes_around_the_gap_below_4_gib() {
    let ended = firmware(&["--memory", "5G", "--cmdline", "case=memory"]);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    // On aarch64 the last two pages are those of the devices that tell a clone that it is one.
    let top = if X86_64 { "0x100000000-0x17fffffff" } else { "0x40000000-0x17fffdfff" };
    assert!(ended.text.contains(top), "{}", ended.text);
}

#[test]
fn guest_memory_has_the_pages_that_were_asked_for() {
    // As the kernel abbreviates the advice to have huge pages, or none (proc(5), smaps).
    for (pages, expected) in [("None", None), ("Transparent", Some("hg")), ("Never", Some("nh"))] {
        let mut service = Service::start(&[]);
        let machine = format!(r#"{{"vcpu_count": 1, "mem_size_mib": 78, "huge_pages": "{pages}"}}"#);
        service.client().ok("PUT", "/machine-config", &machine);
        service.boot_source("case=serial end=idle");
        service.client().ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        service.process.expect("1 cases, 0 failed");
        if !Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            // Such a kernel has no flags to show: the advice is refused, and the guest runs all the same.
            continue;
        }
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", service.process.child.id())).unwrap();
        let mut advised = Vec::new();
        let mut mapping = ("", 0);
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            match words.next().unwrap() {
                "Size:" => mapping.1 = words.next().unwrap().parse().unwrap(),
                "VmFlags:" => advised.extend(
                    words.filter(|flag| ["hg", "nh"].contains(flag)).map(|flag| (mapping.0, mapping.1, flag)),
                ),
                first if first.contains('-') => mapping.0 = first,
                _ => {}
            }
        }
        let of_the_guest: Vec<_> = advised.iter().filter(|(_, kib, _)| *kib >= 78 << 10).collect();
        assert_eq!(of_the_guest.len(), usize::from(expected.is_some()), "{pages}: {advised:?}");
        for (place, kib, flag) in of_the_guest {
            let start = u64::from_str_radix(place.split('-').next().unwrap(), 16).unwrap();
            assert_eq!((start % (2 << 20), *kib, Some(*flag)), (0, 78 << 10, expected), "{pages}");
        }
    }
}

#[test]
fn thirty_two_cpus_are_made_and_listed() {
    let ended = firmware(&["--cpus", "32", "--cmdline", "case=tables,exit-register"]);
    if gic() == Some(2) {
        assert_eq!(ended.code, Some(125), "{}", ended.text);
        assert!(ended.text.contains("32 CPUs (`vcpu_count`, --cpus;"), "{}", ended.text);
        assert!(ended.text.contains("at most 8"), "{}", ended.text);
    } else {
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains("32 CPUs)"), "{}", ended.text);
    }
}

/// The version of Arm's interrupt controller that the rig says its KVM has.
fn gic() -> Option<u8> {
    std::env::var("ALULA_GIC").ok().map(|version| version.parse().unwrap())
}

#[cfg(target_arch = "aarch64")]
#[test]
fn the_interrupt_controller_is_the_one_that_the_host_has() {
    let version = gic().expect("the rig says in ALULA_GIC which it is");
    let cpus = if version == 2 { "8" } else { "9" };
    for transport in TRANSPORTS {
        let ended = firmware(&[transport, &["--cpus", cpus]].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(
            ended.text.contains(&format!("timer: ok (virtual timer by GICv{version},")),
            "{}",
            ended.text
        );
        assert!(ended.text.contains(&format!("cpus: ok ({cpus} started)")), "{}", ended.text);
        let has_frame = version == 2 && !transport.is_empty();
        assert_eq!(ended.text.contains("\nmessages: ok"), has_frame, "{}", ended.text);
    }
}

// Only the local APIC has a limit near there; on aarch64, 32 CPUs are made above.
#[cfg(target_arch = "x86_64")]
#[test]
fn more_than_255_cpus_start() {
    let ended = firmware(&["--cpus", "260", "--cmdline", "case=cpus"]);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains("cpus: ok (260 started)"), "{}", ended.text);
}

#[test]
fn every_end_has_its_exit_code_and_its_line() {
    for (end, code, line) in [
        ("poweroff", 0, "the guest powered off"),
        ("reset", 120, "the guest asked for a reset"),
        ("halt", 121, "the guest halted for good: no CPU can wake any more"),
        ("7", 7, "the guest ended with code 7"),
        ("256", 255, "the guest ended with code 256"),
        ("300", 255, "the guest ended with code 300"),
        match common::is_software_kvm() {
            true => ("fail", 123, "the guest could not go on: KVM"),
            false => ("fail", 101, "the guest ended with code 101"),
        },
        match X86_64 {
            true => ("crash", 122, "the guest crashed: triple fault"),
            false => ("crash", 101, "the guest ended with code 101"),
        },
    ] {
        let ended = firmware(&["--cpus", "2", "--cmdline", &format!("case=cpus end={end}")]);
        assert_eq!(ended.code, Some(code), "{end}: {}", ended.text);
        let line = format!("alula: {line}") + if code == 123 { "" } else { "\n" };
        assert!(ended.text.contains(&line), "{end}: {}", ended.text);
    }
}

#[test]
fn an_instruction_that_kvm_cannot_do_does_not_end_the_guest() {
    let ended = firmware(&["--cmdline", "case=serial,refused"]);
    if common::is_software_kvm() {
        assert_eq!(ended.code, Some(123), "{}", ended.text);
        assert!(ended.text.contains("alula: the guest could not go on: KVM could not"), "{}", ended.text);
        return;
    }
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(
        ended.text.contains("refused: ok (") && ended.text.contains("2 cases, 0 failed"),
        "{}",
        ended.text
    );
    assert!(ended.text.contains("alula: KVM could not"), "{}", ended.text);
}

#[test]
fn a_guest_that_panics_says_so_and_ends_as_it_likes() {
    for (end, code, line) in [
        ("reset", 120, "the guest panicked and asked for a reset"),
        ("poweroff", 0, "the guest powered off"),
        ("7", 7, "the guest ended with code 7"),
    ] {
        let folder = Folder::new();
        let events = folder.path("events");
        let words = format!("case=pvpanic end={end}");
        let ended = firmware(&["--cmdline", &words, "--events", events.to_str().unwrap()]);
        assert_eq!(ended.code, Some(code), "{end}: {}", ended.text);
        assert!(ended.text.contains("pvpanic: ok"), "{end}: {}", ended.text);
        let said = ended.text.lines().filter(|said| *said == "alula: the guest panicked").count();
        assert_eq!(said, 1, "{end}: {}", ended.text);
        let events = std::fs::read_to_string(events).unwrap();
        assert_eq!(events.matches(r#""event":"panicked""#).count(), 1, "{events}");
        assert!(ended.text.contains(&format!("alula: {line}\n")), "{end}: {}", ended.text);
    }
}

#[test]
fn a_guest_that_waits_for_interrupts_has_not_halted_for_good() {
    let mut guest = Process::start(["run", "--cmdline", "case=serial end=idle"]);
    guest.expect("1 cases, 0 failed");
    // Three looks of the monitor at its guest.
    std::thread::sleep(std::time::Duration::from_millis(3500));
    assert!(guest.is_running());
}

#[test]
fn what_is_typed_reaches_the_guest_whole() {
    let mut guest = Process::start(["run", "--cmdline", "case=serial echo"]);
    guest.expect("alula firmware");
    // Much more than the UART holds.
    let text: String = (0..2000).map(|index| char::from(b'a' + (index % 26) as u8)).collect();
    let mut stdin = guest.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    stdin.write_all(b"\n").unwrap();
    guest.expect(&text);
    drop(stdin);
    assert_eq!(guest.end().code, Some(0));
}

#[test]
fn a_guest_looks_at_what_it_filled_when_a_byte_is_typed() {
    let mut guest = Process::start(["run", "--memory", "64M", "--cmdline", "touch=32 case=serial end=7"]);
    guest.expect("filled\n");
    guest.stdin.as_mut().unwrap().write_all(b"y").unwrap();
    let ended = guest.end();
    assert_eq!(ended.code, Some(7), "{}", ended.text);
    assert!(ended.text.contains("yserial: ok"), "{}", ended.text);
    // The first 16 MiB are not filled.
    let ended = firmware(&["--memory", "64M", "--cmdline", "touch=49"]);
    assert_eq!(ended.code, Some(1), "{}", ended.text);
    assert!(ended.text.contains("there is not so much memory"), "{}", ended.text);
}

#[test]
fn what_is_typed_may_come_from_a_file() {
    let folder = Folder::new();
    let typed = "x".repeat(500);
    let file = std::fs::File::open(folder.write("typed", format!("{typed}\n"))).unwrap();
    let output = Command::new(common::alula())
        .args(["run", "--cmdline", "case=serial echo"])
        .stdin(file)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains(&typed), "{text}");
}

#[test]
fn a_guest_that_never_exits_is_paused_and_resumed() {
    let mut service = Service::running("case=serial end=spin");
    service.process.expect("1 cases, 0 failed");
    let mut client = service.client();
    for state in ["Paused", "Resumed", "Paused"] {
        client.ok("PATCH", "/vm", &format!(r#"{{"state": "{state}"}}"#));
    }
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Paused");
}

#[test]
fn a_guest_under_way_is_none_the_worse_for_a_hundred_pauses() {
    let mut service = Service::running("cpus=1 memory=128 end=idle");
    let mut client = service.client();
    for _ in 0..100 {
        client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
        client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    }
    service.process.expect("8 cases, 0 failed");
}

// ELF kernels are x86_64's; aarch64 has one boot protocol, which every other test uses.
#[cfg(target_arch = "x86_64")]
#[test]
fn an_elf_kernel_without_a_pvh_note_boots_by_the_linux_protocol() {
    let folder = Folder::new();
    let mut image = alula::firmware::IMAGE.to_vec();
    let table = u64::from_le_bytes(image[32..40].try_into().unwrap()) as usize;
    let note = (table..).step_by(56).take(8).find(|at| image[*at] == 4).expect("the firmware has a PVH note");
    // PT_NULL
    image[note] = 0;
    let kernel = folder.write("vmlinux", image);
    let ended = firmware(&[kernel.to_str().unwrap(), "--cpus", "2", "--cmdline", "cpus=2 memory=128"]);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains("64-bit Linux boot protocol"), "{}", ended.text);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_kernel_that_says_it_is_linux_boots_by_its_own_protocol() {
    let folder = Folder::new();
    let mut image = alula::firmware::IMAGE.to_vec();
    let u64_in = |image: &[u8], at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
    let table = u64_in(&image, 32) as usize;
    let header =
        (table..).step_by(56).take(8).find(|at| image[*at] == 4).expect("the firmware has a PVH note");
    // The firmware's notes, and one more behind all that the file has: name, description, type.
    let (start, size) = (u64_in(&image, header + 8) as usize, u64_in(&image, header + 32) as usize);
    let mut notes = image[start..start + size].to_vec();
    for word in [6u32, 4, 0x100] {
        notes.extend(word.to_le_bytes());
    }
    notes.extend(b"Linux\0\0\0salt");
    image.resize(image.len().next_multiple_of(8), 0);
    let (offset, size) = (image.len() as u64, notes.len() as u64);
    image[header + 8..header + 16].copy_from_slice(&offset.to_le_bytes());
    image[header + 32..header + 40].copy_from_slice(&size.to_le_bytes());
    image.extend(notes);
    let kernel = folder.write("vmlinux", image);
    let ended = firmware(&[kernel.to_str().unwrap(), "--cpus", "2", "--cmdline", "cpus=2 memory=128"]);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains("64-bit Linux boot protocol"), "{}", ended.text);
}

// FreeBSD and Hermit are such kernels.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_pvh_kernel_with_a_virtual_entry_point_boots() {
    let folder = Folder::new();
    let mut image = alula::firmware::IMAGE.to_vec();
    image[24..32].copy_from_slice(&0xffff_ffff_8020_0000u64.to_le_bytes());
    let kernel = folder.write("vmlinux", image);
    let ended = firmware(&[kernel.to_str().unwrap(), "--cmdline", "cpus=1 memory=128"]);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains("8 cases, 0 failed"), "{}", ended.text);
}

// Only on x86_64 are there KVMs that emulate kernel code, and compilers that must be kept from SSE.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_firmware_uses_no_vector_register() {
    let folder = Folder::new();
    let image = folder.firmware();
    let listing = common::output("objdump", &["-d", image.to_str().unwrap()]).stdout;
    let listing = String::from_utf8(listing).unwrap();
    assert!(listing.contains("iretq") && listing.lines().count() > 500, "the listing is not of the firmware");
    let wrong: Vec<&str> = listing
        .lines()
        .filter(|line| ["xmm", "ymm", "%mm", "%st"].iter().any(|name| line.contains(name)))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A disk image of 1 MiB.
fn disk(folder: &Folder) -> String {
    let disk = folder.path("disk");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    disk.to_str().unwrap().to_owned()
}

/// Both transports.
const TRANSPORTS: [&[&str]; 2] = [&[], &["--enable-pci"]];

#[test]
fn a_disk_and_random_bytes_are_found_and_work() {
    for transport in TRANSPORTS {
        let folder = Folder::new();
        let disk = disk(&folder);
        let ended = firmware(&[transport, &["--disk", &disk, "--entropy", "--cpus", "2"]].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains("\nblock: ok (2048 sectors, only read)"), "{}", ended.text);
        assert!(ended.text.contains("\nentropy: ok (32 bytes, twice)"), "{}", ended.text);
        // A GICv2's message frame is looked at, too.
        let cases = if gic() == Some(2) && !transport.is_empty() { 11 } else { 10 };
        assert!(ended.text.contains(&format!("{cases} cases, 0 failed")), "{}", ended.text);
        let ended = firmware(&[transport, &["--disk", &disk, "--cmdline", "case=block"]].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains("\nblock: ok (2048 sectors)"), "{}", ended.text);
        let written = std::fs::read(&disk).unwrap();
        assert_eq!(&written[512..516], [0x5a, 0x5b, 0x58, 0x59], "sector 1 has what the guest wrote");
    }
}

#[test]
fn a_guest_writes_to_a_block_device() {
    let folder = Folder::new();
    let file = disk(&folder);
    let device = BlockDevice::new(Path::new(&file), 512);
    for words in ["", ",direct", ",engine=async", ",direct,engine=async"] {
        std::fs::write(&file, [0; 1 << 20]).unwrap();
        let disk = format!("{}{words}", device.path.display());
        let ended = firmware(&["--disk", &disk, "--cmdline", "case=block"]);
        assert!(ended.text.contains("\nblock: ok (2048 sectors)"), "{words}: {}", ended.text);
        let written = std::fs::read(&file).unwrap();
        assert_eq!(&written[512..516], [0x5a, 0x5b, 0x58, 0x59], "{words}: it was flushed");
    }
}

#[test]
fn frames_go_out_and_come_in() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    for transport in TRANSPORTS {
        let wire = network::Wire::new("tap0", 0x88b5);
        let net = ["--net", "tap=tap0,mac=06:00:ac:10:00:02", "--cmdline", "case=net"];
        let mut guest = Process::start([&["run"], transport, &net].concat());
        let frame = wire.receive();
        assert_eq!(&frame[..12], b"\xff\xff\xff\xff\xff\xff\x06\x00\xac\x10\x00\x02");
        assert_eq!(&frame[14..19], b"hello");
        let mut answer = frame.clone();
        answer[14..19].copy_from_slice(b"world");
        answer[6..12].copy_from_slice(b"\x02\0\0\0\0\x01");
        wire.send(&answer);
        guest.expect("bytes in)");
        assert_eq!(guest.end().code, Some(0));
    }
}

#[test]
fn loads_are_done_as_they_are_typed() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    for transport in TRANSPORTS {
        let folder = Folder::new();
        let disk = disk(&folder);
        let options = ["--disk", &disk, "--net", "tap=tap0", "--cmdline", "bench"];
        let mut guest = Process::start([&["run"], transport, &options].concat());
        guest.expect("bench: ready");
        let mut stdin = guest.stdin.take().unwrap();
        for (command, answer) in [
            ("read 4096 1 20", "done 20"),
            ("write 4096 85 300", "done 300"),
            ("read 65536 8 50", "done 50"),
            ("send 1514 64 200", "done 200"),
            ("nonsense", "cannot"),
        ] {
            stdin.write_all(format!("{command}\n").as_bytes()).unwrap();
            guest.expect(answer);
        }
        stdin.write_all(b"end\n").unwrap();
        assert_eq!(guest.end().code, Some(0));
        let written = std::fs::read(&disk).unwrap();
        assert_eq!(written.len(), 1 << 20, "a load stays on the disk");
    }
}

#[test]
fn a_hostile_driver_breaks_nothing_but_its_own_device() {
    const LINES_MAX: u64 = 20;
    const PERIOD_S: u64 = 10;
    for (transport, breaches) in TRANSPORTS.into_iter().zip([34, 39]) {
        let folder = Folder::new();
        let disk = disk(&folder);
        let options = ["--disk", &disk, "--entropy", "--cmdline", "case=hostile"];
        let begun = Instant::now();
        let ended = firmware(&[transport, &options].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains(&format!("ok ({breaches} breaches)")), "{}", ended.text);
        assert!(ended.text.contains("disk `disk0` stopped and waits for a reset"), "{}", ended.text);
        let lines = ended.text.lines().filter(|line| line.contains("waits for a reset")).count() as u64;
        let most = (begun.elapsed().as_secs() / PERIOD_S + 1) * LINES_MAX;
        assert!(lines <= most, "log lines that a guest causes are bounded: {lines}, not {most}");
    }
}
