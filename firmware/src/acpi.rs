//! Reads the ACPI tables (ACPI 6.5, 5.2): checksums, and the CPUs that the MADT lists.

use crate::machine::Machine;

fn bytes(address: u64, length: usize) -> &'static [u8] {
    // SAFETY: the tables lie in the first MiB, which is mapped and not written to.
    unsafe { core::slice::from_raw_parts(address as *const u8, length) }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes([bytes[offset], bytes[offset + 1], bytes[offset + 2], bytes[offset + 3]])
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

fn is_sound(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)) == 0
}

/// The table at `address`, if its signature and checksum are right.
fn table(address: u64, signature: &[u8; 4]) -> Option<&'static [u8]> {
    let table = bytes(address, u32_at(bytes(address, 8), 4) as usize);
    (table.starts_with(signature) && table.len() >= 36 && is_sound(table)).then_some(table)
}

/// Reads what `rsdp` leads to into `machine`.
pub fn read(machine: &mut Machine, rsdp: u64) {
    if let Err(fault) = try_read(machine, rsdp) {
        machine.fault = Some(fault);
    }
}

fn try_read(machine: &mut Machine, rsdp: u64) -> Result<(), &'static str> {
    let root = bytes(rsdp, 36);
    if !root.starts_with(b"RSD PTR ") || !is_sound(root) {
        return Err("no RSDP");
    }
    let xsdt = table(u64_at(root, 24), b"XSDT").ok_or("no XSDT")?;
    let (mut fadt, mut madt) = (None, None);
    for entry in xsdt[36..].chunks_exact(8) {
        let address = u64_at(entry, 0);
        fadt = fadt.or(table(address, b"FACP"));
        madt = madt.or(table(address, b"APIC"));
    }
    let fadt = fadt.ok_or("no FADT")?;
    table(u64_at(fadt, 140), b"DSDT").ok_or("no DSDT")?;
    let mut entries = &madt.ok_or("no MADT")?[44..];
    while let [kind, length, ..] = entries {
        if *length < 2 || usize::from(*length) > entries.len() {
            return Err("a broken MADT entry");
        }
        // Local APIC, local x2APIC: enabled.
        match kind {
            0 if u32_at(entries, 4) & 1 != 0 => machine.add_cpu(entries[3].into()),
            9 if u32_at(entries, 8) & 1 != 0 => machine.add_cpu(u32_at(entries, 4)),
            _ => {}
        }
        entries = &entries[usize::from(*length)..];
    }
    Ok(())
}
