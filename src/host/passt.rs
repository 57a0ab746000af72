//! passt(1): the network of an ordinary user, a process that turns frames into the host's sockets.

use std::ffi::OsString;
use std::io::{PipeReader, Read};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::log;
use crate::sys::descriptor;

/// What is read of its last words.
const WORDS_MAX: usize = 4096;
/// A passt that has lost its stream has so long to end, and is looked at as often.
const END_TIME: Duration = Duration::from_secs(1);
const END_STEP: Duration = Duration::from_millis(1);

/// A passt that was started here, and the stream of frames to it.
pub struct Passt {
    stream: Named<UnixStream>,
    child: Child,
    words: Named<PipeReader>,
}

/// Where it is.
pub fn find() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/local/bin:/usr/bin:/bin"));
    std::env::split_paths(&path).map(|folder| folder.join("passt")).find(|path| path.is_file()).ok_or_else(
        || {
            Error::config(
                "`passt` is in no folder of PATH (in a jail: of its own root): it makes the network of an interface \
                 with `user` (--net user); install the package of that name (Debian: `apt-get install passt`), or \
                 give the interface a TAP (`host_dev_name`, --net tap=), as in a jail"
            )
        },
    )
}

impl Passt {
    /// Starts it. It ends when the stream does, so with this process, whatever ends that.
    pub fn start(arguments: impl IntoIterator<Item = String>) -> Result<Self> {
        let program = find()?;
        let (stream, other) = UnixStream::pair().context("make a pair of sockets")?;
        stream.set_nonblocking(true).context("make a socket nonblocking")?;
        // It asks for its socket by number; only programs that this thread starts inherit it.
        descriptor::set_closes_on_exec(&other, false).context("hand a socket over")?;
        let mut command = Command::new(&program);
        command.args(["--foreground", "--quiet", "--fd"]).arg(other.as_raw_fd().to_string()).args(arguments);
        let (words, its_words) = std::io::pipe().context("make a pipe")?;
        // Both ends: we never wait for it to speak, nor it for us to listen.
        set_nonblocking(&words)?;
        set_nonblocking(&its_words)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(its_words);
        let child = command.spawn().with_context(|| format!("start `{}`", program.display()))?;
        log::debug(format_args!("started `{}` as process {}", program.display(), child.id()));
        let stream = Named::new("stream of frames to passt", stream);
        Ok(Self { stream, child, words: Named::new("last words of passt", words) })
    }

    /// The stream of frames, not blocking.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// What it said last before it ended, for the log.
    pub fn last_words(&mut self) -> String {
        let mut bytes = [0; WORDS_MAX];
        let count = self.words.read(&mut bytes).unwrap_or(0);
        let text = String::from_utf8_lossy(&bytes[..count]);
        // It complains of a host without syslog, and of being started by root.
        let noise = |line: &&str| !line.starts_with("Failed to send ") && !line.starts_with("Don't run as");
        let lines: Vec<_> = text.lines().filter(noise).filter(|line| !line.trim().is_empty()).collect();
        lines.join("; ")
    }
}

impl Drop for Passt {
    /// Ends passt by taking its stream away, as the end of this process would: once the guest runs, no thread may send
    /// a signal to another process. One that does not end, because somebody has stopped it, is left alone.
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        let begun = Instant::now();
        while let Ok(None) = self.child.try_wait() {
            if begun.elapsed() > END_TIME {
                let id = self.child.id();
                return log::line(format_args!(
                    "passt, process {id}, does not end though its stream has ended"
                ));
            }
            std::thread::sleep(END_STEP);
        }
    }
}

fn set_nonblocking(fd: &impl AsRawFd) -> Result<()> {
    descriptor::set_status(fd, libc::O_NONBLOCK).context("make a pipe nonblocking")
}
