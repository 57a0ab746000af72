//! `alula run -- COMMAND`: a guest that is there for one command.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::arguments::Run;
use super::arguments::command::{Rootfs, Wanted};
use super::console::{Console, ConsoleEnd, Tail};
use super::exec::{copy_in, copy_out};
use super::session::{self, Ends, Outcome};
use crate::agent::init::{Boot, Disk};
use crate::archive;
use crate::config::Config;
use crate::descriptors::Named;
use crate::devices::kind::ConfiguredDevice;
use crate::devices::{KINDS, block, pmem, vhost_user};
use crate::error::{Context, Error, Kind, Result};
use crate::guest::boot;
use crate::guest::call::{self, Call};
use crate::guest::hearing::Hearing;
use crate::guest::images::{self, Image, Images};
use crate::guest::tree::Tree;
use crate::guest::{kernel, root_image, runtime};
use crate::host::console::Output;
use crate::host::socket_file::OwnFolder;
use crate::host::{self, Access, Resource};
use crate::microvm::purpose::Purpose;
use crate::paths;
use crate::poll::leave_signals_to_others;
use crate::protocol::PORT;
use crate::protocol::request::Ask;
use crate::sys::descriptor;

/// An agent that has said that it listens, and then does not answer, is asked again after this time.
const AGAIN: Duration = Duration::from_secs(1);
/// A guest whose agent does not answer for so long never will.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a guest may take to write its disks out and power off, after its command has ended.
const LAST_WORDS: Duration = Duration::from_secs(30);
/// How long a connection to the guest can be gone before the guest has ended.
const GRACE: Duration = Duration::from_secs(1);

/// Makes a folder of this process's own, which nobody else can enter.
fn make_own_folder() -> Result<OwnFolder> {
    OwnFolder::make(&runtime::folder())
        .or_else(|_| OwnFolder::make(&std::env::temp_dir()))
        .with_context(|| format!("make a folder in `{}`", std::env::temp_dir().display()))
}

/// What the guest's initial ramdisk is called, which has no path.
const RAMDISK: &str = "(of the command)";

/// A guest for a command: its configuration, and what has to live as long as it does.
pub struct Prepared {
    pub config: Config,
    vsock: PathBuf,
    writable: bool,
    wanted: Wanted,
    console: Arc<Console>,
    outcome: Arc<Mutex<Option<Result<Outcome>>>>,
    ramdisk: Option<File>,
    /// What its root was packed into, in use until it ends.
    _image: Option<Image>,
    _own_folder: OwnFolder,
}

/// Prepares the guest that `arguments` describe.
pub fn prepare(arguments: &mut Run) -> Result<Prepared> {
    let wanted = std::mem::take(&mut arguments.wanted);
    // A guest is not to be booted in vain.
    for (from, to) in &wanted.copies {
        from.canonicalize()
            .with_context(|| format!("copy `{}` to `{}` in the guest", from.display(), to.display()))?;
    }
    wanted.copies_out.iter().try_for_each(|(from, to)| check_copy_out(from, to))?;
    let kernel = kernel::find(arguments.kernel.as_deref())?;
    arguments.kernel = Some(kernel.path.clone());
    let mut config = arguments.config()?;
    let line = config.boot_source.as_mut().and_then(|source| source.boot_args.as_mut());
    line.into_iter().for_each(|line| *line += &format!(" {}", boot::words()));
    config.check()?;
    online_memory(&mut config);
    let own_folder = make_own_folder()?;
    arguments.walls.own = Some(own_folder.path().to_owned());
    let vsock = add_vsock(&mut config, &own_folder)?;
    let mut boot = Boot { hostname: Some(arguments.id.clone()), ..Boot::default() };
    let (mut modules, mut tree, mut image) = (Vec::new(), None, None);
    match &wanted.rootfs {
        Some(rootfs) if rootfs.path.is_dir() && rootfs.writable => {
            return Err(Error::config(format!(
                "--rootfs {},rw: `rw` is for images: a folder goes along as a copy, and what is written to that goes with \
                 the guest (`--copy-out` brings files back)",
                rootfs.path.display()
            )));
        }
        Some(rootfs) if rootfs.path.is_dir() => {
            tree = Some(Tree::read(&rootfs.path)?);
            let memory_mib = config.machine_config.mem_size_mib;
            if let Some(packed) = tree.take_if(|tree| !boot::fits(tree, memory_mib)) {
                let limit = wanted.cache_limit_mib.unwrap_or(images::LIMIT_MIB);
                let packed = Images::of_user().of(&packed, wanted.keep_owners, limit, say)?;
                let rootfs = Rootfs { path: packed.path.clone(), writable: false };
                modules = add_disk(&mut config, &rootfs, &mut boot)?;
                image = Some(packed);
            }
        }
        Some(rootfs) => modules = add_disk(&mut config, rootfs, &mut boot)?,
        None => modules = root_of_config(&config, &mut boot)?,
    }
    modules.extend(drivers(&config));
    let tree = tree.as_ref().map(|tree| (tree, wanted.keep_owners));
    let writable = boot.disk.as_ref().is_some_and(|disk| disk.writable);
    let ramdisk = boot::pack(&kernel, &modules, boot, tree)?;
    if let Some(source) = &mut config.boot_source {
        source.initrd_path = Some(RAMDISK.into());
    }
    config.check()?;
    Ok(Prepared {
        config,
        vsock,
        writable,
        wanted,
        console: Arc::default(),
        outcome: Arc::default(),
        ramdisk: Some(ramdisk),
        _image: image,
        _own_folder: own_folder,
    })
}

/// Tells a user who waits for what takes long. What else reads standard error reads the command's words alone.
fn say(line: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("alula: {line}");
    }
}

fn device(section: &str, json: &serde_json::Value) -> Result<ConfiguredDevice> {
    let kind = KINDS.iter().find(|kind| kind.section == section);
    let kind = kind.ok_or_else(|| Error::config(format!("this program has no {section} device")))?;
    kind.parse(&serde_json::to_vec(json).context("describe a device")?).context("describe a device")
}

/// The path of the guest's vsock socket: that of the device it has, or of one it is given.
fn add_vsock(config: &mut Config, own_folder: &OwnFolder) -> Result<PathBuf> {
    let there = config.devices().find(|device| device.kind().section == "vsock").cloned();
    let device = match there {
        Some(device) => device,
        None => device("vsock", &serde_json::json!({"guest_cid": 3, "uds_path": own_folder.socket()}))?,
    };
    let value = serde_json::to_value(&device).context("read the vsock device's path")?;
    config.put(device)?;
    Ok(value["uds_path"].as_str().unwrap_or_default().into())
}

/// Makes the image the first disk; returns the modules that it needs.
fn add_disk(config: &mut Config, rootfs: &Rootfs, boot: &mut Boot) -> Result<Vec<&'static str>> {
    let kind = root_image::look(&rootfs.path, rootfs.writable)?;
    // The first of its kind, whatever other disks there are.
    let disk = serde_json::json!({
        "drive_id": "rootfs",
        "path_on_host": rootfs.path,
        "is_root_device": true,
        "is_read_only": !rootfs.writable,
    });
    config.put(device("drives", &disk)?)?;
    Ok(boot_from(boot, DISK, &[kind], rootfs.writable))
}

/// The first disk of a guest.
const DISK: &str = "/dev/vda";
/// The first file that a guest sees as memory.
const PMEM: &str = "/dev/pmem0";

/// Has the init go on with the file system on this device, of one of these kinds; returns the modules that it needs. Of one
/// that is memory and is not written, files are read and mapped where they are, if the guest's kernel and the file system can
/// do that (Documentation/filesystems/dax.rst): guests of one image have it in the host's memory once.
fn boot_from(boot: &mut Boot, device: &str, kinds: &[&'static str], writable: bool) -> Vec<&'static str> {
    let options: &[&str] = if device == PMEM && !writable { &["dax", ""] } else { &[""] };
    let [types, options] =
        [kinds, options].map(|words| words.iter().map(|word| (*word).to_owned()).collect());
    boot.disk = Some(Disk { device: device.to_owned(), types, options, writable });
    let overlay = if writable { None } else { Some("overlay") };
    kinds.iter().copied().chain(overlay).collect()
}

/// Makes the device that the configuration calls the guest's root that of the init, too; returns the modules that it
/// needs.
fn root_of_config(config: &Config, boot: &mut Boot) -> Result<Vec<&'static str>> {
    let Some(root) = config.devices().find(|device| device.root_words().is_some()) else {
        return Ok(Vec::new());
    };
    let attempt = || format!("boot a command's guest from {}", root.name());
    if let Some(disk) = root.config::<block::Config>() {
        if disk.partuuid.is_some() {
            let whole = "its root is a partition (`partuuid`), and that of a command's guest a whole disk";
            return Err(Error::config(whole)).with_context(attempt);
        }
        let kinds = match disk.format {
            // The first bytes of its file are those of the container, or somebody else has the disk.
            block::Format::Raw if disk.socket.is_none() => {
                vec![root_image::look(disk.file().1, !disk.is_read_only).with_context(attempt)?]
            }
            block::Format::Qcow2 | block::Format::Raw => root_image::KINDS.to_vec(),
        };
        return Ok(boot_from(boot, DISK, &kinds, !disk.is_read_only));
    }
    let Some(pmem) = root.config::<pmem::Config>() else {
        return Err(Error::config("it is neither a disk nor a pmem device")).with_context(attempt);
    };
    let kind = root_image::look(&pmem.path_on_host, !pmem.read_only).with_context(attempt)?;
    Ok(boot_from(boot, PMEM, &[kind], !pmem.read_only))
}

/// Whether what is at `from` in the guest can come to `to` here, as far as can be told before: the folder is there, and
/// this user may write to it.
fn check_copy_out(from: &Path, to: &Path) -> Result<()> {
    let name = from.file_name().unwrap_or_default().to_string_lossy();
    let target = archive::target(to, &name);
    let folder = paths::folder(&target);
    let is_there = if folder.is_dir() { Ok(()) } else { Err(ErrorKind::NotFound.into()) };
    is_there
        .and_then(|()| descriptor::check_writable(folder))
        .map_err(|error| paths::cannot_make(&target, &error))
        .with_context(|| format!("copy `{}` in the guest to `{}`", from.display(), to.display()))
}

/// Has the guest's kernel use memory as it is plugged, so that all of that can be unplugged, unless the command line says
/// otherwise: by itself, it leaves that to other programs (Documentation/admin-guide/mm/memory-hotplug.rst).
fn online_memory(config: &mut Config) {
    const NAME: &str = "memhp_default_state=";
    let is_plugged = config.devices().any(|device| device.room().is_some());
    let line = config.boot_source.as_mut().and_then(|source| source.boot_args.as_mut());
    if let Some(line) = line.filter(|line| is_plugged && !line.contains(NAME)) {
        line.push_str(&format!(" {NAME}online_movable"));
    }
}

/// The modules of the drivers that the guest's devices need.
fn drivers(config: &Config) -> Vec<&'static str> {
    let of = |section: &str| -> &[&'static str] {
        match section {
            "drives" => &["virtio_blk"],
            "network-interfaces" => &["virtio_net"],
            "entropy" => &["virtio_rng"],
            "vsock" => &["vmw_vsock_virtio_transport"],
            "balloon" => &["virtio_balloon"],
            "console" | "ports" => &["virtio_console"],
            "memory-hotplug" => &["virtio_mem"],
            // The second makes a block device of what the first has found.
            "pmem" => &["virtio_pmem", "nd_pmem"],
            _ => &[],
        }
    };
    let transport = if config.pci { "virtio_pci" } else { "virtio_mmio" };
    let of_backends = config.devices().filter_map(|device| device.config::<vhost_user::Config>()?.driver());
    std::iter::once(transport)
        .chain(config.devices().flat_map(|device| of(device.kind().section)).copied())
        .chain(of_backends)
        .collect()
}

impl Prepared {
    /// What the guest is given that has no path: its initial ramdisk, and where its console writes.
    pub fn resources(&mut self) -> impl Iterator<Item = (&'static str, Resource)> {
        let (path, access) = (RAMDISK.into(), Access::Read);
        let ramdisk = self.ramdisk.take().map(|file| Named::new("initrd", file));
        let ramdisk = ramdisk.map(|file| ("initrd", Resource::File { path, access, file }));
        let console = Resource::Console(Output::other(Box::new(ConsoleEnd(self.console.clone()))));
        ramdisk.into_iter().chain([(host::CONSOLE, console)])
    }

    /// How the command ended, once; none: it did not.
    pub fn outcome(&self) -> Option<Result<Outcome>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The end of what came from the guest's console, for a guest that has ended too early.
    pub fn tail(&self) -> Tail {
        self.console.tail()
    }

    /// What the guest is there for, and what has it begin, in a thread of its own, once the guest runs.
    pub fn attend(&mut self) -> Result<(Arc<Purpose>, impl FnOnce() -> Result<()> + use<>)> {
        let purpose = Arc::new(Purpose::new()?);
        let (outcome, wanted) = (self.outcome.clone(), std::mem::take(&mut self.wanted));
        let mut guest = Guest { vsock: self.vsock.clone(), purpose: purpose.clone(), calls: 0 };
        let writable = self.writable;
        let attend = move || {
            leave_signals_to_others();
            let purpose = guest.purpose.clone();
            let how = guest.attend(wanted);
            if how.is_err() {
                // A guest that ends takes its connections with it: its own end says more, and comes now.
                std::thread::sleep(GRACE);
            }
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(how);
            if writable {
                purpose.meet();
                guest.end();
            }
            purpose.end();
        };
        let begin = move || {
            let thread = std::thread::Builder::new().name("command".to_owned()).spawn(attend);
            thread.map(drop).context("start a thread for the command")
        };
        Ok((purpose, begin))
    }
}

/// The guest, as its command's thread reaches it.
struct Guest {
    vsock: PathBuf,
    purpose: Arc<Purpose>,
    /// How often its agent has said that it listens, as far as that was heard.
    calls: u64,
}

impl Guest {
    /// The agent, once it is there; None: the time was up.
    fn connect(&mut self, deadline: Option<Instant>) -> Result<Option<UnixStream>> {
        let begun = Instant::now();
        let rest = |at: Instant| at.saturating_duration_since(Instant::now());
        loop {
            if self.calls > 0 {
                match call::connect(&self.vsock, PORT) {
                    Ok(Some(stream)) => return Ok(Some(stream)),
                    // Its agent has gone, or the guest is paused.
                    Ok(None) => {}
                    Err(error) if error.kind() == Kind::Guest => {}
                    Err(error) => return Err(error),
                }
            }
            let patience = rest(begun + PATIENCE);
            if patience.is_zero() {
                return Err(Error::guest("the agent in the guest has not answered for 300 s"));
            }
            let again = if self.calls > 0 { AGAIN } else { patience };
            let time = deadline.map_or(again, |at| again.min(rest(at)));
            self.calls = self.purpose.wait_for_call(self.calls, time);
            if deadline.is_some_and(|at| rest(at).is_zero()) {
                return Ok(None);
            }
        }
    }

    fn attend(&mut self, wanted: Wanted) -> Result<Outcome> {
        let deadline = wanted.deadline();
        for (from, to) in &wanted.copies {
            let Some(stream) = self.connect(deadline)? else { return Ok(Outcome::TimedOut) };
            copy_in(stream, from, to, true, None)?;
        }
        let Some(stream) = self.connect(deadline)? else { return Ok(Outcome::TimedOut) };
        let run = session::with_terminal(wanted.run, session::is_on_terminal());
        let outcome = session::attend(stream, run, &Ends { input: true, signals: false, deadline })?;
        match self.copy_all_out(&wanted.copies_out) {
            // The command's own failure is what the caller is to learn of.
            Err(error) if outcome.conclude().0 != 0 => eprintln!("alula: {error}"),
            copied => copied?,
        }
        Ok(outcome)
    }

    fn copy_all_out(&mut self, copies: &[(PathBuf, PathBuf)]) -> Result<()> {
        for (from, to) in copies {
            let Some(stream) = self.connect(None)? else { continue };
            copy_out(stream, from, to, None)?;
        }
        Ok(())
    }

    /// Has the guest end by itself, with its disks written out.
    fn end(&mut self) {
        let deadline = Some(Instant::now() + LAST_WORDS);
        let ended = self.connect(deadline).and_then(|stream| match stream {
            Some(stream) => {
                let call = Call::new(stream, Ask::End { reboot: false })?;
                Hearing::new(call, deadline)?.finish(|_| Ok(())).map(drop)
            }
            None => Ok(()),
        });
        // Its connection ends before the guest has.
        if ended.is_err() {
            std::thread::sleep(GRACE);
        }
    }
}
