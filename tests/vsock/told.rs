//! When the guest is told of packets that it has back.

use super::*;
use common::driver::{ACKNOWLEDGE, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK, WRITE};
use common::vsock::{RX, TX};

/// A device that works when it is waited for, whose rings hold as many as those of Linux.
fn large(kind: TransportKind, folder: &Folder) -> Guest {
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let opened = device(folder).open("vsock", &mut Host::default()).unwrap();
    let sizes = opened.queue_sizes().to_vec();
    let mut guest = Guest::by_hand(kind, opened, memory);
    assert!(guest.negotiate(F_EVENT_IDX | F_VERSION_1));
    for (queue, size) in sizes.into_iter().enumerate() {
        guest.set_queue(queue, size, Guest::parts(queue));
        guest.want_interrupt(queue, true);
    }
    guest.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    guest
}

/// Sends so many packets of a connection that there is not, and waits until they are back.
fn send(guest: &mut Guest, count: usize) {
    let packet = guest.allocate(&Packet::new(RW, 1000, 80).bytes());
    guest.want_interrupt(TX, true);
    (0..count).for_each(|_| _ = guest.offer(TX, &[(packet, 0)]));
    guest.kick(TX);
    guest.wait_for_each_turn(|guest| guest.has_used(TX));
    // On a slow machine the time after which they are told of may be over by now.
    (0..count).for_each(|_| _ = guest.take_used(TX));
}

#[test]
fn packets_that_came_back_are_told_of_with_an_answer_or_soon() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Folder::new();
    let mut guest = large(TransportKind::Mmio, &folder);
    // There is no room for an answer: the packet comes back at once, the interrupt after it.
    send(&mut guest, 1);
    assert_eq!(guest.interrupts(), 0);
    guest.wait_for(|guest| guest.interrupts() > 0);
    // Many at a time are told of at once.
    send(&mut guest, 8);
    assert_eq!(guest.interrupts(), 1);
    // One interrupt tells of a packet and of the answer to it, which is a refusal.
    guest.want_interrupt(RX, true);
    for _ in 0..10 {
        let room = guest.allocate(&[0; 4096]);
        guest.offer(RX, &[(room, WRITE)]);
    }
    guest.kick(RX);
    guest.wait_for(|guest| guest.has_used(RX));
    (0..9).for_each(|_| _ = guest.next_used(RX));
    assert_eq!(guest.interrupts(), 1);
    guest.want_interrupt(RX, true);
    send(&mut guest, 1);
    assert!(guest.has_used(RX));
    assert_eq!(guest.interrupts(), 1);
    // A device that stops leaves nothing untold.
    send(&mut guest, 1);
    guest.pause();
    assert_eq!(guest.interrupts(), 1);
}

#[test]
fn an_answer_does_not_interrupt_for_packets_by_another_vector() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Folder::new();
    let mut guest = large(TransportKind::Pci, &folder);
    let room = guest.allocate(&[0; 4096]);
    guest.offer(RX, &[(room, WRITE)]);
    guest.kick(RX);
    guest.turn();
    send(&mut guest, 1);
    assert!(guest.has_used(RX));
    assert!(guest.is_interrupted(Some(RX)) && !guest.is_interrupted(Some(TX)));
    guest.wait_for(|guest| guest.is_interrupted(Some(TX)));
}
