//! A machine inside this process: what it leaves behind, who starts its threads, how it is watched. The
//! tests here count what the process has, so they take turns.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alula::arch::layout;
use alula::bus::{Bus, BusDevice};
use alula::config::Config;
use alula::devices::KINDS;
use alula::host::Host;
use alula::machine::{Machine, Places, Prepared, Shell};
use alula::memory::{self, Range};
use alula::metrics::View;
use alula::pci::root::{Ecam, FunctionRegisters, Root};
use alula::platform::Place;
use alula::poll::EventFd;
use alula::snapshot::{SaveState, Snapshot};
use alula::virtio::pci::NOTIFY;
use alula::virtio::workers::ByHand;

use common::{Folder, driver};

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two CPUs, an entropy device and these disks, for the firmware guest.
fn config(folder: &Folder, pci: bool, words: &str, disks: &[&str]) -> Config {
    let disks: Vec<_> = disks
        .iter()
        .map(|id| {
            let path = folder.write(id, vec![0; 1 << 20]);
            format!(r#"{{"drive_id": "{id}", "path_on_host": {path:?}, "is_root_device": false}}"#)
        })
        .collect();
    let text = format!(
        r#"{{"machine-config": {{"vcpu_count": 2, "mem_size_mib": 64}}, "entropy": {{}}, "drives": [{}]}}"#,
        disks.join(", ")
    );
    let mut config = Config::parse(text.as_bytes()).unwrap();
    config.pci = pci;
    config.firmware_words = Some(words.to_owned());
    config
}

/// A host whose serial console writes to `folder`.
fn host(folder: &Folder) -> Host {
    let mut host = Host::default();
    host.hold_console(Some(&folder.path("console"))).unwrap();
    host
}

fn build(folder: &Folder, config: &Config, places: &Places) -> alula::error::Result<Box<Machine>> {
    Machine::build_at(places, "test", config, &mut host(folder), Prepared::new().unwrap())
}

/// A machine with a disk, loaded with the firmware guest, whose console goes to `folder`.
fn machine(folder: &Folder, pci: bool, words: &str) -> Box<Machine> {
    let config = config(folder, pci, words, &["disk"]);
    let mut machine = build(folder, &config, &Places::new()).unwrap();
    machine.load(&config, &mut host(folder)).unwrap();
    machine
}

fn wait_for_console(folder: &Folder, text: &str) {
    let said = || fs::read_to_string(folder.path("console")).unwrap();
    common::wait_for(|| said().contains(text));
}

fn threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // A thread may end between the two looks.
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    let mut threads: Vec<_> = tasks.filter_map(|task| name(task.unwrap())).collect();
    threads.iter_mut().for_each(|name| name.truncate(name.trim_end().len()));
    threads
}

/// What this process has.
#[derive(Clone, Copy, Debug)]
struct Costs {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    address_space_kib: usize,
}

fn costs() -> Costs {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    Costs {
        descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
        threads: threads().len(),
        mappings: fs::read_to_string("/proc/self/maps").unwrap().lines().count(),
        address_space_kib: size.trim().trim_end_matches(" kB").parse().unwrap(),
    }
}

#[test]
fn machines_that_are_dropped_leave_nothing_behind() {
    let _turn = turn();
    let folder = Folder::new();
    for pci in [false, true] {
        let build_and_drop = |runs: bool| {
            let mut machine = machine(&folder, pci, "case=block,entropy end=idle");
            if runs {
                machine.resume().unwrap();
                wait_for_console(&folder, "2 cases, 0 failed");
            }
            drop(machine);
            fs::remove_file(folder.path("console")).unwrap();
        };
        // The first machines leave what the process keeps for the next ones: the allocator's arenas.
        (0..3).for_each(|_| build_and_drop(true));
        let before = costs();
        (0..100).for_each(|number| build_and_drop(number % 10 == 0));
        let after = costs();
        let what = format!("{before:?} to {after:?} (PCI: {pci})");
        assert_eq!((before.descriptors, before.threads), (after.descriptors, after.threads), "{what}");
        // The allocator and the stacks of threads that ended come and go in mappings of their own, a few of
        // them; a machine has at least its memory, its CPUs and its ring of posted writes.
        assert!(after.mappings < before.mappings + 10, "{what}");
        assert!(after.address_space_kib < before.address_space_kib + (32 << 10), "{what}");
    }
}

/// A shell for two CPUs and this memory, whose threads are where they wait.
fn shell(mem_size_mib: Option<u64>) -> Shell {
    let shell = Shell::new(Prepared::new().unwrap(), 2, mem_size_mib).unwrap();
    // A thread names itself after it has begun.
    let has = |name: &str| threads().iter().filter(|thread| *thread == name).count() == 1;
    common::wait_for(|| ["vcpu0", "vcpu1", "io"].into_iter().all(has));
    shell
}

#[test]
fn machines_are_built_on_shells_that_were_made_ahead() {
    let _turn = turn();
    let folder = Folder::new();
    for pci in [false, true] {
        // Without memory, with that of the machine, and with other memory than the machine is to have.
        for mem_size_mib in [None, Some(64), Some(128)] {
            let shell = shell(mem_size_mib);
            // The threads of the CPUs come to wait at the gate.
            std::thread::sleep(std::time::Duration::from_millis(20));
            let config =
                config(&folder, pci, "booted cpus=2 memory=64 case=cpus,memory,block,entropy", &["disk"]);
            let mut machine = Machine::build("test", &config, &mut host(&folder), shell).unwrap();
            assert_eq!(threads().iter().filter(|name| name.starts_with("vcpu")).count(), 2);
            machine.load(&config, &mut host(&folder)).unwrap();
            machine.resume().unwrap();
            wait_for_console(&folder, "4 cases, 0 failed");
            drop(machine);
            fs::remove_file(folder.path("console")).unwrap();
        }
    }
}

#[test]
fn a_shell_that_no_machine_is_built_on_leaves_nothing_behind() {
    let _turn = turn();
    let folder = Folder::new();
    let config = config(&folder, true, "", &["disk"]);
    let no_place = Places::from([("disk `disk`".to_owned(), Place::Pci(99))]);
    let make_and_drop = |number: usize| {
        let shell = shell([None, Some(64), Some(256)][number % 3]);
        match number % 4 {
            0 | 1 => drop(shell),
            // Nor does one of which the machine came to nothing.
            2 => {
                let built = Machine::build_at(&no_place, "test", &config, &mut host(&folder), shell);
                let error = built.err().unwrap().to_string();
                assert!(error.contains("is taken, or is none"), "{error}");
            }
            _ => {
                let mut config = config.clone();
                config.machine_config.vcpu_count = 1;
                let built = Machine::build("test", &config, &mut host(&folder), shell);
                let error = built.err().unwrap().to_string();
                assert!(error.contains("1 CPUs, and its shell was made for 2"), "{error}");
            }
        }
        // Threads end a moment after they were told to.
        common::wait_for(|| !threads().iter().any(|name| name == "io" || name.starts_with("vcpu")));
    };
    (0..12).for_each(make_and_drop);
    let before = costs();
    (0..48).for_each(make_and_drop);
    common::wait_for(|| costs().threads <= before.threads);
    let after = costs();
    let what = format!("{before:?} to {after:?}");
    assert_eq!((before.descriptors, before.threads), (after.descriptors, after.threads), "{what}");
    assert!(after.mappings < before.mappings + 10, "{what}");
    assert!(after.address_space_kib < before.address_space_kib + (32 << 10), "{what}");
}

#[test]
fn devices_have_their_thread_before_a_cpu_runs() {
    let _turn = turn();
    let folder = Folder::new();
    // This guest looks at no device, so no vCPU has a reason to start a thread for one.
    let mut machine = machine(&folder, true, "case=memory end=idle");
    assert!(!threads().contains(&"io".to_owned()), "{:?}", threads());
    machine.resume().unwrap();
    wait_for_console(&folder, "1 cases, 0 failed");
    // A thread names itself after it has begun.
    common::wait_for(|| threads().contains(&"io".to_owned()));
}

#[test]
fn registers_of_x86_64_are_read_without_an_exit() {
    let _turn = turn();
    let reads = |words: &str| {
        let folder = Folder::new();
        let mut machine = machine(&folder, false, words);
        machine.resume().unwrap();
        wait_for_console(&folder, " cases, 0 failed");
        machine.metrics(View::Total)["vcpu"]["exit_mmio_read"].as_u64().unwrap()
    };
    // Both cases read dozens of them.
    let [without, with] = ["case=memory end=idle", "case=memory,block,entropy end=idle"].map(reads);
    let x86_64 = cfg!(target_arch = "x86_64");
    assert!(with == without || !x86_64 && with > without + 20, "{without} and {with}");
}

#[test]
fn an_idle_guests_devices_are_not_stopped_to_look_at_its_cpus() {
    let _turn = turn();
    let folder = Folder::new();
    // The guest reuses the memory of its rings before it idles: a device that is started again on them
    // finds them broken.
    let mut machine = machine(&folder, false, "case=block,entropy end=idle");
    machine.resume().unwrap();
    wait_for_console(&folder, "2 cases, 0 failed");
    let fails = |machine: &Machine| {
        let metrics = machine.metrics(View::Total);
        ["block_disk", "entropy"].map(|device| metrics[device]["event_fails"].as_u64().unwrap())
    };
    let before = fails(&machine);
    for _ in 0..200 {
        machine.check_halted().unwrap();
        assert_eq!(machine.exit(), None);
        std::thread::yield_now();
    }
    assert_eq!(fails(&machine), before);
}

#[test]
fn a_machine_that_lost_a_disk_keeps_every_other_part_in_place() {
    let _turn = turn();
    let folder = Folder::new();
    for pci in [false, true] {
        let whole = config(&folder, pci, "case=block,entropy", &["a", "b", "c"]);
        let places = build(&folder, &whole, &Places::new()).unwrap().places();
        let left = config(&folder, pci, "case=block,entropy", &["a", "c"]);
        let moved = build(&folder, &left, &Places::new()).unwrap().places();
        assert_ne!(moved["disk `c`"], places["disk `c`"], "places follow the configuration by themselves");
        // A new disk gets the first place that was nobody's: not that of the lost one, which may come back.
        let config = config(&folder, pci, "case=block,entropy", &["a", "d", "c"]);
        let found = build(&folder, &config, &places).unwrap().places();
        let mut expected = places.clone();
        expected.remove("disk `b`");
        let new = found["disk `d`"];
        assert!(places.values().all(|place| *place != new), "{new}");
        expected.insert("disk `d`".to_owned(), new);
        assert_eq!(found, expected);
        // The order of the configuration does not matter then, and a guest finds the devices where they are.
        let config = self::config(&folder, pci, "case=block,entropy", &["c", "b", "a"]);
        let mut machine = build(&folder, &config, &places).unwrap();
        assert_eq!(machine.places(), places);
        machine.load(&config, &mut host(&folder)).unwrap();
        machine.resume().unwrap();
        wait_for_console(&folder, "2 cases, 0 failed");
        fs::remove_file(folder.path("console")).unwrap();
    }
}

#[test]
fn places_that_cannot_be_are_refused() {
    let _turn = turn();
    let folder = Folder::new();
    for pci in [false, true] {
        let config = config(&folder, pci, "", &["a", "b"]);
        let places = build(&folder, &config, &Places::new()).unwrap().places();
        // A place in the table belongs to a device of that name. Some devices are not in every machine.
        let seldom = ["boot timer", "v2m", "CPU slots", "ACPI watchdog", "watchdog"];
        let is_always = |name: &str| !seldom.contains(&name) && (pci || name != "PCI slots");
        for (name, place) in layout::FIXED.iter().filter(|(name, _)| is_always(name)) {
            assert_eq!(places.get(*name), Some(place), "{name}");
        }
        let refused = |name: &str, place: Place, why: &str| {
            let mut places = places.clone();
            places.insert(name.to_owned(), place);
            let error = build(&folder, &config, &places).err().unwrap().to_string();
            assert!(error.contains(why), "{error}");
        };
        let memory = Place::Registers { range: Range { start: 0, size: 0x1000 }, gsi: Some(5) };
        let strange = [
            Place::Pci(32),
            Place::Pci(u32::MAX),
            memory,
            Place::Registers { range: Range { start: u64::MAX, size: u64::MAX }, gsi: Some(u32::MAX) },
        ];
        for place in strange.into_iter().chain([places["disk `b`"], places["serial"]]) {
            refused("disk `a`", place, "is taken, or is none for a device of this machine");
        }
        refused("disk `a`", if pci { Place::Pci(0) } else { Place::Pci(1) }, "PCI device");
        refused("serial", places["exit register"], "serial was at address");
    }
}

/// Whether this process has the file at `path` open.
fn is_open(path: &std::path::Path) -> bool {
    let files = fs::read_dir("/proc/self/fd").unwrap();
    files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|to| to == path))
}

#[test]
fn a_device_that_is_taken_away_leaves_nothing_behind() {
    let _turn = turn();
    let folder = Folder::new();
    for pci in [false, true] {
        let words = "case=block,entropy end=idle";
        let mut config = config(&folder, pci, words, &["disk", "other"]);
        let path = folder.path("other");
        let other = format!(
            r#"{{"drive_id": "other", "path_on_host": {path:?}, "is_root_device": false, "num_queues": 2,
                "threads": 2}}"#
        );
        let [drives, ..] = KINDS else { panic!() };
        let other = drives.parse(other.as_bytes()).unwrap();
        config.put(other.clone()).unwrap();
        let disk = config.devices().next().unwrap().clone();
        let mut machine = build(&folder, &config, &Places::new()).unwrap();
        machine.load(&config, &mut host(&folder)).unwrap();
        let places = machine.places();
        // Devices that were taken away and came back before the guest began work as those that stayed.
        machine.detach("disk `disk`").unwrap();
        machine.attach(&disk, &Places::new(), &mut Host::default()).unwrap();
        assert_eq!(machine.places(), places);
        machine.resume().unwrap();
        wait_for_console(&folder, "2 cases, 0 failed");
        machine.pause().unwrap();
        let mut before = None;
        for _ in 0..20 {
            for device in [&disk, &other] {
                machine.detach(&device.name()).unwrap();
            }
            // Threads make what they need when they begin, and end a moment after they were told to.
            common::wait_for(|| !threads().iter().any(|name| name.starts_with("io-")));
            let before = *before.get_or_insert_with(costs);
            common::wait_for(|| costs().threads <= before.threads);
            let after = costs();
            let what = format!("{before:?} to {after:?} (PCI: {pci})");
            assert_eq!((before.descriptors, before.threads), (after.descriptors, after.threads), "{what}");
            assert!(after.mappings < before.mappings + 10, "{what}");
            assert!(!is_open(&path) && !is_open(&folder.path("disk")), "a detached disk's file is open");
            assert!(!threads().iter().any(|name| name.starts_with("io-")), "{:?}", threads());
            // In the other order: each has the other one's place then, where its registers are not taken.
            machine.attach(&other, &Places::new(), &mut Host::default()).unwrap();
            machine.attach(&disk, &places, &mut Host::default()).unwrap_err();
            machine.attach(&disk, &Places::new(), &mut Host::default()).unwrap();
            machine.detach(&other.name()).unwrap();
            machine.detach(&disk.name()).unwrap();
            machine.attach(&disk, &places, &mut Host::default()).unwrap();
            machine.attach(&other, &places, &mut Host::default()).unwrap();
            machine.resume().unwrap();
            machine.pause().unwrap();
        }
        assert_eq!(machine.places(), places);
        // What cannot be taken away or come twice is refused, and nothing changes.
        for fixed in ["serial", "PCI host bridge", "disk `none`"] {
            machine.detach(fixed).unwrap_err();
        }
        machine.attach(&disk, &Places::new(), &mut Host::default()).unwrap_err();
        machine.resume().unwrap();
        machine.attach(&disk, &Places::new(), &mut Host::default()).unwrap_err();
        assert_eq!(machine.places(), places);
        // Devices can go while the guest runs, and are closed then.
        for device in [&disk, &other] {
            machine.detach(&device.name()).unwrap();
        }
        assert!(!is_open(&path) && !is_open(&folder.path("disk")), "a detached disk's file is open");
        drop(machine);
        fs::remove_file(folder.path("console")).unwrap();
    }
}

#[test]
fn a_pci_function_that_is_removed_is_nowhere_any_more() {
    let _turn = turn();
    let (mmio, by_hand) = (Arc::new(Bus::default()), ByHand::new().unwrap());
    let memory = memory::allocate(&[Range { start: 0, size: 1 << 20 }]).unwrap();
    let root = Arc::new(Mutex::new(Root::new(driver::vm(), &mmio)));
    let mut ecam = Ecam(root.clone());
    let bar = layout::PCI_MEMORY.start;
    let is_there = |ecam: &mut Ecam, config| {
        let (mut id, mut queues) = ([0; 4], [0; 2]);
        ecam.read(config, &mut id);
        mmio.read(bar + 0x12, &mut queues);
        (id != [0xff; 4], queues != [0xff; 2])
    };
    for (device_number, is_torn) in [(3, false), (3, true), (3, true), (4, true), (3, false)] {
        let config = u64::from(device_number << 15);
        let entropy = KINDS.iter().find(|kind| kind.section == "entropy").unwrap();
        let device = entropy.parse(b"{}").unwrap().open("test", &mut Host::default()).unwrap();
        let (_, function) = driver::function(device, memory.clone(), by_hand.event_loop(), device_number);
        let kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap());
        let registers = FunctionRegisters {
            device: Arc::new(Mutex::new(function.registers())),
            kicks: vec![(NOTIFY, kick.clone())],
        };
        root.lock().unwrap().add(device_number, Arc::new(Mutex::new(function)), Some(registers)).unwrap();
        ecam.write(config + 0x10, &bar.to_le_bytes());
        ecam.write(config + 4, &[2, 0]);
        assert_eq!(is_there(&mut ecam, config), (true, true));
        // KVM has the kick: it takes no second one for that address.
        driver::vm().kick_any(&kick, bar + NOTIFY).unwrap_err();
        let remove = if is_torn { Root::tear_away } else { Root::remove };
        remove(&mut root.lock().unwrap(), device_number).unwrap();
        // A driver that waits for the end of its reset finds zeros.
        assert_eq!(is_there(&mut ecam, config), (false, is_torn));
        let mut status = [0xaa];
        mmio.read(bar + 0x14, &mut status);
        assert_eq!(status, if is_torn { [0] } else { [0xff] });
        driver::vm().kick_any(&kick, bar + NOTIFY).unwrap();
        driver::vm().unkick_any(&kick, bar + NOTIFY).unwrap();
        root.lock().unwrap().remove(device_number).unwrap_err();
        assert_eq!(Arc::strong_count(&kick), 1);
        // A machine that is built anew from what was saved now answers such a driver alike.
        let restored_mmio = Arc::new(Bus::default());
        let mut restored = Root::new(driver::vm(), &restored_mmio);
        restored.restore(root.lock().unwrap().save().unwrap()).unwrap();
        restored_mmio.read(bar + 0x14, &mut status);
        assert_eq!(status, if is_torn { [0] } else { [0xff] });
    }
    // Two that lie in one place, and one that lies where no PCI device can be.
    for (remains, expected) in [
        (vec![(1_u32, bar, 16_u64), (2, bar + 8, 16)], "what remains of PCI device 2"),
        (vec![(1, bar - 8, 16)], "no PCI device was there"),
        (vec![(1, bar, 0)], "no PCI device was there"),
        (vec![(32, bar, 16)], "no PCI device was there"),
        (vec![(1, bar, 16); 48], "is damaged"),
    ] {
        let no_functions: &[(u32, &[u8])] = &[];
        let state = postcard::to_allocvec(&(2_u16, 0_u32, no_functions, remains)).unwrap();
        let mmio = Arc::new(Bus::default());
        let error = Root::new(driver::vm(), &mmio).restore_state(&state).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_device_under_change_stands_still_until_that_ends() {
    let _turn = turn();
    let folder = Folder::new();
    for pci in [false, true] {
        let mut config = config(&folder, pci, "bench", &["disk"]);
        config.machine_config.mem_size_mib = 128;
        let mut machine = build(&folder, &config, &Places::new()).unwrap();
        machine.load(&config, &mut host(&folder)).unwrap();
        machine.resume().unwrap();
        wait_for_console(&folder, "bench: ready");
        let mut typed: &[u8] = b"read 4096 1 1000000000\n";
        common::wait_for(|| {
            typed = &typed[machine.type_on_console(typed)..];
            typed.is_empty()
        });
        let reads = |machine: &Machine| machine.metrics(View::Total)["block"]["read_count"].as_u64().unwrap();
        common::wait_for(|| reads(&machine) > 0);
        machine.begin_change("disk `disk`").unwrap().wait();
        let error = machine.begin_change("disk `disk`").err().unwrap().to_string();
        assert!(error.contains("another change of it waits"), "{error}");
        // Whatever becomes of the machine meanwhile.
        machine.pause().unwrap();
        machine.resume().unwrap();
        let before = reads(&machine);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(reads(&machine), before);
        machine.end_change("disk `disk`");
        common::wait_for(|| reads(&machine) > before);
    }
}
