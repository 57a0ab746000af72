//! The state of a process, as the kernel tells of it (proc(5)).

use std::collections::BTreeSet;
use std::path::PathBuf;

/// A process by its ID, whose state the kernel tells (proc(5)).
pub struct Looked(pub u32);

impl Looked {
    pub fn read(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.0)).unwrap()
    }

    /// The words of a line of the process's status.
    pub fn status(&self, name: &str) -> Vec<String> {
        let status = self.read("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap().split_whitespace().map(str::to_owned).collect()
    }

    pub fn namespace(&self, kind: &str) -> PathBuf {
        std::fs::read_link(format!("/proc/{}/ns/{kind}", self.0)).unwrap()
    }

    pub fn limit(&self, name: &str) -> String {
        let limits = self.read("limits");
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().to_owned()
    }

    /// The process's open descriptors: number and last part of the path.
    pub fn descriptors(&self) -> Vec<(i32, String)> {
        let folder = std::fs::read_dir(format!("/proc/{}/fd", self.0)).unwrap();
        let opened = folder.map(|entry| {
            let entry = entry.unwrap();
            let path = std::fs::read_link(entry.path()).unwrap_or_default();
            let name = path.file_name().unwrap_or_default().to_str().unwrap().to_owned();
            (entry.file_name().to_str().unwrap().parse().unwrap(), name)
        });
        opened.collect()
    }

    /// Whether the process has a folder open, by which it could leave its root.
    fn has_a_folder(&self) -> bool {
        let mut folder = std::fs::read_dir(format!("/proc/{}/fd", self.0)).unwrap();
        folder.any(|entry| std::fs::metadata(entry.unwrap().path()).is_ok_and(|file| file.is_dir()))
    }

    /// Asserts that the process has no rights, no way to get any, no variables, and only the jail to see.
    pub fn check_shut_in(&self, mounts: usize) {
        for name in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(self.status(name), ["0000000000000000"], "{name}");
        }
        assert_eq!(self.status("NoNewPrivs"), ["1"]);
        assert!(!self.has_a_folder(), "{:?}", self.descriptors());
        // A process that has made its jail itself has overwritten what its variables were.
        assert_eq!(self.read("environ").trim_matches('\0'), "");
        assert_eq!(self.read("mountinfo").lines().count(), mounts, "{}", self.read("mountinfo"));
        for kind in ["mnt", "ipc", "uts"] {
            assert_ne!(self.namespace(kind), Looked(std::process::id()).namespace(kind), "{kind}");
        }
        let root = std::fs::read_dir(format!("/proc/{}/root", self.0)).unwrap();
        let names: BTreeSet<_> = root.map(|entry| entry.unwrap().file_name()).collect();
        let has = |name: &str| names.contains(std::ffi::OsStr::new(name));
        assert!(has("alula") && has("run") && !has("proc") && !has("etc"), "{names:?}");
    }

    /// The files of which the process executes code, each by the numbers of its device and its own. Those who execute one
    /// file share its pages.
    pub fn programs(&self) -> BTreeSet<String> {
        let maps = self.read("maps");
        let executed = maps.lines().filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            (words[1].contains('x') && words[4] != "0").then(|| words[3..5].join(" "))
        });
        executed.collect()
    }

    /// The process's private memory, in KiB.
    pub fn private_memory(&self) -> u64 {
        let rollup = self.read("smaps_rollup");
        let lines = rollup.lines().filter(|line| line.starts_with("Private_"));
        lines.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum()
    }
}
