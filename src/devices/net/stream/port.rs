//! A stream of frames to and from passt, and who is told when it ends.

use std::io::{ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use super::framing::Decoder;
use crate::devices::net::metrics::Metrics;
use crate::devices::net::status::Status;
use crate::error::{Error, Result};
use crate::host::passt::Passt;
use crate::log;
use crate::virtio::Interrupts;

/// A stream, with what is half read and half written of it.
pub struct Stream {
    pub(super) passt: Passt,
    pub(super) decoder: Decoder,
    /// Of a frame that had begun when the worker was stopped.
    pub(super) rest: Vec<u8>,
    ended: bool,
}

impl Stream {
    /// To a passt just started.
    pub fn new(passt: Passt) -> Self {
        Self { passt, decoder: Decoder::default(), rest: Vec::new(), ended: false }
    }
}

/// Where the stream is while no worker has it.
pub type Home = Arc<Mutex<Option<Stream>>>;

/// The stream while a worker has it.
pub struct Port {
    pub(super) stream: Stream,
    /// The interface's name.
    name: String,
    status: Arc<Status>,
    interrupts: Arc<Interrupts>,
}

impl Port {
    /// Takes the stream from its home; `name` is the interface's.
    pub fn take(
        home: &Home,
        name: String,
        (status, interrupts): (Arc<Status>, Arc<Interrupts>),
    ) -> Result<Self> {
        let stream = home.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = stream.ok_or_else(|| Error::host("an earlier worker still has passt's stream"))?;
        Ok(Self { stream, name, status, interrupts })
    }

    /// Whether the stream is of no more use.
    pub fn has_ended(&self) -> bool {
        self.stream.ended
    }

    /// Reads what there is; false: there is nothing, or there will never be again.
    pub fn read_ahead(&mut self, metrics: &Metrics) -> bool {
        if self.stream.ended {
            return false;
        }
        metrics.rx_call_count.add(1);
        match self.stream.passt.stream().read(self.stream.decoder.room()) {
            Ok(0) => self.end(),
            Ok(count) => {
                self.stream.decoder.filled(count);
                return true;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => return true,
            Err(_) => self.end(),
        }
        false
    }

    /// Sends what is left of a frame that an earlier worker began; false: not all of it.
    pub fn send_rest(&mut self) -> bool {
        while !self.stream.rest.is_empty() && !self.stream.ended {
            match self.stream.passt.stream().write(&self.stream.rest) {
                Ok(count) => drop(self.stream.rest.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.end(),
            }
        }
        true
    }

    /// The stream is of no more use: the guest's link is down, and the guest goes on without.
    pub fn end(&mut self) {
        if std::mem::replace(&mut self.stream.ended, true) {
            return;
        }
        let why = match self.stream.decoder.frame() {
            Err(error) => error.to_string(),
            Ok(_) => "it ended".to_owned(),
        };
        let words = self.stream.passt.last_words();
        let colon = if words.is_empty() { "" } else { ": " };
        log::line(format_args!(
            "network interface `{}` has no link any more: passt: {why}{colon}{words}",
            self.name
        ));
        if self.status.set_down() {
            self.interrupts.configuration_changed();
        }
    }
}
