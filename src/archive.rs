//! Files and trees as a tar stream, as they go into a guest and out of it. The first entry is `.`, the file or folder
//! itself; the names of others begin there. Both sides can be hostile: what comes stays where it belongs.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tar::{Archive, Builder, EntryType, Header};

use crate::error::{Context, Error, Result};

/// The name of a stream's first entry.
const ROOT: &str = ".";
/// So many folders, and so many files with several names, one stream may have: they are remembered to the end.
const REMEMBERED_MAX: usize = 1 << 20;

/// Where what is called `name` goes if it is to go to `path`: into it, if that is a folder.
pub fn target(path: &Path, name: &str) -> PathBuf {
    let is_name = Path::new(name).file_name().is_some_and(|last| last == name);
    if path.is_dir() && is_name { path.join(name) } else { path.to_owned() }
}

/// Writes what is at `path` to `out`; what no stream has (sockets, devices, FIFOs) is left out of a folder, and `told`. A
/// link that `path` itself is, is followed; of what no stream has there would be nothing to write, which is an error.
pub fn send(path: &Path, out: impl Write, mut told: impl FnMut(&str)) -> Result<()> {
    let attempt = |path: &Path| format!("read `{}`", path.display());
    let root = path.canonicalize().with_context(|| attempt(path))?;
    let metadata = root.metadata().with_context(|| attempt(path))?;
    if !(metadata.is_dir() || metadata.is_file()) {
        return Err(Error::config("it is neither a file nor a folder")).with_context(|| attempt(path));
    }
    let mut builder = Builder::new(out);
    builder.follow_symlinks(false);
    let mut seen: HashMap<(u64, u64), PathBuf> = HashMap::new();
    // A stack of our own: a tree can be deeper than the thread's.
    let mut left = vec![PathBuf::from(ROOT)];
    while let Some(name) = left.pop() {
        let place = if name == Path::new(ROOT) { root.clone() } else { root.join(&name) };
        let kind = match place.symlink_metadata() {
            Ok(metadata) => metadata,
            // It went away in the meantime.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && name != Path::new(ROOT) => continue,
            Err(error) => return Err(error).with_context(|| attempt(&place)),
        };
        if !(kind.is_dir() || kind.is_file() || kind.is_symlink()) {
            told(&format!("`{}` is left out: it is neither a file nor a folder nor a link", place.display()));
            continue;
        }
        if kind.is_file() && kind.nlink() > 1 && seen.len() < REMEMBERED_MAX {
            if let Some(first) = seen.get(&(kind.dev(), kind.ino())) {
                let mut header = Header::new_gnu();
                header.set_metadata(&kind);
                header.set_entry_type(EntryType::Link);
                header.set_size(0);
                builder.append_link(&mut header, &name, first).with_context(|| attempt(&place))?;
                continue;
            }
            seen.insert((kind.dev(), kind.ino()), name.clone());
        }
        builder.append_path_with_name(&place, &name).with_context(|| attempt(&place))?;
        if kind.is_dir() {
            let mut names = fs::read_dir(&place)
                .and_then(|entries| {
                    entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>, _>>()
                })
                .with_context(|| attempt(&place))?;
            // The last is taken first.
            names.sort_unstable_by(|a, b| b.cmp(a));
            left.extend(names.into_iter().map(|child| match name == Path::new(ROOT) {
                true => PathBuf::from(child),
                false => name.join(child),
            }));
        }
    }
    builder.into_inner().and_then(|mut out| out.flush()).with_context(|| attempt(&root))
}

/// Reads a stream from `from` and makes `target` of it. A folder goes into one that is there, a file over a file, and
/// nothing over something of another kind. `keep_owners`: files belong to whom the stream says.
pub fn receive(target: &Path, from: impl Read, keep_owners: bool) -> Result<()> {
    let attempt = || format!("write `{}`", target.display());
    let mut archive = Archive::new(from);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(keep_owners);
    let mut folders: Vec<(PathBuf, u32, Option<u64>)> = Vec::new();
    let mut is_first = true;
    for entry in archive.entries().with_context(attempt)? {
        let mut entry = entry.with_context(attempt)?;
        let name = entry.path().with_context(attempt)?.into_owned();
        let kind = entry.header().entry_type();
        if !(kind.is_dir()
            || kind.is_file()
            || kind.is_symlink()
            || kind.is_hard_link()
            || kind.is_gnu_sparse())
        {
            return Err(Error::guest(format!(
                "`{}` is neither a file nor a folder nor a link",
                name.display()
            )))
            .with_context(attempt);
        }
        let is_root = std::mem::take(&mut is_first);
        if is_root != (name == Path::new(ROOT))
            || (is_root && !(kind.is_dir() || kind.is_file() || kind.is_gnu_sparse()))
        {
            return Err(Error::guest(format!("`{}` is not what a stream begins with", name.display())))
                .with_context(attempt);
        }
        if is_root {
            check_root(target, kind.is_dir()).with_context(attempt)?;
        }
        if kind.is_dir() {
            if folders.len() == REMEMBERED_MAX {
                let why = format!("it has more than {REMEMBERED_MAX} folders");
                return Err(Error::guest(why)).with_context(attempt);
            }
            let place = if is_root { target.to_owned() } else { target.join(&name) };
            let mode = entry.header().mode().with_context(attempt)?;
            folders.push((place, mode, entry.header().mtime().ok()));
        }
        let mut unpack =
            || if is_root { entry.unpack(target).map(|_| true) } else { entry.unpack_in(target) };
        let is_there = match unpack() {
            // The place was found to be inside; a link has no data that would be gone now.
            Err(error) if kind.is_hard_link() && error.kind() == std::io::ErrorKind::AlreadyExists => {
                fs::remove_file(target.join(&name)).and_then(|()| unpack())
            }
            result => result,
        };
        if !is_there.with_context(attempt)? {
            return Err(Error::guest(format!("`{}` leads out of it", name.display()))).with_context(attempt);
        }
        if kind.is_dir() {
            let (place, ..) = folders.last().expect("it was put there");
            // Its own mode, which may forbid to write into it, comes when everything is in it.
            fs::set_permissions(place, Permissions::from_mode(0o700)).with_context(attempt)?;
        }
    }
    if is_first {
        return Err(Error::guest("the stream has ended before it began")).with_context(attempt);
    }
    finish(folders).with_context(attempt)
}

/// Gives folders the modes and times that they have in the stream, the innermost first.
fn finish(folders: Vec<(PathBuf, u32, Option<u64>)>) -> std::io::Result<()> {
    for (place, mode, mtime) in folders.into_iter().rev() {
        // A later entry can have put something else there.
        let Ok(folder) = File::open(&place) else { continue };
        folder.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        let time =
            mtime.and_then(|seconds| SystemTime::checked_add(&UNIX_EPOCH, Duration::from_secs(seconds)));
        if let Some(time) = time {
            // A file system without times keeps its own.
            let _ = folder.set_times(FileTimes::new().set_modified(time));
        }
    }
    Ok(())
}

fn check_root(target: &Path, is_folder: bool) -> Result<()> {
    let Ok(there) = target.symlink_metadata() else { return Ok(()) };
    match (is_folder, there.is_dir()) {
        (true, true) => Ok(()),
        (false, false) if there.is_file() || there.is_symlink() => Ok(()),
        (true, false) => Err(Error::config("a folder does not go over what is not a folder")),
        (false, true) => Err(Error::config("a file does not go over a folder")),
        (false, false) => Err(Error::config("what is there is not a file")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("alula-archive-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn stream(path: &Path) -> (Vec<u8>, Vec<String>) {
        let (mut bytes, mut told) = (Vec::new(), Vec::new());
        send(path, &mut bytes, |line| told.push(line.to_owned())).unwrap();
        (bytes, told)
    }

    #[test]
    fn a_tree_arrives_as_it_was_sent() {
        let folder = Folder::new("tree");
        let from = folder.0.join("from");
        let long = "a folder with a name ".repeat(8);
        fs::create_dir_all(from.join(&long)).unwrap();
        fs::write(from.join(&long).join("x".repeat(200)), "deep").unwrap();
        fs::write(from.join("run me"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(from.join("run me"), Permissions::from_mode(0o4755)).unwrap();
        fs::hard_link(from.join("run me"), from.join("zz")).unwrap();
        symlink("/nowhere/at all", from.join("link")).unwrap();
        let holes = File::create(from.join("holes")).unwrap();
        holes.set_len(64 << 20).unwrap();
        fs::create_dir(from.join("shut")).unwrap();
        fs::write(from.join("shut/file"), "").unwrap();
        fs::set_permissions(from.join("shut"), Permissions::from_mode(0o555)).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();

        let (bytes, told) = stream(&from);
        assert!(bytes.len() < 1 << 20, "holes are not sent: {}", bytes.len());
        assert_eq!(told.len(), 1);
        assert!(told[0].ends_with("socket` is left out: it is neither a file nor a folder nor a link"));
        let to = folder.0.join("to");
        receive(&to, &bytes[..], false).unwrap();
        assert_eq!(fs::read(to.join(&long).join("x".repeat(200))).unwrap(), b"deep");
        let metadata = |name: &str| to.join(name).symlink_metadata().unwrap();
        assert_eq!(metadata("run me").mode() & 0o7777, 0o4755);
        assert_eq!(metadata("run me").ino(), metadata("zz").ino());
        assert_eq!(metadata("run me").mtime(), from.join("run me").metadata().unwrap().mtime());
        assert_eq!(to.join("link").read_link().unwrap(), Path::new("/nowhere/at all"));
        assert!(metadata("holes").len() == 64 << 20 && metadata("holes").blocks() < 1000);
        assert_eq!(metadata("shut").mode() & 0o777, 0o555);
        assert!(!to.join("socket").exists());
        // Once more over itself.
        receive(&to, &bytes[..], false).unwrap();

        let file = folder.0.join("file");
        receive(&file, &stream(&from.join("run me")).0[..], false).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"#!/bin/sh\n");
        let told = |target: &Path, bytes: &[u8]| receive(target, bytes, false).unwrap_err().to_string();
        assert!(told(&file, &bytes).ends_with("a folder does not go over what is not a folder"));
        let (bytes, _) = stream(&from.join("run me"));
        assert!(told(&to, &bytes).ends_with("a file does not go over a folder"));
        assert!(told(&folder.0.join("new"), &[0; 1024]).ends_with("the stream has ended before it began"));
        assert_eq!(target(&to, "a"), to.join("a"));
        for name in ["..", "", "a/b", "/etc"] {
            assert_eq!(target(&to, name), to, "{name}");
        }
    }

    #[test]
    fn nothing_of_a_hostile_stream_is_written_elsewhere() {
        let folder = Folder::new("hostile");
        let outside = folder.0.join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "safe").unwrap();
        let outside = outside.to_str().unwrap();
        let secret = &format!("{outside}/secret");
        let (file, link, hard) = (EntryType::Regular, EntryType::Symlink, EntryType::Link);
        let cases: &[&[(EntryType, &str, &str)]] = &[
            &[(file, "../outside/secret", "")],
            &[(file, "x", ""), (file, "a/../../outside/secret", "")],
            &[(link, "way", outside), (file, "way/secret", "")],
            &[(link, "way", "../outside"), (hard, "mine", "way/secret"), (file, "mine", "")],
            &[(hard, "mine", secret), (file, "mine", "")],
            &[(EntryType::Char, "null", "")],
            &[(EntryType::Fifo, "pipe", "")],
            &[(file, ".", "")],
        ];
        for (number, entries) in cases.iter().enumerate() {
            let mut builder = Builder::new(Vec::new());
            let root = (EntryType::Directory, ".", "");
            for (kind, name, to) in std::iter::once(&root).chain(*entries) {
                let mut header = Header::new_gnu();
                header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
                header.as_old_mut().linkname[..to.len()].copy_from_slice(to.as_bytes());
                header.set_entry_type(*kind);
                header.set_mode(0o755);
                header.set_size(if *kind == file { 4 } else { 0 });
                header.set_cksum();
                builder.append(&header, if *kind == file { &b"evil"[..] } else { b"" }).unwrap();
            }
            let target = folder.0.join(format!("target-{number}"));
            let result = receive(&target, &builder.into_inner().unwrap()[..], false);
            assert!(result.is_err(), "{entries:?}");
            assert_eq!(fs::read(secret).unwrap(), b"safe", "{entries:?}");
            assert_eq!(fs::read_dir(outside).unwrap().count(), 1);
        }
        // One without its first entry, and one that breaks off.
        let whole = stream(&folder.0).0;
        for cut in [1, 511, 513, 700, 1025] {
            let target = folder.0.join(format!("cut-{cut}"));
            assert!(receive(&target, &whole[..cut], false).is_err(), "cut at {cut}");
        }
    }
}
