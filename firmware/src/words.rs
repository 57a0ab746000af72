//! The command line, word by word.

/// The words of a command line.
pub struct Words(pub &'static [u8]);

impl Words {
    fn all(&self) -> impl Iterator<Item = &'static [u8]> {
        self.0.split(|byte| *byte == b' ')
    }

    /// Whether `word` is there.
    pub fn has(&self, word: &str) -> bool {
        self.all().any(|other| other == word.as_bytes())
    }

    /// What follows `NAME=`.
    pub fn value(&self, name: &str) -> Option<&'static [u8]> {
        self.all().find_map(|word| word.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
    }
}

/// A decimal number.
pub fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    let mut number = 0u64;
    for byte in text {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        number = number * 10 + u64::from(digit);
    }
    Some(number)
}
