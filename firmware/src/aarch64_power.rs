//! CPUs that are switched on and off again and again, by PSCI.

use super::{PSCI_CPU_ON, halt, psci, secondary_entry};

const PSCI_AFFINITY_INFO: u64 = 0xc400_0004;

unsafe extern "C" {
    static staying_entry: u8;
}

/// A stack of a CPU that stays on, which is aligned to 16 bytes.
type Stack = [u128; 256];
/// Those of CPUs 1 to 3, by their numbers; the first CPU has another one.
static mut STACKS: [Stack; 4] = [[0; 256]; 4];

/// Has the CPU with this MPIDR switched on, which does `cpu_slots::stay` then; what PSCI says.
pub fn switch_on_to_stay(id: u64) -> i64 {
    let end = (&raw const STACKS) as u64 + (id % 4 + 1) * size_of::<Stack>() as u64;
    psci(PSCI_CPU_ON, [id, (&raw const staying_entry) as u64, end]) as i64
}

/// Has the CPU with this MPIDR switched on, which switches itself off; what PSCI says.
pub fn switch_on(id: u64) -> i64 {
    psci(PSCI_CPU_ON, [id, (&raw const secondary_entry) as u64, 0]) as i64
}

/// Has the CPU with this MPIDR begin where there is nothing; what PSCI says.
pub fn switch_on_nowhere(id: u64) -> i64 {
    psci(PSCI_CPU_ON, [id, 1 << 45 | 1, 0]) as i64
}

/// Whether the CPU with this MPIDR is off.
pub fn is_off(id: u64) -> bool {
    psci(PSCI_AFFINITY_INFO, [id, 0, 0]) == 1
}

#[unsafe(no_mangle)]
extern "C" fn staying_cpu() -> ! {
    crate::cpu_slots::stay();
    halt()
}
