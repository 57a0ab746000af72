//! A vhost-user backend in a thread: a disk in memory, that answers as the specification says (QEMU,
//! docs/interop/vhost-user.rst), or as a test has it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use alula::poll::{Events, Interest};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;

pub const F_FLUSH: u64 = 1 << 9;
pub const F_MQ: u64 = 1 << 12;
pub const F_RINGS: u64 = 3 << 28;
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
pub const MQ: u64 = 1;
pub const REPLY_ACK: u64 = 1 << 3;
pub const CONFIG: u64 = 1 << 9;
pub const INFLIGHT: u64 = 1 << 12;

/// How often a backend looks whether it is to say something, or to end. It must not take the guest's CPU meanwhile.
const LOOK_TIME: Duration = Duration::from_millis(10);
const WANTS_ANSWER: u32 = 8;
const QUEUES: usize = 4;
const SECTOR: usize = 512;
const CONFIG_SIZE: usize = 60;

/// What becomes of an answer, or of a message that has none.
#[derive(Clone, Debug)]
pub enum Act {
    /// No answer comes.
    Hang,
    /// The connection ends instead.
    Close,
    /// Its body is this.
    Body(Vec<u8>),
    /// These bytes come in its place.
    Bytes(Vec<u8>),
    /// The answer brings eight descriptors with it.
    Descriptors,
}

/// What a backend says of itself and of its disk.
pub struct Plan {
    pub features: u64,
    pub protocol: u64,
    pub queues: u64,
    /// What it answers to these requests.
    pub acts: HashMap<u32, Act>,
    pub content: Vec<u8>,
    /// The requests that came, with the first numbers of their bodies.
    pub heard: Vec<(u32, u64)>,
    /// What it says now, whether somebody asks or not.
    pub says: Vec<u8>,
    /// It takes requests and does not do them; how many it has.
    pub holds: bool,
    pub held: usize,
    /// The memory that it notes in what is in flight, by the number in it: the last one that it gave, and was given.
    pub notes: [u64; 2],
}

pub struct Backend {
    pub path: PathBuf,
    pub plan: Arc<Mutex<Plan>>,
    stop: Arc<AtomicBool>,
    hang_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// One that listens at `path`, with a disk of so many sectors.
    pub fn new(path: &Path, sectors: usize) -> Self {
        let plan = Plan {
            features: F_VERSION_1 | F_PROTOCOL_FEATURES | F_RINGS | F_FLUSH | F_MQ,
            protocol: MQ | REPLY_ACK | CONFIG,
            queues: QUEUES as u64,
            acts: HashMap::new(),
            content: vec![0; sectors * SECTOR],
            heard: Vec::new(),
            says: Vec::new(),
            holds: false,
            held: 0,
            notes: [0; 2],
        };
        let plan = Arc::new(Mutex::new(plan));
        let (stop, hang_up) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (shared, ends, breaks) = (plan.clone(), stop.clone(), hang_up.clone());
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(LOOK_TIME);
                    continue;
                };
                let mut session = Session::new(stream, shared.clone());
                while !ends.load(Ordering::SeqCst) && !breaks.swap(false, Ordering::SeqCst) && session.turn()
                {
                    session.events.wait(Some(LOOK_TIME), &mut Vec::new()).unwrap();
                }
            }
        });
        Self { path: path.to_owned(), plan, stop, hang_up, thread: Some(thread) }
    }

    /// Has it do this instead of an honest answer to `request`.
    pub fn act(&self, request: u32, act: Act) {
        self.plan.lock().unwrap().acts.insert(request, act);
    }

    /// The requests that came since this was last asked.
    pub fn heard(&self) -> Vec<(u32, u64)> {
        std::mem::take(&mut self.plan.lock().unwrap().heard)
    }

    /// Ends the connection.
    pub fn hang_up(&self) {
        self.hang_up.store(true, Ordering::SeqCst);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the backend has failed");
    }
}

#[derive(Default)]
struct Ring {
    size: u16,
    next: u16,
    /// Descriptors, what is used, what is available.
    places: [u64; 3],
    kick: Option<File>,
    call: Option<File>,
    /// There while it runs.
    queue: Option<Queue>,
}

struct Session {
    stream: UnixStream,
    /// The stream and the kicks.
    events: Events,
    plan: Arc<Mutex<Plan>>,
    features: u64,
    protocol: u64,
    memory: GuestMemoryMmap,
    /// The guest's memory: its first address there, and in the front end.
    start: (u64, u64),
    rings: [Ring; QUEUES],
}

/// A file without a name.
fn tempfile() -> File {
    let path = format!("/tmp/alula-test-{}-notes", std::process::id());
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

fn number(body: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(body[at..at + 8].try_into().unwrap())
}

impl Session {
    fn new(stream: UnixStream, plan: Arc<Mutex<Plan>>) -> Self {
        stream.set_nonblocking(true).unwrap();
        let (memory, rings) = (GuestMemoryMmap::new(), Default::default());
        let events = Events::new().unwrap();
        events.add(&stream, Interest::IN, 0).unwrap();
        Self { stream, events, plan, features: 0, protocol: 0, memory, start: (0, 0), rings }
    }

    /// Does what there is to do; false: the connection is to end.
    fn turn(&mut self) -> bool {
        let says = std::mem::take(&mut self.plan.lock().unwrap().says);
        if self.stream.write_all(&says).is_err() {
            return false;
        }
        let mut head = [0; 12];
        match self.stream.recv_with_fd(&mut head) {
            Ok((0, _)) => return false,
            Ok((12, file)) => {
                let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
                let mut body = vec![0; word(8) as usize];
                self.stream.set_nonblocking(false).unwrap();
                self.stream.read_exact(&mut body).unwrap();
                self.stream.set_nonblocking(true).unwrap();
                if !self.handle(word(0), word(4), &body, file) {
                    return false;
                }
            }
            Ok((count, _)) => panic!("a head of {count} bytes"),
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(_) => return false,
        }
        (0..QUEUES).for_each(|index| self.work(index));
        true
    }

    /// Answers one request; false: the connection is to end.
    fn handle(&mut self, request: u32, flags: u32, body: &[u8], file: Option<File>) -> bool {
        let mut first = [0; 8];
        let count = body.len().min(8);
        first[..count].copy_from_slice(&body[..count]);
        let act = {
            let mut plan = self.plan.lock().unwrap();
            plan.heard.push((request, u64::from_le_bytes(first)));
            plan.acts.get(&request).cloned()
        };
        assert_eq!(flags & 3, 1, "the version");
        let answer = self.answer(request, body, file);
        let is_told = flags & WANTS_ANSWER != 0;
        assert!(!is_told || self.protocol & REPLY_ACK != 0, "an answer that was not agreed on");
        let answer = answer.or_else(|| is_told.then(|| vec![0; 8]));
        let message = |body: &[u8]| {
            let mut message = [request, 5, body.len() as u32].map(u32::to_le_bytes).concat();
            message.extend_from_slice(body);
            message
        };
        match (act, answer) {
            (Some(Act::Hang), _) => {}
            (Some(Act::Close), _) => return false,
            (Some(Act::Bytes(bytes)), _) => self.stream.write_all(&bytes).unwrap(),
            (Some(Act::Body(body)), _) => self.stream.write_all(&message(&body)).unwrap(),
            (Some(Act::Descriptors), Some(answer)) => {
                let (message, fd) = (message(&answer), self.stream.as_raw_fd());
                assert_eq!(self.stream.send_with_fds(&[&message[..]], &[fd; 8]).unwrap(), message.len());
            }
            (None, Some(answer)) if request == GET_INFLIGHT_FD => {
                static NEXT: AtomicU64 = AtomicU64::new(1);
                let (number, file) = (NEXT.fetch_add(1, Ordering::SeqCst), tempfile());
                file.write_all_at(&number.to_le_bytes(), 0).unwrap();
                self.plan.lock().unwrap().notes[0] = number;
                let message = message(&answer);
                let sent = self.stream.send_with_fds(&[&message[..]], &[file.as_raw_fd()]).unwrap();
                assert_eq!(sent, message.len());
            }
            (_, Some(answer)) => self.stream.write_all(&message(&answer)).unwrap(),
            (_, None) => {}
        }
        true
    }

    fn answer(&mut self, request: u32, body: &[u8], file: Option<File>) -> Option<Vec<u8>> {
        let plan = self.plan.lock().unwrap();
        let tell = |number: u64| Some(number.to_le_bytes().to_vec());
        match request {
            GET_FEATURES => return tell(plan.features),
            GET_PROTOCOL_FEATURES => return tell(plan.protocol),
            GET_QUEUE_NUM => return tell(plan.queues),
            // What is beside the numbers of its body comes with the answer (`handle`).
            GET_INFLIGHT_FD => return Some(body.to_vec()),
            GET_CONFIG => {
                assert_eq!(number(body, 0), (CONFIG_SIZE as u64) << 32, "offset and size");
                let mut answer = body.to_vec();
                let sectors = (plan.content.len() / SECTOR) as u64;
                answer[12..20].copy_from_slice(&sectors.to_le_bytes());
                // A driver takes no device that has several queues and says that it has none (virtio 1.2, 5.2.4).
                answer[12 + 34..12 + 36].copy_from_slice(&(QUEUES as u16).to_le_bytes());
                return Some(answer);
            }
            _ => drop(plan),
        }
        match request {
            SET_FEATURES => self.features = number(body, 0),
            SET_PROTOCOL_FEATURES => self.protocol = number(body, 0),
            SET_OWNER | SET_CONFIG => {}
            SET_INFLIGHT_FD => {
                let mut number = [0; 8];
                file.unwrap().read_exact_at(&mut number, 0).unwrap();
                self.plan.lock().unwrap().notes[1] = u64::from_le_bytes(number);
            }
            SET_MEM_TABLE => {
                assert_eq!(number(body, 0), 1, "guests of these tests have one piece of memory");
                let [start, size, here, offset] = [8, 16, 24, 32].map(|at| number(body, at));
                let file = FileOffset::new(file.unwrap(), offset);
                let range = (GuestAddress(start), size as usize, Some(file));
                self.memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
                self.start = (start, here);
            }
            _ => return self.set_ring(request, body, file),
        }
        None
    }

    fn set_ring(&mut self, request: u32, body: &[u8], file: Option<File>) -> Option<Vec<u8>> {
        let (index, value) = (number(body, 0) as u32 as usize & 0xff, (number(body, 0) >> 32) as u16);
        let ring = &mut self.rings[index];
        match request {
            SET_VRING_NUM => ring.size = value,
            SET_VRING_BASE => ring.next = value,
            SET_VRING_ADDR => {
                ring.places = [8, 16, 24].map(|at| number(body, at) - self.start.1 + self.start.0)
            }
            SET_VRING_KICK => {
                self.events.add(ring.kick.insert(file.unwrap()), Interest::IN, 1).unwrap();
            }
            SET_VRING_CALL => ring.call = Some(file.unwrap()),
            SET_VRING_ENABLE => {
                let mut queue = Queue::new(1024).unwrap();
                let [descriptors, used, available] = ring.places.map(GuestAddress);
                queue.set_size(ring.size);
                queue.try_set_desc_table_address(descriptors).unwrap();
                queue.try_set_used_ring_address(used).unwrap();
                queue.try_set_avail_ring_address(available).unwrap();
                queue.set_event_idx(self.features & 1 << 29 != 0);
                queue.set_next_avail(ring.next);
                queue.set_next_used(ring.next);
                queue.set_ready(true);
                assert!(queue.is_valid(&self.memory));
                ring.queue = Some(queue);
            }
            GET_VRING_BASE => {
                let next = ring.queue.take().unwrap().next_avail();
                // Who gave it still has it: the kernel would go on to wait for it.
                self.events.remove(ring.kick.as_ref().unwrap()).unwrap();
                *ring = Ring::default();
                return Some((u64::from(next) << 32 | index as u64).to_le_bytes().to_vec());
            }
            other => panic!("nobody needs request {other}"),
        }
        None
    }

    /// Does the requests of a queue that was kicked.
    fn work(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        let (Some(queue), Some(kick)) = (&mut ring.queue, &mut ring.kick) else { return };
        match kick.read(&mut [0; 8]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            kicked => assert_eq!(kicked.unwrap(), 8),
        }
        let memory = &self.memory;
        loop {
            queue.disable_notification(memory).unwrap();
            while let Some(chain) = queue.pop_descriptor_chain(memory) {
                let mut plan = self.plan.lock().unwrap();
                if plan.holds {
                    plan.held += 1;
                    continue;
                }
                drop(plan);
                let head = chain.head_index();
                let pieces: Vec<_> =
                    chain.map(|piece| (piece.addr(), piece.len(), piece.is_write_only())).collect();
                let written = perform(memory, &pieces, &mut self.plan.lock().unwrap().content);
                queue.add_used(memory, head, written).unwrap();
            }
            if !queue.enable_notification(memory).unwrap() {
                break;
            }
        }
        if queue.needs_notification(memory).unwrap() {
            ring.call.as_mut().unwrap().write_all(&1_u64.to_ne_bytes()).unwrap();
        }
    }
}

/// Does one request; returns how many bytes it wrote.
fn perform(memory: &GuestMemoryMmap, pieces: &[(GuestAddress, u32, bool)], content: &mut [u8]) -> u32 {
    let (head, status) = (pieces[0].0, pieces.last().unwrap().0);
    let kind: u32 = memory.read_obj(head).unwrap();
    let sector: u64 = memory.read_obj(GuestAddress(head.0 + 8)).unwrap();
    let mut at = (sector as usize).saturating_mul(SECTOR);
    let (mut written, mut code) = (1, 0_u8);
    for &(address, length, is_written) in &pieces[1..pieces.len() - 1] {
        let place = at.checked_add(length as usize).and_then(|end| content.get_mut(at..end));
        match (kind, place) {
            (0, Some(place)) if is_written => {
                memory.write_slice(place, address).unwrap();
                written += length;
            }
            (1, Some(place)) if !is_written => memory.read_slice(place, address).unwrap(),
            (8, _) => memory.write_slice(&b"backend\0"[..8.min(length as usize)], address).unwrap(),
            _ => code = 1,
        }
        at += length as usize;
    }
    memory.write_obj(if [0, 1, 4, 8].contains(&kind) { code } else { 2 }, status).unwrap();
    written
}
