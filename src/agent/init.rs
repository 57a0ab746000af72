//! Process 1 of a guest: from the kernel's first program to a system that others can run in.

use std::fs;
use std::io::{ErrorKind, Result as IoResult};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Agent, Listener, host};
use crate::error::{Context, Error, Result};
use crate::protocol::PORT;
use crate::protocol::request::Set;
use crate::sys::{descriptor, machine};

/// Where an initial ramdisk has what is ours: this program, [`Boot`], modules.
pub const FOLDER: &str = ".alula";
/// The name of this program in [`FOLDER`]. Process 1 is an init only by this name.
pub const NAME: &str = "init";
/// The name of the file in [`FOLDER`] that has [`Boot`], as JSON.
pub const BOOT: &str = "boot.json";
/// The folder of modules in [`FOLDER`].
pub const MODULES: &str = "modules";
/// How the last line on the console of a guest begins whose init cannot go on; the reason follows.
pub const FAILED: &str = "alula: the guest's init cannot go on: ";
/// How long a disk may take to appear once its driver is loaded.
const PATIENCE: Duration = Duration::from_secs(30);

/// The init's orders, which the host writes.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Files of modules, in the order to load them.
    #[serde(default)]
    pub modules: Vec<String>,
    /// The disk that the root file system is on; none: it is the initial ramdisk.
    #[serde(default)]
    pub disk: Option<Disk>,
    /// The guest's name; none: the kernel's.
    #[serde(default)]
    pub hostname: Option<String>,
}

/// A disk with a root file system.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// `/dev/vda`.
    pub device: String,
    /// Its file system's types, of which one is the right one.
    pub types: Vec<String>,
    /// Options that it is mounted with, the first of them by which that succeeds.
    pub options: Vec<String>,
    /// Whether programs of the guest write to the disk; false: they write to memory that lies over it.
    pub writable: bool,
}

/// Whether this process, started by this name, is a guest's init.
pub fn is_init(program: &std::ffi::OsStr) -> bool {
    Path::new(program).file_name().is_some_and(|name| name == NAME) && std::process::id() == 1
}

/// Sets the guest up, and is its agent for ever. What fails is told on the console, and the guest reboots: were process 1
/// to end, the kernel would panic, and bury the reason under its registers. An error: the guest cannot be rebooted.
pub fn run() -> Result<()> {
    let Err(error) = set_up_and_serve() else { return Ok(()) };
    eprintln!("{FAILED}{error}");
    // Words that are still on their way to the console would be lost.
    descriptor::drain_terminal(std::io::stderr().as_raw_fd());
    machine::end(true).context("reboot the guest")
}

fn set_up_and_serve() -> Result<()> {
    let ours = Path::new("/").join(FOLDER);
    mount_kernel_file_systems().context("mount /proc, /sys and /dev")?;
    let path = ours.join(BOOT);
    let boot: Boot = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("read `{}`", path.display()))?,
        // An initial ramdisk of somebody else's, with this program in it.
        Err(_) => Boot::default(),
    };
    load_modules(&ours.join(MODULES), &boot.modules)?;
    if let Some(disk) = &boot.disk {
        enter(disk).with_context(|| format!("make {} the root file system", disk.device))?;
    }
    mount_others().context("mount the file systems that programs expect")?;
    machine::bring_up("lo", None).context("bring the loopback interface up")?;
    host::set(&Set { hostname: boot.hostname, ..Set::default() })?;
    Agent::new(Listener::vsock(PORT)?)?.run()
}

fn make_folder(path: &str) -> IoResult<()> {
    match fs::create_dir(path) {
        // Of a file system that cannot be written, which has it or can do without.
        Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::ReadOnlyFilesystem) => {
            Ok(())
        }
        result => result,
    }
}

fn mount_kernel_file_systems() -> IoResult<()> {
    let nothing = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    for (kind, path, flags) in
        [("proc", "/proc", nothing), ("sysfs", "/sys", nothing), ("devtmpfs", "/dev", libc::MS_NOSUID)]
    {
        make_folder(path)?;
        match machine::mount(kind, path, kind, flags, "") {
            // A kernel mounts /dev by itself if it was built so.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            result => result?,
        }
    }
    Ok(())
}

fn load_modules(folder: &Path, names: &[String]) -> Result<()> {
    for name in names {
        let path = folder.join(name);
        let is_compressed = !name.ends_with(".ko");
        let file = fs::File::open(&path).with_context(|| format!("open `{}`", path.display()))?;
        if let Err(error) = machine::load_module(&file, is_compressed) {
            // The guest may do without it; what needs it says so.
            eprintln!("alula: load module `{name}`: {error}");
        }
        // Its memory is the guest's.
        let _ = fs::remove_file(path);
    }
    Ok(())
}

/// Goes on with the file system on a disk as the root: the disk itself, or memory over it.
fn enter(disk: &Disk) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !Path::new(&disk.device).exists() {
        if Instant::now() > deadline {
            return Err(Error::guest("the disk does not appear: is the driver of its device loaded?"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let (lower, memory, root) = ("/.alula/disk", "/.alula/memory", "/.alula/root");
    for folder in [lower, memory, root] {
        make_folder(folder).with_context(|| format!("create `{folder}`"))?;
    }
    let place = if disk.writable { root } else { lower };
    let flags = if disk.writable { 0 } else { libc::MS_RDONLY };
    let mut result = Err(ErrorKind::InvalidInput.into());
    let ways = disk.options.iter().flat_map(|options| disk.types.iter().map(move |kind| (kind, options)));
    for (kind, options) in ways {
        result = machine::mount(&disk.device, place, kind, flags, options);
        if result.is_ok() {
            break;
        }
    }
    result.with_context(|| format!("mount it as {}", disk.types.join(" or ")))?;
    if !disk.writable {
        machine::mount("tmpfs", memory, "tmpfs", 0, "mode=755").context("mount memory")?;
        let (upper, work) = ("/.alula/memory/upper", "/.alula/memory/work");
        for folder in [upper, work] {
            make_folder(folder).with_context(|| format!("create `{folder}`"))?;
        }
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        machine::mount("overlay", root, "overlay", 0, &options)
            .context("mount memory over it (it needs overlayfs in the kernel)")?;
    }
    for folder in ["dev", "proc", "sys"] {
        let to = format!("{root}/{folder}");
        make_folder(&to).with_context(|| format!("create `{to}`"))?;
        machine::mount(&format!("/{folder}"), &to, "", libc::MS_MOVE, "")
            .with_context(|| format!("move /{folder} there"))?;
    }
    std::env::set_current_dir(root).and_then(|()| machine::become_root()).context("enter it")
}

fn mount_others() -> IoResult<()> {
    let nothing = libc::MS_NOSUID | libc::MS_NODEV;
    for (path, mode) in [("/tmp", 0o1777), ("/run", 0o755), ("/dev/shm", 0o1777)] {
        make_folder(path)?;
        // A folder that has content in the root file system is not hidden by an empty one.
        if fs::read_dir(path)?.next().is_none() {
            machine::mount("tmpfs", path, "tmpfs", nothing, &format!("mode={mode:o}"))?;
        } else {
            // One that cannot be written stays as it is.
            let _ = fs::set_permissions(path, fs::Permissions::from_mode(mode));
        }
    }
    make_folder("/dev/pts")?;
    machine::mount(
        "devpts",
        "/dev/pts",
        "devpts",
        libc::MS_NOSUID | libc::MS_NOEXEC,
        "mode=620,ptmxmode=666",
    )?;
    for (name, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        // There already.
        let _ = symlink(target, name);
    }
    Ok(())
}
