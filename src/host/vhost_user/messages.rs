//! The messages between a front end and its backend: what is said, and how long an answer is waited for.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use super::{Backend, CONFIG_HEAD, CONFIG_MAX, REPLY_ACK};
use crate::error::{Error, Result};
use crate::sys::{descriptor, network};

/// The longest answer that is taken: a hostile backend cannot have us make room for more.
const ANSWER_MAX: usize = CONFIG_HEAD + CONFIG_MAX;

/// In a message's header: the protocol's version, that it is an answer, that it wants one.
const HEADER: usize = 12;
pub(super) const VERSION: u32 = 1;
const IS_ANSWER: u32 = 1 << 2;
const WANTS_ANSWER: u32 = 1 << 3;

/// Kinds of messages, by the numbers and names of the specification.
#[derive(Clone, Copy)]
pub(super) struct Request(u32, &'static str);

pub(super) const GET_FEATURES: Request = Request(1, "GET_FEATURES");
pub(super) const SET_FEATURES: Request = Request(2, "SET_FEATURES");
pub(super) const SET_OWNER: Request = Request(3, "SET_OWNER");
pub(super) const SET_MEM_TABLE: Request = Request(5, "SET_MEM_TABLE");
pub(super) const SET_VRING_NUM: Request = Request(8, "SET_VRING_NUM");
pub(super) const SET_VRING_ADDR: Request = Request(9, "SET_VRING_ADDR");
pub(super) const SET_VRING_BASE: Request = Request(10, "SET_VRING_BASE");
pub(super) const GET_VRING_BASE: Request = Request(11, "GET_VRING_BASE");
pub(super) const SET_VRING_KICK: Request = Request(12, "SET_VRING_KICK");
pub(super) const SET_VRING_CALL: Request = Request(13, "SET_VRING_CALL");
pub(super) const GET_PROTOCOL_FEATURES: Request = Request(15, "GET_PROTOCOL_FEATURES");
pub(super) const SET_PROTOCOL_FEATURES: Request = Request(16, "SET_PROTOCOL_FEATURES");
pub(super) const GET_QUEUE_NUM: Request = Request(17, "GET_QUEUE_NUM");
pub(super) const SET_VRING_ENABLE: Request = Request(18, "SET_VRING_ENABLE");
pub(super) const GET_CONFIG: Request = Request(24, "GET_CONFIG");
pub(super) const SET_CONFIG: Request = Request(25, "SET_CONFIG");
pub(super) const GET_INFLIGHT_FD: Request = Request(31, "GET_INFLIGHT_FD");
pub(super) const SET_INFLIGHT_FD: Request = Request(32, "SET_INFLIGHT_FD");

impl Backend {
    pub(super) fn ask_number(&mut self, request: Request, until: Instant) -> Result<u64> {
        let answer = self.ask(request, &[], until)?;
        self.number(request, &answer)
    }

    fn number(&mut self, request: Request, answer: &[u8]) -> Result<u64> {
        match answer.try_into() {
            Ok(answer) => Ok(u64::from_le_bytes(answer)),
            Err(_) => self.lose(request, format!("its answer has {} bytes instead of 8", answer.len())),
        }
    }

    /// Sends what has no answer of its own, and waits for the backend's word that it has done as told, if it gives that.
    pub(super) fn tell(
        &mut self,
        request: Request,
        body: &[u8],
        fds: &[&dyn AsRawFd],
        until: Instant,
    ) -> Result<()> {
        if self.protocol & REPLY_ACK == 0 {
            return self.send(request, VERSION, body, fds);
        }
        self.send(request, VERSION | WANTS_ANSWER, body, fds)?;
        let answer = self.receive(request, until)?;
        match self.number(request, &answer)? {
            0 => Ok(()),
            code => self.lose(request, format!("it refuses that ({code})")),
        }
    }

    pub(super) fn ask(&mut self, request: Request, body: &[u8], until: Instant) -> Result<Vec<u8>> {
        self.send(request, VERSION, body, &[])?;
        self.receive(request, until)
    }

    pub(super) fn send(
        &mut self,
        request: Request,
        flags: u32,
        body: &[u8],
        fds: &[&dyn AsRawFd],
    ) -> Result<()> {
        self.check_lost()?;
        let mut message = [request.0, flags, body.len() as u32].map(u32::to_le_bytes).concat();
        message.extend_from_slice(body);
        match network::send_with(&*self.socket, &message, fds) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.lose(request, "it does not read what it is sent".to_owned())
            }
            Err(error) => self.lose(request, error.to_string()),
        }
    }

    /// The body of the answer to `request`. Descriptors that come with it are closed by the kernel: nobody takes them.
    fn receive(&mut self, request: Request, until: Instant) -> Result<Vec<u8>> {
        let mut head = [0; HEADER];
        self.fill(request, &mut head, until)?;
        self.receive_body(request, head, until)
    }

    /// The body of the answer to `request`, and the descriptor that comes with the answer.
    pub(super) fn receive_with(
        &mut self,
        request: Request,
        until: Instant,
    ) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut head = [0; HEADER];
        // A descriptor comes with the first bytes of its message.
        let (count, file) = loop {
            match network::receive_with(&*self.socket, &mut head) {
                Ok((0, _)) => return self.lose(request, "it has ended the connection".to_owned()),
                Ok(received) => break received,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(request, until)?,
                Err(error) => return self.lose(request, error.to_string()),
            }
        };
        self.fill(request, &mut head[count..], until)?;
        self.receive_body(request, head, until).map(|body| (body, file))
    }

    fn receive_body(&mut self, request: Request, head: [u8; HEADER], until: Instant) -> Result<Vec<u8>> {
        let [number, flags, size] =
            [0, 4, 8].map(|at| u32::from_le_bytes(std::array::from_fn(|index| head[at + index])));
        if number != request.0 || flags & (IS_ANSWER | 3) != IS_ANSWER | VERSION || size as usize > ANSWER_MAX
        {
            let why = format!("its answer is none (request {number}, flags {flags:#x}, {size} bytes)");
            return self.lose(request, why);
        }
        let mut body = vec![0; size as usize];
        self.fill(request, &mut body, until)?;
        Ok(body)
    }

    fn fill(&mut self, request: Request, mut place: &mut [u8], until: Instant) -> Result<()> {
        while !place.is_empty() {
            match network::receive(&*self.socket, place, libc::MSG_DONTWAIT) {
                Ok(0) => return self.lose(request, "it has ended the connection".to_owned()),
                Ok(count) => place = &mut place[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(request, until)?,
                Err(error) => return self.lose(request, error.to_string()),
            }
        }
        Ok(())
    }

    /// Waits until there may be something of the answer.
    fn wait(&mut self, request: Request, until: Instant) -> Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return self.lose(request, "it does not answer in time".to_owned());
        }
        descriptor::poll(&*self.socket, libc::POLLIN, left.as_millis() as i32 + 1);
        Ok(())
    }

    pub(super) fn lose<T>(&mut self, request: Request, why: String) -> Result<T> {
        self.end();
        let path = self.path.display();
        Err(Error::host(format!("the vhost-user backend at `{path}` is lost at {}: {why}", request.1)))
    }
}
