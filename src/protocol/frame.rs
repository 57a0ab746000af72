//! The frames of the agent's protocol (docs/agent.md): a type, a length of 3 bytes, and so many bytes.

use crate::error::{Error, Result};

/// The bytes before a frame's content.
pub const HEAD: usize = 4;
/// The content of a frame. A peer that announces more must not make us keep it.
pub const CONTENT_MAX: usize = 64 << 10;
/// The content of a request: arguments and environment of a program.
pub const REQUEST_MAX: usize = 256 << 10;
/// The most bytes of input that may be on the way: the agent has not said yet that it has taken them.
pub const INPUT_WINDOW: usize = 256 << 10;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Type {
    /// The client's first: JSON.
    Request = 1,
    /// Bytes for standard input.
    Input = 2,
    /// The end of standard input.
    InputEnd = 3,
    /// One byte: a signal's number.
    Signal = 4,
    /// Rows and columns of the terminal, two bytes each.
    Window = 5,
    /// The agent's first: JSON.
    Greeting = 129,
    /// Bytes of standard output.
    Output = 130,
    /// Bytes of standard error.
    Errors = 131,
    /// Four bytes: so many more bytes of input were taken.
    Taken = 132,
    /// Two bytes: 0 and an exit code, or 1 and a signal.
    Exited = 133,
    /// One byte, as [`Failure`], and why in words.
    Failed = 134,
}

impl Type {
    fn of(byte: u8) -> Option<Self> {
        use Type::*;
        [Request, Input, InputEnd, Signal, Window, Greeting, Output, Errors, Taken, Exited, Failed]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    /// How many bytes such a frame may have, and must have at least.
    fn lengths(self) -> (usize, usize) {
        match self {
            Self::Request | Self::Greeting => (0, REQUEST_MAX),
            Self::Input | Self::Output | Self::Errors => (0, CONTENT_MAX),
            Self::InputEnd => (0, 0),
            Self::Signal => (1, 1),
            Self::Window | Self::Taken => (4, 4),
            Self::Exited => (2, 2),
            Self::Failed => (1, CONTENT_MAX),
        }
    }
}

/// Why a program did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Failure {
    /// Another reason.
    Other = 0,
    /// There is no such program.
    NotFound = 1,
    /// There is one, and it cannot be executed.
    NotExecutable = 2,
}

/// The head of a frame.
pub fn head(kind: Type, length: usize) -> [u8; HEAD] {
    debug_assert!(length <= REQUEST_MAX);
    let [a, b, c, _] = (length as u32).to_le_bytes();
    [kind as u8, a, b, c]
}

/// Appends a whole frame.
pub fn put(out: &mut Vec<u8>, kind: Type, content: &[u8]) {
    out.extend_from_slice(&head(kind, content.len()));
    out.extend_from_slice(content);
}

/// The first frame in `bytes`, and how many of them it takes; none: there is not all of it yet. The error says
/// what is wrong with it.
pub fn first(bytes: &[u8]) -> Result<Option<(Type, &[u8], usize)>> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else { return Ok(None) };
    let [kind, a, b, c] = *head;
    let length = u32::from_le_bytes([a, b, c, 0]) as usize;
    let kind = Type::of(kind).ok_or_else(|| Error::guest(format!("a frame of the unknown type {kind}")))?;
    let (least, most) = kind.lengths();
    if !(least..=most).contains(&length) {
        return Err(Error::guest(format!(
            "a frame of type {} and {length} bytes: it has {least} to {most}",
            kind as u8
        )));
    }
    Ok(rest.get(..length).map(|content| (kind, content, HEAD + length)))
}

/// Bytes as they come, cut into frames. It keeps at most one frame that is not whole, and what one read brought.
#[derive(Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    used: usize,
}

impl Inbox {
    /// More of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.used));
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    pub fn pop(&mut self) -> Result<Option<(Type, &[u8])>> {
        match first(&self.bytes[self.used..])? {
            Some((kind, content, length)) => {
                self.used += length;
                Ok(Some((kind, content)))
            }
            None => Ok(None),
        }
    }

    /// Lets go of memory that is not needed.
    pub fn shrink(&mut self) {
        if self.used == self.bytes.len() {
            (self.bytes, self.used) = (Vec::new(), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_the_same_wherever_the_stream_is_cut() {
        let mut stream = Vec::new();
        let frames = [
            (Type::Request, vec![b'{'; REQUEST_MAX]),
            (Type::Input, vec![7; CONTENT_MAX]),
            (Type::InputEnd, vec![]),
            (Type::Exited, vec![0, 3]),
        ];
        frames.iter().for_each(|(kind, content)| put(&mut stream, *kind, content));
        for piece in [1, 3, 4, 5, 4096, 65537, stream.len()] {
            let (mut inbox, mut seen) = (Inbox::default(), Vec::new());
            for bytes in stream.chunks(piece) {
                inbox.push(bytes);
                while let Some((kind, content)) = inbox.pop().unwrap() {
                    seen.push((kind, content.to_vec()));
                }
                inbox.shrink();
            }
            assert!(seen == frames, "cut into {piece}");
            assert_eq!(inbox.bytes.capacity(), 0);
        }
    }

    #[test]
    fn a_wrong_frame_is_refused_by_its_head_alone() {
        for (kind, length, told) in [
            (Type::Input as u8, CONTENT_MAX + 1, "a frame of type 2 and 65537 bytes: it has 0 to 65536"),
            (Type::Request as u8, REQUEST_MAX + 1, "a frame of type 1 and 262145 bytes: it has 0 to 262144"),
            (Type::Exited as u8, 3, "a frame of type 133 and 3 bytes: it has 2 to 2"),
            (Type::Failed as u8, 0, "a frame of type 134 and 0 bytes: it has 1 to 65536"),
            (Type::Output as u8, 0xff_ffff, "and 16777215 bytes"),
            (0, 0, "a frame of the unknown type 0"),
            (99, 1, "a frame of the unknown type 99"),
        ] {
            let [a, b, c, _] = (length as u32).to_le_bytes();
            let error = first(&[kind, a, b, c]).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
        assert!(first(&[2, 0, 0]).unwrap().is_none());
    }
}
