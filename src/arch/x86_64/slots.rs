//! ACPI's words for devices that come to PCI bus 0 and go: a slot for each, by which Linux's `acpiphp` serves them
//! (ACPI 6.5, 6.3: `_EJ0`; 5.6.6: the values of Notify).

use acpi_tables::aml::{
    And, Arg, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path, Scope, ShiftLeft, Store,
};
use acpi_tables::{Aml, AmlSink};

use crate::platform::node::SlotRegisters;

/// A device may be there that was not, or be gone: all below the one that is notified are to be looked at.
const BUS_CHECK: u8 = 0;
/// The device is to be let go.
const EJECT_REQUEST: u8 = 3;

const REGISTER_BITS: usize = 32;

/// The path of the method that is called when the interrupt comes.
pub const SCAN: &str = "\\_SB_.PCI0.SCAN";

/// The ACPI name of the slot with this number.
fn name(number: u32) -> String {
    format!("S{number:02X}_")
}

/// A slot as a device below the root bridge: its address on the bus, its number for people, and the way out.
struct Slot(u32);

impl Aml for Slot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(number) = self;
        let eject = MethodCall::new("EJCT".into(), vec![number]);
        let address = Name::new("_ADR".into(), &(number << 16));
        let shown = Name::new("_SUN".into(), number);
        let way_out = Method::new("_EJ0".into(), 1, true, vec![&eject]);
        Device::new(name(*number).as_str().into(), vec![&address, &shown, &way_out]).to_aml_bytes(sink);
    }
}

/// The part of `SCAN` for a slot: whether its device is among those that are to be let go.
struct Step(u32);

impl Aml for Step {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(number) = self;
        let (bit, nowhere) = (1_u32 << number, acpi_tables::aml::ZERO);
        let slot = Path::new(&name(*number));
        let is_asked = And::new(&nowhere, &Local(0), &bit);
        If::new(&is_asked, vec![&Notify::new(&slot, &EJECT_REQUEST)]).to_aml_bytes(sink);
    }
}

/// The slots, in the scope of the root bridge.
pub fn slots(registers: &SlotRegisters, sink: &mut dyn AmlSink) {
    let numbers = registers.devices.clone();
    let region = OpRegion::new("SREG".into(), OpRegionSpace::SystemIO, &registers.port, &SlotRegisters::SIZE);
    let fields = [*b"CAME", *b"LEAV", *b"GONE"].map(|name| FieldEntry::Named(name, REGISTER_BITS));
    let fields = Field::new(
        "SREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.to_vec(),
    );
    let [came, leaving, gone, bridge] = ["CAME", "LEAV", "GONE", "\\_SB_.PCI0"].map(Path::new);
    let (one, first, nowhere) = (1_u8, Arg(0), acpi_tables::aml::ZERO);
    let bit = ShiftLeft::new(&nowhere, &one, &first);
    let write = Store::new(&gone, &bit);
    let eject = Method::new("EJCT".into(), 1, true, vec![&write]);
    let look = Notify::new(&bridge, &BUS_CHECK);
    let look = If::new(&came, vec![&look]);
    let (local, steps) = (Local(0), numbers.clone().map(Step).collect::<Vec<_>>());
    let read = Store::new(&local, &leaving);
    let mut body: Vec<&dyn Aml> = vec![&look, &read];
    body.extend(steps.iter().map(|step| step as &dyn Aml));
    let scan = Method::new("SCAN".into(), 0, true, body);
    let devices: Vec<_> = numbers.map(Slot).collect();
    let mut all: Vec<&dyn Aml> = vec![&region, &fields, &eject];
    all.extend(devices.iter().map(|device| device as &dyn Aml));
    all.push(&scan);
    Scope::new("\\_SB_.PCI0".into(), all).to_aml_bytes(sink);
}
