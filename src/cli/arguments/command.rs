//! What `alula run` is told of a command to run in the guest: its options, and the root file system it finds.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lexopt::ValueExt;

use super::exec::{is_of_run, take_of_run, time};
use super::value;
use crate::protocol::request::Run;
use crate::units::mebibytes;

/// The options, for the help.
pub const HELP: &str = "
Options for a command in the guest (docs/test-rigs.md):
      --rootfs IMAGE[,rw]|FOLDER
                         The guest's root: a file system image, read-only with memory over it unless
                         `rw` is said, or what is in a folder [default: nothing but the agent's folders]
      --kernel FILE      The kernel, as KERNEL says it [default: $ALULA_KERNEL, or what
                         `alula kernel fetch` got]
      --copy HOST[:GUEST]
                         Copy this file or folder into the guest before, to the same path unless GUEST,
                         with a slash before, is given. May be repeated
      --copy-out GUEST:HOST
                         Copy it out of the guest after. GUEST has a slash before. May be repeated
      --env NAME[=VALUE] Set a variable; without a value, to what it is here. May be repeated
      --workdir FOLDER   The folder in the guest to start in [default: the user's home]
      --user USER[:GROUP]
                         Who runs it there, by name or number [default: root]
      --timeout TIME     End it after that time: 30s, 5m, 500ms
      --keep-owner       Files of a FOLDER keep their owners in the guest; else they are root's
      --cache-limit SIZE Room on this machine for images that folders too large for a quarter of the
                         guest's memory are packed into (`alula cache`) [default: 10G]
";

/// A command, and what it finds.
#[derive(Debug, Default)]
pub struct Wanted {
    pub run: Run,
    pub rootfs: Option<Rootfs>,
    /// From this machine, into the guest.
    pub copies: Vec<(PathBuf, PathBuf)>,
    /// From the guest, to this machine.
    pub copies_out: Vec<(PathBuf, PathBuf)>,
    pub timeout: Option<Duration>,
    pub keep_owners: bool,
    pub cache_limit_mib: Option<u64>,
    /// An option that is for a command was given.
    option: Option<&'static str>,
}

/// Where the guest's root file system is.
#[derive(Clone, Debug, PartialEq)]
pub struct Rootfs {
    pub path: PathBuf,
    pub writable: bool,
}

impl Wanted {
    /// The option of this name, if it is one of these.
    pub fn named(name: &str) -> Option<&'static str> {
        ["rootfs", "copy", "copy-out", "timeout", "keep-owner", "cache-limit", "env", "workdir", "user"]
            .into_iter()
            .find(|other| *other == name)
    }

    /// Whether it may be given again.
    pub fn may_be_repeated(name: &str) -> bool {
        ["copy", "copy-out", "env"].contains(&name)
    }

    /// Takes such an option.
    pub fn take(&mut self, name: &'static str, parser: &mut lexopt::Parser) -> Result<(), lexopt::Error> {
        self.option = Some(name);
        match name {
            "rootfs" => self.rootfs = Some(value(parser, "--rootfs", rootfs)?),
            "copy" => self.copies.push(value(parser, "--copy", copy)?),
            "copy-out" => self.copies_out.push(value(parser, "--copy-out", copy_out)?),
            "timeout" => self.timeout = Some(value(parser, "--timeout", time)?),
            "keep-owner" => self.keep_owners = true,
            "cache-limit" => self.cache_limit_mib = Some(value(parser, "--cache-limit", mebibytes)?),
            name => {
                debug_assert!(is_of_run(name));
                take_of_run(&mut self.run, name, parser)?;
            }
        }
        Ok(())
    }

    /// The words after `--`, if they come next.
    pub fn take_command(&mut self, parser: &mut lexopt::Parser) -> Result<bool, lexopt::Error> {
        let Some(mut rest) = parser.try_raw_args() else { return Ok(false) };
        if rest.peek().is_none_or(|word| word != "--") {
            return Ok(false);
        }
        rest.next();
        for word in rest {
            self.run.argv.push(word.string()?);
        }
        if self.run.argv.is_empty() {
            return Err("a command to run in the guest is expected after `--`".into());
        }
        Ok(true)
    }

    /// Refuses options that are for a command when there is none.
    pub fn check(&self) -> Result<(), lexopt::Error> {
        match (self.option, self.run.argv.is_empty()) {
            (Some(option), true) => {
                Err(format!("--{option} is for a command to run in the guest: give it after `--`").into())
            }
            _ => Ok(()),
        }
    }

    /// When its time is up, if it begins now.
    pub fn deadline(&self) -> Option<Instant> {
        self.timeout.and_then(|time| Instant::now().checked_add(time))
    }
}

fn rootfs(text: &str) -> Result<Rootfs, String> {
    // A path may have a comma.
    let is_there = || std::fs::symlink_metadata(text).is_ok();
    match text.rsplit_once(',') {
        Some((path, "rw")) => Ok(Rootfs { path: path.into(), writable: true }),
        Some((path, "ro")) => Ok(Rootfs { path: path.into(), writable: false }),
        Some((_, word)) if !is_there() => Err(format!("expected `rw` or `ro` after the comma, not `{word}`")),
        _ => Ok(Rootfs { path: text.into(), writable: false }),
    }
}

fn copy(text: &str) -> Result<(PathBuf, PathBuf), String> {
    if let Some((host, guest)) = text.rsplit_once(":/") {
        let guest = format!("/{guest}");
        return if host.is_empty() {
            Err("HOST is empty".to_owned())
        } else {
            Ok((host.into(), guest.into()))
        };
    }
    // A file of this machine may have a colon in its name; a path in the guest has no folder to begin at.
    if text.contains(':') && std::fs::symlink_metadata(text).is_err() {
        return Err("expected HOST, which is there, or HOST:GUEST, GUEST with a slash before".to_owned());
    }
    let same = std::path::absolute(text).map_err(|error| error.to_string())?;
    Ok((text.into(), same))
}

fn copy_out(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let expected = "expected GUEST:HOST, GUEST with a slash before";
    match text.split_once(':') {
        Some((guest, host)) if Path::new(guest).is_absolute() && !host.is_empty() => {
            Ok((guest.into(), host.into()))
        }
        _ => Err(expected.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart_by_the_slash_that_the_guests_begin_with() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(copy("a"), Ok(("a".into(), here.join("a"))));
        let there = std::env::temp_dir().join(format!("alula-copy-{}:b", std::process::id()));
        let text = there.to_str().unwrap();
        for relative in [text, "a:b", "a:./b", ":b"] {
            let told = copy(relative).unwrap_err();
            assert!(told.ends_with("or HOST:GUEST, GUEST with a slash before"), "{relative}: {told}");
        }
        std::fs::write(&there, "").unwrap();
        assert_eq!(copy(text), Ok((there.clone(), there.clone())));
        std::fs::remove_file(&there).unwrap();
        assert_eq!(copy("a:b:/c"), Ok(("a:b".into(), "/c".into())));
        assert_eq!(copy("/a"), Ok(("/a".into(), "/a".into())));
        assert!(copy(":/c").is_err() && copy("").is_err());
        assert_eq!(copy_out("/a:b:c"), Ok(("/a".into(), "b:c".into())));
        assert!(copy_out("a:b").is_err() && copy_out("/a").is_err() && copy_out("/a:").is_err());
        let of = |path: &str, writable| Ok(Rootfs { path: path.into(), writable });
        assert_eq!(
            (rootfs("a"), rootfs("a,b,rw"), rootfs("a,ro")),
            (of("a", false), of("a,b", true), of("a", false))
        );
        assert_eq!(rootfs("a,wr"), Err("expected `rw` or `ro` after the comma, not `wr`".to_owned()));
    }
}
