//! The cable of an interface that was restored over another passt: put in again when its driver has seen it pulled.

use std::sync::Arc;
use std::time::Duration;

use crate::devices::limit::set;
use crate::devices::net::control::Control;
use crate::devices::net::status::Status;
use crate::error::Result;
use crate::poll::{self, Interest, Timer};
use crate::virtio::{Interrupts, Registrar};

/// The time from the driver's look to the link that comes back. Programs of the guest that hear of links from its kernel
/// are to hear of both changes: Linux tells of two at once as of one (linkwatch).
const DOWN_TIME: Duration = Duration::from_millis(100);

/// A cable that is out.
pub struct Cable {
    status: Arc<Status>,
    interrupts: Arc<Interrupts>,
    /// Of a driver that can tell the network where it is.
    control: Option<Arc<Control>>,
    timer: Option<Timer>,
}

impl Cable {
    /// The cable of the interface with this status, whose driver hears of it by `interrupts`.
    pub fn new(
        status: Arc<Status>,
        interrupts: Arc<Interrupts>,
        control: Option<Arc<Control>>,
    ) -> Result<Self> {
        let timer = Some(poll::timer("link of a network interface")?);
        Ok(Self { status, interrupts, control, timer })
    }

    /// Has its worker hear by the token `seen` that the driver has looked, if it has before, too, and by `timer` that the
    /// time is over.
    pub fn register(&self, registrar: &mut Registrar<'_>, seen: u32, timer: u32) -> Result<()> {
        let edge = Interest::IN | Interest::EDGE_TRIGGERED;
        self.timer.iter().try_for_each(|it| registrar.add(it, edge, timer))?;
        self.status.cable.iter().try_for_each(|it| registrar.add(&it.seen, edge, seen))
    }

    /// The driver has seen that there is no link.
    pub fn seen(&mut self) -> Result<()> {
        set(&mut self.timer, Some(DOWN_TIME))
    }

    /// The time is over: the driver hears that there is a link, if there is one.
    pub fn put_in(&self) {
        self.status.put_in();
        self.control.iter().for_each(|control| control.set_announcing(true));
        self.interrupts.configuration_changed();
    }
}
