//! Sizes as people write them.

/// A size in MiB: `256M`, `2G`, `256`.
pub fn mebibytes(text: &str) -> Result<u64, String> {
    let expected = || "expected a size like 256M or 2G".to_owned();
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = digits.parse().map_err(|_| expected())?;
    let factor = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" | "M" | "m" => 1,
        "G" | "g" => 1024,
        "T" | "t" => 1 << 20,
        _ => return Err(expected()),
    };
    number.checked_mul(factor).ok_or_else(|| "it does not fit 64 bits".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_mebibytes_unless_they_say_otherwise() {
        for (text, expected) in [("256M", 256), ("2G", 2048), ("64", 64), ("1GiB", 1024), ("0", 0)] {
            assert_eq!(mebibytes(text), Ok(expected));
        }
        for text in ["", "M", "-1", "1.5G", "12K", "1MM", "99999999999999999999", "99999999999999999G"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }
}
