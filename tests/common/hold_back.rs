//! Whether CPUs can come and go here.

/// Whether the host can hold CPUs back from a guest: on aarch64 by KVM's SMCCC filter, which Linux has since 6.4.
pub fn can_hold_back() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap());
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    cfg!(target_arch = "x86_64") || version >= (6, 4)
}
