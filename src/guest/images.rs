//! Images that folders were packed into, for guests in whose memory they have no room. Each is made once, by mke2fs(8), and
//! kept in the cache until the folder changes or others need its room.
//!
//! A file `lock` there is locked by whoever makes or removes an image, one at a time; an image is locked, shared, by
//! the guests that use it. These are flock(2)'s locks: they go with the process, however it ends.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::hash::{Hash, Hasher};
use std::io::{ErrorKind, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use siphasher::sip128::{Hasher128, SipHasher24};

use super::kernel;
use super::program::{program, run};
use super::tree::Tree;
use crate::error::{Context, Error, Result};
use crate::log::in_one_line;

/// How much room images have unless something else is said, in MiB.
pub const LIMIT_MIB: u64 = 10 << 10;
/// Whoever makes images in another way changes this: those that there are by then are not taken for new ones.
const WAY: &str = "alula image 1";
/// Changes of a file within this time can have the same time of change (a tick of the kernel's clock is 10 ms at most).
const TICK: Duration = Duration::from_millis(20);
/// The blocks of an image, in bytes.
const BLOCK: u64 = 4096;
const ROOT_INODE: u64 = 2;
/// The first inode that mke2fs gives away, to `lost+found`; what is packed has the next ones.
const FIRST_INODE: u64 = 11;
const MISSING: &str = "install e2fsprogs; without it a folder goes along in the guest's memory, if it has room in a \
                       quarter of it (--memory) and no file in it has extended attributes";

const IMAGE: &str = "ext4";
/// A link to the folder that an image was made from.
const ORIGIN: &str = "from";
const UNFINISHED: &str = "new";

/// The images of a cache.
#[derive(Debug)]
pub struct Images {
    /// The folder they are in.
    pub folder: PathBuf,
}

/// An image that stays where it is for as long as this is here.
#[derive(Debug)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    _used: File,
}

/// An image as a user sees it.
#[derive(Debug)]
pub struct Kept {
    /// Where it is.
    pub path: PathBuf,
    /// The folder that it was made from.
    pub origin: PathBuf,
    /// How many bytes of the disk it takes.
    pub size: u64,
    /// When a guest began to use it.
    pub used_last: SystemTime,
    /// A guest uses it.
    pub is_in_use: bool,
}

/// What was removed, and what had to stay.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// So many images.
    pub count: usize,
    /// So many bytes.
    pub size: u64,
    /// Guests use so many others.
    pub in_use: usize,
}

fn of_mib(size: u64) -> u64 {
    size.div_ceil(1 << 20)
}

/// The name of the image of a folder as it is now: first what tells the folder, then what tells its state.
fn name(tree: &Tree, keep_owners: bool) -> String {
    let mut hasher = SipHasher24::new();
    (WAY, tree.folder.as_os_str(), keep_owners).hash(&mut hasher);
    let place = hasher.finish();
    tree.feed(&mut hasher);
    format!("{place:016x}-{:032x}", hasher.finish128().as_u128())
}

impl Images {
    /// Those of the user's cache.
    pub fn of_user() -> Self {
        Self { folder: kernel::cache().join("images") }
    }

    /// The image of a folder: the one that there is, or a new one. `keep_owners`: else all in it is root's. `limit_mib`:
    /// all images together may take so much room. `say` is told what takes long, before it begins.
    pub fn of(&self, tree: &Tree, keep_owners: bool, limit_mib: u64, say: impl Fn(&str)) -> Result<Image> {
        let path = tree.folder.canonicalize();
        let tree_path = path.with_context(|| format!("find folder `{}`", tree.folder.display()))?;
        let name = name(tree, keep_owners);
        let attempt =
            || format!("pack folder `{}` into an image in `{}`", tree_path.display(), self.folder.display());
        if let Some(image) = self.take(&name).with_context(attempt)? {
            return Ok(image);
        }
        let size = tree.content();
        if of_mib(size) > limit_mib {
            return Err(Error::config(format!(
                "it has {} MiB, and images may take {limit_mib} MiB: allow more by --cache-limit, or make an image by \
                 hand (`mke2fs -t ext4 -d FOLDER IMAGE SIZE`)",
                of_mib(size)
            )))
            .with_context(attempt);
        }
        let lock = self.lock(&say).with_context(attempt)?;
        // Another run may have made it meanwhile.
        if let Some(image) = self.take(&name).with_context(attempt)? {
            return Ok(image);
        }
        self.remove_unfinished();
        self.make_room(&name, size, limit_mib << 20).with_context(attempt)?;
        say(&format!("packing folder `{}` into an image ({} MiB)", tree_path.display(), of_mib(size)));
        self.pack(tree, keep_owners, &name, &lock).with_context(attempt)?;
        symlink(&tree_path, self.file(&name, ORIGIN))
            .and_then(|()| fs::rename(self.file(&name, UNFINISHED), self.file(&name, IMAGE)))
            .context("put it in its place")
            .with_context(attempt)?;
        let gone = || Error::host("somebody has removed it at once");
        self.take(&name).and_then(|image| image.ok_or_else(gone)).with_context(attempt)
    }

    fn file(&self, name: &str, ending: &str) -> PathBuf {
        self.folder.join(name).with_extension(ending)
    }

    /// The image of this name, if there is one, from now on in use.
    fn take(&self, name: &str) -> Result<Option<Image>> {
        let path = self.file(name, IMAGE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("open `{}`", path.display())),
        };
        let attempt = || format!("lock `{}`", path.display());
        file.lock_shared().with_context(attempt)?;
        // It may have been removed before it was locked.
        if file.metadata().with_context(attempt)?.nlink() == 0 {
            return Ok(None);
        }
        // The time of the last use, by which the oldest images go first. Only the owner of a cache can set it.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(Image { path, _used: file }))
    }

    /// Waits until nobody else makes or removes images.
    fn lock(&self, say: &impl Fn(&str)) -> Result<File> {
        let attempt = || format!("lock `{}`", self.folder.display());
        // Whoever may not read the folders need not read the images of them.
        let created = DirBuilder::new().recursive(true).mode(0o700).create(&self.folder);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let opened = created.and_then(|()| options.open(self.folder.join("lock")));
        let file = opened.map_err(|error| kernel::cannot_keep(&error)).with_context(attempt)?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => say("waiting for another process, which packs a folder"),
            Err(TryLockError::Error(error)) => return Err(error).with_context(attempt),
        }
        file.lock().with_context(attempt)?;
        Ok(file)
    }

    /// What a process left that was killed: whoever has the lock makes the only image that is being made.
    fn remove_unfinished(&self) {
        for path in self.files() {
            let image = path.with_extension(IMAGE);
            let is_left = match path.extension().and_then(OsStr::to_str) {
                Some(UNFINISHED) => true,
                Some(ORIGIN) => !image.exists(),
                _ => false,
            };
            if is_left {
                let _ = fs::remove_file(path);
            }
        }
    }

    fn files(&self) -> impl Iterator<Item = PathBuf> + use<> {
        fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path())
    }

    /// All images, the one used longest ago first.
    pub fn list(&self) -> Vec<Kept> {
        let images = self.files().filter(|path| path.extension() == Some(OsStr::new(IMAGE)));
        // One that went away in the meantime is none.
        let kept = |path: PathBuf| {
            let file = File::open(&path).ok()?;
            let metadata = file.metadata().ok()?;
            let is_in_use = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
            Some(Kept {
                origin: path.with_extension(ORIGIN).read_link().unwrap_or_default(),
                size: metadata.blocks() * 512,
                used_last: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                is_in_use,
                path,
            })
        };
        let mut list: Vec<_> = images.filter_map(kept).collect();
        list.sort_by(|a, b| (a.used_last, &a.path).cmp(&(b.used_last, &b.path)));
        list
    }

    /// Removes all images that no guest uses.
    pub fn clear(&self, say: impl Fn(&str)) -> Result<Removed> {
        let mut removed = Removed::default();
        if !self.folder.exists() {
            return Ok(removed);
        }
        let _lock = self.lock(&say)?;
        self.remove_unfinished();
        for image in self.list() {
            if remove(&image.path)? {
                removed.count += 1;
                removed.size += image.size;
            } else {
                removed.in_use += 1;
            }
        }
        Ok(removed)
    }

    /// Removes images, of this folder's earlier states and then the ones used longest ago, until there is room for `size`
    /// bytes more.
    fn make_room(&self, name: &str, size: u64, limit: u64) -> Result<()> {
        let place = name.split('-').next().unwrap_or_default();
        let is_earlier = |image: &Kept| {
            image.path.file_name().is_some_and(|name| name.as_bytes().starts_with(place.as_bytes()))
        };
        let (earlier, others): (Vec<_>, Vec<_>) = self.list().into_iter().partition(is_earlier);
        let mut kept: u64 = earlier.iter().chain(&others).map(|image| image.size).sum();
        for image in &earlier {
            kept -= if remove(&image.path)? { image.size } else { 0 };
        }
        for image in &others {
            if kept.saturating_add(size) <= limit {
                return Ok(());
            }
            kept -= if remove(&image.path)? { image.size } else { 0 };
        }
        if kept.saturating_add(size) <= limit {
            return Ok(());
        }
        Err(Error::host(format!(
            "it has {} MiB, images may take {} MiB, and guests that run use images of {} MiB: allow more by \
             --cache-limit, or wait for them",
            of_mib(size),
            of_mib(limit),
            of_mib(kept)
        )))
    }

    /// Makes the image. What happens to the folder meanwhile may be in it or not: a file that changes has another time then,
    /// and this image is never taken for the folder's again.
    fn pack(&self, tree: &Tree, keep_owners: bool, name: &str, lock: &File) -> Result<()> {
        tree.check_readable()?;
        std::thread::sleep(TICK);
        let path = self.file(name, UNFINISHED);
        // More than it takes: what is not used of it is a hole.
        let (count, size) = (tree.entries.len() as u64, tree.size());
        let size = size.saturating_add(size / 32).saturating_add(count * 10240).saturating_add(64 << 20);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|file| file.set_len(size.next_multiple_of(BLOCK)))
            .with_context(|| format!("make a file of {} MiB", of_mib(size)))?;
        let mut make = program("mke2fs");
        make.args(["-q", "-F", "-t", "ext4", "-b", &BLOCK.to_string(), "-I", "256", "-m", "0"])
            .args(["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard"])
            .args(["-N", &(count + 1024).to_string(), "-d"])
            .args([&std::path::absolute(&tree.folder).context("find the folder")?, &path])
            // Its standard input is the lock, which is held until it ends, even if this process is killed.
            .stdin(lock.try_clone().context("share the lock")?);
        run(&mut make, MISSING)?;
        self.set_owners(tree, keep_owners, &path)
    }

    /// What mke2fs does not do: it gives files the owners that they have here, and the root a mode of its own.
    fn set_owners(&self, tree: &Tree, keep_owners: bool, image: &Path) -> Result<()> {
        let attempt = "say whose the files in the image are";
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_TMPFILE);
        let mut commands = options.open(&self.folder).context(attempt)?;
        commands.write_all(owner_commands(tree, keep_owners).as_bytes()).context(attempt)?;
        commands.rewind().context(attempt)?;
        let mut set = program("debugfs");
        let output = run(set.args(["-w", "-f", "-"]).arg(image).stdin(commands), MISSING).context(attempt)?;
        // It goes on after a command that fails. Its first line is its version.
        match String::from_utf8_lossy(&output.stderr).lines().find(|line| !line.starts_with("debugfs 1.")) {
            Some(line) => {
                Err(Error::host(format!("`debugfs` failed: {}", in_one_line(line)))).context(attempt)
            }
            None => Ok(()),
        }
    }
}

/// What debugfs(8) is told. Inodes have numbers, and files whatever names: all of them are counted.
fn owner_commands(tree: &Tree, keep_owners: bool) -> String {
    let root = &tree.entries[0].metadata;
    let of = |inode: u64, user: u32, group: u32| {
        format!("set_inode_field <{inode}> uid {user}\nset_inode_field <{inode}> gid {group}\n")
    };
    let (user, group) = if keep_owners { (root.uid(), root.gid()) } else { (0, 0) };
    let mut commands = format!("set_inode_field <{ROOT_INODE}> mode 0{:o}\n", root.mode());
    commands += &of(ROOT_INODE, user, group);
    if !keep_owners {
        let last = FIRST_INODE + tree.entries.len() as u64;
        commands.extend((FIRST_INODE..last).map(|inode| of(inode, 0, 0)));
    }
    commands
}

/// Removes an image, unless a guest uses it.
fn remove(path: &Path) -> Result<bool> {
    let attempt = || format!("remove `{}`", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error).with_context(attempt),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(error)) => return Err(error).with_context(attempt),
    }
    fs::remove_file(path).with_context(attempt)?;
    let _ = fs::remove_file(path.with_extension(ORIGIN));
    Ok(true)
}
