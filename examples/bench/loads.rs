//! The loads: what the guest is told to do, and what the host does meanwhile.

use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::Result;
use crate::host::network::Wire;

pub const HOST: &str = "172.16.0.1";
pub const GUEST: &str = "172.16.0.2";
pub const TAP: &str = "tap0";
/// EtherType for local experiments.
const ETHER_TYPE: u16 = 0x88b5;
/// The ports that the Linux guest knows (examples/guest_io.rs).
const TCP_SINK: u16 = 5001;
const TCP_SOURCE: u16 = 5002;
const UDP_SINK: u16 = 5003;
const UDP_GUEST: u16 = 5004;
/// The host gives its TCP as many bytes at a time as the guest does (examples/guest_io.rs). An emulated host that fills
/// 8 KiB anew for each write is slower than the guest: a frame then carries little more than one such block, has an
/// interrupt of its own, and what is measured is the sender.
const BLOCK: usize = 256 << 10;
/// A TCP segment's payload in a frame of 1514 bytes, with time stamps.
pub const FULL_SEGMENT: f64 = 1448.0;

/// What is counted as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A request of the disk.
    Request,
    /// A frame that the guest sends, or one that it receives: as many as crossed the TAP.
    FrameOut,
    FrameIn,
}

/// What the host sends while a load runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    None,
    Frames(usize),
    Datagrams(usize),
}

/// One row of the table.
pub struct Load {
    pub name: &'static str,
    pub command: &'static str,
    pub unit: Unit,
    pub flood: Flood,
    /// Whether bytes count, rather than requests.
    pub is_bulk: bool,
    /// At most so many system calls a request with the io_uring engine, or a full-size frame.
    pub syscalls_max: Option<f64>,
    /// At most so many exits a request or full-size frame.
    pub exits_max: Option<f64>,
    /// At most so many interrupts a request or full-size frame.
    pub interrupts_max: Option<f64>,
    /// Exits a unit of Firecracker 1.17-dev (MMIO, PCI) and Cloud Hypervisor (PCI), where they were
    /// measured: 1 CPU, 128 MiB, a small kernel.
    pub peers: Option<[f64; 3]>,
}

impl Load {
    /// A number in its command, by its place.
    pub fn number(&self, index: usize) -> Option<u64> {
        self.command.split(' ').nth(index)?.parse().ok()
    }
    /// Its frames may carry many of full size.
    pub fn is_tcp(&self) -> bool {
        self.command.starts_with("tcp")
    }
    /// How often it is run: the run in the middle counts. How the host's scheduler lets the sender of a TCP
    /// connection, the monitor and the guest take turns decides how many frames go together: single runs of one
    /// binary are up to twice apart.
    pub fn runs(&self) -> usize {
        if self.is_tcp() { 5 } else { 1 }
    }
}

const REQUEST: Load = Load {
    name: "",
    command: "",
    unit: Unit::Request,
    flood: Flood::None,
    is_bulk: false,
    syscalls_max: None,
    exits_max: None,
    interrupts_max: None,
    peers: None,
};

/// Under load, by EVENT_IDX.
const EXITS_MAX: Option<f64> = Some(0.2);
/// Of a full-size frame of TCP, which goes with many others in one of the TAP's.
const TCP_EXITS_MAX: Option<f64> = Some(0.08);
const TCP_INTERRUPTS_MAX: Option<f64> = Some(0.02);
/// One system call per 8 requests, and per 2 frames.
const REQUEST_MAX: Option<f64> = Some(0.125);
const FRAME_MAX: Option<f64> = Some(0.5);

/// What the firmware guest does.
pub const FIRMWARE: [Load; 9] = [
    Load { name: "4 KiB read, 1 in flight", command: "read 4096 1 5000", ..REQUEST },
    Load {
        name: "4 KiB read, 32 in flight",
        command: "read 4096 32 20000",
        syscalls_max: REQUEST_MAX,
        exits_max: EXITS_MAX,
        ..REQUEST
    },
    Load { name: "4 KiB read, 85 in flight", command: "read 4096 85 20000", exits_max: EXITS_MAX, ..REQUEST },
    Load {
        name: "4 KiB write, 32 in flight",
        command: "write 4096 32 20000",
        exits_max: EXITS_MAX,
        ..REQUEST
    },
    Load { name: "1 MiB read in sequence", command: "read 1048576 1 500", is_bulk: true, ..REQUEST },
    Load {
        name: "frames of 1514 bytes out",
        command: "send 1514 256 20000",
        unit: Unit::FrameOut,
        is_bulk: true,
        syscalls_max: FRAME_MAX,
        exits_max: EXITS_MAX,
        ..REQUEST
    },
    Load {
        name: "frames of 1514 bytes in",
        command: "receive 1514 256 20000",
        unit: Unit::FrameIn,
        flood: Flood::Frames(1514),
        is_bulk: true,
        syscalls_max: FRAME_MAX,
        exits_max: EXITS_MAX,
        ..REQUEST
    },
    Load {
        name: "frames of 60 bytes out",
        command: "send 60 256 20000",
        unit: Unit::FrameOut,
        exits_max: EXITS_MAX,
        ..REQUEST
    },
    Load {
        name: "frames of 60 bytes in",
        command: "receive 60 256 20000",
        unit: Unit::FrameIn,
        flood: Flood::Frames(60),
        exits_max: EXITS_MAX,
        ..REQUEST
    },
];

/// What a Linux guest does: fewer, as the machine that it runs on may be emulated.
pub const LINUX: [Load; 9] = [
    Load {
        name: "4 KiB read, 1 in flight",
        command: "read 4096 1 2000",
        peers: Some([4.37, 2.79, 2.29]),
        ..REQUEST
    },
    Load {
        name: "4 KiB read, 32 in flight",
        command: "read 4096 32 10000",
        syscalls_max: REQUEST_MAX,
        exits_max: EXITS_MAX,
        peers: Some([0.15, 0.08, 0.09]),
        ..REQUEST
    },
    Load {
        name: "4 KiB read, 128 in flight",
        command: "read 4096 128 10000",
        exits_max: EXITS_MAX,
        ..REQUEST
    },
    Load {
        name: "4 KiB write, 32 in flight",
        command: "write 4096 32 10000",
        exits_max: EXITS_MAX,
        ..REQUEST
    },
    Load {
        name: "1 MiB read in sequence",
        command: "read 1048576 1 300",
        is_bulk: true,
        peers: Some([22.3, 13.5, 3.0]),
        ..REQUEST
    },
    Load {
        name: "bulk TCP out",
        command: "tcp-send 67108864",
        unit: Unit::FrameOut,
        is_bulk: true,
        syscalls_max: FRAME_MAX,
        exits_max: TCP_EXITS_MAX,
        interrupts_max: TCP_INTERRUPTS_MAX,
        ..REQUEST
    },
    Load {
        name: "bulk TCP in",
        command: "tcp-receive 67108864",
        unit: Unit::FrameIn,
        is_bulk: true,
        syscalls_max: FRAME_MAX,
        exits_max: TCP_EXITS_MAX,
        interrupts_max: TCP_INTERRUPTS_MAX,
        ..REQUEST
    },
    Load {
        name: "UDP packets of 64 bytes out",
        command: "udp-send 64 1 10000",
        unit: Unit::FrameOut,
        ..REQUEST
    },
    Load {
        name: "UDP packets of 64 bytes in",
        command: "udp-receive 64 1 10000",
        unit: Unit::FrameIn,
        flood: Flood::Datagrams(64),
        ..REQUEST
    },
];

/// The other ends of the guests' connections, for as long as the bench runs.
pub fn serve_guests() -> Result<()> {
    let (sink, source) = (TcpListener::bind((HOST, TCP_SINK))?, TcpListener::bind((HOST, TCP_SOURCE))?);
    // Bound, so that nobody answers that there is nobody; never read.
    let datagrams = UdpSocket::bind((HOST, UDP_SINK))?;
    std::thread::spawn(move || {
        let _datagrams = datagrams;
        for stream in sink.incoming().flatten() {
            let _ = std::io::copy(&mut { stream }, &mut std::io::sink());
        }
    });
    std::thread::spawn(move || {
        let block = vec![0x5a; BLOCK];
        for mut stream in source.incoming().flatten() {
            // Until the guest has enough.
            while stream.write_all(&block).is_ok() {}
        }
    });
    Ok(())
}

/// Sends to the guest until it is dropped: more than the guest takes, what is too much is lost.
pub struct Sender {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sender {
    pub fn start(flood: Flood) -> Result<Self> {
        let mut send: Box<dyn FnMut() + Send> = match flood {
            Flood::None => return Ok(Self { stop: Arc::default(), thread: None }),
            Flood::Frames(size) => {
                let mut frame = vec![0; size];
                frame[0] = 2;
                frame[6] = 2;
                frame[12..14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
                let wire = Wire::new(TAP, ETHER_TYPE);
                Box::new(move || wire.send(&frame))
            }
            Flood::Datagrams(size) => {
                let (socket, payload) = (UdpSocket::bind((HOST, 0))?, vec![0; size]);
                Box::new(move || drop(socket.send_to(&payload, (GUEST, UDP_GUEST))))
            }
        };
        let stop: Arc<AtomicBool> = Arc::default();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                (0..64).for_each(|_| send());
                // The guest's host needs a processor, too.
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Frames that the TAP has carried: (from the guest, to the guest).
pub fn frames() -> Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix(TAP)?.strip_prefix(':'));
    let fields = line.ok_or("the TAP is gone")?.split_whitespace().map(str::parse);
    let fields = fields.collect::<Result<Vec<u64>, _>>()?;
    Ok((fields[1], fields[9]))
}
