//! ACPI's words for CPUs: their entries of the MADT (ACPI 6.5, 5.2.12), and, where some come and go, a processor device
//! for each that there can be (8.4; 6.2.11: `_MAT`; 6.3: `_EJ0`; 5.6.6: the values of Notify).

use acpi_tables::aml::{
    BufferData, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Path, Return, Scope, Store, While,
};
use acpi_tables::{Aml, AmlSink};

use crate::platform::node::CpuRegisters;

/// Flags of a local APIC (5.2.12.2): its CPU can be used, or it cannot yet and may come while the guest runs.
pub const ENABLED: u32 = 1;
pub const ONLINE_CAPABLE: u32 = 1 << 1;

/// The device is there: it is to be looked at.
const DEVICE_CHECK: u8 = 1;
/// The device is to be let go.
const EJECT_REQUEST: u8 = 3;
/// `_STA`: present, enabled, shown, and working.
const IS_THERE: u8 = 0xf;

const REGISTER_BITS: usize = 32;

/// The path of the method that is called when the interrupt comes.
pub const SCAN: &str = "\\_SB_.CSCN";

/// The ACPI name of the CPU with this number, and that of the bit that says whether it is there.
fn names(number: u16) -> [String; 2] {
    [format!("C{number:03X}"), format!("P{number:03X}")]
}

/// Adds the MADT's entry of a CPU: a local APIC, or a local x2APIC where its id needs that (5.2.12.12).
pub fn add_entry(cpu: u32, flags: u32, to: &mut Vec<u8>) {
    match u8::try_from(cpu) {
        Ok(id) if id < 255 => to.extend([0, 8, id, id]),
        _ => {
            to.extend([9, 16, 0, 0]);
            to.extend(cpu.to_le_bytes());
        }
    }
    to.extend(flags.to_le_bytes());
    if cpu >= 255 {
        to.extend(cpu.to_le_bytes());
    }
}

/// A CPU as a device: who it is, whether it is there, what the MADT would say of it, and the way out. The first CPU
/// stays.
struct Processor(u16);

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(number) = *self;
        let [name, bit] = names(number);
        let (bit, there, nowhere) = (Path::new(&bit), Return::new(&IS_THERE), Return::new(&0_u8));
        let condition = If::new(&bit, vec![&there]);
        let status = Method::new("_STA".into(), 0, false, vec![&condition, &nowhere]);
        let mut entry = Vec::new();
        add_entry(number.into(), ENABLED, &mut entry);
        let entry = BufferData::new(entry);
        let (id, number_of_it) = (Name::new("_HID".into(), &"ACPI0007"), Name::new("_UID".into(), &number));
        let entry = Name::new("_MAT".into(), &entry);
        let register = Path::new("CNEW");
        let write = Store::new(&register, &number);
        let way_out = Method::new("_EJ0".into(), 1, true, vec![&write]);
        let mut objects: Vec<&dyn Aml> = vec![&id, &number_of_it, &status, &entry];
        if number > 0 {
            objects.push(&way_out);
        }
        Device::new(name.as_str().into(), objects).to_aml_bytes(sink);
    }
}

/// The part of `CSCN` for a CPU: the news of it that were read.
struct Step(u16);

impl Aml for Step {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(number) = *self;
        let [name, _] = names(number);
        let (cpu, local) = (Path::new(&name), Local(0));
        for (news, value) in [(0, DEVICE_CHECK), (CpuRegisters::IS_LEAVING, EJECT_REQUEST)] {
            let news = news | u32::from(number);
            If::new(&Equal::new(&local, &news), vec![&Notify::new(&cpu, &value)]).to_aml_bytes(sink);
        }
    }
}

/// The CPUs, in the scope of the system bus.
pub fn slots(registers: &CpuRegisters, sink: &mut dyn AmlSink) {
    let numbers = 0..registers.cpus;
    let size = CpuRegisters::size(registers.cpus);
    let region = OpRegion::new("CREG".into(), OpRegionSpace::SystemIO, &registers.port, &size);
    let bits = numbers.clone().map(|number| {
        let [_, bit] = names(number);
        FieldEntry::Named(*bit.as_bytes().first_chunk().expect("a name has four characters"), 1)
    });
    let fields = std::iter::once(FieldEntry::Named(*b"CNEW", REGISTER_BITS)).chain(bits);
    let fields = Field::new(
        "CREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.collect(),
    );
    let (local, register) = (Local(0), Path::new("CNEW"));
    let read = Store::new(&local, &register);
    let steps: Vec<_> = numbers.clone().map(Step).collect();
    let mut body: Vec<&dyn Aml> = steps.iter().map(|step| step as &dyn Aml).collect();
    body.push(&read);
    let is_something = NotEqual::new(&local, &CpuRegisters::NOTHING);
    let all_news = While::new(&is_something, body);
    let scan = Method::new("CSCN".into(), 0, true, vec![&read, &all_news]);
    let processors: Vec<_> = numbers.map(Processor).collect();
    let mut all: Vec<&dyn Aml> = vec![&region, &fields];
    all.extend(processors.iter().map(|processor| processor as &dyn Aml));
    all.push(&scan);
    Scope::new("\\_SB_".into(), all).to_aml_bytes(sink);
}
