//! The generation ID of the virtual machine (Microsoft's "Virtual Machine Generation ID"; Linux' binding
//! microsoft,vmgenid): 16 random bytes in guest memory, which are others whenever the guest goes on from a snapshot.
//! By them a guest knows that it may be one of several clones: Linux then draws all its random numbers anew.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::fixed::{FixedDevice, Site};
use crate::error::{Context, Error, Result};
use crate::memory::Memory;
use crate::part::Component;
use crate::platform::node::{AcpiDevice, AcpiValue};
use crate::platform::{Node, Place};
use crate::snapshot::Snapshot;
use crate::sys::process;
use crate::vm::irq::Line;

/// The ID, and the interrupt that says that it is another one.
pub struct GenerationId {
    memory: Memory,
    address: GuestAddress,
    interrupt: Line,
}

impl GenerationId {
    /// An ID at `address` in `memory`, where nothing is written yet. That it has changed is told by `interrupt`.
    pub fn new(memory: Memory, address: u64, interrupt: Line) -> Self {
        Self { memory, address: GuestAddress(address), interrupt }
    }

    /// Makes the ID one that no guest has had.
    fn renew(&self) -> Result<()> {
        let mut id = [0; 16];
        process::random(&mut id).context("get random bytes of the host")?;
        self.memory.memory().write_slice(&id, self.address).context("write the generation ID to guest memory")
    }
}

impl FixedDevice for GenerationId {
    const NAME: &'static str = "VM generation ID";

    fn build(place: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        let Place::Memory { range, .. } = place else {
            return Err(Error::host("the generation ID is in guest memory"));
        };
        Ok(Some(Self::new(site.memory.clone(), range.start, site.line(place)?)))
    }
}

impl Snapshot for GenerationId {
    /// A restored guest has none of the ID that was saved.
    type State = ();

    fn save(&self) -> Result<()> {
        Ok(())
    }

    /// The new ID is in memory before the guest runs, and the interrupt comes behind it: no guest hears of a change
    /// that it cannot see. One that is in the middle of reading the ID sees halves of two, and is told to read it
    /// again.
    fn restore(&mut self, (): ()) -> Result<()> {
        self.renew()?;
        self.interrupt.raise().context("interrupt the guest for its new generation ID")
    }
}

impl Component for GenerationId {
    fn nodes(&self, place: Place) -> Vec<Node> {
        let GuestAddress(address) = self.address;
        // The document has the compatible ID in small letters, and Linux takes it as ACPI reads it, in capitals.
        // ACPI before 5.0 has no IDs of that length: Linux knows a short one, too.
        let acpi = AcpiDevice::new("VGEN", AcpiValue::Text("VMGENCTR"), Vec::new())
            .with("_CID", AcpiValue::Text("VM_Gen_Counter"))
            .with("_DDN", AcpiValue::Text("VM_Gen_Counter"))
            .with("ADDR", AcpiValue::Pair(address as u32, (address >> 32) as u32));
        Node::of_memory(place, "vmgenid", "microsoft,vmgenid", acpi)
    }

    fn begin(&mut self) -> Result<()> {
        self.renew()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::{self, Range};
    use crate::poll::{self, EventFd};

    const AT: u64 = 0x1ff0;

    fn device(memory: &Memory) -> (GenerationId, Arc<EventFd>) {
        let interrupt = Arc::new(poll::event("interrupt").unwrap());
        (GenerationId::new(memory.clone(), AT, Line::Event(interrupt.clone())), interrupt)
    }

    fn id(memory: &Memory) -> [u8; 16] {
        memory.memory().read_obj(GuestAddress(AT)).unwrap()
    }

    #[test]
    fn a_restored_guest_has_another_id_and_hears_of_it() {
        let memory = memory::allocate(&[Range { start: 0, size: 2 << 20 }]).unwrap();
        let (mut first, interrupt) = device(&memory);
        first.begin().unwrap();
        let mut ids = vec![[0; 16], id(&memory)];
        assert!(interrupt.read().is_err(), "a guest that starts need not be told");
        for _ in 0..1000 {
            let (mut clone, interrupt) = device(&memory);
            first.save().unwrap();
            clone.restore(()).unwrap();
            assert_eq!(interrupt.read().unwrap(), 1);
            ids.push(id(&memory));
        }
        let count = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), count, "an ID came twice");
        // Nothing around it is touched.
        let memory = memory.memory();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(AT - 8)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(AT + 16)).unwrap(), 0);
    }

    #[test]
    fn an_id_outside_of_memory_is_an_error() {
        let memory = memory::allocate(&[Range { start: 0, size: 0x1000 }]).unwrap();
        let error = device(&memory).0.begin().unwrap_err().to_string();
        assert!(error.contains("write the generation ID to guest memory"), "{error}");
    }
}
