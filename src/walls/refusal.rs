//! A system call that a filter does not allow: which, in which thread, and what becomes of it.

use std::fmt::{self, Display, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};

use super::made;
use crate::arch::trap;
use crate::error::{Context as _, Error, Result};
use crate::log;
use crate::sys::confine::{self, Context, Instruction, Refused};
use crate::sys::process;

/// A number that no system call has: by a call of this number the address is learned.
const NO_CALL: u32 = 4095;
/// The number of different calls that are told of which a filter would refuse.
const TOLD_MAX: usize = 256;
/// The longest name of a thread that is kept (pthread_setname_np(3)).
const NAME_MAX: usize = 15;
/// The longest line about a refused call, in bytes: names of threads and calls are short.
const LINE_MAX: usize = 512;

/// The call that was refused first.
static NUMBER: AtomicI32 = AtomicI32::new(-1);
/// The set of calls that the refused one is of: AUDIT_ARCH_...
static SET: AtomicU32 = AtomicU32::new(0);
/// The argument of the refused call that says what it does, if there is such a one.
static MEANING: AtomicU64 = AtomicU64::new(0);
static IS_NOTED: AtomicBool = AtomicBool::new(false);
static THREAD: [std::sync::atomic::AtomicU8; NAME_MAX] =
    [const { std::sync::atomic::AtomicU8::new(0) }; NAME_MAX];
/// Why a thread has no walls.
static FAILURE: Mutex<Option<String>> = Mutex::new(None);

/// The address from which calls are made again; 0: it is not known.
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
/// Marks of the calls that were told of already.
static TOLD: [AtomicU64; TOLD_MAX] = [const { AtomicU64::new(0) }; TOLD_MAX];

/// Notes a call that was refused in this thread, and returns whether it was the first one. A signal's handler may call
/// this.
pub fn note(refused: &Refused, context: &Context) -> bool {
    if IS_NOTED.swap(true, SeqCst) {
        return false;
    }
    SET.store(refused.arch, SeqCst);
    let meaning = meaning_of(refused.number).map(|(argument, _)| trap::arguments(context)[argument]);
    MEANING.store(meaning.unwrap_or_default(), SeqCst);
    THREAD.iter().zip(thread_name(process::name_thread)).for_each(|(to, from)| to.store(from, SeqCst));
    NUMBER.store(refused.number, SeqCst);
    true
}

/// The name of this thread, which the kernel is asked for: the library has none yet while a thread begins.
fn thread_name(ask: impl FnOnce(&mut [u8; NAME_MAX + 1])) -> [u8; NAME_MAX + 1] {
    let mut name = [0; NAME_MAX + 1];
    match process::is_main_thread() {
        true => name[..4].copy_from_slice(b"main"),
        false => ask(&mut name),
    }
    name
}

/// Whether the process is to end by a call that was refused, or by a thread that has no walls.
pub fn is_noted() -> bool {
    NUMBER.load(SeqCst) >= 0 || IS_FAILURE.load(SeqCst)
}

static IS_FAILURE: AtomicBool = AtomicBool::new(false);
/// The function that wakes the main loop.
static ALARM: std::sync::OnceLock<fn()> = std::sync::OnceLock::new();

/// Has `alarm` called when a thread could not be enclosed: `alarm` is to wake the main loop; the thread sleeps on.
pub fn tell(alarm: fn()) {
    let _ = ALARM.set(alarm);
}

/// Ends the process for this error, and never returns to the thread.
pub(super) fn end_without_walls(error: &Error) -> ! {
    *FAILURE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error.to_string());
    IS_FAILURE.store(true, SeqCst);
    if let Some(alarm) = ALARM.get() {
        alarm();
    }
    process::sleep_for_ever()
}

/// The message about the call that was refused, or about the thread that has no walls.
pub fn words() -> String {
    let failure = FAILURE.try_lock().ok().and_then(|failure| failure.clone());
    failure.unwrap_or_else(|| Words.to_string())
}

/// Has `write` write the line about the refused call for a handler: without allocation, and at once, as other processes
/// may write to the same terminal.
pub fn say(write: impl FnOnce(&[u8])) {
    let mut line = Line { bytes: [0; LINE_MAX], length: 0 };
    // A message that is longer than the line is cut off; the line's end always has its place.
    let _ = write!(line, "alula: {Words}");
    line.bytes[line.length] = b'\n';
    write(&line.bytes[..=line.length]);
}

/// A line that is put together on the stack.
struct Line {
    bytes: [u8; LINE_MAX],
    /// Of the bytes, so many are text; there is room for one more.
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let count = text.len().min(LINE_MAX - 1 - self.length);
        self.bytes[self.length..][..count].copy_from_slice(&text.as_bytes()[..count]);
        self.length += count;
        Ok(())
    }
}

struct Words;

impl Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the thread `")?;
        let name = THREAD.iter().map(|byte| byte.load(SeqCst)).take_while(|byte| *byte != 0);
        name.map(char::from).try_for_each(|letter| f.write_char(letter))?;
        let number = NUMBER.load(SeqCst);
        f.write_str("` made the system call ")?;
        match SET.load(SeqCst) {
            made::SET => {
                write!(f, "`{}` ({number})", name_of(number))?;
                if let Some((_, what)) = meaning_of(number) {
                    write!(f, ", {what} {:#x}", MEANING.load(SeqCst) as u32)?;
                }
            }
            set => write!(f, "{number} of another architecture ({set:#x})")?,
        }
        f.write_str(
            ", which its filter does not allow: either somebody has broken into this process, or the filter is \
             wrong: --seccomp-log goes on and tells of each such call, --no-seccomp lays no filter",
        )
    }
}

/// The argument that says what a call of many purposes does, and what that is; the kernel looks at its lower 32 bits.
fn meaning_of(number: i32) -> Option<(usize, &'static str)> {
    let meanings = [
        (libc::SYS_ioctl, 1, "command"),
        (libc::SYS_fcntl, 1, "command"),
        (libc::SYS_prctl, 0, "option"),
        (libc::SYS_mmap, 2, "protection"),
        (libc::SYS_mprotect, 2, "protection"),
        (libc::SYS_madvise, 2, "advice"),
        (libc::SYS_socket, 0, "family"),
        (libc::SYS_tgkill, 2, "signal"),
    ];
    let found = meanings.into_iter().find(|(call, ..)| *call == libc::c_long::from(number));
    found.map(|(_, argument, what)| (argument, what))
}

/// The name of a call.
fn name_of(number: i32) -> &'static str {
    let name = usize::try_from(number).ok().and_then(|number| made::NAMES.split(' ').nth(number));
    name.filter(|name| !name.is_empty()).unwrap_or("unknown")
}

/// Finds out from where [`confine::again`] makes calls, by a call that is refused.
pub(super) fn learn_address() -> Result<()> {
    let statement = |code: u16, jf: u8, k: u32| Instruction { code, jt: 0, jf, k };
    confine::handle_refused(on_told);
    confine::filter(&[
        statement(0x20, 0, 0),
        statement(0x15, 1, NO_CALL),
        statement(0x06, 0, libc::SECCOMP_RET_TRAP),
        statement(0x06, 0, libc::SECCOMP_RET_ALLOW),
    ])
    .context("lay a filter of system calls (--seccomp-log)")?;
    confine::again(NO_CALL as i32, [0; 6]);
    match ADDRESS.load(SeqCst) {
        0 => Err(Error::host("--seccomp-log: this kernel does not tell what was refused")),
        _ => Ok(()),
    }
}

/// The program of a filter whose calls are told of instead of refused: calls that are made again pass, and those that
/// start a thread or a process, which cannot be made again from within a signal's handler.
pub(super) fn told(program: &[Instruction]) -> Vec<Instruction> {
    /// The place of the address in `struct seccomp_data`, the lower half first (linux/seccomp.h).
    const ADDRESS_AT: u32 = 8;
    let statement = |code: u16, jt: u8, jf: u8, k: u32| Instruction { code, jt, jf, k };
    let address = ADDRESS.load(SeqCst) as u64;
    let mut told = vec![
        statement(0x20, 0, 0, 0),
        statement(0x15, 5, 0, libc::SYS_clone as u32),
        statement(0x15, 4, 0, libc::SYS_clone3 as u32),
        statement(0x20, 0, 0, ADDRESS_AT),
        statement(0x15, 0, 3, address as u32),
        statement(0x20, 0, 0, ADDRESS_AT + 4),
        statement(0x15, 0, 1, (address >> 32) as u32),
        statement(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    told.extend_from_slice(program);
    told
}

/// Tells of a call that would have been refused, once, and makes it.
extern "C" fn on_told(_: i32, refused: &Refused, context: &mut Context) {
    if !refused.is_by_filter() {
        return;
    }
    if refused.number == NO_CALL as i32 {
        return ADDRESS.store(refused.address, SeqCst);
    }
    process::keep_errno(|| {
        let arguments = trap::arguments(context);
        let name = thread_name(|name| {
            let call = [libc::PR_GET_NAME as u64, name.as_mut_ptr() as u64, 0, 0, 0, 0];
            confine::again(libc::SYS_prctl as i32, call);
        });
        let thread = std::str::from_utf8(&name).unwrap_or_default().trim_end_matches('\0');
        if is_new(thread, refused.number, arguments) {
            let [a, b, c, ..] = arguments;
            log::aside(format_args!(
                "--seccomp-log: the thread `{thread}` makes the system call `{}` ({}) with {a:#x}, {b:#x}, {c:#x}, \
                 which its filter does not allow",
                name_of(refused.number),
                refused.number
            ));
        }
        trap::set_result(context, confine::again(refused.number, arguments));
    });
}

/// Whether a call is the first of its kind. For calls that do many things, each thing is a kind of its own.
fn is_new(thread: &str, number: i32, arguments: [u64; 6]) -> bool {
    let does_many = [libc::SYS_ioctl, libc::SYS_fcntl, libc::SYS_madvise, libc::SYS_mmap, libc::SYS_prctl];
    let thing = match does_many.contains(&libc::c_long::from(number)) {
        true => arguments[0] as u32 as u64 ^ (arguments[1] << 8) ^ (arguments[2] << 16) & 0xff_0000,
        false => 0,
    };
    let kind = thread.bytes().take(4).fold(1, |all: u64, byte| all.wrapping_mul(31) ^ u64::from(byte));
    let mark = (kind << 48 | (number as u64) << 36) ^ thing | 1;
    for told in &TOLD {
        match told.compare_exchange(0, mark, SeqCst, SeqCst) {
            Ok(_) => return true,
            Err(other) if other == mark => return false,
            Err(_) => {}
        }
    }
    false
}
