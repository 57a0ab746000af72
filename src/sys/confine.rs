//! The calls by which this process takes away from itself: rights that a program could gain, system calls (seccomp(2)),
//! files and ports (landlock(7)), with the signal that tells of a call that was refused; and those that shut a process
//! in: its namespaces, its root, who it is, its limits, and the program that it becomes. The latter, from [`unshare`] on,
//! are for a process of one thread.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::io::{Error, Result};
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::{from_ref, null, null_mut};

use super::check;
use super::descriptor::owned;
use super::machine::{c_string, mount};

/// open_tree(2), linux/mount.h: a copy of the mount, which is nowhere yet.
const OPEN_TREE_CLONE: libc::c_uint = 1;
/// move_mount(2), linux/mount.h: both paths are empty, and what is meant are the descriptors.
const MOVE_MOUNT_EMPTY_PATHS: libc::c_uint = 0x04 | 0x40;

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
        -1 => Error::last_os_error().raw_os_error().map_or(-1, |error| -i64::from(error)),
        result => result,
    }
}

/// Moves this process into new namespaces (`libc::CLONE_NEW...`, unshare(2)).
///
/// # Errors
/// The kernel's; EPERM: this user may not.
pub fn unshare(namespaces: i32) -> Result<()> {
    // SAFETY: the call takes a number; no other thread can be surprised, as there is none.
    check(unsafe { libc::unshare(namespaces) }).map(drop)
}

/// Moves this process into an open namespace of this kind (setns(2)).
///
/// # Errors
/// The kernel's; EINVAL: the descriptor is that of something else.
pub fn join(namespace: &impl AsRawFd, kind: i32) -> Result<()> {
    // SAFETY: the call takes numbers.
    check(unsafe { libc::setns(namespace.as_raw_fd(), kind) }).map(drop)
}

/// Keeps what this mount namespace does from then on away from others; what is mounted elsewhere still arrives.
///
/// # Errors
/// The kernel's, of mount(2).
pub fn keep_mounts_apart() -> Result<()> {
    mount("", "/", "", libc::MS_SLAVE | libc::MS_REC, "")
}

/// A copy of the mounts at the open `place`, or at `path` in it, that is mounted nowhere yet (open_tree(2), since Linux
/// 5.2).
///
/// # Errors
/// The kernel's.
pub fn copy_mounts(place: Option<&OwnedFd>, path: impl AsRef<OsStr>) -> Result<OwnedFd> {
    let path = c_string(path)?;
    let flags =
        OPEN_TREE_CLONE | (libc::O_CLOEXEC | libc::AT_EMPTY_PATH | libc::AT_RECURSIVE) as libc::c_uint;
    let place = place.map_or(libc::AT_FDCWD, AsRawFd::as_raw_fd);
    // SAFETY: the call reads a string that ends with a zero.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, place, path.as_ptr(), flags) } as i32)
}

/// Mounts a copy that [`copy_mounts`] has made on an open place (move_mount(2)).
///
/// # Errors
/// The kernel's.
pub fn attach(mounts: &OwnedFd, place: &OwnedFd) -> Result<()> {
    let (from, to) = (mounts.as_raw_fd(), place.as_raw_fd());
    let empty = c"".as_ptr();
    // SAFETY: the call reads empty strings, and takes numbers.
    check(
        unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, MOVE_MOUNT_EMPTY_PATHS) } as i32
    )
    .map(drop)
}

fn enter(folder: &OwnedFd) -> Result<()> {
    // SAFETY: the call takes a number.
    check(unsafe { libc::fchdir(folder.as_raw_fd()) }).map(drop)
}

/// Makes an attached mount the root of everything, beside which there is nothing (pivot_root(2), which tells of the two
/// dots).
///
/// # Errors
/// The kernel's; EINVAL: the root so far is the initial ramdisk, or is itself no mount.
pub fn become_root(mounts: &OwnedFd) -> Result<()> {
    enter(mounts)?;
    let here = c".".as_ptr();
    // SAFETY: the calls read static strings.
    unsafe {
        check(libc::syscall(libc::SYS_pivot_root, here, here) as i32)?;
        check(libc::umount2(here, libc::MNT_DETACH))?;
    }
    std::env::set_current_dir("/")
}

/// Takes away the mounts at these paths in an attached mount, and that one itself; what cannot be taken away stays.
pub fn detach(mounts: &OwnedFd, paths: &[&str]) {
    if enter(mounts).is_err() {
        return;
    }
    for path in paths.iter().copied().chain(["."]) {
        if let Ok(path) = c_string(path) {
            // SAFETY: the call reads a string that ends with a zero.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

/// Closes every descriptor from 3 on but these, which are in order (close_range(2), since Linux 5.9). No value of this
/// process may own one of them yet.
///
/// # Errors
/// The kernel's.
pub fn close_others(kept: &[RawFd]) -> Result<()> {
    let mut first = 3;
    for next in kept.iter().map(|fd| *fd as u32).chain([u32::MAX]) {
        if next > first {
            let last = if next == u32::MAX { next } else { next - 1 };
            // SAFETY: the call takes numbers; as the caller says, nobody counts on these descriptors.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } as i32)?;
        }
        first = next.saturating_add(1);
    }
    Ok(())
}

/// Makes `file` standard input, output and error (dup2(2)).
///
/// # Errors
/// The kernel's.
pub fn replace_standard_streams(file: &impl AsRawFd) -> Result<()> {
    // SAFETY: the calls take numbers, and replace what nobody owns.
    (0..3).try_for_each(|fd| check(unsafe { libc::dup2(file.as_raw_fd(), fd) }).map(drop))
}

/// Has this process and those that it starts have at most so much of a resource (`libc::RLIMIT_...`, setrlimit(2)).
///
/// # Errors
/// The kernel's; EPERM: this user may not raise the limit.
pub fn limit(resource: u32, most: u64) -> Result<()> {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: the call reads the local structure.
    check(unsafe { libc::setrlimit(resource as _, &raw const limit) }).map(drop)
}

/// Splits this process in two (fork(2)). `None`: this is the new process; else the number of the new one.
///
/// # Errors
/// The kernel's.
pub fn fork() -> Result<Option<u32>> {
    // SAFETY: there is no other thread that could hold a lock meanwhile.
    let pid = check(unsafe { libc::fork() })?;
    Ok(u32::try_from(pid).ok().filter(|pid| *pid > 0))
}

/// Ends a process that this one has made, and waits until it is gone from where it was: a control group, a namespace.
pub fn end(pid: u32) {
    let mut status = 0;
    // SAFETY: the calls take numbers, and write the local one; the process is there until it was waited for.
    unsafe {
        libc::kill(pid as libc::pid_t, libc::SIGKILL);
        libc::waitpid(pid as libc::pid_t, &raw mut status, 0);
    }
}

/// Leaves the session of whoever has started this process (setsid(2)).
///
/// # Errors
/// This process leads a process group.
pub fn leave_session() -> Result<()> {
    // SAFETY: the call takes nothing.
    check(unsafe { libc::setsid() }).map(drop)
}

/// Gives up what the next program is not to have: rights that a program could hand it (ambient capabilities), and any
/// that a file could give it (no_new_privs).
///
/// # Errors
/// The kernel's, of prctl(2).
pub fn renounce() -> Result<()> {
    // SAFETY: the call takes numbers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) })?;
    gain_no_privileges()
}

/// Becomes this user and group, without any further group. The right to go back ([`become_root_user`]) lasts until
/// [`stay_user`], or until another program is executed: that takes the saved user from the effective one, and has no
/// capabilities unless this is 0 (execve(2), capabilities(7)).
///
/// # Errors
/// The kernel's; EINVAL: the user namespace has no such user or group.
pub fn become_user(uid: u32, gid: u32) -> Result<()> {
    // SAFETY: the calls take numbers, and an empty list.
    unsafe {
        check(libc::setgroups(0, null()))?;
        check(libc::setresgid(gid, gid, gid))?;
        check(libc::setresuid(uid, uid, 0)).map(drop)
    }
}

/// Makes what [`become_user`] has done final, for a process that no other program takes the place of: the saved user
/// goes, and with it, or with a user namespace, all capabilities. Nobody finds in the process what its environment was.
///
/// # Errors
/// The kernel's, of setresuid(2) and capset(2).
pub fn stay_user(uid: u32) -> Result<()> {
    /// Capabilities are 64 bits in two structures (_LINUX_CAPABILITY_VERSION_3).
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0_u32; 6];
    // SAFETY: the calls take numbers, and read the local structures, which are as long as the version says.
    unsafe {
        check(libc::setresuid(libc::uid_t::MAX, libc::uid_t::MAX, uid))?;
        if uid != 0 {
            check(libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) as i32)?;
        }
        forget_environment();
    }
    Ok(())
}

/// Has this process be looked at and traced by its user as if the user had started it (PR_SET_DUMPABLE): the user can take
/// from it then what it has in its memory, and what it has open (pidfd_getfd(2)).
///
/// # Errors
/// The kernel's, of prctl(2).
pub fn show_to_user() -> Result<()> {
    // SAFETY: the call takes numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }).map(drop)
}

/// Takes all variables out of the environment, and overwrites them where they were, which /proc/PID/environ shows.
///
/// # Safety
/// No other thread may exist, and nobody may hold a variable's bytes.
unsafe fn forget_environment() {
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    // SAFETY: the list ends with a null pointer, and each of its strings, which this process may write, with a zero.
    unsafe {
        let mut variable = environ;
        while !variable.is_null() && !(*variable).is_null() {
            (*variable).write_bytes(0, libc::strlen(*variable));
            variable = variable.add(1);
        }
        libc::clearenv();
    }
}

/// Is root again after [`become_user`].
pub fn become_root_user() {
    // SAFETY: the call takes numbers.
    unsafe { libc::setresuid(libc::uid_t::MAX, 0, libc::uid_t::MAX) };
}

/// Becomes the open program, with these arguments and an empty environment (execveat(2)). What the C library has
/// changed for this one, a signal that is ignored, is as usual for the program. Returns only why it could not be.
pub fn execute(program: BorrowedFd<'_>, arguments: &[CString]) -> Error {
    let mut pointers: Vec<*const libc::c_char> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    pointers.push(null());
    let environment: [*const libc::c_char; 1] = [null()];
    let (empty, fd) = (c"".as_ptr(), program.as_raw_fd());
    // SAFETY: the calls read strings that end with a zero, and lists of them that end with a null pointer, all of which
    // live until the call returns.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let (argv, envp) = (pointers.as_ptr(), environment.as_ptr());
        libc::syscall(libc::SYS_execveat, fd, empty, argv, envp, libc::AT_EMPTY_PATH);
    }
    Error::last_os_error()
}
