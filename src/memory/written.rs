//! Which pages of guest memory this process has written itself, while somebody wants to know. What the guest's
//! CPUs write is noted by KVM.

use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice, WithBitmapSlice};

use super::mapping::page_size;

/// How many regions of this process have their writes noted. While there is none, nobody looks for the region
/// of what was written.
static TRACKED: AtomicUsize = AtomicUsize::new(0);

/// The pages of one region that were written since somebody wanted to know. They are noted from
/// [`Self::start`] on; before, and after [`Self::stop`], that costs one look at a flag.
#[derive(Debug)]
pub struct Written {
    /// How large the region is, in bytes.
    size: usize,
    is_on: AtomicBool,
    /// Made when it is needed first.
    pages: OnceLock<AtomicBitmap>,
}

impl Written {
    /// Of a region of `size` bytes; nothing is noted yet.
    pub fn new(size: usize) -> Self {
        Self { size, is_on: AtomicBool::new(false), pages: OnceLock::new() }
    }

    /// Notes what is written from now on. What another thread is writing at this moment may be missed, unless all
    /// threads' accesses are put in order afterwards (`sys::process::order_all_threads`).
    pub fn start(&self) {
        self.pages().reset();
        if !self.is_on.swap(true, Ordering::SeqCst) {
            TRACKED.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Notes nothing any more.
    pub fn stop(&self) {
        if self.is_on.swap(false, Ordering::SeqCst) {
            TRACKED.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The pages that were written since the last call, or since `start`: a bit for each page of the host's size,
    /// the first of them in the lowest bit of the first word.
    pub fn take(&self) -> Vec<u64> {
        self.pages().get_and_reset()
    }

    fn pages(&self) -> &AtomicBitmap {
        let page = || usize::try_from(page_size()).ok().and_then(NonZeroUsize::new);
        let make = || AtomicBitmap::new(self.size, page().expect("a page has a size"));
        self.pages.get_or_init(make)
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether any region has its writes noted.
pub fn is_tracked() -> bool {
    TRACKED.load(Ordering::SeqCst) > 0
}

impl<'a> WithBitmapSlice<'a> for Written {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Written {
    fn mark_dirty(&self, offset: usize, length: usize) {
        if self.is_on.load(Ordering::SeqCst) {
            self.pages().set_addr_range(offset, length);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.get().is_some_and(|pages| pages.is_addr_set(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}
