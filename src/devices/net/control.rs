//! The control queue (virtio 1.3, 5.1.6.5): which frames the driver wants, its address, how many queue
//! pairs it uses, what offloads it takes. The TAP's own filter does the filtering.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddressSpace;

use super::features;
use crate::error::Result;
use crate::host::tap::Tap;
use crate::memory::Memory;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Queue, Registrar, Worker};

/// Addresses kept of each of the two tables; of more, all frames of the kind are let through. Without a
/// limit, a table would take whatever memory the guest has.
const TABLE_MAX: usize = 64;
/// What is read of a command: two tables of 256 entries. Longer tables are not kept anyway.
const COMMAND_MAX: usize = 2 + 2 * (4 + 6 * 256);

const OK: u8 = 0;
const ERR: u8 = 1;

const BROADCAST: [u8; 6] = [0xff; 6];

/// Addresses.
type Table = Vec<[u8; 6]>;

/// What the driver has said by the control queue, and what a saved state has of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    mac: [u8; 6],
    filter: Filter,
    /// Queue pairs in use.
    pairs: u16,
    /// Its own choice of offloads, as feature bits; none: all that it negotiated.
    offloads: Option<u64>,
}

/// Which frames it wants.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
struct Filter {
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Table,
    multicast: Table,
}

impl State {
    /// At power-on: everything is let through until the driver says otherwise.
    pub fn new(mac: [u8; 6]) -> Self {
        let filter = Filter {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
        };
        Self { mac, filter, pairs: 1, offloads: None }
    }

    /// Its address now.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Whether a device with so many pairs can be in this state.
    pub fn fits(&self, pairs: u16) -> bool {
        let Filter { unicast, multicast, .. } = &self.filter;
        (1..=pairs).contains(&self.pairs) && unicast.len() <= TABLE_MAX && multicast.len() <= TABLE_MAX
    }

    /// Makes the TAP's queues as the driver wants them; it accepted `features`.
    pub fn apply(&self, taps: &[Tap], features: u64) -> std::io::Result<()> {
        for (index, tap) in taps.iter().enumerate().skip(1) {
            tap.set_attached(index < usize::from(self.pairs))?;
        }
        let Some(tap) = taps.first() else { return Ok(()) };
        let chosen = self.offloads.unwrap_or(u64::MAX) | !features::GUEST_OFFLOADS;
        tap.set_offloads(features::tap_offloads(features & chosen))?;
        // One without filters (a macvtap) gives more than is wanted.
        let _ = tap.set_filter(self.filter.addresses(self.mac).as_deref(), self.filter.all_multicast);
        Ok(())
    }
}

impl Filter {
    /// The addresses to let through; none: there is no telling them apart.
    fn addresses(&self, mac: [u8; 6]) -> Option<Table> {
        // A TAP cannot keep kinds of frames out; that is the driver's wish, not its protection.
        let everything = self.promiscuous || self.all_unicast;
        (!everything).then(|| {
            let own = [mac].into_iter().filter(|_| !self.no_unicast);
            let broadcast = [BROADCAST].into_iter().filter(|_| !self.no_broadcast);
            let unicast = self.unicast.iter().copied().filter(|_| !self.no_unicast);
            let multicast = self.multicast.iter().copied().filter(|_| !self.no_multicast);
            own.chain(broadcast).chain(unicast).chain(multicast).collect()
        })
    }

    fn set_mode(&mut self, command: u8, on: bool) -> bool {
        let mode = match command {
            0 => &mut self.promiscuous,
            1 => &mut self.all_multicast,
            2 => &mut self.all_unicast,
            3 => &mut self.no_multicast,
            4 => &mut self.no_unicast,
            5 => &mut self.no_broadcast,
            _ => return false,
        };
        *mode = on;
        true
    }

    /// Two tables, each a count of 32 bits and addresses.
    fn set_tables(&mut self, data: &[u8]) -> bool {
        let tables = table(data).and_then(|(unicast, rest)| Some((unicast, table(rest)?.0)));
        let Some((unicast, multicast)) = tables else {
            // Too long to be read, or cut off by the driver.
            (self.all_unicast, self.all_multicast) = (true, true);
            return data.len() + 2 >= COMMAND_MAX;
        };
        // More than is kept: everything of the kind.
        self.all_unicast = unicast.is_none();
        self.all_multicast |= multicast.is_none();
        (self.unicast, self.multicast) = (unicast.unwrap_or_default(), multicast.unwrap_or_default());
        true
    }
}

/// A table and what follows it; none: it is cut off. The table is none when it is too long to keep.
fn table(data: &[u8]) -> Option<(Option<Table>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (entries, rest) = rest.split_at_checked(length)?;
    let entries = (length <= 6 * TABLE_MAX).then(|| entries.as_chunks::<6>().0.to_vec());
    Some((entries, rest))
}

/// What the driver accepted and has said, seen by the device and by the worker of the control queue.
pub struct Control {
    state: Mutex<State>,
    /// The link came back in another place: the driver is to tell the network (virtio 1.3, 5.1.4.2).
    announce: std::sync::atomic::AtomicBool,
}

impl Control {
    /// In this state.
    pub fn new(state: State) -> Self {
        Self { state: Mutex::new(state), announce: false.into() }
    }

    /// What the driver has said so far.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the driver still has to tell the network where it is.
    pub fn is_announcing(&self) -> bool {
        self.announce.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// It has to, or it has.
    pub fn set_announcing(&self, announce: bool) {
        self.announce.store(announce, std::sync::atomic::Ordering::SeqCst);
    }

    /// Does one command: class, command and its data.
    fn act(&self, command: &[u8], taps: &[Tap], features: u64, pairs: u16) -> u8 {
        let Some(([class, command], data)) = command.split_first_chunk::<2>() else { return ERR };
        let mut state = self.state();
        let mut new = state.clone();
        let has = |feature| features::has(features, feature);
        let is_known = match (class, command, data) {
            (0, 0..=1, [on, ..]) if has(features::CTRL_RX) => new.filter.set_mode(*command, *on != 0),
            (0, 2..=5, [on, ..]) if has(features::CTRL_RX_EXTRA) => new.filter.set_mode(*command, *on != 0),
            (1, 0, tables) if has(features::CTRL_RX) => new.filter.set_tables(tables),
            (1, 1, [a, b, c, d, e, f]) if has(features::CTRL_MAC_ADDR) => {
                new.mac = [*a, *b, *c, *d, *e, *f];
                true
            }
            (3, 0, _) if has(features::GUEST_ANNOUNCE) => {
                self.set_announcing(false);
                return OK;
            }
            (4, 0, [low, high, ..]) if has(features::MQ) => {
                new.pairs = u16::from_le_bytes([*low, *high]);
                (1..=pairs).contains(&new.pairs)
            }
            (5, 0, bits) if has(features::CTRL_GUEST_OFFLOADS) => match bits.first_chunk::<8>() {
                Some(bits) => {
                    let bits = u64::from_le_bytes(*bits);
                    new.offloads = Some(bits);
                    bits & !(features & features::GUEST_OFFLOADS) == 0
                }
                None => false,
            },
            _ => false,
        };
        if !is_known {
            return ERR;
        }
        if new.apply(taps, features).is_err() {
            // The host has done a part of it: the driver is told that nothing has changed.
            let _ = state.apply(taps, features);
            return ERR;
        }
        *state = new;
        OK
    }
}

/// The running half of the control queue.
pub struct Running {
    memory: Memory,
    queue: Queue,
    control: Arc<Control>,
    taps: Vec<Tap>,
    features: u64,
    pairs: u16,
    readable: Buffers,
    writable: Buffers,
}

impl Running {
    /// For a device with so many queue pairs, over `taps` if it has some.
    pub fn new(
        memory: Memory,
        queue: Queue,
        control: Arc<Control>,
        taps: Vec<Tap>,
        features: u64,
        pairs: u16,
    ) -> Self {
        let [readable, writable] = [(); 2].map(|()| Buffers::new(memory.clone()));
        Self { memory, queue, control, taps, features, pairs, readable, writable }
    }
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.queue, 0)
    }

    fn handle(&mut self, _token: u32) -> Result<()> {
        let memory = self.memory.memory();
        let Self { control, taps, features, pairs, readable, writable, .. } = self;
        self.queue.serve(&memory, |chain| {
            Buffers::split(chain, readable, writable)?;
            let mut command = [0; COMMAND_MAX];
            let length = readable.len().min(COMMAND_MAX);
            readable.copy_to(&mut command[..length]);
            let ack = control.act(&command[..length], taps, *features, *pairs);
            writable.copy_from(0, &[ack]);
            Ok(Some(writable.len().min(1) as u32))
        })
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    fn control() -> Control {
        Control::new(State::new([2, 0, 0, 0, 0, 1]))
    }

    fn tables(unicast: u32, multicast: u32) -> Vec<u8> {
        let table = |count: u32, first: u8| {
            let entries = (0..count).flat_map(move |index| [first, 0, 0, 0, (index >> 8) as u8, index as u8]);
            count.to_le_bytes().into_iter().chain(entries).collect::<Vec<_>>()
        };
        [vec![1, 0], table(unicast, 2), table(multicast, 1)].concat()
    }

    #[test]
    fn a_driver_gets_the_frames_it_asks_for() {
        let control = control();
        let addresses = || {
            let state = control.state();
            state.filter.addresses(state.mac())
        };
        assert_eq!(addresses(), None, "everything at power-on");
        assert_eq!(control.act(&[0, 0, 0], &[], ALL, 1), OK);
        assert_eq!(addresses(), Some(vec![[2, 0, 0, 0, 0, 1], BROADCAST]));
        assert_eq!(control.act(&tables(1, 2), &[], ALL, 1), OK);
        assert_eq!(addresses().unwrap().len(), 5);
        assert_eq!(control.act(&[0, 3, 1], &[], ALL, 1), OK);
        assert_eq!(control.act(&[0, 5, 1], &[], ALL, 1), OK);
        assert_eq!(addresses(), Some(vec![[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 0]]));
        assert_eq!(control.act(&[1, 1, 6, 7, 8, 9, 10, 11], &[], ALL, 1), OK);
        assert_eq!(control.state().mac(), [6, 7, 8, 9, 10, 11]);
    }

    #[test]
    fn more_addresses_than_are_kept_let_everything_of_their_kind_through() {
        let control = control();
        assert_eq!(control.act(&[0, 0, 0], &[], ALL, 1), OK);
        assert_eq!(control.act(&tables(TABLE_MAX as u32, 65), &[], ALL, 1), OK);
        assert!(control.state().filter.all_multicast && !control.state().filter.all_unicast);
        assert_eq!(control.act(&tables(TABLE_MAX as u32 + 1, 0), &[], ALL, 1), OK);
        assert_eq!(control.state().filter.addresses([0; 6]), None);
        assert!(control.state().fits(1));
        assert_eq!(control.act(&[0, 1, 0], &[], ALL, 1), OK);
        assert_eq!(control.act(&tables(1, 2), &[], ALL, 1), OK);
        assert_eq!(control.act(&tables(10, 1000)[..COMMAND_MAX], &[], ALL, 1), OK);
        assert!(control.state().filter.all_multicast && control.state().filter.all_unicast);
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_changes_nothing() {
        let control = control();
        let before = control.state().clone();
        for (command, features) in [
            (&[][..], ALL),
            (&[0], ALL),
            (&[0, 0], ALL),
            (&[0, 9, 1], ALL),
            (&[0, 0, 1], 0),
            (&[1, 0, 1, 0, 0, 0], ALL),
            (&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], ALL),
            (&[1, 1, 2, 0, 0], ALL),
            (&[1, 1, 2, 0, 0, 0, 0, 5, 6], ALL),
            (&[2, 0, 1, 0], ALL),
            (&[4, 0, 0, 0], ALL),
            (&[4, 0, 3, 0], ALL),
            (&[4, 0, 2], ALL),
            (&[5, 0, 1, 0], ALL),
            (&[5, 0, 1, 0, 0, 0, 0, 0, 0, 0], ALL),
            (&[99, 99, 99], ALL),
        ] {
            assert_eq!(control.act(command, &[], features, 2), ERR, "{command:?}");
        }
        assert_eq!(*control.state(), before);
        assert_eq!(control.act(&[4, 0, 2, 0], &[], ALL, 2), OK);
        assert_eq!(control.act(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], &[], ALL, 2), OK);
        assert!(!control.state().fits(1) && control.state().fits(2));
    }
}
