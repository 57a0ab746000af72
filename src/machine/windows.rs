//! Windows of devices: where they are among the guest's addresses, and what becomes of accesses that KVM cannot do there.

use std::sync::{Arc, Mutex};

use super::parts::Places;
use crate::arch::layout;
use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::log;
use crate::memory::Range;
use crate::memory::window::{ALIGNMENT, View, Window};
use crate::part::{Component, Part};
use crate::platform::Place;
use crate::snapshot::stateless;
use crate::vm::exit::{End, Exit};

/// The name of the part that is the window of a device.
pub fn name_of(device: &str) -> String {
    format!("window of {device}")
}

/// The window in which the guest, of this `memory`, sees the `view` of `device`: where `places` says, or else at the
/// lowest addresses that nothing of `taken` has, and that `places` gives to nobody.
///
/// # Errors
/// The view has another size than the window that `places` gives it, or that cannot be a window; or no addresses are left.
pub fn put(device: &str, view: View, places: &Places, memory: &[Range], taken: &[Range]) -> Result<Window> {
    let range = find(device, (view.size(), ALIGNMENT), places, memory, taken)?;
    Ok(Window { range, view })
}

/// The addresses of so many bytes, from a multiple of an alignment on, for what `device` shows or plugs: see [`put`].
///
/// # Errors
/// The errors are those of [`put`].
pub fn find(
    device: &str,
    (size, alignment): (u64, u64),
    places: &Places,
    memory: &[Range],
    taken: &[Range],
) -> Result<Range> {
    let possible = layout::windows(memory);
    let overlaps =
        |start: u64, other: &Range| start < other.end() && other.start < start.saturating_add(size);
    let start = match places.get(&name_of(device)) {
        Some(Place::Memory { range, gsi: None }) if range.size != size => {
            return Err(Error::config(format!(
                "the guest knows it with {} bytes of address space, and what is there now needs {size}: give it the \
                 file that it had, with the size that it had",
                range.size
            )));
        }
        Some(place @ Place::Memory { range, gsi: None }) => {
            let is_sound = range.start.is_multiple_of(alignment) && possible.contains(*range);
            if !is_sound || taken.iter().any(|other| overlaps(range.start, other)) {
                return Err(Error::config(format!("its window, {place}, is taken, or cannot be")));
            }
            range.start
        }
        Some(place) => return Err(Error::config(format!("its window cannot be at {place}"))),
        None => {
            let given =
                places.iter().filter(|(name, _)| name.starts_with(&name_of(""))).filter_map(|(_, place)| {
                    match place {
                        Place::Memory { range, .. } if possible.contains(*range) => Some(*range),
                        _ => None,
                    }
                });
            let mut others: Vec<Range> = taken.iter().copied().chain(given).collect();
            others.sort_by_key(|range| range.start);
            let aligned = |start: u64| start.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
            let after = |start: u64, other: &Range| match overlaps(start, other) {
                true => aligned(other.end()),
                false => start,
            };
            others.iter().fold(aligned(possible.start), after)
        }
    };
    let range = Range { start, size };
    match possible.contains(range) {
        true => Ok(range),
        false => {
            Err(Error::config(format!("a guest with this memory has no {size} more bytes of addresses")))
        }
    }
}

/// The window as a part of the machine.
pub fn part(device: &str, shown: Arc<Mutex<Shown>>, range: Range) -> Part {
    let place = Place::Memory { range, gsi: None };
    Part { name: name_of(device), place, metrics: Vec::new(), component: shown }
}

/// The addresses of memory that a device plugs, as a part of the machine: what is there is guest memory, and elsewhere
/// nobody answers.
pub fn room_part(device: &str, range: Range) -> Part {
    let place = Place::Memory { range, gsi: None };
    Part { name: name_of(device), place, metrics: Vec::new(), component: Arc::new(Mutex::new(Unplugged)) }
}

/// The addresses of memory that a device plugs.
struct Unplugged;

// Which slots are there is the device's state.
stateless!(Unplugged);
impl Component for Unplugged {}

/// The view in a window, as a device on the bus. KVM does what the guest's CPUs do there; they come here with what it cannot do.
pub struct Shown {
    device: String,
    view: View,
    end: End,
}

impl Shown {
    /// The view that `device` shows.
    pub fn new(device: &str, view: View, end: &End) -> Self {
        Self { device: device.to_owned(), view, end: end.clone() }
    }

    /// A page that cannot be had is no memory to KVM, where it does an instruction itself: on hardware, KVM_RUN fails
    /// instead. The guest cannot go on without the page.
    fn end_without_page(&self, offset: u64) {
        self.view.note_lost();
        let device = &self.device;
        self.end.set(Exit::Failed(format!("a page of {device} cannot be had, at byte {offset}")));
    }
}

// A window's content is the host's, and its place is in the list of parts.
stateless!(Shown);
impl Component for Shown {}

impl BusDevice for Shown {
    fn read(&mut self, offset: u64, _: &mut [u8]) {
        self.end_without_page(offset);
    }

    fn write(&mut self, offset: u64, _: &[u8]) {
        match self.view.is_read_only() {
            true => log::guest_line(format_args!(
                "the guest wrote to {}, which is read-only, at byte {offset}: ignored",
                self.device
            )),
            false => self.end_without_page(offset),
        }
    }
}
