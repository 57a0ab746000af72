//! Features of the processor that a saved guest was told of, and that a host does not have (Intel SDM 2A, CPUID; AMD
//! APM 3, appendix E; KVM's cpuid.rst). KVM takes a CPUID that says more than the processor can do, and the guest would
//! find out by an exception, some time later.

use kvm_bindings::kvm_cpuid_entry2;

use super::msrs::Msr;
use crate::platform::{CpuChanges, CpuidModifier, CpuidRegister, RegisterModifier};

/// A register of CPUID whose bits each are a feature.
struct Word {
    leaf: u32,
    subleaf: u32,
    register: Register,
    /// Bits that say how the CPU stands at this moment, or that KVM does by itself.
    ignored: u32,
}

/// The name is that of the field of an entry, too.
#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// APIC (the local APIC is on) and OSXSAVE, OSPKE (what the guest has switched on), MONITOR (by an MSR).
const APIC: u32 = 1 << 9;
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;
const MONITOR: u32 = 1 << 3;

/// The model-specific registers each bit of which is a feature: IA32_ARCH_CAPABILITIES (Intel SDM 4, table 2-2).
const FEATURE_MSRS: [u32; 1] = [0x10a];

/// The leaves that say how a machine's CPUs lie, which each machine has its own of.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

const WORDS: [Word; 13] = [
    word(1, 0, Register::Ecx, OSXSAVE | MONITOR),
    word(1, 0, Register::Edx, APIC),
    word(0xd, 1, Register::Eax, 0),
    word(7, 0, Register::Ebx, 0),
    word(7, 0, Register::Ecx, OSPKE),
    word(7, 0, Register::Edx, 0),
    word(7, 1, Register::Eax, 0),
    word(0x8000_0001, 0, Register::Ecx, 0),
    word(0x8000_0001, 0, Register::Edx, APIC),
    word(0x8000_0007, 0, Register::Edx, 0),
    word(0x8000_0008, 0, Register::Ebx, 0),
    word(0x8000_0021, 0, Register::Eax, 0),
    word(0x4000_0001, 0, Register::Eax, 0),
];

const fn word(leaf: u32, subleaf: u32, register: Register, ignored: u32) -> Word {
    Word { leaf, subleaf, register, ignored }
}

/// The bits that have a name which people know, as /proc/cpuinfo has it: in a line for each word, number, space, name,
/// and a comma between two of them. In one text, as each reference in a table is one more for the loader to write.
const NAMES: &str = "\
1.0 ecx: 0 sse3, 1 pclmulqdq, 9 ssse3, 12 fma, 13 cx16, 17 pcid, 19 sse4_1, 20 sse4_2, 21 x2apic, \
    22 movbe, 23 popcnt, 24 tsc_deadline_timer, 25 aes, 26 xsave, 28 avx, 29 f16c, 30 rdrand
1.0 edx: 4 tsc, 19 clflush, 23 mmx, 24 fxsr, 25 sse, 26 sse2
d.1 eax: 0 xsaveopt, 1 xsavec, 3 xsaves, 4 xfd
7.0 ebx: 0 fsgsbase, 1 tsc_adjust, 3 bmi1, 5 avx2, 7 smep, 8 bmi2, 9 erms, 10 invpcid, 16 avx512f, \
    17 avx512dq, 18 rdseed, 19 adx, 20 smap, 21 avx512ifma, 22 pcommit, 23 clflushopt, 24 clwb, \
    28 avx512cd, 29 sha_ni, 30 avx512bw, 31 avx512vl
7.0 ecx: 1 avx512vbmi, 2 umip, 3 pku, 6 avx512_vbmi2, 7 user_shstk, 8 gfni, 9 vaes, 10 vpclmulqdq, \
    11 avx512_vnni, 12 avx512_bitalg, 14 avx512_vpopcntdq, 16 la57, 22 rdpid
7.0 edx: 4 fsrm, 10 md_clear, 14 serialize, 20 ibt, 22 amx_bf16, 23 avx512_fp16, 24 amx_tile, \
    25 amx_int8, 26 ibrs, 27 stibp, 28 flush_l1d, 29 arch_capabilities, 31 ssbd
7.1 eax: 4 avx_vnni, 5 avx512_bf16, 23 avx_ifma, 26 lam
80000001.0 ecx: 0 lahf_lm, 5 abm, 6 sse4a, 8 3dnowprefetch, 16 fma4
80000001.0 edx: 11 syscall, 20 nx, 26 pdpe1gb, 27 rdtscp, 29 lm
80000007.0 edx: 8 constant_tsc
80000008.0 ebx: 0 clzero, 9 wbnoinvd, 12 ibpb, 14 ibrs, 15 stibp, 24 ssbd
40000001.0 eax: 0 kvm-clock (old), 3 kvm-clock, 4 kvm-async-pf, 5 kvm-steal-time, 6 kvm-pv-eoi, \
    7 kvm-pv-unhalt, 9 kvm-pv-tlb-flush, 11 kvm-pv-ipi, 14 kvm-async-pf-int
";

impl Word {
    fn of(&self, cpuid: &[kvm_cpuid_entry2]) -> u32 {
        let mut entries = cpuid.iter();
        let entry = entries.find(|entry| (entry.function, entry.index) == (self.leaf, self.subleaf));
        entry.map_or(0, |entry| match self.register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        })
    }

    fn name(&self, bit: u32) -> String {
        let register = match self.register {
            Register::Eax => "eax",
            Register::Ebx => "ebx",
            Register::Ecx => "ecx",
            Register::Edx => "edx",
        };
        let line = format!("{:x}.{} {register}: ", self.leaf, self.subleaf);
        let names = NAMES.lines().find_map(|names| names.strip_prefix(&line)).unwrap_or_default();
        let mut names = names.split(", ").filter_map(|named| named.split_once(' '));
        match names.find(|(number, _)| number.parse() == Ok(bit)) {
            Some((_, name)) => name.to_owned(),
            None => format!("bit {bit} of {register} in CPUID {:#x}.{}", self.leaf, self.subleaf),
        }
    }
}

/// Returns the changes that make another CPU like one that has this CPUID and these model-specific registers.
pub fn told(cpuid: &[kvm_cpuid_entry2], msrs: &[Msr]) -> CpuChanges {
    let registers = |entry: &kvm_cpuid_entry2| {
        let (leaf, subleaf) = (entry.function, entry.index);
        let words = [
            (CpuidRegister::Eax, entry.eax),
            (CpuidRegister::Ebx, entry.ebx),
            (CpuidRegister::Ecx, entry.ecx),
            (CpuidRegister::Edx, entry.edx),
        ];
        words.map(|(register, value)| CpuidModifier { leaf, subleaf, register, mask: u32::MAX, value })
    };
    let msrs = msrs.iter().filter(|(number, _)| FEATURE_MSRS.contains(number));
    let register = |(number, value): &Msr| RegisterModifier {
        number: (*number).into(),
        mask: u64::MAX.into(),
        value: (*value).into(),
    };
    CpuChanges {
        cpuid: cpuid.iter().filter(|entry| !TOPOLOGY.contains(&entry.function)).flat_map(registers).collect(),
        registers: msrs.map(register).collect(),
        ..CpuChanges::default()
    }
}

/// The CPUID that `changes` make of one that has no feature.
fn cpuid_of(changes: &CpuChanges) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::new();
    for CpuidModifier { leaf: function, subleaf: index, register, value, .. } in &changes.cpuid {
        let (function, index) = (*function, *index);
        let is_it = |entry: &kvm_cpuid_entry2| (entry.function, entry.index) == (function, index);
        let place = entries.iter().position(is_it).unwrap_or_else(|| {
            entries.push(kvm_cpuid_entry2 { function, index, ..Default::default() });
            entries.len() - 1
        });
        let entry = &mut entries[place];
        match register {
            CpuidRegister::Eax => entry.eax = *value,
            CpuidRegister::Ebx => entry.ebx = *value,
            CpuidRegister::Ecx => entry.ecx = *value,
            CpuidRegister::Edx => entry.edx = *value,
        }
    }
    entries
}

/// The names of the features that a CPU of `needed` has, and one of `there` has not.
pub fn lacking(needed: &CpuChanges, there: &CpuChanges) -> Vec<String> {
    let mut names = lacking_of_cpuid(&cpuid_of(needed), &cpuid_of(there));
    let of = |changes: &CpuChanges, number: u32| {
        let found = changes.registers.iter().find(|register| register.number == u64::from(number));
        found.map_or(0, |register| register.value)
    };
    for number in FEATURE_MSRS {
        let bits = of(needed, number) & !of(there, number);
        let name = |bit| format!("bit {bit} of the model-specific register {number:#x}");
        names.extend((0..u64::BITS).filter(|bit| bits >> bit & 1 == 1).map(name));
    }
    names
}

/// The names of the features that `saved` has, and `ours` has not.
pub fn lacking_of_cpuid(saved: &[kvm_cpuid_entry2], ours: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut names = Vec::new();
    for word in &WORDS {
        let bits = word.of(saved) & !word.of(ours) & !word.ignored;
        names.extend((0..u32::BITS).filter(|bit| bits >> bit & 1 == 1).map(|bit| word.name(bit)));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_lacks_is_told_by_name() {
        let leaf =
            |function, index, ebx, ecx| kvm_cpuid_entry2 { function, index, ebx, ecx, ..Default::default() };
        let saved = [leaf(1, 0, 0, 1 << 28 | OSXSAVE), leaf(7, 0, 1 << 16 | 1 << 5 | 1 << 15, OSPKE)];
        let ours = [leaf(1, 0, 0, 0), leaf(7, 0, 1 << 5, u32::MAX)];
        assert_eq!(lacking_of_cpuid(&saved, &ours), ["avx", "bit 15 of ebx in CPUID 0x7.0", "avx512f"]);
        assert_eq!(lacking_of_cpuid(&saved[..1], &[]), ["avx"], "a leaf that is not there has no features");
        assert!(
            lacking_of_cpuid(&ours[..1], &saved).is_empty() && lacking_of_cpuid(&saved, &saved).is_empty()
        );
    }

    #[test]
    fn a_cpu_is_compared_with_what_another_one_was_told() {
        let leaf = |ebx| kvm_cpuid_entry2 { function: 7, ebx, ..Default::default() };
        let (more, less) = (told(&[leaf(1 << 5)], &[(0x10a, 5), (0x10, 9)]), told(&[leaf(0)], &[(0x10a, 4)]));
        assert_eq!(lacking(&more, &less), ["avx2", "bit 0 of the model-specific register 0x10a"]);
        assert!(lacking(&less, &more).is_empty() && lacking(&CpuChanges::default(), &less).is_empty());
        assert_eq!(more.registers.len(), 1, "the time stamp counter is no feature");
    }
}
