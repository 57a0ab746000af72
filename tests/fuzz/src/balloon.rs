//! The balloon, whose driver is up to the bytes: page numbers and pieces of any kind, statistics that lie, runs of
//! hinting that come and go, pauses and moves. Whatever they are, exactly the whole pages that the driver names go back to
//! the host, as far as they are memory, every chain comes back, and the device works afterwards.

use alula::devices::kind::ConfiguredDevice;
use arbitrary::{Result, Unstructured};
use serde_json::Value;

use crate::driver::{F_EVENT_IDX, Guest, MEMORY, TransportKind, WRITE};
use crate::host::{self, Host};

const STEPS_MAX: usize = 48;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const HINTING: usize = 3;
const REPORTING: usize = 4;
const PAGE: u64 = 4096;
/// Pages that nothing else is in: around the seam of two regions, and all of the third one.
const PAGES: [std::ops::Range<u64>; 2] =
    [640..MEMORY / PAGE, 2 * MEMORY / PAGE..(2 * MEMORY + (1 << 20)) / PAGE];
const FULL: u8 = 7;

pub fn run(bytes: &[u8]) {
    host::with(|host| {
        let device = host.devices.iter().find(|device| device.kind().section == "balloon").unwrap();
        let mut bytes = Unstructured::new(bytes);
        let kind = if bytes.arbitrary().unwrap_or(false) { TransportKind::Mmio } else { TransportKind::Pci };
        let mut driver = Driver {
            host,
            device,
            guest: Some(host.guest(kind, device)),
            empty: Vec::new(),
            run: None,
            said: None,
        };
        driver.start();
        for _ in 0..STEPS_MAX {
            if bytes.is_empty() || driver.step(&mut bytes).is_err() {
                break;
            }
        }
        driver.look();
        let mut guest = driver.guest.take().unwrap();
        guest.start(0);
        host.exercise(device, &mut guest);
    });
}

struct Driver<'a> {
    host: &'a Host,
    device: &'a ConfiguredDevice,
    /// The guest; None: it is being built anew.
    guest: Option<Guest>,
    /// The pages that were given and not written to since.
    empty: Vec<u64>,
    /// The run of hinting that the host has asked for.
    run: Option<u32>,
    /// The command that the driver gave last.
    said: Option<u32>,
}

fn pages() -> impl Iterator<Item = u64> {
    PAGES.into_iter().flatten()
}

impl Driver<'_> {
    fn guest(&mut self) -> &mut Guest {
        let guest = self.guest.as_mut().unwrap();
        guest.notes.allocated = 0;
        guest
    }

    fn start(&mut self) {
        self.guest().start(F_EVENT_IDX);
        self.guest().turn();
        for range in PAGES {
            self.guest().fill(range.start * PAGE, (range.end - range.start) * PAGE, FULL);
        }
        (self.empty, self.run, self.said) = (Vec::new(), None, None);
    }

    fn step(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        match bytes.arbitrary::<u8>()? % 12 {
            0..=2 => self.give_numbers(bytes)?,
            3 | 4 => self.give_pieces(REPORTING, bytes)?,
            5 => self.give_pieces(HINTING, bytes)?,
            6 => self.command(bytes)?,
            7 => self.take_back(bytes)?,
            8 => self.tell(bytes)?,
            9 => self.change(bytes)?,
            10 => self.build_anew(),
            _ => {
                let (offset, value) = (bytes.arbitrary::<u8>()?.into(), bytes.arbitrary::<u64>()?);
                self.guest().set_config(offset, &value.to_le_bytes());
            }
        }
        Ok(())
    }

    fn give_numbers(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let mut numbers = Vec::new();
        for _ in 0..bytes.arbitrary::<u8>()? % 64 {
            numbers.push(match bytes.arbitrary::<u8>()? % 8 {
                0 => bytes.arbitrary::<u32>()?.max(2 * (MEMORY / PAGE) as u32),
                1 => u32::MAX,
                2 => 2 * (MEMORY / PAGE) as u32 + u32::from(bytes.arbitrary::<u8>()?),
                _ => 640 + u32::from(bytes.arbitrary::<u16>()? % 400),
            });
        }
        let list: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let (address, length) = self.guest().allocate(&list);
        let odd = u32::from(bytes.arbitrary::<u8>()? % 4);
        self.guest().request(INFLATE, &[((address, length.saturating_sub(odd)), 0)]);
        let whole = numbers.len() - usize::from(odd > 0 && !numbers.is_empty());
        self.empty.extend(numbers[..whole].iter().map(|number| u64::from(*number)));
        Ok(())
    }

    fn give_pieces(&mut self, queue: usize, bytes: &mut Unstructured<'_>) -> Result<()> {
        let mut pieces = Vec::new();
        for _ in 0..1 + bytes.arbitrary::<u8>()? % 8 {
            let start = 640 * PAGE + u64::from(bytes.arbitrary::<u16>()?) * 256;
            let length = match bytes.arbitrary::<u8>()? % 4 {
                0 => bytes.arbitrary::<u16>()?.into(),
                1 => 0,
                2 => u32::from(bytes.arbitrary::<u8>()?) * PAGE as u32,
                _ => bytes.arbitrary::<u32>()? % (8 << 20),
            };
            pieces.push(((start, length), if bytes.arbitrary::<u8>()? == 0 { 0 } else { WRITE }));
        }
        // On the queue of hints, a piece that the device may only read is a command.
        if queue == HINTING {
            pieces.retain(|(_, flags)| *flags == WRITE);
        }
        if pieces.is_empty() {
            return Ok(());
        }
        self.guest().request(queue, &pieces);
        let is_taken = queue == REPORTING || self.run.is_some() && self.run == self.said;
        if is_taken {
            // Pieces that touch are one.
            let mut ends: Vec<_> = pieces
                .iter()
                .filter(|(_, flags)| *flags == WRITE)
                .map(|((start, length), _)| (*start, start + u64::from(*length)))
                .collect();
            ends.sort_unstable();
            let mut whole: Vec<(u64, u64)> = Vec::new();
            for (start, end) in ends {
                match whole.last_mut().filter(|last| last.1 >= start) {
                    Some(last) => last.1 = last.1.max(end),
                    None => whole.push((start, end)),
                }
            }
            let of = |(start, end): (u64, u64)| start.div_ceil(PAGE)..end / PAGE;
            self.empty.extend(whole.into_iter().flat_map(of));
        }
        Ok(())
    }

    fn command(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let asked = self.run.unwrap_or(0);
        let command = [0, 1, asked, asked, bytes.arbitrary()?][usize::from(bytes.arbitrary::<u8>()? % 5)];
        let buffer = self.guest().allocate(&u32::to_le_bytes(command));
        self.guest().request(HINTING, &[(buffer, 0)]);
        // Each run of hinting here ends when the driver says so.
        self.said = Some(command);
        self.run = self.run.filter(|_| command > 1);
        Ok(())
    }

    fn take_back(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let page = 640 + u64::from(bytes.arbitrary::<u16>()? % 384);
        let number = self.guest().allocate(&(page as u32).to_le_bytes());
        self.guest().request(DEFLATE, &[(number, 0)]);
        self.guest().fill(page * PAGE, PAGE, FULL);
        self.empty.retain(|other| *other != page);
        Ok(())
    }

    fn tell(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let count = usize::from(bytes.arbitrary::<u8>()?).min(bytes.len());
        let said = bytes.bytes(count)?.to_vec();
        let guest = self.guest();
        let (available, size) = guest.available(STATISTICS);
        // The last buffer of statistics stays with the device.
        assert!(available.wrapping_sub(guest.used_index(STATISTICS)) <= 1 && size > 1);
        let buffer = guest.allocate(&said);
        guest.offer(STATISTICS, &[(buffer, 0)]);
        guest.kick(STATISTICS);
        guest.turn();
        let told = guest.transport.lock().unwrap().tell("statistics").unwrap();
        let known = said.chunks_exact(10).filter(|entry| u16::from_le_bytes([entry[0], entry[1]]) < 16);
        for entry in known.take(64) {
            let is_there =
                |value: &Value| value.as_u64() == Some(u64::from_le_bytes(entry[2..].try_into().unwrap()));
            let later = said.chunks_exact(10).filter(|other| other[..2] == entry[..2]).count();
            assert!(later > 1 || told.as_object().unwrap().values().any(is_there), "{told}: {entry:?}");
        }
        Ok(())
    }

    fn change(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let (place, body) = match bytes.arbitrary::<u8>()? % 4 {
            0 => ("hinting/start", String::new()),
            1 => ("hinting/stop", String::new()),
            2 => ("statistics", r#"{"stats_polling_interval_s": 60}"#.to_owned()),
            _ => ("", format!(r#"{{"amount_mib": {}}}"#, bytes.arbitrary::<u32>()?)),
        };
        let change = self.device.kind().parse_patch(place, body.as_bytes()).unwrap();
        self.guest().pause();
        let patched =
            self.guest().transport.lock().unwrap().patch(change.patch(), &mut alula::host::Host::default());
        patched.unwrap();
        self.guest().resume();
        self.guest().turn();
        let mut word = [0; 4];
        self.guest().config(8, &mut word);
        match place {
            "hinting/start" => self.run = Some(u32::from_le_bytes(word)),
            "hinting/stop" => self.run = None,
            _ => {}
        }
        Ok(())
    }

    /// Has another machine go on from the state of this guest's machine.
    fn build_anew(&mut self) {
        self.guest().pause();
        let old = self.guest.take().unwrap();
        let (state, notes) = (old.save(), old.notes.clone());
        let mut guest = self.host.guest_anew(self.device, old);
        guest.notes = notes;
        guest.restore(&state).unwrap();
        assert!(guest.save() == state, "what was restored is not what was saved");
        guest.resume();
        guest.turn();
        self.guest = Some(guest);
    }

    /// Asserts that exactly the pages that were given are empty.
    fn look(&mut self) {
        let empty = std::mem::take(&mut self.empty);
        let guest = self.guest();
        for page in pages() {
            let expected = if empty.contains(&page) { 0 } else { FULL };
            let found = guest.bytes((page * PAGE, PAGE as u32));
            assert!(found.iter().all(|byte| *byte == expected), "page {page}: not all is {expected}");
        }
    }
}
