//! The names by which orchestrators call a monitor. A symbolic link with one of them is enough: the
//! command line is then that program's, and so are its limits.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use crate::api::API_VERSION;

/// The program that we are called as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persona {
    /// Ourselves.
    Alula,
    /// The monitor.
    Firecracker,
    /// What puts a monitor into its jail.
    Jailer,
    /// What works on snapshot files.
    SnapshotEditor,
}

impl Persona {
    /// By the name that the process was started with: `firecracker`, or as releases name their
    /// binaries, `firecracker-v1.17.0-x86_64`.
    pub fn of(program: &OsStr) -> Self {
        let name = Path::new(program).file_name().and_then(OsStr::to_str).unwrap_or_default();
        let name = name.split_once("-v").map_or(name, |(name, _)| name);
        match name {
            "firecracker" => Self::Firecracker,
            "jailer" => Self::Jailer,
            "snapshot-editor" => Self::SnapshotEditor,
            _ => Self::Alula,
        }
    }

    /// What `--version` prints: clients take the second word of the first line.
    pub fn version(self) -> String {
        match self {
            Self::Alula => match option_env!("ALULA_COMMIT") {
                Some(commit) => format!("alula {} (commit {commit})\n", env!("CARGO_PKG_VERSION")),
                None => concat!("alula ", env!("CARGO_PKG_VERSION"), "\n").to_owned(),
            },
            Self::Firecracker => format!("Firecracker v{API_VERSION}\n\n"),
            Self::Jailer => format!("Jailer v{API_VERSION}\n\n"),
            Self::SnapshotEditor => format!("snapshot-editor {API_VERSION}\n"),
        }
    }

    /// What to print instead of doing anything, if it is asked for: wherever the option is, and whatever
    /// else there is.
    pub fn print(self, arguments: &[OsString], help: impl Fn() -> String) -> Option<String> {
        let asks =
            |option: &str| arguments.iter().take_while(|argument| *argument != "--").any(|a| a == option);
        if asks("--help") {
            return Some(self.version() + &help());
        }
        asks("--version").then(|| self.version())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_files_and_releases() {
        for (program, expected) in [
            ("alula", Persona::Alula),
            ("/usr/bin/firecracker", Persona::Firecracker),
            ("./firecracker-v1.17.0-x86_64", Persona::Firecracker),
            ("jailer", Persona::Jailer),
            ("snapshot-editor", Persona::SnapshotEditor),
            ("/firecracker/alula", Persona::Alula),
            ("firecrackers", Persona::Alula),
            ("", Persona::Alula),
        ] {
            assert_eq!(Persona::of(program.as_ref()), expected, "{program}");
        }
    }

    #[test]
    fn clients_find_the_version_in_the_second_word() {
        assert_eq!(Persona::Firecracker.version().split_whitespace().nth(1), Some("v1.17.0"));
    }
}
