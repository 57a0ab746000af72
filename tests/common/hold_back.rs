//! Whether CPUs can come and go here.

/// Set, by `scripts/test`: the host can hold CPUs back, and that no case is left out is what it is there for.
const EXPECTED: &str = "ALULA_TEST_HOLDS_BACK";

/// Whether the host can hold CPUs back from a guest: on aarch64 by KVM's SMCCC filter, which Linux has since 6.4.
pub fn can_hold_back() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap());
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    let can = cfg!(target_arch = "x86_64") || version >= (6, 4);
    let is_expected = std::env::var_os(EXPECTED).is_some_and(|value| !value.is_empty());
    assert!(can || !is_expected, "{EXPECTED} is set, and the host has Linux {}", release.trim());
    can
}
