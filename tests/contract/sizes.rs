//! A disk of another size than its driver knows, after a restore.

use super::*;

const GENERATION: (u64, u64) = (0xfc, 0x15);

fn open(folder: &Folder, name: &str) -> Box<dyn VirtioDevice> {
    let told = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": folder.path(name) });
    let kind = KINDS.iter().find(|kind| kind.section == "drives").unwrap();
    let config = kind.parse(told.to_string().as_bytes()).unwrap();
    config.open("contract", &mut host::Host::default()).unwrap()
}

#[test]
fn a_restored_disk_of_another_size_is_told_to_its_driver() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Folder::new();
    for (name, mib) in [("saved", 8), ("same", 8), ("small", 4), ("large", 9)] {
        std::fs::File::create(folder.path(name)).unwrap().set_len(mib << 20).unwrap();
    }
    for kind in [TransportKind::Mmio, TransportKind::Pci] {
        let by_hand = |name: &str| {
            let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
            Guest::by_hand(kind, open(&folder, name), memory)
        };
        let generation = |guest: &mut Guest| guest.read(GENERATION.0, GENERATION.1, 1);
        let mut first = by_hand("saved");
        first.start(0);
        first.turn();
        let before = generation(&mut first);
        let mut saved = first.suspend();
        let state = saved.state.clone();
        for (name, sectors) in [("same", 16_u64 << 10), ("small", 8 << 10), ("large", 18 << 10)] {
            let mut waiting = by_hand(name);
            saved.state = state.clone();
            waiting.take_over(&saved).unwrap();
            // A guest that is saved again before it has run has not heard either.
            saved.state = waiting.save();
            drop(waiting);
            let mut guest = by_hand(name);
            guest.take_over(&saved).unwrap();
            guest.resume();
            guest.turn();
            let mut told = [0; 8];
            guest.config(0, &mut told);
            assert_eq!(u64::from_le_bytes(told), sectors, "{name}");
            let is_other = name != "same";
            assert_eq!(guest.is_interrupted(None), is_other, "{name}");
            assert_eq!(generation(&mut guest) != before, is_other, "{name}");
        }
    }
}
