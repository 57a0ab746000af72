//! Frames in a stream, as passt and QEMU's stream sockets have them: a length of 32 bits, big-endian,
//! then so many bytes. Both ends are separate processes: what comes is believed as little as a guest.

use crate::error::{Error, Result};

/// The length before each frame.
pub const PREFIX: usize = 4;
/// The shortest frame: an Ethernet header.
pub const FRAME_MIN: usize = 14;
/// The longest: 64 KiB of IP with an Ethernet header and a VLAN tag. A longer one would have to be
/// kept while it comes, gigabytes of it.
pub const FRAME_MAX: usize = 65535 + 14 + 4;
/// What is read ahead: at least one frame, whatever its place; two, so that a frame half there does
/// not cut the next read short.
const AHEAD: usize = 2 * (PREFIX + FRAME_MAX);

/// What goes before a frame of `length` bytes.
pub fn prefix(length: usize) -> [u8; PREFIX] {
    u32::try_from(length).expect("a frame is at most FRAME_MAX bytes").to_be_bytes()
}

/// Cuts a stream into frames: bytes go in by [`Decoder::room`] and [`Decoder::filled`], however they
/// come, frames come out by [`Decoder::frame`] and [`Decoder::done`].
pub struct Decoder {
    bytes: Box<[u8]>,
    /// What was read and not yet taken is between the two.
    start: usize,
    end: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { bytes: vec![0; AHEAD].into(), start: 0, end: 0 }
    }
}

impl Decoder {
    /// Where the next bytes of the stream go; never empty once all frames were taken.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.start < PREFIX + FRAME_MAX {
            // The frame that has begun would not fit where it is.
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// So many bytes were put into the room.
    pub fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(self.bytes.len());
    }

    /// The next frame, if all of it is there. An error: the stream is no stream of frames, and cannot
    /// be read any further.
    pub fn frame(&self) -> Result<Option<&[u8]>> {
        let Some((prefix, rest)) = self.bytes[self.start..self.end].split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*prefix) as usize;
        if !(FRAME_MIN..=FRAME_MAX).contains(&length) {
            return Err(Error::host(format!("it sent a frame of {length} bytes")));
        }
        Ok(rest.get(..length))
    }

    /// The frame that [`Self::frame`] gives was taken.
    pub fn done(&mut self) {
        if let Ok(Some(frame)) = self.frame() {
            self.start += PREFIX + frame.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(seed: u8, length: usize) -> Vec<u8> {
        (0..length).map(|index| (index as u8).wrapping_mul(7) ^ seed).collect()
    }

    /// Feeds `stream` in pieces of at most `piece` bytes, and takes what comes out.
    fn cut(stream: &[u8], piece: usize) -> Result<Vec<Vec<u8>>> {
        let (mut decoder, mut frames, mut rest) = (Decoder::default(), Vec::new(), stream);
        while !rest.is_empty() {
            let room = decoder.room();
            let count = piece.min(room.len()).min(rest.len());
            assert!(count > 0, "no room though all frames were taken");
            room[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            decoder.filled(count);
            while let Some(frame) = decoder.frame()? {
                frames.push(frame.to_owned());
                decoder.done();
            }
        }
        Ok(frames)
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_the_stream_is_cut() {
        let lengths = [14, 60, 1514, FRAME_MAX, 15, FRAME_MAX, FRAME_MAX - 1, 100, 14];
        let frames: Vec<_> =
            lengths.iter().enumerate().map(|(at, length)| frame(at as u8, *length)).collect();
        let with_prefix = |frame: &Vec<u8>| [&prefix(frame.len())[..], frame].concat();
        let stream: Vec<u8> = frames.iter().flat_map(with_prefix).collect();
        for piece in [1, 3, 4, 5, 1000, 65536, usize::MAX] {
            assert!(cut(&stream, piece).unwrap() == frames, "{piece}");
        }
    }

    #[test]
    fn half_a_frame_is_no_frame() {
        assert!(cut(&[], 1).unwrap().is_empty());
        let stream = [&prefix(20)[..], &[0; 19]].concat();
        assert!(cut(&stream, 7).unwrap().is_empty());
    }

    #[test]
    fn lengths_that_no_frame_has_end_the_stream() {
        for length in [0, 13, FRAME_MAX as u32 + 1, u32::MAX] {
            let error = cut(&[&length.to_be_bytes()[..], &[0; 50]].concat(), 9).unwrap_err().to_string();
            assert_eq!(error, format!("it sent a frame of {length} bytes"));
        }
    }
}
