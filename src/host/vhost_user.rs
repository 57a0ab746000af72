//! A vhost-user backend: a program of the host that does the work of a virtio device in guest memory, which it is handed
//! over a Unix socket (QEMU, docs/interop/vhost-user.rst). This is the front end's half, as far as devices need it that ask
//! nothing of the front end themselves.
//!
//! The crate `vhost` has this half, too, and waits for an answer as long as it takes, also of a socket with a time limit.
//! Whoever waits here is `main`, or a thread that a guest's CPU waits for.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;

mod messages;

use messages::{
    GET_CONFIG, GET_FEATURES, GET_INFLIGHT_FD, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_VRING_BASE,
    SET_CONFIG, SET_FEATURES, SET_INFLIGHT_FD, SET_MEM_TABLE, SET_OWNER, SET_PROTOCOL_FEATURES,
    SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM, VERSION,
};

use super::socket;
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::memory::{Range, Region};
use crate::poll;
use crate::sys::network;

/// A backend that hangs holds `main` up no longer than this, with all that is asked of it in a row: to meet it, to read
/// its configuration, to start it.
pub const ANSWER_TIME: Duration = Duration::from_secs(2);
/// A queue stops when the backend has done what is in flight on it. A pause is given up a little later.
pub const STOP_TIME: Duration = Duration::from_secs(8);
/// Guest memory is handed over in at most so many pieces.
pub const REGIONS_MAX: usize = network::DESCRIPTORS_MAX;
/// The longest device configuration, and what is before it in a message: offset, size, flags.
pub const CONFIG_MAX: usize = 256;
const CONFIG_HEAD: usize = 12;

/// The length of a message about notes of what is in flight.
const INFLIGHT_SIZE: usize = 24;

/// Bits of the features, which are those of virtio and one of the protocol's own.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
/// Features of the protocol: several queues, an answer to each message, the device's configuration.
const MQ: u64 = 1 << 0;
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;
/// Notes of what is in flight, in memory that outlives the backend.
const INFLIGHT: u64 = 1 << 12;
const PROTOCOL: u64 = MQ | REPLY_ACK | CONFIG | INFLIGHT;

/// A piece of guest memory that the backend maps.
pub struct Piece<'m> {
    range: Range,
    /// The file that has it, from its beginning.
    file: &'m File,
}

impl<'m> Piece<'m> {
    /// A region of guest memory; None: its pages are this process's own.
    pub fn of(region: &'m Region) -> Option<Self> {
        region.file().map(|file| Self { range: region.range(), file })
    }
}

/// A queue that the driver has set up.
pub struct Ring<'q> {
    /// The queue's number.
    pub index: usize,
    /// How many descriptors.
    pub size: u16,
    /// The next request that the backend is to take.
    pub next: u16,
    /// Where in the guest the descriptors, what is available and what is used are, each in one piece of memory.
    pub places: [GuestAddress; 3],
    /// The driver writes to it when there is something to do.
    pub kick: &'q dyn AsRawFd,
    /// The backend writes to it when something is done; None: the driver does not want to know.
    pub call: Option<&'q dyn AsRawFd>,
}

/// Memory in which a backend notes what it has in flight. It is the backend's: nobody here looks into it, and the next
/// backend at the place gets it.
struct Inflight {
    file: File,
    /// Its size, where in the file it begins, and the number and size of the queues, as the backend has told them.
    shape: Vec<u8>,
}

/// A connection to a backend. After an error it is closed: what comes late would be taken for another answer.
pub struct Backend {
    socket: Named<UnixStream>,
    path: PathBuf,
    features: u64,
    protocol: u64,
    queues: Option<u64>,
    config: Vec<u8>,
    inflight: Option<Inflight>,
    is_lost: bool,
}

impl Backend {
    /// Meets the backend of `what` that listens at `path`: learns what it can do, and the first `config_size` bytes of its
    /// device's configuration; 0: it is not asked for any.
    ///
    /// # Errors
    /// The path has no listener, or the backend does not answer in [`ANSWER_TIME`], or with what cannot be, or lacks what
    /// is needed.
    pub fn meet(what: &str, path: &Path, config_size: usize) -> Result<Self> {
        let until = Instant::now() + ANSWER_TIME;
        let socket =
            socket::connect(path).with_context(|| format!("meet the vhost-user backend of {what}"))?;
        let socket = Named::new(format!("vhost-user backend of {what}"), socket);
        let (path, config) = (path.to_owned(), vec![0; config_size]);
        let (inflight, is_lost) = (None, false);
        let mut met =
            Self { socket, path, features: 0, protocol: 0, queues: None, config, inflight, is_lost };
        met.negotiate(until)?;
        Ok(met)
    }

    /// Has the backend note what it has in flight of so many queues, if it can: another one at its place then goes on
    /// with that.
    ///
    /// # Errors
    /// The backend does not answer in [`ANSWER_TIME`], or with what cannot be.
    pub fn note_inflight(&mut self, queues: u16, queue_size: u16) -> Result<()> {
        if self.protocol & INFLIGHT == 0 {
            return Ok(());
        }
        let until = Instant::now() + ANSWER_TIME;
        // Programs in C have 4 bytes after the numbers, and want them.
        let mut body = vec![0; INFLIGHT_SIZE];
        body[16..20].copy_from_slice(&[queues, queue_size].map(u16::to_le_bytes).concat());
        self.send(GET_INFLIGHT_FD, VERSION, &body, &[])?;
        let (shape, file) = self.receive_with(GET_INFLIGHT_FD, until)?;
        if shape.len() != INFLIGHT_SIZE {
            let length = shape.len();
            return self
                .lose(GET_INFLIGHT_FD, format!("its answer has {length} bytes instead of {INFLIGHT_SIZE}"));
        }
        match file {
            Some(file) => self.inflight = Some(Inflight { file: file.into(), shape }),
            None => return self.lose(GET_INFLIGHT_FD, "no memory comes with its answer".to_owned()),
        }
        Ok(())
    }

    /// Whether the backend has noted what it has in flight, for one that comes after it.
    pub fn has_notes(&self) -> bool {
        self.inflight.is_some()
    }

    /// Gives up what the backend has noted of queues that are no more: no other backend goes on with that.
    pub fn forget_notes(&mut self) {
        self.inflight = None;
    }

    /// Takes over what the backend before has noted, if this one can go on with that; whether it can.
    pub fn succeed(&mut self, other: &mut Self) -> bool {
        let can = self.protocol & INFLIGHT != 0 && other.inflight.is_some();
        if can {
            self.inflight = other.inflight.take();
        }
        can
    }

    /// Meets another backend, which `stream` leads to and which is to go on with what the lost one has noted.
    ///
    /// # Errors
    /// As of [`Self::meet`], or it cannot do what the one before could.
    pub fn meet_again(&mut self, stream: UnixStream, needed: u64) -> Result<()> {
        self.socket = Named::new(format!("vhost-user backend at {}", self.path.display()), stream);
        self.is_lost = false;
        self.negotiate(Instant::now() + ANSWER_TIME)?;
        if self.protocol & INFLIGHT == 0 || needed & !self.features != 0 {
            return self.lose(GET_FEATURES, "it lacks what the one before had".to_owned());
        }
        Ok(())
    }

    /// Whether the backend of `what` could be met at `path`, as far as that can be told without: some end with the first
    /// that they meet.
    ///
    /// # Errors
    /// There is no socket.
    pub fn look_for(what: &str, path: &Path) -> Result<()> {
        let is_socket = path.metadata().map(|metadata| metadata.file_type().is_socket());
        match is_socket {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::config("it is no socket: give the one where the program listens")),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Error::config("there is no socket: start what shall listen there first"))
            }
            Err(error) => Err(Error::host(error.to_string())),
        }
        .with_context(|| format!("find the vhost-user backend of {what} at `{}`", path.display()))
    }

    fn negotiate(&mut self, until: Instant) -> Result<()> {
        self.features = self.ask_number(GET_FEATURES, until)?;
        self.check(self.features, F_VERSION_1, "is one of virtio before 1.0 (it lacks VIRTIO_F_VERSION_1)")?;
        // Without them, a backend cannot say whether it does as it is told.
        self.check(
            self.features,
            F_PROTOCOL_FEATURES,
            "cannot tell its configuration (it lacks protocol features)",
        )?;
        let offered = self.ask_number(GET_PROTOCOL_FEATURES, until)?;
        if !self.config.is_empty() {
            let lacks = "cannot tell its configuration (it lacks VHOST_USER_PROTOCOL_F_CONFIG)";
            self.check(offered, CONFIG, lacks)?;
        }
        self.protocol = 0;
        self.tell(SET_PROTOCOL_FEATURES, &(offered & PROTOCOL).to_le_bytes(), &[], until)?;
        self.protocol = offered & PROTOCOL;
        if self.protocol & MQ != 0 {
            self.queues = Some(self.ask_number(GET_QUEUE_NUM, until)?);
        }
        self.tell(SET_OWNER, &[], &[], until)?;
        self.read_config_until(until)
    }

    fn check(&self, all: u64, needed: u64, lacks: &str) -> Result<()> {
        if all & needed != 0 {
            return Ok(());
        }
        let path = self.path.display();
        Err(Error::config(format!("the vhost-user backend at `{path}` {lacks}: use another one")))
    }

    /// The features of its device and of its rings.
    pub fn features(&self) -> u64 {
        self.features & !F_PROTOCOL_FEATURES
    }

    /// How many queues its device can have; None: it does not say, and has those that a device of its type has at least.
    pub fn queues(&self) -> Option<u64> {
        self.queues
    }

    /// The beginning of its device's configuration, as it was read last.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Where it listens, or listened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it listens, or listened, at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        self.path == path
    }

    /// Whether it is gone: its connection has ended, or was ended for what it did.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Reads its device's configuration again.
    ///
    /// # Errors
    /// The backend does not answer in [`ANSWER_TIME`], or with what cannot be.
    pub fn read_config(&mut self) -> Result<()> {
        self.read_config_until(Instant::now() + ANSWER_TIME)
    }

    fn read_config_until(&mut self, until: Instant) -> Result<()> {
        let size = self.config.len();
        if size == 0 {
            return Ok(());
        }
        let mut message = vec![0; CONFIG_HEAD + size];
        message[4..8].copy_from_slice(&(size as u32).to_le_bytes());
        let answer = self.ask(GET_CONFIG, &message, until)?;
        // A backend that cannot answer leaves the configuration out.
        let told = answer.get(CONFIG_HEAD..).unwrap_or_default();
        if told.len() != size {
            let told = told.len();
            return self
                .lose(GET_CONFIG, format!("it tells {told} bytes of configuration instead of {size}"));
        }
        self.config.copy_from_slice(told);
        Ok(())
    }

    /// The driver writes `data` to its device's configuration at `offset`; what is beyond what was read is ignored.
    ///
    /// # Errors
    /// The backend does not take that, or not in [`ANSWER_TIME`]: it is lost.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > self.config.len() as u64) {
            return Ok(());
        }
        let until = Instant::now() + ANSWER_TIME;
        let mut message = [offset as u32, data.len() as u32, 0].map(u32::to_le_bytes).concat();
        message.extend_from_slice(data);
        self.tell(SET_CONFIG, &message, &[], until)?;
        self.read_config_until(until)
    }

    /// Hands guest memory over, and has the backend work on these queues.
    ///
    /// # Errors
    /// The backend does not take what it is told, or not in [`ANSWER_TIME`]: it is lost.
    pub fn start(&mut self, features: u64, pieces: &[Piece<'_>], rings: &[Ring<'_>]) -> Result<()> {
        // Of an error, some queues may have begun.
        self.start_until(features, pieces, rings, Instant::now() + ANSWER_TIME).inspect_err(|_| self.end())
    }

    fn start_until(
        &mut self,
        features: u64,
        pieces: &[Piece<'_>],
        rings: &[Ring<'_>],
        until: Instant,
    ) -> Result<()> {
        self.tell(SET_FEATURES, &(features | F_PROTOCOL_FEATURES).to_le_bytes(), &[], until)?;
        if let Some(Inflight { file, shape }) = &self.inflight {
            let (fd, shape) = (file.as_raw_fd(), shape.clone());
            self.tell(SET_INFLIGHT_FD, &shape, &[&fd], until)?;
        }
        let mut table = (pieces.len() as u64).to_le_bytes().to_vec();
        for piece in pieces {
            // By the third number rings are named. It is meant to be the address in this process, which says too much,
            // and is another one when the guest boots again: QEMU's backends then look for the rings that they had.
            for word in [piece.range.start, piece.range.size, piece.range.start, 0] {
                table.extend(word.to_le_bytes());
            }
        }
        let files: Vec<&dyn AsRawFd> = pieces.iter().map(|piece| piece.file as _).collect();
        self.tell(SET_MEM_TABLE, &table, &files, until)?;
        rings.iter().try_for_each(|ring| self.start_ring(ring, until))
    }

    fn start_ring(&mut self, ring: &Ring<'_>, until: Instant) -> Result<()> {
        let index = ring.index as u32;
        self.tell(SET_VRING_NUM, &pair(index, ring.size.into()), &[], until)?;
        self.tell(SET_VRING_BASE, &pair(index, ring.next.into()), &[], until)?;
        let mut address = pair(index, 0).to_vec();
        // The last is for who notes what is written.
        let [descriptors, available, used] = ring.places.map(|place| place.0);
        for word in [descriptors, used, available, 0] {
            address.extend(word.to_le_bytes());
        }
        self.tell(SET_VRING_ADDR, &address, &[], until)?;
        let number = u64::from(index).to_le_bytes();
        match ring.call {
            Some(call) => self.tell(SET_VRING_CALL, &number, &[call], until)?,
            // The specification knows of queues without a call; QEMU's backends end when they have something to tell.
            None => self.tell(SET_VRING_CALL, &number, &[&poll::event("calls that nobody hears")?], until)?,
        }
        self.tell(SET_VRING_KICK, &number, &[ring.kick], until)?;
        self.tell(SET_VRING_ENABLE, &pair(index, 1), &[], until)
    }

    /// Has the backend finish what is in flight on the queue `index` and leave it: returns the next request that it would
    /// have taken.
    ///
    /// # Errors
    /// The backend does not answer before `until`, or with what cannot be: it is lost.
    pub fn stop(&mut self, index: usize, until: Instant) -> Result<u16> {
        let answer = self.ask(GET_VRING_BASE, &pair(index as u32, 0), until)?;
        let next =
            <[u8; 8]>::try_from(&*answer).ok().filter(|answer| answer[..4] == (index as u32).to_le_bytes());
        let next =
            next.map(|answer| u64::from_le_bytes(answer) >> 32).and_then(|next| u16::try_from(next).ok());
        match next {
            Some(next) => Ok(next),
            None => {
                self.lose(GET_VRING_BASE, "its answer is of another queue, or none that there is".to_owned())
            }
        }
    }

    /// Looks whether it is still there, and silent: it speaks when it is spoken to.
    ///
    /// # Errors
    /// The backend is lost.
    pub fn look(&mut self) -> Result<()> {
        self.check_lost()?;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        let why = match network::receive(&*self.socket, &mut [0], flags) {
            Ok(0) => "it has ended the connection".to_owned(),
            Ok(_) => "it has said what nobody asked for".to_owned(),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => error.to_string(),
        };
        self.end();
        Err(Error::host(format!("the vhost-user backend at `{}` is lost: {why}", self.path.display())))
    }

    /// Closes the connection: the backend leaves all queues.
    fn end(&mut self) {
        self.is_lost = true;
        // An error: the other end was faster.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    fn check_lost(&self) -> Result<()> {
        let path = self.path.display();
        match self.is_lost {
            true => Err(Error::host(format!(
                "the vhost-user backend at `{path}` is lost: when one listens there again, meet it by a PATCH of the device"
            ))),
            false => Ok(()),
        }
    }
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The body of messages about a queue: its number, and a number.
fn pair(index: u32, number: u32) -> [u8; 8] {
    (u64::from(number) << 32 | u64::from(index)).to_le_bytes()
}
