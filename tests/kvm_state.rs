//! What KVM holds of a guest: saved at any moment, given to a machine that was just built, the guest goes on, and
//! KVM says of it what it said before. A state that is not of this kind is an error.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{Cursor, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use alula::arch::{self, layout};
use alula::bus::Bus;
use alula::devices::fixed::Site;
use alula::devices::put_fixed;
use alula::firmware;
use alula::host::Host;
use alula::memory::{self, Memory};
use alula::part::Part;
use alula::platform::{CpuChanges, Platform};
use alula::poll::EventFd;
use alula::vm::exit::{End, Exit};
use alula::vm::gate::Gate;
use alula::vm::state::{VcpuState, VmState};
use alula::vm::vcpu::{Surroundings, Vcpu, register_kick};
use alula::vm::{Prepared, Vm};
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

const MEMORY: u64 = 4 << 20;

/// What a guest has said on its serial console.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A machine of KVM's parts and of devices at fixed places, which keep nothing that the guest here needs again.
struct Guest {
    vcpus: Vec<Vcpu>,
    surroundings: Arc<Surroundings>,
    parts: Vec<Part>,
    platform: Platform,
    vm: Arc<Vm>,
    memory: Memory,
}

/// What is left of a guest that was saved.
struct Saved {
    vm: Vec<u8>,
    vcpus: Vec<u8>,
    memory: Vec<u8>,
}

fn bytes<T: serde::Serialize>(state: &T) -> Vec<u8> {
    postcard::to_stdvec(state).unwrap()
}

impl Guest {
    fn build(cpus: u16, pci: bool, words: &str, console: &Console) -> Self {
        let ranges = layout::memory(MEMORY);
        let memory = memory::allocate(&ranges).unwrap();
        let mut platform = Platform {
            cpus,
            smt: false,
            memory: ranges,
            command_line: words.to_owned(),
            initrd: None,
            random_seed: [0; 32],
            nodes: Vec::new(),
            pci,
            gic: None,
        };
        let mut vm = Vm::new(Prepared::new().unwrap(), &memory.memory()).unwrap();
        let vcpus = vm.create_vcpus(cpus, Default::default()).unwrap();
        vm.complete(&mut platform).unwrap();
        let vm = Arc::new(vm);
        let gate = Arc::new(Gate::default());
        let end = End::new(gate.clone()).unwrap();
        let (mmio, pio, power) = (Arc::default(), Bus::default(), Default::default());
        let surroundings = Surroundings { mmio, pio, gate, end, power };
        let mut host = Host::default();
        host.give_console(Box::new(console.clone()));
        let mut site = Site {
            vm: &vm,
            memory: &memory,
            surroundings: &surroundings,
            host: &mut host,
            serial: None,
            room: &Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            boot_timer: None,
            message_frame: None,
            watchdog: None,
            parts: Vec::new(),
        };
        put_fixed(&mut site).unwrap();
        let parts = site.parts;
        for part in &parts {
            platform.nodes.extend(part.lock().nodes(part.place).into_iter().filter(arch::prints));
        }
        register_kick().unwrap();
        let vcpus = vcpus.into_iter().enumerate().map(|(index, fd)| Vcpu::new(index, fd)).collect();
        Self { vcpus, surroundings: Arc::new(surroundings), parts, platform, vm, memory }
    }

    /// A guest that has not run yet.
    fn boot(cpus: u16, pci: bool, words: &str, console: &Console) -> Self {
        let mut guest = Self::build(cpus, pci, words, console);
        let mut kernel = Cursor::new(firmware::IMAGE);
        let memory = guest.memory.memory();
        let initrd = None::<&mut std::fs::File>;
        let entry = arch::load(&memory, &mut kernel, initrd, &mut guest.platform).unwrap();
        let stopped: Vec<_> = guest.vcpus.iter().map(Vcpu::stopped).collect();
        guest
            .vm
            .with_cpu_model(|model| model.apply(&stopped, guest.platform.smt, &CpuChanges::default()))
            .unwrap();
        arch::boot(&stopped, &entry).unwrap();
        drop(stopped);
        guest.parts.iter().for_each(|part| part.lock().begin().unwrap());
        guest
    }

    fn resume(&mut self) {
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            vcpu.start(index, &self.surroundings).unwrap();
        }
        self.surroundings.gate.open();
    }

    fn pause(&self) {
        self.surroundings.gate.close();
        self.vcpus.iter().for_each(Vcpu::kick);
        self.vcpus.iter().for_each(|vcpu| drop(vcpu.stopped()));
    }

    fn run_for(&mut self, time: Duration) {
        self.resume();
        std::thread::sleep(time);
        self.pause();
    }

    fn states(&self) -> (VmState, Vec<VcpuState>) {
        self.vm.settle_interrupts().unwrap();
        (self.vm.save().unwrap(), self.vm.save_vcpus(&self.vcpus).unwrap())
    }

    fn save(&self) -> Saved {
        let (vm, vcpus) = self.states();
        let mut memory = vec![0; MEMORY as usize];
        self.memory.memory().read_slice(&mut memory, self.memory_start()).unwrap();
        Saved { vm: bytes(&vm), vcpus: bytes(&vcpus), memory }
    }

    fn memory_start(&self) -> GuestAddress {
        self.memory.memory().iter().next().unwrap().start_addr()
    }

    /// A machine with that guest, which has not gone on yet.
    fn restore(cpus: u16, pci: bool, saved: &Saved, console: &Console) -> Self {
        let guest = Self::build(cpus, pci, "", console);
        guest.memory.memory().write_slice(&saved.memory, guest.memory_start()).unwrap();
        guest.vm.restore(&postcard::from_bytes(&saved.vm).unwrap()).unwrap();
        let vcpus: Vec<VcpuState> = postcard::from_bytes(&saved.vcpus).unwrap();
        guest.vm.restore_vcpus(&guest.vcpus, &vcpus).unwrap();
        guest
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.surroundings.gate.remove();
        self.vcpus.iter().for_each(Vcpu::kick);
        self.vcpus.iter_mut().for_each(Vcpu::join);
    }
}

/// What is compared of what KVM says of the machine and of each CPU: not what goes on by itself, which are the
/// counters of time and how they relate to the host's.
fn comparable((vm, vcpus): (VmState, Vec<VcpuState>)) -> Vec<Value> {
    const TSC: u64 = 0x10;
    // The virtual counter, and the register that says whether it has reached its timer's value.
    const COUNTER: u64 = 0x6030_0000_0013_df1a;
    const TIMER_CONTROL: u64 = 0x6030_0000_0013_df19;
    const PROPBASER: u64 = 0x180;
    const CBASER: u64 = 0x1800_0000_0000_0000;
    let mut all: Vec<_> = vcpus.iter().map(|vcpu| serde_json::to_value(vcpu).unwrap()).collect();
    all.push(serde_json::to_value(vm).unwrap());
    for state in &mut all {
        let state = state.as_object_mut().unwrap();
        state.remove("clock");
        state.remove("tsc_offset");
        if let Some(Value::Array(msrs)) = state.get_mut("msrs") {
            msrs.retain(|msr| msr[0] != TSC);
        }
        if let Some(Value::Array(registers)) = state.get_mut("registers")
            && cfg!(target_arch = "aarch64")
        {
            registers.retain(|register| register[0] != COUNTER && register[0] != TIMER_CONTROL);
        }
        // GICR_PROPBASER and GITS_CBASER read 0 until somebody has written them; then they have KVM's own idea
        // of caches.
        for (list, unset) in [("registers", PROPBASER), ("its", CBASER)] {
            if let Some(Value::Array(registers)) = state.get_mut("gic").map(|gic| &mut gic[list]) {
                registers.iter_mut().filter(|value| **value == unset).for_each(|value| *value = 0.into());
            }
        }
        // The local APIC's timer has some time left; the processor's priority follows from the task's priority and
        // the interrupts in service, which are compared (Intel SDM, volume 3, 12.8.3.1): KVM works it out when it needs it, and
        // at each restore.
        if let Some(Value::Array(lapic)) = state.get_mut("lapic") {
            lapic[0x390..0x394].fill(0.into());
            lapic[0xa0..0xa4].fill(0.into());
        }
    }
    all
}

/// Where two states differ, which are lists at most places.
fn differences(before: &Value, after: &Value) -> Vec<String> {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            let names = before.keys().filter(|name| before[*name] != after[*name]);
            let inner = |name: &String| (name.clone(), differences(&before[name], &after[name]));
            names.map(inner).map(|(name, inner)| format!("{name}: {inner:?}")).collect()
        }
        (Value::Array(before), Value::Array(after)) if before.len() == after.len() => {
            let pairs = before.iter().zip(after).enumerate().filter(|(_, (before, after))| before != after);
            pairs.map(|(index, (before, after))| format!("[{index}] {before} became {after}")).collect()
        }
        _ => vec![format!("{before} became {after}")],
    }
}

/// How long a guest runs before it is saved.
const SLICE: Duration = Duration::from_micros(200);

/// A guest that moves to another machine again and again, after a little more time each, ends as it would have.
fn move_about(cpus: u16, pci: bool) {
    let console = Console::default();
    let mut guest = Guest::boot(cpus, pci, "case=memory,tables,cpus,timer end=42", &console);
    let (mut moves, mut slice) = (0, SLICE);
    loop {
        guest.run_for(slice);
        slice = slice * 5 / 4;
        if guest.surroundings.end.get().is_some() {
            break;
        }
        let (saved, before) = (guest.save(), comparable(guest.states()));
        drop(guest);
        guest = Guest::restore(cpus, pci, &saved, &console);
        let after = comparable(guest.states());
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            assert!(before == after, "move {moves}, {index}: {:?}", differences(before, after));
        }
        moves += 1;
    }
    let said = String::from_utf8(console.0.lock().unwrap().clone()).unwrap();
    assert_eq!(guest.surroundings.end.get(), Some(&Exit::Code(42)), "after {moves} moves: {said}");
    assert!(said.contains("4 cases, 0 failed"), "{said}");
    assert!(moves >= 3, "it moved {moves} times");
}

#[test]
fn a_guest_that_moves_again_and_again_ends_as_it_would_have() {
    move_about(1, false);
    // On aarch64 the PCI bus brings the ITS of a GICv3.
    move_about(2, true);
}

/// Lists of a CPU's state, changes that KVM cannot take, and what of each the error says.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::type_complexity, reason = "a table")]
const LIES: [(&str, fn(&mut Vec<Value>), &str); 6] = [
    ("xsave", |words| words.push(0.into()), "its saved FPU registers have "),
    ("xsave", |words| drop(words.pop()), "its saved FPU registers have "),
    ("msrs", |msrs| msrs.insert(1, json!([0xdead_beef_u32, 5])), "specific register 0xdeadbeef to 0x5"),
    ("msrs", |msrs| msrs.resize(1025, json!([16, 5])), "a list has more than 1024 entries"),
    ("cpuid", |entries| entries.resize(257, entries[0].clone()), "a list has more than 256 entries"),
    ("mp_state", |bytes| bytes[0] = 99.into(), "set the run state: "),
];

#[cfg(target_arch = "aarch64")]
#[allow(clippy::type_complexity, reason = "a table")]
const LIES: [(&str, fn(&mut Vec<Value>), &str); 5] = [
    (
        "registers",
        |all| all.insert(1, json!([UNKNOWN, vec![0; 8]])),
        "set the register 0x603000000013dead to",
    ),
    ("registers", |all| all[0][1] = json!(vec![0; 7]), "has a saved value of 7 bytes"),
    ("registers", |all| all.resize(501, all[0].clone()), "a list has more than 500 entries"),
    (
        "features",
        |words| words[0] = 0.into(),
        "the host's processor must be like that of the host that saved",
    ),
    (
        "features",
        |words| words[6] = 1.into(),
        "the host's processor must be like that of the host that saved",
    ),
];
/// A system register that there is not.
#[cfg(target_arch = "aarch64")]
const UNKNOWN: u64 = 0x6030_0000_0013_dead;

/// A guest with two CPUs that has run a little.
fn saved() -> Saved {
    let mut guest = Guest::boot(2, false, "case=cpus end=idle", &Console::default());
    guest.run_for(Duration::from_millis(2));
    guest.save()
}

/// What a machine says of these states of its CPUs.
fn refusal(vcpus: &[Value]) -> String {
    let guest = Guest::build(2, false, "", &Console::default());
    let decoded: Result<Vec<VcpuState>, _> =
        vcpus.iter().map(|vcpu| serde_json::from_value(vcpu.clone())).collect();
    match decoded {
        Ok(vcpus) => guest.vm.restore_vcpus(&guest.vcpus, &vcpus).unwrap_err().to_string(),
        // What would take much memory is refused where it is read.
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_state_that_kvm_does_not_take_whole_is_refused_by_name() {
    let vcpus: Vec<VcpuState> = postcard::from_bytes(&saved().vcpus).unwrap();
    let vcpus: Vec<_> = vcpus.iter().map(|vcpu| serde_json::to_value(vcpu).unwrap()).collect();
    assert_eq!(refusal(&vcpus[..1]), "the saved state has 1 CPUs, this machine has 2");
    for (list, change, expected) in LIES {
        let mut vcpus = vcpus.clone();
        change(vcpus[1][list].as_array_mut().unwrap());
        let error = refusal(&vcpus);
        let is_placed = error.starts_with("restore CPU 1: ") || expected.starts_with("a list has more");
        assert!(is_placed && error.contains(expected), "{list}: {error}");
    }
}

#[test]
fn a_damaged_state_is_an_error_or_a_guest_that_dies_alone() {
    let saved = saved();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    let mut refused = 0;
    for round in 0..100 {
        let mut vcpus = saved.vcpus.clone();
        let mut vm = saved.vm.clone();
        let bytes = if round % 4 == 0 { &mut vm } else { &mut vcpus };
        let count = bytes.len();
        match next(8) {
            0 => bytes.truncate(next(count)),
            _ => (0..1 + next(3)).for_each(|_| bytes[next(count)] ^= 1 << next(8)),
        }
        let guest = &mut Guest::build(2, false, "", &Console::default());
        guest.memory.memory().write_slice(&saved.memory, guest.memory_start()).unwrap();
        let restored = postcard::from_bytes(&vm).is_ok_and(|vm| guest.vm.restore(&vm).is_ok())
            && postcard::from_bytes::<Vec<VcpuState>>(&vcpus)
                .is_ok_and(|vcpus| guest.vm.restore_vcpus(&guest.vcpus, &vcpus).is_ok());
        match restored {
            true => guest.run_for(SLICE),
            false => refused += 1,
        }
    }
    assert!((1..100).contains(&refused), "{refused} of 100 were refused");
}
