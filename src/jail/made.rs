//! The folders, files and mounts that a jail has made so far, which are removed again if the jail comes to nothing.

use std::ffi::OsStr;
use std::ffi::OsString;
use std::io::{ErrorKind, Result};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::cgroup::Member;
use crate::sys::{confine, descriptor};

/// An open folder, in which something is made.
pub type Place = Rc<OwnedFd>;

/// All that a jail has made outside of itself, in the order in which it was made.
#[derive(Default)]
pub struct Made {
    names: Vec<(Place, OsString)>,
    /// The cgroups that this process is in.
    pub members: Vec<Member>,
    /// The mount of the jail's folder, and the paths of devices in it on which others are mounted.
    pub mounts: Option<(OwnedFd, Vec<&'static str>)>,
}

impl Made {
    /// Notes that something was made.
    pub fn note(&mut self, place: &Place, name: impl AsRef<OsStr>) {
        self.names.push((Rc::clone(place), name.as_ref().to_owned()));
    }

    /// Opens a folder, which is made if nothing has its name. What is a link there, or is no folder, is an error.
    pub fn folder(&mut self, place: &Place, name: impl AsRef<OsStr>, mode: u32) -> Result<Place> {
        match descriptor::make_folder_in(&**place, &name, mode) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => {
                made?;
                self.note(place, &name);
            }
        }
        open_folder(place, name)
    }

    /// Makes an empty file, to be written.
    pub fn file(&mut self, place: &Place, name: impl AsRef<OsStr>, mode: u32) -> Result<OwnedFd> {
        let file = descriptor::open_in(&**place, &name, libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL, mode)?;
        self.note(place, name);
        Ok(file)
    }

    /// Removes all that was made, but what somebody else uses by now.
    pub fn undo(mut self) {
        if let Some((mounts, devices)) = &self.mounts {
            confine::detach(mounts, devices);
        }
        self.members.iter_mut().for_each(Member::leave);
        for (place, name) in self.names.iter().rev() {
            let _ = descriptor::remove_in(&**place, name);
        }
    }
}

/// Opens a folder that is there.
pub fn open_folder(place: &Place, path: impl AsRef<OsStr>) -> Result<Place> {
    descriptor::open_in(&**place, path, libc::O_RDONLY | libc::O_DIRECTORY, 0).map(Rc::new)
}
