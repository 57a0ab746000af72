//! Where the guest's consoles write: a file, or when none is named standard output, which may have a slow reader.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::descriptors::Named;
use crate::error::{Context, Result};
use crate::sink::{has_room, open_anew};
use crate::sys::descriptor;

/// How long one byte of the guest's waits for a reader before it is kept: the guest is slowed down
/// to its reader's pace, and a pause never waits longer than this for a vCPU.
const READER_WAIT_MS: i32 = 100;
/// The most that is kept for a reader that does not read. More is lost: a guest that floods its console
/// must not make us grow.
const KEPT_MAX: usize = 64 << 10;

/// The place that the consoles of a guest write to.
pub enum Output {
    /// Standard output.
    Stdout(StdoutWriter),
    /// A place that never waits for a reader.
    Other(Arc<Mutex<Box<dyn Write + Send>>>),
}

impl Output {
    /// Standard output.
    pub fn stdout() -> Result<Self> {
        let fd = descriptor::standard_output().try_clone_to_owned();
        Ok(Self::Stdout(StdoutWriter::new(fd.context("duplicate standard output")?)))
    }

    /// A place that never waits for a reader.
    pub fn other(output: Box<dyn Write + Send>) -> Self {
        Self::Other(Arc::new(Mutex::new(output)))
    }

    /// The output of a console that nobody is at.
    pub fn nowhere() -> Self {
        Self::other(Box::new(std::io::sink()))
    }

    /// This place for another console, whose writes never wait: whoever writes looks whether the reader is behind.
    pub fn another(&self) -> Result<Self> {
        match self {
            Self::Stdout(_) => StdoutWriter::patient_stdout().map(Self::Stdout),
            Self::Other(output) => Ok(Self::Other(output.clone())),
        }
    }

    /// The descriptor whose reader has not read all that was written; None: all is written out.
    pub fn behind(&self) -> Option<RawFd> {
        match self {
            Self::Stdout(output) if !output.kept.is_empty() => Some(output.file.as_raw_fd()),
            _ => None,
        }
    }

    fn with<T>(&mut self, act: impl FnOnce(&mut dyn Write) -> T) -> T {
        match self {
            Self::Stdout(output) => act(output),
            Self::Other(output) => act(&mut **output.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// Bytes that there is no room for are lost: the count of those written says so.
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.with(|output| output.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.with(|output| output.flush())
    }
}

/// A descriptor that the guest's console is written to, without ever blocking for long.
pub struct StdoutWriter {
    file: Named<File>,
    kept: VecDeque<u8>,
    /// How long a write waits for the reader.
    wait_ms: i32,
    /// The most bytes of a write that does not block where poll said that there is room.
    step: usize,
}

impl StdoutWriter {
    /// Writes to `fd`, and waits for its reader a moment.
    pub fn new(fd: OwnedFd) -> Self {
        Self::of("serial console, standard output", fd, READER_WAIT_MS)
    }

    /// Writes to `fd` for who waits for its reader elsewhere.
    pub fn patient(fd: OwnedFd) -> Self {
        Self::of("virtio console, standard output", fd, 0)
    }

    fn of(name: &'static str, fd: OwnedFd, wait_ms: i32) -> Self {
        let blocks = descriptor::status(&fd).is_ok_and(|flags| flags & libc::O_NONBLOCK == 0);
        // To a pipe, up to PIPE_BUF bytes do not block (POSIX). A terminal waits for room for all that it is given.
        let step = if blocks && fd.is_terminal() { 1 } else { libc::PIPE_BUF };
        Self { file: Named::new(name, fd.into()), kept: VecDeque::new(), wait_ms, step }
    }

    /// Standard output for who waits for its reader elsewhere. Writes to a terminal of which nobody reads block
    /// where there is room for a part of them: it is opened anew where that is possible, and does not block then.
    fn patient_stdout() -> Result<Self> {
        let stdout = descriptor::standard_output();
        let file = File::from(stdout.try_clone_to_owned().context("duplicate standard output")?);
        // A regular file never blocks, and is written where others write to it.
        let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
        let anew = if is_file { None } else { open_anew(&file).ok() };
        Ok(Self::patient(anew.unwrap_or(file).into()))
    }

    /// Writes what was kept as far as the reader takes it, and returns how many bytes are lost: all of them
    /// where a file may not grow. A reader that is gone takes everything.
    fn write_kept(&mut self, mut timeout_ms: i32) -> usize {
        while !self.kept.is_empty() && has_room(&self.file, timeout_ms) {
            timeout_ms = 0;
            let (front, _) = self.kept.as_slices();
            match self.file.write(&front[..front.len().min(self.step)]) {
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
impl Write for StdoutWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = bytes.len().min(KEPT_MAX - self.kept.len());
        self.kept.extend(&bytes[..count]);
        let lost = self.write_kept(self.wait_ms);
        Ok(count.saturating_sub(lost))
    }

    /// Writes what the reader takes now.
    fn flush(&mut self) -> std::io::Result<()> {
        let _ = self.write_kept(0);
        Ok(())
    }
}

impl Drop for StdoutWriter {
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
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_reader_that_does_not_read_costs_neither_time_nor_memory_without_end() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut output = StdoutWriter::new(writer.into());
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
        let mut output = StdoutWriter::new(writer.into());
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
        let mut output = StdoutWriter::new(writer.into());
        output.write_all(b"x").unwrap();
        assert!(output.kept.is_empty());
    }
}
