//! How much each side of a connection may send (virtio 1.2, 5.10.6.3): the other side says how large its
//! room is and how many bytes it has passed on. All counts are modulo 2^32.

use super::backlog::{BLOCK, BLOCKS_MAX};

/// Who never reads must not make us keep everything that a guest sends: so many bytes of one connection are
/// taken from the guest before the host's program has read any.
const WINDOW_MAX: u32 = 256 << 10;
/// As little as this a connection is given when it begins, so that thousands that are idle leave the memory to
/// others, and when memory is short, so that all of them go on.
const WINDOW_MIN: u32 = 4 << 10;
/// What a program of the host has read counts so many times for how much it will be sent ahead.
const GROWTH: u32 = 4;
/// One connection has this part at most of what is left of all connections' memory.
const SHARE: usize = 128;

/// What all guest's programs together may send, or have sent, that was not passed on: it must fit into the memory
/// that there is for it, or bytes that a program was allowed to send would have no place.
#[derive(Debug, Default)]
pub struct Promises {
    /// Bytes.
    bytes: usize,
    /// Connections, each of which may take a block more than its bytes fill.
    pub connections: usize,
}

impl Promises {
    fn left(&self) -> usize {
        (BLOCKS_MAX * BLOCK).saturating_sub(self.bytes + self.connections * BLOCK)
    }
}

/// The counts of one connection.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    // Towards the guest
    /// Bytes sent to the guest.
    sent: u32,
    /// The guest's `fwd_cnt`.
    taken: u32,
    /// The guest's `buf_alloc`.
    room: u32,
    // From the guest
    /// Bytes that the guest has sent.
    received: u32,
    /// Of these, bytes that the host's program was given.
    forwarded: u32,
    /// The guest was told that it may send up to here.
    granted: u32,
}

impl Flow {
    /// The guest says how much room it has. What it says is believed: with a lie it sends itself more than
    /// it has room for, or nothing.
    pub fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        (self.room, self.taken) = (buf_alloc, fwd_cnt);
    }

    /// How many bytes the guest has room for now.
    pub fn credit(&self) -> u32 {
        self.room.saturating_sub(self.sent.wrapping_sub(self.taken))
    }

    /// So many bytes were sent to the guest.
    pub fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// The guest has sent so many bytes; false: it was not allowed to.
    pub fn receive(&mut self, count: u32) -> bool {
        let is_allowed = count <= self.granted.wrapping_sub(self.received);
        if is_allowed {
            self.received = self.received.wrapping_add(count);
        }
        is_allowed
    }

    /// The host's program was given so many bytes.
    pub fn forward(&mut self, count: u32, promises: &mut Promises) {
        self.forwarded = self.forwarded.wrapping_add(count);
        promises.bytes -= count as usize;
    }

    /// Nobody will take what is under way.
    pub fn forward_all(&mut self, promises: &mut Promises) {
        self.forward(self.received.wrapping_sub(self.forwarded), promises);
    }

    /// The guest will send no more, whatever it may.
    pub fn end(&mut self, promises: &mut Promises) {
        promises.bytes -= self.granted.wrapping_sub(self.received) as usize;
        self.granted = self.received;
    }

    /// What the next packet to the guest says, `buf_alloc` and `fwd_cnt`. What the guest was allowed once it stays
    /// allowed: it may have sent already, and Linux before 6.7 takes less room than it uses for 4 GiB of it.
    pub fn grant(&mut self, promises: &mut Promises) -> (u32, u32) {
        let more = self.more(self.window(promises));
        self.granted = self.granted.wrapping_add(more);
        promises.bytes += more as usize;
        (self.promised(), self.forwarded)
    }

    /// Whether the guest is to be told that it may send more, though nothing else is to be said: at half a
    /// window, so that it neither waits nor hears of every byte.
    pub fn owes_word(&self, promises: &Promises) -> bool {
        let window = self.window(promises);
        self.more(window) >= window / 2
    }

    /// How many bytes are to be taken from the guest beyond those that were passed on: the more, the more the host's
    /// program has read, and less and less where there is little memory left.
    fn window(&self, promises: &Promises) -> u32 {
        let share = (promises.left() / SHARE) as u32;
        share.min(self.forwarded.saturating_mul(GROWTH)).clamp(WINDOW_MIN, WINDOW_MAX)
    }

    /// How many bytes the guest may have sent, or send still, that were not passed on.
    fn promised(&self) -> u32 {
        self.granted.wrapping_sub(self.forwarded)
    }

    /// How much more the guest may send than it was told.
    fn more(&self, window: u32) -> u32 {
        // What was granted is never less than what was passed on.
        window.saturating_sub(self.promised())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_sends_more_than_the_other_has_room_for() {
        let mut flow = Flow { sent: u32::MAX - 5, taken: u32::MAX - 5, ..Flow::default() };
        assert_eq!(flow.credit(), 0);
        flow.hear(100, u32::MAX - 5);
        assert_eq!(flow.credit(), 100);
        flow.send(60);
        assert_eq!(flow.credit(), 40);
        flow.hear(100, 4);
        assert_eq!(flow.credit(), 50);
        // It makes its room smaller than what is under way, or says that it has passed on what never came.
        flow.hear(20, 4);
        assert_eq!(flow.credit(), 0);
        flow.hear(100, 1000);
        assert_eq!(flow.credit(), 0);
    }

    #[test]
    fn a_guest_is_allowed_what_it_was_told_and_no_byte_more() {
        let max = u32::MAX;
        let mut flow = Flow { received: max, forwarded: max, granted: max, ..Flow::default() };
        let mut all = Promises::default();
        assert!(!flow.receive(1));
        assert_eq!(flow.grant(&mut all), (WINDOW_MAX, max));
        assert!(
            flow.receive(200_000)
                && !flow.receive(WINDOW_MAX - 199_999)
                && flow.receive(WINDOW_MAX - 200_000)
        );
        flow.forward(1 << 16, &mut all);
        assert!(!flow.owes_word(&all));
        flow.forward(1 << 16, &mut all);
        assert!(flow.owes_word(&all));
        assert_eq!(flow.grant(&mut all), (WINDOW_MAX, (1 << 17) - 1));
        // A smaller window takes nothing back, and gives nothing more until it is used.
        all.connections = BLOCKS_MAX;
        assert!(!flow.owes_word(&all));
        assert_eq!(flow.grant(&mut all), (WINDOW_MAX, (1 << 17) - 1));
        flow.forward(1 << 17, &mut all);
        assert_eq!(flow.grant(&mut all), (1 << 17, (1 << 18) - 1));
        assert!(flow.receive(1 << 17) && !flow.receive(1));
        flow.forward((1 << 17) - 100, &mut all);
        assert!(flow.owes_word(&all));
        assert_eq!((flow.grant(&mut all).0, all.bytes), (WINDOW_MIN, WINDOW_MIN as usize));
        flow.forward_all(&mut all);
        flow.end(&mut all);
        assert_eq!(all.bytes, 0);
    }

    #[test]
    fn a_window_grows_with_what_was_read_and_shrinks_with_memory() {
        let (mut all, mut flow, mut windows) = (Promises::default(), Flow::default(), Vec::new());
        for _ in 0..5 {
            let (room, _) = flow.grant(&mut all);
            assert!(flow.receive(room));
            flow.forward(room, &mut all);
            windows.push(room >> 10);
        }
        assert_eq!(windows, [4, 16, 80, 256, 256]);
        // Thousands begin, and then all take what they may: what is promised fits.
        let mut others = vec![Flow::default(); 5000];
        for other in &mut others {
            all.connections += 1;
            assert_eq!(other.grant(&mut all), (WINDOW_MIN, 0));
        }
        let rooms: Vec<_> = others
            .iter_mut()
            .map(|other| {
                (other.forwarded, other.granted) = (WINDOW_MAX, WINDOW_MAX + other.granted);
                other.grant(&mut all).0
            })
            .collect();
        assert!(rooms.is_sorted_by(|one, next| one >= next));
        assert!(rooms[0] > 128 << 10 && rooms[4999] == WINDOW_MIN, "{}", rooms[0]);
        assert!(all.bytes + 5000 * BLOCK <= BLOCKS_MAX * BLOCK, "{} bytes", all.bytes);
    }
}
