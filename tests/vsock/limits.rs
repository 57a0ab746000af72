//! Limits on what one guest can have the host keep for it.

use super::*;

/// Connections of the guest that wait for a program of the host at once (`CONNECTING_MAX`).
const CONNECTING_MAX: u32 = 1024;
/// Refusals that are kept for a guest that gives no buffers (`REFUSALS_MAX`).
const REFUSALS_MAX: u32 = 1024;
/// Receive buffers that the driver has given.
const ROOMS: u32 = 8;

#[test]
fn no_more_than_1024_connections_wait_for_a_full_listener() {
    const ASKED: u32 = 1100;
    let mut world = World::by_hand();
    let (mut beside, port) = world.connected(5);
    let _listener = UnixListener::bind(world.path(80)).unwrap();
    // As many as the kernel keeps for who does not take them; the next ones wait here.
    let mut waiting = Vec::new();
    while let Ok(stream) = alula::host::socket::connect(&world.path(80)) {
        waiting.push(stream);
    }
    let ports = 1000..1000 + ASKED;
    ports.clone().for_each(|port| world.driver.send(Packet::new(REQUEST, port, 80), &[]));
    // Requests beyond are refused at once, and no others.
    for port in ports.clone().skip(CONNECTING_MAX as usize) {
        let refused = world.driver.expect(RST);
        assert_eq!((refused.from_port, refused.to_port), (80, port));
    }
    world.driver.guest.turn();
    assert!(!world.driver.has_received());
    assert_eq!(world.connections(), u64::from(CONNECTING_MAX) + 1);
    assert_eq!(world.counted("conns_refused"), u64::from(ASKED - CONNECTING_MAX));
    // Programs of the host go on, and new ones come.
    world.driver.send(Packet::new(RW, 5, port), b"there");
    assert_eq!(read(&mut beside, 5), b"there");
    let (mut client, port) = world.connected(6);
    client.write_all(b"new").unwrap();
    assert_eq!(world.driver.receive().1, b"new");
    world.driver.send(Packet::new(RST, 6, port), &[]);
    assert!(is_closed(&mut client));
    // The guest gives them up: nothing is left of them, and it connects again.
    for port in ports.take(CONNECTING_MAX as usize) {
        world.driver.send(Packet::new(RST, port, 80), &[]);
    }
    wait_for(|| world.connections() == 1);
    world.accepted(81);
}

#[test]
fn a_guest_without_buffers_has_1024_refusals_kept() {
    const MORE: u32 = 1000;
    // Allocations of its io thread are counted.
    let mut world = World::new(TransportKind::Mmio);
    let send = |world: &mut World, ports: std::ops::Range<u32>| {
        let packets: Vec<_> = ports.map(|port| (Packet::new(RW, port, 9), &b"x"[..])).collect();
        let before = allocator::bytes();
        world.driver.send_all(&packets);
        allocator::bytes() - before
    };
    let sent = ROOMS + REFUSALS_MAX + 68;
    let kept = send(&mut world, 0..sent);
    assert!(kept <= 64 << 10, "{kept} bytes are kept for {sent} packets");
    assert_eq!(world.counted("conns_refused"), 68);
    let kept = send(&mut world, sent..sent + MORE);
    assert!(kept <= 4 << 10, "{kept} bytes are kept for {MORE} packets beyond the limit");
    assert_eq!(world.counted("conns_refused"), u64::from(68 + MORE));
    // The first ones are those that were kept, in their order.
    for port in 0..ROOMS + REFUSALS_MAX {
        let refused = world.driver.expect(RST);
        assert_eq!((refused.from_port, refused.to_port), (9, port));
    }
    assert!(!world.driver.has_received());
    let (mut client, port) = world.connected(5);
    world.driver.send(Packet::new(RW, 5, port), b"alive");
    assert_eq!(read(&mut client, 5), b"alive");
}
