//! The firmware guest (`firmware/`), built with the crate: what `alula run` boots without a kernel.

use crate::error::{Error, Result};

/// A kernel image of this architecture: ELF with a PVH note on x86_64, Image on aarch64.
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/firmware.bin"));

// Lists of words are one text each: of a table of texts, every line is a reference that the loader has to write.
const CASES: &str = "memory tables cpus timer serial exit-register nobody-there identity messages block net entropy vsock \
    balloon pmem hostile hostile-net pvpanic refused features vsock-restored \
    net-restored hotplug slots slots-busy slots-deaf slots-hostile sleep counters watchdog cpu-slots";
const ENDS: &str = "poweroff reset halt crash fail idle spin";
const FLAGS: &str = "hello answer flood booted bench echo";

/// Whether it knows all of these words (`firmware/src/main.rs` has what they do). It would not say so itself:
/// called with words for Linux it ignores them.
pub fn check_words(words: &str) -> Result<()> {
    let refuse = |word: &str, expected: String| {
        Err(Error::config(format!("the firmware guest (--cmdline) does not know `{word}`: {expected}")))
    };
    let has = |list: &str, word: &str| list.split(' ').any(|one| one == word);
    let told = |list: &str| list.replace(' ', ", ");
    for word in words.split_whitespace() {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        let is_number = |value: &str| value.parse::<u32>().is_ok();
        match (name, value) {
            ("cpus" | "memory" | "work" | "touch", Some(value)) if is_number(value) => {}
            ("cpus" | "memory" | "work" | "touch", _) => {
                return refuse(word, format!("expected {name}=NUMBER"));
            }
            ("end", Some(value)) if is_number(value) || has(ENDS, value) => {}
            ("end", _) => return refuse(word, format!("expected end=NUMBER or one of {}", told(ENDS))),
            ("case", Some(value)) if value.split(',').all(|case| has(CASES, case)) => {}
            ("case", _) => {
                return refuse(word, format!("expected case=NAME,NAME with names of {}", told(CASES)));
            }
            (name, None) if has(FLAGS, name) => {}
            _ => {
                let flags = told(FLAGS);
                return refuse(word, format!("expected cpus=, memory=, work=, touch=, case=, end=, {flags}"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_for_the_first_guest_has_all_words() {
        let page = include_str!("../docs/first-guest.md");
        let begun = ["cpus=N", "memory=MIB", "work=MIB", "touch=MIB", "case=NAME,NAME", "end=HOW"];
        let lists = [CASES, ENDS, FLAGS].into_iter().flat_map(str::split_whitespace);
        for word in lists.chain(begun) {
            assert!(page.contains(&format!("`{word}`")), "{word}");
        }
    }

    #[test]
    fn words_that_the_firmware_does_not_know_are_refused() {
        for words in
            ["", "cpus=2  memory=128 end=300", "case=serial,hostile-net echo end=idle", "hello", "touch=2"]
        {
            check_words(words).unwrap();
        }
        for (words, expected) in [
            ("cpu=2", "does not know `cpu=2`: expected cpus="),
            ("cpus=two", "expected cpus=NUMBER"),
            ("memory", "expected memory=NUMBER"),
            ("touch=", "expected touch=NUMBER"),
            ("case=serial,net,", "with names of memory, tables"),
            ("case=serial end=stop", "does not know `end=stop`: expected end=NUMBER or one of poweroff"),
            ("hello=1", "does not know `hello=1`"),
            ("console=ttyS0", "does not know `console=ttyS0`"),
        ] {
            let error = check_words(words).unwrap_err().to_string();
            assert!(error.contains(expected), "{words}: {error}");
        }
    }

    /// The firmware is a program of its own, and its tables cannot be asked for.
    #[test]
    fn the_firmware_has_every_word_that_is_taken() {
        let source =
            concat!(include_str!("../firmware/src/main.rs"), include_str!("../firmware/src/cases.rs"),);
        for word in [CASES, ENDS, FLAGS].iter().flat_map(|list| list.split(' ')) {
            assert!(source.contains(&format!("\"{word}\"")), "{word}");
        }
        let cases = source.matches(", devices::").count() + source.matches(", hostile").count();
        assert!(cases >= 5, "the tables of cases are elsewhere");
    }
}
