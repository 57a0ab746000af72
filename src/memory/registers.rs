//! Registers that the guest reads from memory: a page of this process that KVM shows the guest read-only. A read there
//! is no exit; a write is one, as at addresses without memory (KVM api, KVM_MEM_READONLY).

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

/// The size of a register.
const WORD: u64 = 4;
/// The number of registers in a page.
const WORDS: usize = 1024;
/// The size of a page, in bytes.
pub const SIZE: u64 = WORDS as u64 * WORD;

/// KVM maps whole pages: nothing else of this process may lie in this one.
#[repr(C, align(4096))]
struct Words([AtomicU32; WORDS]);

/// A page of registers. The guest reads it at any time; what it reads is all of a register, as this process wrote it last.
pub struct RegisterPage(Box<Words>);

impl RegisterPage {
    /// A page of zeros.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Box::new(Words([const { AtomicU32::new(0) }; WORDS]))))
    }

    /// The register at `offset`, in bytes from the page's beginning.
    ///
    /// # Panics
    /// There is no register: `offset` is beyond the page.
    pub fn word(&self, offset: u64) -> &AtomicU32 {
        &self.0.0[(offset / WORD) as usize]
    }

    /// The page's address in this process.
    pub fn address(&self) -> u64 {
        self.0.0.as_ptr() as u64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn a_page_of_registers_is_a_page_of_its_own() {
        let page = RegisterPage::new();
        assert_eq!((page.address() % SIZE, size_of::<Words>() as u64), (0, SIZE));
        page.word(SIZE - WORD).store(7, Ordering::SeqCst);
        assert_eq!(page.0.0.iter().map(|word| word.load(Ordering::SeqCst)).sum::<u32>(), 7);
    }
}
