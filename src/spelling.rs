//! What a misspelled word was meant to be.

/// A longer word is none of those that anybody expects: comparing costs the product of two lengths.
const LENGTH_MAX: usize = 40;
/// A beginning of so many letters stands for the word that begins so.
const BEGINNING_MIN: usize = 3;

/// Of `words`, the one that `word` most likely was meant to be; none: it is like none of them.
pub fn nearest<'w>(word: &str, words: impl IntoIterator<Item = &'w str>) -> Option<&'w str> {
    if word.len() > LENGTH_MAX {
        return None;
    }
    let begins = |one: &str, other: &str| one.len() >= BEGINNING_MIN && other.starts_with(one);
    let edits_max = (word.len() / 3).max(1);
    let like = words.into_iter().filter_map(|other| {
        let edits = edits(word.as_bytes(), other.as_bytes());
        let is_like = edits <= edits_max || begins(word, other) || begins(other, word);
        is_like.then_some((edits, other))
    });
    like.min_by_key(|(edits, _)| *edits).map(|(_, other)| other)
}

/// `message`, and what was meant instead of `word`, if that can be told.
pub fn with_hint<'w>(message: String, word: &str, words: impl IntoIterator<Item = &'w str>) -> String {
    match nearest(word, words) {
        Some(meant) => format!("{message} (is `{meant}` meant?)"),
        None => message,
    }
}

/// How many bytes must be put in, taken away, replaced or swapped with the next one.
fn edits(one: &[u8], other: &[u8]) -> usize {
    let mut rows = vec![vec![0; other.len() + 1]; one.len() + 1];
    for row in 0..=one.len() {
        for column in 0..=other.len() {
            rows[row][column] = if row == 0 || column == 0 {
                row + column
            } else {
                let differs = usize::from(one[row - 1] != other[column - 1]);
                let replaced = rows[row - 1][column - 1] + differs;
                let is_swapped = row > 1
                    && column > 1
                    && one[row - 1] == other[column - 2]
                    && one[row - 2] == other[column - 1];
                let swapped = if is_swapped { rows[row - 2][column - 2] + 1 } else { usize::MAX };
                replaced.min(rows[row - 1][column] + 1).min(rows[row][column - 1] + 1).min(swapped)
            };
        }
    }
    rows[one.len()][other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelled_word_is_taken_for_the_nearest_one() {
        let words = ["boot-source", "drives", "--disk", "--cpus", "--config-file", "run", "metrics"];
        for (word, expected) in [
            ("boot_source", Some("boot-source")),
            ("drive", Some("drives")),
            ("--dsik", Some("--disk")),
            ("--cpu", Some("--cpus")),
            ("--config", Some("--config-file")),
            ("rnu", Some("run")),
            ("metrics-path", Some("metrics")),
            ("dance", None),
            ("", None),
            (&"x".repeat(10_000), None),
        ] {
            assert_eq!(nearest(word, words), expected, "{word}");
        }
        assert_eq!(edits(b"kitten", b"sitting"), 3);
    }
}
