//! Vsock sockets (vsock(7)): a machine's own address and ports, and connections between a guest and its host.
#![allow(unsafe_code)]

use std::io::Result;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use super::check;
use super::descriptor::owned;

/// The CID of the host.
pub const HOST_CID: u32 = libc::VMADDR_CID_HOST;

fn address_of(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    (address.svm_family, address.svm_cid, address.svm_port) = (libc::AF_VSOCK as _, cid, port);
    (address, mem::size_of::<libc::sockaddr_vm>() as _)
}

/// A vsock socket of this port, which does not block.
fn socket_of(port: u32) -> Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call takes numbers.
    let socket = owned(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
    let (address, length) = address_of(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is as long as is said.
    check(unsafe { libc::bind(socket.as_raw_fd(), ptr::from_ref(&address).cast(), length) })?;
    Ok(socket)
}

/// A socket that listens on this vsock port for whoever can reach this machine.
pub fn listen(port: u32) -> Result<OwnedFd> {
    let socket = socket_of(port)?;
    // SAFETY: the call takes numbers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) })?;
    Ok(socket)
}

/// Asks the host for a connection from one vsock port to another, and waits for no answer.
pub fn call_host(from: u32, to: u32) -> Result<()> {
    let socket = socket_of(from)?;
    let (address, length) = address_of(HOST_CID, to);
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
