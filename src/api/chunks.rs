//! A request body that comes in chunks (RFC 9112, 7.1): taken apart where it lies, as it comes.

use super::http::too_large;

/// A line with a chunk's size and extensions is longer in no client's request: more would have to be kept
/// until it ends.
const LINE_MAX: usize = 256;
/// Trailers, which nobody here needs, have at most so many bytes in all.
const TRAILERS_MAX: usize = 1024;

/// The part of a chunked body that is read next.
enum Next {
    /// A line with the size of a chunk.
    Size,
    /// The data of a chunk, of which this many bytes have not come yet.
    Data(usize),
    /// The end of the line after a chunk.
    DataEnd,
    /// Trailers, of which so many bytes have come, and an empty line.
    Trailers(usize),
}

/// Where a body is being put together: in the connection's input, right behind the request's head.
pub struct Chunks {
    head: usize,
    length: usize,
    next: Next,
}

impl Chunks {
    /// A body whose first chunk begins at `head`.
    pub fn new(head: usize) -> Self {
        Self { head, length: 0, next: Next::Size }
    }

    /// The length of the body so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Takes in what has come; true: that was the end, and the body lies behind the head, followed by
    /// what came after it. Of an unfinished body `input` keeps the head, the data and at most one line.
    pub fn advance(&mut self, input: &mut Vec<u8>, body_max: usize) -> Result<bool, String> {
        let mut at = self.head + self.length;
        let is_whole = loop {
            let rest = &input[at..];
            match self.next {
                Next::Size => match httparse::parse_chunk_size(rest) {
                    Ok(httparse::Status::Complete((line, size))) if is_size(&rest[..line]) => {
                        at += line;
                        if size > (body_max - self.length) as u64 {
                            return Err(too_large(size.saturating_add(self.length as u64), body_max));
                        }
                        self.next = if size == 0 { Next::Trailers(0) } else { Next::Data(size as usize) };
                    }
                    Ok(httparse::Status::Partial) if rest.len() <= LINE_MAX => break false,
                    _ => return Err("Invalid chunk: its size cannot be read.".to_owned()),
                },
                Next::Data(left) => {
                    let count = left.min(rest.len());
                    input.copy_within(at..at + count, self.head + self.length);
                    (at, self.length) = (at + count, self.length + count);
                    if count < left {
                        self.next = Next::Data(left - count);
                        break false;
                    }
                    self.next = Next::DataEnd;
                }
                Next::DataEnd => match rest {
                    [b'\r', b'\n', ..] => (at, self.next) = (at + 2, Next::Size),
                    [] | [b'\r'] => break false,
                    _ => return Err("Invalid chunk: it is longer than its size.".to_owned()),
                },
                Next::Trailers(seen) => match rest.iter().position(|byte| *byte == b'\n') {
                    Some(end) => {
                        let is_empty = [&b"\r\n"[..], b"\n"].contains(&&rest[..=end]);
                        at += end + 1;
                        if is_empty {
                            break true;
                        }
                        self.next = Next::Trailers(seen + end + 1);
                        if seen + end >= TRAILERS_MAX {
                            return Err(format!("The trailers have more than {TRAILERS_MAX} bytes."));
                        }
                    }
                    None if seen + rest.len() < TRAILERS_MAX => break false,
                    None => return Err(format!("The trailers have more than {TRAILERS_MAX} bytes.")),
                },
            }
        };
        input.drain(self.head + self.length..at);
        Ok(is_whole)
    }
}

/// Whether this line, which the parser has accepted, is one to everybody: it has a digit, since no digit at
/// all would be the end of the body, and its only line feed is its last byte. Somebody between the client
/// and us who reads it in another way would see other requests than we do.
fn is_size(line: &[u8]) -> bool {
    let is_one = line.iter().position(|byte| *byte == b'\n') == Some(line.len() - 1);
    is_one && line[0].is_ascii_hexdigit() && line.len() <= LINE_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &[u8] = b"head";

    /// A body, and what followed it.
    type Whole = (Vec<u8>, Vec<u8>);

    /// Reads `body` in pieces of `step` bytes; none: the body has no end.
    fn read(body: &[u8], step: usize) -> Result<Option<Whole>, String> {
        let (mut chunks, mut input) = (Chunks::new(HEAD.len()), HEAD.to_vec());
        let mut rest = body;
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(step.min(rest.len()));
            (rest, input) = (more, [&input[..], piece].concat());
            if chunks.advance(&mut input, 100)? {
                let end = HEAD.len() + chunks.length();
                return Ok(Some((input[HEAD.len()..end].to_vec(), [&input[end..], rest].concat())));
            }
            assert!(input.len() <= HEAD.len() + 100 + TRAILERS_MAX + step, "{} bytes are kept", input.len());
        }
        Ok(None)
    }

    #[test]
    fn a_body_is_the_same_wherever_its_bytes_are_cut() {
        for (body, expected) in [
            ("0\r\n\r\nGET", ""),
            ("5\r\nhello\r\n0\r\n\r\nGET", "hello"),
            ("2;name=value\r\nhe\r\n003\r\nllo\r\n0\r\nTrailer: x\r\n\r\nGET", "hello"),
            ("a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\nGET", "01234567890123456789"),
        ] {
            for step in [1, 2, 3, 7, 100] {
                let (found, rest) = read(body.as_bytes(), step).unwrap().unwrap();
                assert_eq!((&found[..], &rest[..]), (expected.as_bytes(), &b"GET"[..]), "{body} {step}");
            }
            for end in 0..body.len() - 5 {
                assert_eq!(read(&body.as_bytes()[..end], 1), Ok(None), "{body} {end}");
            }
        }
    }

    #[test]
    fn a_body_that_lies_or_does_not_end_is_refused() {
        let whole = format!("64\r\n{}\r\n0\r\n\r\n", "x".repeat(100));
        assert_eq!(read(whole.as_bytes(), 9).unwrap().unwrap().0.len(), 100);
        let long = "x".repeat(LINE_MAX + 10);
        for (body, expected) in [
            ("65\r\n", "Request payload with size 101 is larger than the limit of 100"),
            ("32\r\n", ""),
            ("ffffffffffffffff\r\n", "is larger than the limit of 100"),
            ("10000000000000000\r\n", "its size cannot be read"),
            ("-1\r\n", "its size cannot be read"),
            ("x\r\n", "its size cannot be read"),
            ("2\r\nabc\r\n", "it is longer than its size"),
            ("\r\n", "its size cannot be read"),
            (" \r\n", "its size cannot be read"),
            (";name=value\r\n", "its size cannot be read"),
            ("2;a\nhe\r\n0\r\n\r\n", "its size cannot be read"),
            ("2\nhe\r\n", "its size cannot be read"),
            (&format!("1;{long}"), "its size cannot be read"),
            (&format!("1;{long}\r\nx\r\n0\r\n\r\n"), "its size cannot be read"),
            (&format!("0\r\n{}", "a: b\r\n".repeat(TRAILERS_MAX)), "The trailers have more than 1024 bytes."),
            (&format!("0\r\n{}", "a".repeat(TRAILERS_MAX + 1)), "The trailers have more than 1024 bytes."),
        ] {
            for step in [1, 4096] {
                let error = read(body.as_bytes(), step).err().unwrap_or_default();
                assert!(error.contains(expected), "{body}: {error}");
            }
        }
        // A body of small chunks is refused at the chunk that makes the body too large.
        let many = "32\r\n".to_owned() + &"x".repeat(50) + "\r\n33\r\n";
        assert!(read(many.as_bytes(), 1).unwrap_err().contains("size 101 is larger"));
    }
}
