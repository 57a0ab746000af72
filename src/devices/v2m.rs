//! A GICv2m frame (Arm Server Base System Architecture 3.0, appendix E) for hosts with a GICv2, whose KVM
//! takes no interrupt messages. Devices of ours do not write here: their events are connected to the
//! lines (vm/irq.rs). This is what a guest finds, and may write to itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::log;
use crate::part::Component;
use crate::platform::node::{TreeNode, phandle};
use crate::platform::{MessageFrame, Node, Place};
use crate::poll::EventFd;
use crate::snapshot::stateless;
use crate::vm::Vm;

/// Which interrupts the frame has: the first, and how many.
const MSI_TYPER: u64 = 0x008;
const MSI_IIDR: u64 = 0xfcc;
/// Product "A" of no registered implementer; revision 0.
const IDENTIFICATION: u32 = (b'A' as u32) << 20;

/// The frame's registers.
pub struct V2m {
    vm: Arc<Vm>,
    frame: MessageFrame,
    /// The lines that the guest has raised by hand: at most the frame's count.
    lines: BTreeMap<u32, Arc<EventFd>>,
}

impl V2m {
    /// The registers of `frame`.
    pub fn new(vm: Arc<Vm>, frame: MessageFrame) -> Self {
        Self { vm, frame, lines: BTreeMap::new() }
    }

    fn raise(&mut self, line: u32) -> Result<()> {
        if !self.lines.contains_key(&line) {
            self.lines.insert(line, self.vm.interrupt(line)?);
        }
        // A counter that is full has raised it already.
        let _ = self.lines[&line].write(1);
        Ok(())
    }
}

impl FixedDevice for V2m {
    const NAME: &'static str = "v2m";

    fn build(_: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(site.message_frame.map(|frame| Self::new(site.vm.clone(), frame)))
    }
}

// A line is connected whenever the guest raises it, and what it raised is the interrupt controller's state.
stateless!(V2m);

impl Component for V2m {
    /// The frame itself says which interrupts it has (MSI_TYPER).
    fn nodes(&self, place: Place) -> Vec<Node> {
        let tree = TreeNode::at("v2m", place)
            .texts("compatible", &["arm,gic-v2m-frame"])
            .flag("msi-controller")
            .registers(place)
            .cells("phandle", &[phandle::MESSAGES]);
        vec![Node::MessageTree(tree)]
    }
}

impl BusDevice for V2m {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            MSI_TYPER => (self.frame.first + MessageFrame::SHARED) << 16 | self.frame.count,
            MSI_IIDR => IDENTIFICATION,
            _ => 0,
        };
        data.fill(0);
        let count = data.len().min(4);
        data[..count].copy_from_slice(&value.to_le_bytes()[..count]);
    }

    /// SETSPI_NS takes 16 and 32 bits.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let value = match *data {
            [a, b] => u32::from_le_bytes([a, b, 0, 0]),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return,
        };
        if let Some(line) = self.frame.line(self.frame.registers.start + offset, value)
            && let Err(error) = self.raise(line)
        {
            log::guest_line(error);
        }
    }
}
