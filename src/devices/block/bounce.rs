//! Aligned memory of ours, for guests whose buffers the host does not take as they are.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// So much goes at once; a larger request goes in pieces, so that the guest cannot make us hold more.
const SIZE: usize = 64 << 10;
const LAYOUT: Layout = match Layout::from_size_align(SIZE, 4096) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two that is not zero"),
};

/// The memory, allocated when it is first needed.
#[derive(Default)]
pub struct Bounce {
    memory: Option<NonNull<u8>>,
}

// SAFETY: it is owned memory like a `Box`.
#[allow(unsafe_code)]
unsafe impl Send for Bounce {}

impl Bounce {
    /// Memory for `length` bytes, or for the first so many of them as fit.
    #[allow(unsafe_code)]
    pub fn piece(&mut self, length: usize) -> &mut [u8] {
        // SAFETY: the layout is not empty.
        let new = || NonNull::new(unsafe { alloc_zeroed(LAYOUT) });
        let memory = *self.memory.get_or_insert_with(|| new().unwrap_or_else(|| handle_alloc_error(LAYOUT)));
        // SAFETY: the memory is ours alone, initialised, and at least as long.
        unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), length.min(SIZE)) }
    }
}

impl Drop for Bounce {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Some(memory) = self.memory {
            // SAFETY: it was allocated with this layout.
            unsafe { dealloc(memory.as_ptr(), LAYOUT) };
        }
    }
}
