//! Errands: what a worker of a device has `main` do, which alone opens files and sockets.
//!
//! A worker on an io thread asks and goes on with its work. `main` does the errand in a turn of its own loop and
//! gives the answer, an open descriptor or an error, to the worker's loop, which tells the worker. A worker that
//! no longer wants the answer drops its [`Pending`], and so does one that is stopped because its device is
//! paused, reset or detached: the errand is then left undone, or the descriptor that it gave is closed. Nobody
//! ever waits for an errand, least of all a pause.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::poll::EventFd;

/// So many errands of one machine may be under way: asked for, and not yet answered on the loop of the worker
/// that asked. A guest that makes its devices ask without end would take up memory and descriptors without end.
pub const UNDER_WAY_MAX: usize = 64;
/// So many errands `main` does in one turn: the API, signals and the console have theirs between two turns,
/// whatever a guest makes its devices ask for.
const PER_TURN: usize = 8;

/// How an errand ends.
pub type Answer = Result<OwnedFd>;

type Work = Box<dyn FnOnce(&mut Host) -> Answer + Send>;
type Tell = Box<dyn FnOnce(Answered) + Send>;
type Cell = Mutex<Option<Answer>>;

/// The errands of a machine.
pub struct Errands {
    waiting: Mutex<VecDeque<Errand>>,
    under_way: Arc<AtomicUsize>,
    wake: Arc<EventFd>,
}

/// An errand that waits for `main`.
struct Errand {
    work: Work,
    cell: Weak<Cell>,
    tell: Tell,
    permit: Permit,
}

/// One of the [`UNDER_WAY_MAX`].
struct Permit(Arc<AtomicUsize>);

impl Permit {
    fn take(under_way: &Arc<AtomicUsize>) -> Option<Self> {
        let permit = Self(under_way.clone());
        // With one too many, the permit is given back at once.
        (under_way.fetch_add(1, Ordering::SeqCst) < UNDER_WAY_MAX).then_some(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The place of an answer to come. Dropping it takes the errand back.
#[must_use = "an errand that nobody wants the answer of is not done"]
pub struct Pending(Arc<Cell>);

impl Pending {
    /// Takes the answer, if it has come.
    pub fn take(&mut self) -> Option<Answer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// An answer on its way to the worker's loop. When it is dropped, another errand may take its place.
pub struct Answered {
    cell: Arc<Cell>,
    _permit: Permit,
}

impl Answered {
    /// Whether somebody still wants the answer. To be called on the loop of the worker that asked.
    pub fn is_wanted(&self) -> bool {
        Arc::strong_count(&self.cell) > 1
    }
}

impl Errands {
    /// No errands yet; `wake` is written to when `main` is to take a turn.
    pub fn new(wake: Arc<EventFd>) -> Arc<Self> {
        Arc::new(Self { waiting: Mutex::default(), under_way: Arc::default(), wake })
    }

    /// Has `main` do `work`, soon. The answer is in the [`Pending`] when `tell` is called, on main's thread:
    /// `tell` only passes on that it is there. An error: too many errands are under way.
    pub fn ask(
        &self,
        work: impl FnOnce(&mut Host) -> Answer + Send + 'static,
        tell: impl FnOnce(Answered) + Send + 'static,
    ) -> Result<Pending> {
        let permit = Permit::take(&self.under_way).ok_or_else(|| {
            Error::guest(format!("{UNDER_WAY_MAX} errands of its devices are under way already"))
        })?;
        let pending = Pending(Arc::default());
        let errand =
            Errand { work: Box::new(work), cell: Arc::downgrade(&pending.0), tell: Box::new(tell), permit };
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(errand);
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
        Ok(pending)
    }

    /// Does some of the errands that wait, and has `main` woken for those that are left. To be called by `main`
    /// after each time that it was woken. Returns whether there was an errand.
    pub fn turn(&self, host: &mut Host) -> bool {
        let next = || self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let done = std::iter::from_fn(next).take(PER_TURN).map(|errand| errand.run(host)).count();
        if done == PER_TURN {
            let _ = self.wake.write(1);
        }
        done > 0
    }
}

impl Errand {
    fn run(self, host: &mut Host) {
        let Self { work, cell, tell, permit } = self;
        // Who asked may have taken the errand back.
        if let Some(cell) = cell.upgrade() {
            let answer = work(host);
            *cell.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
            tell(Answered { cell, _permit: permit });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::host::Host;

    fn errands() -> Arc<Errands> {
        Errands::new(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
    }

    /// An answer, and its other end, which is at its end once the answer is closed.
    fn answer() -> (OwnedFd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours.into(), theirs)
    }

    fn is_closed(mut end: &UnixStream) -> bool {
        match end.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                false
            }
        }
    }

    #[test]
    fn too_many_errands_are_refused_and_few_are_done_in_a_turn() {
        let errands = errands();
        let told = Arc::new(Mutex::new(Vec::new()));
        let ask = || {
            let told = told.clone();
            errands.ask(|_| Err(Error::host("no")), move |answered| told.lock().unwrap().push(answered))
        };
        let mut pending: Vec<_> = (0..UNDER_WAY_MAX).map(|_| ask().unwrap()).collect();
        for _ in 0..2 {
            let error = ask().err().expect("as many as may be are under way").to_string();
            assert!(error.contains("64 errands"), "{error}");
        }
        for turn in 1..=UNDER_WAY_MAX / PER_TURN {
            errands.wake.read().expect("main is woken for those that are left");
            assert!(errands.turn(&mut Host::default()));
            assert_eq!(told.lock().unwrap().len(), turn * PER_TURN);
        }
        assert!(ask().is_err(), "none of the answers has reached its worker");
        assert!(pending.iter_mut().all(|pending| pending.take().is_some_and(|answer| answer.is_err())));
        assert!(pending[0].take().is_none(), "an answer is taken once");
        told.lock().unwrap().pop();
        let next = ask().expect("one answer has reached its worker");
        assert!(ask().is_err());
        // Taken back before it was done: its place is free once main has seen that.
        drop(next);
        assert!(errands.turn(&mut Host::default()));
        assert!(!errands.turn(&mut Host::default()));
        assert!(ask().is_ok());
    }

    #[test]
    fn an_errand_that_is_taken_back_is_not_done_or_closed() {
        let errands = errands();
        let early = errands.ask(|_| panic!("nobody wants it"), |_| panic!("nobody waits for it")).unwrap();
        drop(early);
        let (given, end) = answer();
        let told = Arc::new(Mutex::new(None));
        let tell = told.clone();
        let late =
            errands.ask(|_| Ok(given), move |answered| *tell.lock().unwrap() = Some(answered)).unwrap();
        errands.turn(&mut Host::default());
        let answered = told.lock().unwrap().take().unwrap();
        assert!(answered.is_wanted() && !is_closed(&end));
        drop(late);
        assert!(!answered.is_wanted());
        drop(answered);
        assert!(is_closed(&end));
        // Of a machine that is gone.
        let (given, end) = answer();
        let pending = errands.ask(move |_| Ok(given), |_| ()).unwrap();
        drop(errands);
        assert!(is_closed(&end));
        drop(pending);
    }
}
