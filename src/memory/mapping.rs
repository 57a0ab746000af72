//! Address space of this process that guest memory lies in.

use std::fs::File;
use std::io::{Error as IoError, Result as IoResult};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use super::Written;
use crate::error::{Context, Result};
use crate::sys::descriptor;

/// The size of a huge page, of which every region of guest memory begins with a whole one. KVM maps
/// a huge page only where host and guest address agree modulo its size: a guest whose memory lies
/// otherwise takes a fault, and an exit, for every 4 KiB.
pub const HUGE_PAGE: usize = 2 << 20;

/// Makes a descriptor of page faults (USERFAULTFD_IOC_NEW, of the device), tells what it is to do (UFFDIO_API), has it
/// take the faults of a range and leave them (UFFDIO_REGISTER, UFFDIO_UNREGISTER), and has who waits there try again
/// (UFFDIO_WAKE): linux/userfaultfd.h.
const FAULTS_NEW: u64 = 0xaa00;
const FAULTS_API: u64 = 0xc018_aa3f;
const FAULTS_REGISTER: u64 = 0xc020_aa00;
const FAULTS_UNREGISTER: u64 = 0x8010_aa01;
const FAULTS_WAKE: u64 = 0x8010_aa02;
const FAULTS_API_VERSION: u64 = 0xaa;
/// The feature by which a descriptor's reader is told of pages that are given back: they are zeros afterwards.
const EVENT_REMOVE: u64 = 1 << 3;
/// The feature by which the kernel notes writes itself, without that anybody waits.
const WRITES_NOTED: u64 = 1 << 15;
/// The mode in which faults of pages that are not there are taken, and that of pages that are written.
const MISSING: u64 = 1;
const WRITTEN: u64 = 1 << 1;
/// The flag of userfaultfd(2) of who does not want to take faults of the kernel, which needs no right (UFFD_USER_MODE_ONLY).
const NONE_OF_KERNEL: i32 = 1;

/// A mapping of this process, given back when this is dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: a mapping belongs to no thread, and this does nothing but give it back, or map other pages there.
#[allow(unsafe_code)]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Mapping {}

/// Whose the pages of a file are that a mapping shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Writes are seen in the file.
    OfFile,
    /// Writes are seen in the mapping alone.
    Private,
    /// There are no writes: the file may be open for reading alone.
    ToRead,
}

impl Mapping {
    /// How its pages may be used.
    pub const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
    /// Of what kind its pages are.
    pub const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

    /// Maps `size` bytes of zeros, a multiple of the host's page size, from the start of a huge page.
    #[allow(unsafe_code)]
    pub fn new(size: usize) -> IoResult<Self> {
        let whole = size.checked_add(HUGE_PAGE).ok_or(IoError::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new mapping, where there was none.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, Self::PROTECTION, Self::FLAGS, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(IoError::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or(IoError::from_raw_os_error(libc::ENOMEM))?;
        // A kernel may align it by itself: then the head is empty.
        let (_head, rest) = Self { start, size: whole }.split(start.align_offset(HUGE_PAGE));
        let (mapping, _tail) = rest.split(size);
        Ok(mapping)
    }

    /// The first `size` bytes, of so many at least, and the rest.
    fn split(self, size: usize) -> (Self, Self) {
        let whole = ManuallyDrop::new(self);
        let rest = whole.start.as_ptr().wrapping_add(size);
        let rest = NonNull::new(rest).expect("no mapping reaches the end of the address space");
        (Self { start: whole.start, size }, Self { start: rest, size: whole.size - size })
    }

    /// Shows `size` bytes of `file` from `position` on in the place of the pages from `offset` on, which are
    /// given back. All three are multiples of the host's page size.
    ///
    /// # Errors
    /// The range is not in the mapping, or the kernel's, of mmap(2).
    #[allow(unsafe_code)]
    pub fn show(&self, offset: usize, size: usize, file: &File, position: u64, pages: Pages) -> IoResult<()> {
        if offset.checked_add(size).is_none_or(|end| end > self.size) {
            return Err(IoError::from_raw_os_error(libc::EINVAL));
        }
        let (flags, protection) = match pages {
            Pages::OfFile => (libc::MAP_SHARED, Self::PROTECTION),
            Pages::Private => (libc::MAP_PRIVATE | libc::MAP_NORESERVE, Self::PROTECTION),
            Pages::ToRead => (libc::MAP_SHARED, libc::PROT_READ),
        };
        let position =
            libc::off_t::try_from(position).map_err(|_| IoError::from_raw_os_error(libc::EINVAL))?;
        let place = self.start.as_ptr().wrapping_add(offset).cast();
        let (flags, fd) = (flags | libc::MAP_FIXED, file.as_raw_fd());
        // SAFETY: the range lies in this mapping, as was just seen, and is mapped at every moment. Nobody has a
        // reference into it: guest memory changes at any time, and is read and written by volatile accesses.
        let shown = unsafe { libc::mmap(place, size, protection, flags, fd, position) };
        if shown == libc::MAP_FAILED { Err(IoError::last_os_error()) } else { Ok(()) }
    }

    /// Maps zeros in huge pages of the host's pool in the place of the first `size` bytes, which are whole ones. The pages
    /// are set aside at once: a guest that touches them later never finds the pool empty, which would end this process.
    ///
    /// # Errors
    /// The pool has not so many free, or this kernel has none of this size: the kernel's, of mmap(2).
    #[allow(unsafe_code)]
    pub(super) fn take_huge_pages(&self, size: usize) -> IoResult<()> {
        if size > self.size {
            return Err(IoError::from_raw_os_error(libc::EINVAL));
        }
        const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        let place = self.start.as_ptr().cast();
        // SAFETY: the range lies in this mapping, as was just seen. Nobody has a reference into it: guest memory
        // changes at any time, and is read and written by volatile accesses.
        let taken = unsafe { libc::mmap(place, size, Self::PROTECTION, FLAGS | libc::MAP_FIXED, -1, 0) };
        if taken == libc::MAP_FAILED { Err(IoError::last_os_error()) } else { Ok(()) }
    }

    /// Maps zeros of this process's own in the place of the first `size` bytes, whatever was there.
    ///
    /// # Errors
    /// The mapping has fewer bytes, or the kernel's, of mmap(2).
    #[allow(unsafe_code)]
    pub(super) fn clear(&self, size: usize) -> IoResult<()> {
        if size > self.size {
            return Err(IoError::from_raw_os_error(libc::EINVAL));
        }
        let place = self.start.as_ptr().cast();
        // SAFETY: the range lies in this mapping, as was just seen. Nobody has a reference into it: guest memory
        // changes at any time, and is read and written by volatile accesses.
        let zeros =
            unsafe { libc::mmap(place, size, Self::PROTECTION, Self::FLAGS | libc::MAP_FIXED, -1, 0) };
        if zeros == libc::MAP_FAILED { Err(IoError::last_os_error()) } else { Ok(()) }
    }

    /// Describes the pages, the first `size` bytes of this, as a part of guest memory. The description is kept with this
    /// mapping, and not longer.
    #[allow(unsafe_code)]
    pub(super) fn describe(&self, size: usize, written: Written) -> Result<MmapRegion<Written>> {
        let pages = MmapRegionBuilder::new_with_bitmap(size.min(self.size), written)
            .with_mmap_prot(Self::PROTECTION)
            .with_mmap_flags(Self::FLAGS);
        // SAFETY: the mapping is at least as large, and lives as long as the region that has both.
        let pages = unsafe { pages.with_raw_mmap_pointer(self.start.as_ptr()) };
        pages.build().context("describe guest memory")
    }

    /// Has faults of the first `size` bytes, of anonymous memory, wait for who reads [`userfaultfd`]'s descriptor.
    ///
    /// # Errors
    /// The mapping has fewer bytes, or the kernel's, of ioctl_userfaultfd(2).
    pub(super) fn have_faults_taken(&self, faults: &impl AsRawFd, size: usize) -> IoResult<()> {
        if size > self.size {
            return Err(IoError::from_raw_os_error(libc::EINVAL));
        }
        tell_faults(faults, FAULTS_REGISTER, &mut [self.start.as_ptr() as u64, size as u64, MISSING, 0])
    }

    /// Has the kernel be ready to note writes to the mapping, of [`noted_faults`]'s descriptor. None are noted yet, as
    /// nothing is protected against them; but a page comes alone.
    ///
    /// # Errors
    /// The kernel's, of ioctl_userfaultfd(2).
    pub(super) fn have_writes_noted(&self, faults: &impl AsRawFd) -> IoResult<()> {
        tell_faults(faults, FAULTS_REGISTER, &mut [self.start.as_ptr() as u64, self.size as u64, WRITTEN, 0])
    }

    /// Has nobody wait for that reader any more.
    ///
    /// # Errors
    /// The faults of the mapping were not taken.
    pub(super) fn have_faults_left(&self, faults: &impl AsRawFd) -> IoResult<()> {
        tell_faults(faults, FAULTS_UNREGISTER, &mut [self.start.as_ptr() as u64, self.size as u64])
    }

    /// Has whoever waits for a page of the mapping ask for it again.
    ///
    /// # Errors
    /// The faults of the mapping were not taken.
    pub(super) fn have_faults_asked_again(&self, faults: &impl AsRawFd) -> IoResult<()> {
        tell_faults(faults, FAULTS_WAKE, &mut [self.start.as_ptr() as u64, self.size as u64])
    }

    /// The first byte of the mapping.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// How many bytes it has.
    pub fn size(&self) -> usize {
        self.size
    }
}

/// A descriptor by which page faults of this process can be served (userfaultfd(2)), made by the `given` device, or by
/// the host's. That device needs no privilege but its own, and is not everywhere.
///
/// # Errors
/// The kernel has no such faults, or this user may not have them served.
pub(super) fn userfaultfd(given: Option<&File>) -> IoResult<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes numbers.
    #[allow(unsafe_code)]
    let by = |device: &File| opened(unsafe { libc::ioctl(device.as_raw_fd(), FAULTS_NEW as _, flags) });
    let open = || File::options().read(true).write(true).open("/dev/userfaultfd");
    let made = given.map_or_else(|| open().and_then(|device| by(&device)), by);
    // SAFETY: the call takes a number.
    #[allow(unsafe_code)]
    let by_call = |_| opened(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as RawFd);
    let made = made.or_else(by_call)?;
    tell_faults(&made, FAULTS_API, &mut [FAULTS_API_VERSION, EVENT_REMOVE, 0])?;
    Ok(made.into())
}

/// A descriptor of page faults (userfaultfd(2)) for whose ranges the kernel answers itself.
///
/// # Errors
/// The kernel has no such faults.
#[allow(unsafe_code)]
pub(super) fn noted_faults() -> IoResult<OwnedFd> {
    let flags = libc::O_CLOEXEC | NONE_OF_KERNEL;
    // SAFETY: the call takes a number.
    let made = opened(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as RawFd)?;
    tell_faults(&made, FAULTS_API, &mut [FAULTS_API_VERSION, WRITES_NOTED, 0])?;
    Ok(made.into())
}

/// Makes one of the calls of a descriptor of page faults, whose structure has as many words as its number says.
#[allow(unsafe_code)]
fn tell_faults<const WORDS: usize>(
    fd: &impl AsRawFd,
    request: u64,
    words: &mut [u64; WORDS],
) -> IoResult<()> {
    debug_assert_eq!(request >> 16 & 0x3fff, size_of_val(words) as u64, "the size that its number says");
    // SAFETY: each of these calls reads and writes a structure of so many words of 64 bits, the local ones. All that
    // they change of this process's memory is who gives missing pages of a mapping, which for guest memory may be
    // anybody.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, words.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(IoError::last_os_error()),
    }
}

/// Asks the host for huge pages behind guest memory, or for none, whatever its policy is (madvise(2)).
///
/// # Errors
/// A kernel without transparent huge pages refuses both.
#[allow(unsafe_code)]
pub(super) fn ask_for_huge_pages(pages: &MmapRegion<Written>, wanted: bool) -> IoResult<()> {
    let advice = if wanted { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: the range is the region's own mapping; this advice does not change what it holds.
    match unsafe { libc::madvise(pages.as_ptr().cast(), pages.size(), advice) } {
        0 => Ok(()),
        _ => Err(IoError::last_os_error()),
    }
}

/// Gives the pages of a part of guest memory back to the host, `size` bytes from `offset` on (madvise(2)). Both are
/// multiples of the host's page size.
///
/// # Errors
/// The part is not in the mapping, or the kernel's: memory of huge pages, for one, is given back in whole ones.
#[allow(unsafe_code)]
pub(super) fn give_back(
    pages: &MmapRegion<Written>,
    offset: usize,
    size: usize,
    whose: Pages,
) -> IoResult<()> {
    if offset.checked_add(size).is_none_or(|end| end > pages.size()) {
        return Err(IoError::from_raw_os_error(libc::EINVAL));
    }
    let advice = match whose {
        // The file has the pages: they go when the file has none there.
        Pages::OfFile => libc::MADV_REMOVE,
        Pages::Private | Pages::ToRead => libc::MADV_DONTNEED,
    };
    let start = pages.as_ptr().wrapping_add(offset);
    // SAFETY: the range lies in the region's own mapping, as was just seen. What it holds changes, as guest memory
    // may at any time: nobody has a reference into it.
    match unsafe { libc::madvise(start.cast(), size, advice) } {
        0 => Ok(()),
        _ => Err(IoError::last_os_error()),
    }
}

impl Drop for Mapping {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.size > 0 {
            // SAFETY: the range was mapped by `new`, belongs to this alone, and is used no more.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
        }
    }
}

/// Pages that this process shares with the kernel, given back when this is dropped.
#[derive(Debug)]
pub struct Window {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: a mapping belongs to no thread.
#[allow(unsafe_code)]
unsafe impl Send for Window {}

impl Window {
    /// What a descriptor shows at `offset`; both numbers are multiples of the host's page size.
    ///
    /// # Errors
    /// The kernel's, of mmap(2).
    pub fn of_descriptor(fd: RawFd, offset: usize, size: usize) -> IoResult<Self> {
        Self::map(fd, offset, size, libc::MAP_SHARED)
    }

    /// Zeros, for a test.
    #[cfg(test)]
    pub fn for_test(size: usize) -> Self {
        Self::map(-1, 0, size, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).unwrap()
    }

    #[allow(unsafe_code)]
    fn map(fd: RawFd, offset: usize, size: usize, flags: i32) -> IoResult<Self> {
        let (place, offset) = (std::ptr::null_mut(), offset as libc::off_t);
        // SAFETY: a new mapping, where there was none.
        let start = unsafe { libc::mmap(place, size, Mapping::PROTECTION, flags, fd, offset) };
        match NonNull::new(start.cast()).filter(|_| start != libc::MAP_FAILED) {
            Some(start) => Ok(Self { start, size }),
            None => Err(IoError::last_os_error()),
        }
    }

    /// The first byte of the mapping.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// How many bytes it has.
    pub fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Window {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: it was mapped with this size, and nobody else knows of it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// The size of the pages in which this host maps memory, in bytes.
#[allow(unsafe_code)]
pub fn page_size() -> u64 {
    // SAFETY: the call takes a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).expect("Linux knows the size of its pages")
}

/// A file without a name, of `size` bytes of zeros, that lives in memory. Whoever gets a descriptor of it cannot
/// make it shorter: reading guest memory that is gone from its file would end this process (SIGBUS).
///
/// # Errors
/// The kernel's, of memfd_create(2), ftruncate(2) and fcntl(2).
#[allow(unsafe_code)]
pub fn memory_file(size: u64) -> IoResult<File> {
    // SAFETY: the name is a string that ends with a zero.
    let fd =
        unsafe { libc::memfd_create(c"guest memory".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    let file = opened(fd)?;
    file.set_len(size)?;
    descriptor::seal_size(&file)?;
    Ok(file)
}

#[allow(unsafe_code)]
fn opened(fd: RawFd) -> IoResult<File> {
    match fd {
        // SAFETY: the descriptor was just made and is given away whole.
        0.. => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(IoError::last_os_error()),
    }
}
