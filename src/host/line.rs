//! The line between a console of the guest and whoever is at it: what is typed, the terminal's size, and where the
//! guest's words go. `main` is at one end, a device's worker at the other.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::console::Output;
use crate::error::Result;
use crate::poll::{self, EventFd};

/// The most that is kept of what is typed until the guest takes it; the rest stays with who types.
pub const TYPED_MAX: usize = 4096;

/// The line.
pub struct UserLine {
    typed: Mutex<Typed>,
    output: Mutex<Output>,
    /// Written to when something was typed, or the terminal has another size.
    event: EventFd,
}

#[derive(Default)]
struct Typed {
    bytes: VecDeque<u8>,
    rows: u16,
    columns: u16,
    /// Written to when there is room again for more of what is typed.
    room: Option<Arc<EventFd>>,
    /// Somebody waits for room.
    is_wanted: bool,
}

impl UserLine {
    /// A line with nobody at its end: what the guest says goes nowhere.
    pub fn new() -> Result<Arc<Self>> {
        let event = poll::event("virtio console, what is typed")?;
        Ok(Arc::new(Self { typed: Mutex::default(), output: Mutex::new(Output::nowhere()), event }))
    }

    /// Writes to `room` when there is room again for what is typed. Has the guest's words go to what `output` makes, unless
    /// they go somewhere already: a line goes along with its device from one machine to the next.
    pub fn connect(&self, room: Arc<EventFd>, output: impl FnOnce() -> Result<Output>) -> Result<()> {
        let is_first = self.lock().room.replace(room).is_none();
        if is_first {
            *self.output.lock().unwrap_or_else(PoisonError::into_inner) = output()?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Typed> {
        self.typed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable, by its edge, when something was typed, or the terminal has another size.
    pub fn typed_event(&self) -> &EventFd {
        &self.event
    }

    /// Types as many of `bytes` as there is room for, and returns how many. When some are left, the event for room is
    /// written to once the guest has taken some.
    pub fn type_bytes(&self, bytes: &[u8]) -> usize {
        let mut typed = self.lock();
        let count = bytes.len().min(TYPED_MAX - typed.bytes.len());
        typed.bytes.extend(&bytes[..count]);
        typed.is_wanted = count < bytes.len();
        drop(typed);
        if count > 0 {
            // A counter that is full tells the same.
            let _ = self.event.write(1);
        }
        count
    }

    /// The terminal has so many rows and columns.
    pub fn set_size(&self, size: (u16, u16)) {
        let mut typed = self.lock();
        if (typed.rows, typed.columns) != size {
            (typed.rows, typed.columns) = size;
            drop(typed);
            let _ = self.event.write(1);
        }
    }

    /// How many rows and columns the terminal has; 0: it is not known.
    pub fn size(&self) -> (u16, u16) {
        let typed = self.lock();
        (typed.rows, typed.columns)
    }

    /// Takes the first of what was typed, as much as `bytes` holds, and returns how much that is.
    pub fn take(&self, bytes: &mut [u8]) -> usize {
        let mut typed = self.lock();
        let count = bytes.len().min(typed.bytes.len());
        bytes.iter_mut().zip(typed.bytes.drain(..count)).for_each(|(to, from)| *to = from);
        if count > 0
            && std::mem::take(&mut typed.is_wanted)
            && let Some(room) = &typed.room
        {
            let _ = room.write(1);
        }
        count
    }

    /// All that was typed and not taken.
    pub fn typed(&self) -> Vec<u8> {
        self.lock().bytes.iter().copied().collect()
    }

    /// Has these bytes be what was typed and not taken, TYPED_MAX of them at most.
    pub fn set_typed(&self, bytes: &[u8]) {
        self.lock().bytes = bytes[..bytes.len().min(TYPED_MAX)].iter().copied().collect();
    }

    /// Does something with what the guest's words go to.
    pub fn with_output<T>(&self, act: impl FnOnce(&mut Output) -> T) -> T {
        act(&mut self.output.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_waits_for_the_guest_and_room_is_told() {
        let line = UserLine::new().unwrap();
        let room = Arc::new(poll::event("room").unwrap());
        line.connect(room.clone(), || Ok(Output::nowhere())).unwrap();
        assert_eq!(line.type_bytes(&[b'a'; TYPED_MAX]), TYPED_MAX);
        assert!(line.typed_event().read().is_ok() && room.read().is_err());
        assert_eq!(line.type_bytes(b"bc"), 0);
        let mut taken = [0; 100];
        assert_eq!(line.take(&mut taken), 100);
        room.read().expect("there is room again");
        assert_eq!(line.type_bytes(b"bc"), 2);
        assert_eq!(line.take(&mut taken), 100);
        assert!(room.read().is_err(), "nobody waits for room");
        assert_eq!(line.typed().last(), Some(&b'c'));
        line.set_typed(b"x");
        assert_eq!((line.take(&mut taken), taken[0]), (1, b'x'));
    }

    #[test]
    fn a_size_is_told_when_it_changes() {
        let line = UserLine::new().unwrap();
        line.set_size((0, 0));
        assert!(line.typed_event().read().is_err());
        line.set_size((24, 80));
        line.typed_event().read().unwrap();
        assert_eq!(line.size(), (24, 80));
    }
}
