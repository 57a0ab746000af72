//! Streams of the host's programs, as the device reads and writes them: many pieces of memory by one system
//! call, which never waits.

use std::io::{ErrorKind, Result as IoResult};
use std::os::unix::net::UnixStream;

use super::backlog::{Backlog, Blocks};
use crate::sys::vectors::{Gather, Scatter};
use crate::sys::{descriptor, network};

/// Writes as much as the reader has room for now; what was written is taken away. Returns how many bytes
/// that is, and how many system calls it took.
pub fn write(list: &mut Gather<'_>, stream: &UnixStream) -> (IoResult<usize>, u64) {
    let (before, mut calls) = (list.len(), 0);
    while !list.is_empty() {
        calls += 1;
        match list.send(stream) {
            Ok((_, true)) => {}
            Ok((_, false)) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return (Err(error), calls),
        }
    }
    (Ok(before - list.len()), calls)
}

/// Fills the list, as far as there are bytes, by one system call. Returns how many bytes there were; 0:
/// the end. True: there may be more, though the list is not full: bytes of a client that sent a descriptor
/// along (which is closed) are not read together with those after them.
pub fn read(list: &mut Scatter<'_>, stream: &UnixStream) -> IoResult<(usize, bool)> {
    let (received, is_cut) = list.receive(stream)?;
    Ok((received, received == list.len() || is_cut))
}

/// Keeps what is in the list at the end of a backlog; false: there is no memory for all of it.
pub fn keep(list: &mut Gather<'_>, backlog: &mut Backlog, blocks: &mut Blocks) -> bool {
    while !list.is_empty() {
        let Some(room) = backlog.room(blocks, list.len()) else { return false };
        list.take_front(room);
    }
    true
}

/// Whether whoever had the other end has closed it, both ways.
pub fn is_gone(stream: &UnixStream) -> bool {
    descriptor::poll(stream, 0, 0) & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Looks at what there is to read, at most as much as `bytes` holds, and leaves it.
pub fn peek(stream: &UnixStream, bytes: &mut [u8]) -> IoResult<usize> {
    network::receive(stream, bytes, libc::MSG_PEEK | libc::MSG_DONTWAIT)
}
