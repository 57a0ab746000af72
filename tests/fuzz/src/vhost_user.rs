//! The answers of a vhost-user backend, right ones among any others. Whatever they are, what is asked of the backend ends
//! by an answer or by an error after which nothing more is asked of it, and its configuration is as long as it must be.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use alula::host::vhost_user::{Backend, Ring};
use arbitrary::{Result, Unstructured};
use vm_memory::GuestAddress;

/// The size of a disk's configuration.
const CONFIG: usize = 60;
const HEADER: usize = 12;
const BODY_MAX: usize = 4096;
/// Requests that are answered by numbers: features, features of the protocol, how many queues.
const NUMBERS: [u32; 3] = [1, 15, 17];
const GET_VRING_BASE: u32 = 11;
const GET_CONFIG: u32 = 24;
const IS_ANSWER: u32 = 5;
const WANTS_ANSWER: u32 = 8;
/// What a right backend says that it can do: virtio 1, features of the protocol; queues, answers, configuration.
const FEATURES: u64 = 1 << 32 | 1 << 30;
const PROTOCOL: u64 = 1 << 9 | 1 << 3 | 1;

pub fn run(bytes: &[u8]) {
    let path = path();
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let answers = bytes.to_vec();
    let backend = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Unstructured::new(&answers);
        while answer(&mut stream, &mut bytes).unwrap_or(false) {}
    });
    if let Ok(mut met) = Backend::meet("disk `fuzz`", &path, CONFIG) {
        let mut is_lost = work(&mut met).is_err();
        assert_eq!(met.is_lost(), is_lost);
        is_lost |= met.read_config().is_err();
        assert_eq!((met.is_lost(), met.config().len()), (is_lost, CONFIG));
        if is_lost {
            assert!(met.look().is_err() && met.stop(0, Instant::now()).is_err());
        }
    }
    backend.join().unwrap();
    std::fs::remove_file(&path).unwrap();
}

fn path() -> PathBuf {
    std::env::temp_dir().join(format!("alula-fuzz-{}-backend", std::process::id()))
}

/// Starts a queue, writes to the configuration, and stops the queue.
fn work(met: &mut Backend) -> alula::error::Result<()> {
    let event = File::open("/dev/null").unwrap();
    let places = [0x1000, 0x2000, 0x3000].map(GuestAddress);
    let ring = Ring { index: 0, size: 16, next: 0, places, kick: &event, call: Some(&event) };
    met.note_inflight(1, 16)?;
    met.start(met.features(), &[], &[ring])?;
    met.write_config(32, &[1])?;
    met.stop(0, Instant::now() + Duration::from_secs(30))?;
    met.look()
}

/// Takes a request and answers it as the bytes say. Returns whether the connection goes on; an error: the bytes have ended.
fn answer(stream: &mut UnixStream, bytes: &mut Unstructured<'_>) -> Result<bool> {
    let mut head = [0; HEADER];
    if stream.read_exact(&mut head).is_err() {
        return Ok(false);
    }
    let [request, flags, size] = [0, 4, 8].map(|at| u32::from_le_bytes(head[at..at + 4].try_into().unwrap()));
    let mut body = vec![0; size as usize];
    assert!(body.len() <= BODY_MAX && stream.read_exact(&mut body).is_ok());
    let wants = flags & WANTS_ANSWER != 0;
    let is_question = wants || NUMBERS.contains(&request) || [GET_VRING_BASE, GET_CONFIG].contains(&request);
    let right = match request {
        1 => FEATURES.to_le_bytes().to_vec(),
        15 => PROTOCOL.to_le_bytes().to_vec(),
        17 => 4_u64.to_le_bytes().to_vec(),
        GET_VRING_BASE | GET_CONFIG => body,
        _ => vec![0; 8],
    };
    let mut head = [request, IS_ANSWER, right.len() as u32];
    let kind = bytes.arbitrary::<u8>()?;
    let body = match kind {
        // Nobody waits for an answer, but one may come.
        0..16 => bytes.arbitrary::<[u8; 20]>()?.to_vec(),
        _ if !is_question => return Ok(true),
        16..64 => {
            let length = usize::from(bytes.arbitrary::<u16>()?) % 400;
            // A long answer needs no long input, which comes late: what is missing are zeros.
            let mut body = bytes.bytes(length.min(bytes.len()))?.to_vec();
            body.resize(length, 0);
            body
        }
        64..96 => bytes.arbitrary::<u64>()?.to_le_bytes().to_vec(),
        _ => right,
    };
    match kind {
        16..48 => head[2] = body.len() as u32,
        48..64 => head = bytes.arbitrary()?,
        _ => {}
    }
    let mut message = if kind < 16 { Vec::new() } else { head.map(u32::to_le_bytes).concat() };
    message.extend(body);
    // The other end may be gone. Of an answer that is shorter than it says, the rest is not waited for.
    Ok(stream.write_all(&message).is_ok() && !(48..64).contains(&kind))
}
