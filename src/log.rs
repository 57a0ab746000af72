//! Messages: on standard error, or in a log file when one is configured. What a guest can cause is
//! limited, so that it cannot fill a disk; a log that nobody reads holds nobody up.

mod config;

use std::fmt::{self, Display};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::panic::Location;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::clock::Utc;
use crate::error::Result;
use crate::metrics::{Counter, metrics};
use crate::sink::{Purpose, Sink, has_room};
use crate::sys::process;
use crate::terminal;
pub use config::{Config, Level};

/// So many lines of a level that guests cause are written in one period; a guest that breaks its rings,
/// resets its devices or reads registers in a loop would write millions. What is written of one level takes
/// nothing away from the others.
const GUEST_LINES_MAX: [(Level, u32); 3] = [(Level::Warning, 20), (Level::Debug, 100), (Level::Trace, 1000)];
const PERIOD: Duration = Duration::from_secs(10);
/// How long a line waits for the reader of standard error, in milliseconds: then it is lost, and so are the next
/// ones at once until there is room. Who started this process with a pipe and does not read it must not
/// have a client that sends faults stop the API, the signals and the guest.
const READER_WAIT_MS: i32 = 100;
/// The same for the last line of all.
const LAST_WAIT_MS: i32 = 1000;
/// A message is cut at this length: parts of some come from clients.
const MESSAGE_MAX: usize = 4096;

metrics! {
    /// What became of lines for the outside; names as in Firecracker's metrics.
    pub struct Metrics {
        /// Log lines lost, because nobody read them or they could not be written.
        missed_log_count: Counter,
        /// Lines of metrics lost in the same way.
        missed_metrics_count: Counter,
    }
}

/// Counted for the whole process, as the log is the process's.
pub static METRICS: Metrics = Metrics::new();

struct Log {
    /// None: standard error.
    sink: Option<Sink>,
    /// The sink is where standard error goes, too: one line is for both.
    is_shared: bool,
    id: String,
    show_level: bool,
    show_log_origin: bool,
    module: Option<String>,
    configured: bool,
    /// Lines lost since the last that was not.
    lost: u64,
    /// As [`GUEST_LINES_MAX`].
    guest: [Period; GUEST_LINES_MAX.len()],
}

struct Period {
    begun: Option<Instant>,
    lines: u32,
}

static LOG: Mutex<Log> = Mutex::new(Log {
    sink: None,
    is_shared: false,
    id: String::new(),
    show_level: false,
    show_log_origin: false,
    module: None,
    configured: false,
    lost: 0,
    guest: NO_LINES,
});

const NO_LINES: [Period; GUEST_LINES_MAX.len()] =
    [const { Period { begun: None, lines: 0 } }; GUEST_LINES_MAX.len()];

/// The level, to be read without the lock. Without a log of its own, the terminal has what matters.
static LEVEL: AtomicU8 = AtomicU8::new(Level::Warning as u8);

/// Configures the log; `id` is the microVM's name. Done again, it changes what `config` says, and nothing
/// if that cannot be done.
pub fn configure(id: &str, config: &Config) -> Result<()> {
    let mut log = lock();
    if let Some(path) = &config.log_path {
        let sink = Sink::open(Purpose::Log, path)?;
        log.is_shared = sink.is_same_as(&std::io::stderr());
        log.sink = Some(sink);
    }
    log.id = id.to_owned();
    log.show_level = config.show_level.unwrap_or(log.show_level);
    log.show_log_origin = config.show_log_origin.unwrap_or(log.show_log_origin);
    if let Some(module) = &config.module {
        log.module = Some(module.clone());
    }
    // The first time, a log that was asked for has more than the terminal.
    let level = if log.configured { None } else { Some(Level::Info) };
    if let Some(level) = config.level.or(level) {
        LEVEL.store(level as u8, Ordering::Relaxed);
    }
    log.configured = true;
    Ok(())
}

/// Whether messages of this level are wanted: asked before a costly one is made.
pub fn wants(level: Level) -> bool {
    level as u8 <= LEVEL.load(Ordering::Relaxed)
}

/// Says that something is lost: a guest's data, a device, the microVM.
#[track_caller]
pub fn error(message: impl Display) {
    write(Level::Error, &message, Location::caller());
}

/// Says something about the host or the monitor itself that its user should know.
#[track_caller]
pub fn line(message: impl Display) {
    write(Level::Warning, &message, Location::caller());
}

/// Says what is being done.
#[track_caller]
pub fn info(message: impl Display) {
    write(Level::Info, &message, Location::caller());
}

/// Says what is done for the user, and with what, for who looks for a fault: files that are opened, requests
/// that are served. Only what users cause: what a guest can cause is [`guest_debug`]. A message that nobody
/// wants is not made: pass `format_args!`, and nothing that costs more than to name it.
#[track_caller]
pub fn debug(message: impl Display) {
    write(Level::Debug, &message, Location::caller());
}

/// Says what clients of the API do between their requests.
#[track_caller]
pub fn trace(message: impl Display) {
    write(Level::Trace, &message, Location::caller());
}

/// Says how the process ends: on standard error whatever the level, and in the log file at this one.
#[track_caller]
pub fn end(level: Level, message: impl Display) {
    let has_file = {
        let mut log = lock();
        log.write_to_shared(&std::io::stderr(), &message, LAST_WAIT_MS);
        log.sink.is_some() && !log.is_shared
    };
    if has_file {
        write(level, &message, Location::caller());
    }
}

/// Says how the process ends as [`end`] does, but in the log file alone, if there is one: somebody else says it to the
/// user.
#[track_caller]
pub fn end_in_file(level: Level, message: impl Display) {
    if lock().sink.is_some() {
        write(level, &message, Location::caller());
    }
}

/// Says something in the midst of something else, maybe within [`line()`]: on standard error, and in the log file if that
/// is not being written to.
pub fn aside(message: impl Display) {
    process::write_error(format!("alula: {message}{}", terminal::line_end()).as_bytes());
    aside_in_file(message);
}

/// Says something as [`aside`] does, but in the log file alone, if there is one.
pub fn aside_in_file(message: impl Display) {
    if let Ok(mut log) = LOG.try_lock()
        && log.sink.is_some()
        && !log.is_shared
    {
        let line = log.line(Level::Error, &message, Location::caller());
        log.write_to_sink(&line);
    }
}

/// Says something that a guest caused and that its user should know, unless it causes too much.
#[track_caller]
pub fn guest_line(message: impl Display) {
    guest(0, &message, Location::caller());
}

/// Says what the guest does with its devices: drivers that start, reset and stop them.
#[track_caller]
pub fn guest_debug(message: impl Display) {
    guest(1, &message, Location::caller());
}

/// Says each thing that the guest does: accesses of its CPUs, notifications of its queues. Not what is read
/// or written, which may be what somebody types.
#[track_caller]
pub fn guest_trace(message: impl Display) {
    guest(2, &message, Location::caller());
}

/// `kind`: an index of [`GUEST_LINES_MAX`].
fn guest(kind: usize, message: &dyn Display, place: &Location<'_>) {
    let (level, most) = GUEST_LINES_MAX[kind];
    if !wants(level) {
        return;
    }
    let lines = {
        let log = &mut lock();
        // Of lines that are not wanted none is counted.
        if !log.is_of_interest(place) {
            return;
        }
        log.guest[kind].count(Instant::now())
    };
    if lines < most {
        write(level, message, place);
    } else if lines == most {
        let seconds = PERIOD.as_secs();
        let last = format_args!(
            "{message}; more lines of level {level:?} about what the guest does are left out for {seconds} s"
        );
        write(level, &last, place);
    }
}

fn lock() -> std::sync::MutexGuard<'static, Log> {
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(level: Level, message: &dyn Display, place: &Location<'_>) {
    if !wants(level) {
        return;
    }
    let mut log = lock();
    if !log.is_of_interest(place) {
        return;
    }
    if log.sink.is_some() {
        let line = log.line(level, message, place);
        log.write_to_sink(&line);
    } else {
        let wait_ms = if log.lost == 0 { READER_WAIT_MS } else { 0 };
        log.write_to_shared(&std::io::stderr(), &in_one_line(message), wait_ms);
    }
}

/// A text for people, parts of which can be the words of clients and guests: those must not begin a line of
/// their own, or give a terminal commands (ECMA-48, 5.2).
pub fn in_one_line(text: impl Display) -> String {
    text.to_string().replace(char::is_control, " ")
}

impl Period {
    /// One more line at `now`: how many there are in this period.
    fn count(&mut self, now: Instant) -> u32 {
        if self.begun.is_none_or(|begun| now - begun > PERIOD) {
            *self = Self { begun: Some(now), lines: 0 };
        }
        self.lines = self.lines.saturating_add(1);
        self.lines
    }
}

impl Log {
    /// Whether messages from this place are wanted.
    fn is_of_interest(&self, place: &Location<'_>) -> bool {
        self.module.as_ref().is_none_or(|module| is_of(place.file(), module))
    }

    /// `time [id:thread:LEVEL:file:line] message`
    fn line(&self, level: Level, message: &dyn Display, place: &Location<'_>) -> String {
        use fmt::Write;
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("main");
        let mut line = format!("{:#} [{}:{thread}", Utc::now(), self.id);
        if self.show_level {
            line = line + ":" + level.tag();
        }
        if self.show_log_origin {
            let _ = write!(line, ":{}:{}", place.file(), place.line());
        }
        line += "] ";
        let begin = line.len();
        line += &in_one_line(message);
        line.truncate(line.floor_char_boundary(begin + MESSAGE_MAX));
        line + "\n"
    }

    /// Writes to what others use too, and which may block, if its reader makes room within `wait_ms`.
    fn write_to_shared<F: AsRawFd>(&mut self, file: &F, message: &dyn Display, wait_ms: i32)
    where
        for<'a> &'a F: Write,
    {
        let mut line = format!("alula: {message}");
        if self.lost > 0 {
            line.insert_str(0, &format!("alula: {} lines were lost here\n", self.lost));
        }
        line += terminal::line_end();
        let mut pieces = line.as_bytes().chunks(libc::PIPE_BUF);
        if pieces.all(|piece| has_room(file, wait_ms) && (&*file).write_all(piece).is_ok()) {
            self.lost = 0;
        } else {
            self.lost += 1;
            METRICS.missed_log_count.add(1);
        }
    }

    fn write_to_sink(&mut self, line: &str) {
        let Some(sink) = &mut self.sink else { return };
        let told = match self.lost {
            0 => sink.write_line(line.as_bytes()),
            lost => sink.write_line(format!("{lost} lines were lost here\n{line}").as_bytes()),
        };
        if told {
            self.lost = 0;
        } else {
            self.lost += 1;
            METRICS.missed_log_count.add(1);
        }
    }
}

/// Whether the source file is of this module: `src/virtio/mod.rs` is of `virtio` and `alula::virtio`.
fn is_of(file: &str, module: &str) -> bool {
    let path = file.strip_prefix("src/").unwrap_or(file);
    let path = path.strip_suffix(".rs").unwrap_or(path);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    let module = module.strip_prefix("alula").map_or(module, |rest| rest.trim_start_matches("::"));
    let mut parts = path.split('/');
    module.is_empty() || module.split("::").all(|part| parts.next() == Some(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Log {
        Log {
            sink: None,
            is_shared: false,
            id: "vm".to_owned(),
            show_level: true,
            show_log_origin: true,
            module: None,
            configured: true,
            lost: 0,
            guest: NO_LINES,
        }
    }

    #[test]
    fn a_line_says_when_who_and_where_in_one_line() {
        let place = Location::caller();
        let mut log = log();
        let line = log.line(Level::Warning, &"it\nbroke", place);
        let (time, rest) = line.split_once(' ').unwrap();
        assert_eq!(time.len(), "2026-11-24T06:00:00.123456789".len(), "{line}");
        let thread = std::thread::current();
        let number = place.line();
        assert_eq!(rest, format!("[vm:{}:WARN:src/log.rs:{number}] it broke\n", thread.name().unwrap()));
        (log.show_level, log.show_log_origin) = (false, false);
        let long = log.line(Level::Info, &"ä".repeat(MESSAGE_MAX), place);
        assert!(long.contains("] ä") && long.len() < MESSAGE_MAX + 200, "{}", long.len());
    }

    #[test]
    fn words_of_clients_begin_no_line_and_give_a_terminal_no_commands() {
        let line = log().line(Level::Warning, &"no field `a\r\nb\x1b[2J\u{9b}2J`\tä", Location::caller());
        assert!(line.ends_with("] no field `a  b [2J 2J` ä\n"), "{line:?}");
    }

    #[test]
    fn levels_are_read_in_any_case_and_ordered() {
        for (text, level) in [("error", Level::Error), ("WARNING", Level::Warning), ("Off", Level::Off)] {
            assert_eq!(text.parse(), Ok(level));
        }
        assert!("loud".parse::<Level>().unwrap_err().contains("unknown level `loud`"));
        assert!(Level::Off < Level::Error && Level::Debug < Level::Trace);
        let config: Config = serde_json::from_str(r#"{"level": "tRaCe", "show_level": true}"#).unwrap();
        assert_eq!((config.level, config.show_level), (Some(Level::Trace), Some(true)));
    }

    #[test]
    fn a_message_that_nobody_wants_is_not_made() {
        struct Costly;
        impl Display for Costly {
            fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                panic!("it was made")
            }
        }
        assert!(wants(Level::Warning) && !wants(Level::Info));
        for say in [info, debug, trace, guest_debug, guest_trace] {
            say(Costly);
        }
        assert!(std::panic::catch_unwind(|| guest_line(Costly)).is_err());
    }

    #[test]
    fn what_guests_cause_is_counted_by_period_and_level() {
        let (mut log, now) = (log(), Instant::now());
        for number in 1..=5000 {
            assert_eq!(log.guest[2].count(now + PERIOD / 2), number);
        }
        assert_eq!(log.guest[1].count(now + PERIOD / 2), 1);
        assert_eq!(log.guest[2].count(now + 2 * PERIOD), 1);
        assert!(GUEST_LINES_MAX.is_sorted_by_key(|(level, most)| (*level, *most)));
    }

    #[test]
    fn a_module_has_those_in_it() {
        for module in ["", "alula", "virtio", "alula::virtio", "virtio::workers", "alula::virtio::workers"] {
            assert!(is_of("src/virtio/workers.rs", module), "{module}");
        }
        for module in ["virt", "api", "virtio::workers::x", "workers"] {
            assert!(!is_of("src/virtio/workers.rs", module), "{module}");
        }
        assert!(is_of("src/virtio/mod.rs", "virtio") && is_of("src/log.rs", "log"));
    }

    #[test]
    fn a_pipe_that_nobody_reads_loses_lines_and_holds_nobody_up() {
        use std::io::Read;
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut log = log();
        let message = "x".repeat(3000);
        let mut told = 0;
        while log.lost == 0 {
            log.write_to_shared(&writer, &message, 0);
            told += 1;
        }
        // It comes back, though the pipe blocks.
        log.write_to_shared(&writer, &message, 1);
        assert_eq!(log.lost, 2);
        let mut all = vec![0; (told - 1) * (message.len() + "alula: \n".len())];
        reader.read_exact(&mut all).unwrap();
        log.write_to_shared(&writer, &"after", 0);
        drop(writer);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "alula: 2 lines were lost here\nalula: after\n");
        assert_eq!(log.lost, 0);
    }

    #[test]
    fn lines_that_nobody_reads_are_counted_and_told() {
        use std::io::Read;
        let (mut reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let name = crate::descriptors::hand_over(&writer);
        let mut log = log();
        log.sink = Some(Sink::open(Purpose::Log, std::path::Path::new(&name)).unwrap());
        let line = format!("{}\n", "x".repeat(4000));
        while log.lost == 0 {
            log.write_to_sink(&line);
        }
        log.write_to_sink(&line);
        assert_eq!(log.lost, 2);
        reader.set_nonblocking(true).unwrap();
        let mut all = vec![0; 1 << 20];
        let mut count = 0;
        while let Ok(more) = reader.read(&mut all[count..]) {
            count += more;
            log.sink.as_mut().unwrap().flush();
        }
        log.write_to_sink("after\n");
        let more = reader.read(&mut all[count..]).unwrap();
        assert_eq!(&all[count..count + more], b"2 lines were lost here\nafter\n");
        assert!(METRICS.missed_log_count.total() >= 2);
    }
}
