//! What every virtio device promises, behind both transports: it negotiates, runs, stops without a trace,
//! catches up, goes on in a machine built anew, and is like new after a reset.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod balloon;
#[path = "../common/mod.rs"]
mod common;
mod consoles;
mod hotplug;
#[cfg(target_arch = "x86_64")]
mod masks;
mod of_the_host;
mod pmem;
mod ports;
mod rings;
mod sizes;
mod slots;
mod stops;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use alula::config::Config;
use alula::devices::KINDS;
use alula::devices::block;
use alula::devices::kind::ConfiguredDevice;
use alula::error::Result;
use alula::host;
use alula::memory;
use alula::metrics::View;
use alula::snapshot::Snapshot;
use alula::virtio::queue::DESCRIPTORS_PER_TURN;
use alula::virtio::transport::Transport;
use alula::virtio::{Io, Queue, Registrar, VirtioDevice, Worker};
use common::driver::{
    self, DRIVER_OK, F_EVENT_IDX, F_VERSION_1, FEATURES_OK, Guest, INDIRECT, NEEDS_RESET, NEXT, TRANSPORTS,
    TransportKind, WRITE,
};
use common::network::{self, Wire};
use common::vsock::{EVENT, Packet, RST, RW};
use common::{Folder, wait_for};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const SECTOR: usize = 512;
const RX: usize = 0;
const TX: usize = 1;
/// Queues of the balloon, and the size of its pages.
const INFLATE: usize = 0;
const STATISTICS: usize = 2;
const PAGE: u64 = 4096;
/// EtherType for local experiments.
const ETHER_TYPE: u16 = 0x88b5;
const NET_HEADER: usize = 12;

/// The devices' surroundings: a disk image and a network of the test's own. One test at a time: a program
/// that another one starts would for a moment, as a copy of this process, have the image open too.
struct Host {
    folder: Folder,
    wire: Wire,
    terminal: consoles::Terminal,
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
        folder.write("pmem", vec![0; 4096]);
        let (wire, terminal) = (Wire::new("tap0", ETHER_TYPE), consoles::Terminal::default());
        Self { folder, wire, terminal, _alone: alone }
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
            "pmem": [{
                "id": "pmem",
                "path_on_host": self.folder.path("pmem"),
                "rate_limiter": { "ops": { "size": 1000, "refill_time": 10 } },
            }],
            "balloon": {
                "amount_mib": 1,
                "deflate_on_oom": true,
                "stats_polling_interval_s": 3600,
                "free_page_hinting": true,
                "free_page_reporting": true,
            },
            "memory-hotplug": { "total_size_mib": 256 },
            "console": {},
            "ports": [{ "id": "port", "name": "org.port", "uds_path": self.folder.path("port") }],
        });
        let config = Config::parse(config.to_string().as_bytes()).unwrap();
        // Of a device whose work another process does, there is but what that has to say (tests/vhost_user).
        for kind in KINDS.iter().filter(|kind| kind.section != "vhost-user") {
            let lists = |device: &ConfiguredDevice| device.kind() == kind;
            assert!(config.devices().any(lists), "teach this test a configuration with `{}`", kind.section);
        }
        config
    }

    fn guest(&self, kind: TransportKind, device: &ConfiguredDevice) -> Guest {
        let opened = device.open("contract", &mut host::Host::default()).unwrap();
        if is_net(device) {
            self.wire.settle("tap0");
        }
        self.terminal.connect(&*opened);
        Guest::new(kind, opened)
    }

    /// Does `test` with every device behind every transport.
    fn each(&self, mut test: impl FnMut(&Self, TransportKind, &ConfiguredDevice)) {
        let config = self.config();
        let mut count = 0;
        for device in config.devices() {
            for kind in TRANSPORTS {
                println!("{} behind {kind:?}", device.name());
                test(self, kind, device);
                count += 1;
            }
        }
        assert!(count >= 6, "only {count} combinations");
    }

    /// Offers the device its typical request, and says how to see that it was done. A new device is
    /// taught here how it is used: the tests fail without.
    fn offer(&self, device: &ConfiguredDevice, guest: &mut Guest, round: u8) -> Check {
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
                // A packet that belongs to no connection is refused.
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
            "balloon" => {
                // A page that nothing else is in.
                let page = driver::MEMORY - PAGE;
                guest.fill(page, PAGE, round | 1);
                let numbers = guest.allocate(&((page / PAGE) as u32).to_le_bytes());
                guest.offer(INFLATE, &[(numbers, 0)]);
                Check::GivenBack { page }
            }
            "pmem" => {
                let flush = guest.allocate(&pmem::FLUSH.to_le_bytes());
                let answer = guest.allocate(&[0xff; 4]);
                guest.offer(0, &[(flush, 0), (answer, WRITE)]);
                Check::Flushed { answer }
            }
            "memory-hotplug" => {
                let request = guest.allocate(&hotplug::request(hotplug::UNPLUG_ALL, 0, 0));
                let answer = guest.allocate(&[0xff; 10]);
                guest.offer(0, &[(request, 0), (answer, WRITE)]);
                Check::Unplugged { answer }
            }
            "console" => Check::Typed(consoles::offer(guest, round)),
            "ports" => Check::Typed(ports::offer(guest, round, self.folder.path("port"))),
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
                // A frame goes in, with the number of the round inverted.
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
                        // The driver is told that its connections are gone, and listens again.
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
            Check::GivenBack { page } => {
                guest.next_used(INFLATE);
                assert!(
                    guest.bytes((page, PAGE as u32)).iter().all(|byte| *byte == 0),
                    "it was not given back"
                );
            }
            Check::Flushed { answer } => {
                assert_eq!(guest.next_used(0).1, 4);
                assert_eq!(guest.bytes(answer), [0; 4], "the flush was refused");
            }
            Check::Unplugged { answer } => {
                assert_eq!(guest.next_used(0).1, 10);
                assert_eq!(guest.bytes(answer), [0; 10], "the request was refused");
            }
            Check::Typed(offered) => self.terminal.check(guest, &offered),
            Check::Random { bytes } => {
                assert_eq!(guest.next_used(0).1, 64);
                assert_ne!(guest.bytes(bytes), [0; 64]);
            }
        }
    }

    fn exercise(&self, device: &ConfiguredDevice, guest: &mut Guest, round: u8) {
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
    Typed(consoles::Offered),
    Refused { round: u8, room: (u64, u32) },
    GivenBack { page: u64 },
    Flushed { answer: (u64, u32) },
    Unplugged { answer: (u64, u32) },
}

fn is_net(device: &ConfiguredDevice) -> bool {
    device.kind().section == "network-interfaces"
}

/// Whether a device keeps the last buffer of this queue, whatever it says.
fn keeps(device: &ConfiguredDevice, queue: usize) -> bool {
    device.kind().section == "balloon" && queue == STATISTICS
}

/// Whether buffers of this queue wait for what comes from outside.
fn waits(device: &ConfiguredDevice, queue: usize) -> bool {
    match device.kind().section {
        "network-interfaces" => queue == RX,
        "vsock" => queue != TX,
        "console" => queue == RX,
        _ if ports::is_unseen(device, queue) => true,
        _ => keeps(device, queue),
    }
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
    let open =
        |device: &ConfiguredDevice, name: &str| device.open(name, &mut alula::host::Host::default()).unwrap();
    let memory = || memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    Host::new().each(|_, kind, device| {
        let sizes = open(device, "contract").queue_sizes().to_vec();
        for (queue, max) in sizes.into_iter().enumerate().filter(|(queue, _)| !waits(device, *queue)) {
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
