//! The descriptors of this process: what each is called that it has opened, and those that it was started with,
//! which users name by number, as `fd:N`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Context, Error, Result};
use crate::sys::descriptor;

/// How a descriptor is named where a path could be.
const PREFIX: &str = "fd:";
/// What the system shows of this process's descriptors as files names them, too: a file that is opened by such
/// a path would be written from a second position.
const FOLDERS: [&str; 2] = ["/dev/fd", "/proc/self/fd"];

/// Inherited descriptors that programs started here do not inherit in turn: see [`Inherited::keep`].
static KEPT: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// What is open is called so, by number.
static NAMES: Mutex<BTreeMap<RawFd, Cow<'static, str>>> = Mutex::new(BTreeMap::new());

fn names() -> MutexGuard<'static, BTreeMap<RawFd, Cow<'static, str>>> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A name that a descriptor has while this lives. Its owner drops it before the descriptor is closed: the number
/// can be another's at once.
#[derive(Debug)]
pub struct Name(RawFd);

impl Name {
    /// Calls the descriptor `name` from now on.
    pub fn new(fd: &impl AsRawFd, name: impl Into<Cow<'static, str>>) -> Self {
        let fd = fd.as_raw_fd();
        names().insert(fd, name.into());
        Self(fd)
    }

    /// The name.
    pub fn text(&self) -> Cow<'static, str> {
        names().get(&self.0).cloned().unwrap_or_default()
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        names().remove(&self.0);
    }
}

/// Something that has a descriptor, which has a name for as long.
// Fields are dropped in this order.
#[derive(Debug)]
pub struct Named<T> {
    name: Name,
    inner: T,
}

impl<T: AsRawFd> Named<T> {
    /// What `inner` has open is called `name`.
    pub fn new(name: impl Into<Cow<'static, str>>, inner: T) -> Self {
        Self { name: Name::new(&inner, name), inner }
    }
}

impl Named<File> {
    /// Another descriptor of the same open file, with the same name.
    ///
    /// # Errors
    /// The process has as many descriptors as it may have.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::new(self.name.text(), self.inner.try_clone()?))
    }
}

impl<T> Deref for Named<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Named<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T: AsRawFd> AsRawFd for Named<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

/// Everything that this process has opened and keeps open, and what it has taken over, by number.
pub fn list() -> BTreeMap<RawFd, Cow<'static, str>> {
    let mut all = names().clone();
    let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    all.extend(kept.iter().map(|fd| (*fd, format!("inherited, {PREFIX}{fd}").into())));
    all
}

/// [`list`], for a line of the log. The list is made when the line is.
pub struct List;

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (fd, name)) in list().iter().enumerate() {
            write!(f, "{}{fd} is {name}", if index > 0 { "; " } else { "" })?;
        }
        Ok(())
    }
}

/// The number, as text, of the descriptor that `path` names; None: `path` is that of a file.
pub fn number(path: &Path) -> Option<&str> {
    let text = path.to_str()?;
    match text {
        "/dev/stdout" => Some("1"),
        "/dev/stderr" => Some("2"),
        _ => text.strip_prefix(PREFIX).or_else(|| number_in_folder(path)),
    }
}

/// The name of a file in a folder that shows the descriptors of this process: `/dev/fd`, `/proc/self/fd`, or
/// another path of the same folder, as `/proc/thread-self/fd` and `/proc/PID/fd` are.
fn number_in_folder(path: &Path) -> Option<&str> {
    let folder = path.parent()?;
    let is_shown = || {
        let real = folder.canonicalize().ok()?;
        let rest = real.strip_prefix(format!("/proc/{}", std::process::id())).ok()?;
        // Of the process, or of one of its threads: `task/TID/fd`.
        (rest.file_name() == Some(OsStr::new("fd"))).then_some(())
    };
    let is_theirs = FOLDERS.iter().any(|shown| folder == Path::new(shown))
        || folder.file_name() == Some(OsStr::new("fd")) && is_shown().is_some();
    if is_theirs { path.file_name()?.to_str() } else { None }
}

/// A descriptor that this process was started with. Nothing here ever closes one.
#[derive(Clone, Copy, Debug)]
pub struct Inherited(RawFd);

/// The descriptor with this number, if whoever started this process has handed it over. An API client could
/// otherwise name a descriptor that the monitor has opened itself, a disk or its own socket, and have lines
/// written there. The kernel knows which are which: a descriptor that is closed when a program starts
/// (FD_CLOEXEC) cannot have come from before this program, and everything that this process opens is.
///
/// # Errors
/// `number` is no number, or that of no inherited descriptor.
pub fn inherited(number: &str) -> Result<Inherited> {
    let fd: RawFd = number.parse().ok().filter(|fd| *fd >= 0).ok_or_else(|| {
        Error::config(format!("`{number}` is not the number of a descriptor, as in `{PREFIX}3`"))
    })?;
    let is_kept = || KEPT.lock().unwrap_or_else(PoisonError::into_inner).contains(&fd);
    let is_given = descriptor::closes_on_exec(fd).is_ok_and(|closes| !closes || is_kept());
    if !is_given || names().contains_key(&fd) {
        return Err(Error::config(
            "no descriptor of this number was inherited: start this process with it, and name it by its \
             number there",
        ));
    }
    Ok(Inherited(fd))
}

impl Inherited {
    /// Another descriptor of the same open file, which can be closed.
    ///
    /// # Errors
    /// The process has as many descriptors as it may have.
    pub fn copy(self) -> Result<OwnedFd> {
        descriptor::duplicate(&self).context("duplicate the descriptor")
    }

    /// Keeps the descriptor from programs that are started from now on.
    pub fn keep(self) {
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).insert(self.as_raw_fd());
        // It is open: nothing here closes it.
        let _ = descriptor::set_closes_on_exec(&self, true);
    }

    /// Whether what is written to it goes anywhere.
    pub fn is_writable(self) -> bool {
        descriptor::status(&self).is_ok_and(|status| status & libc::O_ACCMODE != libc::O_RDONLY)
    }

    /// Lets calls on it fail where they would wait. Whoever else has the open file is subject to it.
    ///
    /// # Errors
    /// The kernel's, of fcntl(2).
    pub fn set_nonblocking(self) -> io::Result<()> {
        descriptor::set_status(&self, descriptor::status(&self)? | libc::O_NONBLOCK)
    }
}

impl AsRawFd for Inherited {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// Makes `fd` look inherited, and gives its name, for a test.
#[cfg(test)]
pub fn hand_over(fd: &impl AsRawFd) -> String {
    descriptor::set_closes_on_exec(fd, false).unwrap();
    format!("{PREFIX}{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_has_its_name_for_as_long_as_it_is_open() {
        let file = Named::new("first", File::open("/dev/null").unwrap());
        let copy = file.try_clone().unwrap();
        let (number, other) = (file.as_raw_fd(), copy.as_raw_fd());
        assert_eq!(
            (list().get(&number).unwrap(), list().get(&other).unwrap()),
            (&"first".into(), &"first".into())
        );
        assert!(List.to_string().contains(&format!("{number} is first")));
        hand_over(&file);
        let error = inherited(&number.to_string()).unwrap_err().to_string();
        assert!(error.contains("no descriptor of this number was inherited"), "{error}");
        drop(file);
        assert_ne!(list().get(&number), Some(&"first".into()));
        assert_eq!(list().get(&other), Some(&"first".into()));
    }

    #[test]
    fn a_descriptor_is_named_in_every_way_the_system_shows_it() {
        let own = format!("/proc/{}/fd/7", std::process::id());
        let thread = format!("/proc/self/task/{}/fd/7", std::process::id());
        for (path, expected) in [
            ("fd:7", Some("7")),
            ("fd:x", Some("x")),
            ("/dev/stderr", Some("2")),
            ("/dev/fd/7", Some("7")),
            ("/proc/self/fd/7", Some("7")),
            ("/proc/thread-self/fd/7", Some("7")),
            ("/proc/self/fd/../fd/7", Some("7")),
            (&own, Some("7")),
            (&thread, Some("7")),
            ("/proc/1/fd/7", None),
            ("/tmp/fd/7", None),
            ("fd", None),
            ("/7", None),
            ("/", None),
        ] {
            assert_eq!(number(Path::new(path)), expected, "{path}");
        }
    }

    #[test]
    fn only_what_was_inherited_can_be_named() {
        let file = File::open("/dev/null").unwrap();
        let number = file.as_raw_fd().to_string();
        let refused = |number: &str| inherited(number).unwrap_err().to_string();
        assert!(refused(&number).contains("no descriptor of this number was inherited"));
        hand_over(&file);
        let given = inherited(&number).unwrap();
        assert!(!given.is_writable());
        given.keep();
        // It can be named again: the one that was given, not what came into its place.
        assert_eq!(inherited(&number).unwrap().as_raw_fd(), file.as_raw_fd());
        assert!(refused("19999").contains("no descriptor of this number was inherited"));
        for number in ["", "x", "-1", "99999999999"] {
            assert_eq!(
                refused(number),
                format!("`{number}` is not the number of a descriptor, as in `fd:3`")
            );
        }
        KEPT.lock().unwrap().remove(&file.as_raw_fd());
    }
}
