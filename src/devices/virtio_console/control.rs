//! The messages of the control queues (virtio 1.3, 5.3.6.2): the device tells the guest of its port, and whether
//! somebody is at its other end; the guest tells whether a program has it open.

use serde::{Deserialize, Serialize};

/// The number of the only port.
const PORT: u32 = 0;
/// The length of a message without what follows it (struct virtio_console_control): id, event, value.
pub const LENGTH: usize = 8;

/// Events.
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// How far the guest and the device are with telling each other of the port. All that is owed to the guest is here: a
/// driver that asks for the same again and again makes it no more.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Talk {
    /// The guest is to be told that there is the port.
    owes_port: bool,
    /// The guest is to be told how the port is called.
    owes_name: bool,
    /// The guest knows the port.
    is_known: bool,
    /// The guest was told that somebody is at the port's other end.
    pub told_open: bool,
    /// A program of the guest has the port open.
    pub is_open: bool,
}

impl Talk {
    /// The guest says this; false: it makes no sense, and is ignored.
    pub fn hear(&mut self, message: [u8; LENGTH]) -> bool {
        let [a, b, c, d, event @ .., e, f] = message;
        let (id, event, value) =
            (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes(event), u16::from_le_bytes([e, f]));
        match event {
            // A driver that could not begin says 0.
            event::DEVICE_READY => *self = Self { owes_port: value == 1, ..Self::default() },
            _ if id != PORT => return false,
            event::PORT_READY => {
                *self = Self { owes_name: value == 1, is_known: value == 1, ..Self::default() };
            }
            event::PORT_OPEN => self.is_open = value == 1 && self.is_known,
            _ => return false,
        }
        true
    }

    /// The message that the guest is to get next, of the port called `name` at whose other end somebody is or is not;
    /// it counts as said. None: there is nothing to say.
    pub fn say(&mut self, name: &str, is_somebody_there: bool) -> Option<Vec<u8>> {
        if std::mem::take(&mut self.owes_port) {
            return Some(message(event::PORT_ADD, 1, ""));
        }
        if std::mem::take(&mut self.owes_name) {
            return Some(message(event::PORT_NAME, 1, name));
        }
        let is_news = self.is_known && self.told_open != is_somebody_there;
        is_news.then(|| {
            self.told_open = is_somebody_there;
            message(event::PORT_OPEN, is_somebody_there.into(), "")
        })
    }
}

fn message(event: u16, value: u16, rest: &str) -> Vec<u8> {
    [&PORT.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes(), rest.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hear(talk: &mut Talk, id: u32, event: u16, value: u16) -> bool {
        talk.hear(
            [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat().try_into().unwrap(),
        )
    }

    #[test]
    fn a_driver_is_told_of_the_port_step_by_step() {
        let mut talk = Talk::default();
        assert_eq!(talk.say("a.b", true), None, "nobody has asked");
        assert!(hear(&mut talk, u32::MAX, event::DEVICE_READY, 1));
        assert_eq!(talk.say("a.b", true).unwrap(), [0, 0, 0, 0, 1, 0, 1, 0]);
        assert_eq!(talk.say("a.b", true), None, "the port is not known yet");
        assert!(hear(&mut talk, 0, event::PORT_READY, 1));
        assert_eq!(talk.say("a.b", true).unwrap(), b"\0\0\0\0\x07\0\x01\0a.b");
        assert_eq!(talk.say("a.b", true).unwrap(), [0, 0, 0, 0, 6, 0, 1, 0]);
        assert_eq!(talk.say("a.b", true), None);
        assert!(hear(&mut talk, 0, event::PORT_OPEN, 1) && talk.is_open);
        assert_eq!(talk.say("a.b", false).unwrap(), [0, 0, 0, 0, 6, 0, 0, 0]);
        assert_eq!(talk.say("a.b", false), None);
        assert!(hear(&mut talk, 0, event::PORT_OPEN, 0) && !talk.is_open);
    }

    #[test]
    fn what_makes_no_sense_changes_nothing() {
        let mut talk = Talk::default();
        // Of a port that is not known, of one that there is not, and what only a device says.
        assert!(hear(&mut talk, 0, event::PORT_OPEN, 1) && !talk.is_open);
        for (id, event) in
            [(1, event::PORT_READY), (u32::MAX, event::PORT_OPEN), (0, event::PORT_ADD), (0, 99)]
        {
            assert!(!hear(&mut talk, id, event, 1), "{id} {event}");
        }
        assert_eq!((talk, talk.say("x", true)), (Talk::default(), None));
        // A driver that has failed is told nothing, and one that begins anew is told everything.
        assert!(hear(&mut talk, 0, event::DEVICE_READY, 0) && talk.say("x", true).is_none());
        for _ in 0..1000 {
            assert!(hear(&mut talk, 0, event::DEVICE_READY, 1));
        }
        assert!(talk.say("x", true).is_some() && talk.say("x", true).is_none());
    }
}
