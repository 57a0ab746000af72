//! The device: what it offers, its configuration space, and how it starts.

use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::features::{self, has};
use super::mac::Mac;
use super::status::Status;
use super::{pair, stream};
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::host::passt::Passt;
use crate::host::tap::Tap;
use crate::snapshot::Snapshot;
use crate::virtio::{Io, Queue, VirtioDevice, Worker};

const QUEUE_SIZE: u16 = 256;
/// Bits of `status` in the device's configuration.
const S_LINK_UP: u8 = 1;

/// The device.
pub struct Net {
    // Fixed
    name: String,
    mac: Mac,
    mtu: Option<u16>,
    // Host
    carrier: Carrier,
    status: Arc<Status>,
}

/// What carries its frames.
enum Carrier {
    Tap { tap: Tap, udp_segments: bool },
    Passt(stream::Home),
}

impl Net {
    /// An interface over one queue of a TAP.
    pub fn over_tap(name: String, mac: Mac, mtu: Option<u16>, taps: Vec<Tap>) -> Self {
        let [tap] = <[Tap; 1]>::try_from(taps).expect("one was asked for");
        let status = Arc::new(Status::of(&tap));
        let udp_segments = tap.has_udp_segments();
        Self { name, mac, mtu, carrier: Carrier::Tap { tap, udp_segments }, status }
    }

    /// An interface over passt.
    pub fn over_passt(name: String, mac: Mac, mtu: Option<u16>, passt: Passt) -> Self {
        let home = Arc::new(Mutex::new(Some(stream::Stream::new(passt))));
        Self { name, mac, mtu, carrier: Carrier::Passt(home), status: Arc::new(Status::up()) }
    }
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
        let mtu = if self.mtu.is_some() { features::MTU } else { 0 };
        let carrier = match self.carrier {
            Carrier::Tap { udp_segments: true, .. } => features::TAP | features::TAP_UDP,
            Carrier::Tap { .. } => features::TAP,
            Carrier::Passt(_) => 0,
        };
        features::MAC | features::STATUS | features::MRG_RXBUF | mtu | carrier
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    /// With the name alone there is nothing to change.
    fn patch(&mut self, _: &Value, _: &mut dyn Host) -> Result<bool> {
        Ok(false)
    }

    /// struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6] = if self.status.is_up() { S_LINK_UP } else { 0 };
        config[8] = 1;
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        super::super::copy_config(&config, offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let Io { memory, features, queues, interrupts } = io;
        let queues = <[Queue; 2]>::try_from(queues).ok().expect("two queues were asked for");
        let (status, mergeable) = (self.status.clone(), has(features, features::MRG_RXBUF));
        Ok(vec![match &self.carrier {
            Carrier::Tap { tap, .. } => {
                tap.set_offloads(features::tap_offloads(features)).context("set the TAP's offloads")?;
                let tap = tap.try_clone()?;
                Box::new(pair::Running::new(memory, queues, mergeable, tap, status, interrupts))
            }
            Carrier::Passt(home) => {
                let name = self.name.clone();
                let running = stream::Running::new(name, memory, queues, mergeable, home, status, interrupts);
                Box::new(running.ok_or_else(|| Error::host("an earlier worker still has passt's stream"))?)
            }
        }])
    }
}
