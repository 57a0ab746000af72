//! Whether an interface of the host is up, word of its changes, and who uses it (rtnetlink(7)).

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::tap::Tap;
use crate::descriptors::Named;
use crate::sys::network::{self, InterfaceCall, InterfaceRequest};

/// So much is read at once; what does not fit is cut off, and nothing of it is looked at.
const MESSAGE: usize = 64;
/// So many are taken in one turn: somebody who changes the interface all the time must not keep a device's
/// thread from its other work. A socket that is waited for as long as it is readable tells of the rest.
const MESSAGES: usize = 64;
/// Where the index of its interface is in an RTM_NEWLINK or RTM_DELLINK message: after struct nlmsghdr
/// and the first two fields of struct ifinfomsg.
const INDEX: u32 = 16 + 4;

/// A socket that hears of changes of one interface, and only of that one: on a host with a thousand
/// interfaces, each new one would else wake a thousand monitors.
pub struct Link {
    socket: Named<OwnedFd>,
}

impl Link {
    /// Watches the interface of `tap`. None: it is not of this network namespace, or cannot be watched:
    /// then it counts as up.
    pub fn watch(tap: &Tap) -> Option<Self> {
        let link = Self { socket: Named::new("state of a TAP interface", socket().ok()?) };
        let request = tap.request().ok()?;
        // A descriptor that was handed over may be of another namespace, where names mean other
        // interfaces: the one meant here has the same address.
        let address = |fd: RawFd| interface(&fd, InterfaceCall::Address, &request.name).ok();
        let [here, there] = [&link.socket as &dyn AsRawFd, tap].map(|of| address(of.as_raw_fd()));
        (here?.address() == there?.address()).then_some(())?;
        let index = interface(&link.socket, InterfaceCall::Index, &request.name).ok()?;
        link.listen(index.index()).ok()?;
        Some(link)
    }

    /// Whether the interface is there and up.
    pub fn is_up(&self, tap: &Tap) -> bool {
        let flags =
            tap.request().and_then(|request| interface(&self.socket, InterfaceCall::Flags, &request.name));
        flags.is_ok_and(|flags| u32::from(flags.flags()) & libc::IFF_UP as u32 != 0)
    }

    /// Takes what there is to hear, or so much of it that others have their turn before the rest.
    pub fn drain(&self) {
        let mut message = [0_u8; MESSAGE];
        for _ in 0..MESSAGES {
            let received = network::receive(&self.socket, &mut message, libc::MSG_DONTWAIT);
            // ENOBUFS: so much has come that some was lost. Who drains looks at the state anyway.
            if received.is_err_and(|error| error.raw_os_error() != Some(libc::ENOBUFS)) {
                return;
            }
        }
    }

    fn listen(&self, index: u32) -> std::io::Result<()> {
        let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        // Loads are big-endian, the message is as the machine is.
        let filter = [
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, INDEX),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, index.to_be()),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        ];
        network::attach_filter(&self.socket, &filter)?;
        network::join_groups(&self.socket, libc::RTMGRP_LINK as u32)
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn socket() -> std::io::Result<OwnedFd> {
    network::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)
}

/// Attributes of a TAP's link that libc does not name (linux/if_link.h).
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;
/// The fixed part of an RTM_NEWLINK message: struct nlmsghdr and struct ifinfomsg.
const FIXED: usize = 32;
/// What all attributes of a link take at most, with its statistics.
const ANSWER: usize = 32 << 10;

/// How many queues of a TAP for several are attached, by whomever, in use or not. None: the interface with
/// this index is none, or the kernel does not say (before Linux 4.16).
pub(super) fn attached_queues(index: u32) -> Option<u32> {
    let answer = ask_for_link(index).ok()?;
    let data = attribute(answer.get(FIXED..)?, libc::IFLA_LINKINFO)
        .and_then(|info| attribute(info, libc::IFLA_INFO_DATA))?;
    let number = |kind| Some(u32::from_ne_bytes(attribute(data, kind)?.try_into().ok()?));
    Some(number(IFLA_TUN_NUM_QUEUES)? + number(IFLA_TUN_NUM_DISABLED_QUEUES)?)
}

/// The RTM_NEWLINK message about an interface.
fn ask_for_link(index: u32) -> std::io::Result<Vec<u8>> {
    let socket = socket()?;
    let mut request = [0; FIXED];
    request[..4].copy_from_slice(&(FIXED as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request[20..24].copy_from_slice(&index.to_ne_bytes());
    let mut answer = vec![0; ANSWER];
    // The kernel has answered when the first call returns.
    network::send(&socket, &request)?;
    let count = network::receive(&socket, &mut answer, 0)?;
    answer.truncate(count);
    Ok(answer)
}

/// What an attribute of this kind has in it: each is a length and a kind of 16 bits, then so much, and
/// begins at a multiple of 4.
fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let (header, _) = bytes.split_first_chunk::<4>()?;
        let [length, this] = [0, 2].map(|at| u16::from_ne_bytes([header[at], header[at + 1]]));
        let content = bytes.get(4..length.into())?;
        // The upper bits say how it is made.
        if this & 0x3fff == kind {
            return Some(content);
        }
        bytes = bytes.get(usize::from(length).next_multiple_of(4)..)?;
    }
}

/// Asks something of the interface called `name`, of a socket or a TAP.
fn interface(
    fd: &impl AsRawFd,
    call: InterfaceCall,
    name: &[u8; libc::IFNAMSIZ],
) -> std::io::Result<InterfaceRequest> {
    let mut request = InterfaceRequest { name: *name, ..InterfaceRequest::default() };
    network::ask_interface(fd, call, &mut request)?;
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attribute_is_found_among_others_and_damage_is_none() {
        let one = |kind: u16, content: &[u8]| {
            let length = 4 + content.len() as u16;
            let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), content].concat();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let bytes = [one(1, b"abc"), one(7 | 0x8000, b"nested"), one(9, b"")].concat();
        assert_eq!(attribute(&bytes, 1), Some(&b"abc"[..]));
        assert_eq!(attribute(&bytes, 7), Some(&b"nested"[..]));
        assert_eq!(attribute(&bytes, 9), Some(&b""[..]));
        assert_eq!(attribute(&bytes, 3), None);
        for length in 0..bytes.len() - 4 {
            assert_eq!(attribute(&bytes[..length], 9), None, "{length}");
        }
        // A length that does not even cover itself.
        assert_eq!(attribute(&[0; 8], 1), None);
        assert_eq!(attribute(&[3, 0, 2, 0, 0, 0, 0, 0], 1), None);
    }
}
