//! passt's end of the stream: frames come out as they went in however the stream is cut, up to the first
//! length that no frame has; what is kept of it has a limit.

use alula::devices::net::framing::{Decoder, FRAME_MAX, FRAME_MIN, PREFIX, prefix};
use arbitrary::Unstructured;

const PARTS_MAX: usize = 8;
const ROOM_MAX: usize = 2 * (PREFIX + FRAME_MAX);

pub fn run(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let pieces: [u16; 4] = bytes.arbitrary().unwrap_or_default();
    let stream = stream(&mut bytes).expect("numbers end as zeros");
    let mut expected = stream.as_slice();
    let mut decoder = Decoder::default();
    let mut rest = stream.as_slice();
    for piece in pieces.into_iter().cycle() {
        // All frames were taken: there is room.
        let room = decoder.room();
        assert!(!room.is_empty() && room.len() <= ROOM_MAX);
        let count = (usize::from(piece) + 1).min(room.len()).min(rest.len());
        room[..count].copy_from_slice(&rest[..count]);
        rest = &rest[count..];
        decoder.filled(count);
        let arrived = expected.len() - rest.len();
        match take(&mut decoder, &mut expected, arrived) {
            true if !rest.is_empty() => {}
            _ => return,
        }
    }
}

/// A stream, sound or not.
fn stream(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Vec<u8>> {
    let mut stream = Vec::new();
    for _ in 0..PARTS_MAX {
        if bytes.is_empty() {
            break;
        }
        let (kind, length) = (bytes.arbitrary::<u8>()? % 4, usize::from(bytes.arbitrary::<u16>()?));
        match kind {
            0 | 1 => {
                // Short ones, and those around the longest.
                let length = if kind == 0 { FRAME_MIN + length % 100 } else { FRAME_MAX - length % 8 };
                let first = bytes.arbitrary::<u8>()?;
                stream.extend(prefix(length));
                stream.extend((0..length).map(|index| first.wrapping_add(index as u8)));
            }
            2 => stream.extend(bytes.arbitrary::<u32>()?.to_be_bytes()),
            _ => stream.extend(bytes.bytes((length % 64).min(bytes.len()))?),
        }
    }
    Ok(stream)
}

/// Takes the frames that are there, which must be those of `expected`, of which so much has arrived; false:
/// the stream is none.
fn take(decoder: &mut Decoder, expected: &mut &[u8], mut arrived: usize) -> bool {
    loop {
        let whole = expected[..arrived].split_first_chunk::<PREFIX>();
        let length = whole.map(|(prefix, _)| u32::from_be_bytes(*prefix) as usize);
        let is_frame = length.is_none_or(|length| (FRAME_MIN..=FRAME_MAX).contains(&length));
        let frame = length.filter(|length| PREFIX + length <= arrived);
        match decoder.frame() {
            Err(_) => {
                assert!(!is_frame);
                return false;
            }
            Ok(None) => {
                assert!(is_frame && frame.is_none());
                return true;
            }
            Ok(Some(found)) => {
                let length = frame.expect("the frame has arrived");
                assert!(is_frame && found == &expected[PREFIX..PREFIX + length]);
                decoder.done();
                (*expected, arrived) = (&expected[PREFIX + length..], arrived - PREFIX - length);
            }
        }
    }
}
