//! The rules for the host's files and ports that are left (landlock(7)), for `main` and for the other threads.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::sys::confine::{Handled, Ruleset, landlock_version};

/// Rights to files, in the order of the versions that brought them (linux/landlock.h).
const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_DIR: u64 = 1 << 4;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_CHAR: u64 = 1 << 6;
const MAKE_BLOCK: u64 = 1 << 11;
const FIRST: u64 = (1 << 13) - 1;
/// Version 2: to move a file from one folder to another, which is forbidden where no rule allows it.
const REFER: u64 = 1 << 13;
/// Version 3: to truncate files.
const TRUNCATE: u64 = 1 << 14;
/// Version 5: to call ioctl(2) on devices.
const IOCTL_DEVICE: u64 = 1 << 15;
/// Version 4: to bind and connect sockets of TCP.
const PORTS: u64 = 0b11;
/// Version 6: to connect to abstract Unix sockets of others.
const ABSTRACT_SOCKETS: u64 = 1;

/// The rights that no thread ever uses once rules are laid upon it.
const NEVER: u64 = EXECUTE | MAKE_CHAR | MAKE_BLOCK;
/// The rights to something that is no folder.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEVICE;

/// Devices that a machine is made with, whatever its user allows.
const DEVICES: [&str; 5] = ["/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/userfaultfd", "/dev/null"];
/// The folders in which the kernel tells of this process and of disks.
const TOLD: [&str; 3] = ["/proc", "/sys/dev", "/sys/devices"];

/// The kernel's Landlock.
#[derive(Clone, Copy, Debug)]
pub struct Landlock {
    version: u32,
}

impl Landlock {
    /// The kernel's Landlock, or the reason why it has none.
    pub fn find() -> std::result::Result<Self, std::io::Error> {
        landlock_version().map(|version| Self { version })
    }

    fn files(self) -> u64 {
        let later = [(2, REFER), (3, TRUNCATE), (5, IOCTL_DEVICE)];
        later
            .iter()
            .filter(|(version, _)| *version <= self.version)
            .fold(FIRST, |all, (_, right)| all | right)
    }

    fn ruleset(self, files: u64) -> Result<Ruleset> {
        let ports = if self.version >= 4 { PORTS } else { 0 };
        let scopes = if self.version >= 6 { ABSTRACT_SOCKETS } else { 0 };
        let known = match self.version {
            0..4 => 1,
            4..6 => 2,
            _ => 3,
        };
        Ruleset::new(Handled { files, ports, scopes }, known).context("make rules of Landlock")
    }

    /// The rules for threads that open nothing: no file, no port.
    pub fn of_threads(self) -> Result<Ruleset> {
        self.ruleset(self.files())
    }

    /// The rules for `main`: all files that the user may open, but none is executed, and no node of a device is made.
    pub fn of_main(self) -> Result<Ruleset> {
        if self.version < 2 {
            return self.ruleset(NEVER);
        }
        let rules = self.ruleset(NEVER | REFER)?;
        allow(&rules, Path::new("/"), REFER)?;
        Ok(rules)
    }

    /// The rules for a `main` that may use what is in these folders, and beside that only what a machine is made with:
    /// devices, the folder in which `main` removes its own socket when it ends, and a folder of its `own`, which it
    /// removes as well.
    pub fn of_main_within(
        self,
        folders: &[PathBuf],
        own: Option<&Path>,
        socket: Option<&Path>,
    ) -> Result<Ruleset> {
        let all = self.files();
        let rules = self.ruleset(all)?;
        for folder in folders {
            allow(&rules, folder, all & !NEVER)
                .with_context(|| format!("allow `{}` (--allow)", folder.display()))?;
        }
        for device in DEVICES {
            // A device that this host does not have needs no rule.
            let _ = allow(&rules, Path::new(device), all & (READ_FILE | WRITE_FILE | IOCTL_DEVICE));
        }
        for place in TOLD {
            let _ = allow(&rules, Path::new(place), READ_FILE | READ_DIR);
        }
        socket.map_or(Ok(()), |folder| allow(&rules, folder, REMOVE_FILE))?;
        if let Some(own) = own {
            allow(&rules, own, all & !NEVER)?;
            allow(&rules, crate::paths::folder(own), REMOVE_DIR)?;
        }
        Ok(rules)
    }
}

fn allow(rules: &Ruleset, path: &Path, files: u64) -> Result<()> {
    let place: File = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(|error| crate::paths::cannot_open(path, &error, false))?;
    let is_folder = place.metadata().is_ok_and(|metadata| metadata.is_dir());
    let files = if is_folder { files } else { files & OF_FILES };
    rules.allow(&place, files).map_err(|error| Error::host(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::confine::gain_no_privileges;
    use std::io::ErrorKind::PermissionDenied;

    /// The outcomes of opening a file outside `allowed`, of opening one in there, and of executing a program, by a thread
    /// upon which the rules of a version are laid.
    fn tried(rules: Ruleset, allowed: &Path) -> [std::io::Result<()>; 3] {
        let within = allowed.join("own");
        let thread = std::thread::spawn(move || {
            gain_no_privileges().unwrap();
            rules.enter().unwrap();
            let open = |path: &Path| File::open(path).map(drop);
            let execute = std::process::Command::new("/proc/self/exe").arg("--list").output().map(drop);
            [open(Path::new("/proc/self/exe")), open(&within), execute]
        });
        thread.join().unwrap()
    }

    #[test]
    fn rules_hold_on_kernels_of_every_version_up_to_this_one() {
        let Ok(newest) = landlock_version() else { return };
        let folder = std::env::temp_dir().join(format!("alula-landlock-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("own"), "").unwrap();
        let is_refused = |result: &std::io::Result<()>| {
            result.as_ref().is_err_and(|error| error.kind() == PermissionDenied)
        };
        for version in 1..=newest {
            // What a kernel of that version does not know is not asked of this one either.
            let landlock = Landlock { version };
            let within = landlock.of_main_within(std::slice::from_ref(&folder), None, None);
            for (rules, expected) in [
                (landlock.of_threads(), [true, true, true]),
                (landlock.of_main(), [false, false, true]),
                (within, [true, false, true]),
            ] {
                let results = tried(rules.unwrap(), &folder);
                assert_eq!(results.each_ref().map(is_refused), expected, "version {version}: {results:?}");
            }
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
