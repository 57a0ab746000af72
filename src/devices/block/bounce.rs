//! Aligned memory of ours, for guests whose buffers the host does not take as they are.

/// So much goes at once; a larger request goes in pieces, so that the guest cannot make us hold more.
const SIZE: usize = 64 << 10;
/// More than any host needs of a buffer's address.
const ALIGNMENT: usize = 4096;

/// The memory, allocated when it is first needed.
#[derive(Default)]
pub struct Bounce {
    /// With room to begin at a multiple of [`ALIGNMENT`].
    memory: Vec<u8>,
}

impl Bounce {
    /// Memory for `length` bytes, or for the first so many of them as fit.
    pub fn piece(&mut self, length: usize) -> &mut [u8] {
        if self.memory.is_empty() {
            self.memory = vec![0; SIZE + ALIGNMENT];
        }
        let start = self.memory.as_ptr().align_offset(ALIGNMENT);
        &mut self.memory[start..][..length.min(SIZE)]
    }
}
