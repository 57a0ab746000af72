//! The guest kernel's command line, read as Linux reads it (lib/cmdline.c, `next_arg`).
//!
//! Words end at white space that is not in quotes. A lone `--` ends what is for the kernel: the rest is
//! for the guest's first program.

use crate::arch;
use crate::config::{BootSource, Config};

/// The line for the guest of `config`: what the configuration says, and what it leaves to us; for the
/// firmware guest, what it needs to check what it finds.
pub fn command_line(config: &Config) -> String {
    let machine = &config.machine_config;
    let Some(source) = &config.boot_source else {
        let words = config.firmware_words.as_deref().unwrap_or_default();
        return format!("cpus={} memory={} {words}", machine.vcpu_count, machine.mem_size_mib);
    };
    let line = source.boot_args.as_deref().unwrap_or(BootSource::DEFAULT_BOOT_ARGS);
    let root = config.root_words();
    let no_pci = arch::no_pci_words().filter(|_| !config.pci);
    root.as_deref().into_iter().chain(no_pci).fold(line.to_owned(), |line, more| with(&line, more))
}

/// `line` with the words of `more` for the kernel, unless they stand there already, one after the other.
fn with(line: &str, more: &str) -> String {
    let words: Vec<_> = Words(line.as_bytes(), 0).collect();
    // Words that follow an open quote would be in it.
    let end = words.iter().position(|word| word.quote_is_open || word.is(b"--")).unwrap_or(words.len());
    let wanted: Vec<_> = more.split(' ').map(str::as_bytes).collect();
    let there = words[..end]
        .windows(wanted.len())
        .any(|some| some.iter().zip(&wanted).all(|(word, wanted)| word.is(wanted)));
    if there {
        return line.to_owned();
    }
    // A word can begin inside a character, as Linux takes the byte 0xa0 for white space.
    let place = words.get(end).map_or(line.len(), |word| line.floor_char_boundary(word.start));
    let (kernel, rest) = line.split_at(place);
    [kernel.trim_end_matches(' '), more, rest]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// A word of a command line.
struct Word<'a> {
    start: usize,
    bytes: &'a [u8],
    quote_is_open: bool,
}

impl Word<'_> {
    /// Whether Linux takes the word for `wanted`: quotes round all of it, or round what follows the
    /// first `=`, are no part of it.
    fn is(&self, wanted: &[u8]) -> bool {
        let (name, value) = match self.bytes.iter().position(|byte| *byte == b'=') {
            Some(equals) if equals > 0 => self.bytes.split_at(equals + 1),
            _ => (self.bytes, &[][..]),
        };
        let opened = |part: &[u8]| part.first() == Some(&b'"');
        let quoted = opened(name) || opened(value);
        let closed = quoted && self.bytes.len() > 1 && self.bytes.ends_with(b"\"");
        let unquoted = |part: &'_ [u8]| usize::from(opened(part));
        let (from_name, from_value) = (&name[unquoted(name)..], &value[unquoted(value)..]);
        let whole = from_name.iter().chain(from_value);
        let length = from_name.len() + from_value.len() - usize::from(closed);
        length == wanted.len() && whole.take(length).eq(wanted)
    }
}

/// The words of a line, from a place on.
struct Words<'a>(&'a [u8], usize);

impl<'a> Iterator for Words<'a> {
    type Item = Word<'a>;

    fn next(&mut self) -> Option<Word<'a>> {
        let Self(line, place) = self;
        let start = *place + line[*place..].iter().position(|byte| !is_space(*byte))?;
        let mut quote_is_open = false;
        let mut end = start;
        while let Some(byte) = line.get(end).filter(|byte| quote_is_open || !is_space(**byte)) {
            quote_is_open ^= *byte == b'"';
            end += 1;
        }
        *place = end;
        Some(Word { start, bytes: &line[start..end], quote_is_open })
    }
}

/// What Linux' `isspace` takes for white space (lib/ctype.c), which counts in Latin-1.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r' | 0xa0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_the_kernel_stand_before_those_for_init() {
        for (line, expected) in [
            ("", "pci=off"),
            ("quiet", "quiet pci=off"),
            ("quiet ", "quiet pci=off"),
            ("quiet -- a b", "quiet pci=off -- a b"),
            ("-- a", "pci=off -- a"),
            ("quiet --", "quiet pci=off --"),
            ("--", "pci=off --"),
            ("quiet\t--\ta", "quiet\t pci=off --\ta"),
            ("quiet\n-- a -- b", "quiet\n pci=off -- a -- b"),
            ("quiet \"--\" a", "quiet pci=off \"--\" a"),
            ("quiet\u{a0}-- a", "quiet\u{a0} pci=off -- a"),
            // Not a lone `--`.
            ("a=-- --b b--", "a=-- --b b-- pci=off"),
            ("a=\"x -- y\"", "a=\"x -- y\" pci=off"),
            ("\"a -- b\" c", "\"a -- b\" c pci=off"),
            // Nothing can follow an open quote.
            ("quiet a=\"b -- c", "quiet pci=off a=\"b -- c"),
            ("\u{2800}\"a", "pci=off \u{2800}\"a"),
        ] {
            assert_eq!(with(line, "pci=off"), expected, "{line:?}");
        }
    }

    #[test]
    fn words_that_are_there_are_not_said_again() {
        for line in ["pci=off", "a pci=off b", "pci=\"off\"", "\"pci=off\"", "a\tpci=off\n-- b"] {
            assert_eq!(with(line, "pci=off"), line);
        }
        for line in
            ["x.pci=off", "pci=offer", "-- pci=off", "a=\"pci=off\"", "\"x pci=off\"", "pci=", "pci=off\"x\""]
        {
            assert_ne!(with(line, "pci=off"), line);
        }
        assert_eq!(with("rw root=/dev/vda  rw", "root=/dev/vda rw"), "rw root=/dev/vda  rw");
        assert_eq!(with("root=/dev/vda ro", "root=/dev/vda rw"), "root=/dev/vda ro root=/dev/vda rw");
        assert_eq!(with("xroot=/dev/vda rw", "root=/dev/vda rw"), "xroot=/dev/vda rw root=/dev/vda rw");
    }

    #[test]
    fn the_root_device_and_a_bus_that_is_not_there_are_named() {
        let line = |boot_args: &str, pci: bool| {
            let text = format!(
                r#"{{"boot-source": {{"kernel_image_path": "k", "boot_args": {boot_args}}},
                "drives": [{{"drive_id": "a", "path_on_host": "a", "is_root_device": true}}]}}"#
            );
            let mut config = Config::parse(text.as_bytes()).unwrap();
            config.pci = pci;
            command_line(&config)
        };
        let no_pci = arch::no_pci_words().map(|words| format!(" {words}")).unwrap_or_default();
        assert_eq!(line(r#""quiet""#, false), format!("quiet root=/dev/vda rw{no_pci}"));
        let text = r#"{"boot-source": {"kernel_image_path": "k", "boot_args": "quiet"},
            "pmem": [{"id": "a", "path_on_host": "a"},
                     {"id": "b", "path_on_host": "b", "root_device": true, "read_only": true}]}"#;
        let mut config = Config::parse(text.as_bytes()).unwrap();
        config.pci = true;
        assert_eq!(command_line(&config), "quiet root=/dev/pmem0 ro");
        // The device whose number that is comes first.
        assert_eq!(config.devices().next().unwrap().id(), "b");
        assert_eq!(line(r#""quiet -- a b""#, false), format!("quiet root=/dev/vda rw{no_pci} -- a b"));
        assert_eq!(line(r#""root=/dev/vda rw pci=off""#, true), "root=/dev/vda rw pci=off");
        assert_eq!(
            line("null", true),
            "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce \
             root=/dev/vda rw"
        );
    }
}
