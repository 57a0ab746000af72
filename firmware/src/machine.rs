//! The machine as its boot tables tell it.

use crate::arch;

/// Ranges of memory that are kept; machines have one to three.
pub const RANGES_MAX: usize = 8;

/// CPUs whose ids are kept; more are counted, but not started.
const CPUS_MAX: usize = 1024;
/// Not in `Machine`, which lies on the stack: clearing it would take longer than the start.
static mut CPU_IDS: [u32; CPUS_MAX] = [0; CPUS_MAX];

/// What the boot tables said.
pub struct Machine {
    /// By which protocol the loader entered us.
    pub protocol: &'static str,
    /// Which kind of tables there are.
    pub tables: &'static str,
    /// What is wrong with the tables, if anything.
    pub fault: Option<&'static str>,
    /// Memory: (start, bytes).
    pub memory: [(u64, u64); RANGES_MAX],
    pub ranges: usize,
    /// CPUs that the tables list.
    pub cpus: u64,
    /// Where a frame for interrupt messages is (GICv2).
    pub message_frame: Option<u64>,
    /// Where the generation ID of the virtual machine is.
    pub generation_id: u64,
    /// Where the page of the VM clock is.
    pub vm_clock: u64,
    /// The generation ID when the guest started.
    pub first_id: [u32; 4],
}

impl Machine {
    /// A machine of which nothing is known yet.
    pub fn new(protocol: &'static str, tables: &'static str) -> Self {
        Self {
            protocol,
            tables,
            fault: None,
            memory: [(0, 0); RANGES_MAX],
            ranges: 0,
            cpus: 0,
            message_frame: None,
            generation_id: 0,
            vm_clock: 0,
            first_id: [0; 4],
        }
    }

    /// Notes a range of memory.
    pub fn add_memory(&mut self, start: u64, size: u64) {
        match self.memory.get_mut(self.ranges) {
            Some(slot) => {
                *slot = (start, size);
                self.ranges += 1;
            }
            None => self.fault = Some("the memory map has more than 8 ranges"),
        }
    }

    /// Notes a CPU by the id that starts it (APIC id, MPIDR).
    pub fn add_cpu(&mut self, id: u32) {
        if (self.cpus as usize) < CPUS_MAX {
            // SAFETY: only the first CPU comes here.
            unsafe { CPU_IDS[self.cpus as usize] = id };
        }
        self.cpus += 1;
    }

    /// The ids of all CPUs but the first one listed, which is us.
    pub fn other_cpus(&self) -> impl Iterator<Item = u32> {
        // SAFETY: as above.
        (1..CPUS_MAX.min(self.cpus as usize)).map(|index| unsafe { CPU_IDS[index] })
    }

    /// The generation ID of the virtual machine.
    pub fn id(&self) -> [u32; 4] {
        // One after the other: a call to `memset` is longer.
        [0, 4, 8, 12].map(|offset| arch::read32(self.generation_id + offset))
    }

    /// The ranges of memory.
    pub fn memory(&self) -> &[(u64, u64)] {
        &self.memory[..self.ranges]
    }
}

/// A zero-terminated text at `address`.
///
/// # Safety
/// It must be there, and stay.
pub unsafe fn text_at(address: u64) -> &'static [u8] {
    let start = address as *const u8;
    let mut length = 0;
    // SAFETY: the caller promises a text that ends.
    unsafe {
        // Volatile: else the compiler makes a call to `strlen` of it, which is not here.
        while core::ptr::read_volatile(start.add(length)) != 0 {
            length += 1;
        }
        core::slice::from_raw_parts(start, length)
    }
}
