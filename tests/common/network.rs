//! A network of the test's own: a namespace with TAP interfaces.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::output;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb_u32 as libc::Ioctl;
/// IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
const FLAGS: i16 = 0x5002;

/// Puts this thread, and what it starts from now on, into a network of its own.
#[allow(unsafe_code)]
pub fn enter() {
    // SAFETY: the call takes a number and changes this thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "a network namespace: {}", std::io::Error::last_os_error());
}

/// Makes a TAP interface that lives as long as the namespace, with an address of the host's.
#[allow(unsafe_code)]
pub fn add_tap(name: &str, address: &str) {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&FLAGS.to_le_bytes());
    // SAFETY: the calls read a structure of 40 bytes and take a number.
    unsafe {
        assert_eq!(
            libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &request),
            0,
            "{}",
            std::io::Error::last_os_error()
        );
        assert_eq!(libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST, 1), 0);
    }
    output("ip", &["addr", "add", address, "dev", name]);
    output("ip", &["link", "set", name, "up"]);
}
