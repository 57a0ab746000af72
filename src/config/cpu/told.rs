//! Makes the body of `PUT /cpu-config` by which another CPU becomes like a given one (`alula cpu dump`).

use super::{ArmRegisterChange, Bits, CpuConfig, CpuidLeaf, MsrChange, Number, Register, RegisterChange};
use crate::arch;
use crate::platform::{CpuChanges, CpuidModifier, CpuidRegister, RegisterModifier};

/// The leaves of CPUID that have subleaves, by which KVM finds their entries (KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 1).
const WITH_SUBLEAVES: [u32; 17] = [
    0x4,
    0x7,
    0xb,
    0xd,
    0xf,
    0x10,
    0x12,
    0x14,
    0x17,
    0x18,
    0x1d,
    0x1e,
    0x1f,
    0x23,
    0x24,
    0x8000_001d,
    0x8000_0026,
];

impl From<&CpuChanges> for CpuConfig {
    /// The changes of registers, as a body that asks for them.
    fn from(changes: &CpuChanges) -> Self {
        let mut leaves: Vec<CpuidLeaf> = Vec::new();
        for CpuidModifier { leaf, subleaf, register, mask, value } in &changes.cpuid {
            let (leaf, subleaf) = (Number((*leaf).into()), Number((*subleaf).into()));
            if leaves.last().is_none_or(|last| (last.leaf, last.subleaf) != (leaf, subleaf)) {
                let flags = WITH_SUBLEAVES.contains(&(leaf.0 as u32)).into();
                leaves.push(CpuidLeaf { leaf, subleaf, flags, modifiers: Vec::new() });
            }
            let register = match register {
                CpuidRegister::Eax => Register::Eax,
                CpuidRegister::Ebx => Register::Ebx,
                CpuidRegister::Ecx => Register::Ecx,
                CpuidRegister::Edx => Register::Edx,
            };
            let bitmap = Bits { mask: (*mask).into(), value: (*value).into() };
            let change = RegisterChange { register, bitmap };
            leaves.iter_mut().last().into_iter().for_each(|leaf| leaf.modifiers.push(change.clone()));
        }
        let registers = || changes.registers.iter();
        let msr = |register: &RegisterModifier| MsrChange {
            addr: Number(register.number),
            bitmap: Bits { mask: register.mask, value: register.value },
        };
        let of_aarch64 = |register: &RegisterModifier| ArmRegisterChange {
            addr: Number(register.number),
            bitmap: Bits { mask: register.mask, value: register.value },
        };
        Self {
            cpuid_modifiers: arch::HAS_CPUID.then_some(leaves),
            msr_modifiers: arch::HAS_CPUID.then(|| registers().map(msr).collect()),
            reg_modifiers: (!arch::HAS_CPUID).then(|| registers().map(of_aarch64).collect()),
            ..Self::default()
        }
    }
}
