//! Calls on sockets, network interfaces and vsock ports (vsock(7)).
#![allow(unsafe_code)]

use std::io::{ErrorKind, Result};
use std::mem::{size_of_val, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr;

use super::descriptor::owned;
use super::{check, check_count};

/// A socket that does not block (socket(2)).
///
/// # Errors
/// The kernel has none of this kind, or the process has as many descriptors as it may have.
pub fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: the call takes numbers.
    owned(unsafe { libc::socket(family, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, protocol) })
}

/// Connects a socket to the one at an address of `length` bytes (unix(7)).
///
/// # Errors
/// There is none, nobody listens there, or who does has no room (EAGAIN).
pub fn connect(socket: &impl AsRawFd, address: &libc::sockaddr_un, length: usize) -> Result<()> {
    let length = length.min(size_of_val(address)) as libc::socklen_t;
    // SAFETY: the call reads the structure, of which `length` bytes are not more than all.
    check(unsafe { libc::connect(socket.as_raw_fd(), ptr::from_ref(address).cast(), length) }).map(drop)
}

/// Has a socket listen at an address of `length` bytes, where nothing may be yet (bind(2), listen(2)); as many clients
/// may wait as the kernel lets them.
///
/// # Errors
/// Something is there (EADDRINUSE), or nothing can be made there.
pub fn listen(socket: &impl AsRawFd, address: &libc::sockaddr_un, length: usize) -> Result<()> {
    let length = length.min(size_of_val(address)) as libc::socklen_t;
    // SAFETY: the call reads the structure, of which `length` bytes are not more than all.
    check(unsafe { libc::bind(socket.as_raw_fd(), ptr::from_ref(address).cast(), length) })?;
    // SAFETY: the call takes numbers.
    check(unsafe { libc::listen(socket.as_raw_fd(), -1) }).map(drop)
}

/// The next client of a listening Unix socket; its stream does not block (accept4(2)).
///
/// # Errors
/// None waits, or the process has as many descriptors as it may have.
pub fn accept(listener: &impl AsRawFd) -> Result<UnixStream> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let nobody = std::ptr::null_mut();
    // SAFETY: the call writes no address.
    owned(unsafe { libc::accept4(listener.as_raw_fd(), nobody, std::ptr::null_mut(), flags) }).map(Into::into)
}

/// The process at the other end of a Unix socket: the one that listens there, or that has made the pair (SO_PEERCRED in
/// unix(7)). None: it is in a PID namespace that this process does not see.
pub fn peer(socket: &impl AsRawFd) -> Option<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the call writes no more than `length` bytes, all of the local structure.
    let asked = unsafe {
        let place = ptr::from_mut(&mut peer).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, place, &mut length)
    };
    check(asked).ok()?;
    u32::try_from(peer.pid).ok().filter(|pid| *pid > 0)
}

/// Receives into the front of `bytes`, and returns how many there were (recv(2)); `flags`: `libc::MSG_...`.
///
/// # Errors
/// There is nothing, or the other end has broken off.
pub fn receive(socket: &impl AsRawFd, bytes: &mut [u8], flags: i32) -> Result<usize> {
    // SAFETY: the call writes at most the length of the slice to it.
    check_count(unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags) })
}

/// Sends a front of `bytes`, and returns how many went (send(2)).
///
/// # Errors
/// There is no room, or the other end has broken off.
pub fn send(socket: &impl AsRawFd, bytes: &[u8]) -> Result<usize> {
    // SAFETY: the call reads at most the length of the slice.
    check_count(unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) })
}

/// The most descriptors that one message takes with it here.
pub const DESCRIPTORS_MAX: usize = 8;

/// Sends all of `bytes` and other descriptors of what `fds` have open, at most [`DESCRIPTORS_MAX`], to the other end of a
/// Unix socket, as one message (SCM_RIGHTS, unix(7)).
///
/// # Errors
/// There is no room for all of it, there are too many descriptors, or the other end has broken off.
pub fn send_with(socket: &impl AsRawFd, bytes: &[u8], fds: &[&dyn AsRawFd]) -> Result<()> {
    if fds.len() > DESCRIPTORS_MAX {
        return Err(ErrorKind::InvalidInput.into());
    }
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // Room for a header and the descriptors, as aligned as a header has to be.
    let mut control = [0_u64; 3 + DESCRIPTORS_MAX / 2];
    // SAFETY: `msghdr` is plain data of which zeros are valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    let size = (fds.len() * size_of::<RawFd>()) as u32;
    if size > 0 {
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: the functions compute lengths and places within the local buffer, which has room for a header and as
        // many descriptors as there are.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size) as _;
            for (index, fd) in fds.iter().enumerate() {
                libc::CMSG_DATA(header).cast::<RawFd>().add(index).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    // SAFETY: the call reads the local structures and the slice.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    if check_count(sent)? == bytes.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}

/// As [`receive`], without waiting, with the descriptor that comes along, if one does; of several, the others are closed.
///
/// # Errors
/// There is nothing, or the other end has broken off.
pub fn receive_with(socket: &impl AsRawFd, bytes: &mut [u8]) -> Result<(usize, Option<OwnedFd>)> {
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // Room for a header and one descriptor: the kernel passes no more than there is room for (unix(7)).
    let mut control = [0_u64; 3];
    // SAFETY: `msghdr` is plain data of which zeros are valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    message.msg_control = control.as_mut_ptr().cast();
    // Aligned, there would be room for two.
    // SAFETY: the function computes a length, for which the local buffer has room.
    message.msg_controllen = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as u32) } as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the call writes at most the lengths of the local buffer and of the slice to them.
    let count = check_count(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })?;
    // SAFETY: the kernel has written headers that lie within the buffer, whose first one this is, and a descriptor that is
    // nobody else's after a header that says so.
    let came = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let has_one = !header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_RIGHTS
            && (*header).cmsg_len as usize >= libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        has_one.then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
    };
    Ok((count, came))
}

/// Lets through to a socket only what a program of classic BPF accepts (SO_ATTACH_FILTER, socket(7)).
///
/// # Errors
/// The kernel takes no such program.
pub fn attach_filter(socket: &impl AsRawFd, filter: &[libc::sock_filter]) -> Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
    let (value, length) = ((&raw const program).cast(), size_of_val(&program) as libc::socklen_t);
    // SAFETY: the call reads the local structure and as many statements as it says there are: their number has 16
    // bits, so it is not more than there are.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value, length) }).map(drop)
}

/// Has a netlink socket hear what is told to these groups (netlink(7)).
///
/// # Errors
/// The kernel's, of bind(2).
pub fn join_groups(socket: &impl AsRawFd, groups: u32) -> Result<()> {
    // SAFETY: `sockaddr_nl` is plain data of which zeros are valid.
    let mut address: libc::sockaddr_nl = unsafe { zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    address.nl_groups = groups;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the call reads the local structure, as long as it is.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) }).map(drop)
}

/// struct ifreq: an interface's name, and a union with what is asked for (netdevice(7)).
#[repr(C, align(8))]
#[derive(Clone, Default)]
pub struct InterfaceRequest {
    /// The name, filled up with zeros.
    pub name: [u8; libc::IFNAMSIZ],
    /// The union.
    pub value: [u8; 24],
}

impl InterfaceRequest {
    /// ifr_flags
    pub fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.value[0], self.value[1]])
    }

    /// The same request with these flags.
    pub fn with_flags(&self, flags: u16) -> Self {
        let mut request = self.clone();
        request.value[..2].copy_from_slice(&flags.to_ne_bytes());
        request
    }

    /// ifr_hwaddr: the address after its family.
    pub fn address(&self) -> [u8; 6] {
        self.value[2..8].try_into().expect("these are 6")
    }

    /// ifr_ifindex
    pub fn index(&self) -> u32 {
        u32::from_ne_bytes(self.value[..4].try_into().expect("these are 4"))
    }

    /// Whether it is about the interface called `name`.
    pub fn is_called(&self, name: &str) -> bool {
        self.name.split(|byte| *byte == 0).next() == Some(name.as_bytes())
    }
}

/// What can be asked of an interface by its name, and of the queue of a TAP (linux/if_tun.h).
#[derive(Clone, Copy, Debug)]
pub enum InterfaceCall {
    /// Gives the hardware address, of a socket or a TAP.
    Address,
    /// Gives the number of the interface, of a socket.
    Index,
    /// Gives the flags, of a socket.
    Flags,
    /// Gives the name and the flags of what a queue is attached to.
    Attached,
    /// Attaches a queue to the interface of this name and these flags, which is made if there is none.
    Attach,
    /// Lets a queue of several get frames, or none, as the flags say.
    SetQueue,
}

/// Asks something of an interface; the answer comes into `request`.
///
/// # Errors
/// There is no such interface, the user may not, or the kernel's, of ioctl(2).
pub fn ask_interface(fd: &impl AsRawFd, call: InterfaceCall, request: &mut InterfaceRequest) -> Result<()> {
    let call = match call {
        InterfaceCall::Address => libc::SIOCGIFHWADDR,
        InterfaceCall::Index => libc::SIOCGIFINDEX,
        InterfaceCall::Flags => libc::SIOCGIFFLAGS,
        InterfaceCall::Attached => libc::TUNGETIFF,
        InterfaceCall::Attach => libc::TUNSETIFF,
        InterfaceCall::SetQueue => libc::TUNSETQUEUE,
    };
    const { assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>()) };
    // SAFETY: each of these calls reads and writes a `struct ifreq`, which the structure is as large as.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), call, std::ptr::from_mut(request)) }).map(drop)
}

/// The number of the interface that a request names; None: there is no such interface (if_nametoindex(3)).
pub fn interface_index(request: &InterfaceRequest) -> Option<u32> {
    let name = std::ffi::CStr::from_bytes_until_nul(&request.name).ok()?;
    // SAFETY: the name is a string that ends with a zero.
    Some(unsafe { libc::if_nametoindex(name.as_ptr()) }).filter(|index| *index != 0)
}

/// Lets a TAP give frames that its reader can take: `libc::TUN_F_...` (TUNSETOFFLOAD).
///
/// # Errors
/// The kernel does not have one of these.
pub fn set_offloads(tap: &impl AsRawFd, offloads: u32) -> Result<()> {
    let offloads = libc::c_ulong::from(offloads);
    // SAFETY: the call takes a number.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) }).map(drop)
}

/// Sets how many bytes the header before a frame has (TUNSETVNETHDRSZ).
///
/// # Errors
/// The file is no TAP.
pub fn set_header_size(tap: &impl AsRawFd, size: i32) -> Result<()> {
    // SAFETY: the call reads a number.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) }).map(drop)
}

/// Keeps frames from a TAP that are for none of these addresses (TUNSETTXFILTER), of which there are at most 65535;
/// `flags`: `libc::TUN_FLT_...`. Without any address all come.
///
/// # Errors
/// The file is no TAP.
pub fn set_address_filter(tap: &impl AsRawFd, flags: u16, addresses: &[[u8; 6]]) -> Result<()> {
    let count = u16::try_from(addresses.len()).unwrap_or(u16::MAX);
    // struct tun_filter: flags, a count, addresses.
    let mut filter = [flags.to_ne_bytes(), count.to_ne_bytes()].concat();
    filter.extend(addresses.as_flattened());
    // SAFETY: the call reads the header and as many addresses as it says there are.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETTXFILTER, filter.as_ptr()) }).map(drop)
}

/// The CID of the host.
pub const VSOCK_HOST_CID: u32 = libc::VMADDR_CID_HOST;

fn vsock_address(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    (address.svm_family, address.svm_cid, address.svm_port) = (libc::AF_VSOCK as _, cid, port);
    (address, size_of::<libc::sockaddr_vm>() as _)
}

/// A vsock socket of this port, which does not block.
fn vsock_socket(port: u32) -> Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call takes numbers.
    let socket = owned(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
    let (address, length) = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is as long as is said.
    check(unsafe { libc::bind(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) })?;
    Ok(socket)
}

/// A socket that listens on this vsock port for whoever can reach this machine.
pub fn vsock_listen(port: u32) -> Result<OwnedFd> {
    let socket = vsock_socket(port)?;
    // SAFETY: the call takes numbers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) })?;
    Ok(socket)
}

/// Asks the host for a connection from one vsock port to another, and waits for no answer.
pub fn vsock_call_host(from: u32, to: u32) -> Result<()> {
    let socket = vsock_socket(from)?;
    let (address, length) = vsock_address(VSOCK_HOST_CID, to);
    // SAFETY: the address is as long as is said.
    let result = check(unsafe { libc::connect(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) });
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        result => result.map(drop),
    }
}

/// The next connection, which does not block, and the CID that it comes from, if it is a vsock's.
pub fn vsock_accept(listener: &impl AsRawFd) -> Result<(OwnedFd, Option<u32>)> {
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    let mut length = size_of_val(&address) as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call writes at most as many bytes of the address as is said.
    let stream = owned(unsafe {
        libc::accept4(listener.as_raw_fd(), ptr::from_mut(&mut address).cast(), &mut length, flags)
    })?;
    let is_vsock = i32::from(address.svm_family) == libc::AF_VSOCK;
    Ok((stream, is_vsock.then_some(address.svm_cid)))
}
