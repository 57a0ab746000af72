//! What a machine needs of the host, open, by the name of whom it is for: named by the user ahead of the start,
//! handed over as a descriptor, given by whoever builds the machine, or opened when it is asked for.

pub mod console;
pub mod file;
pub mod line;
pub mod link;
pub mod listener;
pub mod passt;
pub mod socket;
pub mod socket_file;
pub mod tap;
pub mod vhost_user;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::log;
use crate::metadata::Service;
use crate::sink::{Purpose, Sink};
use crate::sys::process;
use console::Output;
use listener::Listener;
use passt::Passt;
use tap::Tap;
use vhost_user::Backend;

/// What the machine may do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

/// What becomes of a file that is to be written, or is written, by somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It is an error.
    Refused,
    /// Writing is refused, told of a machine that is restored, which is used as it was saved.
    RefusedAsSaved,
    /// It is used all the same, with a line in the log and an event.
    Warned,
}

/// Something of the host that is open, and how a configuration names it.
pub enum Resource {
    /// A file or block device.
    File {
        /// Where it is, or was when it was opened.
        path: PathBuf,
        /// How it is open.
        access: Access,
        /// The file.
        file: Named<File>,
    },
    /// A TAP interface.
    Tap {
        /// The interface's name, or its descriptors (`fd:N`).
        name: String,
        /// The queues that are attached to.
        queues: Vec<Tap>,
    },
    /// Where the guest's serial console writes.
    Console(Output),
    /// A Unix socket that programs of the host connect to.
    Listener(Listener),
    /// A connection to a vhost-user backend.
    Backend(Box<Backend>),
}

/// A resource that waits for its machine.
struct Held {
    /// Whom it is for, as errors name that: "kernel", "disk `root`".
    what: String,
    resource: Resource,
}

/// Whom the output of the serial console is for.
pub const CONSOLE: &str = "serial console";
/// Whom a file of random bytes is for that take the place of the host's.
pub const RANDOM_SEED: &str = "random seed";

/// The host, as a machine under construction sees it: a ledger of what is open already, and the way in which
/// everything else is opened.
///
/// What is held for a name was opened when the name was given. What was at a path then is what the machine gets,
/// whatever is put there later. Naming other files again and again uses up no descriptors: the new ones
/// of a name replace its old ones, once all of them are open.
#[derive(Default)]
pub struct Host {
    held: Vec<Held>,
    /// A disk that somebody else uses is only warned of, whatever its configuration says.
    warns_of_sharing: bool,
    metadata: Option<Arc<Service>>,
    /// The files of the snapshot that the machine goes on from, by what each of them is.
    origin: Vec<(&'static str, (u64, u64))>,
    /// A machine is being restored.
    restores: bool,
    /// An agent in the guest has called since that was last asked.
    has_agent_called: bool,
}

impl Host {
    /// Takes in what somebody else has opened for `what`, beside what is held for it.
    pub fn give(&mut self, what: impl Into<String>, resource: Resource) {
        // Most machines have one or two, and the list would make room for four at once.
        self.held.reserve_exact(1);
        self.held.push(Held { what: what.into(), resource });
    }

    /// Opens the files of these resources now, so that a wrong path is refused where it is named. They
    /// replace what the resources had, all of them or none; a resource without a path has no file any more.
    ///
    /// # Errors
    /// A file cannot be opened: everything is held as before.
    pub fn hold(&mut self, files: &[(&str, Option<&Path>)], access: Access, sharing: Sharing) -> Result<()> {
        let mut opened = Vec::with_capacity(files.iter().filter(|(_, path)| path.is_some()).count());
        for &(what, path) in files {
            if let Some(path) = path {
                let file = self.open(what, path, access, sharing)?;
                opened.push((what, Resource::File { path: path.to_owned(), access, file }));
            }
        }
        files.iter().for_each(|(what, _)| self.release(what));
        opened.into_iter().for_each(|(what, resource)| self.give(what, resource));
        Ok(())
    }

    /// Opens one file for the resource `what`, as [`Self::hold`] does, and holds it if `check` accepts the open file.
    ///
    /// # Errors
    /// The file cannot be opened, or `check` refuses it: everything is held as before.
    pub fn hold_if(
        &mut self,
        what: &str,
        path: &Path,
        access: Access,
        sharing: Sharing,
        check: impl FnOnce(&File) -> Result<()>,
    ) -> Result<()> {
        let file = self.open(what, path, access, sharing)?;
        check(&file)?;
        self.release(what);
        self.give(what, Resource::File { path: path.to_owned(), access, file });
        Ok(())
    }

    /// The same for `what`, an interface of the guest: attaches to the TAP interface `name` with so many queues.
    ///
    /// # Errors
    /// It cannot be attached to: everything is held as before.
    pub fn hold_tap(&mut self, what: &str, name: &str, queues: usize) -> Result<()> {
        let taps = match self.held.iter_mut().position(|held| held.resource.is_tap(name)) {
            Some(index) => {
                if let Resource::Tap { queues: taps, .. } = &mut self.held[index].resource {
                    Tap::set_count(taps, name, queues)?;
                }
                self.held.swap_remove(index).resource
            }
            None => Resource::Tap { name: name.to_owned(), queues: Tap::open(name, queues)? },
        };
        self.release(what);
        self.give(what, taps);
        Ok(())
    }

    /// The same for the socket of `what`: listens at `path`.
    ///
    /// # Errors
    /// There is something at the path, or nothing can be made there: everything is held as before.
    pub fn hold_listener(&mut self, what: &str, path: &Path) -> Result<()> {
        let same = |held: &Held| held.what == what && held.resource.is_listener(path);
        if !self.held.iter().any(same) {
            let listener = Listener::bind(what, path)?;
            self.release(what);
            self.give(what, Resource::Listener(listener));
        }
        Ok(())
    }

    /// Meets the vhost-user backend of `what` that listens at `path` ahead of the start, and holds it if `check` accepts it.
    /// A backend serves one monitor at a time: the one that is held is not met again.
    ///
    /// # Errors
    /// As of [`Self::backend`], or `check` refuses it: what was held is met again at the start.
    pub fn hold_backend(
        &mut self,
        what: &str,
        path: &Path,
        config_size: usize,
        check: impl FnOnce(&Backend) -> Result<()>,
    ) -> Result<()> {
        let backend = self.backend(what, path, config_size)?;
        check(&backend)?;
        self.release(what);
        self.give(what, Resource::Backend(Box::new(backend)));
        Ok(())
    }

    /// The same for the output of the guest's serial console; None: standard output, which is not held.
    ///
    /// # Errors
    /// The file cannot be opened: everything is held as before.
    pub fn hold_console(&mut self, path: Option<&Path>) -> Result<()> {
        let output = path.map(open_console).transpose()?;
        self.release(CONSOLE);
        if let Some(output) = output {
            self.give_console(output);
        }
        Ok(())
    }

    /// Has the guest's serial console write to `output`.
    pub fn give_console(&mut self, output: Box<dyn Write + Send>) {
        self.give(CONSOLE, Resource::Console(Output::other(output)));
    }

    /// Closes what is held for `what`.
    pub fn release(&mut self, what: &str) {
        self.held.retain(|held| held.what != what);
    }

    /// Closes all that no machine took.
    pub fn release_all(&mut self) {
        self.held = Vec::new();
    }

    /// Has this metadata service answer on the interfaces that its configuration names; None: nobody answers.
    pub fn serve_metadata(&mut self, service: Option<Service>) {
        self.metadata = service.map(Arc::new);
    }

    /// Notes that an agent in the guest says that it listens.
    pub fn note_agent(&mut self) {
        self.has_agent_called = true;
    }

    /// Whether an agent in the guest has said, since this was last asked, that it listens.
    pub fn take_agent_call(&mut self) -> bool {
        std::mem::take(&mut self.has_agent_called)
    }

    /// Lets disks be shared with others, with a warning: what other monitors do, without one.
    pub fn warn_of_sharing(&mut self) {
        self.warns_of_sharing = true;
    }

    /// What becomes of a disk's file that somebody else uses; `lock`: its owner wants it alone.
    pub fn sharing(&self, lock: bool) -> Sharing {
        match lock && !self.warns_of_sharing {
            true if self.restores => Sharing::RefusedAsSaved,
            true => Sharing::Refused,
            false => Sharing::Warned,
        }
    }

    /// A restore from these files begins: nobody may write to them from now on, as the machine reads them.
    pub fn begin_restore(&mut self, origin: Vec<(&'static str, (u64, u64))>) {
        (self.origin, self.restores) = (origin, true);
    }

    /// The restore has ended; the files stay the machine's.
    pub fn end_restore(&mut self) {
        self.restores = false;
    }

    /// The machine that was restored is gone, or was never there: its files are like any other.
    pub fn forget_origin(&mut self) {
        (self.origin, self.restores) = (Vec::new(), false);
    }

    /// Refuses a file that is to be written, and that the machine goes on from.
    fn check_not_origin(&self, file: &File) -> Result<()> {
        if self.origin.is_empty() {
            return Ok(());
        }
        let identity = file::identity(file)?;
        match self.origin.iter().find(|(_, origin)| *origin == identity) {
            None => Ok(()),
            Some((what, _)) => Err(Error::config(format!(
                "it is a file of the snapshot itself, the {what} that the guest goes on from: give another one, or one \
                 that is only read"
            ))),
        }
    }

    /// The file at `path`, open; `what` names it in errors ("kernel", "disk `root`").
    ///
    /// # Errors
    /// It cannot be opened, or somebody else uses what is not to be shared.
    pub fn file(&mut self, what: &str, path: &Path, access: Access, sharing: Sharing) -> Result<Named<File>> {
        match self.take(what, |resource| resource.is_file(path, access)) {
            Some(Resource::File { file, .. }) => Ok(file),
            _ => self.open(what, path, access, sharing),
        }
    }

    /// The TAP interface of this name, or the open descriptors of one (`fd:N`), for so many queues of `what`.
    ///
    /// # Errors
    /// It cannot be attached to.
    pub fn tap(&mut self, what: &str, name: &str, queues: usize) -> Result<Vec<Tap>> {
        match self.take(what, |resource| resource.is_tap(name)) {
            Some(Resource::Tap { queues: mut taps, .. }) => {
                Tap::set_count(&mut taps, name, queues)?;
                Ok(taps)
            }
            _ => Tap::open(name, queues),
        }
    }

    /// A socket that listens at `path`, where nothing is yet; `what` names it in errors.
    ///
    /// # Errors
    /// There is something at the path, or nothing can be made there.
    pub fn listener(&mut self, what: &str, path: &Path) -> Result<Listener> {
        match self.take(what, |resource| resource.is_listener(path)) {
            Some(Resource::Listener(listener)) => Ok(listener),
            _ => Listener::bind(what, path),
        }
    }

    /// The vhost-user backend of `what` that listens at `path`, which tells `config_size` bytes of configuration.
    ///
    /// # Errors
    /// The path has no listener, or what listens is no backend that can be used.
    pub fn backend(&mut self, what: &str, path: &Path, config_size: usize) -> Result<Backend> {
        if let Some(Resource::Backend(mut backend)) = self.take(what, |resource| resource.is_backend(path))
            && backend.look().is_ok()
        {
            return Ok(*backend);
        }
        Backend::meet(what, path, config_size)
    }

    /// A user-mode network: a passt that is started with these arguments.
    ///
    /// # Errors
    /// passt is not installed, or cannot be started.
    pub fn passt(&mut self, arguments: Vec<String>) -> Result<Passt> {
        Passt::start(arguments)
    }

    /// The metadata service, if it answers on this network interface.
    pub fn metadata(&self, interface: &str) -> Option<Arc<Service>> {
        let service = self.metadata.as_ref()?;
        service.config.network_interfaces.iter().any(|id| id == interface).then(|| service.clone())
    }

    /// Fresh random bytes, for the guest's generator.
    ///
    /// # Errors
    /// The host's generator cannot be asked, or the file that was given in its place ends early.
    pub fn random_seed(&mut self) -> Result<[u8; 32]> {
        let mut seed = [0; 32];
        match self.take(RANDOM_SEED, |_| true) {
            Some(Resource::File { mut file, .. }) => {
                file.read_exact(&mut seed).context("read the random seed")?
            }
            _ => process::random(&mut seed).context("get random bytes of the host")?,
        }
        Ok(seed)
    }

    /// Where the guest's serial console writes: what is held, or else the file at `path`, or standard output.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn console(&mut self, path: Option<&Path>) -> Result<Output> {
        match (self.take(CONSOLE, |_| true), path) {
            (Some(Resource::Console(output)), _) => Ok(output),
            (_, Some(path)) => open_console(path).map(Output::other),
            (_, None) => Output::stdout(),
        }
    }

    /// Takes what is held for `what` out of the ledger, if it is what `is_it` asks for.
    fn take(&mut self, what: &str, is_it: impl Fn(&Resource) -> bool) -> Option<Resource> {
        let index = self.held.iter().position(|held| held.what == what && is_it(&held.resource))?;
        Some(self.held.swap_remove(index).resource)
    }

    /// Opens a file, or gives what is held: a device that its resource has claimed cannot be claimed again.
    fn open(&self, what: &str, path: &Path, access: Access, sharing: Sharing) -> Result<Named<File>> {
        let attempt = || format!("open {what} `{}`", path.display());
        let same = self.held.iter().filter(|held| held.what == what).find_map(|held| match &held.resource {
            Resource::File { access: other, file, .. } => {
                (*other == access && file::is_same_device(file, path)).then_some(file)
            }
            _ => None,
        });
        match same {
            Some(file) => file.try_clone().with_context(attempt),
            None => {
                let file = file::open(path, access, sharing, what, attempt)?;
                if access == Access::ReadWrite {
                    self.check_not_origin(&file).with_context(attempt)?;
                }
                Ok(file)
            }
        }
    }
}

impl Resource {
    fn is_file(&self, wanted: &Path, how: Access) -> bool {
        matches!(self, Self::File { path, access, .. } if path == wanted && *access == how)
    }

    fn is_tap(&self, wanted: &str) -> bool {
        matches!(self, Self::Tap { name, .. } if name == wanted)
    }

    fn is_backend(&self, wanted: &Path) -> bool {
        matches!(self, Self::Backend(backend) if backend.is_at(wanted))
    }

    fn is_listener(&self, wanted: &Path) -> bool {
        matches!(self, Self::Listener(listener) if listener.is_at(wanted))
    }
}

fn open_console(path: &Path) -> Result<Box<dyn Write + Send>> {
    let sink = Sink::open(Purpose::Serial, path)?;
    log::debug(format_args!("opened serial output `{}` to write", path.display()));
    Ok(Box::new(sink))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_held_is_the_one_that_was_there() {
        let folder = std::env::temp_dir().join(format!("alula-host-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("file");
        std::fs::write(&path, "first").unwrap();
        let mut host = Host::default();
        host.hold(&[("kernel", Some(&path))], Access::Read, Sharing::Refused).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut text = String::new();
        host.file("kernel", &path, Access::Read, Sharing::Refused)
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "first");
        let error =
            host.hold(&[("kernel", Some(&folder))], Access::Read, Sharing::Refused).unwrap_err().to_string();
        assert!(error.contains("it is a directory, a file or block device is needed"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
