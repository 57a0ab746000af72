//! Windows: host memory that the guest finds at addresses of its own, beside its RAM. What is seen through a window is
//! the content of a file, shared with whoever else has the file open; no snapshot of guest memory has it, and the
//! requests of devices cannot lie in it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::lost::Watch;
use super::mapping::{HUGE_PAGE, Mapping, Pages, page_size};
use super::{Range, lost};
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};

/// Where a window begins, and how large it is, are multiples of this: Linux takes no persistent memory by smaller
/// pieces (the sub-sections of a memory map, include/linux/mmzone.h), and KVM maps it by huge pages.
pub const ALIGNMENT: u64 = HUGE_PAGE as u64;

/// The reason why a file of 0 bytes is none for a window.
pub const EMPTY: &str = "it is empty: give it the size that the guest is to see (`truncate -s`)";

/// The content of a file, mapped for a window. The file's last piece may be smaller than a window's smallest piece: what
/// follows it are zeros, which are this process's own.
#[derive(Clone)]
pub struct View {
    /// The note of the file is by its descriptor, and dropped before that.
    watch: Arc<Watch>,
    mapping: Arc<Mapping>,
    file: Arc<Named<File>>,
    length: u64,
    is_read_only: bool,
}

impl View {
    /// Maps the first `length` bytes of `file`, which is at `path`, and which is open for writing unless the view
    /// `is_read_only`.
    ///
    /// # Errors
    /// There is nothing to map, or the host has no address space for it, or the file cannot be mapped.
    pub fn of_file(file: Named<File>, length: u64, path: &Path, is_read_only: bool) -> Result<Self> {
        if length == 0 {
            return Err(Error::config(EMPTY));
        }
        let too_large = || Error::config(format!("{length} bytes are more than this host can map"));
        let size = length.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
        let attempt = || format!("map its {length} bytes");
        let mapping = Mapping::new(usize::try_from(size).with_context(attempt)?).with_context(attempt)?;
        let pages = if is_read_only { Pages::ToRead } else { Pages::OfFile };
        let whole_pages = length.next_multiple_of(page_size()) as usize;
        mapping.show(0, whole_pages, &file, 0, pages).with_context(attempt)?;
        let watch = Arc::new(lost::watch_window(&file, length, path)?);
        Ok(Self { watch, mapping: Arc::new(mapping), file: Arc::new(file), length, is_read_only })
    }

    /// How many bytes a window to it has.
    pub fn size(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// How many of these bytes the file has.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether the guest cannot write to it.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// The file.
    pub fn file(&self) -> &Arc<Named<File>> {
        &self.file
    }

    /// The mapping that keeps it mapped for as long as somebody has it.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Notes that a page of it cannot be had, and that the guest cannot go on without.
    pub fn note_lost(&self) {
        self.watch.note_lost();
    }
}

/// A view in its place among the guest's addresses.
#[derive(Clone)]
pub struct Window {
    /// The guest's addresses.
    pub range: Range,
    /// The memory that is seen there.
    pub view: View,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::Written;
    use crate::memory::mapping::memory_file;
    use vm_memory::{Bytes, VolatileMemory};

    fn named(file: &File) -> Named<File> {
        Named::new("it".to_owned(), file.try_clone().unwrap())
    }

    #[test]
    fn a_view_is_whole_huge_pages_whatever_its_file_has() {
        let _alone = lost::ALONE.lock();
        let file = memory_file(3 * page_size()).unwrap();
        for is_read_only in [false, true] {
            let view =
                View::of_file(named(&file), 2 * page_size() + 5, Path::new("/f"), is_read_only).unwrap();
            assert_eq!((view.size(), view.length()), (ALIGNMENT, 2 * page_size() + 5));
            assert!((view.mapping().start().as_ptr() as usize).is_multiple_of(HUGE_PAGE));
        }
        let exact = View::of_file(named(&file), ALIGNMENT, Path::new("/f"), true).unwrap();
        assert_eq!(exact.size(), ALIGNMENT);
        for (length, expected) in
            [(0, "it is empty"), (u64::MAX, "more than this host"), (1 << 60, "map its")]
        {
            let error = View::of_file(named(&file), length, Path::new("/f"), true).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn what_is_written_to_a_view_is_in_its_file() {
        let _alone = lost::ALONE.lock();
        let file = memory_file(2 * page_size()).unwrap();
        let view = View::of_file(named(&file), page_size() + 1, Path::new("/f"), false).unwrap();
        let size = view.mapping().size();
        let pages = view.mapping().describe(size, Written::new(size)).unwrap();
        let (seen, page) = (pages.as_volatile_slice(), page_size() as usize);
        seen.write_obj(7_u8, page).unwrap();
        seen.write_obj(9_u8, size - 1).unwrap();
        let byte = |place: usize| seen.read_obj::<u8>(place).unwrap();
        assert_eq!([byte(page), byte(2 * page), byte(size - 1)], [7, 0, 9]);
        let mut bytes = [0; 1];
        file.read_exact_at(&mut bytes, page_size()).unwrap();
        assert_eq!(bytes, [7]);
        file.write_all_at(&[8], 1).unwrap();
        assert_eq!(byte(1), 8);
    }
}
