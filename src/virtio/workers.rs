//! The io thread: one event loop on which the devices' workers live. It starts with the first device
//! that does.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::Worker;
use super::transport::Transport;
use crate::error::{Context, Result};
use crate::event::{EventFd, Events, Interest};
use crate::log;

type Shared = Arc<Mutex<Transport>>;

/// What the loop is asked to do.
enum Job {
    Start(Shared),
    Reset(Shared),
    /// Touch neither memory nor interrupts until `Resume`; the sender is told when that holds.
    Pause(Sender<()>),
    Resume,
    End,
}

/// The loop's inbox and its thread.
pub struct Workers {
    inbox: Mutex<Inbox>,
    wake: EventFd,
}

#[derive(Default)]
struct Inbox {
    jobs: Vec<Job>,
    thread: Option<JoinHandle<()>>,
    paused: bool,
    /// The loop has ended: nobody takes jobs any more.
    ended: bool,
}

impl Workers {
    /// A loop without a thread yet.
    pub fn new() -> Result<Arc<Self>> {
        let wake =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("create an event descriptor")?;
        Ok(Arc::new(Self { inbox: Mutex::default(), wake }))
    }

    /// Starts a device, soon.
    pub(super) fn start(self: &Arc<Self>, transport: Shared) {
        self.post(Job::Start(transport));
    }

    /// Ends a device's workers, soon, and completes its driver's reset.
    pub(super) fn reset(self: &Arc<Self>, transport: Shared) {
        self.post(Job::Reset(transport));
    }

    /// Returns when no worker runs any more. No effect when they are paused.
    pub fn pause(self: &Arc<Self>) {
        let (sender, paused) = channel();
        {
            let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            if inbox.thread.is_none() || std::mem::replace(&mut inbox.paused, true) {
                inbox.paused = true;
                return;
            }
        }
        self.post(Job::Pause(sender));
        // The loop ends only when the machine does, which pauses no more.
        let _ = paused.recv();
    }

    /// Lets them run again; what came meanwhile is still there.
    pub fn resume(self: &Arc<Self>) {
        let was_paused = {
            let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut inbox.paused, false) && inbox.thread.is_some()
        };
        if was_paused {
            self.post(Job::Resume);
        }
    }

    /// Ends the thread and all workers.
    pub fn end(self: &Arc<Self>) {
        let thread = self.inbox.lock().unwrap_or_else(PoisonError::into_inner).thread.take();
        if let Some(thread) = thread {
            self.post(Job::End);
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }

    fn post(self: &Arc<Self>, job: Job) {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        if inbox.ended {
            return;
        }
        let is_end = matches!(job, Job::End);
        inbox.jobs.push(job);
        if inbox.thread.is_none() && !is_end {
            let workers = self.clone();
            match std::thread::Builder::new().name("io".to_owned()).spawn(move || workers.run()) {
                Ok(thread) => inbox.thread = Some(thread),
                Err(error) => {
                    log::line(format_args!("start the io thread: {error}: devices will not answer"))
                }
            }
        }
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }

    fn run(&self) {
        match Loop::new(self) {
            Ok(mut event_loop) => {
                if let Err(error) = event_loop.run(self) {
                    log::line(format_args!("the io thread ended: {error}: devices will not answer"));
                }
            }
            Err(error) => log::line(format_args!("start the io thread: {error}: devices will not answer")),
        }
        // Whoever waits for a job to be done must not wait for ever.
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.ended = true;
        inbox.jobs.clear();
    }

    fn take_jobs(&self) -> Vec<Job> {
        // Nothing written: somebody was faster.
        let _ = self.wake.read();
        std::mem::take(&mut self.inbox.lock().unwrap_or_else(PoisonError::into_inner).jobs)
    }
}

/// A worker, whose it is, and what it waits for.
struct Running {
    worker: Box<dyn Worker>,
    transport: Shared,
    waits: Vec<RawFd>,
}

/// What a worker tells the loop to wait for. Descriptors must stay open as long as it waits.
pub struct Registrar<'a> {
    events: &'a Events,
    slot: usize,
    waits: &'a mut Vec<RawFd>,
}

impl Registrar<'_> {
    /// Calls `handle` with `token` when `fd` is ready for `interest`.
    pub fn add(&mut self, fd: &impl AsRawFd, interest: Interest, token: u32) -> Result<()> {
        self.events.add(fd, interest, (self.slot as u64 + 1) << 32 | u64::from(token))?;
        self.waits.push(fd.as_raw_fd());
        Ok(())
    }
}

struct Loop {
    events: Events,
    /// A worker's place is part of its events' tokens; a free one is used again.
    slots: Vec<Option<Running>>,
    paused: bool,
}

const WAKE: u64 = 0;

impl Loop {
    fn new(workers: &Workers) -> Result<Self> {
        let events = Events::new()?;
        events.add(&workers.wake, Interest::IN, WAKE)?;
        Ok(Self { events, slots: Vec::new(), paused: false })
    }

    fn run(&mut self, workers: &Workers) -> Result<()> {
        let mut ready = Vec::new();
        loop {
            if self.paused {
                // Only the inbox counts: whatever else is ready stays so.
                wait_for(&workers.wake)?;
            } else {
                self.events.wait(None, &mut ready)?;
            }
            for event in ready.drain(..).filter(|event| event.token != WAKE) {
                self.handle((event.token >> 32) as usize - 1, event.token as u32);
            }
            for job in workers.take_jobs() {
                match job {
                    Job::Start(transport) => self.start(&transport),
                    Job::Reset(transport) => {
                        self.end_workers_of(&transport);
                        transport.lock().unwrap_or_else(PoisonError::into_inner).stopped();
                    }
                    Job::Pause(paused) => {
                        self.paused = true;
                        // Who asked may be gone.
                        let _ = paused.send(());
                    }
                    Job::Resume => self.paused = false,
                    Job::End => return Ok(()),
                }
            }
        }
    }

    /// Its worker may have gone since the event came.
    fn handle(&mut self, slot: usize, token: u32) {
        let Some(running) = self.slots.get_mut(slot).and_then(Option::as_mut) else { return };
        if let Err(error) = running.worker.handle(token) {
            let transport = running.transport.clone();
            self.end_workers_of(&transport);
            transport.lock().unwrap_or_else(PoisonError::into_inner).fail(&error);
        }
    }

    fn start(&mut self, transport: &Shared) {
        let workers = transport.lock().unwrap_or_else(PoisonError::into_inner).start();
        for worker in workers.into_iter().flatten() {
            if let Err(error) = self.add(worker, transport) {
                self.end_workers_of(transport);
                transport.lock().unwrap_or_else(PoisonError::into_inner).fail(&error);
                return;
            }
        }
    }

    fn add(&mut self, mut worker: Box<dyn Worker>, transport: &Shared) -> Result<()> {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let mut waits = Vec::new();
        let registered = worker.register(&mut Registrar { events: &self.events, slot, waits: &mut waits });
        let running = Running { worker, transport: transport.clone(), waits };
        match slot == self.slots.len() {
            true => self.slots.push(Some(running)),
            false => self.slots[slot] = Some(running),
        }
        registered
    }

    fn end_workers_of(&mut self, transport: &Shared) {
        for slot in &mut self.slots {
            if slot.as_ref().is_some_and(|running| Arc::ptr_eq(&running.transport, transport)) {
                let running = slot.take().expect("it was just there");
                for fd in running.waits {
                    // A descriptor that was closed has left the set by itself.
                    let _ = self.events.remove(&fd);
                }
            }
        }
    }
}

/// Waits until `event` is readable, without reading it.
fn wait_for(event: &EventFd) -> Result<()> {
    let events = Events::new()?;
    events.add(event, Interest::IN, WAKE)?;
    let mut ready = Vec::new();
    while ready.is_empty() {
        events.wait(None, &mut ready)?;
    }
    Ok(())
}
