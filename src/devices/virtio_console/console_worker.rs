//! The running half of the console: keys go in, and what the guest says goes to the terminal, at the terminal's pace.
//!
//! A driver may stand still with the kernel's locks until its output is taken, as Linux' does
//! (drivers/char/virtio_console.c, `__send_to_port`). So a terminal that is not read slows the guest down for a moment,
//! and then loses what there is no room for: as the serial port does, but without holding up the other devices.

use std::io::Write;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vm_memory::GuestAddressSpace;

use super::console::{Metrics, Sent};
use super::outgoing::Outgoing;
use super::{F_SIZE, RECEIVE, TRANSMIT};
use crate::error::{Error, Result};
use crate::host::console::Output;
use crate::host::line::{TYPED_MAX, UserLine};
use crate::memory::Memory;
use crate::poll::{self, Interest, Timer};
use crate::virtio::buffers::Buffers;
use crate::virtio::{Desk, Interrupts, Io, Queue, Registrar, Watched, Worker};

const TYPED: u32 = 2;
const ROOM: u32 = 3;
const IMPATIENT: u32 = 4;

/// How long the guest waits for a reader of its output before some of it is kept, and lost in the end. The wait begins
/// anew only once the reader has read everything.
const PATIENCE: Duration = Duration::from_millis(100);
/// The most bytes that are copied out of the guest's memory at once.
const CHUNK: usize = 4096;

/// The worker.
pub struct Running {
    memory: Memory,
    receive: Queue,
    buffers: Buffers,
    transmit: Outgoing,
    line: Arc<UserLine>,
    home: Arc<Mutex<Sent>>,
    metrics: Arc<Metrics>,
    /// By which the driver learns of the terminal's size; None: the driver does not want to.
    interrupts: Option<Arc<Interrupts>>,
    size: (u16, u16),
    pace: Pace,
}

/// How the guest is held to its reader's pace.
struct Pace {
    desk: Option<Desk>,
    timer: Timer,
    /// The output, as long as its reader is behind.
    room: Option<Watched<RawFd>>,
    /// The guest waits for its reader.
    waits: bool,
    /// The reader had its time.
    is_over: bool,
}

impl Running {
    /// Takes over where the last one stopped.
    pub fn new(
        io: Io,
        line: &Arc<UserLine>,
        home: &Arc<Mutex<Sent>>,
        metrics: &Arc<Metrics>,
    ) -> Result<Self> {
        let Io { memory, features, queues, interrupts } = io;
        let [receive, transmit] = <[Queue; 2]>::try_from(queues).ok().expect("two queues were asked for");
        let (gone, size) = {
            let sent = home.lock().unwrap_or_else(PoisonError::into_inner);
            (sent.gone, sent.size)
        };
        let timer = poll::timer("virtio console, a reader's time")?;
        Ok(Self {
            receive,
            buffers: Buffers::new(memory.clone()),
            transmit: Outgoing::new(&memory, transmit, gone),
            line: line.clone(),
            home: home.clone(),
            metrics: metrics.clone(),
            interrupts: (features & F_SIZE != 0).then_some(interrupts),
            size,
            pace: Pace { desk: None, timer, room: None, waits: false, is_over: false },
            memory,
        })
    }

    /// Gives the guest what was typed, as far as it gives buffers.
    fn receive(&mut self) -> Result<()> {
        let Self { memory, receive, buffers, line, metrics, .. } = self;
        receive.serve(&memory.memory(), |chain| {
            buffers.clear();
            buffers.add_writable(chain)?;
            let mut bytes = [0; TYPED_MAX];
            let most = buffers.len().min(TYPED_MAX);
            let count = line.take(&mut bytes[..most]);
            if count == 0 && most > 0 {
                return Ok(None);
            }
            buffers.copy_from(0, &bytes[..count]);
            metrics.rx_bytes_count.add(count as u64);
            Ok(Some(count as u32))
        })
    }

    /// Tells the driver of a terminal of another size.
    fn tell_size(&mut self) {
        let size = self.line.size();
        if std::mem::replace(&mut self.size, size) != size
            && let Some(interrupts) = &self.interrupts
        {
            interrupts.configuration_changed();
        }
    }

    /// Writes out what the guest sends.
    fn transmit(&mut self) -> Result<()> {
        let Self { memory, transmit, line, home, metrics, pace, .. } = self;
        let mut sent = home.lock().unwrap_or_else(PoisonError::into_inner);
        line.with_output(|output| {
            pace.look(output)?;
            transmit.send(&memory.memory(), |buffers, most| {
                if !pace.lets_through(output)? {
                    return Ok(0);
                }
                let mut bytes = [0; CHUNK];
                let bytes = &mut bytes[..most.min(CHUNK)];
                buffers.copy_to(bytes);
                let count = bytes.len() as u64;
                metrics.tx_bytes_count.add(count);
                if sent.limiter.take(count).is_err() {
                    metrics.rate_limiter_dropped_bytes.add(count);
                } else {
                    let written = output.write(bytes).unwrap_or(0);
                    metrics.missed_write_count.add(count - written as u64);
                }
                Ok(bytes.len())
            })
        })
    }
}

impl Pace {
    /// Writes what is kept, as far as the reader reads now, and waits for room for the rest.
    fn look(&mut self, output: &mut Output) -> Result<()> {
        // A reader that is gone loses what is kept; the guest goes on.
        let _ = output.flush();
        match (output.behind(), &self.desk) {
            (None, _) => {
                self.room = None;
                (self.waits, self.is_over) = (false, false);
            }
            (Some(fd), Some(desk)) if self.room.is_none() => {
                // A regular file cannot be waited for, and is never behind.
                self.room = desk.watch(fd, Interest::OUT | Interest::EDGE_TRIGGERED, ROOM).ok();
            }
            _ => {}
        }
        Ok(())
    }

    /// Says whether more may go to the output now; if not, the worker is told when it may.
    fn lets_through(&mut self, output: &mut Output) -> Result<bool> {
        self.look(output)?;
        if output.behind().is_none() || self.is_over {
            return Ok(true);
        }
        if !std::mem::replace(&mut self.waits, true) {
            let set = self.timer.reset(PATIENCE, None);
            set.map_err(|error| Error::host(format!("set a timer: {error}")))?;
        }
        Ok(false)
    }
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.receive, RECEIVE)?;
        registrar.kick(self.transmit.queue(), TRANSMIT)?;
        registrar.add(self.line.typed_event(), Interest::IN | Interest::EDGE_TRIGGERED, TYPED)?;
        registrar.add(&self.pace.timer, Interest::IN | Interest::EDGE_TRIGGERED, IMPATIENT)?;
        self.pace.desk = Some(registrar.desk().clone());
        // Linux' driver looks at the size only when it is told that there is another one, also at its beginning.
        self.tell_size();
        Ok(())
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        match token {
            RECEIVE => self.receive(),
            TYPED => {
                self.tell_size();
                self.receive()
            }
            IMPATIENT => {
                // The reader may have caught up in the last moment.
                self.pace.is_over = self.pace.waits;
                self.transmit()
            }
            _ => self.transmit(),
        }
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        let (transmit, gone) = self.transmit.stop();
        let mut sent = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        (sent.gone, sent.size) = (gone, self.size);
        drop(sent);
        vec![self.receive, transmit]
    }
}
