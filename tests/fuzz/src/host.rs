//! What devices need of the host: a disk without a file system, a network of its own. Opened once; each
//! input finds it as it was.

use std::cell::Cell;
use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use alula::config::Config;
use alula::descriptors::Named;
use alula::devices::KINDS;
use alula::devices::kind::ConfiguredDevice;
use alula::error::Result;
use alula::host::tap::Tap;
use alula::host::{Access, Resource};
use alula::log;
use alula::virtio::VirtioDevice;
use serde_json::{Value, json};

use crate::driver::{self, Guest, TransportKind, WRITE};
use crate::ground;
use crate::network::{self, Wire};
use crate::vsock;

pub const SECTOR: usize = 512;
pub const SECTORS: usize = 64;
pub const RX: usize = 0;
pub const TX: usize = 1;
/// EtherType for local experiments.
const ETHER_TYPE: u16 = 0x88b5;
const NET_HEADER: usize = 12;

/// Where the disk and what is beneath it are said to be: names that there are, of files that are not opened.
pub const DISK: &str = "/dev/null";
pub const BASE_NAME: &str = "zero";
const BASE_PATH: &str = "/dev/zero";
const TAP: &str = "tap0";
/// What all of the latter is.
pub const BASE: u8 = 0x33;

/// Where programs of the host connect to.
pub fn socket() -> PathBuf {
    std::env::temp_dir().join(format!("alula-fuzz-{}", std::process::id()))
}

/// The same of the port.
fn port() -> PathBuf {
    std::env::temp_dir().join(format!("alula-fuzz-port-{}", std::process::id()))
}

pub struct Host {
    disk: File,
    base: File,
    /// One for each queue pair.
    taps: [File; 2],
    pub wire: Wire,
    pub devices: Vec<ConfiguredDevice>,
    /// Inputs so far, and the descriptors that were open after the first one.
    inputs: Cell<u64>,
    descriptors: Cell<usize>,
}

thread_local! {
    static HOST: Host = Host::new();
}

/// Does `run` with the host as it always is, and looks that nothing of it is left.
pub fn with(run: impl FnOnce(&Host)) {
    HOST.with(|host| {
        host.renew();
        run(host);
        host.account();
    });
}

impl Host {
    fn new() -> Self {
        // Errors that guests cause are expected by the thousand.
        let log = log::Config { log_path: Some("/dev/null".into()), ..Default::default() };
        log::configure("fuzz", &log).unwrap();
        // What all inputs share is there before descriptors are counted.
        driver::vm();
        network::enter();
        // The host says nothing by itself.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        let taps = [0; 2].map(|_| network::open_tap(TAP, network::TAP | libc::IFF_MULTI_QUEUE));
        crate::output("ip", &["addr", "add", "172.16.0.1/24", "dev", TAP]);
        crate::output("ip", &["link", "set", TAP, "up"]);
        let (disk, base) = (memory_file(), memory_file());
        base.write_all_at(&[BASE; SECTORS * SECTOR], 0).unwrap();
        let wire = Wire::new(TAP, ETHER_TYPE);
        wire.settle(TAP);
        let devices = devices();
        let host =
            Self { disk, base, taps, wire, devices, inputs: Cell::default(), descriptors: Cell::default() };
        drop(host.taps());
        host
    }

    fn renew(&self) {
        self.disk.set_len(0).unwrap();
        self.disk.set_len((SECTORS * SECTOR) as u64).unwrap();
        self.discard();
    }

    /// Drops what is on the wire.
    fn discard(&self) {
        let mut frame = [0; 2048];
        for mut tap in &self.taps {
            while tap.read(&mut frame).is_ok() {}
        }
        self.wire.discard();
    }

    /// Now and then: no descriptor was left open.
    fn account(&self) {
        let inputs = self.inputs.replace(self.inputs.get() + 1);
        if inputs.is_multiple_of(256) {
            let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let open = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
            // The fuzzer talks to its symbolizer by pipes.
            let is_ours = |path: &PathBuf| {
                !path.to_string_lossy().starts_with("pipe:") && path != Path::new("/dev/null")
            };
            let open: Vec<_> = open.filter(is_ours).collect();
            if inputs == 0 {
                self.descriptors.set(open.len());
            }
            assert!(open.len() <= self.descriptors.get(), "descriptors leak: {open:?}");
        }
    }

    /// Makes the disk this image.
    pub fn put_disk(&self, image: &[u8]) {
        self.disk.set_len(0).unwrap();
        self.disk.write_all_at(image, 0).unwrap();
    }

    /// How many bytes the disk takes of the host.
    pub fn disk_usage(&self) -> u64 {
        self.disk.metadata().unwrap().blocks() * SECTOR as u64
    }

    /// How long the disk's file is, holes and all.
    pub fn disk_length(&self) -> u64 {
        self.disk.metadata().unwrap().len()
    }

    /// One for each queue pair. They do not block from here on.
    fn taps(&self) -> Vec<Tap> {
        let numbers: Vec<_> = self.taps.iter().map(|tap| network::hand_over(tap).to_string()).collect();
        Tap::open(&format!("fd:{}", numbers.join(":")), self.taps.len()).unwrap()
    }

    /// The host as `device` sees it: what is open here, instead of what is at its paths.
    fn lent(&self, device: &ConfiguredDevice) -> alula::host::Host {
        let mut host = alula::host::Host::default();
        match device.kind().section {
            "drives" => {
                let file = |path: &str, access: Access, file: &File| Resource::File {
                    path: path.into(),
                    access,
                    file: Named::new("disk", file.try_clone().unwrap()),
                };
                for access in [Access::Read, Access::ReadWrite] {
                    host.give(device.name(), file(DISK, access, &self.disk));
                }
                host.give(device.name(), file(BASE_PATH, Access::Read, &self.base));
            }
            "pmem" => {
                let file = Named::new("pmem", self.disk.try_clone().unwrap());
                let resource = Resource::File { path: DISK.into(), access: Access::ReadWrite, file };
                host.give(device.name(), resource);
            }
            "network-interfaces" => {
                host.give(device.name(), Resource::Tap { name: TAP.to_owned(), queues: self.taps() });
            }
            _ => {}
        }
        host
    }

    pub fn try_open(&self, device: &ConfiguredDevice) -> Result<Box<dyn VirtioDevice>> {
        device.open("fuzz", &mut self.lent(device))
    }

    pub fn open(&self, device: &ConfiguredDevice) -> Box<dyn VirtioDevice> {
        self.try_open(device).unwrap()
    }

    /// A machine with that device, and memory full of zeros.
    pub fn guest(&self, kind: TransportKind, device: &ConfiguredDevice) -> Guest {
        Guest::by_hand(kind, self.open(device), ground::memory())
    }

    /// Another one over the same memory, as it is.
    pub fn guest_anew(&self, device: &ConfiguredDevice, old: Guest) -> Guest {
        let (kind, memory) = (old.kind(), old.memory.clone());
        drop(old);
        Guest::by_hand(kind, self.open(device), memory)
    }

    /// A request as a sound driver makes it, and its answer: the device works. A new device is taught
    /// here how it is used.
    pub fn exercise(&self, device: &ConfiguredDevice, guest: &mut Guest) {
        guest.notes.allocated = 0;
        match device.kind().section {
            "drives" => self.exercise_disk(device, guest),
            "network-interfaces" => self.exercise_net(guest),
            "vsock" => self.exercise_vsock(guest),
            "entropy" => {
                let bytes = guest.allocate(&[0; 64]);
                assert_eq!(guest.request(0, &[(bytes, WRITE)]), 64);
                assert_ne!(guest.bytes(bytes), [0; 64]);
            }
            "balloon" => {
                let page = 2 * driver::MEMORY;
                guest.fill(page, 4096, 7);
                let number = guest.allocate(&((page / 4096) as u32).to_le_bytes());
                guest.request(0, &[(number, 0)]);
                assert_eq!(guest.bytes((page, 4096)), [0; 4096]);
            }
            "pmem" => {
                let (flush, answer) = (guest.allocate(&[0; 4]), guest.allocate(&[0xff; 4]));
                assert_eq!(guest.request(0, &[(flush, 0), (answer, WRITE)]), 4);
                assert_eq!(guest.bytes(answer), [0; 4], "the flush was refused");
            }
            "memory-hotplug" => {
                let request = guest.allocate(&[&[2][..], &[0; 23]].concat());
                let answer = guest.allocate(&[0xff; 10]);
                assert_eq!(guest.request(0, &[(request, 0), (answer, WRITE)]), 10);
                assert_eq!(guest.bytes(answer), [0; 10], "the request was refused");
            }
            "console" => {
                let said = guest.allocate(b"said");
                assert_eq!(guest.request(1, &[(said, 0)]), 0);
            }
            "ports" => {
                let message = guest.allocate(&[0; 8]);
                assert_eq!(guest.request(3, &[(message, 0)]), 0);
            }
            other => panic!("teach this how a device of `{other}` is used"),
        }
    }

    fn exercise_disk(&self, device: &ConfiguredDevice, guest: &mut Guest) {
        let is_read_only = device.config::<alula::devices::block::Config>().unwrap().is_read_only;
        let sector = 5;
        let mut header = [0; 16];
        header[8] = sector as u8;
        if !is_read_only {
            let out = guest.allocate(&[&[1], &header[1..]].concat());
            let (data, status) = (guest.allocate(&[0x5a; SECTOR]), guest.allocate(&[0xff]));
            guest.request(0, &[(out, 0), (data, 0), (status, WRITE)]);
            assert_eq!(guest.bytes(status), [0], "the disk refused a write");
        }
        let header = guest.allocate(&header);
        let (data, status) = (guest.allocate(&[0; SECTOR]), guest.allocate(&[0xff]));
        assert_eq!(guest.request(0, &[(header, 0), (data, WRITE), (status, WRITE)]), SECTOR as u32 + 1);
        assert_eq!(guest.bytes(status), [0], "the disk refused a read");
        let mut expected = [0x5a; SECTOR];
        if is_read_only {
            self.disk.read_exact_at(&mut expected, (sector * SECTOR) as u64).unwrap();
        }
        assert_eq!(guest.bytes(data), expected);
    }

    fn exercise_net(&self, guest: &mut Guest) {
        self.discard();
        let mut frame = vec![0; NET_HEADER + 60];
        frame[NET_HEADER..NET_HEADER + 6].fill(0xff);
        frame[NET_HEADER + 6..NET_HEADER + 12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame[NET_HEADER + 12..NET_HEADER + 14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
        frame[NET_HEADER + 14] = 77;
        let out = guest.allocate(&frame);
        guest.request(TX, &[(out, 0)]);
        assert_eq!(self.wire.receive()[14], 77, "another frame came out");
        let room = guest.allocate(&[0; NET_HEADER + 1514]);
        guest.offer(RX, &[(room, WRITE)]);
        guest.kick(RX);
        self.send(&[78]);
        guest.next_used(RX);
        assert_eq!(guest.bytes(room)[NET_HEADER + 14], 78, "another frame came in");
    }

    /// What is no connection is refused, and a driver that is told that its connections are gone listens again.
    fn exercise_vsock(&self, guest: &mut Guest) {
        let packet = vsock::Packet::new(vsock::RW, 5, 6);
        let (out, room) = (guest.allocate(&packet.bytes()), guest.allocate(&[0; 64]));
        let event = guest.allocate(&[0; 4]);
        guest.offer(vsock::EVENT, &[(event, WRITE)]);
        guest.offer(RX, &[(room, WRITE)]);
        guest.request(TX, &[(out, 0)]);
        guest.wait_for(|guest| {
            if guest.has_used(vsock::EVENT) {
                guest.next_used(vsock::EVENT);
                guest.offer(vsock::EVENT, &[(event, WRITE)]);
                guest.kick(vsock::EVENT);
            }
            guest.has_used(RX)
        });
        guest.next_used(RX);
        let packet = vsock::Packet::parse(&guest.bytes(room));
        assert_eq!((packet.op, packet.from_port, packet.to_port), (vsock::RST, 6, 5));
    }

    /// Puts a frame on the wire.
    pub fn send(&self, payload: &[u8]) {
        let mut frame = vec![0xff; 14];
        frame[12..].copy_from_slice(&ETHER_TYPE.to_be_bytes());
        frame.extend(payload);
        frame.truncate(1514);
        frame.resize(frame.len().max(60), 0);
        self.wire.send(&frame);
    }
}

/// A file without a file system.
fn memory_file() -> File {
    // SAFETY: the call makes a descriptor, which is ours.
    unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) }
}

/// Every kind of device, and what of its configuration makes another device of it.
fn devices() -> Vec<ConfiguredDevice> {
    let disk = |id: &str, more: Value| {
        let mut disk = json!({"drive_id": id, "path_on_host": DISK, "is_root_device": false});
        disk.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        disk
    };
    let config = json!({
        "drives": [
            disk("disk", json!({ "cache_type": "Writeback" })),
            disk("fixed", json!({ "is_read_only": true })),
            disk("fast", json!({ "io_engine": "Async", "num_queues": 2, "cache_type": "Writeback" })),
        ],
        "network-interfaces": [{ "iface_id": "net", "host_dev_name": TAP, "mtu": 1500, "queue_pairs": 2 }],
        "entropy": {},
        "vsock": { "guest_cid": vsock::CID, "uds_path": socket() },
        "pmem": [{ "id": "pmem", "path_on_host": DISK }],
        "balloon": {
            "amount_mib": 1,
            "deflate_on_oom": true,
            "stats_polling_interval_s": 3600,
            "free_page_hinting": true,
            "free_page_reporting": true,
        },
        "memory-hotplug": { "total_size_mib": 512 },
        "console": {},
        "ports": [{ "id": "port", "uds_path": port() }],
    });
    let config = Config::parse(config.to_string().as_bytes()).unwrap();
    // A device whose work another process does has a target of its own (vhost_user).
    for kind in KINDS.iter().filter(|kind| kind.section != "vhost-user") {
        let lists = |device: &ConfiguredDevice| device.kind() == kind;
        assert!(config.devices().any(lists), "teach this a configuration with `{}`", kind.section);
    }
    config.devices().cloned().collect()
}
