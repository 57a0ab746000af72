//! Where files come from: opened here, or (after a live upgrade) inherited from the process we replace.

pub mod file;
pub mod link;
pub mod passt;
pub mod socket;
pub mod tap;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::log;
use crate::sink::{Purpose, Sink, has_room};
use passt::Passt;
use tap::Tap;

/// What the machine may do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

/// What becomes of a file that is to be written, or is written, by somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It is an error.
    Refused,
    /// It is used all the same, with a line in the log and an event.
    Warned,
}

/// Gives a machine under construction what it needs of the host.
pub trait Host {
    /// The file at `path`, open; `what` names it in errors ("kernel", "disk `root`").
    fn file(&mut self, what: &str, path: &Path, access: Access, sharing: Sharing) -> Result<File>;
    /// What becomes of a disk's file that somebody else uses; `lock`: its owner wants it alone.
    fn sharing(&self, lock: bool) -> Sharing;
    /// The TAP interface of this name, or the open descriptors of one (`fd:N`), for so many queues.
    fn tap(&mut self, name: &str, queues: usize) -> Result<Vec<Tap>>;
    /// A user-mode network: a passt that is started with these arguments.
    fn passt(&mut self, arguments: Vec<String>) -> Result<Passt>;
    /// Fresh random bytes, for the guest's generator.
    fn random_seed(&mut self) -> Result<[u8; 32]>;
    /// Where the guest's serial console writes.
    fn console(&mut self) -> Result<Box<dyn Write + Send>>;
}

/// A file that waits for its machine.
struct Held {
    /// The resource that it belongs to, as errors name it.
    what: String,
    path: PathBuf,
    access: Access,
    file: File,
}

/// An attached TAP interface that waits for its machine.
struct HeldTap {
    /// The network interface that it belongs to.
    interface: String,
    name: String,
    queues: Vec<Tap>,
}

/// The host as this process finds it.
#[derive(Default)]
pub struct Local {
    /// Files opened ahead of the machine, when they were named: what is at the path then is what
    /// the machine gets, whatever is put there later. One for each resource, so that naming other
    /// files again and again does not use up the descriptors that a process may have.
    held: Vec<Held>,
    held_taps: Vec<HeldTap>,
    held_console: Option<Sink>,
    /// A disk that somebody else uses is only warned of, whatever its configuration says.
    warns_of_sharing: bool,
}

impl Local {
    /// Opens the files of these resources now, so that a wrong path is refused where it is named. They
    /// replace what the resources had, all of them or none; a resource without a path has no file any more.
    pub fn hold(&mut self, files: &[(&str, Option<&Path>)], access: Access, sharing: Sharing) -> Result<()> {
        let mut opened = Vec::new();
        for &(what, path) in files {
            if let Some(path) = path {
                let file = self.open(what, path, access, sharing)?;
                opened.push(Held { what: what.to_owned(), path: path.to_owned(), access, file });
            }
        }
        self.held.retain(|held| files.iter().all(|(what, _)| held.what != *what));
        self.held.extend(opened);
        Ok(())
    }

    /// The same for the TAP interface `name` of a network interface.
    pub fn hold_tap(&mut self, interface: &str, name: &str, queues: usize) -> Result<()> {
        // Attached already: a queue can be only once.
        let same = |held: &HeldTap| held.name == name && held.queues.len() == queues;
        let tap = match self.held_taps.iter().position(same) {
            Some(place) => self.held_taps.swap_remove(place).queues,
            None => {
                self.held_taps.retain(|held| held.name != name);
                Tap::open(name, queues)?
            }
        };
        self.release_tap(interface);
        self.held_taps.push(HeldTap { interface: interface.to_owned(), name: name.to_owned(), queues: tap });
        Ok(())
    }

    /// A network interface has no TAP interface any more.
    pub fn release_tap(&mut self, interface: &str) {
        self.held_taps.retain(|held| held.interface != interface);
    }

    /// Lets disks be shared with others, with a warning: what other monitors do, without one.
    pub fn warn_of_sharing(&mut self) {
        self.warns_of_sharing = true;
    }

    /// Opens a file, or gives what is held: a device that its resource has claimed cannot be claimed again.
    fn open(&self, what: &str, path: &Path, access: Access, sharing: Sharing) -> Result<File> {
        let attempt = || format!("open {what} `{}`", path.display());
        let is_held = |held: &&Held| {
            held.what == what && held.access == access && file::is_same_device(&held.file, path)
        };
        match self.held.iter().find(is_held) {
            Some(held) => held.file.try_clone().with_context(attempt),
            None => file::open(path, access, sharing, what, attempt),
        }
    }

    /// Closes all that no machine took.
    pub fn release(&mut self) {
        let Self { held, held_taps, held_console, warns_of_sharing: _ } = self;
        (*held, *held_taps, *held_console) = (Vec::new(), Vec::new(), None);
    }

    /// Where the guest's serial console is to write, instead of standard output; none: there.
    pub fn hold_console(&mut self, path: Option<&Path>) -> Result<()> {
        self.held_console = path.map(|path| Sink::open(Purpose::Serial, path)).transpose()?;
        if let Some(path) = path {
            log::debug(format_args!("opened serial output `{}` to write", path.display()));
        }
        Ok(())
    }
}

impl Host for Local {
    fn file(&mut self, what: &str, path: &Path, access: Access, sharing: Sharing) -> Result<File> {
        let same = |held: &Held| held.what == what && held.path == path && held.access == access;
        match self.held.iter().position(same) {
            Some(place) => Ok(self.held.swap_remove(place).file),
            None => self.open(what, path, access, sharing),
        }
    }

    fn sharing(&self, lock: bool) -> Sharing {
        if lock && !self.warns_of_sharing { Sharing::Refused } else { Sharing::Warned }
    }

    fn tap(&mut self, name: &str, queues: usize) -> Result<Vec<Tap>> {
        if let Some(place) = self.held_taps.iter().position(|held| held.name == name) {
            let taps = self.held_taps.swap_remove(place).queues;
            if taps.len() == queues {
                return Ok(taps);
            }
        }
        Tap::open(name, queues)
    }

    fn passt(&mut self, arguments: Vec<String>) -> Result<Passt> {
        Passt::start(arguments)
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

    /// Writes what was kept as far as the reader takes it, and returns how many bytes are lost: all of them
    /// where a file may not grow. A reader that is gone takes everything.
    fn write_kept(&mut self, mut timeout_ms: i32) -> usize {
        while !self.kept.is_empty() && has_room(&self.file, timeout_ms) {
            timeout_ms = 0;
            // Up to PIPE_BUF bytes do not block where poll said so (POSIX).
            let (front, _) = self.kept.as_slices();
            match self.file.write(&front[..front.len().min(libc::PIPE_BUF)]) {
                Ok(written) => drop(self.kept.drain(..written)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // Whoever else has it open has made it non-blocking, and another one took the room.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return 0,
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => self.kept.clear(),
                Err(_) => return self.kept.drain(..).count(),
            }
        }
        0
    }
}

/// Bytes that there is no room for are lost: the count of those written says so.
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = bytes.len().min(KEPT_MAX - self.kept.len());
        self.kept.extend(&bytes[..count]);
        let lost = self.write_kept(READER_WAIT_MS);
        Ok(count.saturating_sub(lost))
    }

    /// Writes what the reader takes now.
    fn flush(&mut self) -> std::io::Result<()> {
        let _ = self.write_kept(0);
        Ok(())
    }
}

impl Drop for Output {
    /// Nothing of what the guest said is lost while somebody may still read it.
    fn drop(&mut self) {
        // Not by `write_all`, which ends where the descriptor does not block.
        while !self.kept.is_empty() {
            self.write_kept(-1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_reader_that_does_not_read_costs_neither_time_nor_memory_without_end() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut output = Output::new(writer.into());
        let capacity = 64 << 10;
        output.write_all(&vec![b'a'; capacity]).unwrap();
        // The pipe is full: from here on bytes are kept, and in the end lost.
        output.kept.extend(vec![b'b'; KEPT_MAX - 1]);
        assert_eq!(output.write(b"cd").unwrap(), 1, "a byte is lost, and that is told");
        assert_eq!((output.kept.len(), output.write(b"e").unwrap()), (KEPT_MAX, 0));
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
    fn what_others_made_non_blocking_loses_nothing() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let mut text = Vec::new();
        // Until the other side takes no more; then some is kept.
        while let Ok(count) = (&writer).write(&[b'a'; 4096]) {
            text.extend(vec![b'a'; count]);
        }
        let mut output = Output::new(writer.into());
        output.write_all(&[b'b'; 10_000]).unwrap();
        text.extend([b'b'; 10_000]);
        let drain = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        drop(output);
        assert!(drain.join().unwrap() == text);
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
        host.hold(&[("kernel", Some(&path))], Access::Read, Sharing::Refused).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut text = String::new();
        host.file("kernel", &path, Access::Read, Sharing::Refused)
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "first");
        let error =
            host.hold(&[("kernel", Some(&folder))], Access::Read, Sharing::Refused).unwrap_err().to_string();
        assert!(error.contains("it is a directory, a file or block device is needed"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
