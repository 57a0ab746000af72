//! Where files come from: opened here, or (after a live upgrade) inherited from the process we replace.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// What the machine may do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Gives a machine under construction what it needs of the host.
pub trait Host {
    /// The file at `path`, open; `what` names it in errors ("kernel", "disk `root`").
    fn file(&mut self, what: &str, path: &Path, access: Access) -> Result<File>;
    /// Fresh random bytes, for the guest's generator.
    fn random_seed(&mut self) -> Result<[u8; 32]>;
    /// Where the guest's serial console writes.
    fn console(&mut self) -> Result<Box<dyn Write + Send>>;
}

/// The host as this process finds it.
#[derive(Default)]
pub struct Local {
    /// Files opened ahead of the machine, when they were named: what is at the path then is what
    /// the machine gets, whatever is put there later.
    held: HashMap<(PathBuf, Access), File>,
}

impl Local {
    /// Opens a file now, so that a wrong path is refused where it is named.
    pub fn hold(&mut self, what: &str, path: &Path, access: Access) -> Result<()> {
        let file = open(what, path, access)?;
        self.held.insert((path.to_owned(), access), file);
        Ok(())
    }
}

impl Host for Local {
    fn file(&mut self, what: &str, path: &Path, access: Access) -> Result<File> {
        match self.held.remove(&(path.to_owned(), access)) {
            Some(file) => Ok(file),
            None => open(what, path, access),
        }
    }

    fn random_seed(&mut self) -> Result<[u8; 32]> {
        let mut seed = [0; 32];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut seed))
            .context("read /dev/urandom")?;
        Ok(seed)
    }

    fn console(&mut self) -> Result<Box<dyn Write + Send>> {
        Ok(Box::new(std::io::stdout()))
    }
}

fn open(what: &str, path: &Path, access: Access) -> Result<File> {
    let attempt = || format!("open {what} `{}`", path.display());
    let file =
        OpenOptions::new().read(true).write(access == Access::ReadWrite).open(path).with_context(attempt)?;
    if file.metadata().with_context(attempt)?.is_dir() {
        return Err(Error::config("it is a directory, a file is needed")).with_context(attempt);
    }
    Ok(file)
}
