//! Feature bits of the network device (virtio 1.3, 5.1.3), and what they mean for a TAP.

#![allow(missing_docs, reason = "names of the specification")]

pub const CSUM: u64 = 1 << 0;
pub const GUEST_CSUM: u64 = 1 << 1;
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub const MTU: u64 = 1 << 3;
pub const MAC: u64 = 1 << 5;
pub const GUEST_TSO4: u64 = 1 << 7;
pub const GUEST_TSO6: u64 = 1 << 8;
pub const GUEST_ECN: u64 = 1 << 9;
pub const HOST_TSO4: u64 = 1 << 11;
pub const HOST_TSO6: u64 = 1 << 12;
pub const HOST_ECN: u64 = 1 << 13;
pub const MRG_RXBUF: u64 = 1 << 15;
pub const STATUS: u64 = 1 << 16;
pub const CTRL_VQ: u64 = 1 << 17;
pub const CTRL_RX: u64 = 1 << 18;
pub const CTRL_RX_EXTRA: u64 = 1 << 20;
pub const GUEST_ANNOUNCE: u64 = 1 << 21;
pub const MQ: u64 = 1 << 22;
pub const CTRL_MAC_ADDR: u64 = 1 << 23;
pub const GUEST_USO4: u64 = 1 << 54;
pub const GUEST_USO6: u64 = 1 << 55;
pub const HOST_USO: u64 = 1 << 56;

/// What any host's TAP can do for the guest.
pub const TAP: u64 = CTRL_GUEST_OFFLOADS
    | CSUM
    | GUEST_CSUM
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN;
/// What one can on a kernel that passes segments of UDP.
pub const TAP_UDP: u64 = GUEST_USO4 | GUEST_USO6 | HOST_USO;

/// What the control queue is for, over any carrier. Not VLAN filters: a TAP has none, and without them
/// the driver itself drops what it does not want.
pub const CONTROL: u64 = CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | GUEST_ANNOUNCE | CTRL_MAC_ADDR;
/// What the driver may switch on and off while it runs.
pub const GUEST_OFFLOADS: u64 = GUEST_SEGMENTS | GUEST_CSUM | GUEST_ECN;
/// Those by which the driver gets packets larger than the MTU.
pub const GUEST_SEGMENTS: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;

/// Each offload of a TAP with the features that the driver must have accepted for it.
const TAP_OFFLOADS: [(u64, u32); 6] = [
    (GUEST_CSUM, libc::TUN_F_CSUM),
    (GUEST_CSUM | GUEST_TSO4, libc::TUN_F_TSO4),
    (GUEST_CSUM | GUEST_TSO6, libc::TUN_F_TSO6),
    (GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN, libc::TUN_F_TSO_ECN),
    (GUEST_CSUM | GUEST_USO4, libc::TUN_F_USO4),
    (GUEST_CSUM | GUEST_USO6, libc::TUN_F_USO6),
];

/// Whether all of `wanted` is in `features`.
pub fn has(features: u64, wanted: u64) -> bool {
    features & wanted == wanted
}

/// What a TAP may give to a driver that accepted `features`: without checksums, in large segments.
pub fn tap_offloads(features: u64) -> u32 {
    let chosen = TAP_OFFLOADS.iter().filter(|(needed, _)| has(features, *needed));
    chosen.fold(0, |all, (_, offload)| all | offload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_come_only_to_who_completes_checksums() {
        assert_eq!(tap_offloads(0), 0);
        assert_eq!(tap_offloads(GUEST_TSO4 | GUEST_USO4), 0);
        assert_eq!(tap_offloads(GUEST_CSUM | GUEST_TSO6), libc::TUN_F_CSUM | libc::TUN_F_TSO6);
        let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        assert_eq!(tap_offloads(TAP), all);
        assert_eq!(tap_offloads(TAP | TAP_UDP), all | libc::TUN_F_USO4 | libc::TUN_F_USO6);
    }
}
