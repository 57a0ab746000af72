//! Saved state from a file that somebody wrote: refused, or taken over by a device that then is as sound
//! as any. The bytes change a state that was saved, or are one.

use alula::snapshot::SaveState;
use arbitrary::Unstructured;

use crate::driver::{F_EVENT_IDX, Guest, TransportKind};
use crate::host;

const CHANGES_MAX: usize = 16;

pub fn run(bytes: &[u8]) {
    host::with(|host| {
        let mut bytes = Unstructured::new(bytes);
        let choice = usize::from(bytes.arbitrary::<u8>().unwrap_or(0));
        let device = &host.devices[choice / 4 % host.devices.len()];
        let kind = if choice & 1 == 0 { TransportKind::Mmio } else { TransportKind::Pci };
        let mut guest = host.guest(kind, device);
        if choice & 2 == 0 {
            guest.start(F_EVENT_IDX);
            host.exercise(device, &mut guest);
        }
        guest.pause();
        let mut state = guest.save();
        change(&mut state, &mut bytes).expect("numbers end as zeros");
        let mut guest = host.guest_anew(device, guest);
        guest.pause();
        if guest.restore(&state).is_ok() {
            check(&mut guest);
            guest = live(guest);
        } else {
            guest = host.guest_anew(device, guest);
        }
        // What was taken over may lack it, as after a kernel that has ended.
        guest.set_bus_master(true);
        guest.start(0);
        host.exercise(device, &mut guest);
    });
}

/// Changes bytes here and there.
pub fn change(state: &mut [Vec<u8>], bytes: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let parts = state.len();
    for _ in 0..CHANGES_MAX {
        if bytes.is_empty() {
            break;
        }
        let part = &mut state[usize::from(bytes.arbitrary::<u8>()?) % parts];
        let at = usize::from(bytes.arbitrary::<u16>()?) % (part.len() + 1);
        match bytes.arbitrary::<u8>()? % 6 {
            0 | 1 if at < part.len() => part[at] = bytes.arbitrary()?,
            2 if at < part.len() => part[at] ^= 1 << (bytes.arbitrary::<u8>()? % 8),
            3 => part.insert(at, bytes.arbitrary()?),
            4 if at < part.len() => drop(part.remove(at)),
            5 => {
                // The rest is what there is.
                part.truncate(at);
                part.extend(bytes.bytes(bytes.len())?);
            }
            _ => part.truncate(at),
        }
    }
    Ok(())
}

/// What was taken over can be saved, and that is what it is.
fn check(guest: &mut Guest) {
    let saved = guest.save();
    let again = guest.transport.lock().unwrap().restore_state(&saved[0]);
    assert!(again.is_ok(), "its own state is refused: {}", again.unwrap_err());
    assert!(guest.save()[0] == saved[0], "what was restored is not what was saved");
}

/// The guest goes on, whatever it makes of its state.
fn live(mut guest: Guest) -> Guest {
    guest.resume();
    for queue in 0..guest.queues() {
        guest.kick(queue);
    }
    guest.turn();
    guest.pause();
    guest.resume();
    guest
}
