//! A snapshot from files that somebody wrote: its state is refused, or makes a machine. The bytes are a state file, or
//! change one: its sections, or the parts and places of its machine, with checksums that fit.

use std::cell::RefCell;
use std::fs::{self, File};
use std::path::PathBuf;

use alula::arch;
use alula::carry::state_file::{self, Origin, Section};
use alula::carry::stored::Location;
use alula::config::Config;
use alula::error::Result;
use alula::host::Host;
use alula::log;
use alula::machine::{Machine, Prepared, SavedMachine};
use alula::memory::Source;
use arbitrary::Unstructured;

use crate::state::change;

const MEMORY_MIB: u64 = 16;
const MACHINE: u16 = 1;
const MEMORY: u16 = 2;

/// A machine with and one without a PCI bus, saved, and a place for the files of a snapshot.
struct Ground {
    folder: PathBuf,
    saved: [Vec<Section>; 2],
}

thread_local! {
    static GROUND: RefCell<Ground> = RefCell::new(Ground::new());
}

impl Ground {
    fn new() -> Self {
        let log = log::Config { log_path: Some("/dev/null".into()), ..Default::default() };
        log::configure("fuzz", &log).unwrap();
        let folder = std::env::temp_dir().join(format!("alula-fuzz-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        File::create(folder.join("memory")).unwrap().set_len(MEMORY_MIB << 20).unwrap();
        Self { folder, saved: [false, true].map(saved) }
    }

    fn location(&self) -> Location {
        Location::Files { state: self.folder.join("state"), memory: self.folder.join("memory") }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn saved(pci: bool) -> Vec<Section> {
    let text = format!(
        r#"{{"machine-config": {{"vcpu_count": 1, "mem_size_mib": {MEMORY_MIB}}}, "entropy": {{}}}}"#
    );
    let mut config = Config::parse(text.as_bytes()).unwrap();
    config.pci = pci;
    let mut host = Host::default();
    let mut machine = Machine::build("fuzz", &config, &mut host, Prepared::new().unwrap()).unwrap();
    machine.load(&config, &mut host).unwrap();
    let machine = machine.save().unwrap().to_bytes().unwrap();
    // No name, and a length as postcard writes it.
    let mut length = MEMORY_MIB << 20;
    let mut memory = vec![0];
    while length >= 0x80 {
        memory.push(length as u8 | 0x80);
        length >>= 7;
    }
    memory.push(length as u8);
    [(MACHINE, machine), (MEMORY, memory)].map(|(kind, bytes)| Section { kind, version: 1, bytes }).into()
}

pub fn run(bytes: &[u8]) {
    GROUND.with_borrow(|ground| {
        let mut bytes = Unstructured::new(bytes);
        let choice = usize::from(bytes.arbitrary::<u8>().unwrap_or(0));
        let mut sections = ground.saved[choice & 1].clone();
        let file = match choice >> 1 & 3 {
            0 => bytes.take_rest().to_vec(),
            1 => {
                let mut contents: Vec<_> = sections.iter().map(|section| section.bytes.clone()).collect();
                change(&mut contents, &mut bytes).expect("numbers end as zeros");
                sections.iter_mut().zip(contents).for_each(|(section, content)| section.bytes = content);
                whole(&sections)
            }
            _ => {
                let mut machine = SavedMachine::from_bytes(&sections[0].bytes).unwrap();
                let mut contents: Vec<_> = machine.parts.values().cloned().collect();
                change(&mut contents, &mut bytes).expect("numbers end as zeros");
                machine.parts.values_mut().zip(contents).for_each(|(part, content)| *part = content);
                if choice & 8 != 0 {
                    let places: Vec<_> = machine.places.values().copied().collect();
                    let (one, other) = (choice >> 4, choice >> 5);
                    *machine.places.values_mut().nth(one % places.len()).unwrap() =
                        places[other % places.len()];
                }
                sections[0].bytes = machine.to_bytes().unwrap();
                whole(&sections)
            }
        };
        fs::write(ground.location().state(), file).unwrap();
        // An error is as good as a machine.
        let _ = load(&ground.location());
    });
}

fn whole(sections: &[Section]) -> Vec<u8> {
    state_file::write(&Origin { architecture: arch::ELF_MACHINE, boot_id: [0; 16] }, sections)
}

fn load(location: &Location) -> Result<()> {
    let (stored, file) = location.open(true)?;
    let pieces = stored.pieces();
    let saved = stored.machine;
    let source = Source::Private { file: &file, pieces: &pieces };
    let (places, plugged, config) = (&saved.places, saved.plugged(), &saved.config);
    let (base, mut host) = (Prepared::new().unwrap(), Host::default());
    let mut machine = Machine::build_from(source, places, plugged, "fuzz", config, &mut host, base)?;
    machine.check_host(&saved)?;
    machine.restore(&saved)?;
    // What it has become can be saved, or KVM says why not.
    drop(machine.save());
    Ok(())
}
