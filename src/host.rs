//! Where files come from: opened here, or (after a live upgrade) inherited from the process we replace.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::sink::Sink;

/// What the machine may do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Gives a machine under construction what it needs of the host.
pub trait Host {
    /// The file at `path`, open; `what` names it in errors ("kernel", "disk `root`").
    fn file(&mut self, what: &str, path: &Path, access: Access) -> Result<File>;
    /// The TAP interface of this name, open for one queue of frames with virtio headers.
    fn tap(&mut self, name: &str) -> Result<File>;
    /// Fresh random bytes, for the guest's generator.
    fn random_seed(&mut self) -> Result<[u8; 32]>;
    /// Where the guest's serial console writes.
    fn console(&mut self) -> Result<Box<dyn Write + Send>>;
}

/// The host as this process finds it.
#[derive(Default)]
pub struct Local {
    /// Files opened ahead of the machine, when they were named: what is at the path then is what
    /// the machine gets, whatever is put there later.
    held: Vec<(PathBuf, Access, File)>,
    held_taps: Vec<(String, File)>,
    held_console: Option<Sink>,
}

impl Local {
    /// Opens a file now, so that a wrong path is refused where it is named.
    pub fn hold(&mut self, what: &str, path: &Path, access: Access) -> Result<()> {
        let file = open(what, path, access)?;
        self.release(path, access);
        self.held.push((path.to_owned(), access, file));
        Ok(())
    }

    /// The same for a TAP interface.
    pub fn hold_tap(&mut self, name: &str) -> Result<()> {
        // Attached already: only one descriptor can be.
        if !self.held_taps.iter().any(|(held, _)| held == name) {
            let tap = self.tap(name)?;
            self.held_taps.push((name.to_owned(), tap));
        }
        Ok(())
    }

    /// Where the guest's serial console is to write, instead of standard output.
    pub fn hold_console(&mut self, path: &Path) -> Result<()> {
        self.held_console = Some(Sink::open("serial output", path)?);
        Ok(())
    }

    /// Takes back what is held.
    fn release(&mut self, path: &Path, access: Access) -> Option<File> {
        let place = self.held.iter().position(|held| held.0 == path && held.1 == access)?;
        Some(self.held.swap_remove(place).2)
    }
}

impl Host for Local {
    fn file(&mut self, what: &str, path: &Path, access: Access) -> Result<File> {
        match self.release(path, access) {
            Some(file) => Ok(file),
            None => open(what, path, access),
        }
    }

    fn tap(&mut self, name: &str) -> Result<File> {
        if let Some(place) = self.held_taps.iter().position(|(held, _)| held == name) {
            return Ok(self.held_taps.swap_remove(place).1);
        }
        open_tap(name).with_context(|| format!("open TAP interface `{name}` (`host_dev_name`, --net tap=)"))
    }

    fn random_seed(&mut self) -> Result<[u8; 32]> {
        let mut seed = [0; 32];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut seed))
            .context("read /dev/urandom")?;
        Ok(seed)
    }

    fn console(&mut self) -> Result<Box<dyn Write + Send>> {
        if let Some(sink) = self.held_console.take() {
            return Ok(Box::new(sink));
        }
        let fd = std::io::stdout().as_fd().try_clone_to_owned().context("duplicate standard output")?;
        Ok(Box::new(Output::new(fd)))
    }
}

/// How long one byte of the guest's waits for a reader before it is kept: the guest is slowed down
/// to its reader's pace, and a pause never waits longer than this for a vCPU.
const READER_WAIT_MS: i32 = 100;
/// What is kept for a reader that does not read. More is lost: a guest that floods its console
/// must not make us grow.
const KEPT_MAX: usize = 64 << 10;

/// A descriptor that the guest's console is written to, without ever blocking for long.
pub struct Output {
    file: File,
    kept: VecDeque<u8>,
}

impl Output {
    /// Writes to `fd`.
    pub fn new(fd: OwnedFd) -> Self {
        Self { file: fd.into(), kept: VecDeque::new() }
    }

    /// Whether a write would not block; waits for it at most `timeout_ms`, or until a signal.
    #[allow(unsafe_code)]
    fn is_writable(&self, timeout_ms: i32) -> bool {
        let mut poll = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: the pointer is to one local `pollfd`, as the count says.
        unsafe { libc::poll(&mut poll, 1, timeout_ms) == 1 }
    }

    /// Writes what was kept as far as the reader takes it; a reader that is gone takes everything.
    fn write_kept(&mut self, mut timeout_ms: i32) {
        while !self.kept.is_empty() && self.is_writable(timeout_ms) {
            timeout_ms = 0;
            // Up to PIPE_BUF bytes do not block where poll said so (POSIX).
            let (front, _) = self.kept.as_slices();
            match self.file.write(&front[..front.len().min(libc::PIPE_BUF)]) {
                Ok(written) => drop(self.kept.drain(..written)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => self.kept.clear(),
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = KEPT_MAX - self.kept.len();
        self.kept.extend(&bytes[..bytes.len().min(room)]);
        self.write_kept(READER_WAIT_MS);
        Ok(bytes.len())
    }

    /// Writes what the reader takes now.
    fn flush(&mut self) -> std::io::Result<()> {
        self.write_kept(0);
        Ok(())
    }
}

impl Drop for Output {
    /// Nothing of what the guest said is lost while somebody may still read it.
    fn drop(&mut self) {
        let (front, back) = self.kept.as_slices();
        let _ = self.file.write_all(front).and_then(|()| self.file.write_all(back));
    }
}

fn open(what: &str, path: &Path, access: Access) -> Result<File> {
    let attempt = || format!("open {what} `{}`", path.display());
    let directory = || Error::config("it is a directory, a file is needed");
    let file = match OpenOptions::new().read(true).write(access == Access::ReadWrite).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::IsADirectory => {
            Err(directory()).with_context(attempt)?
        }
        result => result.with_context(attempt)?,
    };
    if file.metadata().with_context(attempt)?.is_dir() {
        return Err(directory()).with_context(attempt);
    }
    Ok(file)
}

const TUN_DEVICE: &str = "/dev/net/tun";
const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0_u32 as libc::Ioctl;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8_u32 as libc::Ioctl;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
/// struct virtio_net_hdr_v1.
const VNET_HEADER: i32 = 12;

/// struct ifreq, as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    padding: [u8; 22],
}

/// Attaches to an interface that exists (or, with the right to, makes one that goes with us).
#[allow(unsafe_code)]
fn open_tap(name: &str) -> Result<File> {
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        padding: [0; 22],
    };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0', ' ']) {
        return Err(Error::config(format!("interface names have 1 to {} characters", libc::IFNAMSIZ - 1)));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let create = format!("`ip tuntap add dev {name} mode tap user $(id -un)` creates one");
    // SAFETY: the name ends with a zero, being shorter than its array. Not /sys, which shows the
    // network namespace that it was mounted in.
    if unsafe { libc::if_nametoindex(request.name.as_ptr().cast()) } == 0 {
        return Err(Error::config(format!("there is no such interface: {create}")));
    }
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN_DEVICE)
        .context(format!("open {TUN_DEVICE}"))?;
    // SAFETY: the calls read the local structure and the constant; both are as large as the kernel expects.
    let attached = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &request) };
    if attached < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Error::config(match error.raw_os_error() {
            Some(libc::EBUSY) => "another process uses it".to_owned(),
            Some(libc::EPERM) => format!("this user may not use it: {create}"),
            Some(libc::EINVAL) => format!("it is not a TAP interface with one queue: {create}"),
            _ => error.to_string(),
        }));
    }
    // SAFETY: as above.
    let sized = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &VNET_HEADER) };
    if sized < 0 {
        return Err(std::io::Error::last_os_error()).context("set the size of virtio headers");
    }
    Ok(tap)
}

/// Lets the TAP give frames that the guest said it can take: without checksums, in large segments.
#[allow(unsafe_code)]
pub fn set_tap_offloads(tap: &File, checksum: bool, tso4: bool, tso6: bool) -> Result<()> {
    let bit = |on, bit| if on && checksum { bit } else { 0 };
    let offloads: u64 = bit(true, TUN_F_CSUM) | bit(tso4, TUN_F_TSO4) | bit(tso6, TUN_F_TSO6);
    // SAFETY: the call takes a number.
    match unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, offloads) } {
        0.. => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context("set the TAP's offloads"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_does_not_read_costs_neither_time_nor_memory_without_end() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut output = Output::new(writer.into());
        let capacity = 64 << 10;
        output.write_all(&vec![b'a'; capacity]).unwrap();
        // The pipe is full: from here on bytes are kept, and in the end lost.
        output.kept.extend(vec![b'b'; KEPT_MAX - 1]);
        output.write_all(b"cd").unwrap();
        assert_eq!(output.kept.len(), KEPT_MAX);
        let drain = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        drop(output);
        let all = drain.join().unwrap();
        assert_eq!((all.len(), all.last()), (capacity + KEPT_MAX, Some(&b'c')));
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut output = Output::new(writer.into());
        output.write_all(b"x").unwrap();
        assert!(output.kept.is_empty());
    }

    #[test]
    fn a_file_that_is_held_is_the_one_that_was_there() {
        let folder = std::env::temp_dir().join(format!("alula-host-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("file");
        std::fs::write(&path, "first").unwrap();
        let mut host = Local::default();
        host.hold("kernel", &path, Access::Read).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut text = String::new();
        host.file("kernel", &path, Access::Read).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "first");
        let error = host.hold("kernel", &folder, Access::Read).unwrap_err().to_string();
        assert!(error.contains("it is a directory, a file is needed"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
