//! Where jails are made, and what there is then.

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::root::settle;
use crate::common::{self, Client, Ended, Folder, Process, wait_for};
use crate::{GID, UID};

/// A folder of jails, and a control group for their own.
pub struct Site {
    pub folder: Folder,
    /// Our own program, on the file system of the folder: a copy of it, where it is on another one.
    pub program: PathBuf,
    pub parent: String,
    /// Where the hierarchies are, each with its limit: version 1 has one for each, version 2 one for all.
    pub groups: Vec<(PathBuf, &'static str, &'static str)>,
    pub version: &'static str,
}

impl Site {
    pub fn new() -> Self {
        settle();
        let folder = Folder::new();
        std::fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o777)).unwrap();
        let mut program = std::path::absolute(common::alula()).unwrap();
        let device = |path: &Path| std::fs::metadata(path).unwrap().dev();
        if device(&program) != device(&folder.0) {
            // A folder of jails is called as the program.
            let copy = folder.path("copy").join("alula");
            std::fs::create_dir(copy.parent().unwrap()).unwrap();
            std::fs::copy(&program, &copy).unwrap();
            program = copy;
        }
        let parent = folder.0.file_name().unwrap().to_str().unwrap().to_owned();
        let v1 = |controller| Path::new("/sys/fs/cgroup").join(controller);
        if v1("pids/cgroup.procs").exists() {
            let groups = vec![
                (v1("pids"), "pids.max", "64"),
                (v1("memory"), "memory.limit_in_bytes", "536870912"),
                (v1("cpuset"), "cpuset.cpus", "0"),
                (v1("cpu"), "cpu.shares", "512"),
            ];
            return Self { folder, program, parent, groups, version: "1" };
        }
        let root = PathBuf::from("/sys/fs/cgroup");
        if !root.join("cgroup.procs").exists() {
            common::mount(&root, "cgroup2", "rw");
        }
        let limits = [
            ("pids.max", "64"),
            ("memory.max", "536870912"),
            ("cpuset.cpus", "0"),
            ("cpu.max", "200000 100000"),
        ];
        let groups = limits.into_iter().map(|(file, value)| (root.clone(), file, value)).collect();
        Self { folder, program, parent, groups, version: "2" }
    }

    pub fn base(&self) -> PathBuf {
        self.folder.path("base")
    }

    /// The root of the jail `id` of our own program.
    pub fn root(&self, id: &str) -> PathBuf {
        self.base().join("alula").join(id).join("root")
    }

    /// `alula jail` as root, for a jail here.
    pub fn jail(&self, id: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["jail", "--id", id, "--uid", &UID.to_string(), "--gid", &GID.to_string()]);
        command.arg("--chroot-base-dir").arg(self.base());
        command
    }

    /// The options for its control group.
    pub fn limits(&self) -> Vec<String> {
        let mut options = vec!["--cgroup-version".to_owned(), self.version.to_owned()];
        options.extend(["--parent-cgroup".to_owned(), self.parent.clone()]);
        for (_, file, value) in &self.groups {
            options.extend(["--cgroup".to_owned(), format!("{file}={value}")]);
        }
        options
    }

    /// The kernel for a guest in a jail, whose root is made for that.
    pub fn put_kernel(&self, id: &str) {
        std::fs::create_dir_all(self.root(id)).unwrap();
        std::fs::write(self.root(id).join("kernel"), alula::firmware::IMAGE).unwrap();
    }

    pub fn client(&self, id: &str) -> Client {
        let socket = self.root(id).join("run/api.sock");
        wait_for(|| socket.exists());
        Client::connect(&socket)
    }

    /// All files here, and all groups, by their paths.
    pub fn everything(&self) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        let groups = self.groups.iter().map(|(root, ..)| root.join(&self.parent));
        for place in groups.chain([self.folder.0.clone()]).filter(|place| place.exists()) {
            list(&place, &mut found);
        }
        found
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for (root, ..) in &self.groups {
            let parent = root.join(&self.parent);
            let groups = std::fs::read_dir(&parent).into_iter().flatten().flatten();
            for group in groups.filter(|entry| entry.path().is_dir()) {
                // The processes have ended, which the kernel may notice a moment later.
                wait_for(|| std::fs::remove_dir(group.path()).is_ok() || std::thread::panicking());
            }
            let _ = std::fs::remove_dir(parent);
        }
    }
}

pub fn list(place: &Path, found: &mut BTreeSet<PathBuf>) {
    found.insert(place.to_owned());
    if place.is_dir() && !place.is_symlink() {
        std::fs::read_dir(place).unwrap().for_each(|entry| list(&entry.unwrap().path(), found));
    }
}

/// Runs it to its end, with nothing on standard input.
pub fn end(command: Command) -> Ended {
    let mut process = Process::spawn(command);
    process.stdin = None;
    process.end()
}
