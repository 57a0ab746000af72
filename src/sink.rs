//! Where lines for the outside go: a file, a FIFO or an inherited descriptor. Nothing here waits: a
//! line that the other side has no room for is lost, and who wrote it is told so.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::descriptors::{self, Named};
use crate::error::{Context, Error, Result};
use crate::paths;
use crate::sys::descriptor;

const IS_FOLDER: &str = "it is a directory, a file or FIFO is needed";

/// What lines are of.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "names of what a user can send somewhere")]
pub enum Purpose {
    Log,
    Metrics,
    Events,
    Serial,
}

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Metrics => "metrics",
            Self::Events => "events",
            Self::Serial => "serial console",
        }
    }

    /// For errors: what it is, where, and the fields and options that say so.
    fn attempt(self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::Log => format!("open log file `{path}` (`log_path`, --log-path)"),
            Self::Metrics => format!("open metrics file `{path}` (`metrics_path`, --metrics-path)"),
            Self::Events => format!("open events file `{path}` (--events)"),
            Self::Serial => format!("open serial output `{path}` (`serial_out_path`)"),
        }
    }
}

/// A destination of lines.
#[derive(Debug)]
pub struct Sink {
    file: Named<File>,
    /// The rest of a line that there was no room for yet: at most that one line.
    rest: Vec<u8>,
    /// What was written last was only a part of a line. Without the rest, the next one would go on in it.
    is_part: bool,
}

impl Sink {
    /// Opens `path`: appends to a file, which is created if it is missing, or writes to a FIFO,
    /// whether it has a reader yet or not; `fd:N` is an inherited descriptor.
    pub fn open(purpose: Purpose, path: &Path) -> Result<Self> {
        let attempt = || purpose.attempt(path);
        let file = match descriptors::number(path) {
            Some(number) => inherit(number),
            None => open(path),
        };
        let file = Named::new(purpose.name(), file.with_context(attempt)?);
        Ok(Self { file, rest: Vec::new(), is_part: false })
    }

    /// Whether `path` could be opened so, without creating it. A descriptor is that of the process that
    /// will be started with it: this one cannot tell.
    pub fn look(purpose: Purpose, path: &Path) -> Result<()> {
        if descriptors::number(path).is_some() {
            return Ok(());
        }
        let writable = match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                return Err(Error::config(IS_FOLDER)).with_context(|| purpose.attempt(path));
            }
            Ok(_) => descriptor::check_writable(path),
            Err(_) => descriptor::check_writable(paths::folder(path)),
        };
        let looked = writable.map_err(|error| paths::cannot_make(path, &error));
        looked.with_context(|| purpose.attempt(path))
    }

    /// Writes a line, which ends with a newline, or keeps it if the other side has no room now. False: it
    /// is lost, because another one is kept already, or for good.
    pub fn write_line(&mut self, line: &[u8]) -> bool {
        if !self.flush() || self.is_part && self.put(b"\n").is_err() {
            return false;
        }
        self.is_part = false;
        match self.put(line) {
            Ok(count) => {
                self.rest.extend_from_slice(&line[count..]);
                self.is_part = !self.rest.is_empty();
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.rest.extend_from_slice(line);
                true
            }
            Err(_) => false,
        }
    }

    /// Compares the terminal, pipe or file behind this sink with the one behind `other` (`/dev/stderr`).
    pub fn is_same_as(&self, other: &impl AsRawFd) -> bool {
        let identity = |file: &File| file.metadata().ok().map(|found| (found.dev(), found.ino()));
        let other = descriptor::duplicate(other).ok().and_then(|copy| identity(&File::from(copy)));
        other.is_some() && other == identity(&self.file)
    }

    /// Goes on with a line that is kept; whether nothing is left of it.
    pub fn flush(&mut self) -> bool {
        while !self.rest.is_empty() {
            match self.put(&self.rest) {
                Ok(count) => {
                    self.rest.drain(..count);
                    self.is_part = !self.rest.is_empty();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                // Nobody will ever read it, or a file has no room.
                Err(_) => self.rest.clear(),
            }
        }
        true
    }

    fn put(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match (&*self.file).write(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) if !bytes.is_empty() => return Err(ErrorKind::WriteZero.into()),
                result => return result,
            }
        }
    }
}

/// Bytes that there is no room for are lost: the count of those written says so.
impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(if self.write_line(bytes) { bytes.len() } else { 0 })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flush();
        Ok(())
    }
}

impl AsRawFd for Sink {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    match std::fs::metadata(path) {
        // Open for reading too, so that it neither needs a reader to be opened nor breaks without one.
        Ok(metadata) if metadata.file_type().is_fifo() => options.read(true).open(path),
        Ok(metadata) if metadata.is_dir() => {
            return Err(Error::config(IS_FOLDER));
        }
        _ => options.append(true).create(true).open(path),
    }
    .map_err(|error| paths::cannot_make(path, &error))
}

/// Whether a write of at most PIPE_BUF bytes to what is shared with others, and may block, would not; waits for
/// room at most `timeout_ms`, or until a signal.
pub fn has_room(file: &impl AsRawFd, timeout_ms: i32) -> bool {
    descriptor::poll(file, libc::POLLOUT, timeout_ms) != 0
}

/// What a descriptor is of, opened once more to write without blocking: the writes of others who have it stay as they are.
///
/// # Errors
/// What it is of cannot be opened, as a socket, or not by this user.
pub fn open_anew(fd: &impl AsRawFd) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// The inherited descriptor with this number. It may be shared with other processes, whose writes must not
/// become non-blocking: where that is possible it is opened anew. A regular file never blocks, and is written
/// where the others are: opened anew it would have a position of its own, and each would write over what
/// the others wrote.
fn inherit(number: &str) -> Result<File> {
    let inherited = descriptors::inherited(number)?;
    if !inherited.is_writable() {
        return Err(Error::config("it is not open for writing"));
    }
    let copy = File::from(inherited.copy()?);
    if copy.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Ok(copy);
    }
    if let Ok(file) = open_anew(&inherited) {
        return Ok(file);
    }
    // A socket cannot be opened.
    inherited.set_nonblocking().context("use the descriptor")?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("alula-sink-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_is_created_and_appended_to() {
        let folder = Folder::new("file");
        let path = folder.0.join("log");
        for line in ["a\n", "b\n"] {
            assert!(Sink::open(Purpose::Log, &path).unwrap().write_line(line.as_bytes()));
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a\nb\n");
        let error = Sink::open(Purpose::Log, &folder.0).unwrap_err().to_string();
        assert!(error.ends_with("it is a directory, a file or FIFO is needed"), "{error}");
        let error = Sink::open(Purpose::Log, &path.join("x/y")).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("open log file `{}/x/y` (`log_path`, --log-path): ", path.display())),
            "{error}"
        );
    }

    #[test]
    fn a_fifo_without_reader_takes_what_it_can_and_then_loses_whole_lines() {
        let folder = Folder::new("fifo");
        let path = folder.0.join("fifo");
        descriptor::make_fifo(&path);
        let mut sink = Sink::open(Purpose::Log, &path).unwrap();
        // Longer than what a pipe takes in one piece.
        let line = |number: u32| format!("{number} {}\n", "x".repeat(9000));
        let written = (0..20).take_while(|number| sink.write_line(line(*number).as_bytes())).count();
        assert!((6..20).contains(&written), "{written}");
        assert!(!sink.write_line(b"lost\n"));
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(count) = reader.read(&mut chunk) {
            text.extend_from_slice(&chunk[..count]);
            sink.flush();
        }
        assert!(sink.write_line(b"again\n"));
        let expected: String = (0..written as u32).map(line).collect();
        assert!(text == expected.as_bytes(), "{} bytes instead of {}", text.len(), expected.len());
        let count = reader.read(&mut chunk).unwrap();
        assert_eq!(&chunk[..count], b"again\n");
    }

    #[test]
    fn after_a_line_that_was_cut_short_comes_a_new_one() {
        let folder = Folder::new("torn");
        let path = folder.0.join("fifo");
        descriptor::make_fifo(&path);
        let mut sink = Sink::open(Purpose::Log, &path).unwrap();
        let line = format!("{}\n", "x".repeat(9000));
        while sink.rest.is_empty() {
            assert!(sink.write_line(line.as_bytes()));
        }
        // Of the last one a part is out; what is left cannot be written, as on a disk that is full.
        let file = std::mem::replace(&mut sink.file, Named::new("test", File::open("/dev/null").unwrap()));
        assert!(!sink.write_line(b"lost\n"));
        sink.file = file;
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut text = vec![0; 1 << 20];
        let count = reader.read(&mut text).unwrap();
        assert!(!text[..count].ends_with(b"\n"));
        assert!(sink.write_line(b"next\n") && sink.write_line(b"last\n"));
        let count = reader.read(&mut text).unwrap();
        assert_eq!(&text[..count], b"\nnext\nlast\n");
    }

    #[test]
    fn an_inherited_descriptor_is_named_by_its_number() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let name = descriptors::hand_over(&theirs);
        let mut sink = Sink::open(Purpose::Events, Path::new(&name)).unwrap();
        assert!(sink.write_line(b"hello\n"));
        let mut bytes = [0; 6];
        ours.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello\n");
        // What this process has opened itself is not to be written to.
        let own = File::options().append(true).open("/dev/null").unwrap();
        for (name, expected) in [
            ("fd:x".to_owned(), "`x` is not the number of a descriptor"),
            ("fd:19999".to_owned(), "no descriptor of this number was inherited"),
            (format!("fd:{}", own.as_raw_fd()), "no descriptor of this number was inherited"),
            (format!("/proc/self/fd/{}", own.as_raw_fd()), "no descriptor of this number was inherited"),
            (
                format!("/proc/thread-self/fd/{}", own.as_raw_fd()),
                "no descriptor of this number was inherited",
            ),
        ] {
            let error = Sink::open(Purpose::Events, Path::new(&name)).unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
    }
}
