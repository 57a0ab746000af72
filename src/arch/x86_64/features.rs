//! Features of the processor that a saved guest was told of, and that a host does not have (Intel SDM 2A, CPUID; AMD
//! APM 3, appendix E; KVM's cpuid.rst). KVM takes a CPUID that says more than the processor can do, and the guest would
//! find out by an exception, some time later.

use kvm_bindings::kvm_cpuid_entry2;

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

/// The names of the features that `saved` has, and `ours` has not.
pub fn lacking(saved: &[kvm_cpuid_entry2], ours: &[kvm_cpuid_entry2]) -> Vec<String> {
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
        assert_eq!(lacking(&saved, &ours), ["avx", "bit 15 of ebx in CPUID 0x7.0", "avx512f"]);
        assert_eq!(lacking(&saved[..1], &[]), ["avx"], "a leaf that is not there has no features");
        assert!(lacking(&ours[..1], &saved).is_empty() && lacking(&saved, &saved).is_empty());
    }
}
