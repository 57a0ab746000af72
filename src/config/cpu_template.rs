//! Named sets of changes of the guest's CPUs (`cpu_template` of `/machine-config`): Firecracker's static CPU templates,
//! by which the processors of a fleet look alike. What each of them hides are facts of its documentation; what the bits
//! mean, of Intel SDM 2A (CPUID), AMD APM 3 (appendix E) and Arm ARM D23 (ID registers).

use serde::{Deserialize, Serialize};

use crate::arch;
use crate::error::{Error, Result};
use crate::platform::CpuidRegister::{self, Eax, Ebx, Ecx, Edx};
use crate::platform::{CpuChanges, CpuidModifier, RegisterModifier};

/// Firecracker's static CPU templates: the guest's CPUs show what those of an Amazon EC2 instance have. C3, T2, T2S and
/// T2CL are for Intel's processors, T2A for AMD's, and V1N1 for a Neoverse V1, which looks like a Neoverse N1. A
/// template changes what the processor says of itself; it does not keep a program from using what it hides.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[allow(missing_docs, reason = "names of the API")]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    None,
}

/// A change of CPUID: leaf, subleaf, register, the bits that are changed, and what they become.
type Change = (u32, u32, CpuidRegister, u32, u32);

/// Leaf 0 of CPUID: the maker of the processor.
const INTEL: &str = "GenuineIntel";
const AMD: &str = "AuthenticAMD";

/// All templates but C3: a Haswell (family, model, stepping), without debugging aids, virtual machine extensions, MPX,
/// AVX-512, RDSEED, ADX, CLFLUSHOPT, CLWB, SHA, UMIP, protection keys, and with ERMS.
const T2_COMMON: [Change; 8] = [
    (0x1, 0, Eax, 0x0fff_3fff, 0x0003_06f2),
    (0x1, 0, Ecx, 0x0004_cdfc, 0),
    (0x1, 0, Edx, 0xe864_1080, 0x0000_1080),
    (0x7, 0, Ebx, 0xffef_da14, 0x0000_0200),
    (0x7, 0, Ecx, 0x4041_5f5e, 0),
    (0x7, 0, Edx, 0x0000_011c, 0),
    XSTATE,
    XSAVE,
];
/// Without the state of MPX, AVX-512 and protection keys.
const XSTATE: Change = (0xd, 0, Eax, 0x0000_02f8, 0);
/// Without XSAVEC, XGETBV of register 1, and XSAVES.
const XSAVE: Change = (0xd, 1, Eax, 0x0000_000e, 0);
/// Without PREFETCHW, MONITORX, pages of 1 GiB, and WBNOINVD.
const T2: [Change; 3] = [
    (0x8000_0001, 0, Ecx, 0x2000_0100, 0),
    (0x8000_0001, 0, Edx, 0x0400_0000, 0),
    (0x8000_0008, 0, Ebx, 0x0000_0200, 0),
];
/// As T2, and without what AMD alone has (SSE4A, misaligned SSE, extensions of MMX and FXSAVE).
const T2CL: [Change; 3] = [
    (0x8000_0001, 0, Ecx, 0x2000_01c0, 0),
    (0x8000_0001, 0, Edx, 0x07c0_0000, 0),
    (0x8000_0008, 0, Ebx, 0x0000_0200, 0),
];
/// As T2CL but for MMX and FXSAVE, and without SVM; IBRS is preferred and protects in the same mode, EFER.LMSLE cannot
/// be set, and FXSAVE keeps error pointers.
const T2A: [Change; 3] = [
    (0x8000_0001, 0, Ecx, 0x2000_01c4, 0),
    (0x8000_0001, 0, Edx, 0x0640_0000, 0),
    (0x8000_0008, 0, Ebx, 0x001c_0205, 0x001c_0004),
];
/// An Ivy Bridge: as T2, and without FMA, MOVBE, BMI, AVX2, INVPCID and LZCNT.
const C3: [Change; 10] = [
    (0x1, 0, Eax, 0x0fff_3fff, 0x0003_06e4),
    (0x1, 0, Ecx, 0x0040_dd3c, 0),
    (0x1, 0, Edx, 0xa864_1080, 0x0000_1080),
    (0x7, 0, Ebx, 0xffaf_dd3c, 0),
    (0x7, 0, Ecx, 0x4041_481e, 0),
    (0x7, 0, Edx, 0x0000_000c, 0),
    XSTATE,
    XSAVE,
    (0x8000_0001, 0, Ecx, 0x0000_0120, 0),
    (0x8000_0001, 0, Edx, 0x0400_0000, 0),
];

/// A change of a register: its number, the bits that are changed, and what they become.
type Register = (u64, u64, u64);

/// IA32_ARCH_CAPABILITIES: which attacks the processor withstands. T2S says what both Skylake and Cascade Lake can say.
const T2S_REGISTERS: [Register; 1] = [(0x10a, u64::MAX, 0x0408_0c4c)];
/// T2CL hides controls alone, and what is reserved: a guest may use what protects it.
const T2CL_REGISTERS: [Register; 1] = [(0x10a, 0xffff_ffff_f2f5_1e00, 0)];
/// ID_AA64PFR0_EL1 (SVE, DIT), ID_AA64ISAR0_EL1 (SHA-3, SHA-512, SM3, SM4, FHM, flag manipulation, RNDR),
/// ID_AA64ISAR1_EL1 (DC CVADP, JSCVT, FCMA, LRCPC2, BF16, DGH, I8MM), ID_AA64MMFR2_EL1 (unaligned atomics).
const V1N1_REGISTERS: [Register; 4] = [
    (0x6030_0000_0013_c020, 0x000f_000f_0000_0000, 0),
    (0x6030_0000_0013_c030, 0xf0ff_0fff_0000_f000, 0x1000),
    (0x6030_0000_0013_c031, 0x00ff_f000_00ff_f00f, 0x0010_0001),
    (0x6030_0000_0013_c03a, 0x0000_000f_0000_0000, 0),
];

/// The content of a template: the maker of its processors (x86_64), its changes of CPUID, and those of registers.
type Content = (Option<&'static str>, [&'static [Change]; 2], &'static [Register]);

impl CpuTemplate {
    /// Whether this architecture has it.
    pub fn check(self) -> Result<()> {
        let is_known = match self {
            Self::None => true,
            Self::V1N1 => !arch::HAS_CPUID,
            _ => arch::HAS_CPUID,
        };
        match is_known {
            true => Ok(()),
            false => Err(Error::config(format!(
                "`cpu_template`: {} has no {self:?}: leave it out, or name one of its own ({})",
                arch::NAME,
                if arch::HAS_CPUID { "C3, T2, T2S, T2CL, T2A" } else { "V1N1" }
            ))),
        }
    }

    /// The changes of the template, in order.
    pub fn changes(self) -> CpuChanges {
        let (vendor, cpuid, registers): Content = match self {
            Self::C3 => (Some(INTEL), [&C3, &[]], &[]),
            Self::T2 => (Some(INTEL), [&T2_COMMON, &T2], &[]),
            Self::T2S => (Some(INTEL), [&T2_COMMON, &T2], &T2S_REGISTERS),
            Self::T2CL => (Some(INTEL), [&T2_COMMON, &T2CL], &T2CL_REGISTERS),
            Self::T2A => (Some(AMD), [&T2_COMMON, &T2A], &[]),
            Self::V1N1 => (None, [&[], &[]], &V1N1_REGISTERS),
            Self::None => (None, [&[], &[]], &[]),
        };
        let of_leaf = |(leaf, subleaf, register, mask, value): &Change| CpuidModifier {
            leaf: *leaf,
            subleaf: *subleaf,
            register: *register,
            mask: *mask,
            value: *value,
        };
        let of_register = |(number, mask, value): &Register| RegisterModifier {
            number: *number,
            mask: (*mask).into(),
            value: (*value).into(),
        };
        CpuChanges {
            vendor,
            cpuid: cpuid.into_iter().flatten().map(of_leaf).collect(),
            registers: registers.iter().map(of_register).collect(),
            ..CpuChanges::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_sets_no_bit_that_it_does_not_change() {
        use CpuTemplate::{C3, None, T2, T2A, T2CL, T2S, V1N1};
        let mut seen = Vec::new();
        for template in [C3, T2, T2S, T2CL, T2A, V1N1] {
            assert_eq!(template.check().is_ok(), arch::HAS_CPUID == (template != V1N1), "{template:?}");
            let changes = template.changes();
            for CpuidModifier { leaf, subleaf, register, mask, value } in &changes.cpuid {
                assert_eq!(value & !mask, 0, "{template:?} {leaf:#x}");
                let place = (leaf, subleaf, register);
                let same = |it: &&CpuidModifier| (&it.leaf, &it.subleaf, &it.register) == place;
                assert_eq!(changes.cpuid.iter().filter(same).count(), 1, "{template:?} {leaf:#x} twice");
            }
            assert!(changes.registers.iter().all(|change| change.value & !change.mask == 0), "{template:?}");
            assert!(!seen.contains(&changes), "{template:?} is another one");
            seen.push(changes);
        }
        assert_eq!(None.changes(), CpuChanges::default());
        assert!(None.check().is_ok());
    }
}
