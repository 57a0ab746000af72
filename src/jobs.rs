//! Jobs: what a request asks for and takes long, a large file to be written for example, on a thread of its own.
//! `main` starts a job with all the descriptors that it needs, and serves others meanwhile; it hears of the
//! job's end on its loop, and only then does the rest, which needs `main`, and answers.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::error::{Context, Error, Result};
use crate::poll::{self, EventFd};
use crate::walls;

/// So many jobs may be open at a time: a client that asks for more and more would use up threads and memory.
/// Fewer than connections of the API are served at once, so that clients that wait keep nobody else out.
pub const OPEN_MAX: usize = 4;

/// By what a job is known: no two jobs of a process have the same.
pub type Ticket = u64;

/// The jobs of a microVM; each ends with a `T`. Those that are open when this is dropped go on by themselves,
/// and end with the process at the latest: a disk that does not answer must not keep it from ending.
pub struct Jobs<T> {
    open: Vec<(Ticket, JoinHandle<()>)>,
    last: Ticket,
    /// Made with the first job: most microVMs never have one.
    ended: Option<Arc<Ended<T>>>,
}

/// Jobs that `main` has not looked at since they ended.
struct Ended<T> {
    results: Mutex<Vec<(Ticket, T)>>,
    event: EventFd,
}

impl<T> Default for Jobs<T> {
    fn default() -> Self {
        Self { open: Vec::new(), last: 0, ended: None }
    }
}

impl<T: Send + 'static> Jobs<T> {
    /// Starts a job on a thread called `name`, and returns its ticket. The thread opens no file: what the job
    /// needs of the host is open, and part of `work`. An error: too many are open.
    pub fn start(&mut self, name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<Ticket> {
        if self.open.len() >= OPEN_MAX {
            return Err(Error::config(format!(
                "{OPEN_MAX} requests that take long are being done already: wait until one is answered"
            )));
        }
        let ticket = self.last + 1;
        self.go_on(ticket, name, work)?;
        self.last = ticket;
        Ok(ticket)
    }

    /// Has another thread called `name` go on with a job that has ended, under its ticket.
    pub fn go_on(
        &mut self,
        ticket: Ticket,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<()> {
        let ended = match &self.ended {
            Some(ended) => ended.clone(),
            None => self.ended.insert(Ended::new()?).clone(),
        };
        let job = move || {
            poll::leave_signals_to_others();
            walls::enclose(walls::Kind::Job);
            let result = work();
            ended.results.lock().unwrap_or_else(PoisonError::into_inner).push((ticket, result));
            // A counter that is full wakes as well.
            let _ = ended.event.write(1);
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(job);
        self.open.push((ticket, thread.with_context(|| format!("start the thread `{name}`"))?));
        Ok(())
    }

    /// Whether a job has not ended yet, or was not looked at since.
    pub fn is_open(&self, ticket: Ticket) -> bool {
        self.open.iter().any(|(other, _)| *other == ticket)
    }

    /// Readable when [`Jobs::take_ended`] has something; none: there was no job yet.
    pub fn event(&self) -> Option<&EventFd> {
        self.ended.as_ref().map(|ended| &ended.event)
    }

    /// The jobs that have ended since the last time, in that order.
    pub fn take_ended(&mut self) -> Vec<(Ticket, T)> {
        let Some(ended) = &self.ended else { return Vec::new() };
        // Nothing written: another look has taken it.
        let _ = ended.event.read();
        let results = std::mem::take(&mut *ended.results.lock().unwrap_or_else(PoisonError::into_inner));
        for (ticket, _) in &results {
            if let Some(index) = self.open.iter().position(|(other, _)| other == ticket) {
                // It has nothing left to do. One that panicked has ended the process.
                let _ = self.open.swap_remove(index).1.join();
            }
        }
        results
    }
}

impl<T> Ended<T> {
    fn new() -> Result<Arc<Self>> {
        let event = poll::event("jobs that ended")?;
        Ok(Arc::new(Self { results: Mutex::default(), event }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::poll::{Events, Interest};

    #[test]
    fn jobs_end_in_any_order_and_are_not_too_many() {
        let events = Events::new().unwrap();
        let mut jobs = Jobs::default();
        assert!(jobs.event().is_none() && jobs.take_ended().is_empty());
        let (mut goes, mut tickets) = (Vec::new(), Vec::new());
        let mut start = |jobs: &mut Jobs<u32>, result: u32| {
            let (go, gone) = channel::<()>();
            let ticket = jobs.start("job", move || {
                let _ = gone.recv();
                result
            });
            ticket.map(|ticket| {
                goes.push(Some(go));
                tickets.push(ticket);
            })
        };
        (0..OPEN_MAX as u32).for_each(|result| start(&mut jobs, result).unwrap());
        let error = start(&mut jobs, 9).unwrap_err().to_string();
        assert!(error.contains("wait until one is answered"), "{error}");
        events.add(jobs.event().unwrap(), Interest::IN, 0).unwrap();
        let mut ready = Vec::new();
        events.wait(Some(Duration::ZERO), &mut ready).unwrap();
        assert!(ready.is_empty() && jobs.take_ended().is_empty());
        for index in [2, 0, 1, 3] {
            goes[index] = None;
            events.wait(None, &mut ready).unwrap();
            assert_eq!(jobs.take_ended(), [(tickets[index], index as u32)]);
            events.wait(Some(Duration::ZERO), &mut ready).unwrap();
            assert!(ready.is_empty() && jobs.take_ended().is_empty());
        }
        let ticket = jobs.start("job", || 7).unwrap();
        assert!(ticket > tickets[3] && jobs.is_open(ticket) && !jobs.is_open(tickets[3]));
        events.wait(None, &mut ready).unwrap();
        assert_eq!(jobs.take_ended(), [(ticket, 7)]);
        jobs.go_on(ticket, "job", || 8).unwrap();
        assert!(jobs.is_open(ticket));
        events.wait(None, &mut ready).unwrap();
        assert_eq!(jobs.take_ended(), [(ticket, 8)]);
        assert!(!jobs.is_open(ticket));
    }
}
