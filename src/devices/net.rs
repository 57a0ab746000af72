//! The network device (virtio 1.2, 5.1) over a TAP interface of the host. Frames go between the TAP
//! and guest memory in one system call each, without a copy of ours.

use std::fs::File;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use vm_memory::GuestAddressSpace;

use super::kind::{CliOption, DeviceConfig};
use crate::error::{Error, Result};
use crate::event::Interest;
use crate::host::{Host, Local};
use crate::memory::{Memory, Regions};
use crate::snapshot::Snapshot;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Io, Queue, Registrar, VirtioDevice, Worker};

const QUEUE_SIZE: u16 = 256;
const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

/// struct virtio_net_hdr_v1; `num_buffers` is its last field.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
/// The largest frame with its header that a TAP gives: 64 KiB of segments and an Ethernet header.
const FRAME_MAX: usize = HEADER + 14 + 65536;
/// Frames moved in one turn; then other devices of the loop have theirs.
const TURN: usize = 256;
const MTU_MIN: u16 = 68;

/// An Ethernet address, written `aa:bb:cc:dd:ee:ff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A locally administered address that is always the same for the same names.
    pub fn derived(id: &str, iface_id: &str) -> Self {
        // FNV-1a, 64 bits.
        let bytes = id.bytes().chain([0]).chain(iface_id.bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let [_, _, a, b, c, d, e, f] = hash.to_be_bytes();
        // Unicast, locally administered.
        Self([a & 0xfc | 2, b, c, d, e, f])
    }
}

impl std::str::FromStr for Mac {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Vec<_> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
        let wrong = || format!("`{text}` is not a MAC address like 06:00:ac:10:00:02");
        if text.len() != 17 {
            return Err(wrong());
        }
        let bytes: Vec<u8> = bytes.into_iter().collect::<Result<_, _>>().map_err(|_| wrong())?;
        let bytes: [u8; 6] = bytes.try_into().map_err(|_| wrong())?;
        if bytes[0] & 1 != 0 {
            return Err(format!("`{text}` is a group's MAC address, an interface needs its own"));
        }
        Ok(Self(bytes))
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Body of `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Its name: letters, digits and underscores.
    pub iface_id: String,
    /// The TAP interface of the host.
    pub host_dev_name: String,
    /// Its address; none: one derived from the names of the microVM and the interface.
    pub guest_mac: Option<Mac>,
    /// The largest packet, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Not implemented yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<Value>,
    /// Not implemented yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<Value>,
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "network-interfaces";
    const METRICS: &'static str = "net";
    const MANY: bool = true;
    const NOUN: &'static str = "network interface";
    const FAULT: &'static str = "Network config error";
    const OPTION: CliOption = CliOption {
        name: "net",
        value: "tap=NAME[,mac=MAC][,id=ID]",
        help: "A network interface over a TAP interface of this host. May be repeated",
    };
    const EXAMPLE: &'static str =
        r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02"}"#;
    type Patch = Patch;

    fn id(&self) -> &str {
        &self.iface_id
    }

    fn from_option(text: &str, number: usize) -> Result<Self, String> {
        let expected = || format!("expected {}", Self::OPTION.value);
        let mut interface = Self {
            iface_id: format!("net{number}"),
            host_dev_name: String::new(),
            guest_mac: None,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        };
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) => interface.host_dev_name = name.to_owned(),
                Some(("mac", mac)) => interface.guest_mac = Some(mac.parse()?),
                Some(("id", id)) => interface.iface_id = id.to_owned(),
                _ => return Err(format!("`{part}` is unknown: {}", expected())),
            }
        }
        match interface.host_dev_name.is_empty() {
            true => Err(expected()),
            false => Ok(interface),
        }
    }

    fn check(&self) -> Result<()> {
        super::check_id(&self.iface_id)?;
        if self.rx_rate_limiter.is_some() || self.tx_rate_limiter.is_some() {
            return Err(limiters_not_implemented());
        }
        match self.mtu {
            Some(mtu) if mtu < MTU_MIN => {
                Err(Error::config(format!("an `mtu` of {mtu} is too small: at least {MTU_MIN}")))
            }
            _ => Ok(()),
        }
    }

    fn check_beside(&self, other: &Self) -> Result<()> {
        match self.guest_mac {
            Some(mac) if other.guest_mac == Some(mac) => {
                Err(Error::config(format!("The MAC address is already in use: {mac}")))
            }
            _ => Ok(()),
        }
    }

    fn hold(&self, host: &mut Local) -> Result<()> {
        host.hold_tap(&self.host_dev_name)
    }

    fn open(&self, vm: &str, host: &mut dyn Host) -> Result<Box<dyn VirtioDevice>> {
        let tap = host.tap(&self.host_dev_name)?;
        let mac = self.guest_mac.unwrap_or_else(|| Mac::derived(vm, &self.iface_id));
        Ok(Box::new(Net { mac, mtu: self.mtu, tap }))
    }

    fn patched(&self, patch: Patch) -> Result<Self> {
        if patch.rx_rate_limiter.is_some() || patch.tx_rate_limiter.is_some() {
            return Err(limiters_not_implemented());
        }
        Ok(self.clone())
    }

    fn id_mismatch(path: &str, body: &str) -> String {
        format!("The id from the path [{path}] does not match the id from the body [{body}]!")
    }
}

fn limiters_not_implemented() -> Error {
    Error::config("rate limiters are not implemented yet: leave them out")
}

/// Body of `PATCH /network-interfaces/{iface_id}`: with the name alone, nothing changes.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Patch {
    /// The interface.
    pub iface_id: String,
    /// Not implemented yet.
    pub rx_rate_limiter: Option<Value>,
    /// Not implemented yet.
    pub tx_rate_limiter: Option<Value>,
}

impl super::kind::Patch for Patch {
    fn id(&self) -> &str {
        &self.iface_id
    }
}

/// The device.
pub struct Net {
    mac: Mac,
    mtu: Option<u16>,
    tap: File,
}

/// It has none: what the guest sees is in the configuration.
impl Snapshot for Net {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        let segments = F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6;
        let mtu = if self.mtu.is_some() { F_MTU } else { 0 };
        F_CSUM | F_GUEST_CSUM | segments | F_MAC | F_STATUS | F_MRG_RXBUF | mtu
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    /// With the name alone there is nothing to change.
    fn patch(&mut self, _: &Value, _: &mut dyn Host) -> Result<bool> {
        Ok(false)
    }

    /// struct virtio_net_config: mac, status (link up), max_virtqueue_pairs, mtu.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6] = 1;
        config[8] = 1;
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        super::copy_config(&config, offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let Io { memory, features, queues } = io;
        let [rx, tx] = <[Queue; 2]>::try_from(queues).ok().expect("two queues were asked for");
        let has = |feature| features & feature != 0;
        crate::host::set_tap_offloads(&self.tap, has(F_GUEST_CSUM), has(F_GUEST_TSO4), has(F_GUEST_TSO6))?;
        let tap = self.tap.try_clone().map_err(|error| Error::host(error.to_string()))?;
        let buffers = Buffers::new(memory.clone());
        let mergeable = has(F_MRG_RXBUF);
        let (chains, used) = (Vec::new(), Vec::new());
        Ok(vec![Box::new(Running { memory, rx, tx, tap, mergeable, buffers, chains, used })])
    }
}

struct Running {
    memory: Memory,
    rx: Queue,
    tx: Queue,
    tap: File,
    mergeable: bool,
    /// Of one frame, filled again for each.
    buffers: Buffers,
    /// Heads and lengths of the chains that a frame was read into, and of those it used.
    chains: Vec<(u16, usize)>,
    used: Vec<(u16, usize)>,
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.rx, RX)?;
        registrar.kick(&self.tx, TX)?;
        // Edge-triggered: frames that wait for the driver's buffers must not keep the loop awake; the
        // kick that brings buffers looks again.
        registrar.add(&self.tap, Interest::IN | Interest::EDGE_TRIGGERED, TAP)
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        let memory = self.memory.memory();
        match token {
            TX => {
                let (tap, buffers) = (&self.tap, &mut self.buffers);
                self.tx.serve(&memory, |chain| {
                    buffers.clear();
                    buffers.add_readable(chain)?;
                    send(tap, buffers);
                    Ok(0)
                })
            }
            _ => self.receive(&memory),
        }
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.rx, self.tx]
    }
}

impl Running {
    /// Moves frames until the TAP is empty or the driver has no more buffers.
    fn receive(&mut self, memory: &Regions) -> Result<()> {
        self.rx.disable_kicks(memory)?;
        let mut moved = 0;
        loop {
            match self.receive_frame(memory)? {
                Received::Frame if moved < TURN => moved += 1,
                Received::Frame => {
                    self.rx.kick_again();
                    break;
                }
                Received::NoFrame => break,
                Received::NoBuffers => {
                    if !self.rx.enable_kicks(memory)? {
                        break;
                    }
                    self.rx.disable_kicks(memory)?;
                }
            }
        }
        self.rx.notify(memory)
    }

    /// Reads one frame into as many of the driver's buffers as the largest could need, and gives
    /// back those that it did not.
    fn receive_frame(&mut self, memory: &Regions) -> Result<Received> {
        let Self { buffers, chains, used, .. } = self;
        buffers.clear();
        chains.clear();
        used.clear();
        while buffers.len() < FRAME_MAX && (self.mergeable || chains.is_empty()) {
            let Some(chain) = self.rx.pop(memory)? else { break };
            let head = chain.head_index();
            chains.push((head, buffers.add_writable(chain)?));
        }
        // The header must be in one piece for `num_buffers` to be found again.
        let first = chains.first().map_or(0, |(_, length)| *length);
        if chains.is_empty() {
            return Ok(Received::NoBuffers);
        }
        if first < HEADER {
            return Err(Error::guest("the driver gave a receive buffer too small for a header"));
        }
        let Ok(mut left) = buffers.read_frame(&self.tap) else {
            // Empty, or down: there is no frame.
            chains.iter().for_each(|_| self.rx.undo_pop());
            return Ok(Received::NoFrame);
        };
        for (head, length) in chains.iter() {
            if left == 0 {
                self.rx.undo_pop();
            } else {
                let here = left.min(*length);
                used.push((*head, here));
                left -= here;
            }
        }
        buffers.copy_from(NUM_BUFFERS, &(used.len() as u16).to_le_bytes());
        for (head, length) in used.iter() {
            self.rx.push(memory, *head, *length as u32)?;
        }
        Ok(Received::Frame)
    }
}

enum Received {
    Frame,
    NoFrame,
    NoBuffers,
}

/// A frame that the TAP does not take is lost, as on a wire: it is down, or the driver's header is wrong.
fn send(tap: &File, frame: &Buffers) {
    if frame.len() >= HEADER {
        let _ = frame.write_frame(tap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_the_same_way() {
        let mac: Mac = "06:00:AC:10:00:02".parse().unwrap();
        assert_eq!(mac.to_string(), "06:00:ac:10:00:02");
        for wrong in ["", "06:00:ac:10:00", "06:00:ac:10:00:02:03", "g6:00:ac:10:00:02", "0600:ac:10:00:02x"]
        {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        assert!("01:00:00:00:00:00".parse::<Mac>().unwrap_err().contains("group"));
    }

    #[test]
    fn derived_addresses_are_local_and_differ_by_names() {
        let mac = Mac::derived("vm", "eth0");
        assert_eq!(mac, Mac::derived("vm", "eth0"));
        assert_ne!(mac, Mac::derived("vm", "eth1"));
        assert_ne!(mac, Mac::derived("vme", "th0"));
        assert_eq!(mac.0[0] & 3, 2);
    }
}
