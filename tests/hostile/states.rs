//! State files that somebody has changed, with checksums that fit: each is refused, or makes a guest that runs or dies
//! alone. All of it happens in this process, by the same bytes in every run.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use alula::carry::state_file::{self, Origin, Section};
use alula::carry::stored::Location;
use alula::config::Config;
use alula::error::{Error, Result};
use alula::machine::{RunState, SavedMachine};
use alula::microvm::Microvm;
use alula::microvm::snapshots::Load;

use serde::{Deserialize, Serialize};

use super::Snapshot;
use super::common::{Service, allocator};

/// How many states are tried, if that is told.
const STATES: &str = "ALULA_TEST_STATES";
/// What a load may allocate beside the guest's memory, in bytes.
const ALLOCATED_MAX: i64 = 64 << 20;
/// How often a load that seems to allocate more is looked at again.
const TRIES: usize = 5;
/// How long a guest runs that nobody has refused.
const TURN: Duration = Duration::from_millis(3);
/// Far more than a load takes.
const PATIENCE: Duration = Duration::from_secs(60);
const MACHINE: u16 = 1;
/// All bits of a virtio device's status that its driver sets, and the only feature that each must have.
const ACKNOWLEDGE_TO_DRIVER_OK: u32 = 15;
const VERSION_1: u64 = 1 << 32;
/// The change after which a state is refused, whatever it was.
const OUTSIDE: &str = "a queue outside memory";

/// The same numbers in every run (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end.max(1)
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// A snapshot, taken apart.
struct Base {
    snapshot: Snapshot,
    file: Vec<u8>,
    origin: Origin,
    sections: Vec<Section>,
}

impl Base {
    fn new(extra: &[&str]) -> Self {
        let snapshot = Snapshot::new(extra);
        let path = snapshot.path("state");
        let (origin, sections) = state_file::read(&File::open(&path).unwrap(), true).unwrap();
        Self { file: fs::read(path).unwrap(), snapshot, origin, sections }
    }

    fn machine(&self) -> &[u8] {
        &self.sections.iter().find(|section| section.kind == MACHINE).unwrap().bytes
    }

    fn saved(&self) -> SavedMachine {
        SavedMachine::from_bytes(self.machine()).unwrap()
    }

    /// The file with these bytes as its machine.
    fn with_machine(&self, bytes: Vec<u8>) -> Vec<u8> {
        let mut sections = self.sections.clone();
        sections.iter_mut().filter(|section| section.kind == MACHINE).for_each(|section| {
            section.bytes.clone_from(&bytes);
        });
        state_file::write(&self.origin, &sections)
    }

    fn with_saved(&self, saved: &SavedMachine) -> Vec<u8> {
        self.with_machine(saved.to_bytes().unwrap())
    }

    /// Loads the snapshot with `state` as its state. A guest that comes of it runs for a moment.
    fn load(&self, state: &[u8]) -> Result<()> {
        let location =
            Location::Files { state: self.snapshot.path("changed"), memory: self.snapshot.path("memory") };
        fs::write(location.state(), state).unwrap();
        let own = Config::parse(br#"{"serial": {"serial_out_path": "/dev/null"}}"#).unwrap();
        let mut microvm = Microvm::new("hostile".to_owned(), own);
        microvm.load_snapshot(&Load::new(location), "test")?;
        let begun = Instant::now();
        microvm.machine().unwrap().type_on_console(b"\n");
        while microvm.machine().unwrap().exit().is_none() && begun.elapsed() < TURN {
            std::thread::yield_now();
        }
        if microvm.machine().unwrap().exit().is_none() && microvm.state() == Some(RunState::Running) {
            microvm.machine().unwrap().pause()?;
            // What it has become can be saved, or KVM says why not.
            drop(microvm.machine().unwrap().save());
        }
        Ok(())
    }
}

/// Changes bytes: bits, other bytes, numbers as large as can be, pieces that are gone, or come twice.
fn damage(bytes: &mut Vec<u8>, numbers: &mut Numbers) {
    /// 64 bits of ones, and what lies beyond 32 bits, as postcard writes numbers.
    const LARGE: [&[u8]; 4] = [
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
        &[0x80, 0x80, 0x80, 0x80, 0x40],
        &[0xff, 0xff, 0xff, 0xff, 0x0f],
        &[0xff, 0xff, 3],
    ];
    let at = numbers.below(bytes.len());
    let end = (at + 1 + numbers.below(24)).min(bytes.len());
    match numbers.below(6) {
        _ if bytes.is_empty() => bytes.push(1),
        0 => bytes[at] ^= 1 << numbers.below(8),
        1 => bytes[at..end].fill_with(|| numbers.below(256) as u8),
        2 => {
            // In the place of one number.
            let last = (at..bytes.len()).find(|index| bytes[*index] < 0x80).unwrap_or(at);
            bytes.splice(at..=last, numbers.of(&LARGE).iter().copied());
        }
        3 => drop(bytes.drain(at..end)),
        4 => {
            let piece = bytes[at..end].to_vec();
            let place = numbers.below(bytes.len() - piece.len() + 1);
            bytes[place..place + piece.len()].copy_from_slice(&piece);
        }
        _ => bytes.truncate(at),
    }
}

/// A virtio device as it is saved, and what is not looked at here behind it: what its driver has accepted, and where its
/// queues are.
#[derive(Deserialize, Serialize)]
struct Device {
    version: u16,
    status: u32,
    selected: [u32; 2],
    features: u64,
    queue_select: u32,
    queues: Vec<Queue>,
    config_generation: u32,
    interrupt_status: u32,
    /// The numbers of the vectors for changes of the configuration, and for each queue; none with a line.
    vectors: Vec<u16>,
    device: Vec<u8>,
}

#[derive(Deserialize, Serialize)]
struct Queue {
    size: u16,
    ready: bool,
    /// Of descriptors, available ring and used ring.
    places: [u64; 3],
    next: [u16; 2],
}

impl Device {
    /// The virtio devices among the parts, by their names.
    fn all(saved: &SavedMachine) -> Vec<(String, Self)> {
        let devices = saved.config.devices().map(|device| device.name());
        let read = |name: String| {
            let (device, rest) = postcard::take_from_bytes(saved.parts.get(&name)?).ok()?;
            rest.is_empty().then_some((name, device))
        };
        devices.filter_map(read).collect()
    }

    /// Changes one whose driver is ready, as far as it says.
    fn change(base: &Base, numbers: &mut Numbers, change: impl Fn(&mut Self, &mut Numbers)) -> Vec<u8> {
        let mut saved = base.saved();
        let mut devices = Self::all(&saved);
        assert!(devices.len() >= 4, "the form of saved devices is not what is known of it here");
        let (name, mut device) = devices.swap_remove(numbers.below(devices.len()));
        (device.status, device.features) = (ACKNOWLEDGE_TO_DRIVER_OK, VERSION_1);
        change(&mut device, numbers);
        saved.parts.insert(name, postcard::to_stdvec(&device).unwrap());
        base.with_saved(&saved)
    }
}

/// Gives all vectors of all PCI functions one message.
fn share_message(bus: &mut Vec<u8>, numbers: &mut Numbers) {
    type Functions = (u16, u32, Vec<(u32, Vec<u8>)>);
    /// Version, configuration space, whether MSI-X is on and masked, and the vectors with what waits.
    type Function = (u16, Vec<u8>, bool, bool, Vec<([u32; 4], bool)>);
    let (mut functions, rest): (Functions, _) = postcard::take_from_bytes(bus).unwrap();
    let rest = rest.to_vec();
    let message = [*numbers.of(&[0xfee0_0000, 0x0808_0040, 0]), 0, 0x41, 0];
    let mut shared = 0;
    for (_, bytes) in &mut functions.2 {
        // The bridge has no vectors.
        let Ok((function, rest)) = postcard::take_from_bytes::<Function>(bytes) else { continue };
        let (version, space, _, _, vectors) = function;
        shared += vectors.len();
        let vectors = vectors.iter().map(|_| (message, numbers.below(2) == 0)).collect();
        let changed: Function = (version, space, true, false, vectors);
        *bytes = [postcard::to_stdvec(&changed).unwrap(), rest.to_vec()].concat();
    }
    assert!(shared >= 8, "the form of saved functions is not what is known of it here");
    *bus = [postcard::to_stdvec(&functions).unwrap(), rest].concat();
}

/// Makes a state file of a base, with another machine's at hand.
type Change = fn(&Base, &Base, &mut Numbers) -> Vec<u8>;

/// The kinds of changes.
const CHANGES: [(&str, Change); 12] = [
    ("the file", |base, _, numbers| {
        let mut file = base.file.clone();
        damage(&mut file, numbers);
        file
    }),
    ("the header and its checksum", |base, _, numbers| {
        let mut origin = base.origin;
        match numbers.below(2) {
            0 => origin.architecture ^= 1 << numbers.below(16),
            _ => origin.boot_id[numbers.below(16)] ^= 1 << numbers.below(8),
        }
        state_file::write(&origin, &base.sections)
    }),
    ("sections", |base, other, numbers| {
        let mut sections = base.sections.clone();
        let (one, two) = (numbers.below(sections.len()), numbers.below(sections.len()));
        match numbers.below(6) {
            0 => drop(sections.remove(one)),
            1 => sections.swap(one, two),
            2 => sections[one].kind = numbers.below(5) as u16,
            3 => sections[one].version ^= 1 << numbers.below(16),
            4 => sections.insert(two, sections[one].clone()),
            _ => sections[one] = other.sections[two].clone(),
        }
        state_file::write(&base.origin, &sections)
    }),
    ("a section's bytes", |base, _, numbers| {
        let mut sections = base.sections.clone();
        let one = numbers.below(sections.len());
        damage(&mut sections[one].bytes, numbers);
        state_file::write(&base.origin, &sections)
    }),
    ("the machine's bytes", |base, _, numbers| {
        let mut machine = base.machine().to_vec();
        (0..=numbers.below(3)).for_each(|_| damage(&mut machine, numbers));
        base.with_machine(machine)
    }),
    ("bits of the CPUs and chips", |base, _, numbers| {
        let mut machine = base.machine().to_vec();
        for _ in 0..=numbers.below(8) {
            let at = numbers.below(machine.len());
            machine[at] ^= 1 << numbers.below(8);
        }
        base.with_machine(machine)
    }),
    ("a part's bytes", |base, _, numbers| {
        let mut saved = base.saved();
        let count = saved.parts.len();
        for _ in 0..=numbers.below(3) {
            let part = saved.parts.values_mut().nth(numbers.below(count)).unwrap();
            damage(part, numbers);
        }
        base.with_saved(&saved)
    }),
    ("whole parts", |base, other, numbers| {
        let (mut saved, others) = (base.saved(), other.saved().parts);
        let names: Vec<String> = saved.parts.keys().cloned().collect();
        let (one, two) = (numbers.of(&names).clone(), numbers.of(&names).clone());
        let taken = match numbers.below(4) {
            0 => None,
            1 => Some(saved.parts[&two].clone()),
            2 => others.get(&one).or(others.values().next()).cloned(),
            _ => Some(saved.parts[&one].repeat(2)),
        };
        match taken {
            Some(bytes) => drop(saved.parts.insert(one, bytes)),
            None => drop(saved.parts.remove(&one)),
        }
        base.with_saved(&saved)
    }),
    ("places", |base, other, numbers| {
        let (mut saved, others) = (base.saved(), other.saved().places);
        let names: Vec<String> = saved.places.keys().cloned().collect();
        let (one, two) = (numbers.of(&names).clone(), numbers.of(&names).clone());
        let place = match numbers.below(3) {
            0 => Some(saved.places[&two]),
            1 => others.values().nth(numbers.below(others.len())).copied(),
            _ => None,
        };
        match place {
            Some(place) => drop(saved.places.insert(one, place)),
            None => drop(saved.places.remove(&one)),
        }
        base.with_saved(&saved)
    }),
    (OUTSIDE, |base, _, numbers| {
        let memory = base.saved().memory()[0];
        Device::change(base, numbers, |device, numbers| {
            let number = numbers.below(device.queues.len());
            let queue = &mut device.queues[number];
            (queue.size, queue.ready) = (*numbers.of(&[16, 128]), true);
            queue.places = [1, 2, 3].map(|mib| memory.start + (mib << 20));
            // Behind memory, across its end, in no address space, and across the end of that.
            let outside = [memory.end(), memory.end() - 16, 1 << 60, u64::MAX << 4];
            queue.places[numbers.below(3)] = *numbers.of(&outside);
        })
    }),
    ("two vectors with one route", |base, other, numbers| {
        let base = [base, other].into_iter().find(|base| base.saved().config.pci).unwrap();
        let mut saved = base.saved();
        share_message(saved.parts.get_mut("PCI bus").unwrap(), numbers);
        base.with_saved(&saved)
    }),
    ("the configuration", |base, _, numbers| {
        let mut saved = base.saved();
        let devices: Vec<String> = saved.config.devices().map(|device| device.name()).collect();
        let machine = &mut saved.config.machine_config;
        match numbers.below(7) {
            0 => machine.mem_size_mib = *numbers.of(&[2, 63, 65, 4096, 1 << 20]),
            1 => machine.vcpu_count = *numbers.of(&[1, 3, 32]),
            2 => saved.config.pci ^= true,
            3 => saved.config.boot_timer ^= true,
            4 => machine.max_vcpus = *numbers.of(&[None, Some(2), Some(4), Some(512)]),
            5 => machine.watchdog = None,
            _ => saved.config.remove(numbers.of(&devices).as_str()),
        }
        base.with_saved(&saved)
    }),
];

static PANICS: AtomicUsize = AtomicUsize::new(0);
static AT: AtomicUsize = AtomicUsize::new(0);

/// Counts panics in whatever thread, and ends the process when a load does not end.
fn watch_over() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, SeqCst);
        report(panic);
    }));
    std::thread::spawn(|| {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let at = AT.load(SeqCst);
            if at != last {
                (last, since) = (at, Instant::now());
            }
            if since.elapsed() > PATIENCE && at != usize::MAX {
                eprintln!("state {at} hangs");
                std::process::abort();
            }
        }
    });
}

/// Loads a state, which must be cheap and must not panic.
fn tried(base: &Base, state: &[u8], what: &str) -> Result<()> {
    let panics = PANICS.load(SeqCst);
    let load = || {
        let before = allocator::begin_peak();
        let loaded = base.load(state);
        (loaded, allocator::peak() - before)
    };
    let (mut loaded, mut allocated) = load();
    // The tests beside this one allocate, too. What is the load's own is allocated each time.
    for _ in 0..TRIES {
        if allocated > ALLOCATED_MAX {
            (loaded, allocated) = load();
        }
    }
    assert!(allocated <= ALLOCATED_MAX, "{what}: {} MiB were allocated", allocated >> 20);
    assert_eq!(PANICS.load(SeqCst), panics, "{what}: a thread panicked");
    loaded
}

#[test]
fn changed_states_are_refused_or_make_guests_that_live_alone() {
    // Where KVM is emulated, a machine takes half a second.
    let states = if cfg!(target_arch = "aarch64") { 60 } else { 500 };
    let states = std::env::var(STATES).map_or(states, |states| states.parse().unwrap());
    let bases = [Base::new(&[]), Base::new(&["--enable-pci", "--boot-timer"])];
    watch_over();
    let mut counts = BTreeMap::<_, [usize; 2]>::new();
    for number in 0..states {
        AT.store(number, SeqCst);
        let (name, change) = CHANGES[number % CHANGES.len()];
        let which = number / CHANGES.len() % 2;
        let state = change(&bases[which], &bases[1 - which], &mut Numbers::new(number as u64));
        let loaded = tried(&bases[which], &state, &format!("state {number}, {name}"));
        let is_named = |error: &Error| error.to_string().contains("queue");
        assert!(name != OUTSIDE || loaded.as_ref().is_err_and(is_named), "state {number}: {loaded:?}");
        counts.entry(name).or_default()[usize::from(loaded.is_err())] += 1;
    }
    AT.store(usize::MAX, SeqCst);
    println!("lived and refused: {counts:?}");
    let sum = |index: usize| counts.values().map(|both| both[index]).sum::<usize>();
    assert!(sum(0) > 0 && sum(1) > 0, "{counts:?}");
    // Others are as they were.
    for base in bases {
        base.load(&base.file).unwrap();
        base.snapshot.go_on(Service::start(&[]));
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn what_another_host_lacks_is_named_before_anything_runs() {
    let base = Base::new(&[]);
    // The entry of leaf 7 as `struct kvm_cpuid_entry2` begins, up to EBX: of which no processor has had bit 22.
    let mut machine = base.machine().to_vec();
    let entry = [7_u32, 0, 1].map(u32::to_le_bytes).concat();
    let at = machine.windows(entry.len()).position(|bytes| bytes == entry).expect("CPUs have leaf 7");
    machine[at + 16 + 2] |= 1 << 6;
    let elsewhere = Origin { boot_id: base.origin.boot_id.map(|byte| !byte), ..base.origin };
    let moved = |machine: &[u8]| {
        let mut sections = base.sections.clone();
        sections[0].bytes = machine.to_vec();
        state_file::write(&elsewhere, &sections)
    };
    // Where it was saved, nobody asks what KVM has.
    base.load(&base.with_machine(machine.clone())).unwrap();
    base.load(&moved(base.machine())).unwrap();
    let error = base.load(&moved(&machine)).unwrap_err().to_string();
    let expected = "CPU 0 of the guest was told of what this host's processor or KVM does not have: pcommit: restore it on";
    assert!(error.contains(expected), "{error}");
}

/// A state with `count` elements of two bytes each in a list that stands behind `before`.
fn long_list(before: &impl serde::Serialize, element: &[u8], count: usize) -> Vec<u8> {
    let mut bytes = postcard::to_stdvec(before).unwrap();
    bytes.extend(postcard::to_stdvec(&count).unwrap());
    bytes.extend(element.repeat(count));
    bytes
}

#[test]
fn no_state_makes_a_load_allocate_much() {
    let base = Base::new(&["--enable-pci"]);
    let saved = base.saved();
    let config = saved.config.saved().unwrap();
    let count = 4_000_000;
    let mut all = vec![
        ("memory", base.with_machine(long_list(&(1_u16, &config, &saved.places), &[0, 0], count))),
        ("configuration", base.with_machine(long_list(&1_u16, b"[", 2 * count))),
    ];
    let words: String = (0..700_000).map(|number| format!("\"{number}\":\"\",")).collect();
    let text = config.replacen(
        '{',
        &format!("{{\"metrics\":{{\"metrics_path\":\"m\",\"properties\":{{{words}\"a\":\"\"}}}},"),
        1,
    );
    all.push(("configuration's properties", base.with_machine(postcard::to_stdvec(&(1_u16, text)).unwrap())));
    let mut parts = base.saved();
    parts.parts.extend((0..600_000).map(|number| (format!("{number:x}"), Vec::new())));
    all.push(("parts", base.with_saved(&parts)));
    let mut places = base.saved();
    let place = *places.places.values().next().unwrap();
    places.places.extend((0..600_000).map(|number| (format!("{number:x}"), place)));
    all.push(("places", base.with_saved(&places)));
    // Where the processor is emulated, a load of such a state takes five seconds.
    let step = if cfg!(target_arch = "aarch64") { 4 } else { 1 };
    for name in saved.parts.keys().step_by(step) {
        let mut part = base.saved();
        // Whatever the part's first list is, somewhere it begins.
        part.parts.insert(name.clone(), long_list(&[1_u8, 0], &[0, 0], 3_000_000));
        all.push(("a part", base.with_saved(&part)));
    }
    let mut sections = base.sections.clone();
    sections.insert(0, Section { kind: 77, version: 1, bytes: vec![0; 60 << 20] });
    all.push(("an unknown section", state_file::write(&base.origin, &sections)));
    sections[0].kind = MACHINE;
    sections[1].kind = 77;
    all.push(("a long machine", state_file::write(&base.origin, &sections)));
    for (what, state) in all {
        let error = tried(&base, &state, what).expect_err(what).to_string();
        println!("{what}: {error}");
    }
    tried(&base, &base.file, "the state itself").unwrap();
}
