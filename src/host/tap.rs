//! TAP interfaces (Documentation/networking/tuntap.rst): frames of the host's network, each with the
//! header of a virtio network device before it (virtio 1.2, 5.1.6).

use std::fs::{File, OpenOptions};
use std::io::Error as IoError;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::link::attached_queues;
use crate::descriptors::Named;
use crate::descriptors::{self, Inherited};
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::log;
use crate::sys::network::{self, InterfaceCall, InterfaceRequest};

const TUN_DEVICE: &str = "/dev/net/tun";
const MADE: &str = "made, down, without an address";
/// The interface must not be there yet (linux/if_tun.h).
const IFF_TUN_EXCL: u16 = 0x8000;
const IN_USE: &str = "another process uses it";
/// How descriptors of an interface are named.
const DESCRIPTORS: &str = "fd:";
/// The interface stays when nobody is attached to it (linux/if_tun.h).
const IFF_PERSIST: u16 = 0x0800;
const IFF_TAP: u16 = libc::IFF_TAP as u16;
const IFF_MULTI_QUEUE: u16 = libc::IFF_MULTI_QUEUE as u16;
const IFF_NO_PI: u16 = libc::IFF_NO_PI as u16;
const IFF_VNET_HDR: u16 = libc::IFF_VNET_HDR as u16;
/// struct virtio_net_hdr_v1.
const VNET_HEADER: i32 = 12;

/// A request about the interface called `name`.
fn request_for(name: &str) -> Result<InterfaceRequest> {
    if name.contains('%') {
        return Err(Error::config(
            "`%` in the name of an interface would have the kernel choose another: name it without",
        ));
    }
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0', ' ']) {
        let longest = libc::IFNAMSIZ - 1;
        return Err(Error::config(format!(
            "interface names have 1 to {longest} characters, none of them a space or `/`"
        )));
    }
    let mut request = InterfaceRequest::default();
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    Ok(request)
}

/// One queue of a TAP interface, not blocking.
#[derive(Debug)]
pub struct Tap {
    file: Named<File>,
}

impl Tap {
    /// Attaches to the interface `name` with so many queues, or takes the descriptors that `fd:N[:N..]`
    /// names, one for each queue.
    pub fn open(name: &str, queues: usize) -> Result<Vec<Self>> {
        let taps = match name.strip_prefix(DESCRIPTORS) {
            Some(numbers) => from_descriptors(numbers, queues),
            None => attach(name, queues, 0),
        }
        .with_context(|| format!("open TAP interface `{name}` (`host_dev_name`, --net)"))?;
        log::debug(format_args!("opened TAP interface `{name}`, pairs of queues: {queues}"));
        Ok(taps)
    }

    /// Makes `taps`, queues of the interface `name`, as many as `queues`. A queue of an interface can be attached
    /// once, so what is attached stays, and others come beside it.
    ///
    /// # Errors
    /// The interface has fewer: `taps` are as they were.
    pub fn set_count(taps: &mut Vec<Self>, name: &str, queues: usize) -> Result<()> {
        if taps.len() == queues {
            return Ok(());
        }
        let attempt = || format!("open TAP interface `{name}` (`host_dev_name`, --net)");
        match taps.first().and_then(|tap| tap.request().ok()) {
            // Made for one queue, it goes with that.
            Some(given) if given.is_called(name) && given.flags() & (IFF_PERSIST | IFF_MULTI_QUEUE) == 0 => {
                make_again(taps, name, queues).with_context(attempt)
            }
            Some(given) if given.is_called(name) => {
                taps.extend(attach(name, queues, taps.len()).with_context(attempt)?);
                taps.truncate(queues);
                Ok(())
            }
            // Descriptors, or an interface that is called something else by now.
            _ => {
                *taps = Self::open(name, queues)?;
                Ok(())
            }
        }
    }

    /// Whether there is such an interface, or this process may make one, without attaching to it. Descriptors
    /// are those of the process that will be started with them: this one cannot tell.
    pub fn look(name: &str, queues: usize) -> Result<()> {
        if name.starts_with(DESCRIPTORS) {
            return Ok(());
        }
        let attempt = || format!("look for TAP interface `{name}` (`host_dev_name`)");
        let request = request_for(name).with_context(attempt)?;
        match network::interface_index(&request) {
            Some(_) => Ok(()),
            None if may_make() => {
                log::line(format_args!("TAP interface `{name}` is not there: it will be {MADE}"));
                Ok(())
            }
            None => Err(Error::config(format!("there is no such interface: {}", creation(name, queues))))
                .with_context(attempt),
        }
    }

    /// Lets the TAP give frames that its reader can take: `libc::TUN_F_..`.
    pub fn set_offloads(&self, offloads: u32) -> std::io::Result<()> {
        network::set_offloads(self, offloads)
    }

    /// Whether the kernel can pass segments of UDP (Linux 6.2). The TAP passes no segments afterwards.
    pub fn has_udp_segments(&self) -> bool {
        let has = self.set_offloads(libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok();
        // What it can do is no reason to fail yet: who needs it hears of it.
        let _ = self.set_offloads(0);
        has
    }

    /// Lets a queue of several get frames, or leaves them to the others. No effect when it is so already.
    pub fn set_attached(&self, attached: bool) -> std::io::Result<()> {
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = InterfaceRequest::default().with_flags(flag as u16);
        match network::ask_interface(self, InterfaceCall::SetQueue, &mut request) {
            // So is one told that is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }

    /// Keeps frames out that are for none of these addresses; none: all come.
    pub fn set_filter(&self, addresses: Option<&[[u8; 6]]>, all_multicast: bool) -> std::io::Result<()> {
        let flags = if all_multicast { libc::TUN_FLT_ALLMULTI as u16 } else { 0 };
        // With none at all nothing would be filtered: one that nobody has stands for it.
        let nobody = [[0; 6]];
        let addresses = addresses.map(|addresses| if addresses.is_empty() { &nobody[..] } else { addresses });
        network::set_address_filter(self, flags, addresses.unwrap_or_default())
    }

    /// Another handle of the same queue.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self { file: self.file.try_clone().context("duplicate a TAP's descriptor")? })
    }

    /// What the kernel says of it: its name now, and its flags. An error: the interface is gone.
    pub(super) fn request(&self) -> std::io::Result<InterfaceRequest> {
        let mut request = InterfaceRequest::default();
        network::ask_interface(self, InterfaceCall::Attached, &mut request)?;
        Ok(request)
    }

    fn set_header_size(&self) -> Result<()> {
        network::set_header_size(self, VNET_HEADER).context("set the size of virtio headers")
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Makes an interface, which goes with the last descriptor of it. Who configures it afterwards finds it by
/// its name; who has forgotten to make it is told.
fn make(name: &str, request: &InterfaceRequest, queues: usize, create: &str) -> Result<Vec<Tap>> {
    let several = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
    let mut taps = Vec::with_capacity(queues);
    while taps.len() < queues {
        let tap = Tap { file: open_device(name)? };
        // The first of them makes it, and does not attach to one that somebody else makes at this moment.
        let new = if taps.is_empty() { IFF_TUN_EXCL } else { 0 };
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several | new;
        attach_queue(&tap, request.with_flags(flags)).map_err(|number| match number {
            libc::EPERM => Error::config(format!("there is no such interface: {create}")),
            number => refused(number, queues, create),
        })?;
        tap.set_header_size()?;
        taps.push(tap);
    }
    log::line(format_args!("TAP interface `{name}` was not there: {MADE}"));
    history::tell(|| Event::TapMade { host_dev_name: name.to_owned(), reason: MADE });
    Ok(taps)
}

/// How an interface is made.
fn creation(name: &str, queues: usize) -> String {
    let several = if queues > 1 { " multi_queue" } else { "" };
    format!("`ip tuntap add dev {name} mode tap{several} user $(id -un)` creates one")
}

/// Whether this process may make interfaces: CAP_NET_ADMIN is among its effective capabilities (proc(5)).
fn may_make() -> bool {
    const CAP_NET_ADMIN: u64 = 12;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    effective.is_some_and(|bits| bits >> CAP_NET_ADMIN & 1 == 1)
}

/// Attaches to an interface of which `held` queues are attached here already, and nobody else's, until there are
/// at least `queues`, and returns the new ones; makes one if there is none of this name.
fn attach(name: &str, queues: usize, held: usize) -> Result<Vec<Tap>> {
    let request = request_for(name)?;
    let create = creation(name, queues);
    // Not by /sys, which shows the network namespace that it was mounted in.
    let Some(index) = network::interface_index(&request) else {
        return make(name, &request, queues, &create);
    };
    check_alone(index, held)?;
    let mut taps = Vec::with_capacity(queues.saturating_sub(held));
    let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
    while held + taps.len() < queues {
        let tap = Tap { file: open_device(name)? };
        match attach_queue(&tap, request.with_flags(flags)) {
            Ok(()) => {}
            // An interface for several queues serves one as well, when it is asked for by its kind.
            Err(libc::EINVAL) if flags & IFF_MULTI_QUEUE == 0 => {
                flags |= IFF_MULTI_QUEUE;
                continue;
            }
            Err(number) => return Err(refused(number, queues, &create)),
        }
        check_given(&tap, &request, flags)?;
        tap.set_header_size()?;
        taps.push(tap);
    }
    // Somebody may have come at the same moment.
    check_alone(index, held + taps.len())?;
    Ok(taps)
}

/// Makes an interface that was made for one queue, and goes with it, once more for several. If it cannot be
/// made, it is as it was.
fn make_again(taps: &mut Vec<Tap>, name: &str, queues: usize) -> Result<()> {
    let before = taps.len();
    taps.clear();
    let made = attach(name, queues, 0);
    let (now, result) = match made {
        Ok(made) => (made, Ok(())),
        Err(error) => (attach(name, before, 0)?, Err(error)),
    };
    *taps = now;
    result
}

/// Whether the interface with this index has our queues attached and no other's. One for a single queue has
/// no count: the kernel itself lets nobody else in there. One for several takes whoever comes, and deals
/// the frames out: each of two guests would get some of the other's.
fn check_alone(index: u32, ours: usize) -> Result<()> {
    match attached_queues(index) {
        Some(count) if count as usize != ours => Err(Error::config(IN_USE)),
        _ => Ok(()),
    }
}

/// Whether the kernel gave what was asked for: an interface of this name that has these flags. Another may
/// have come into its place, and another process may have attached to it in its own way.
fn check_given(tap: &Tap, request: &InterfaceRequest, flags: u16) -> Result<()> {
    let given = tap.request().context("ask what was attached to")?;
    check_flags(given.flags())?;
    match given.name == request.name && given.flags() & IFF_MULTI_QUEUE == flags & IFF_MULTI_QUEUE {
        true => Ok(()),
        false => Err(Error::config("another interface has come into its place meanwhile: try it again")),
    }
}

fn open_device(name: &str) -> Result<Named<File>> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN_DEVICE);
    let opened = opened.with_context(|| {
        format!("open {TUN_DEVICE} (a process that may can hand over an open descriptor: `fd:N`)")
    })?;
    Ok(Named::new(format!("TAP interface `{name}`"), opened))
}

fn attach_queue(tap: &Tap, mut request: InterfaceRequest) -> std::result::Result<(), i32> {
    let attached = network::ask_interface(tap, InterfaceCall::Attach, &mut request);
    attached.map_err(|error| error.raw_os_error().unwrap_or_default())
}

fn refused(number: i32, queues: usize, create: &str) -> Error {
    Error::config(match number {
        libc::EBUSY => IN_USE.to_owned(),
        libc::EPERM => format!("this user may not use it: {create}"),
        libc::EINVAL if queues > 1 => {
            format!(
                "it is not a TAP interface with several queues (`queue_pairs`): name another, or remove it, and \
                 {create}"
            )
        }
        libc::EINVAL => "it is not a TAP interface: name one that is, or that is not there yet".to_owned(),
        libc::E2BIG => format!("{queues} queues are more than it has left (`queue_pairs`)"),
        _ => return Error::host(IoError::from_raw_os_error(number).to_string()),
    })
}

/// `N[:N..]`: descriptors that this process was started with.
fn from_descriptors(numbers: &str, queues: usize) -> Result<Vec<Tap>> {
    let mut taps = Vec::new();
    for number in numbers.split(':') {
        let attempt = || format!("take over descriptor {number}");
        let inherited = descriptors::inherited(number).with_context(attempt)?;
        if inherited.as_raw_fd() <= libc::STDERR_FILENO {
            let reason = format!("`{number}` is not the number of a descriptor above 2, as in `fd:3`");
            return Err(Error::config(reason));
        }
        taps.push(from_descriptor(inherited).with_context(attempt)?);
    }
    if taps.len() != queues {
        return Err(Error::config(format!(
            "a descriptor for each queue pair is needed: {queues} (`queue_pairs`), given are {}",
            taps.len()
        )));
    }
    Ok(taps)
}

/// A copy of the descriptor, which stays open: a start that fails elsewhere can be tried again.
fn from_descriptor(inherited: Inherited) -> Result<Tap> {
    let tap =
        Tap { file: Named::new(format!("TAP, fd:{}", inherited.as_raw_fd()), inherited.copy()?.into()) };
    let flags = tap.request().map_err(|error| {
        Error::config(match error.raw_os_error() {
            Some(libc::EBADFD) => "it is /dev/net/tun without an interface: attach it to one (TUNSETIFF)",
            _ => "it is not a TAP interface",
        })
    })?;
    // Only now: what is no TAP is left as it is.
    inherited.keep();
    inherited.set_nonblocking().context("set its flags")?;
    check_flags(flags.flags())?;
    tap.set_header_size()?;
    Ok(tap)
}

fn check_flags(flags: u16) -> Result<()> {
    let missing = [
        (IFF_TAP, "it is a TUN interface: a TAP, with Ethernet frames, is needed (IFF_TAP)"),
        (IFF_NO_PI, "it was attached without IFF_NO_PI, which is needed"),
        (IFF_VNET_HDR, "it was attached without IFF_VNET_HDR, which is needed"),
    ];
    match missing.iter().find(|(flag, _)| flags & flag == 0) {
        Some((_, message)) => Err(Error::config(*message)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::descriptor;

    #[test]
    fn descriptors_that_are_no_taps_are_left_as_they_are() {
        let file = File::open("/dev/null").unwrap();
        let name = descriptors::hand_over(&file);
        let flags =
            || (descriptor::closes_on_exec(file.as_raw_fd()).unwrap(), descriptor::status(&file).unwrap());
        let before = flags();
        for (name, expected) in [
            ("fd:".to_owned(), "`` is not the number of a descriptor"),
            ("fd:x".to_owned(), "`x` is not the number of a descriptor"),
            ("fd:1".to_owned(), "`1` is not the number of a descriptor above 2"),
            ("fd:-1".to_owned(), "`-1` is not the number"),
            ("fd:99999".to_owned(), "take over descriptor 99999: no descriptor of this number was inherited"),
            (name, "it is not a TAP interface"),
        ] {
            let error = Tap::open(&name, 1).unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
        assert_eq!(flags(), before);
    }

    #[test]
    fn flags_that_are_missing_are_named() {
        check_flags(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE).unwrap();
        for (flags, expected) in [
            (IFF_NO_PI | IFF_VNET_HDR | 1, "it is a TUN interface"),
            (IFF_TAP | IFF_VNET_HDR, "without IFF_NO_PI"),
            (IFF_TAP | IFF_NO_PI, "without IFF_VNET_HDR"),
        ] {
            let error = check_flags(flags).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
