//! What sets a whole machine up, and is its root's to do: file systems, modules, the clock, names and addresses.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::io::{ErrorKind, Result};
use std::mem;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use super::check;
use super::descriptor::owned;

pub(super) fn c_string(text: impl AsRef<OsStr>) -> Result<CString> {
    CString::new(text.as_ref().as_bytes()).map_err(|_| ErrorKind::InvalidInput.into())
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

/// Makes the folder that this process is in, a mount point, the root of everything.
pub fn become_root() -> Result<()> {
    mount(".", "/", "", libc::MS_MOVE, "")?;
    // SAFETY: the call reads a static string.
    check(unsafe { libc::chroot(c".".as_ptr()) })?;
    std::env::set_current_dir("/")
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
