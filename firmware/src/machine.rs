//! The machine as its boot tables tell it.

/// Ranges of memory that are kept; machines have one to three.
pub const RANGES_MAX: usize = 8;

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
    pub command_line: &'static [u8],
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
            command_line: b"",
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
