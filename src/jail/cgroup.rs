//! Control groups of a jail, of either version (cgroups(7)): `PARENT/ID` below the root of each hierarchy that has
//! something to limit.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::made::{Made, Place, open_folder};
use crate::error::{Context, Error, Result};
use crate::spelling;
use crate::sys::descriptor;

/// The file by which a process enters a group.
const PROCESSES: &str = "cgroup.procs";
/// The file by which a group of version 2 gives its controllers to those below it.
const SHARED: &str = "cgroup.subtree_control";
/// The files that a group of version 1 must have values in before a process enters, and does not inherit by itself.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];
/// The most that is read of a group's file, in bytes: more than any of them holds.
const TEXT_MAX: u64 = 64 << 10;

/// Limits that have a name in each version, that of version 2 first.
const NAMES: [[&str; 2]; 8] = [
    ["memory.max", "memory.limit_in_bytes"],
    ["memory.high", "memory.soft_limit_in_bytes"],
    ["memory.swap.max", "memory.memsw.limit_in_bytes"],
    ["memory.current", "memory.usage_in_bytes"],
    ["cpu.weight", "cpu.shares"],
    ["cpu.max", "cpu.cfs_quota_us"],
    ["io.weight", "blkio.weight"],
    ["io.max", "blkio.throttle.write_bps_device"],
];
/// The controllers of both versions.
const CONTROLLERS: [&str; 14] = [
    "cpu", "cpuacct", "cpuset", "memory", "pids", "io", "blkio", "devices", "freezer", "hugetlb", "rdma",
    "misc", "net_cls", "net_prio",
];

/// How the kernel's control groups are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Version 1: a hierarchy for each controller.
    V1,
    /// Version 2: one hierarchy for all controllers.
    V2,
}

/// A value that is written to a file of a group: `memory.max=1G`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The file's name, which begins with its controller.
    pub file: String,
    /// The text that is written to the file.
    pub value: String,
}

impl Setting {
    /// Parses `FILE=VALUE`.
    ///
    /// # Errors
    /// The text has another form; the message says what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_name =
            |file: &str| file.contains('.') && !file.starts_with('.') && !file.contains(['/', '\0']);
        let pair = text.split_once('=').filter(|(file, value)| is_name(file) && !value.is_empty());
        let (file, value) = pair.ok_or("expected FILE=VALUE, as in pids.max=64")?;
        Ok(Self { file: file.to_owned(), value: value.to_owned() })
    }

    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }

    /// Names the limit that was meant: the one of the other version of control groups, or the nearest spelling among `files`.
    fn hint<'f>(&self, files: impl IntoIterator<Item = &'f str>) -> String {
        let file = self.file.as_str();
        let other = NAMES.iter().find_map(|[two, one]| match () {
            () if *two == file => Some((one, 1)),
            () if *one == file => Some((two, 2)),
            () => None,
        });
        if let Some((name, version)) = other {
            return format!(" (version {version} has `{name}`)");
        }
        let controller = self.controller();
        let rest = &file[controller.len()..];
        let meant = match CONTROLLERS.contains(&controller) {
            true => spelling::nearest(file, files).map(str::to_owned),
            false => spelling::nearest(controller, CONTROLLERS).map(|meant| format!("{meant}{rest}")),
        };
        meant.map_or_else(String::new, |meant| format!(" (is `{meant}` meant?)"))
    }

    /// Writes the value to its file in a group.
    fn apply(&self, group: &Place, path: &Path) -> Result<()> {
        let Self { file, value } = self;
        let path = path.join(file);
        let attempt = || format!("--cgroup {file}={value}: write to `{}`", path.display());
        let mut opened = open(group, file, libc::O_WRONLY).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                let files = path.parent().and_then(|folder| std::fs::read_dir(folder).ok());
                let files = files.into_iter().flatten().flatten();
                let files: Vec<_> = files.filter_map(|entry| entry.file_name().into_string().ok()).collect();
                Error::config(format!(
                    "--cgroup {file}={value}: there is no `{}`: this kernel has no such limit, or names it otherwise \
                     in the other --cgroup-version{}",
                    path.display(),
                    self.hint(files.iter().map(String::as_str))
                ))
            }
            _ => Error::host(format!("{}: {error}", attempt())),
        })?;
        opened.write_all(value.as_bytes()).with_context(attempt)
    }
}

/// The name of a parent group: relative, and nowhere upwards.
///
/// # Errors
/// The text is no such name; the message says what was expected.
pub fn parent(text: &str) -> Result<String, String> {
    let is_sound = !text.starts_with('/') && text.split('/').all(|part| !["", ".", ".."].contains(&part));
    match is_sound {
        true => Ok(text.to_owned()),
        false => {
            Err("expected the name of a group below the root of the hierarchy, as in vms/web".to_owned())
        }
    }
}

/// The limits that a jail is to have, and the control groups that they are set in.
#[derive(Debug)]
pub struct Cgroups {
    /// The version of the hierarchies; none: version 1 where that has all the controllers.
    pub version: Option<Version>,
    /// The group in which the jail's is made; none: one with the program's name.
    pub parent: Option<String>,
    /// The limits.
    pub settings: Vec<Setting>,
}

/// A group that this process is to enter.
pub struct Member {
    path: PathBuf,
    processes: File,
    /// The file `cgroup.procs` of the group that the process is in so far.
    home: Option<File>,
}

impl Member {
    /// Enters the group.
    pub fn enter(&mut self) -> Result<()> {
        // The number 0 stands for the process that writes.
        let attempt = || format!("--cgroup: enter the group `{}`", self.path.display());
        self.processes.write_all(b"0").with_context(attempt)
    }

    /// Goes back to the group that the process was in before, if that can be.
    pub fn leave(&mut self) {
        let _ = self.home.as_mut().map(|home| home.write_all(b"0"));
    }
}

/// A hierarchy as this process sees it.
struct Hierarchy {
    mount: PathBuf,
    root: Place,
    /// The group of this process in the hierarchy, below what is mounted.
    home: PathBuf,
}

impl Cgroups {
    /// Makes the groups of the jail `id`, whose program has this name, with their limits.
    ///
    /// # Errors
    /// There is no such hierarchy, controller or file, or it does not take the value.
    pub fn make(&self, program: &str, id: &str, made: &mut Made) -> Result<Vec<Member>> {
        if self.settings.is_empty() && (self.parent.is_none() || self.version != Some(Version::V2)) {
            return Ok(Vec::new());
        }
        let host = Host::read()?;
        let has_v1 = |setting: &Setting| host.mount("cgroup", Some(setting.controller())).is_some();
        let is_v1 = self.version.map_or_else(|| self.settings.iter().all(has_v1), |v| v == Version::V1);
        let parent = self.parent.as_deref().unwrap_or(program);
        match is_v1 {
            true => self.make_v1(&host, parent, id, made),
            false if self.settings.is_empty() => Ok(vec![join_existing(&host, parent)?]),
            false => Ok(vec![self.make_v2(&host, parent, id, made)?]),
        }
    }

    fn make_v1(&self, host: &Host, parent: &str, id: &str, made: &mut Made) -> Result<Vec<Member>> {
        let (mut members, mut done): (Vec<_>, Vec<&str>) = (Vec::new(), Vec::new());
        for setting in &self.settings {
            let controller = setting.controller();
            if done.contains(&controller) {
                continue;
            }
            done.push(controller);
            let hierarchy = Hierarchy::open(host, "cgroup", Some(controller))?.ok_or_else(|| {
                Error::config(format!(
                    "--cgroup {controller}.*: this host has no hierarchy of version 1 with the controller \
                     `{controller}`{}: give --cgroup-version 2, or leave the limit out",
                    setting.hint([])
                ))
            })?;
            let inherit = |above: &Place, group: &Place| match controller {
                "cpuset" => inherit(above, group),
                _ => Ok(()),
            };
            let (group, path) = hierarchy.descend(parent, id, made, |_, _| Ok(()), inherit)?;
            let own = self.settings.iter().filter(|setting| setting.controller() == controller);
            own.into_iter().try_for_each(|setting| setting.apply(&group, &path))?;
            members.push(hierarchy.member(&group, path)?);
        }
        Ok(members)
    }

    fn make_v2(&self, host: &Host, parent: &str, id: &str, made: &mut Made) -> Result<Member> {
        let (option, way_out) = match self.version {
            Some(_) => {
                ("--cgroup-version 2", "where a hierarchy of version 1 has it, leave --cgroup-version 2 out")
            }
            None => ("--cgroup", "leave the limit out"),
        };
        let hierarchy = Hierarchy::v2(host, option)?;
        let offered = read(&hierarchy.root, "cgroup.controllers").unwrap_or_default();
        // Files that every group has, as cgroup.max.descendants, are of no controller.
        let settings: Vec<_> = self.settings.iter().filter(|one| one.controller() != "cgroup").collect();
        let controllers: Vec<_> = settings.iter().map(|setting| setting.controller()).collect();
        for (setting, controller) in settings.iter().zip(&controllers) {
            if !offered.split_whitespace().any(|other| other == *controller) {
                let offered = if offered.trim().is_empty() { "none" } else { offered.trim() };
                return Err(Error::config(format!(
                    "--cgroup {controller}.*: the hierarchy of version 2 at `{}` does not offer the controller \
                     `{controller}` (it offers: {offered}){}: {way_out}",
                    hierarchy.mount.display(),
                    setting.hint([])
                )));
            }
        }
        let share = |group: &Place, path: &Path| share(group, path, &controllers);
        let (group, path) = hierarchy.descend(parent, id, made, share, |_, _| Ok(()))?;
        self.settings.iter().try_for_each(|setting| setting.apply(&group, &path))?;
        hierarchy.member(&group, path)
    }
}

/// Gives these controllers of a group to the groups below it.
fn share(group: &Place, path: &Path, controllers: &[&str]) -> Result<()> {
    let shared = read(group, SHARED).unwrap_or_default();
    for controller in controllers {
        if shared.split_whitespace().any(|other| other == *controller) {
            continue;
        }
        let result = open(group, SHARED, libc::O_WRONLY)
            .and_then(|mut file| file.write_all(format!("+{controller}").as_bytes()));
        result.with_context(|| {
            format!(
                "--cgroup {controller}.*: write `+{controller}` to `{}` (--parent-cgroup names another place: a \
                 group without processes that this user may change)",
                path.join(SHARED).display()
            )
        })?;
    }
    Ok(())
}

/// Gives a group of version 1 the CPUs and memory nodes of the one above it where it has none.
fn inherit(above: &Place, group: &Place) -> Result<()> {
    for name in CPUSET {
        let attempt = || format!("--cgroup: copy `{name}` of a group to the one below it");
        if read(group, name).with_context(attempt)?.trim().is_empty() {
            let value = read(above, name).with_context(attempt)?;
            let mut file = open(group, name, libc::O_WRONLY).with_context(attempt)?;
            file.write_all(value.trim().as_bytes()).with_context(attempt)?;
        }
    }
    Ok(())
}

/// Opens the group `parent` of version 2, which must be there already.
fn join_existing(host: &Host, parent: &str) -> Result<Member> {
    let hierarchy = Hierarchy::v2(host, "--parent-cgroup")?;
    let path = hierarchy.mount.join(parent);
    let group = open_folder(&hierarchy.root, parent).map_err(|error| {
        Error::config(format!(
            "--parent-cgroup {parent}: open `{}`: {error}: without --cgroup, the jail enters a group that is there \
             already",
            path.display()
        ))
    })?;
    hierarchy.member(&group, path)
}

impl Hierarchy {
    /// Opens the hierarchy of version 2, which `option` needs.
    fn v2(host: &Host, option: &str) -> Result<Self> {
        Self::open(host, "cgroup2", None)?.ok_or_else(|| {
            Error::config(format!(
                "{option}: no hierarchy of control groups of version 2 is mounted: leave the option out, or mount one \
                 (`mount -t cgroup2 none /sys/fs/cgroup`)"
            ))
        })
    }

    /// Opens the first mounted hierarchy of this kind, and with this controller.
    fn open(host: &Host, kind: &str, controller: Option<&str>) -> Result<Option<Self>> {
        let Some((inner, mount)) = host.mount(kind, controller) else { return Ok(None) };
        let root = File::open(mount).with_context(|| format!("--cgroup: open `{mount}`"))?;
        let home = host.group(controller).strip_prefix(inner).unwrap_or(Path::new("/"));
        let home = home.strip_prefix("/").unwrap_or(home).to_owned();
        Ok(Some(Self { mount: mount.into(), root: Rc::new(root.into()), home }))
    }

    /// Opens or makes the group `parent/id`. `before` is called for each group that another is made in, `after` for
    /// that group and the one made in it.
    fn descend(
        &self,
        parent: &str,
        id: &str,
        made: &mut Made,
        before: impl Fn(&Place, &Path) -> Result<()>,
        after: impl Fn(&Place, &Place) -> Result<()>,
    ) -> Result<(Place, PathBuf)> {
        let (mut group, mut path) = (Rc::clone(&self.root), self.mount.clone());
        for name in parent.split('/').chain([id]) {
            before(&group, &path)?;
            path.push(name);
            let below = made.folder(&group, name, 0o755).with_context(|| {
                format!(
                    "--cgroup: make the group `{}` (--parent-cgroup names another place for it)",
                    path.display()
                )
            })?;
            after(&group, &below)?;
            group = below;
        }
        Ok((group, path))
    }

    fn member(&self, group: &Place, path: PathBuf) -> Result<Member> {
        let attempt = || format!("--cgroup: open `{}`", path.join(PROCESSES).display());
        let processes = open(group, PROCESSES, libc::O_WRONLY).with_context(attempt)?;
        let home = descriptor::open_in(&*self.root, self.home.join(PROCESSES), libc::O_WRONLY, 0);
        Ok(Member { path, processes, home: home.ok().map(File::from) })
    }
}

fn open(group: &Place, name: &str, flags: i32) -> std::io::Result<File> {
    descriptor::open_in(&**group, name, flags, 0).map(File::from)
}

fn read(group: &Place, name: &str) -> std::io::Result<String> {
    let mut text = String::new();
    open(group, name, libc::O_RDONLY)?.take(TEXT_MAX).read_to_string(&mut text).map(|_| text)
}

/// The kernel's lists of mounted hierarchies and of this process's groups.
struct Host {
    mounts: String,
    groups: String,
}

impl Host {
    fn read() -> Result<Self> {
        let read =
            |path: &str| std::fs::read_to_string(path).with_context(|| format!("--cgroup: read `{path}`"));
        Ok(Self { mounts: read("/proc/self/mountinfo")?, groups: read("/proc/self/cgroup")? })
    }

    /// The folder of a hierarchy that is mounted, and the place where it is mounted (proc(5), mountinfo).
    fn mount(&self, kind: &str, controller: Option<&str>) -> Option<(&str, &str)> {
        self.mounts.lines().find_map(|line| {
            let (place, file_system) = line.split_once(" - ")?;
            let (mut place, mut file_system) = (place.split(' ').skip(3), file_system.split(' '));
            let is_it = file_system.next() == Some(kind)
                && controller.is_none_or(|controller| {
                    file_system
                        .nth(1)
                        .is_some_and(|options| options.split(',').any(|other| other == controller))
                });
            is_it.then_some((place.next()?, place.next()?))
        })
    }

    /// The group of this process in the hierarchy of that controller, or in that of version 2 (cgroups(7)).
    fn group(&self, controller: Option<&str>) -> &Path {
        let path = self.groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|other| other == controller.unwrap_or_default()).then_some(path)
        });
        Path::new(path.unwrap_or("/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_file_and_a_value_and_a_parent_a_relative_path() {
        let setting = Setting::parse("memory.oom.group=a=b").unwrap();
        assert_eq!((setting.file.as_str(), setting.value.as_str()), ("memory.oom.group", "a=b"));
        assert_eq!(setting.controller(), "memory");
        for text in ["", "pids.max", "pids.max=", "=1", "pids=1", "a/pids.max=1", "..=1", ".x=1"] {
            assert!(Setting::parse(text).is_err(), "{text}");
        }
        assert!(parent("a").is_ok() && parent("a/b.slice").is_ok());
        for text in ["", "/a", "..", "a/../b", "a//b", "a/", "./a"] {
            assert!(parent(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_limit_that_is_not_there_is_told_by_its_right_name() {
        let files = ["cgroup.procs", "memory.limit_in_bytes", "pids.max", "pids.current"];
        for (file, expected) in [
            ("memory.max", " (version 1 has `memory.limit_in_bytes`)"),
            ("cpu.shares", " (version 2 has `cpu.weight`)"),
            ("pid.max", " (is `pids.max` meant?)"),
            ("memroy.high", " (is `memory.high` meant?)"),
            ("pids.maxx", " (is `pids.max` meant?)"),
            ("pids.nonesuch", ""),
            ("nonesuch.max", ""),
        ] {
            let setting = Setting::parse(&format!("{file}=1")).unwrap();
            assert_eq!(setting.hint(files), expected, "{file}");
        }
    }

    #[test]
    fn hierarchies_are_found_as_the_kernel_tells_of_them() {
        let mounts = "30 20 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro,mode=755\n\
                      31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n\
                      33 30 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
                      34 30 0:30 /docker/7 /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";
        let groups = "3:cpuset:/\n2:cpu,cpuacct:/docker/7/x\n0::/user.slice\n";
        let host = Host { mounts: mounts.to_owned(), groups: groups.to_owned() };
        assert_eq!(host.mount("cgroup2", None), Some(("/", "/sys/fs/cgroup/unified")));
        assert_eq!(host.mount("cgroup", Some("cpuset")), Some(("/", "/sys/fs/cgroup/cpuset")));
        let cpu = Some(("/docker/7", "/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(host.mount("cgroup", Some("cpu")), cpu);
        assert_eq!(host.mount("cgroup", Some("memory")), None);
        assert_eq!(host.group(Some("cpu")), Path::new("/docker/7/x"));
        assert_eq!(host.group(None), Path::new("/user.slice"));
        assert_eq!(host.group(Some("pids")), Path::new("/"));
    }
}
