//! MSI-X (PCI Local Bus 3.0, 6.8.2): the table of messages, masking, pending bits. A function with MSI has one vector of
//! the same kind.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::log;
use crate::poll::EventFd;
use crate::snapshot::Snapshot;
use crate::sys;
use crate::vm::Vm;
use crate::vm::irq::Message;

/// Bytes of a table entry: address, data, control.
pub const ENTRY: u64 = 16;
/// Control: the vector is masked.
const MASKED: u32 = 1;

struct Vector {
    event: Arc<EventFd>,
    gsi: u32,
    /// Address low and high, data, control.
    registers: [u32; 4],
    /// KVM sends the message when the event is written.
    connected: bool,
}

/// A function's vectors.
pub struct Msix {
    vm: Arc<Vm>,
    /// Bus, device, function.
    device: u32,
    vectors: Vec<Vector>,
    /// Message control: MSI-X is on; all vectors are masked.
    enabled: bool,
    masked: bool,
}

impl Msix {
    /// Vectors for `events`, all masked.
    pub fn new(vm: Arc<Vm>, device: u32, events: Vec<Arc<EventFd>>) -> Result<Self> {
        let vectors = events
            .into_iter()
            .map(|event| {
                let gsi = vm.allocate_message()?;
                Ok(Vector { event, gsi, registers: [0, 0, 0, MASKED], connected: false })
            })
            .collect::<Result<_>>()?;
        Ok(Self { vm, device, vectors, enabled: false, masked: false })
    }

    /// How many vectors.
    pub fn count(&self) -> usize {
        self.vectors.len()
    }

    /// The guest changed message control.
    pub fn set_control(&mut self, enabled: bool, masked: bool) {
        (self.enabled, self.masked) = (enabled, masked);
        self.connect();
    }

    /// The function is this one from here on, by bus, device and function: its messages come from there.
    pub fn set_requester(&mut self, device: u32) {
        if device != self.device {
            (0..self.vectors.len()).for_each(|index| self.disconnect(index));
            self.device = device;
            self.connect();
        }
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; ENTRY as usize];
        if let Some(vector) = self.vectors.get((offset / ENTRY) as usize) {
            for (place, register) in bytes.chunks_exact_mut(4).zip(vector.registers) {
                place.copy_from_slice(&register.to_le_bytes());
            }
        }
        copy(&bytes, (offset % ENTRY) as usize, data);
    }

    /// The guest writes the table: 32 or 64 bits, aligned.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let (index, first) = ((offset / ENTRY) as usize, (offset % ENTRY / 4) as usize);
        let Some(vector) = self.vectors.get_mut(index) else { return };
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        for (register, bytes) in vector.registers[first..].iter_mut().zip(data.chunks_exact(4)) {
            *register = u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
        }
        // A message that is sent must be the one in the table: connect anew.
        self.disconnect(index);
        self.update(index);
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let mut bits = vec![0; self.vectors.len().div_ceil(64) * 8];
        for (index, vector) in self.vectors.iter().enumerate() {
            if !vector.connected && is_readable(&vector.event) {
                bits[index / 8] |= 1 << (index % 8);
            }
        }
        copy(&bits, offset as usize, data);
    }

    fn disconnect(&mut self, index: usize) {
        let vector = &mut self.vectors[index];
        if vector.connected {
            match self.vm.hold_back(&vector.event, vector.gsi) {
                Ok(()) => vector.connected = false,
                Err(error) => log::guest_line(error),
            }
        }
    }

    /// What a vector sends as its masks say, and by which number; none: nothing.
    fn message(&self, vector: &Vector) -> Option<(u32, Message)> {
        let [low, high, data, control] = vector.registers;
        let message = Message { address: u64::from(high) << 32 | u64::from(low), data, device: self.device };
        let is_wanted = self.enabled && !self.masked && control & MASKED == 0;
        is_wanted.then_some((vector.gsi, message))
    }

    /// What the vectors send, with the numbers by which they do.
    pub fn messages(&self) -> impl Iterator<Item = (u32, Message)> {
        self.vectors.iter().filter_map(|vector| self.message(vector))
    }

    /// Connects or disconnects all vectors as their masks say.
    pub fn connect(&mut self) {
        (0..self.vectors.len()).for_each(|index| self.update(index));
    }

    /// Connects or disconnects a vector as its masks say.
    fn update(&mut self, index: usize) {
        let vector = &self.vectors[index];
        let message = self.message(vector);
        if message.is_some() == vector.connected {
            return;
        }
        let Some((gsi, message)) = message else { return self.disconnect(index) };
        match self.vm.send_by(&vector.event, gsi, message) {
            Ok(()) => self.vectors[index].connected = true,
            Err(error) => log::guest_line(error),
        }
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        for index in 0..self.vectors.len() {
            self.disconnect(index);
            self.vm.free_message(self.vectors[index].gsi);
        }
    }
}

/// The table as the guest wrote it, and which messages wait for their mask to go.
#[derive(Debug, Deserialize, Serialize)]
pub struct State {
    enabled: bool,
    masked: bool,
    vectors: Vec<([u32; 4], bool)>,
}

impl Snapshot for Msix {
    type State = State;

    fn save(&self) -> Result<State> {
        let Self { vm: _, device: _, vectors, enabled, masked } = self;
        let pending = |vector: &Vector| !vector.connected && is_readable(&vector.event);
        let vectors = vectors.iter().map(|vector| (vector.registers, pending(vector))).collect();
        Ok(State { enabled: *enabled, masked: *masked, vectors })
    }

    /// What the vectors send is connected by [`Msix::connect`]: by then KVM can have been told of the messages of
    /// all functions at once.
    fn restore(&mut self, state: State) -> Result<()> {
        if state.vectors.len() != self.vectors.len() {
            return Err(Error::config("the saved state is of a function with other MSI-X vectors"));
        }
        for (vector, (registers, pending)) in self.vectors.iter_mut().zip(state.vectors) {
            vector.registers = registers;
            if pending {
                // Fails when it is pending already.
                let _ = vector.event.write(1);
            }
        }
        (self.enabled, self.masked) = (state.enabled, state.masked);
        Ok(())
    }
}

fn copy(bytes: &[u8], offset: usize, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(offset + index).copied().unwrap_or(0);
    }
}

/// Whether something was written, without taking it.
fn is_readable(event: &EventFd) -> bool {
    sys::descriptor::poll(event, libc::POLLIN, 0) != 0
}
