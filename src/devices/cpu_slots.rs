//! The slots of CPUs that come and go while the guest runs. On x86_64, they are registers by which the guest is told
//! that CPUs have come, is asked to let some go, and says that it has; what ACPI makes of them is in
//! `arch/x86_64/cpu_slots.rs`. On aarch64, there are no registers: a CPU that the guest is to let go has gone when the
//! guest has switched it off.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::notice::Notice;
use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::part::Component;
use crate::platform::node::CpuRegisters;
use crate::platform::{Node, Place};
use crate::poll::EventFd;
use crate::snapshot::{self, Snapshot};
use crate::vm::irq::Line;

const CPUS_MAX: usize = CpuRegisters::CPUS_MAX as usize;
const NEWS: u64 = CpuRegisters::NEWS as u64;
const THERE: u64 = CpuRegisters::THERE as u64;
const END: u64 = CpuRegisters::size(CpuRegisters::CPUS_MAX) as u64;

/// How a CPU stands to the guest. The guest can only let go what it was asked for: it takes away no CPU that its owner has
/// given it, and keeps nobody busy with one that goes already.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
enum Standing {
    /// The guest has not been given it.
    Away,
    /// The guest has it, and has not read so.
    Come,
    /// The guest has it.
    There,
    /// The guest is to let it go, and has not read so.
    Leaving,
    /// The guest has read that it is to let it go.
    Asked,
    /// The guest has let it go, and it can still run.
    Gone,
}

use Standing::{Asked, Away, Come, Gone, Leaving, There};

impl Standing {
    /// The guest finds it.
    fn is_there(self) -> bool {
        !matches!(self, Away | Gone)
    }
}

/// The registers.
pub struct CpuSlots {
    // Host
    /// The way to give the guest notice, where there are registers.
    notice: Option<Notice>,
    /// Written to when the guest has let a CPU go.
    wake: Arc<EventFd>,
    // Guest-visible
    /// By their numbers. The first CPU is always there.
    cpus: Vec<Standing>,
}

impl CpuSlots {
    /// The name of the part, and its place's in `layout`.
    pub const NAME: &'static str = "CPU slots";

    /// The slots of `most` CPUs, of which the guest has the first `given` from its start. The guest is told by
    /// `interrupt` when there is something to read; `wake` is written to when it has let a CPU go.
    pub fn new(interrupt: Option<Line>, wake: Arc<EventFd>, given: u16, most: u16) -> Self {
        let cpus = (0..most).map(|number| if number < given { There } else { Away }).collect();
        Self { notice: interrupt.map(|interrupt| Notice::new(interrupt, "CPUs")), wake, cpus }
    }

    /// The numbers of the CPUs that can run.
    pub fn given(&self) -> impl Iterator<Item = usize> {
        self.numbers(|cpu| cpu != Away)
    }

    /// The numbers of those that are to be able to run when the guest has `count`, and cannot yet.
    pub fn missing(&self, count: usize) -> impl Iterator<Item = usize> {
        self.numbers(|cpu| cpu == Away).take(count.saturating_sub(self.given().count()))
    }

    /// Gives the guest as many CPUs as it lacks, which can run by now, or asks it to let go the last ones that it has too
    /// many, again if it was asked already.
    pub fn set_count(&mut self, count: usize) -> Result<()> {
        let missing: Vec<_> = self.missing(count).collect();
        missing.into_iter().for_each(|number| self.cpus[number] = Come);
        let excess = self.given().skip(count.max(1)).min().unwrap_or(self.cpus.len());
        for (number, cpu) in self.cpus.iter_mut().enumerate() {
            match cpu {
                Come | There | Leaving | Asked if number >= excess => *cpu = Leaving,
                // The guest may be about to let it go, or have done so without being heard.
                Leaving | Asked => *cpu = Come,
                Away | Come | There | Gone => {}
            }
        }
        self.give_notice(Notice::give)
    }

    /// Tells the guest again of what it has not read; to be called now and then.
    pub fn remind(&mut self) -> Result<()> {
        self.give_notice(Notice::repeat)
    }

    /// How many CPUs the guest has that it was not asked to let go.
    pub fn staying(&self) -> usize {
        self.numbers(|cpu| matches!(cpu, Come | There)).count()
    }

    /// The numbers of the CPUs that the guest was asked to let go, and has not.
    pub fn asked(&self) -> impl Iterator<Item = usize> {
        self.numbers(|cpu| matches!(cpu, Leaving | Asked))
    }

    /// The numbers of those of which the guest does not hear that it is to let them go.
    pub fn unheard(&self) -> impl Iterator<Item = usize> {
        self.asked().filter(|_| self.notice.is_none())
    }

    /// Notes that the guest has let these go, of which it was asked.
    pub fn let_go(&mut self, numbers: &[usize]) {
        numbers.iter().for_each(|number| self.cpus[*number] = Gone);
    }

    /// The numbers of the CPUs that the guest has let go since this was last called, and that are to run no more.
    pub fn take_gone(&mut self) -> Vec<usize> {
        let gone: Vec<_> = self.numbers(|cpu| cpu == Gone).collect();
        gone.iter().for_each(|number| self.cpus[*number] = Away);
        gone
    }

    fn numbers(&self, is_meant: impl Fn(Standing) -> bool) -> impl Iterator<Item = usize> {
        self.cpus.iter().enumerate().filter(move |(_, cpu)| is_meant(**cpu)).map(|(number, _)| number)
    }

    fn give_notice(&mut self, give: impl FnOnce(&mut Notice) -> Result<()>) -> Result<()> {
        let has_news = self.cpus.iter().any(|cpu| matches!(cpu, Come | Leaving));
        self.notice.as_mut().filter(|_| has_news).map_or(Ok(()), give)
    }

    /// News of the first CPU of which the guest has not read all: it has then.
    fn read_news(&mut self) -> u32 {
        let mut cpus = self.cpus.iter_mut().enumerate();
        let Some((number, cpu)) = cpus.find(|(_, cpu)| matches!(cpu, Come | Leaving)) else {
            return CpuRegisters::NOTHING;
        };
        let (now, kind) = if *cpu == Come { (There, 0) } else { (Asked, CpuRegisters::IS_LEAVING) };
        *cpu = now;
        number as u32 | kind
    }

    /// A bit for each of 32 CPUs that are there.
    fn read_there(&self, first: usize) -> u32 {
        let cpus = self.cpus.iter().skip(first).take(u32::BITS as usize).enumerate();
        cpus.fold(0, |bits, (bit, cpu)| bits | u32::from(cpu.is_there()) << bit)
    }

    fn eject(&mut self, number: u32) {
        if let Some(cpu @ (Leaving | Asked)) = self.cpus.get_mut(number as usize) {
            *cpu = Gone;
            self.wake_main();
        }
    }

    fn wake_main(&self) {
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }
}

/// The standing of every CPU.
#[derive(Deserialize, Serialize)]
pub struct State(#[serde(deserialize_with = "snapshot::at_most::<CPUS_MAX, _, _>")] Vec<Standing>);

impl Snapshot for CpuSlots {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(State(self.cpus.clone()))
    }

    fn restore(&mut self, State(cpus): State) -> Result<()> {
        if cpus.len() != self.cpus.len() || !cpus.first().is_some_and(|first| matches!(first, Come | There)) {
            return Err(Error::config("the saved state has other CPUs: it is damaged"));
        }
        self.cpus = cpus;
        if self.numbers(|cpu| cpu == Gone).next().is_some() {
            self.wake_main();
        }
        Ok(())
    }
}

impl Component for CpuSlots {
    fn nodes(&self, place: Place) -> Vec<Node> {
        match place {
            Place::Ports { range, gsi: Some(gsi) } => {
                let (port, cpus) = (range.start as u16, self.cpus.len() as u16);
                let given = self.given().count() as u16;
                vec![Node::Cpus(CpuRegisters { port, gsi, cpus, given })]
            }
            _ => Vec::new(),
        }
    }
}

impl BusDevice for CpuSlots {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match (offset, data.len()) {
            (NEWS, 4) => self.read_news(),
            (THERE..END, 4) if offset.is_multiple_of(4) => self.read_there((offset - THERE) as usize * 8),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(place, byte)| *place = byte);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (NEWS, Ok(number)) = (offset, data.try_into()) {
            self.eject(u32::from_le_bytes(number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::notice::REMINDERS;
    use super::*;
    use crate::poll;
    use crate::snapshot::SaveState;

    struct Guest {
        slots: CpuSlots,
        interrupt: Arc<EventFd>,
        wake: Arc<EventFd>,
    }

    impl Guest {
        fn new(given: u16, most: u16) -> Self {
            let [interrupt, wake] = ["interrupt", "wake"].map(|name| Arc::new(poll::event(name).unwrap()));
            let slots = CpuSlots::new(Some(Line::Event(interrupt.clone())), wake.clone(), given, most);
            Self { slots, interrupt, wake }
        }

        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0xff; 4];
            self.slots.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        /// Reads all that there is to hear: which CPUs have come, and which are to be let go.
        fn hears(&mut self, come: &[u32], leaving: &[u32]) {
            let news: Vec<u32> = std::iter::repeat_with(|| self.read(NEWS))
                .take_while(|news| *news != CpuRegisters::NOTHING)
                .collect();
            let (left, came): (Vec<u32>, _) =
                news.into_iter().partition(|news| news & CpuRegisters::IS_LEAVING != 0);
            let left: Vec<_> = left.into_iter().map(|news| news & !CpuRegisters::IS_LEAVING).collect();
            assert_eq!((came.as_slice(), left.as_slice()), (come, leaving));
        }

        fn ejects(&mut self, number: u32, expected: &[usize]) {
            self.slots.write(NEWS, &number.to_le_bytes());
            assert_eq!(self.wake.read().is_ok(), !expected.is_empty(), "{number}");
            assert_eq!(self.slots.take_gone(), expected, "{number}");
        }

        fn given(&self) -> Vec<usize> {
            self.slots.given().collect()
        }
    }

    #[test]
    fn a_guest_hears_once_of_each_cpu_that_comes() {
        let mut guest = Guest::new(1, 70);
        assert_eq!((guest.read(NEWS), guest.read(THERE)), (CpuRegisters::NOTHING, 1));
        assert_eq!(guest.slots.missing(3).collect::<Vec<_>>(), [1, 2]);
        guest.slots.set_count(3).unwrap();
        assert_eq!((guest.interrupt.read().unwrap(), guest.read(THERE)), (1, 0b111));
        guest.hears(&[1, 2], &[]);
        guest.slots.remind().unwrap();
        assert!(guest.interrupt.read().is_err(), "it has read all");
        guest.slots.set_count(70).unwrap();
        assert_eq!([4, 8, 12, 16].map(|offset| guest.read(offset)), [u32::MAX, u32::MAX, 0b11_1111, 0]);
        // One that never reads is not told for ever.
        (0..1000).for_each(|_| guest.slots.remind().unwrap());
        assert_eq!(guest.interrupt.read().unwrap(), 1 + u64::from(REMINDERS));
        guest.slots.set_count(70).unwrap();
        assert_eq!(guest.given().len(), 70);
        // Other widths, and beyond the registers.
        let mut data = [0xff; 8];
        guest.slots.read(NEWS, &mut data);
        assert_eq!(data, [0; 8]);
        assert_eq!([1, 6, u64::MAX, u64::MAX - 3].map(|offset| guest.read(offset)), [0; 4]);
    }

    #[test]
    fn a_guest_lets_go_the_cpus_it_was_asked_for_and_no_other() {
        let mut guest = Guest::new(4, 4);
        [0, 1, 3, 4, u32::MAX].into_iter().for_each(|number| guest.ejects(number, &[]));
        guest.slots.set_count(2).unwrap();
        guest.hears(&[], &[2, 3]);
        // Asked again, it hears again.
        guest.slots.set_count(2).unwrap();
        guest.hears(&[], &[2, 3]);
        [0, 1, 4, u32::MAX].into_iter().for_each(|number| guest.ejects(number, &[]));
        // The one in the middle goes first, and only once.
        guest.ejects(2, &[2]);
        guest.ejects(2, &[]);
        assert_eq!((guest.given(), guest.read(THERE)), (vec![0, 1, 3], 0b1011));
        // A request can be taken back: a CPU that the guest was about to let go comes again.
        guest.slots.set_count(3).unwrap();
        guest.hears(&[3], &[]);
        guest.ejects(3, &[]);
        guest.slots.set_count(4).unwrap();
        guest.hears(&[2], &[]);
        // Other widths.
        guest.slots.set_count(1).unwrap();
        guest.slots.write(NEWS, &[3]);
        guest.slots.write(NEWS, &[3; 8]);
        guest.slots.write(THERE, &3_u32.to_le_bytes());
        assert!(guest.slots.take_gone().is_empty());
        assert_eq!(guest.slots.staying(), 1);
        // Before main has looked, it is gone for the guest.
        guest.slots.write(NEWS, &3_u32.to_le_bytes());
        assert_eq!((guest.given(), guest.read(THERE)), (vec![0, 1, 2, 3], 0b0111));
    }

    #[test]
    fn what_a_guest_was_told_of_its_cpus_is_saved() {
        let (mut guest, mut other) = (Guest::new(2, 4), Guest::new(2, 4));
        guest.slots.set_count(4).unwrap();
        guest.hears(&[2, 3], &[]);
        guest.slots.set_count(2).unwrap();
        guest.slots.write(NEWS, &3_u32.to_le_bytes());
        let saved = guest.slots.save_state().unwrap();
        other.slots.restore_state(&saved).unwrap();
        assert!(other.wake.read().is_ok(), "a CPU that was let go waits for it");
        assert_eq!(other.given(), [0, 1, 2, 3]);
        assert_eq!(other.slots.take_gone(), [3]);
        other.hears(&[], &[2]);
        other.ejects(2, &[2]);
        // A state of other CPUs, and one without the first.
        let refused = |state: &[u8]| Guest::new(2, 4).slots.restore_state(state).unwrap_err().to_string();
        let of_others = Guest::new(2, 5).slots.save_state().unwrap();
        assert!(refused(&of_others).contains("other CPUs: it is damaged"));
        let mut without_first = saved.clone();
        without_first[2] = Away as u8;
        assert!(refused(&without_first).contains("other CPUs"));
        assert!(refused(&[1, 0xff, 0xff, 3]).contains("damaged"));
    }
}
