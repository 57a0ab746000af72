//! CPUID as the guest sees it: what KVM supports, with this machine's own topology (Intel SDM 2A,
//! CPUID; AMD APM 3, appendix E).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::error::{Error, Result};
use crate::platform::{CpuidModifier, CpuidRegister};

const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF_1_EDX_APIC: u32 = 1 << 9;
const LEAF_7_ECX_OSPKE: u32 = 1 << 4;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
/// CMP_LEGACY: the logical CPUs of leaf 1 are cores, not threads.
const LEAF_80000001_ECX_CMP_LEGACY: u32 = 1 << 1;
/// Level types of the extended topology leaf.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// How the CPUs lie: one package, `threads` (1 or 2) in each core. The APIC id of a CPU is its index.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// All CPUs.
    pub cpus: u16,
    /// Hardware threads in a core.
    pub threads: u16,
}

impl Topology {
    fn cores(&self) -> u32 {
        u32::from(self.cpus.div_ceil(self.threads))
    }
    /// How many low bits of an APIC id tell CPUs of one package apart.
    fn package_shift(&self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
    fn core_shift(&self) -> u32 {
        u32::from(self.threads).trailing_zeros()
    }
}

/// The CPUID of every CPU but for the APIC id, which `set_apic_id` fills in.
pub fn machine(supported: &CpuId, topology: Topology, tsc_deadline: bool) -> Result<CpuId> {
    let kept = supported.as_slice().iter().filter(|entry| ![0xb, 0x1f].contains(&entry.function));
    let levels = [
        (0, topology.core_shift(), topology.threads, LEVEL_SMT),
        (1, topology.package_shift(), topology.cpus, LEVEL_CORE),
        (2, 0, 0, 0),
    ];
    let ours = levels.map(|(index, shift, count, level)| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count.into(),
        ecx: level << 8 | index,
        ..Default::default()
    });
    let mut cpuid = CpuId::new(kept.clone().count() + ours.len())
        .map_err(|_| Error::host("KVM supports more CPUID leaves than it takes"))?;
    for (slot, entry) in cpuid.as_mut_slice().iter_mut().zip(kept.copied().chain(ours)) {
        *slot = entry;
        adjust(slot, topology, tsc_deadline);
    }
    Ok(cpuid)
}

/// The maker of the processor (leaf 0: EBX, EDX, ECX).
pub fn vendor(supported: &CpuId) -> [u8; 12] {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0);
    let words = leaf.map_or([0; 3], |leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
    let mut name = [0; 12];
    for (place, word) in name.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    name
}

/// The CPUID that KVM supports, changed by `modifiers`. The changes come before the CPUID is made this
/// machine's, so that topology, APIC ids and the bits that tell of a virtual machine stay right.
pub fn modified(supported: &CpuId, modifiers: &[CpuidModifier]) -> Result<CpuId> {
    let mut cpuid = supported.clone();
    for CpuidModifier { leaf, subleaf, register, mask, value } in modifiers {
        let mut entries = cpuid.as_mut_slice().iter_mut();
        let entry = entries.find(|entry| (entry.function, entry.index) == (*leaf, *subleaf));
        let entry = entry.ok_or_else(|| {
            Error::config(format!(
                "change leaf {leaf:#x}, subleaf {subleaf:#x} of CPUID (`cpuid_modifiers`, or those of \
                 `cpu_template`): this host's KVM does not have it"
            ))
        })?;
        let register = match register {
            CpuidRegister::Eax => &mut entry.eax,
            CpuidRegister::Ebx => &mut entry.ebx,
            CpuidRegister::Ecx => &mut entry.ecx,
            CpuidRegister::Edx => &mut entry.edx,
        };
        *register = *register & !mask | value;
    }
    Ok(cpuid)
}

fn adjust(entry: &mut kvm_cpuid_entry2, topology: Topology, tsc_deadline: bool) {
    let cpus = u32::from(topology.cpus);
    let several = cpus > 1;
    let set =
        |register: &mut u32, bit: u32, on: bool| *register = *register & !bit | if on { bit } else { 0 };
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0xff00 | cpus.min(255) << 16;
            entry.ecx |= LEAF_1_ECX_HYPERVISOR;
            set(&mut entry.ecx, LEAF_1_ECX_TSC_DEADLINE, tsc_deadline);
            set(&mut entry.edx, LEAF_1_EDX_HTT, several);
        }
        // Cache levels: 1 and 2 are a core's own, 3 is the package's.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 < 3 { topology.threads.into() } else { cpus };
            entry.eax = entry.eax & 0x3fff | (sharing - 1).min(0xfff) << 14;
            if entry.function == 0x4 {
                entry.eax |= (topology.cores() - 1).min(0x3f) << 26;
            }
        }
        // No performance counters: nothing here saves or hides them.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => set(&mut entry.ecx, LEAF_80000001_ECX_CMP_LEGACY, several && topology.threads == 1),
        0x8000_0008 => entry.ecx = topology.package_shift() << 12 | (cpus - 1).min(0xff),
        // One node; threads per core.
        0x8000_001e => (entry.ebx, entry.ecx) = (u32::from(topology.threads - 1) << 8, 0),
        _ => {}
    }
}

/// Fills in what differs from CPU to CPU.
pub fn set_apic_id(cpuid: &mut CpuId, topology: Topology, apic_id: u32) {
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | (apic_id & 0xff) << 24,
            0xb => entry.edx = apic_id,
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = entry.ebx & 0xff00 | apic_id >> topology.core_shift() & 0xff;
            }
            _ => {}
        }
    }
}

/// Whether KVM, told one, has been told the other: they are the same but for what KVM itself keeps up to date with
/// control registers and the local APIC, whatever it is told.
pub fn is_same(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> bool {
    one.iter().map(without_state).eq(other.iter().map(without_state))
}

fn without_state(entry: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    let mut entry = kvm_cpuid_entry2 { padding: [0; 3], ..*entry };
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ecx &= !LEAF_1_ECX_OSXSAVE;
            entry.edx &= !LEAF_1_EDX_APIC;
        }
        (0x7, 0) => entry.ecx &= !LEAF_7_ECX_OSPKE,
        // How large the XSAVE area is for what is switched on.
        (0xd, 0 | 1) => entry.ebx = 0,
        _ => {}
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid(topology: Topology, apic_id: u32) -> CpuId {
        let leaves = [0x1, 0x4, 0xa, 0xb, 0x1f, 0x8000_0001, 0x8000_0008, 0x8000_001e];
        let entries: Vec<_> = leaves
            .map(|function| kvm_cpuid_entry2 { function, eax: 0x21, ecx: 0xffff_ffff, ..Default::default() })
            .into();
        let mut cpuid = machine(&CpuId::from_entries(&entries).unwrap(), topology, false).unwrap();
        set_apic_id(&mut cpuid, topology, apic_id);
        cpuid
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = cpuid.as_slice().iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
        *found.unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
    }

    #[test]
    fn four_cores_are_told_the_same_way_by_every_leaf() {
        let cpuid = cpuid(Topology { cpus: 4, threads: 1 }, 3);
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 16, 0x0304);
        assert_eq!(leaf(&cpuid, 1, 0).edx & LEAF_1_EDX_HTT, LEAF_1_EDX_HTT);
        assert_eq!(leaf(&cpuid, 1, 0).ecx & LEAF_1_ECX_TSC_DEADLINE, 0);
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 14, 3 << 12, "4 cores, an unshared first-level cache");
        let levels = [0, 1].map(|index| leaf(&cpuid, 0xb, index));
        assert_eq!(levels.map(|level| (level.eax, level.ebx, level.edx)), [(0, 1, 3), (2, 4, 3)]);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 3);
        assert!(cpuid.as_slice().iter().all(|leaf| leaf.function != 0x1f));
    }

    #[test]
    fn a_change_sets_the_bits_that_it_names_and_no_others() {
        let entry = kvm_cpuid_entry2 { function: 7, index: 1, ebx: 0b1100, ecx: 5, ..Default::default() };
        let supported = CpuId::from_entries(&[entry]).unwrap();
        let modifier = |leaf| CpuidModifier {
            leaf,
            subleaf: 1,
            register: CpuidRegister::Ebx,
            mask: 0b0110,
            value: 0b0010,
        };
        let changed = leaf(&modified(&supported, &[modifier(7)]).unwrap(), 7, 1);
        assert_eq!((changed.eax, changed.ebx, changed.ecx, changed.edx), (0, 0b1010, 5, 0));
        let error = modified(&supported, &[modifier(0x21)]).unwrap_err().to_string();
        assert!(error.contains("leaf 0x21, subleaf 0x1 of CPUID (`cpuid_modifiers`, or"), "{error}");
    }

    #[test]
    fn what_kvm_keeps_up_to_date_by_itself_makes_no_other_cpu() {
        let entry = |function, index, words: [u32; 4]| {
            let [eax, ebx, ecx, edx] = words;
            kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
        };
        let told = [entry(1, 0, [1, 2, 0, 0]), entry(7, 0, [0; 4]), entry(0xd, 1, [7, 0, 3, 0])];
        let runs = [
            entry(1, 0, [1, 2, 1 << 27, 1 << 9]),
            entry(7, 0, [0, 0, 1 << 4, 0]),
            entry(0xd, 1, [7, 0x340, 3, 0]),
        ];
        assert!(is_same(&told, &runs));
        for (index, other) in [
            (0, entry(1, 0, [1, 2, 1 << 26, 0])),
            (0, entry(1, 0, [1, 3, 0, 0])),
            (1, entry(7, 1, [0; 4])),
            (2, entry(0xd, 2, [7, 0, 3, 0])),
            (2, entry(0xd, 1, [6, 0, 3, 0])),
        ] {
            let mut changed = told;
            changed[index] = other;
            assert!(!is_same(&changed, &runs), "{other:?}");
        }
        assert!(!is_same(&told[..2], &runs) && !is_same(&told, &runs[..2]));
    }

    #[test]
    fn two_threads_share_a_core() {
        let cpuid = cpuid(Topology { cpus: 4, threads: 2 }, 3);
        assert_eq!([0, 1].map(|index| leaf(&cpuid, 0xb, index).eax), [1, 2]);
        assert_eq!(leaf(&cpuid, 0x8000_001e, 0).ebx, 0x101, "thread 3 is in core 1, with 2 threads");
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & LEAF_80000001_ECX_CMP_LEGACY, 0);
    }

    #[test]
    fn an_apic_id_beyond_8_bits_is_whole_in_the_topology_leaf() {
        let cpuid = cpuid(Topology { cpus: 300, threads: 1 }, 299);
        assert_eq!(leaf(&cpuid, 0xb, 1).edx, 299);
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 9);
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, 299 & 0xff);
    }
}
