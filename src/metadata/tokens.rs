//! Tokens: what a guest shows to prove that it could send a PUT. Nothing is kept of a token: it says itself until
//! when it holds, and a keyed hash over that proves who issued it. So a guest can ask for any number of them.

use std::hash::Hasher;
use std::time::Duration;

use siphasher::sip128::{Hasher128, SipHasher24};

/// The longest that a token holds, in seconds.
pub const TTL_MAX: u64 = 21_600;
/// Bytes of a token: its end in milliseconds, and the hash.
const SIZE: usize = 8 + 16;

/// What issues the tokens of one interface, and knows them again: none of another interface, whose key is another.
pub struct Tokens {
    key: [u8; 16],
}

impl Tokens {
    /// With a `key` that nobody can guess.
    pub fn new(key: [u8; 16]) -> Self {
        Self { key }
    }

    fn hash(&self, end: [u8; 8]) -> [u8; 16] {
        let mut hasher = SipHasher24::new_with_key(&self.key);
        hasher.write(&end);
        hasher.finish128().as_u128().to_le_bytes()
    }

    /// A token that holds for `ttl` seconds from `now` on, by the same clock as for [`Self::is_valid`].
    pub fn issue(&self, ttl: u64, now: Duration) -> String {
        let end = (now + Duration::from_secs(ttl)).as_millis() as u64;
        let end = end.to_le_bytes();
        end.iter().chain(&self.hash(end)).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether `token` was issued here and holds at `now`.
    pub fn is_valid(&self, token: &[u8], now: Duration) -> bool {
        let Some((end, hash)) = parse(token) else { return false };
        // All bytes are compared, so that the time this takes tells nothing of where they differ.
        let differs =
            self.hash(end).iter().zip(hash).fold(0, |differs, (own, other)| differs | (own ^ other));
        differs == 0 && now.as_millis() < u128::from(u64::from_le_bytes(end))
    }
}

fn parse(token: &[u8]) -> Option<([u8; 8], [u8; 16])> {
    let mut bytes = [0; SIZE];
    if token.len() != 2 * SIZE || !token.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(token.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    let (end, hash) = bytes.split_first_chunk()?;
    Some((*end, hash.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_holds_as_long_as_it_says_and_only_here() {
        let (tokens, others) = (Tokens::new([7; 16]), Tokens::new([8; 16]));
        let at = Duration::from_secs;
        let token = tokens.issue(60, at(100));
        for (now, expected) in [(0, true), (100, true), (159, true), (160, false), (1_000_000, false)] {
            assert_eq!(tokens.is_valid(token.as_bytes(), at(now)), expected, "{now}");
        }
        assert!(!others.is_valid(token.as_bytes(), at(100)));
        let longer = Tokens::new([7; 16]).issue(TTL_MAX, at(100));
        let forged = [&longer[..16], &token[16..]].concat();
        for wrong in
            ["", "x", &token[1..], &format!("{token}00"), &forged, &token.replace('0', "é"), &"z".repeat(48)]
        {
            assert!(!tokens.is_valid(wrong.as_bytes(), at(100)), "{wrong}");
        }
        for byte in 0..token.len() {
            let mut wrong = token.clone().into_bytes();
            wrong[byte] = if wrong[byte] == b'0' { b'1' } else { b'0' };
            assert!(!tokens.is_valid(&wrong, at(100)), "digit {byte}");
        }
    }
}
