//! Devices that come and go while the guest runs.

use super::{CHANGE_TIME, Microvm, not_started};
use crate::devices::kind::{ConfiguredDevice, DeviceKind};
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::jobs::Ticket;
use crate::log;
use crate::machine::{Leaving, Machine, Pausing};
use crate::pci;

/// The reasons why a device has gone: its owner, by a DELETE with `force` or of what nobody used; the guest, which let it go when
/// it was asked; a reset, before which it was asked.
const BY_OWNER: &str = "DELETE";
const BY_GUEST: &str = "guest";
const BY_RESET: &str = "reset";

/// Has an agent in the guest let go the device at this place on the bus or in a slot. It is called on a job's thread.
pub type Agent = Box<dyn FnOnce(u32) -> Result<()> + Send>;

impl Microvm {
    /// Gives the guest, running or paused, one more device.
    pub fn plug_device(&mut self, device: ConfiguredDevice) -> Result<()> {
        self.check_not_saving()?;
        Machine::check_plugs(&self.config)?;
        device.check()?;
        let (name, kind) = (device.name(), device.kind());
        if self.config.device(kind, device.id()).is_some() {
            let change = if kind.patchable { "change it (PATCH), or " } else { "" };
            // The first words are Firecracker's.
            return Err(Error::config(format!(
                "Device ID in use: the guest has {name}: {change}take it away first (DELETE)"
            )));
        }
        if device.root_words().is_some() {
            return Err(Error::config(format!(
                "{name}: a guest that runs has booted already: no further device can be its root (`is_root_device`, \
                 `root_device`)"
            )));
        }
        let machine = self.machine.as_deref_mut().ok_or_else(not_started)?;
        if device.shares_memory() && !machine.shares_memory() {
            return Err(Error::config(format!(
                "{name} is a vhost-user backend's (`socket`), which needs memory that is shared with it from the start of \
                 the guest: have one such device from the start, or give the guest a disk by an image (`path_on_host`)"
            )));
        }
        self.config.check_beside(&device)?;
        let plugged = machine.plug(&device, &mut self.host);
        self.host.release_all();
        plugged?;
        self.config.put(device)?;
        history::tell(|| Event::DevicePlugged { device: name });
        Ok(())
    }

    /// Takes a device away from the guest, running or paused. One that the guest uses it is asked to let go, and
    /// goes when the guest has; by `force`, any is torn away at once. Where the machine cannot ask the guest, `agent` does. A
    /// device that does not stop soon, because the host does not answer it, has a job wait for it, and so has an agent: the
    /// job's ticket is returned.
    pub fn unplug_device(
        &mut self,
        kind: &DeviceKind,
        id: &str,
        force: bool,
        agent: Option<Agent>,
    ) -> Result<Option<Ticket>> {
        self.check_not_saving()?;
        Machine::check_plugs(&self.config)?;
        // Firecracker's words.
        let device = self.device(kind, id).context("Device not found")?;
        let name = device.name();
        if device.root_words().is_some() {
            // The first words are Firecracker's.
            return Err(Error::config(format!(
                "Cannot unplug root device: the guest has booted from {name}"
            )));
        }
        let mut rest = self.config.clone();
        rest.remove(&name);
        if rest.mmds_config.as_ref().is_some_and(|metadata| rest.check_metadata(metadata).is_err()) {
            return Err(Error::config(format!(
                "{name} is where the guest asks for its metadata (`network_interfaces` of /mmds/config), for as long as it \
                 runs"
            )));
        }
        match self.started()?.begin_unplug(&name, force)? {
            Leaving::Asked => {
                history::tell(|| Event::DeviceAskedToGo { device: name });
                Ok(None)
            }
            Leaving::Now(pausing) => self.take_away(name, pausing, BY_OWNER),
            Leaving::Unheard(number) => match agent {
                Some(agent) => self.ask_agent(name, number, agent).map(Some),
                None => Err(in_use(&name, number)),
            },
        }
    }

    /// Has the agent in the guest let go a device, and then takes that away.
    fn ask_agent(&mut self, name: String, number: u32, agent: Agent) -> Result<Ticket> {
        history::tell(|| Event::DeviceAskedToGo { device: name.clone() });
        self.start_job("unplug", move || {
            let asked = agent(number);
            Box::new(move |microvm| {
                asked.with_context(|| in_use(&name, number).to_string())?;
                microvm.check_not_saving()?;
                match microvm.started()?.begin_unplug(&name, false)? {
                    Leaving::Now(pausing) => microvm.take_away(name, pausing, BY_GUEST).map(|_| None),
                    Leaving::Asked | Leaving::Unheard(_) => Err(in_use(&name, number)),
                }
            })
        })
    }

    /// Takes away what the guest has let go since this was last called.
    pub(super) fn take_let_go(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        for (name, pausing) in machine.take_let_go() {
            if let Err(error) = self.take_away(name.clone(), pausing, BY_GUEST) {
                log::line(format_args!("{name}, which the guest has let go, stays: {error}"));
            }
        }
    }

    /// Takes a device away that was told to stop.
    fn take_away(&mut self, name: String, pausing: Pausing, reason: &'static str) -> Result<Option<Ticket>> {
        if pausing.wait_for(CHANGE_TIME) {
            return self.end_unplug(&name, reason).map(|()| None);
        }
        log::debug(format_args!("{name} goes when it has finished what it has in flight"));
        let going = name.clone();
        let job = self.start_job("unplug", move || {
            pausing.wait();
            Box::new(move |microvm| microvm.end_unplug(&going, reason).map(|()| None))
        });
        if job.is_err() {
            self.started()?.end_change(&name);
        }
        job.map(Some)
    }

    fn end_unplug(&mut self, name: &str, reason: &'static str) -> Result<()> {
        self.started()?.unplug(name)?;
        self.config.remove(name);
        history::tell(|| Event::DeviceGone { device: name.to_owned(), reason });
        Ok(())
    }

    /// Takes away what the guest was asked to let go, before the machine is reset.
    pub(super) fn take_asked(&mut self) -> Result<()> {
        let asked = self.machine.as_deref_mut().map(Machine::asked_to_go).unwrap_or_default();
        asked.iter().try_for_each(|name| self.end_unplug(name, BY_RESET))
    }
}

/// The device cannot go, and what to do.
fn in_use(name: &str, number: u32) -> Error {
    let how = match pci::slot_of(number) {
        Some(slot) => format!("echo 0 > /sys/bus/pci/slots/{slot}/power"),
        None => format!("echo 1 > /sys/bus/pci/devices/0000:00:{number:02x}.0/remove"),
    };
    Error::config(format!(
        "{name} is in use, and the guest cannot be asked to let it go on this architecture but by an agent: have it do so \
         (`{how}`) and try again, or tear the device away \
         (`{{\"force\": true}}`)"
    ))
}
