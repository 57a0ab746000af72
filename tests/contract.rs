//! What every virtio device promises, behind both transports: it negotiates, runs, stops without a trace,
//! catches up, goes on in a machine built anew, and is like new after a reset.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use alula::config::Config;
use alula::devices::KINDS as DEVICES;
use alula::devices::block;
use alula::devices::kind::Device;
use alula::error::Result;
use alula::host;
use alula::memory;
use alula::metrics::View;
use alula::snapshot::Snapshot;
use alula::virtio::queue::DESCRIPTORS_PER_TURN;
use alula::virtio::transport::Transport;
use alula::virtio::{Io, Queue, Registrar, VirtioDevice, Worker};
use common::driver::{
    self, DRIVER_OK, F_EVENT_IDX, F_VERSION_1, FEATURES_OK, Guest, INDIRECT, KINDS, Kind, NEEDS_RESET, NEXT,
    WRITE,
};
use common::network::{self, Wire};
use common::vsock::{EVENT, Packet, RST, RW};
use common::{Folder, wait_for};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const SECTOR: usize = 512;
const RX: usize = 0;
const TX: usize = 1;
/// EtherType for local experiments.
const ETHER_TYPE: u16 = 0x88b5;
const NET_HEADER: usize = 12;

/// The devices' surroundings: a disk image and a network of the test's own. One test at a time: a program
/// that another one starts would for a moment, as a copy of this process, have the image open too.
struct Host {
    folder: Folder,
    wire: Wire,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Host {
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        network::enter();
        network::add_tap("tap0", "172.16.0.1/24");
        let folder = Folder::new();
        for disk in ["disk", "fast"] {
            folder.write(disk, vec![0; 64 * SECTOR]);
        }
        Self { folder, wire: Wire::new("tap0", ETHER_TYPE), _alone: alone }
    }

    /// A configuration with every device there is.
    fn config(&self) -> Config {
        let config = json!({
            "drives": [{
                "drive_id": "disk",
                "path_on_host": self.folder.path("disk"),
                "is_root_device": false,
                "cache_type": "Writeback",
            }, {
                "drive_id": "fast",
                "path_on_host": self.folder.path("fast"),
                "is_root_device": false,
                "io_engine": "Async",
                "num_queues": 2,
                "rate_limiter": { "ops": { "size": 1000, "refill_time": 10 } },
            }],
            "network-interfaces": [{ "iface_id": "net", "host_dev_name": "tap0" }],
            "entropy": {},
            "vsock": { "guest_cid": 3, "uds_path": self.folder.path("v") },
        });
        let config = Config::parse(config.to_string().as_bytes()).unwrap();
        for kind in DEVICES {
            let lists = |device: &Device| device.kind() == kind;
            assert!(config.devices().any(lists), "teach this test a configuration with `{}`", kind.section);
        }
        config
    }

    fn guest(&self, kind: Kind, device: &Device) -> Guest {
        let opened = device.open("contract", &mut host::Host::default()).unwrap();
        if is_net(device) {
            self.wire.settle("tap0");
        }
        Guest::new(kind, opened)
    }

    /// Does `test` with every device behind every transport.
    fn each(&self, mut test: impl FnMut(&Self, Kind, &Device)) {
        let config = self.config();
        let mut count = 0;
        for device in config.devices() {
            for kind in KINDS {
                println!("{} behind {kind:?}", device.name());
                test(self, kind, device);
                count += 1;
            }
        }
        assert!(count >= 6, "only {count} combinations");
    }

    /// Offers the device its typical request, and says how to see that it was done. A new device is
    /// taught here how it is used: the tests fail without.
    fn offer(&self, device: &Device, guest: &mut Guest, round: u8) -> Check {
        match device.kind().section {
            "drives" => {
                let mut header = [0; 16];
                // Write a sector that says which round it is.
                header[0] = 1;
                header[8] = round % 64;
                let header = guest.allocate(&header);
                let data = guest.allocate(&[round; SECTOR]);
                let status = guest.allocate(&[0xff]);
                guest.offer(0, &[(header, 0), (data, 0), (status, WRITE)]);
                let image = self.folder.path(&device.config::<block::Config>().unwrap().drive_id);
                Check::Written { round, status, image }
            }
            "network-interfaces" => {
                let mut frame = vec![0; NET_HEADER + 60];
                frame[NET_HEADER..NET_HEADER + 6].fill(0xff);
                frame[NET_HEADER + 6..NET_HEADER + 12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
                frame[NET_HEADER + 12..NET_HEADER + 14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
                frame[NET_HEADER + 14] = round;
                let out = guest.allocate(&frame);
                let room = guest.allocate(&[0; NET_HEADER + 1514]);
                guest.offer(RX, &[(room, WRITE)]);
                guest.offer(TX, &[(out, 0)]);
                Check::Frames { round, room }
            }
            "entropy" => {
                let bytes = guest.allocate(&[0; 64]);
                guest.offer(0, &[(bytes, WRITE)]);
                Check::Random { bytes }
            }
            "vsock" => {
                // What is no connection is refused.
                let packet = Packet::new(RW, round.into(), 1000);
                let out = guest.allocate(&packet.bytes());
                let room = guest.allocate(&[0; 64]);
                if guest.available(EVENT).0 == guest.used_index(EVENT) {
                    let event = guest.allocate(&[0; 4]);
                    guest.offer(EVENT, &[(event, WRITE)]);
                }
                guest.offer(RX, &[(room, WRITE)]);
                guest.offer(TX, &[(out, 0)]);
                Check::Refused { round, room }
            }
            other => panic!("teach this test how a device of `{other}` is used"),
        }
    }

    /// Waits until the request is done, and looks whether it was done right.
    fn check(&self, guest: &mut Guest, check: Check) {
        match check {
            Check::Written { round, status, image } => {
                guest.next_used(0);
                assert_eq!(guest.bytes(status), [0], "the disk refused round {round}");
                let image = std::fs::read(image).unwrap();
                let at = usize::from(round % 64) * SECTOR;
                assert!(image[at..at + SECTOR].iter().all(|byte| *byte == round), "round {round}");
            }
            Check::Frames { round, room } => {
                let wire = &self.wire;
                assert_eq!(wire.receive()[14], round, "another frame came out");
                guest.next_used(TX);
                // What came out goes in.
                let mut frame = [0xff; 60];
                frame[12..14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
                frame[14] = round ^ 0xff;
                wire.send(&frame);
                let mut room = room;
                loop {
                    guest.next_used(RX);
                    let received = guest.bytes(room);
                    if received[NET_HEADER + 12..NET_HEADER + 14] == ETHER_TYPE.to_be_bytes() {
                        assert_eq!(received[NET_HEADER + 14], round ^ 0xff);
                        return;
                    }
                    // The host says something of its own on its new interface.
                    room = guest.allocate(&[0; NET_HEADER + 1514]);
                    guest.offer(RX, &[(room, WRITE)]);
                    guest.kick(RX);
                }
            }
            Check::Refused { round, room } => {
                guest.next_used(TX);
                guest.wait_for(|guest| {
                    if guest.has_used(EVENT) {
                        // It is told that its connections are gone: it listens again.
                        guest.next_used(EVENT);
                        let event = guest.allocate(&[0; 4]);
                        guest.offer(EVENT, &[(event, WRITE)]);
                        guest.kick(EVENT);
                    }
                    guest.has_used(RX)
                });
                assert_eq!(guest.next_used(RX).1, 44);
                let packet = Packet::parse(&guest.bytes(room));
                assert_eq!((packet.op, packet.to_port, packet.from_port), (RST, round.into(), 1000));
            }
            Check::Random { bytes } => {
                assert_eq!(guest.next_used(0).1, 64);
                assert_ne!(guest.bytes(bytes), [0; 64]);
            }
        }
    }

    fn exercise(&self, device: &Device, guest: &mut Guest, round: u8) {
        let check = self.offer(device, guest, round);
        kick_all(guest);
        self.check(guest, check);
    }
}

/// What a request was, and where its answer will be.
enum Check {
    Written { round: u8, status: (u64, u32), image: std::path::PathBuf },
    Frames { round: u8, room: (u64, u32) },
    Random { bytes: (u64, u32) },
    Refused { round: u8, room: (u64, u32) },
}

fn is_net(device: &Device) -> bool {
    device.kind().section == "network-interfaces"
}

/// Whether buffers of this queue wait for what comes from outside.
fn waits(device: &Device, queue: usize) -> bool {
    is_net(device) && queue == RX || device.kind().section == "vsock" && queue != TX
}

fn kick_all(guest: &mut Guest) {
    (0..guest.queues()).for_each(|queue| guest.kick(queue));
}

fn used(guest: &Guest) -> Vec<u16> {
    (0..guest.queues()).map(|queue| guest.used_index(queue)).collect()
}

#[test]
fn every_device_negotiates_and_does_its_work() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        let offered = guest.features();
        assert_ne!(offered & F_VERSION_1, 0);
        assert!(!guest.negotiate(offered & !F_VERSION_1), "legacy drivers are not for it");
        assert!(!guest.negotiate(offered | 1 << 50), "it accepted what it had not offered");
        for (round, features) in [0, F_EVENT_IDX, offered].into_iter().enumerate() {
            guest.start(features);
            assert_eq!(guest.status() & NEEDS_RESET, 0);
            for more in 0..40 {
                host.exercise(device, &mut guest, (40 * round + more) as u8);
            }
        }
        assert!((0..guest.queues()).any(|queue| guest.is_interrupted(Some(queue))), "no interrupt came");
    });
}

#[test]
fn a_stopped_device_ignores_kicks_and_catches_up_on_start() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        guest.start(F_EVENT_IDX);
        host.exercise(device, &mut guest, 1);
        guest.pause();
        let before = used(&guest);
        let check = host.offer(device, &mut guest, 2);
        kick_all(&mut guest);
        // Long enough for a device that runs on to show it.
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert_eq!(used(&guest), before, "a stopped device used buffers");
        guest.resume();
        host.check(&mut guest, check);
        // Kicked before it was paused or not, nothing is lost: pauses in quick succession.
        for round in 3..20 {
            let check = host.offer(device, &mut guest, round);
            if round % 2 == 0 {
                kick_all(&mut guest);
            }
            guest.pause();
            guest.resume();
            host.check(&mut guest, check);
        }
    });
}

#[test]
fn a_device_goes_on_in_a_machine_built_anew() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        guest.start(F_EVENT_IDX);
        for round in 1..20 {
            host.exercise(device, &mut guest, round);
            // A request is under way, kicked or not.
            let check = host.offer(device, &mut guest, 100 + round);
            let suspended = guest.suspend();
            guest = host.guest(kind, device);
            guest.take_over(&suspended).unwrap();
            assert_eq!(guest.save(), suspended.state, "what was restored is not what was saved");
            guest.resume();
            if round % 2 == 0 {
                kick_all(&mut guest);
            }
            host.check(&mut guest, check);
        }
        assert_eq!(guest.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
    });
}

#[test]
fn a_queue_half_processed_is_processed_once_after_a_restore() {
    const REQUESTS: u16 = 16;
    let open = |device: &Device, name: &str| device.open(name, &mut alula::host::Host::default()).unwrap();
    let memory = || memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    Host::new().each(|_, kind, device| {
        let sizes = open(device, "contract").queue_sizes().to_vec();
        for (queue, max) in sizes.into_iter().enumerate().filter(|(queue, _)| !is_net(device) || *queue != RX)
        {
            let mut guest = Guest::by_hand(kind, open(device, "contract"), memory());
            guest.start(F_EVENT_IDX);
            guest.turn();
            // A turn handles a few requests of as many descriptors as there can be.
            let room = guest.allocate(&[0; 16]);
            let table = guest.allocate_table(&vec![(room, WRITE); max.into()]);
            let heads: Vec<_> = (0..REQUESTS).map(|_| guest.offer(queue, &[(table, INDIRECT)])).collect();
            guest.kick(queue);
            while guest.used_index(queue) == 0 {
                guest.turn_once();
            }
            let suspended = guest.suspend();
            // An address that follows the microVM's name stays when that is another one.
            let mut guest = Guest::by_hand(kind, open(device, "another name"), memory());
            guest.take_over(&suspended).unwrap();
            assert_eq!(guest.save(), suspended.state, "what was restored is not what was saved");
            let done = guest.used_index(queue);
            assert!(done < REQUESTS || max < 256, "{}: queue {queue} was done", device.name());
            guest.resume();
            let mut used: Vec<_> = heads.iter().map(|_| guest.next_used(queue).0).collect();
            used.sort_unstable();
            assert_eq!(used, heads, "{}: each comes back once", device.name());
            guest.turn();
            assert_eq!(guest.used_index(queue), REQUESTS);
        }
    });
}

#[test]
fn a_restored_device_interrupts_for_each_of_its_queues() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        guest.start(F_EVENT_IDX);
        // An interrupt that was under way when the device was saved may have been lost.
        let suspended = guest.suspend();
        let mut guest = host.guest(kind, device);
        guest.take_over(&suspended).unwrap();
        let interrupted = |guest: &mut Guest| {
            (0..guest.queues()).filter(|queue| guest.is_interrupted(Some(*queue))).count()
        };
        assert_eq!(interrupted(&mut guest), 0);
        guest.resume();
        assert_eq!(interrupted(&mut guest), guest.queues());
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn damaged_state_is_refused_or_harmless() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        guest.start(F_EVENT_IDX);
        host.exercise(device, &mut guest, 1);
        let mut suspended = guest.suspend();
        let sound = suspended.state.clone();
        for part in 0..sound.len() {
            for at in (0..sound[part].len()).step_by(5) {
                let damage = [Some(0xff), Some(0x80), None][at / 5 % 3];
                suspended.state = sound.clone();
                match damage {
                    Some(bits) => suspended.state[part][at] ^= bits,
                    None => suspended.state[part].truncate(at),
                }
                let mut guest = host.guest(kind, device);
                let restored = guest.take_over(&suspended);
                assert!(damage.is_some() || restored.is_err(), "{at} bytes are not all");
                if restored.is_ok() {
                    // Whatever it makes of it, it lives: a reset brings it back.
                    guest.resume();
                    kick_all(&mut guest);
                    guest.reset();
                }
            }
        }
        let mut guest = host.guest(kind, device);
        suspended.state = sound;
        guest.take_over(&suspended).unwrap();
        guest.resume();
        host.exercise(device, &mut guest, 2);
    });
}

#[test]
fn a_reset_device_is_like_a_new_one() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        let new = guest.save();
        guest.start(F_EVENT_IDX);
        host.exercise(device, &mut guest, 1);
        guest.reset();
        assert_eq!(guest.save()[0], new[0]);
        // With other features, and in the middle of a request.
        guest.start(0);
        host.offer(device, &mut guest, 2);
        kick_all(&mut guest);
        guest.reset();
        assert_eq!(guest.save()[0], new[0]);
        drop(guest);
        let mut guest = host.guest(kind, device);
        guest.start(0);
        if is_net(device) {
            // The frame of the request that the reset cut short may have left.
            host.wire.discard();
        }
        host.exercise(device, &mut guest, 3);
    });
}

/// The two ways in which a driver tells a device to touch its memory no more: true, the device is behind PCI.
fn stop_by(guest: &mut Guest, by_mastering: bool) {
    match by_mastering {
        true => assert!(guest.set_bus_master(false)),
        false => guest.set_status(0),
    }
}

#[test]
fn nothing_is_written_once_a_driver_has_stopped_its_device() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        for round in 0..20_u8 {
            let by_mastering = kind == Kind::Pci && round % 2 == 1;
            if kind == Kind::Pci {
                guest.set_bus_master(true);
            }
            guest.start(F_EVENT_IDX);
            // As many requests as the smallest ring holds: some are done by then, some are not.
            for request in 0..5 {
                host.offer(device, &mut guest, 5 * round + request);
            }
            kick_all(&mut guest);
            if is_net(device) {
                (0..5).for_each(|_| host.wire.send(&[0xff; 60]));
            }
            std::thread::sleep(std::time::Duration::from_micros(40 * u64::from(round)));
            stop_by(&mut guest, by_mastering);
            // The memory is somebody else's now.
            guest.fill(0, driver::MEMORY, round);
            assert_eq!(guest.status() & DRIVER_OK, 0, "it still runs");
            if !by_mastering {
                assert_eq!(guest.status(), 0);
                guest.write(0x30, 0x16, 2, 0);
                assert_eq!(
                    [guest.read(0x44, 0x1c, 2), guest.read(0x80, 0x20, 4)],
                    [0, 0],
                    "queue 0 is set up"
                );
            }
            // Long enough for a device that goes on to show it.
            std::thread::sleep(std::time::Duration::from_millis(10));
            let written = guest.bytes((0, driver::MEMORY as u32)).iter().position(|byte| *byte != round);
            assert_eq!(written, None, "round {round}: the device wrote to memory that was taken from it");
            guest.notes.allocated = 0;
        }
        if kind == Kind::Pci {
            guest.set_bus_master(true);
        }
        guest.start(0);
        if is_net(device) {
            host.wire.discard();
        }
        host.exercise(device, &mut guest, 101);
    });
}

#[test]
fn a_device_whose_bus_mastering_was_taken_waits_for_its_driver() {
    Host::new().each(|host, kind, device| {
        if kind != Kind::Pci {
            return;
        }
        let mut guest = host.guest(kind, device);
        guest.set_bus_master(true);
        guest.start(F_EVENT_IDX);
        host.exercise(device, &mut guest, 1);
        guest.set_bus_master(false);
        // The next kernel gives it back before it resets the device, whose rings are gone.
        let before = used(&guest);
        let check = host.offer(device, &mut guest, 2);
        kick_all(&mut guest);
        guest.set_bus_master(true);
        guest.pause();
        let suspended = guest.suspend();
        let mut guest = host.guest(kind, device);
        guest.take_over(&suspended).unwrap();
        guest.resume();
        guest.pause();
        guest.resume();
        assert_eq!(used(&guest), before, "it went on without its driver");
        // Its driver says that it is ready, while it may not and then may reach memory.
        guest.set_bus_master(false);
        guest.set_status(11 | DRIVER_OK);
        guest.pause();
        guest.resume();
        assert_eq!(used(&guest), before, "it went on without bus mastering");
        guest.set_bus_master(true);
        host.check(&mut guest, check);
        // A state by which the function has it, and its device has not, would stand still for ever.
        guest.pause();
        guest.set_bus_master(false);
        let mut state = guest.save();
        drop(guest);
        host.guest(kind, device).restore(&state).unwrap();
        // Version, length of the configuration space, and its command register.
        let command = 1 + 2 + 4;
        assert_eq!(state[1][command], 2);
        state[1][command] = 6;
        let error = host.guest(kind, device).restore(&state).unwrap_err().to_string();
        assert!(error.contains("is a bus master, and its device is not"), "{error}");
    });
}

/// A device whose worker has something in flight when it is stopped, for as long as the test says.
struct Lingering(Arc<InFlight>);

#[derive(Default)]
struct InFlight {
    /// How many workers were started, asked to stop, may, and have.
    started: AtomicU32,
    asked: AtomicU32,
    may: AtomicU32,
    done: AtomicU32,
}

impl InFlight {
    /// Nothing is in flight when it is stopped.
    fn free() -> Self {
        Self { may: u32::MAX.into(), ..Self::default() }
    }
}

struct LingeringWorker(Queue, Arc<InFlight>);

impl Snapshot for Lingering {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Lingering {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let worker = |queue| -> Box<dyn Worker> { Box::new(LingeringWorker(queue, self.0.clone())) };
        Ok(io.queues.into_iter().map(worker).collect())
    }
}

impl Worker for LingeringWorker {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        self.1.started.fetch_add(1, Ordering::SeqCst);
        registrar.kick(&self.0, 0)
    }
    fn handle(&mut self, _token: u32) -> Result<()> {
        Ok(())
    }
    fn stop(self: Box<Self>) -> Vec<Queue> {
        let asked = self.1.asked.fetch_add(1, Ordering::SeqCst) + 1;
        wait_for(|| self.1.may.load(Ordering::SeqCst) >= asked);
        self.1.done.fetch_add(1, Ordering::SeqCst);
        vec![self.0]
    }
}

#[test]
fn a_vcpu_waits_for_what_is_in_flight_and_nobody_for_it() {
    for (kind, by_mastering) in [(Kind::Mmio, false), (Kind::Pci, false), (Kind::Pci, true)] {
        let in_flight = Arc::new(InFlight::default());
        let mut guest = Guest::new(kind, Box::new(Lingering(in_flight.clone())));
        let transport = guest.transport.clone();
        for round in 1..=3 {
            guest.set_bus_master(true);
            guest.start(0);
            wait_for(|| in_flight.started.load(Ordering::SeqCst) == round);
            std::thread::scope(|scope| {
                let vcpu = scope.spawn(|| {
                    stop_by(&mut guest, by_mastering);
                    in_flight.done.load(Ordering::SeqCst)
                });
                wait_for(|| in_flight.asked.load(Ordering::SeqCst) == round);
                // Meanwhile the user looks at the machine and pauses it.
                let (sender, stopped) = std::sync::mpsc::channel();
                drop(transport.lock().unwrap().metrics(View::Total));
                transport.lock().unwrap().pause(sender);
                assert_eq!(stopped.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
                in_flight.may.store(round, Ordering::SeqCst);
                assert_eq!(
                    vcpu.join().unwrap(),
                    round,
                    "{kind:?}: the write returned before the device stopped"
                );
                assert!(stopped.recv().is_err());
                transport.lock().unwrap().resume();
            });
        }
        assert_eq!(in_flight.started.load(Ordering::SeqCst), 3, "it was started again by itself");
    }
}

#[test]
fn a_device_that_was_reset_while_paused_waits_for_the_machine() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        guest.start(0);
        guest.pause();
        guest.reset();
        guest.start(0);
        let before = used(&guest);
        let check = host.offer(device, &mut guest, 1);
        kick_all(&mut guest);
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert_eq!(used(&guest), before);
        guest.resume();
        host.check(&mut guest, check);
    });
}

#[test]
fn a_broken_ring_stops_its_device_alone_until_a_reset() {
    let host = Host::new();
    let config = host.config();
    for kind in KINDS {
        let other = config.devices().find(|device| device.kind().section == "entropy").unwrap();
        for device in config.devices() {
            let mut guest = host.guest(kind, device);
            for queue in 0..guest.queues() {
                guest.start(0);
                // An index that runs away, in one step: a device that is quick would keep up.
                guest.run_away(queue, 20);
                guest.kick(queue);
                if is_net(device) && queue == RX {
                    host.wire.send(&[0xff; 60]);
                }
                wait_for(|| guest.status() & NEEDS_RESET != 0);
                assert!(guest.is_interrupted(None), "the driver is not told");
                let mut beside = host.guest(kind, other);
                beside.start(0);
                host.exercise(other, &mut beside, 1);
            }
            guest.start(0);
            host.exercise(device, &mut guest, 2);
        }
    }
}

#[test]
fn a_queue_that_the_driver_did_not_set_up_is_left_alone() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        for left_out in 0..guest.queues() {
            assert!(guest.negotiate(F_VERSION_1));
            // The others are not where a ring would be that nobody gave a place.
            for queue in (0..guest.queues()).filter(|queue| *queue != left_out) {
                guest.set_queue(queue, 16, Guest::parts(queue + 8));
            }
            guest.fill(0, 0x1_0000, 0x55);
            guest.set_status(11 | DRIVER_OK);
            kick_all(&mut guest);
            if is_net(device) {
                host.wire.send(&[0xff; 60]);
            }
            // A device that never comes to an end with it is not stopped.
            guest.pause();
            assert!(guest.bytes((0, 0x1_0000)).iter().all(|byte| *byte == 0x55));
            guest.resume();
        }
        guest.start(0);
        if is_net(device) {
            host.wire.discard();
        }
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn queues_that_cannot_be_are_refused_at_the_start() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        let [table, available, used] = Guest::parts(0);
        for (size, parts) in [
            (0, [table, available, used]),
            (7, [table, available, used]),
            (0x8000, [table, available, used]),
            (8, [table + 1, available, used]),
            (8, [table, available + 1, used]),
            (8, [table, available, used + 2]),
            (8, [common::driver::MEMORY - 16, available, used]),
            (8, [table, !1, used]),
            (8, [table, available, u64::MAX << 3]),
        ] {
            assert!(guest.negotiate(F_VERSION_1));
            guest.set_queue(0, size, parts);
            guest.set_status(11 | DRIVER_OK);
            wait_for(|| guest.status() & NEEDS_RESET != 0);
        }
        guest.start(0);
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn registers_are_for_their_time_only() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        guest.start(0);
        // Neither rings nor features change under a running device.
        let running = guest.read(0x80, 0x20, 4);
        guest.write(0x80, 0x20, 4, 0xdead_0000);
        assert_eq!(guest.read(0x80, 0x20, 4), running);
        guest.write(0x24, 0x08, 4, 0);
        let features = guest.read(0x20, 0x0c, 4);
        guest.write(0x20, 0x0c, 4, !0);
        assert_eq!(guest.read(0x20, 0x0c, 4), features);
        assert_ne!(guest.status() & FEATURES_OK, 0);
        // A queue that there is not.
        guest.write(0x30, 0x16, 2, 500);
        assert_eq!(guest.read(0x34, 0x18, 2), 0);
        guest.write(0x38, 0x18, 2, 8);
        guest.write(0x44, 0x1c, 2, 1);
        assert_eq!(guest.read(0x44, 0x1c, 2), 0);
        // Configuration is readable at any width and place, and nothing but zeros is beyond it.
        for width in [1, 2, 4, 8] {
            for offset in (0..0x400).step_by(width) {
                let mut bytes = [0xaa; 8];
                guest.config(offset as u64, &mut bytes[..width]);
                assert!(offset < 64 || bytes[..width].iter().all(|byte| *byte == 0), "{offset:#x}");
                guest.set_config(offset as u64, &bytes[..width]);
            }
        }
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn a_chain_that_goes_nowhere_ends_in_a_reset_or_an_answer() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        // (address, length, flags, next) of the first two descriptors.
        for chain in [
            [(0x1000, 16, NEXT, 0), (0, 0, 0, 0)],
            [(0x1000, 16, NEXT, 500), (0, 0, 0, 0)],
            [(1 << 46, 16, NEXT, 1), (1 << 46, 1, WRITE, 0)],
            [(u64::MAX - 3, 64, NEXT, 1), (u64::MAX - 3, 64, WRITE, 0)],
            [(0x1000, u32::MAX, NEXT, 1), (0x1000, u32::MAX, WRITE, 0)],
            [(0x1000, 0, NEXT, 1), (0x1000, 0, WRITE, 0)],
            [(0x1000, 7, 4, 0), (0, 0, 0, 0)],
            [(1 << 46, 64, 4, 0), (0, 0, 0, 0)],
        ] {
            for queue in 0..guest.queues() {
                guest.start(0);
                for (index, (address, length, flags, next)) in chain.into_iter().enumerate() {
                    guest.set_descriptor(queue, index as u16, address, length, flags, next);
                }
                guest.make_available(queue, 0);
                guest.kick(queue);
                if is_net(device) && queue == RX {
                    // Looked at when a frame comes.
                    host.wire.send(&[0xff; 60]);
                }
                wait_for(|| guest.used_index(queue) == 1 || guest.status() & NEEDS_RESET != 0);
            }
        }
        if is_net(device) {
            host.wire.discard();
        }
        guest.start(0);
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn a_chain_longer_than_its_queue_is_the_drivers_fault() {
    const ENTRIES: usize = 65_535;
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        let room = guest.allocate(&[0; 16]);
        let table = guest.allocate_table(&vec![(room, WRITE); ENTRIES]);
        // Whether descriptor `index` is the last one of the table's.
        let end = |guest: &Guest, index: usize, is_last: bool| {
            let flags = if is_last { WRITE } else { WRITE | NEXT };
            let place = GuestAddress(table.0 + 16 * index as u64 + 12);
            guest.memory.memory().write_obj(flags, place).unwrap();
        };
        for queue in 0..guest.queues() {
            guest.reset();
            guest.write(0x30, 0x16, 2, queue as u32);
            let max = guest.read(0x34, 0x18, 2) as usize;
            // The ring itself has 16; a table may have room for more than is used of it.
            for (count, is_fault) in [(1, false), (max, false), (max + 1, true), (ENTRIES, true)] {
                guest.start(0);
                end(&guest, count - 1, true);
                guest.set_descriptor(queue, 0, table.0, table.1, INDIRECT, 0);
                guest.make_available(queue, 0);
                guest.kick(queue);
                if is_net(device) && queue == RX {
                    host.wire.send(&[0xff; 60]);
                }
                // One buffer of 16 bytes takes no frame: the frame is lost, or waits for another buffer.
                let is_small = is_net(device) && queue == RX && count == 1;
                // A socket device takes a buffer when it is given, and has nothing for it.
                let is_kept = is_small || !is_net(device) && waits(device, queue) && !is_fault;
                let mut seen = (false, false);
                wait_for(|| {
                    seen = (guest.used_index(queue) == 1, guest.status() & NEEDS_RESET != 0);
                    is_kept || seen != (false, false)
                });
                assert!(is_kept || seen == (!is_fault, is_fault), "{count} in queue {queue}: {seen:?}");
                end(&guest, count - 1, false);
            }
        }
        guest.start(0);
        if is_net(device) {
            host.wire.discard();
        }
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn a_turn_handles_no_more_descriptors_than_its_share() {
    let host = Host::new();
    let config = host.config();
    for device in config.devices() {
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let opened = device.open("contract", &mut host::Host::default()).unwrap();
        let sizes = opened.queue_sizes().to_vec();
        let mut guest = Guest::by_hand(Kind::Mmio, opened, memory);
        let room = guest.allocate(&[0; 16]);
        for (queue, max) in sizes.into_iter().enumerate() {
            if waits(device, queue) {
                continue;
            }
            guest.start(F_EVENT_IDX);
            guest.turn();
            let table = guest.allocate_table(&vec![(room, WRITE); max.into()]);
            (0..16).for_each(|_| _ = guest.offer(queue, &[(table, INDIRECT)]));
            guest.kick(queue);
            let (mut done, mut turns) = (0, 0);
            while guest.turn_once() {
                let now = guest.used_index(queue);
                let descriptors = (now - done) * max;
                assert!(descriptors <= DESCRIPTORS_PER_TURN, "{}: {descriptors}", device.name());
                turns += u16::from(now > done);
                done = now;
            }
            assert_eq!(done, 16, "{}: all are done in the end", device.name());
            assert!(turns >= (16 * max).div_ceil(DESCRIPTORS_PER_TURN), "{}: {turns}", device.name());
        }
    }
}

#[test]
fn a_turn_of_a_disk_ends_with_the_request_that_is_large() {
    let host = Host::new();
    let large = 64 << 20;
    std::fs::File::create(host.folder.path("large")).unwrap().set_len(large).unwrap();
    for engine in ["Sync", "Async"] {
        let device = json!({
            "drive_id": "disk", "path_on_host": host.folder.path("large"), "is_root_device": false,
            "io_engine": engine,
        });
        let kind = DEVICES.iter().find(|kind| kind.section == "drives").unwrap();
        let device = kind.parse(device.to_string().as_bytes()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let opened = device.open("contract", &mut host::Host::default()).unwrap();
        let mut guest = Guest::by_hand(Kind::Mmio, opened, memory);
        guest.start(0);
        guest.turn();
        let (header, status) = (guest.allocate(&[0; 16]), guest.allocate(&[0xff]));
        // One piece of memory again and again.
        let room = guest.allocate(&vec![0; 1 << 20]);
        let rooms = vec![(room, WRITE); large as usize >> 20];
        let table = guest.allocate_table(&[&[(header, 0)][..], &rooms, &[(status, WRITE)]].concat());
        (0..3).for_each(|_| _ = guest.offer(0, &[(table, INDIRECT)]));
        guest.kick(0);
        let mut done = 0;
        guest.wait_for_each_turn(|guest| {
            let now = guest.used_index(0);
            assert!(now - done <= 1, "{engine}: {} at once", now - done);
            done = now;
            done == 3
        });
        assert_eq!(guest.bytes(status), [0]);
    }
}

/// A device of two workers, whose user pauses it when the first of them is at work.
struct Two {
    transport: Arc<OnceLock<Arc<Mutex<Transport>>>>,
    handled: Arc<AtomicU32>,
}

struct OneOfTwo {
    queue: Queue,
    transport: Arc<OnceLock<Arc<Mutex<Transport>>>>,
    handled: Arc<AtomicU32>,
}

impl Snapshot for Two {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Two {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let worker = |queue| -> Box<dyn Worker> {
            let (transport, handled) = (self.transport.clone(), self.handled.clone());
            Box::new(OneOfTwo { queue, transport, handled })
        };
        Ok(io.queues.into_iter().map(worker).collect())
    }
}

impl Worker for OneOfTwo {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.queue, 0)
    }
    fn handle(&mut self, _token: u32) -> Result<()> {
        self.handled.fetch_add(1, Ordering::SeqCst);
        self.transport.get().unwrap().lock().unwrap().pause(std::sync::mpsc::channel().0);
        Ok(())
    }
    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

#[test]
fn a_stop_waits_for_one_worker_not_for_all_that_are_ready() {
    let (transport, handled) = (Arc::new(OnceLock::new()), Arc::new(AtomicU32::new(0)));
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let two = Box::new(Two { transport: transport.clone(), handled: handled.clone() });
    let mut guest = Guest::by_hand(Kind::Mmio, two, memory);
    assert!(transport.set(guest.transport.clone()).is_ok());
    // Both are kicked by the start.
    guest.start(0);
    guest.turn();
    assert_eq!(handled.load(Ordering::SeqCst), 1);
}

/// A device that notes by which thread it is started and reset, and does not start with a feature of its own.
#[derive(Clone, Default)]
struct Placed(Arc<Mutex<Vec<String>>>);

impl Placed {
    const FAILS: u64 = 1;

    fn note(&self, what: &str) {
        let thread = std::thread::current();
        self.0.lock().unwrap().push(format!("{what} by {}", thread.name().unwrap_or_default()));
    }
}

impl Snapshot for Placed {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Placed {
    fn device_type(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        Self::FAILS
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        self.note("start");
        if io.features & Self::FAILS != 0 {
            return Err(alula::error::Error::host("it cannot"));
        }
        let worker =
            |queue| -> Box<dyn Worker> { Box::new(LingeringWorker(queue, Arc::new(InFlight::free()))) };
        Ok(io.queues.into_iter().map(worker).collect())
    }
    fn reset(&mut self) {
        self.note("reset");
    }
}

#[test]
fn a_device_is_reset_by_the_thread_that_starts_it() {
    for kind in KINDS {
        let device = Placed::default();
        let mut guest = Guest::new(kind, Box::new(device.clone()));
        let noted = || std::mem::take(&mut *device.0.lock().unwrap());
        // At power-on there is nothing to reset.
        guest.reset();
        assert!(noted().is_empty());
        let start = |guest: &mut Guest, features: u64| {
            guest.start(features);
            wait_for(|| noted_by(&device) == ["start by io"]);
        };
        start(&mut guest, 0);
        guest.reset();
        assert_eq!(noted(), ["start by io", "reset by io"], "it ran");
        start(&mut guest, Placed::FAILS);
        wait_for(|| guest.status() & NEEDS_RESET != 0);
        guest.reset();
        guest.reset();
        assert_eq!(noted(), ["start by io", "reset by io"], "it could not run, and is reset once");
        guest.set_config(0, &[1]);
        guest.reset();
        assert_eq!(noted(), ["reset by io"], "its configuration was written");
        if kind == Kind::Pci {
            start(&mut guest, 0);
            guest.set_bus_master(false);
            guest.reset();
            guest.set_bus_master(true);
            assert_eq!(noted(), ["start by io", "reset by io"], "it was stopped before");
        }
        // In a machine built anew over its state, before anything else.
        start(&mut guest, 0);
        guest.pause();
        let state = guest.save();
        let again = Placed::default();
        let mut guest = Guest::new(kind, Box::new(again.clone()));
        guest.restore(&state).unwrap();
        guest.reset();
        assert_eq!(noted_by(&again), ["reset by io"]);
    }
}

fn noted_by(device: &Placed) -> Vec<String> {
    device.0.lock().unwrap().clone()
}

/// A disk that the guest can use, of this image.
fn disk(host: &Host, image: &str) -> Device {
    let disk = json!({
        "drive_id": "disk", "path_on_host": host.folder.path(image), "is_root_device": false,
    });
    let kind = DEVICES.iter().find(|kind| kind.section == "drives").unwrap();
    kind.parse(disk.to_string().as_bytes()).unwrap()
}

/// Does a block request (virtio 1.2, 5.2.6), and returns its status.
fn transfer(guest: &mut Guest, kind: u8, sector: u64, data: &[u8]) -> u8 {
    let mut header = [0; 16];
    header[0] = kind;
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let header = guest.allocate(&header);
    let data = guest.allocate(data);
    let status = guest.allocate(&[0xff]);
    guest.request(0, &[(header, 0), (data, if kind == 0 { WRITE } else { 0 }), (status, WRITE)]);
    guest.bytes(status)[0]
}

#[test]
fn what_the_host_cannot_do_is_an_error_of_that_request_alone() {
    const IO_ERROR: u8 = 1;
    let host = Host::new();
    let image = host.folder.path("small");
    std::fs::write(&image, [7; 8 * SECTOR]).unwrap();
    for kind in KINDS {
        let mut guest = host.guest(kind, &disk(&host, "small"));
        guest.start(0);
        assert_eq!(transfer(&mut guest, 0, 6, &[0; SECTOR]), 0);
        // Somebody makes the file shorter: reads beyond its end are short.
        std::fs::File::options().write(true).open(&image).unwrap().set_len(4 * SECTOR as u64).unwrap();
        assert_eq!(transfer(&mut guest, 0, 6, &[0; SECTOR]), IO_ERROR);
        assert_eq!(transfer(&mut guest, 0, 3, &[0; 2 * SECTOR]), IO_ERROR);
        assert_eq!(transfer(&mut guest, 0, 3, &[0; SECTOR]), 0);
        std::fs::File::options().write(true).open(&image).unwrap().set_len(8 * SECTOR as u64).unwrap();
        assert_eq!(transfer(&mut guest, 0, 6, &[0; SECTOR]), 0);
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn a_full_host_is_an_error_of_the_write_that_found_it_full() {
    const IO_ERROR: u8 = 1;
    let host = Host::new();
    // 64 KiB of room for a disk of 1 MiB.
    let room = host.folder.path("room");
    std::fs::create_dir(&room).unwrap();
    common::mount_tmpfs(&room, 64 << 10);
    let image = room.join("sparse");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    for kind in KINDS {
        let mut guest = host.guest(kind, &disk(&host, "room/sparse"));
        guest.start(0);
        let block = [9; 8 * SECTOR];
        let results: Vec<_> = (0..32).map(|index| transfer(&mut guest, 1, 64 * index, &block)).collect();
        assert!(results.contains(&IO_ERROR) && results.iter().all(|code| *code <= IO_ERROR), "{results:?}");
        assert_eq!(results[0], 0);
        // What was written is there, and the disk goes on.
        assert_eq!(transfer(&mut guest, 0, 0, &[0; SECTOR]), 0);
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn a_driver_is_told_of_what_was_finished_when_its_disk_was_stopped() {
    let host = Host::new();
    let config = host.config();
    let fast = config.devices().find(|device| device.id() == "fast").unwrap();
    for kind in KINDS {
        let opened = fast.open("contract", &mut host::Host::default()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(kind, opened, memory);
        guest.start(F_EVENT_IDX);
        guest.turn();
        host.offer(fast, &mut guest, 1);
        guest.kick(0);
        // Asked for before the disk has seen the request, in whose turn it then is.
        guest.pause();
        assert_eq!((guest.used_index(0), guest.is_interrupted(Some(0))), (1, true), "{kind:?}");
    }
}

#[test]
fn a_generator_whose_host_has_no_random_bytes_stops_and_says_so() {
    let test = || {
        let kind = DEVICES.iter().find(|kind| kind.section == "entropy").unwrap();
        let device = kind.parse(b"{}").unwrap().open("contract", &mut host::Host::default()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(Kind::Mmio, device, memory);
        guest.start(0);
        let room = guest.allocate(&[0; 16]);
        assert_eq!(guest.request(0, &[(room, WRITE)]), 16);
        common::forbid(libc::SYS_getrandom, libc::EPERM);
        guest.offer(0, &[(room, WRITE)]);
        guest.kick(0);
        guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
        let metrics = guest.transport.lock().unwrap().metrics(View::Total);
        assert_eq!((&metrics["entropy_bytes"], &metrics["host_rng_fails"]), (&json!(16), &json!(1)));
        assert_eq!(metrics["event_fails"], 1);
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn a_generator_gives_no_more_than_its_rate_limit_lets_through() {
    const NEVER: u64 = 1 << 40;
    let kind = DEVICES.iter().find(|kind| kind.section == "entropy").unwrap();
    for (limits, done) in [
        (json!({ "bandwidth": { "size": 64, "refill_time": NEVER } }), 2),
        (json!({ "ops": { "size": 3, "refill_time": NEVER } }), 3),
        (json!({ "ops": { "size": 1, "refill_time": NEVER, "one_time_burst": 1 } }), 2),
        (json!({ "bandwidth": { "size": 64, "refill_time": 1 }, "ops": { "size": 1, "refill_time": 1 } }), 8),
        (json!({ "bandwidth": { "size": 0, "refill_time": 0 } }), 8),
        (json!(null), 8),
    ] {
        let body = json!({ "rate_limiter": limits }).to_string();
        let device =
            kind.parse(body.as_bytes()).unwrap().open("contract", &mut host::Host::default()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(Kind::Mmio, device, memory);
        guest.start(0);
        for _ in 0..8 {
            let room = guest.allocate(&[0; 32]);
            guest.offer(0, &[(room, WRITE)]);
        }
        guest.kick(0);
        guest.wait_for(|guest| guest.used_index(0) >= done);
        // What is not let through stays where it is, however often the driver asks.
        for _ in 0..3 {
            guest.kick(0);
            guest.turn();
        }
        assert_eq!(guest.used_index(0), done, "{body}");
        let metrics = guest.transport.lock().unwrap().metrics(View::Total);
        assert_eq!(metrics["entropy_bytes"], json!(32 * u64::from(done)), "{body}");
        let throttled = metrics["entropy_rate_limiter_throttled"].as_u64().unwrap() > 0;
        assert!(throttled || done == 8, "{body}: {metrics:?}");
        // A restore fills no bucket.
        let suspended = guest.suspend();
        let device =
            kind.parse(body.as_bytes()).unwrap().open("contract", &mut alula::host::Host::default()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(Kind::Mmio, device, memory);
        guest.take_over(&suspended).unwrap();
        guest.resume();
        guest.kick(0);
        guest.turn();
        assert_eq!(guest.used_index(0), done, "{body}");
    }
}
