//! The page-fault handler of a test: it takes the message of a monitor, and gives pages (userfaultfd(2),
//! ioctl_userfaultfd(2)).

use std::fs::File;
use std::io::{Error, Read, Result};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;

use serde_json::Value;

/// UFFDIO_COPY.
const COPY: u64 = 0xc028_aa03;
/// UFFDIO_ZEROPAGE.
const ZEROPAGE: u64 = 0xc020_aa04;
/// UFFD_EVENT_PAGEFAULT.
const PAGEFAULT: u8 = 0x12;
/// UFFD_EVENT_REMOVE.
const REMOVE: u8 = 0x15;

/// Receives a monitor's message: returns its text, and the descriptor that came with it.
#[allow(unsafe_code)]
pub fn receive(stream: &UnixStream) -> (String, File) {
    let mut bytes = vec![0_u8; 64 << 10];
    let mut control = [0_u64; 8];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: the call writes to the local buffers, as long as they are said to be; the descriptor that it has made is
    // nobody else's.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let length = libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC);
        assert!(length > 0, "{}", Error::last_os_error());
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        assert!(!header.is_null() && (*header).cmsg_type == libc::SCM_RIGHTS, "no descriptor came");
        let fd = libc::CMSG_DATA(header).cast::<i32>().read_unaligned();
        bytes.truncate(length as usize);
        (String::from_utf8(bytes).unwrap(), File::from_raw_fd(fd))
    }
}

/// Gives the page at `address` of the other process.
#[allow(unsafe_code)]
pub fn copy(faults: &File, address: u64, page: &[u8]) -> Result<()> {
    let mut words = [address, page.as_ptr() as u64, page.len() as u64, 0, 0];
    // SAFETY: the call reads the page, and reads and writes the local structure of five words.
    match unsafe { libc::ioctl(faults.as_raw_fd(), COPY as _, words.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// Gives zeros for the page at `address` of the other process, of so many bytes.
#[allow(unsafe_code)]
pub fn zero(faults: &File, address: u64, size: u64) -> Result<()> {
    let mut words = [address, size, 0, 0];
    // SAFETY: the call reads and writes the local structure of four words.
    match unsafe { libc::ioctl(faults.as_raw_fd(), ZEROPAGE as _, words.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// The news that a handler hears.
#[derive(Debug)]
pub enum Heard {
    /// A page is wanted, at this address.
    Fault(u64),
    /// A guest has given up the content of these addresses.
    Removed(Range<u64>),
}

/// Waits for the next fault, and returns its address; None: the other process is gone.
pub fn next(faults: &File, stream: &UnixStream) -> Option<u64> {
    loop {
        if let Heard::Fault(address) = next_heard(faults, stream)? {
            return Some(address);
        }
    }
}

/// Waits for what there is to hear of; None: the other process is gone.
#[allow(unsafe_code)]
pub fn next_heard(mut faults: &File, stream: &UnixStream) -> Option<Heard> {
    loop {
        let wait = |fd: i32, events| libc::pollfd { fd, events, revents: 0 };
        let mut polls = [wait(faults.as_raw_fd(), libc::POLLIN), wait(stream.as_raw_fd(), libc::POLLRDHUP)];
        // SAFETY: the pointer is to as many local structures as the call is told.
        unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) };
        if polls[1].revents != 0 {
            return None;
        }
        let mut message = [0; 32];
        if !faults.read(&mut message).is_ok_and(|length| length == message.len()) {
            continue;
        }
        let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().unwrap());
        match message[0] {
            PAGEFAULT => return Some(Heard::Fault(word(16))),
            REMOVE => return Some(Heard::Removed(word(8)..word(16))),
            _ => {}
        }
    }
}

/// A region of the other process, as the message tells of it.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub start: u64,
    pub size: u64,
    pub offset: u64,
    pub page: u64,
}

/// The regions of a message, which must be as Firecracker's.
pub fn regions(message: &str) -> Vec<Region> {
    let told: Vec<Value> = serde_json::from_str(message).unwrap();
    let region = |told: &Value| {
        let mut names: Vec<_> = told.as_object().unwrap().keys().collect();
        names.sort();
        assert_eq!(names, ["base_host_virt_addr", "offset", "page_size", "page_size_kib", "size"]);
        let number = |name: &str| told[name].as_u64().unwrap();
        assert_eq!(number("page_size"), number("page_size_kib"));
        let (start, size) = (number("base_host_virt_addr"), number("size"));
        Region { start, size, offset: number("offset"), page: number("page_size") }
    };
    told.iter().map(region).collect()
}
