//! Machines that are saved, dropped, and built again in this process over a copy of their memory: they go on.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod clocks;
#[path = "../common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use alula::bus::{Bus, BusDevice};
use alula::config::Config;
use alula::devices::KINDS;
use alula::error::Result;
use alula::host::Host;
use alula::machine::{Exit, Machine, Prepared, SavedMachine, Shell};
use alula::memory::{self, Range};
use alula::pci::root::{Ecam, Root};
use alula::snapshot::SaveState;
use alula::virtio::pci::Bar;
use alula::virtio::workers::ByHand;
use common::suspend::{Random, Screen, Suspended, boot};
use common::{Folder, driver, network, wait_for};
use serde_json::json;

/// How many machines of each kind are saved at random points of their run, and how many naps are, if that is told.
const POINTS: &str = "ALULA_TEST_SAVES";

/// All cases but those that wait for somebody else.
const NAMED: &str = "case=memory,tables,cpus,timer,serial,exit-register,nobody-there,block,entropy";

/// The disk and the network of the guests, of which one runs at a time.
struct Ground {
    folder: Folder,
    _alone: MutexGuard<'static, ()>,
}

impl Ground {
    fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        network::enter();
        network::add_tap("tap0", "172.16.0.1/24");
        let folder = Folder::new();
        folder.write("disk", vec![0; 1 << 20]);
        Self { folder, _alone: alone }
    }

    fn config(&self, pci: bool, cpus: u16, words: &str) -> Config {
        // What was taken out of the bucket stays out for longer than any test takes.
        let limits = json!({ "ops": { "size": 1_000_000, "refill_time": 1_u64 << 40 } });
        let config = json!({
            "machine-config": { "vcpu_count": cpus, "mem_size_mib": 64 },
            "drives": [{
                "drive_id": "disk",
                "path_on_host": self.folder.path("disk"),
                "is_root_device": false,
                "rate_limiter": limits,
            }],
            "network-interfaces": [{ "iface_id": "net", "host_dev_name": "tap0" }],
            "entropy": {},
        });
        let mut config = Config::parse(config.to_string().as_bytes()).unwrap();
        (config.pci, config.boot_timer) = (pci, true);
        config.firmware_words = Some(format!("booted cpus={cpus} memory=64 {words}"));
        config
    }
}

/// Lets the machine run to its end, and returns what its screen says that it found.
fn end(machine: &Machine, screen: &Screen) -> String {
    wait_for(|| machine.exit().is_some());
    let text = screen.text();
    assert_eq!(machine.exit(), Some(Exit::Code(0)), "{text}");
    let found = text.lines().find(|line| line.ends_with(" cases, 0 failed"));
    found.unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[test]
fn a_guest_goes_on_in_a_machine_built_anew_at_any_point() {
    /// Whether there is a PCI bus, and how many CPUs.
    const KINDS: [(bool, u16); 4] = [(false, 1), (true, 2), (false, 2), (true, 1)];
    let points = std::env::var(POINTS).map_or(1, |points| points.parse::<usize>().unwrap());
    let ground = Ground::new();
    let mut random = Random::default();
    let (mut done, mut generations) = (0, 0);
    for (pci, cpus) in KINDS.into_iter().cycle() {
        // One whose case is named writes to the disk.
        let config = ground.config(pci, cpus, if cpus == 2 { NAMED } else { "" });
        // How long the guest takes by itself, here and now.
        let (screen, begun) = (Screen::default(), Instant::now());
        let expected = end(&boot(&config, &screen), &screen);
        let length = begun.elapsed().as_micros() as u64;
        for _ in 0..points {
            let screen = Screen::default();
            let mut machine = boot(&config, &screen);
            let mut waits = Vec::new();
            loop {
                waits.push(random.below(length));
                std::thread::sleep(Duration::from_micros(waits[waits.len() - 1]));
                machine.pause().unwrap();
                if machine.exit().is_some() {
                    break;
                }
                let suspended = Suspended::new(machine);
                machine = suspended.go_on(&screen);
                generations += 1;
            }
            println!("PCI: {pci}, {cpus} CPUs, saved after {waits:?} of {length} us");
            assert_eq!(end(&machine, &screen), expected, "saved after {waits:?}: {}", screen.text());
            done += 1;
        }
        let all = KINDS.len() * points;
        if done >= all && generations >= all {
            break;
        }
    }
}

/// A machine of two CPUs on which the guest sends back what is typed, saved before anything was.
fn listening(ground: &Ground, pci: bool, screen: &Screen) -> (Config, Suspended) {
    let config = ground.config(pci, 2, "echo case=memory,timer,block,entropy");
    let mut machine = boot(&config, screen);
    wait_for(|| screen.text().contains("alula firmware"));
    machine.pause().unwrap();
    (config, Suspended::new(machine))
}

#[test]
fn what_was_typed_and_not_read_is_read_after_a_restore() {
    let ground = Ground::new();
    for pci in [false, true] {
        let screen = Screen::default();
        let (_, suspended) = listening(&ground, pci, &screen);
        let mut machine = suspended.build(&suspended.bytes, &screen).unwrap();
        assert_eq!(machine.type_on_console(b"typed before the save\n"), 22);
        let suspended = Suspended::new(machine);
        let machine = suspended.go_on(&screen);
        let found = end(&machine, &screen);
        assert!(
            screen.text().contains("typed before the save") && found.starts_with("4 "),
            "{}",
            screen.text()
        );
    }
}

#[test]
fn a_machine_is_restored_on_a_shell_that_was_made_ahead() {
    let ground = Ground::new();
    for pci in [false, true] {
        let screen = Screen::default();
        let (_, suspended) = listening(&ground, pci, &screen);
        for mem_size_mib in [None, Some(64), Some(32)] {
            let shell = Shell::new(Prepared::new().unwrap(), 2, mem_size_mib).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            let screen = Screen::default();
            let mut machine = suspended.build_on(shell, &ground.folder, &screen);
            machine.type_on_console(b"\n");
            machine.resume().unwrap();
            assert!(end(&machine, &screen).starts_with("4 "));
            // A machine that has run can be restored no more.
            machine.pause().unwrap();
            let saved = SavedMachine::from_bytes(&suspended.bytes).unwrap();
            refused(machine.restore(&saved), "it has run already");
        }
    }
}

#[test]
fn what_was_changed_while_the_guest_ran_is_saved() {
    let ground = Ground::new();
    let screen = Screen::default();
    let config = ground.config(true, 1, "echo case=block");
    let mut machine = boot(&config, &screen);
    wait_for(|| screen.text().contains("alula firmware"));
    machine.pause().unwrap();
    let other = ground.folder.write("other", vec![0; 2 << 20]);
    let disk = config.devices().find(|device| device.id() == "disk").unwrap();
    let change = json!({ "drive_id": "disk", "path_on_host": other }).to_string();
    let change = disk.kind().parse_patch("", change.as_bytes()).unwrap();
    let changed = disk.patched(&change).unwrap();
    machine.patch_device(&changed, change.patch(), &mut Host::default()).unwrap();
    machine.detach("network interface `net`").unwrap();
    let saved = SavedMachine::from_bytes(&Suspended::new(machine).bytes).unwrap();
    let told: Vec<_> = saved.config.devices().map(|device| json!(device)).collect();
    assert_eq!((told.len(), &told[0]["path_on_host"]), (2, &json!(other)), "{told:?}");
    assert!(!saved.places.contains_key("network interface `net`"), "{:?}", saved.places);
}

fn refused(result: Result<()>, expected: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn what_is_no_saved_machine_is_refused() {
    let (ground, screen) = (Ground::new(), Screen::default());
    let (_, suspended) = listening(&ground, true, &screen);
    for length in (0..suspended.bytes.len()).step_by(97) {
        refused(SavedMachine::from_bytes(&suspended.bytes[..length]).map(drop), "is damaged");
    }
    refused(SavedMachine::from_bytes(&[&suspended.bytes[..], &[0]].concat()).map(drop), "1 bytes too many");
    refused(SavedMachine::from_bytes(&[&[9], &suspended.bytes[1..]].concat()).map(drop), "has version 9");
}

#[test]
fn a_machine_that_cannot_be_saved_or_restored_says_why() {
    let ground = Ground::new();
    let screen = Screen::default();
    let save = |machine: &mut Machine| machine.save().map(drop);
    let config = ground.config(false, 1, "echo case=memory");
    let mut machine = boot(&config, &screen);
    refused(save(&mut machine), "save the machine: it runs: pause it first");
    wait_for(|| screen.text().contains("alula firmware"));
    machine.pause().unwrap();
    let saved = machine.save().unwrap();
    refused(machine.restore(&saved), "restore the machine: it has run already: build it anew");
    // The machine goes on, for all that.
    machine.resume().unwrap();
    machine.type_on_console(b"\n");
    end(&machine, &screen);
    machine.pause().unwrap();
    refused(save(&mut machine), "save the machine: the guest has ended");
    drop(machine);

    // The state of one machine, and others to be restored from it.
    let (config, suspended) = listening(&ground, true, &screen);
    let saved = SavedMachine::from_bytes(&suspended.bytes).unwrap();
    let into = |config: &Config, places: &alula::machine::Places| {
        let mut host = screen.host();
        let mut machine = Machine::build_at(places, "test", config, &mut host, Prepared::new().unwrap())?;
        machine.restore(&saved)
    };
    let changed = |change: &dyn Fn(&mut Config)| {
        let mut config = config.clone();
        change(&mut config);
        config
    };
    for (other, expected) in [
        (ground.config(true, 1, ""), "the saved machine has 2 CPUs, and this one 1"),
        (changed(&|config| config.machine_config.mem_size_mib = 65), "the saved machine has other memory"),
        (changed(&|config| config.pci = false), "a part that this one lacks: PCI"),
        (changed(&|config| config.boot_timer = false), "a part that this one lacks: boot timer"),
        (changed(&|config| config.remove("disk `disk`")), "a part that this one lacks: disk `disk`"),
    ] {
        refused(into(&other, &alula::machine::Places::new()), expected);
    }
    let disk = |change: serde_json::Value| {
        changed(&|config| {
            let disk = config.devices().find(|device| device.id() == "disk").unwrap();
            let mut told = json!(disk);
            told.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let disk = disk.kind().parse(told.to_string().as_bytes()).unwrap();
            config.put(disk).unwrap();
        })
    };
    for (change, expected) in [
        (json!({ "num_queues": 2 }), "MSI-X vectors"),
        (json!({ "rate_limiter": null }), "other rate limits"),
    ] {
        refused(into(&disk(change), &saved.places), expected);
    }
    // The same parts in other places.
    let swapped = |name: &str| {
        saved.places[match name {
            "disk `disk`" => "entropy device",
            "entropy device" => "disk `disk`",
            other => other,
        }]
    };
    let places = saved.places.keys().map(|name| (name.clone(), swapped(name))).collect();
    refused(into(&config, &places), "disk `disk` was at PCI device");
    into(&config, &saved.places).unwrap();
}

// A GIC forgets a pulse of a line that the guest has not set up; a PIC of a PC does not.
#[cfg(target_arch = "x86_64")]
#[test]
fn an_interrupt_under_way_arrives_before_a_machine_is_saved() {
    /// More than the clock takes, which goes on, and which the saved state ends with.
    const CLOCK: usize = 64;
    let vm = common::driver::vm();
    let line = vm.interrupt(4).unwrap();
    let chips = || {
        let mut state = postcard::to_stdvec(&vm.save().unwrap()).unwrap();
        state.truncate(state.len() - CLOCK);
        state
    };
    let (quiet, before) = (vm.save().unwrap(), chips());
    for round in 0..3000 {
        vm.restore(&quiet).unwrap();
        assert!(chips() == before, "{round}: there is an interrupt already");
        line.write(1).unwrap();
        vm.settle_interrupts().unwrap();
        assert!(chips() != before, "{round}: the interrupt is in no state");
    }
}

#[test]
fn damaged_states_are_refused_or_make_a_machine_that_lives_alone() {
    // Where KVM is emulated, a machine takes half a second.
    const STATES: u64 = if cfg!(target_arch = "aarch64") { 60 } else { 500 };
    const TURN: Duration = Duration::from_millis(20);
    let ground = Ground::new();
    let mut random = Random::default();
    let (mut refused, mut lived) = (0, 0);
    for pci in [false, true] {
        let screen = Screen::default();
        let (_, suspended) = listening(&ground, pci, &screen);
        for number in 0..STATES / 2 {
            let mut bytes = suspended.bytes.clone();
            // A few bytes of one part: of most parts, little is checked, and KVM sees what is in them.
            let at = random.below(bytes.len() as u64);
            for _ in 0..1 + random.below(4) {
                let place = (at + random.below(16)) as usize % bytes.len();
                bytes[place] ^= match number % 3 {
                    0 => 0xff,
                    1 => 1 << random.below(8),
                    _ => random.below(256) as u8,
                };
            }
            let Ok(mut machine) = suspended.build(&bytes, &screen) else {
                refused += 1;
                continue;
            };
            lived += 1;
            machine.type_on_console(b"\n");
            machine.resume().unwrap();
            let begun = Instant::now();
            while machine.exit().is_none() && begun.elapsed() < TURN {
                std::thread::yield_now();
            }
            machine.pause().unwrap();
            // What it has become can be saved, or KVM says why not.
            drop(machine.save());
        }
        // Another machine is as it was.
        let screen = Screen::default();
        let mut machine = suspended.go_on(&screen);
        machine.type_on_console(b"\n");
        end(&machine, &screen);
    }
    println!("{refused} states were refused, {lived} machines lived");
    assert!(refused > 0 && lived > 0);
}

/// Set: this process restores this, and another one counts what that asks of KVM.
const COUNTED: &str = "ALULA_TEST_COUNTED_RESTORE";
/// What the counted process looks for, in vain, right before and right after the restore: marks in its trace.
const MARKS: [&str; 2] = ["/the restore begins", "/the restore is done"];
/// How many functions the counted PCI bus has, each with two interrupt messages.
const FUNCTIONS: u32 = 3;

fn marked(restore: impl FnOnce()) {
    assert!(!std::fs::exists(MARKS[0]).unwrap());
    restore();
    assert!(!std::fs::exists(MARKS[1]).unwrap());
}

/// A PCI bus with its functions, and the loop that their devices live on.
fn bus() -> (Arc<Mutex<Root>>, Vec<Bar>, ByHand, Arc<Bus>) {
    let (mmio, by_hand) = (Arc::<Bus>::default(), ByHand::new().unwrap());
    let memory = memory::allocate(&[Range { start: 0, size: 1 << 20 }]).unwrap();
    let root = Arc::new(Mutex::new(Root::new(driver::vm(), &mmio)));
    let functions = (1..=FUNCTIONS).map(|number| {
        let entropy = KINDS.iter().find(|kind| kind.section == "entropy").unwrap();
        let device = entropy.parse(b"{}").unwrap().open("test", &mut Host::default()).unwrap();
        let (_, function) = driver::function(device, memory.clone(), by_hand.event_loop(), number);
        let registers = function.registers();
        root.lock().unwrap().add(number, Arc::new(Mutex::new(function)), None).unwrap();
        registers
    });
    let functions = functions.collect();
    (root, functions, by_hand, mmio)
}

/// Has every function of the bus send its messages.
fn send(root: &Arc<Mutex<Root>>, functions: &mut [Bar]) {
    const TABLE: u64 = 0x3000;
    let mut ecam = Ecam(root.clone());
    for (number, function) in (1..).zip(functions) {
        for vector in 0..2_u64 {
            let message = [0xfee0_0000, 0, 0x40 + vector as u32, 0];
            for (register, value) in (0..).zip(message) {
                function.write(TABLE + vector * 16 + register * 4, &u32::to_le_bytes(value));
            }
        }
        let config = number << 15;
        let mut byte = |at: u64| {
            let mut byte = [0];
            ecam.read(config + at, &mut byte);
            u64::from(byte[0])
        };
        let mut capability = byte(0x34);
        while byte(capability) != 0x11 {
            capability = byte(capability + 1);
        }
        ecam.write(config + capability + 3, &[0x80]);
    }
}

#[test]
fn what_is_restored_is_counted_by_another_process() {
    match std::env::var(COUNTED).as_deref() {
        Err(_) => {}
        Ok("machine") => {
            let (ground, screen) = (Ground::new(), Screen::default());
            let (_, suspended) = listening(&ground, false, &screen);
            marked(|| drop(suspended.build(&suspended.bytes, &screen).unwrap()));
        }
        Ok("shell") => {
            let (ground, screen) = (Ground::new(), Screen::default());
            let (_, suspended) = listening(&ground, false, &screen);
            let shell = Shell::new(Prepared::new().unwrap(), 2, Some(64)).unwrap();
            marked(|| drop(suspended.build_on(shell, &ground.folder, &screen)));
        }
        Ok(_) => {
            let (root, mut functions, ..) = bus();
            send(&root, &mut functions);
            let saved = root.lock().unwrap().save_state().unwrap();
            drop((root, functions));
            let (root, _functions, _by_hand, _mmio) = bus();
            marked(|| root.lock().unwrap().restore_state(&saved).unwrap());
            assert_eq!(root.lock().unwrap().save_state().unwrap(), saved);
        }
    }
}

/// How often each kind of ioctl is in what a restore asks of KVM.
fn counted_ioctls(what: &str) -> BTreeMap<String, usize> {
    let folder = Folder::new();
    let counted = Command::new("strace")
        .args(["-f", "-qq", "-e", "trace=ioctl,?stat,?newfstatat,?statx", "-o"])
        .arg(folder.path("trace"))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "what_is_restored_is_counted_by_another_process"])
        .env(COUNTED, what)
        .output()
        .unwrap();
    assert!(counted.status.success(), "{}", String::from_utf8_lossy(&counted.stdout));
    let trace = std::fs::read_to_string(folder.path("trace")).unwrap();
    let begun = trace.lines().skip_while(|line| !line.contains(MARKS[0]));
    let between = begun.take_while(|line| !line.contains(MARKS[1]));
    let mut counts = BTreeMap::new();
    for line in between {
        // Of `ioctl(3, KVM_RUN, 0) = 0`, the second argument.
        let name = line.split_once("ioctl(").and_then(|(_, rest)| rest.split([' ', ',', ')']).nth(2));
        name.into_iter().for_each(|name| *counts.entry(name.to_owned()).or_default() += 1);
    }
    counts
}

#[test]
fn a_restore_tells_kvm_once_what_it_takes_once() {
    const CPUS: usize = 2;
    let [machine, shell, bus] = ["machine", "shell", "bus"].map(counted_ioctls);
    println!("machine: {machine:?}\nshell: {shell:?}\nbus: {bus:?}");
    let of = |counts: &BTreeMap<String, usize>, name: &str| counts.get(name).copied().unwrap_or(0);
    assert_eq!(of(&machine, "KVM_CREATE_VCPU"), CPUS, "{machine:?}");
    let x86_64 = cfg!(target_arch = "x86_64");
    assert_eq!(of(&machine, "KVM_SET_CPUID2"), if x86_64 { CPUS } else { 0 }, "{machine:?}");
    // On x86_64 the guest reads the registers of the disk and the entropy device from memory, but on a shell, which KVM
    // takes no further memory for without waiting: there it notes what the guest acknowledges.
    let shown = if x86_64 { 2 } else { 0 };
    assert_eq!(of(&machine, "KVM_SET_USER_MEMORY_REGION"), 1 + shown, "{machine:?}");
    // What a shell has is not made again, and its memory stays where KVM knows it.
    for (made, count) in machine.iter().filter(|(name, _)| name.starts_with("KVM_")) {
        let most = match made.as_str() {
            "KVM_SET_USER_MEMORY_REGION" | "KVM_CREATE_VM" | "KVM_CREATE_VCPU" => 0,
            "KVM_REGISTER_COALESCED_MMIO" => count + shown,
            _ => *count,
        };
        assert!(of(&shell, made) <= most, "{made}: {shell:?}");
    }
    // The shell's CPUs were told what those of the host are.
    assert_eq!(of(&shell, "KVM_SET_CPUID2"), 0, "{shell:?}");
    // With a GICv2 there is no message that KVM knows.
    let tables = of(&bus, "KVM_SET_GSI_ROUTING");
    assert!(tables == 1 || !x86_64 && tables == 0, "{bus:?}");
    assert!(tables == 0 || of(&bus, "KVM_IRQFD") == 2 * FUNCTIONS as usize, "{bus:?}");
}
