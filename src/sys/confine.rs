//! The calls by which this process takes away from itself: rights that a program could gain, system calls (seccomp(2)),
//! files and ports (landlock(7)); and the signal that tells of a call that was refused.
#![allow(unsafe_code)]

use std::io::Result;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{from_ref, null, null_mut};

use super::check;
use super::descriptor::owned;

/// An instruction of a filter.
pub use libc::sock_filter as Instruction;
/// The registers of a thread, as a signal's handler finds them.
pub use libc::ucontext_t as Context;

/// From now on no program that this thread, or one that it starts, executes has more rights than they have
/// (PR_SET_NO_NEW_PRIVS, prctl(2)).
///
/// # Errors
/// The kernel's.
pub fn gain_no_privileges() -> Result<()> {
    // SAFETY: the call takes numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).map(drop)
}

/// Whether the kernel has filters that answer a refused call with a signal (SECCOMP_GET_ACTION_AVAIL, seccomp(2)).
///
/// # Errors
/// The kernel has no such filters.
pub fn check_filters() -> Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the call reads the local number.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, from_ref(&action)) as i32
    })
    .map(drop)
}

/// Lays a filter of system calls upon this thread, and those that it starts, for ever.
///
/// # Errors
/// The kernel's: no memory, or another filter does not let this be called.
pub fn filter(program: &[Instruction]) -> Result<()> {
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the call reads the local structure, and as many instructions as that says.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, from_ref(&program)) as i32
    })
    .map(drop)
}

/// The rights that rules handle: to files, to ports of TCP, and scopes (`struct landlock_ruleset_attr`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Handled {
    /// Rights to files: LANDLOCK_ACCESS_FS_...
    pub files: u64,
    /// Rights to ports: LANDLOCK_ACCESS_NET_...
    pub ports: u64,
    /// Scopes: LANDLOCK_SCOPE_...
    pub scopes: u64,
}

/// The version of the kernel's Landlock: 1 and more (LANDLOCK_CREATE_RULESET_VERSION).
///
/// # Errors
/// ENOSYS, EOPNOTSUPP: the kernel has none, or it is switched off.
pub fn landlock_version() -> Result<u32> {
    const VERSION: u32 = 1;
    let none = null::<Handled>();
    // SAFETY: the call takes numbers.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, VERSION) };
    check(version as i32).map(i32::cast_unsigned)
}

/// Rules that are to be laid upon threads: what they handle is forbidden, but where a rule allows it.
pub struct Ruleset(OwnedFd);

impl Ruleset {
    /// Forbids all of `handled`, of which this version of Landlock knows the first `known` fields.
    ///
    /// # Errors
    /// The kernel's: it does not know one of the rights.
    pub fn new(handled: Handled, known: usize) -> Result<Self> {
        let size = size_of::<u64>() * known.min(3);
        // SAFETY: the call reads so many bytes of the local structure, which is no shorter.
        let made = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, from_ref(&handled), size, 0) };
        owned(made as i32).map(Self)
    }

    /// Allows the rights `files`, of those that are forbidden, to the file that is open as `place` and to all below it.
    ///
    /// # Errors
    /// EINVAL: one of the rights is for folders only, and `place` is none, or is not forbidden at all.
    pub fn allow(&self, place: &impl AsRawFd, files: u64) -> Result<()> {
        const PATH_BENEATH: libc::c_int = 1;
        #[repr(C, packed)]
        struct Beneath {
            files: u64,
            place: i32,
        }
        let rule = Beneath { files, place: place.as_raw_fd() };
        let (fd, rule) = (self.0.as_raw_fd(), from_ref(&rule));
        // SAFETY: the call reads the local structure.
        check(unsafe { libc::syscall(libc::SYS_landlock_add_rule, fd, PATH_BENEATH, rule, 0) as i32 })
            .map(drop)
    }

    /// Lays the rules upon this thread, and those that it starts, for ever.
    ///
    /// # Errors
    /// E2BIG: as many rules are upon the thread as there can be.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: the call takes numbers.
        check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.0.as_raw_fd(), 0) as i32 })
            .map(drop)
    }
}

impl AsRawFd for Ruleset {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// A call that a filter refused, as the kernel tells of it (SIGSYS, sigaction(2)).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// The signal, an error, and a code that says who tells of it.
    head: [i32; 4],
    /// The address after the instruction that made the call.
    pub address: usize,
    /// The number of the call.
    pub number: i32,
    /// The set of calls that the number is of: AUDIT_ARCH_...
    pub arch: u32,
}

impl Refused {
    /// Whether the kernel tells of the call for a filter (SYS_SECCOMP); else somebody has sent the signal.
    pub fn is_by_filter(&self) -> bool {
        const BY_FILTER: i32 = 1;
        self.head[2] == BY_FILTER
    }
}

/// Has `handler` called in the thread that made a call which a filter refuses. It may be called for a signal that
/// somebody has sent, too: with other numbers. Signals of its kind come in meanwhile: a call that the handler makes
/// can be refused as well.
pub fn handle_refused(handler: extern "C" fn(i32, &Refused, &mut Context)) {
    // SAFETY: the structure is plain data of which zeros are valid. A handler that is asked for with SA_SIGINFO is
    // called with the signal's number and with pointers to a `siginfo_t`, which is longer than `Refused` and begins
    // as that does for SIGSYS, and to the context, which is the handler's alone while it runs.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &raw const action, null_mut());
    }
}

/// Makes a system call in the name of the code that made it first: with the same arguments, for a filter that lets
/// [`again`]'s own address pass. Returns what the kernel returns.
pub fn again(number: i32, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the code that was interrupted has made this very call and promises what the call needs.
    let result = unsafe { libc::syscall(number.into(), a, b, c, d, e, f) };
    match result {
        -1 => std::io::Error::last_os_error().raw_os_error().map_or(-1, |error| -i64::from(error)),
        result => result,
    }
}
