//! Machines in this process that are saved, dropped, and built again over a copy of their memory.

use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use alula::config::Config;
use alula::error::Result;
use alula::host::Host;
use alula::machine::{Machine, Prepared, SavedMachine, Shell};
use alula::memory::{Memory, Piece, Source};

use super::Folder;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

const PAGE: usize = 4096;

/// What the guests write to their serial consoles.
#[derive(Clone, Default)]
pub struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Screen {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    pub fn host(&self) -> Host {
        let mut host = Host::default();
        host.give_console(Box::new(self.clone()));
        host
    }
}

/// A machine built and loaded for the first time, which runs.
pub fn boot(config: &Config, screen: &Screen) -> Box<Machine> {
    let mut host = screen.host();
    let mut machine = Machine::build("test", config, &mut host, Prepared::new().unwrap()).unwrap();
    machine.load(config, &mut host).unwrap();
    machine.resume().unwrap();
    machine
}

/// The pages that hold something, with their addresses.
fn pages(memory: &Memory) -> Vec<(u64, Vec<u8>)> {
    let memory = memory.memory();
    let (mut pages, mut page) = (Vec::new(), vec![0; PAGE]);
    for region in memory.iter() {
        for offset in (0..region.len()).step_by(PAGE) {
            let address = region.start_addr().0 + offset;
            memory.read_slice(&mut page, GuestAddress(address)).unwrap();
            if page != [0; PAGE] {
                pages.push((address, page.clone()));
            }
        }
    }
    pages
}

/// A machine that stands still: as bytes, and what its memory holds.
pub struct Suspended {
    pub bytes: Vec<u8>,
    pages: Vec<(u64, Vec<u8>)>,
}

impl Suspended {
    pub fn new(mut machine: Box<Machine>) -> Self {
        let bytes = machine.save().unwrap().to_bytes().unwrap();
        Self { bytes, pages: pages(machine.memory()) }
    }

    /// Builds the machine that `bytes` are of; it does not run yet.
    pub fn build(&self, bytes: &[u8], screen: &Screen) -> Result<Box<Machine>> {
        let saved = SavedMachine::from_bytes(bytes)?;
        let mut machine = Machine::build_from(
            Source::Anonymous,
            &saved.places,
            saved.plugged(),
            "another name",
            &saved.config,
            &mut screen.host(),
            Prepared::new().unwrap(),
        )?;
        let memory = machine.memory().memory();
        self.pages
            .iter()
            .for_each(|(address, page)| memory.write_slice(page, GuestAddress(*address)).unwrap());
        machine.restore(&saved)?;
        Ok(machine)
    }

    /// The same on a shell that was made ahead, over a file with the guest's memory in `folder`.
    pub fn build_on(&self, shell: Shell, folder: &Folder, screen: &Screen) -> Box<Machine> {
        let saved = SavedMachine::from_bytes(&self.bytes).unwrap();
        let path = folder.path("memory");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        let mut pieces = Vec::new();
        let mut position = 0;
        for range in saved.memory().iter().copied() {
            pieces.push(Piece { range, position });
            for (address, page) in
                self.pages.iter().filter(|(address, _)| (range.start..range.end()).contains(address))
            {
                file.write_all_at(page, position + address - range.start).unwrap();
            }
            position += range.size;
        }
        file.set_len(position).unwrap();
        let source = Source::Private { file: &file, pieces: &pieces };
        let (places, plugged, config) = (&saved.places, saved.plugged(), &saved.config);
        let mut host = screen.host();
        let mut machine =
            Machine::build_from(source, places, plugged, "test", config, &mut host, shell).unwrap();
        machine.restore(&saved).unwrap();
        machine
    }

    /// Builds the machine, saves it before it runs, and returns the one that is built of that, which runs.
    pub fn go_on(&self, screen: &Screen) -> Box<Machine> {
        let mut machine = self.build(&self.bytes, screen).unwrap();
        let (again, saved) = (machine.save().unwrap(), SavedMachine::from_bytes(&self.bytes).unwrap());
        assert!(again.parts.len() > 5 && again.parts.keys().eq(saved.parts.keys()));
        // The timer's time goes on, and the page says that this is another generation.
        let changes = |name: &str| ["boot timer", "VM clock"].contains(&name);
        for (name, state) in again.parts.iter().filter(|(name, _)| !changes(name)) {
            assert_eq!(*state, saved.parts[name], "{name}: what was restored is not what was saved");
        }
        drop(machine);
        let mut machine = self.build(&again.to_bytes().unwrap(), screen).unwrap();
        machine.resume().unwrap();
        machine
    }
}

/// Numbers that are others in each run.
pub struct Random(RandomState, u64);

impl Default for Random {
    fn default() -> Self {
        Self(RandomState::new(), 0)
    }
}

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.1 += 1;
        let mut hasher = self.0.build_hasher();
        hasher.write_u64(self.1);
        hasher.finish() % end.max(1)
    }
}
