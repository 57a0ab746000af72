//! How much each side of a connection may send (virtio 1.2, 5.10.6.3): the other side says how large its
//! room is and how many bytes it has passed on. All counts are modulo 2^32.

/// Who never reads must not make us keep everything that a guest sends: so many bytes of one connection are
/// taken from the guest before the host's program has read any.
pub const WINDOW_MAX: u32 = 256 << 10;
/// As little as this a connection is given when memory is short, so that all of them go on.
pub const WINDOW_MIN: u32 = 4 << 10;

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
    pub fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
    }

    /// Nobody will take what is under way.
    pub fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// What the next packet to the guest says, `buf_alloc` and `fwd_cnt`, where `window` bytes are to be taken
    /// from the guest beyond those that were passed on. What the guest was allowed once it stays allowed: it
    /// may have sent already, and Linux before 6.7 takes less room than it uses for 4 GiB of it.
    pub fn grant(&mut self, window: u32) -> (u32, u32) {
        let more = self.more(window);
        self.granted = self.granted.wrapping_add(more);
        (self.granted.wrapping_sub(self.forwarded), self.forwarded)
    }

    /// Whether the guest is to be told that it may send more, though nothing else is to be said: at half a
    /// window, so that it neither waits nor hears of every byte.
    pub fn owes_word(&self, window: u32) -> bool {
        self.more(window) >= window / 2
    }

    /// How much more the guest may send than it was told.
    fn more(&self, window: u32) -> u32 {
        // What was granted is never less than what was passed on.
        window.saturating_sub(self.granted.wrapping_sub(self.forwarded))
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
        let mut flow = Flow { received: u32::MAX, forwarded: u32::MAX, granted: u32::MAX, ..Flow::default() };
        assert!(!flow.receive(1));
        assert_eq!(flow.grant(1000), (1000, u32::MAX));
        assert!(flow.receive(600) && !flow.receive(401) && flow.receive(400));
        flow.forward(400);
        assert!(!flow.owes_word(1000));
        flow.forward(100);
        assert!(flow.owes_word(1000));
        assert_eq!(flow.grant(1000), (1000, 499));
        // A smaller window takes nothing back, and gives nothing more until it is used.
        assert_eq!(flow.grant(100), (1000, 499));
        flow.forward(500);
        assert_eq!(flow.grant(100), (500, 999));
        assert!(flow.receive(500) && !flow.receive(1));
        flow.forward(460);
        assert!(flow.owes_word(100));
        assert_eq!(flow.grant(100), (100, 1459));
    }
}
