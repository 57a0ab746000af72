//! A network of the test's own: a namespace with TAP interfaces.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::output;

/// What our TAPs are: Ethernet frames with virtio headers.
pub const TAP: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Puts this thread, and what it starts from now on, into a network of its own.
#[allow(unsafe_code)]
pub fn enter() {
    // SAFETY: the call takes a number and changes this thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "a network namespace: {}", std::io::Error::last_os_error());
}

/// Attaches to an interface, or makes one that lives as long as the file.
#[allow(unsafe_code)]
pub fn open_tap(name: &str, flags: i32) -> File {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&(flags as u16).to_ne_bytes());
    // SAFETY: the call reads and writes a structure of 40 bytes.
    let attached = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    assert_eq!(attached, 0, "{name}: {}", std::io::Error::last_os_error());
    tap
}

/// Leaves the frames of a TAP to its other queues.
#[allow(unsafe_code)]
pub fn detach_queue(tap: &File) {
    let mut request = [0_u8; 40];
    request[16..18].copy_from_slice(&(libc::IFF_DETACH_QUEUE as u16).to_ne_bytes());
    // SAFETY: the call reads and writes a structure of 40 bytes.
    let detached = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE, &mut request) };
    assert_eq!(detached, 0, "{}", std::io::Error::last_os_error());
}

/// Makes a TAP interface that lives as long as the namespace, with an address of the host's.
pub fn add_tap(name: &str, address: &str) {
    add_interface(name, TAP);
    output("ip", &["addr", "add", address, "dev", name]);
    output("ip", &["link", "set", name, "up"]);
}

/// Makes a TUN or TAP interface of root's that lives as long as the namespace.
#[allow(unsafe_code)]
pub fn add_interface(name: &str, flags: i32) {
    let tap = open_tap(name, flags);
    // SAFETY: the calls take numbers.
    unsafe {
        assert_eq!(libc::ioctl(tap.as_raw_fd(), libc::TUNSETOWNER, 0), 0);
        assert_eq!(libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, 1), 0);
    }
}

/// Lets the processes that are started from now on have this file, and returns its number there.
#[allow(unsafe_code)]
pub fn hand_over(file: &File) -> i32 {
    // SAFETY: the call takes numbers.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) }, 0);
    file.as_raw_fd()
}

/// What every passt needs of its host: a route to the world, which need not lead anywhere.
pub fn add_uplink() {
    add_tap("up0", "10.9.8.2/24");
    output("ip", &["link", "set", "lo", "up"]);
    output("ip", &["route", "add", "default", "via", "10.9.8.1"]);
}

/// The processes called passt that `parent` started.
pub fn passts(parent: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let children =
        tasks.map(|task| std::fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let pids = children.flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    let name = |pid: &String| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    pids.filter(|pid| name(pid).starts_with("passt")).map(|pid| pid.parse().unwrap()).collect()
}

/// Ends a process that the test started, directly or not.
#[allow(unsafe_code)]
pub fn kill(pid: u32) {
    // SAFETY: the call takes numbers.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
}

/// Waits for a connection.
pub fn accept(listener: &std::net::TcpListener) -> std::net::TcpStream {
    listener.set_nonblocking(true).unwrap();
    let mut accepted = None;
    super::wait_for(|| {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let (stream, _) = accepted.unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
    stream.set_write_timeout(Some(super::PATIENCE)).unwrap();
    stream
}

/// Answers the frame that the firmware's case `net` sends, as it wants.
pub fn answer(wire: &Wire) {
    let mut frame = wire.receive();
    assert_eq!(&frame[14..19], b"hello");
    frame[14..19].copy_from_slice(b"world");
    frame[6..12].copy_from_slice(b"\x02\0\0\0\0\x01");
    wire.send(&frame);
}

/// A packet socket on an interface, for one EtherType.
pub struct Wire {
    socket: std::os::fd::OwnedFd,
}

impl Wire {
    /// Listens on the interface `name`.
    #[allow(unsafe_code)]
    pub fn new(name: &str, ether_type: u16) -> Self {
        use std::os::fd::FromRawFd;
        let name = std::ffi::CString::new(name).unwrap();
        let protocol = ether_type.to_be();
        // SAFETY: `sockaddr_ll` is plain data; the calls read local structures of the sizes given.
        unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into());
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let size = size_of_val(&address) as u32;
            assert_eq!(
                libc::bind(fd, (&raw const address).cast(), size),
                0,
                "{}",
                std::io::Error::last_os_error()
            );
            let patience = libc::timeval { tv_sec: super::PATIENCE.as_secs() as i64, tv_usec: 0 };
            let size = size_of_val(&patience) as u32;
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const patience).cast(), size);
            Self { socket: std::os::fd::OwnedFd::from_raw_fd(fd) }
        }
    }

    /// Waits until the interface `name` carries frames: it drops them for up to a second after somebody
    /// has attached to it, until the kernel's link watch has had its turn.
    #[allow(unsafe_code)]
    pub fn settle(&self, name: &str) {
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        super::wait_for(|| {
            // SAFETY: the call reads and writes a structure of 40 bytes.
            let asked = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) };
            let flags = i32::from(i16::from_ne_bytes([request[16], request[17]]));
            asked == 0 && flags & libc::IFF_RUNNING != 0
        });
        // The flag comes a moment before the queue.
        std::thread::sleep(std::time::Duration::from_millis(10));
    }

    /// The next frame.
    #[allow(unsafe_code)]
    pub fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 2048];
        // SAFETY: the call writes at most the length of the buffer to it.
        let count = unsafe { libc::recv(self.socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        assert!(count >= 0, "no frame came: {}", std::io::Error::last_os_error());
        frame.truncate(count as usize);
        frame
    }

    /// Forgets the frames that have come so far.
    #[allow(unsafe_code)]
    pub fn discard(&self) {
        let mut byte = 0_u8;
        // SAFETY: the call writes at most one byte to the local.
        while unsafe { libc::recv(self.socket.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_DONTWAIT) }
            >= 0
        {}
    }

    /// Sends a frame.
    #[allow(unsafe_code)]
    pub fn send(&self, frame: &[u8]) {
        // SAFETY: the call reads the slice.
        let count = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(count, frame.len() as isize, "{}", std::io::Error::last_os_error());
    }
}
