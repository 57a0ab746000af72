//! The features of a CPU, which its ID registers tell: each field of four bits is a feature, and the larger its number, the
//! more of the feature there is (Arm ARM, D24.1.3, principles of the ID scheme for fields in ID registers).

use kvm_bindings::{KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64};

use crate::platform::{CpuChanges, RegisterModifier};

/// KVM's number of the 64-bit system register with op0 3 and all else 0: that of an ID register has CRm and op2 in its
/// lowest bits beside.
const ID: u64 = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | 3 << 14;
/// The rows (CRm) of ID registers. Row 0 says which processor it is.
const ROWS: std::ops::RangeInclusive<u64> = 1..=7;

/// A register whose fields are compared, by CRm and op2, with the bits of fields that are no features: levels of exceptions
/// that a guest does not see, and sizes that each host has its own of.
struct Register {
    crm: u64,
    op2: u64,
    name: &'static str,
    ignored: u64,
}

const REGISTERS: [Register; 9] = [
    register(4, 0, "ID_AA64PFR0_EL1", 0xffff | 0xf << 24),
    register(4, 1, "ID_AA64PFR1_EL1", 0),
    register(4, 4, "ID_AA64ZFR0_EL1", 0),
    register(6, 0, "ID_AA64ISAR0_EL1", 0),
    register(6, 1, "ID_AA64ISAR1_EL1", 0),
    register(6, 2, "ID_AA64ISAR2_EL1", 0),
    register(7, 0, "ID_AA64MMFR0_EL1", 0),
    register(7, 1, "ID_AA64MMFR1_EL1", 0),
    register(7, 2, "ID_AA64MMFR2_EL1", 0),
];

const fn register(crm: u64, op2: u64, name: &'static str, ignored: u64) -> Register {
    Register { crm, op2, name, ignored }
}

/// The fields that have a name which people know, as the manual has it: in a line for each register, the lowest bit, space,
/// name, and a comma between two of them.
const NAMES: &str = "\
ID_AA64PFR0_EL1: 16 FP, 20 AdvSIMD, 28 RAS, 32 SVE, 40 MPAM, 44 AMU, 48 DIT, 56 CSV2, 60 CSV3
ID_AA64PFR1_EL1: 0 BT, 4 SSBS, 8 MTE, 24 SME
ID_AA64ZFR0_EL1: 0 SVEver, 4 AES, 16 BitPerm, 20 BF16, 32 SHA3, 40 SM4, 44 I8MM, 52 F32MM, 56 F64MM
ID_AA64ISAR0_EL1: 4 AES, 8 SHA1, 12 SHA2, 16 CRC32, 20 Atomic, 28 RDM, 32 SHA3, 36 SM3, 40 SM4, 44 DP, 48 FHM, 52 TS, \
    56 TLB, 60 RNDR
ID_AA64ISAR1_EL1: 0 DPB, 4 APA, 8 API, 12 JSCVT, 16 FCMA, 20 LRCPC, 24 GPA, 28 GPI, 32 FRINTTS, 36 SB, 40 SPECRES, \
    44 BF16, 48 DGH, 52 I8MM, 56 XS, 60 LS64
ID_AA64ISAR2_EL1: 0 WFxT, 4 RPRES, 8 GPA3, 12 APA3, 16 MOPS, 20 BC, 28 CLRBHB
ID_AA64MMFR0_EL1: 0 PARange, 4 ASIDBits, 20 TGran16, 24 TGran64, 28 TGran4, 44 ExS, 56 FGT, 60 ECV
ID_AA64MMFR1_EL1: 0 HAFDBS, 4 VMIDBits, 8 VH, 12 HPDS, 16 LO, 20 PAN, 28 XNX, 36 ETS, 44 AFP
ID_AA64MMFR2_EL1: 0 CnP, 4 UAO, 8 LSM, 12 IESB, 16 VARange, 28 ST, 32 AT, 36 IDS, 40 FWB, 48 TTL, 52 BBM, 56 EVT, 60 E0PD
";

/// Returns the changes that make another CPU like one whose registers are `registers`: the values of its ID registers.
pub fn told(registers: &[(u64, Vec<u8>)]) -> CpuChanges {
    let is_id = |number: u64| number & !0x7f == ID && ROWS.contains(&(number >> 3 & 0xf));
    let told = registers.iter().filter(|(number, _)| is_id(*number)).filter_map(|(number, value)| {
        let value = u64::from_le_bytes(value.as_slice().try_into().ok()?);
        Some(RegisterModifier { number: *number, mask: u64::MAX.into(), value: value.into() })
    });
    CpuChanges { registers: told.collect(), ..CpuChanges::default() }
}

/// The names of the features that a CPU of `needed` has more of than one of `there`.
pub fn lacking(needed: &CpuChanges, there: &CpuChanges) -> Vec<String> {
    let mut names = Vec::new();
    for register in &REGISTERS {
        let of = |changes: &CpuChanges| {
            let number = ID | register.crm << 3 | register.op2;
            let found = changes.registers.iter().find(|change| change.number == number);
            found.map(|change| change.value as u64)
        };
        let Some(needed) = of(needed) else { continue };
        let there = of(there).unwrap_or(0);
        for bit in (0..u64::BITS).step_by(4).filter(|bit| register.ignored >> bit & 1 == 0) {
            let (wanted, found) = (level(needed, bit), level(there, bit));
            if wanted > found {
                let name = register.field(bit);
                names.push(format!(
                    "{name} (needed: {:#x}, there: {:#x})",
                    needed >> bit & 0xf,
                    there >> bit & 0xf
                ));
            }
        }
    }
    names
}

/// How much a field has of its feature. All bits set is less than none, in those fields in which that is a number at all: FP,
/// AdvSIMD and the sizes of pages.
fn level(register: u64, bit: u32) -> i8 {
    match register >> bit & 0xf {
        0xf => -1,
        level => level as i8,
    }
}

impl Register {
    fn field(&self, bit: u32) -> String {
        let names = NAMES.lines().find_map(|line| line.strip_prefix(self.name)?.strip_prefix(": "));
        let mut names = names.into_iter().flat_map(|names| names.split(", "));
        let name = names.find_map(|named| {
            let (number, name) = named.trim().split_once(' ')?;
            (number.parse() == Ok(bit)).then_some(name)
        });
        match name {
            Some(name) => format!("{name} of {}", self.name),
            None => format!("the field at bit {bit} of {}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_compared_with_what_another_one_was_told() {
        let told = |isar0: u64, pfr0: u64| {
            let value = |number: u64, value: u64| (ID | number, value.to_le_bytes().to_vec());
            // MIDR_EL1, and one of another size, are no features.
            super::told(&[value(6 << 3, isar0), value(4 << 3, pfr0), value(0, 9), (ID | 5 << 3, vec![1; 4])])
        };
        let (more, less) = (told(0x0021_0020, 0x11), told(0x0011_0010, 0x00ff_0022));
        assert_eq!(more.registers.len(), 2);
        let expected = [
            "FP of ID_AA64PFR0_EL1 (needed: 0x0, there: 0xf)",
            "AdvSIMD of ID_AA64PFR0_EL1 (needed: 0x0, there: 0xf)",
            "AES of ID_AA64ISAR0_EL1 (needed: 0x2, there: 0x1)",
            "Atomic of ID_AA64ISAR0_EL1 (needed: 0x2, there: 0x1)",
        ];
        assert_eq!(lacking(&more, &less), expected);
        assert!(lacking(&less, &more).is_empty() && lacking(&CpuChanges::default(), &less).is_empty());
        let error = lacking(&told(1 << 24, 0), &told(0, 0));
        assert_eq!(error, ["the field at bit 24 of ID_AA64ISAR0_EL1 (needed: 0x1, there: 0x0)"]);
    }
}
