//! The system calls of the agent that the standard library does not have, each behind a safe function.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::io::{Error, ErrorKind, Result};
use std::mem;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;

use super::process::Identity;
use super::request::Window;

/// The CID of the host (vsock(7)).
pub const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// How a process ended: by itself with a code, or by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Its exit code.
    Code(u8),
    /// The signal.
    Signal(u8),
}

fn check(returned: libc::c_int) -> Result<libc::c_int> {
    if returned < 0 { Err(Error::last_os_error()) } else { Ok(returned) }
}

fn owned(fd: libc::c_int) -> Result<OwnedFd> {
    let fd = check(fd)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_string(text: impl AsRef<OsStr>) -> Result<CString> {
    CString::new(text.as_ref().as_bytes()).map_err(|_| ErrorKind::InvalidInput.into())
}

fn is_process_1() -> bool {
    std::process::id() == 1
}

fn vsock_address(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    (address.svm_family, address.svm_cid, address.svm_port) = (libc::AF_VSOCK as _, cid, port);
    (address, mem::size_of::<libc::sockaddr_vm>() as _)
}

/// A vsock socket of this port, which does not block.
fn vsock(port: u32) -> Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call takes numbers.
    let socket = owned(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
    let (address, length) = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is as long as is said.
    check(unsafe { libc::bind(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) })?;
    Ok(socket)
}

/// A socket that listens on this vsock port for whoever can reach this machine.
pub fn listen(port: u32) -> Result<OwnedFd> {
    let socket = vsock(port)?;
    // SAFETY: the call takes numbers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) })?;
    Ok(socket)
}

/// Asks the host for a connection from one vsock port to another, and waits for no answer.
pub fn call_host(from: u32, to: u32) -> Result<()> {
    let socket = vsock(from)?;
    let (address, length) = vsock_address(HOST_CID, to);
    // SAFETY: the address is as long as is said.
    let result = check(unsafe { libc::connect(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) });
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        result => result.map(drop),
    }
}

/// The next connection, which does not block, and the CID that it comes from, if it is a vsock's.
pub fn accept(listener: &impl AsRawFd) -> Result<(OwnedFd, Option<u32>)> {
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    let mut length = mem::size_of_val(&address) as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call writes at most as many bytes of the address as is said.
    let stream = owned(unsafe {
        libc::accept4(listener.as_raw_fd(), ptr::from_mut(&mut address).cast(), &mut length, flags)
    })?;
    let is_vsock = i32::from(address.svm_family) == libc::AF_VSOCK;
    Ok((stream, is_vsock.then_some(address.svm_cid)))
}

/// A descriptor that is readable when one of these signals has come. They are blocked for it, which programs that are
/// started do not inherit (`std::process::Command` gives them an empty mask).
pub fn watch(signals: &[i32]) -> Result<OwnedFd> {
    // SAFETY: the set is plain data that sigemptyset initialises; the calls use it, and change this thread's mask.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
        owned(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))
    }
}

/// The next signal that came to such a descriptor.
pub fn next_signal(mut watched: impl std::io::Read) -> Option<u8> {
    let mut told = [0; mem::size_of::<libc::signalfd_siginfo>()];
    let count = watched.read(&mut told).ok()?;
    // Its first field is the number (signalfd(2)).
    let number = told[..count].first_chunk().map(|number| u32::from_ne_bytes(*number))?;
    u8::try_from(number).ok()
}

/// The size of the terminal that this is, if it is one.
pub fn window(terminal: &impl AsRawFd) -> Option<Window> {
    // SAFETY: the structure is plain data of which zeros are valid, and the call writes it.
    unsafe {
        let mut size: libc::winsize = mem::zeroed();
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size)).ok()?;
        Some(Window { rows: size.ws_row, columns: size.ws_col })
    }
}

/// A child that has ended, if one has: any that this process is the parent of.
pub fn reap() -> Option<(u32, Exit)> {
    let mut status = 0;
    // SAFETY: the call writes the local number.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0)?;
    let exit = match libc::WIFSIGNALED(status) {
        true => Exit::Signal(libc::WTERMSIG(status) as u8),
        false => Exit::Code(libc::WEXITSTATUS(status) as u8),
    };
    Some((pid, exit))
}

/// Sends a signal to a process group. A group that is gone gets none.
pub fn signal_group(group: u32, signal: u8) {
    // A group of 0 or 1 would be our own, or everybody.
    if let Ok(group) = libc::pid_t::try_from(group)
        && group > 1
    {
        // SAFETY: the call takes numbers.
        unsafe { libc::kill(-group, signal.into()) };
    }
}

/// Sends a signal to every process but this one, if this is process 1.
pub fn signal_all(signal: i32) {
    if is_process_1() {
        // SAFETY: the call takes numbers.
        unsafe { libc::kill(-1, signal) };
    }
}

/// Makes reads and writes return at once.
pub fn let_not_block(fd: &impl AsRawFd) -> Result<()> {
    // SAFETY: the calls take numbers.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)).map(drop)
    }
}

/// Both ends of a new pseudoterminal, ours and the program's, which belongs to `owner`.
pub fn terminal(size: Window, owner: u32) -> Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the call reads a static string.
    let ours = owned(unsafe { libc::open(c"/dev/ptmx".as_ptr(), flags | libc::O_NONBLOCK) })?;
    let unlocked: libc::c_int = 0;
    // SAFETY: the call reads the local number (ioctl_tty(2)).
    check(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK, &unlocked) })?;
    // SAFETY: the call takes flags. The other end needs no path by it: /dev/pts may be another's.
    let theirs = owned(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the call takes numbers.
    check(unsafe { libc::fchown(theirs.as_raw_fd(), owner, libc::gid_t::MAX) })?;
    set_window(&ours, size)?;
    Ok((ours, theirs))
}

/// Tells a terminal's program its size; what is 0 is not known, and stays as it is.
pub fn set_window(terminal: &impl AsRawFd, Window { rows, columns }: Window) -> Result<()> {
    // SAFETY: the structure is plain data of which zeros are valid, and the calls read and write it.
    unsafe {
        let mut size: libc::winsize = mem::zeroed();
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size))?;
        size.ws_row = if rows > 0 { rows } else { size.ws_row };
        size.ws_col = if columns > 0 { columns } else { size.ws_col };
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size)).map(drop)
    }
}

/// The process group in a terminal's foreground.
pub fn foreground(terminal: &impl AsRawFd) -> Option<u32> {
    // SAFETY: the call takes a number.
    u32::try_from(unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) }).ok()
}

/// The highest number of a signal with a name (signal(7)).
const SIGNALS: i32 = 31;

/// Has the program start in a session of its own, whose terminal its standard input is, if that is said, and as
/// this user.
pub fn prepare(command: &mut Command, identity: Identity, has_terminal: bool, becomes: bool) {
    let enter = move || {
        // SAFETY: the calls take numbers, and the list is as long as is said. This thread is the only one: nobody
        // else can have held a lock when it forked.
        unsafe {
            check(libc::setsid())?;
            // Whoever started the agent may have had signals ignored, as a shell's background job has Ctrl-C, and a
            // program inherits that. The kernel refuses two of these numbers (KILL, STOP), which are never ignored.
            for number in 1..=SIGNALS {
                libc::signal(number, libc::SIG_DFL);
            }
            if has_terminal {
                check(libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0))?;
            }
            if becomes {
                let Identity { uid, gid, groups, .. } = &identity;
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setgid(*gid))?;
                check(libc::setuid(*uid))?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(enter) };
}

/// Who this process is: its user and its group.
pub fn identity() -> (u32, u32) {
    // SAFETY: the calls return numbers.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Mounts a file system; `options` are its own.
pub fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong, options: &str) -> Result<()> {
    let [source, target, kind, options] = [source, target, kind, options].map(c_string);
    let (source, target, kind, options) = (source?, target?, kind?, options?);
    // SAFETY: the strings end with a zero, and live until the call returns.
    check(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast())
    })
    .map(drop)
}

/// Writes file systems out, and ends the machine.
pub fn end(reboot: bool) -> Result<()> {
    let how = if reboot { libc::RB_AUTOBOOT } else { libc::RB_POWER_OFF };
    // SAFETY: the calls take numbers.
    check(unsafe {
        libc::sync();
        libc::reboot(how)
    })
    .map(drop)
}

/// Names the machine.
pub fn set_hostname(name: &str) -> Result<()> {
    // SAFETY: the name is as long as is said.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// Sets the clock, in nanoseconds since 1970 UTC.
pub fn set_clock(ns: u64) -> Result<()> {
    let time =
        libc::timespec { tv_sec: (ns / 1_000_000_000) as _, tv_nsec: (ns % 1_000_000_000) as libc::c_long };
    // SAFETY: the call reads the local structure.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) }).map(drop)
}

/// Adds random bytes to the kernel's generator, which counts them as random (random(4)).
pub fn add_randomness(seed: &[u8]) -> Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const SEED_MAX: usize = 512;
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; SEED_MAX],
    }
    let count = seed.len().min(SEED_MAX);
    let mut pool = Pool { bits: count as i32 * 8, size: count as i32, bytes: [0; SEED_MAX] };
    pool.bytes[..count].copy_from_slice(&seed[..count]);
    let device = std::fs::File::open("/dev/urandom")?;
    // SAFETY: the call reads the local structure, which has as many bytes as it says at most.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, ptr::from_ref(&pool)) }).map(drop)
}

fn internet(address: Ipv4Addr) -> libc::sockaddr {
    let s_addr = u32::from_ne_bytes(address.octets());
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as _,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain data of the same size (netdevice(7)).
    unsafe { mem::transmute(address) }
}

/// Brings an interface up, with this address and network if one is given (netdevice(7)).
pub fn bring_up(interface: &str, address: Option<(Ipv4Addr, u8)>) -> Result<()> {
    // SAFETY: the call takes numbers.
    let socket = owned(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as _;
    }
    let tell = |call: libc::c_ulong, request: &mut libc::ifreq| {
        // SAFETY: the call reads and writes the local structure.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), call as _, ptr::from_mut(request)) })
    };
    if let Some((address, prefix)) = address {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        request.ifr_ifru.ifru_addr = internet(address);
        tell(libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = internet(Ipv4Addr::from(mask));
        tell(libc::SIOCSIFNETMASK, &mut request)?;
    }
    tell(libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: the call before wrote this field.
    request.ifr_ifru.ifru_flags = unsafe { request.ifr_ifru.ifru_flags } | libc::IFF_UP as libc::c_short;
    tell(libc::SIOCSIFFLAGS, &mut request).map(drop)
}

/// Other networks are reached by this gateway.
pub fn set_gateway(gateway: Ipv4Addr) -> Result<()> {
    // SAFETY: the call takes numbers.
    let socket = owned(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut route: libc::rtentry = unsafe { mem::zeroed() };
    (route.rt_dst, route.rt_genmask) = (internet(Ipv4Addr::UNSPECIFIED), internet(Ipv4Addr::UNSPECIFIED));
    route.rt_gateway = internet(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the call reads the local structure.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, ptr::from_ref(&route)) }).map(drop)
}

/// The addresses of all interfaces but loopback ones.
pub fn addresses() -> Vec<IpAddr> {
    let mut list: *mut libc::ifaddrs = ptr::null_mut();
    let mut found = Vec::new();
    // SAFETY: the list is valid until it is freed, and each address is as its family says (getifaddrs(3)).
    unsafe {
        if libc::getifaddrs(&mut list) != 0 {
            return found;
        }
        let mut entry = list;
        while let Some(interface) = entry.as_ref() {
            entry = interface.ifa_next;
            let is_loopback = interface.ifa_flags & libc::IFF_LOOPBACK as u32 != 0;
            let Some(address) = interface.ifa_addr.as_ref().filter(|_| !is_loopback) else { continue };
            match i32::from(address.sa_family) {
                libc::AF_INET => {
                    let address = *ptr::from_ref(address).cast::<libc::sockaddr_in>();
                    found.push(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes()).into());
                }
                libc::AF_INET6 => {
                    let address = *interface.ifa_addr.cast::<libc::sockaddr_in6>();
                    found.push(std::net::Ipv6Addr::from(address.sin6_addr.s6_addr).into());
                }
                _ => {}
            }
        }
        libc::freeifaddrs(list);
    }
    found
}
/// Makes the folder that this process is in, a mount point, the root of everything.
pub fn become_root() -> Result<()> {
    mount(".", "/", "", libc::MS_MOVE, "")?;
    // SAFETY: the call reads a static string.
    check(unsafe { libc::chroot(c".".as_ptr()) })?;
    std::env::set_current_dir("/")
}

/// Loads a kernel module; one that is there already is no error.
pub fn load_module(file: &impl AsRawFd, is_compressed: bool) -> Result<()> {
    /// The kernel unpacks it (linux/module.h, MODULE_INIT_COMPRESSED_FILE; since Linux 5.17).
    const COMPRESSED: libc::c_int = 4;
    let flags = if is_compressed { COMPRESSED } else { 0 };
    // SAFETY: the call takes numbers and a static string.
    let returned =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), flags) } as i32;
    match check(returned) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}
