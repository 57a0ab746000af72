//! Runs inside a Linux guest that `scripts/bench io` or `vsock` measures: does what comes on standard input, a
//! command a line, and answers `done` and how often.
//! - `read|write BYTES DEPTH COUNT`: requests of the first disk, DEPTH of them in flight; at random places,
//!   or one after the other from 1 MiB on. Linux's AIO past the page cache: each batch is submitted at once.
//! - `tcp-send|tcp-receive BYTES`, `udp-send|udp-receive BYTES DEPTH COUNT`: to and from the host.
//! - `vsock-send|vsock-receive BYTES`, `vsock-echo COUNT`: to and from the host's ports, bytes of the host's, one after
//!   the other, sent back.
//! - `vsock-open COUNT`: connections to the host, kept until `vsock-close`.
//! - `agent`: starts the agent that lies beside this program.
//! - `end`.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const DISK: &str = "/dev/vda";
const HOST: &str = "172.16.0.1";
const TCP_SINK: u16 = 5001;
const TCP_SOURCE: u16 = 5002;
const UDP_SINK: u16 = 5003;
const UDP_GUEST: u16 = 5004;
/// The host's ports (examples/bench/vsock.rs).
const VSOCK_SINK: u32 = 5001;
const VSOCK_SOURCE: u32 = 5002;
const VSOCK_PINGER: u32 = 5003;
const VSOCK_KEEPER: u32 = 5004;
const VSOCK_BLOCK: usize = 64 << 10;
/// The files beside this program where vsock is measured: the agent, and modules in the order to load them.
const AGENT: &str = "/bench/alula";
const MODULES: [&str; 3] = [
    "/bench/modules/vsock.ko",
    "/bench/modules/vmw_vsock_virtio_transport_common.ko",
    "/bench/modules/vmw_vsock_virtio_transport.ko",
];
/// From this size on, requests go one after the other.
const SEQUENTIAL: u64 = 1 << 20;

fn main() -> Result<()> {
    for module in MODULES {
        if let Ok(file) = File::open(module) {
            alula::sys::machine::load_module(&file, false)?;
        }
    }
    println!("bench: ready");
    let mut kept = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let value = |index: usize| words.get(index).and_then(|word| word.parse().ok()).unwrap_or(1_u64);
        let done = match words.first().copied().unwrap_or_default() {
            "read" => disk(IOCB_CMD_PREAD, value(1), value(2), value(3)),
            "write" => disk(IOCB_CMD_PWRITE, value(1), value(2), value(3)),
            "tcp-send" => tcp_send(value(1)),
            "tcp-receive" => tcp_receive(value(1)),
            "udp-send" => udp_send(value(1), value(3)),
            "udp-receive" => udp_receive(value(3)),
            "vsock-send" => vsock_send(value(1)),
            "vsock-receive" => vsock_receive(value(1)),
            "vsock-echo" => vsock_echo(value(1)),
            "vsock-open" => vsock_open(value(1), &mut kept),
            "vsock-close" => {
                kept.clear();
                Ok(0)
            }
            "agent" => {
                let mut command = std::process::Command::new(AGENT);
                // The agent's output is not an answer of this program.
                let quiet = std::process::Stdio::null;
                command.arg("agent").stdin(quiet()).stdout(quiet()).stderr(quiet());
                command.spawn().map(|_| 1).map_err(Into::into)
            }
            "end" => break,
            _ => Err("there is no such command".into()),
        };
        match done {
            Ok(count) => println!("done {count}"),
            Err(error) => println!("cannot: {error}"),
        }
    }
    Ok(())
}

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_CMD_PWRITE: u16 = 1;

/// struct iocb of linux/aio_abi.h.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Request {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: [u64; 2],
}

/// struct io_event.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

fn disk(opcode: u16, bytes: u64, depth: u64, count: u64) -> Result<u64> {
    let mut options = File::options();
    let file = options.read(true).write(opcode == IOCB_CMD_PWRITE).custom_flags(libc::O_DIRECT).open(DISK)?;
    let sectors: u64 = std::fs::read_to_string("/sys/block/vda/size")?.trim().parse()?;
    let places = sectors * 512 / bytes;
    let layout = std::alloc::Layout::from_size_align((bytes * depth) as usize, 4096)?;
    // SAFETY: the size is not 0; the memory lives as long as the process.
    let memory = unsafe { std::alloc::alloc_zeroed(layout) } as u64;
    let mut place = 1_u64;
    let mut prepare = |request: &mut Request, index: u64| {
        let random = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        place = if bytes < SEQUENTIAL { random } else { place + (1 << 33) };
        let offset = ((place >> 33) % places * bytes) as i64;
        let (file, buffer) = (file.as_raw_fd() as u32, memory + index * bytes);
        *request = Request { data: index, opcode, file, buffer, bytes, offset, ..Request::default() };
    };
    let mut requests = vec![Request::default(); depth as usize];
    let mut batch: Vec<u64> = (0..depth.min(count)).collect();
    let mut events = vec![Event::default(); depth as usize];
    let mut context = 0_u64;
    let check =
        |result: i64| if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result as usize) };
    // SAFETY: the call writes a number; the context is destroyed below.
    check(unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) })?;
    let (mut offered, mut done) = (0, 0);
    let mut run = || -> Result<u64> {
        while done < count {
            let mut pointers = Vec::with_capacity(batch.len());
            for index in batch.drain(..) {
                prepare(&mut requests[index as usize], index);
                pointers.push(&raw mut requests[index as usize]);
                offered += 1;
            }
            let mut rest = &pointers[..];
            while !rest.is_empty() {
                // SAFETY: the requests and their buffers live until they are done.
                let taken =
                    check(unsafe { libc::syscall(libc::SYS_io_submit, context, rest.len(), rest.as_ptr()) })?;
                rest = &rest[taken..];
            }
            // SAFETY: the call writes at most as many events as there is room for.
            let got = check(unsafe {
                libc::syscall(libc::SYS_io_getevents, context, 1, events.len(), events.as_mut_ptr(), 0)
            })?;
            for event in &events[..got] {
                if event.result != bytes as i64 {
                    return Err(format!("a request ended with {}", event.result).into());
                }
                done += 1;
                if offered + (batch.len() as u64) < count {
                    batch.push(event.data);
                }
            }
        }
        Ok(done)
    };
    let result = run();
    // SAFETY: the context was set up above; nobody uses it any more. The memory is that of `layout`.
    unsafe {
        libc::syscall(libc::SYS_io_destroy, context);
        std::alloc::dealloc(memory as *mut u8, layout);
    }
    result
}

fn tcp_send(bytes: u64) -> Result<u64> {
    let mut stream = TcpStream::connect((HOST, TCP_SINK))?;
    let block = vec![0x5a; 256 << 10];
    let mut left = bytes as usize;
    while left > 0 {
        left -= stream.write(&block[..left.min(block.len())])?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The transfer is done when the other side has all bytes.
    let _ = stream.read(&mut [0])?;
    Ok(bytes)
}

fn tcp_receive(bytes: u64) -> Result<u64> {
    let mut stream = TcpStream::connect((HOST, TCP_SOURCE))?;
    let mut block = vec![0; 256 << 10];
    let mut got = 0;
    while got < bytes {
        got += stream.read(&mut block)? as u64;
    }
    Ok(got)
}

fn udp_send(bytes: u64, count: u64) -> Result<u64> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let datagram = vec![0x5a; bytes as usize];
    for _ in 0..count {
        socket.send_to(&datagram, (HOST, UDP_SINK))?;
    }
    Ok(count)
}

fn udp_receive(count: u64) -> Result<u64> {
    let socket = UdpSocket::bind(("0.0.0.0", UDP_GUEST))?;
    let mut datagram = [0; 2048];
    for _ in 0..count {
        socket.recv(&mut datagram)?;
    }
    Ok(count)
}

/// A connection to a port of the host.
fn vsock(port: u32) -> Result<File> {
    // SAFETY: the calls read an address of the size that they are told; the descriptor is nobody else's.
    unsafe {
        let socket = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        (address.svm_cid, address.svm_port) = (libc::VMADDR_CID_HOST, port);
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        if libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) != 0 {
            return Err(format!("connect to port {port}: {}", std::io::Error::last_os_error()).into());
        }
        Ok(socket.into())
    }
}

fn vsock_send(bytes: u64) -> Result<u64> {
    let mut stream = vsock(VSOCK_SINK)?;
    let block = vec![0x5a; VSOCK_BLOCK];
    let mut left = bytes as usize;
    while left > 0 {
        left -= stream.write(&block[..left.min(block.len())])?;
    }
    // SAFETY: the call has no memory.
    unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) };
    // The transfer is done when the other side has all bytes.
    let _ = stream.read(&mut [0])?;
    Ok(bytes)
}

fn vsock_receive(bytes: u64) -> Result<u64> {
    let mut stream = vsock(VSOCK_SOURCE)?;
    let mut block = vec![0; VSOCK_BLOCK];
    let mut got = 0;
    while got < bytes {
        got += stream.read(&mut block)? as u64;
    }
    Ok(got)
}

fn vsock_echo(count: u64) -> Result<u64> {
    let mut stream = vsock(VSOCK_PINGER)?;
    let mut byte = [0];
    for _ in 0..count {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
    Ok(count)
}

fn vsock_open(count: u64, kept: &mut Vec<File>) -> Result<u64> {
    let limit = libc::rlimit { rlim_cur: count + 100, rlim_max: count + 100 };
    // SAFETY: the call reads a structure.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    for _ in 0..count {
        kept.push(vsock(VSOCK_KEEPER)?);
    }
    Ok(count)
}
