//! Message-signalled interrupts: which event sends which message (KVM api, 4.52).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MSI_VALID_DEVID, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi,
};

use crate::arch::{self, layout};
use crate::error::{Context, Error, Result};
use crate::poll::{self, EventFd};
use crate::vm::Vm;

/// A message: where it is written, what, and (where the interrupt controller asks for it) by whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The address written to.
    pub address: u64,
    /// The value written.
    pub data: u32,
    /// The sender: bus, device and function on PCI.
    pub device: u32,
}

/// The interrupts that are messages, by number, and what they send now (none: nothing yet). KVM takes
/// the whole table at every change.
#[derive(Default)]
pub struct Routes {
    messages: Mutex<BTreeMap<u32, Option<Message>>>,
}

impl Routes {
    /// Has `take` take all messages, this one among them, and notes it once that is done. One that KVM
    /// refused (a guest can write any) would stand in every later table, and no device's interrupts could
    /// change any more. Messages that were taken already are not taken again.
    fn set(
        &self,
        added: &[(u32, Message)],
        take: impl FnOnce(&BTreeMap<u32, Option<Message>>) -> Result<()>,
    ) -> Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if added.iter().all(|(gsi, message)| messages.get(gsi) == Some(&Some(*message))) {
            return Ok(());
        }
        let mut new = messages.clone();
        new.extend(added.iter().map(|(gsi, message)| (*gsi, Some(*message))));
        take(&new)?;
        *messages = new;
        Ok(())
    }
}

/// The events that KVM turns into interrupts while they live, with the line or message of each.
#[derive(Default)]
pub struct Connections(Mutex<Vec<(u32, Weak<EventFd>)>>);

/// An interrupt line that `main` raises itself, now and then. It costs no descriptor, and has reached the interrupt
/// controllers when it was raised: KVM hands an event that raises a line to a work queue, whose thread takes the CPU
/// from a restore that is under way.
pub enum Line {
    /// A line of KVM's, by its number.
    Kvm(Arc<Vm>, u32),
    /// An event that is written to instead, for tests.
    Event(Arc<EventFd>),
}

impl Line {
    /// Raises the line for a moment: an edge (KVM api, 4.25).
    pub fn raise(&self) -> Result<()> {
        match self {
            Self::Kvm(vm, gsi) => {
                let mut levels = [true, false].into_iter();
                let set = levels.try_for_each(|level| vm.fd.set_irq_line(arch::irq_of_line(*gsi), level));
                set.with_context(|| format!("raise interrupt line {gsi}"))
            }
            Self::Event(event) => event.write(1).context("raise an interrupt line"),
        }
    }
}

impl Vm {
    /// An event that raises the interrupt line `gsi` for a moment when written: an edge.
    pub fn interrupt(&self, gsi: u32) -> Result<Arc<EventFd>> {
        let event = poll::event(format!("interrupt line {gsi}"))?;
        let event = Arc::new(event);
        self.connect(&event, gsi).with_context(|| format!("connect interrupt line {gsi}"))?;
        Ok(event)
    }

    fn connect(&self, event: &Arc<EventFd>, gsi: u32) -> Result<(), kvm_ioctls::Error> {
        self.fd.register_irqfd(event, gsi)?;
        let mut connected = self.connections.0.lock().unwrap_or_else(PoisonError::into_inner);
        connected.retain(|(_, other)| other.strong_count() > 0);
        connected.push((gsi, Arc::downgrade(event)));
        Ok(())
    }

    fn disconnect(&self, event: &Arc<EventFd>, gsi: u32) -> Result<(), kvm_ioctls::Error> {
        self.fd.unregister_irqfd(event, gsi)?;
        let mut connected = self.connections.0.lock().unwrap_or_else(PoisonError::into_inner);
        connected.retain(|(_, other)| other.as_ptr() != Arc::as_ptr(event));
        Ok(())
    }

    /// Returns when each event that was written to has reached the interrupt controllers. KVM raises a line by a
    /// work queue, which may take milliseconds: until then the interrupt is in no state that KVM gives. To
    /// disconnect an event waits for what is under way. What is written meanwhile comes when the event is
    /// connected again.
    pub fn settle_interrupts(&self) -> Result<()> {
        let connected = self.connections.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (gsi, event) in connected.iter().filter_map(|(gsi, event)| Some((*gsi, event.upgrade()?))) {
            let again = self.fd.unregister_irqfd(&event, gsi);
            again
                .and_then(|()| self.fd.register_irqfd(&event, gsi))
                .with_context(|| format!("wait for what interrupt {gsi} has under way"))?;
        }
        Ok(())
    }

    /// A number for an interrupt that is a message.
    pub fn allocate_message(&self) -> Result<u32> {
        let mut messages = self.routes.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let mut numbers = layout::MESSAGE_GSIS..layout::MESSAGE_GSIS + layout::MESSAGES_MAX;
        let free = numbers.find(|gsi| !messages.contains_key(gsi));
        let gsi =
            free.ok_or_else(|| Error::config("there are too many devices for the interrupts there are"))?;
        messages.insert(gsi, None);
        Ok(gsi)
    }

    /// The number is free for another one; no event may be connected to it any more. Its route leaves
    /// KVM's table with the next change.
    pub fn free_message(&self, gsi: u32) {
        self.routes.messages.lock().unwrap_or_else(PoisonError::into_inner).remove(&gsi);
    }

    /// Tells KVM of these messages, each with its number, which [`Vm::send_by`] is then called for: once for all of
    /// them, where `send_by` would do so for each, and KVM takes the whole table each time.
    pub fn route(&self, messages: &[(u32, Message)]) -> Result<()> {
        // A frame of ours is unknown to KVM.
        if self.message_frame.is_some() {
            return Ok(());
        }
        let give = |routing: &KvmIrqRouting| self.fd.set_gsi_routing(routing);
        let give = |routing: &_| give(routing).context("route an interrupt message");
        self.routes.set(messages, |messages| give(&table(messages)?))
    }

    /// From here on a write to `event` sends `message`; what was written before is sent now.
    pub fn send_by(&self, event: &Arc<EventFd>, gsi: u32, message: Message) -> Result<()> {
        let line = match self.message_frame {
            // The message's line instead of the message.
            Some(_) => {
                let line = self.line_of(message)?;
                self.routes.set(&[(gsi, message)], |_| Ok(()))?;
                line
            }
            None => {
                self.route(&[(gsi, message)])?;
                gsi
            }
        };
        self.connect(event, line).context("connect an interrupt message")
    }

    fn line_of(&self, message: Message) -> Result<u32> {
        let Message { address, data, .. } = message;
        let line = self.message_frame.and_then(|frame| frame.line(address, data));
        line.ok_or_else(|| {
            Error::guest(format!(
                "the guest asked for an interrupt message of {data} to {address:#x}, where none is taken"
            ))
        })
    }

    /// From here on writes to `event` stay there.
    pub fn hold_back(&self, event: &Arc<EventFd>, gsi: u32) -> Result<()> {
        let sent = self.routes.messages.lock().unwrap_or_else(PoisonError::into_inner).get(&gsi).copied();
        let line = match (self.message_frame, sent.flatten()) {
            (Some(_), Some(message)) => self.line_of(message)?,
            _ => gsi,
        };
        self.disconnect(event, line).context("disconnect an interrupt message")
    }
}

fn table(messages: &BTreeMap<u32, Option<Message>>) -> Result<KvmIrqRouting> {
    let mut entries = arch::default_routes();
    for (gsi, message) in messages.iter().filter_map(|(gsi, message)| Some((gsi, message.as_ref()?))) {
        let mut entry = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        let mut msi = kvm_irq_routing_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        if arch::MESSAGES_NAME_THEIR_DEVICE {
            entry.flags = KVM_MSI_VALID_DEVID;
            msi.__bindgen_anon_1.devid = message.device;
        }
        entry.u.msi = msi;
        entries.push(entry);
    }
    KvmIrqRouting::from_entries(&entries).map_err(|_| Error::host("too many interrupt routes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_refused_stands_in_no_later_table() {
        let routes = Routes::default();
        let message = |address| Message { address, data: 1, device: 8 };
        let told = |gsi, address, is_taken| {
            let mut told = Vec::new();
            let result = routes.set(&[(gsi, message(address))], |messages| {
                let messages = messages.iter().map(|(gsi, message)| (*gsi, message.map(|one| one.address)));
                told = messages.collect();
                if is_taken { Ok(()) } else { Err(Error::host("no")) }
            });
            assert_eq!(result.is_ok(), is_taken);
            told
        };
        assert_eq!(told(24, 1, true), [(24, Some(1))]);
        assert_eq!(told(25, 2, false), [(24, Some(1)), (25, Some(2))]);
        // Neither a new one nor one in the place of another.
        assert_eq!(told(24, 3, false), [(24, Some(3))]);
        assert_eq!(told(26, 4, true), [(24, Some(1)), (26, Some(4))]);
        // KVM is not told what it knows.
        assert_eq!(told(26, 4, true), []);
        assert_eq!(told(26, 5, true), [(24, Some(1)), (26, Some(5))]);
    }
}
