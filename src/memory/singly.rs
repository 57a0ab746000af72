//! Guest memory whose pages are mapped one by one, as they are touched. Else the kernel maps what it has beside a page that
//! is touched (fault-around), or 2 MiB at once, and nobody can tell afterwards which page of them was needed.

use std::os::fd::OwnedFd;

use vm_memory::GuestMemoryBackend;

use super::Regions;
use super::mapping::noted_faults;
use crate::descriptors::Named;
use crate::error::{Context, Result};

/// Has pages be mapped one by one until this is dropped.
#[derive(Debug)]
pub struct Singly {
    /// The descriptor that the ranges are registered with, until it is closed.
    _faults: Named<OwnedFd>,
}

impl Singly {
    /// Has the pages of `memory` that are not mapped yet be mapped one by one. The memory has no transparent huge pages from
    /// now on: Linux cannot be asked to have its own policy again.
    ///
    /// # Errors
    /// The kernel cannot note writes without somebody who answers (UFFD_FEATURE_WP_ASYNC, Linux 6.7), which is what keeps
    /// it from mapping more.
    pub fn map(memory: &Regions) -> Result<Self> {
        let faults = noted_faults().context("have pages of guest memory mapped one by one (userfaultfd)")?;
        for region in memory.iter() {
            // A kernel that refuses has no such pages.
            let _ = region.ask_for_huge_pages(false);
            if let Some(mapping) = region.mapping() {
                mapping.have_writes_noted(&faults).context("have pages of guest memory mapped one by one")?;
            }
        }
        Ok(Self { _faults: Named::new("pages that are mapped one by one", faults) })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::carry::pagemap::{Pagemap, Which};
    use crate::carry::pages;
    use crate::memory::{self, Piece, Range, Source};

    #[test]
    fn a_page_that_is_touched_is_mapped_alone() {
        let path = std::env::temp_dir().join(format!("alula-singly-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        // The kernel has all of the file, which was just written.
        const SIZE: u64 = 8 << 20;
        file.write_all_at(&vec![1; SIZE as usize], 0).unwrap();
        let range = Range { start: 0, size: SIZE };
        let pieces = [Piece { range, position: 0 }];
        let pagemap = Pagemap::open().unwrap();
        let touched = |is_single: bool| {
            let memory = memory::map(&[range], Source::Private { file: &file, pieces: &pieces }).unwrap();
            let memory = memory.memory();
            let singly = is_single.then(|| Singly::map(&memory));
            if let Some(Err(error)) = &singly {
                println!("{error}");
                return None;
            }
            let _: u8 = memory.read_obj(GuestAddress(2 << 20)).unwrap();
            memory.write_obj(7_u8, GuestAddress(6 << 20)).unwrap();
            let touched = pages::those(Which::Touched, &memory, &pagemap).unwrap();
            Some(touched.bytes())
        };
        let around = touched(false).unwrap();
        if let Some(alone) = touched(true) {
            assert_eq!(alone, 2 * memory::mapping::page_size());
            assert!(around >= alone, "{around}");
        }
    }
}
