//! A jail: a process with a root, namespaces, limits and a user of its own, which becomes another program
//! (`alula jail`, and Firecracker's `jailer`), or goes on as the monitor that it is: to execute that anew would cost as
//! much as all of the jail. Everything that may be refused is done while it can be undone; what was opened before the
//! root changes is reached by its descriptor alone.

pub mod cgroup;
mod made;
mod namespaces;
mod root;

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::clock;
use crate::error::{Context, Error, Result};
use crate::sys::{confine, descriptor, process};
use cgroup::Cgroups;
use made::Made;
use root::{Program, Root};

/// The number of descriptors that a program in a jail may have open if nothing is said: Firecracker's default.
const DESCRIPTORS: u64 = 2048;
/// The longest message that a new process tells of why it does not become the program, in bytes.
const MESSAGE_MAX: u64 = 4096;

/// The description of a jail that is to be made.
#[derive(Debug)]
pub struct Jail {
    /// The jail's name.
    pub id: String,
    /// The program that runs in the jail; none: this one.
    pub program: Option<PathBuf>,
    /// The folder of all jails.
    pub base: PathBuf,
    /// The user of the program; none: as in the host.
    pub uid: Option<u32>,
    /// The group of the program; none: as in the host.
    pub gid: Option<u32>,
    /// Whether an ordinary user makes the jail, in a user namespace.
    pub has_user_namespace: bool,
    /// The network namespace; none: as in the host.
    pub network: Option<PathBuf>,
    /// Whether the program goes on in the background.
    pub is_daemon: bool,
    /// Whether the program is process 1 of a PID namespace.
    pub has_pid_namespace: bool,
    /// The jail's control groups.
    pub cgroups: Cgroups,
    /// The size of the largest file that the program may write, in bytes.
    pub file_size: Option<u64>,
    /// How many descriptors the program may have.
    pub descriptors: Option<u64>,
    /// The descriptors that the program inherits beside the first three.
    pub kept: Vec<RawFd>,
    /// The arguments of the program.
    pub arguments: Arguments,
}

/// The program's arguments: its command, if it has such, `--id` with the jail's name, when it began, and the rest.
#[derive(Debug, Default)]
pub struct Arguments {
    /// The program's command, which comes first.
    pub command: Option<OsString>,
    /// Whether the program takes `--start-time-us` and what belongs to it.
    pub takes_times: bool,
    /// The arguments that come last.
    pub rest: Vec<OsString>,
}

/// The user and group of the program in a jail.
#[derive(Clone, Copy, Debug)]
struct User {
    uid: u32,
    gid: u32,
    /// Whether these numbers hold in a user namespace only, and the host's user is who made the jail.
    is_mapped: bool,
}

/// When this process began, by the monotonic clock and by its CPU time.
struct Begun {
    at: Duration,
    cpu: Duration,
    /// The mask that this process made its files by, and the program is to make its own by (umask(2)).
    umask: u32,
}

/// The process that has made its jail and goes on in there.
pub struct Inside {
    /// The command line that it goes on by.
    pub line: Vec<OsString>,
    /// The device that makes descriptors of page faults (userfaultfd(2)), which only its owner may open; none: there is
    /// no such device, or who made the jail may not open it.
    pub faults: Option<File>,
}

/// Enters the jail and becomes its program. If that is this one, the process goes on as what is returned. In the
/// background or in a PID namespace, it is another process that does so, and `None` is returned when it is there. Before
/// anything is made, `check` is asked whether this program could go on by its command line: in the background it
/// could tell nobody.
///
/// # Errors
/// An option asks for what cannot be, or the host refuses; then nothing is left of the jail.
pub fn enter(jail: &Jail, check: impl FnOnce(Vec<OsString>) -> Result<()>) -> Result<Option<Inside>> {
    // The jail's user must reach files that root makes here, whatever mask root makes its own files by.
    let umask = process::set_umask(0o022);
    let begun = Begun { at: clock::monotonic(), cpu: clock::cpu_time(), umask };
    let user = jail.user()?;
    jail.close_descriptors()?;
    let faults =
        jail.program.is_none().then(|| File::options().read(true).write(true).open(root::USERFAULTFD));
    let faults = faults.and_then(std::result::Result::ok);
    if let Some(path) = &jail.network {
        namespaces::join_network(path)?;
    }
    // All that follows is opened in the jail's mount namespace: only what was opened there can be mounted there.
    namespaces::enter(user, &jail.id)?;
    let program = Program::open(jail.program.as_deref())?;
    if jail.program.is_none() {
        check(jail.command_line(&program, [Duration::ZERO; 3]))?;
    }
    let mut made = Made::default();
    let result = jail.make(&program, user, &begun, &mut made);
    match result {
        Err(error) => {
            made.undo();
            Err(error)
        }
        Ok(Some(line)) => {
            // An open folder of the host's would be a way out of the jail.
            drop((program, made));
            jail.close_others(faults.as_ref())?;
            confine::show_to_user().context("have the jail belong to its user")?;
            Ok(Some(Inside { line, faults }))
        }
        Ok(None) => Ok(None),
    }
}

impl Jail {
    fn user(&self) -> Result<User> {
        let (uid, gid) = process::identity();
        let user = User {
            uid: self.uid.unwrap_or(uid),
            gid: self.gid.unwrap_or(gid),
            is_mapped: self.has_user_namespace,
        };
        match (uid, self.has_user_namespace) {
            (0, true) => Err(Error::config(
                "--userns: root would still own the host's files in there: leave it out, and name an ordinary user by \
                 --uid and --gid",
            )),
            (_, true) if user.uid == 0 => Err(Error::config(
                "--uid 0: with --userns, the program would have all rights in its namespaces: choose another number, or \
                 leave it out",
            )),
            (0, false) | (_, true) => Ok(user),
            (_, false) => Err(Error::config(
                "only root can make a jail without a user namespace: give --userns, or call this as root",
            )),
        }
    }

    fn close_descriptors(&self) -> Result<()> {
        for fd in &self.kept {
            // A descriptor that this process opened for itself, or that would be closed anyway, is not handed on.
            if descriptor::closes_on_exec(*fd).unwrap_or(true) {
                return Err(Error::config(format!(
                    "--keep-fd {fd}: no descriptor of this number was inherited: start this process with it"
                )));
            }
        }
        self.close_others(None)
    }

    fn close_others(&self, own: Option<&File>) -> Result<()> {
        let mut kept = self.kept.clone();
        kept.extend(own.map(AsRawFd::as_raw_fd));
        kept.sort_unstable();
        kept.dedup();
        confine::close_others(&kept).context("close the descriptors that the jail does not inherit")
    }

    fn make(
        &self,
        program: &Program,
        user: User,
        begun: &Begun,
        made: &mut Made,
    ) -> Result<Option<Vec<OsString>>> {
        let null = match self.is_daemon {
            true => Some(File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?),
            false => None,
        };
        let root = Root::make(&self.base, &self.id, program, user, made)?;
        made.members = self.cgroups.make(&program.name.to_string_lossy(), &self.id, made)?;
        made.members.iter_mut().try_for_each(cgroup::Member::enter)?;
        root.enter(made)?;
        if self.is_daemon || self.has_pid_namespace {
            return self.start(program, &root, user, begun, null, made);
        }
        self.become_program(program, user, begun.umask, [begun.at, begun.cpu, Duration::ZERO]).map(Some)
    }

    /// Has a new process become the program, and tells its number. Returns when the program is there, and in the new
    /// process, if that goes on as this program.
    fn start(
        &self,
        program: &Program,
        root: &Root,
        user: User,
        begun: &Begun,
        null: Option<File>,
        made: &mut Made,
    ) -> Result<Option<Vec<OsString>>> {
        if self.has_pid_namespace {
            confine::unshare(libc::CLONE_NEWPID).context("--new-pid-ns: make a PID namespace")?;
        }
        let (told, mut tell) = std::io::pipe().context("make a pipe to the jail's process")?;
        let spent = clock::cpu_time().saturating_sub(begun.cpu);
        let Some(pid) = confine::fork().context("make a process for the jail")? else {
            let prepare = || match null {
                Some(null) => {
                    confine::leave_session()?;
                    confine::replace_standard_streams(&null)
                }
                None => Ok(()),
            };
            let result = prepare().context("--daemonize: leave the terminal").and_then(|()| {
                self.become_program(program, user, begun.umask, [begun.at, Duration::ZERO, spent])
            });
            let error = match result {
                Ok(line) => return Ok(Some(line)),
                Err(error) => error,
            };
            // The process that reads this message has no other reason to be there.
            let _ = tell.write_all(error.to_string().as_bytes());
            process::exit_now(1);
        };
        drop(tell);
        let mut reason = String::new();
        let result = root.tell_process(program, pid, made).and_then(|()| {
            // The pipe ends when the new process has become the program, or ends: its descriptor is closed then.
            told.take(MESSAGE_MAX).read_to_string(&mut reason).context("wait for the jail's process")
        });
        let result = match result {
            Ok(_) if reason.is_empty() => return Ok(None),
            Ok(_) => Err(Error::host(reason)),
            Err(error) => Err(error),
        };
        // The control group of the new process can be removed when the process is gone.
        confine::end(pid);
        result
    }

    /// Gives up all that the program is not to have, and becomes it: returns its command line if it is this one.
    fn become_program(
        &self,
        program: &Program,
        user: User,
        umask: u32,
        times: [Duration; 3],
    ) -> Result<Vec<OsString>> {
        let result = self.limit().and_then(|()| {
            confine::renounce().context("give up the rights that the jail does not have")?;
            match user.is_mapped {
                true => Ok(()),
                false => confine::become_user(user.uid, user.gid)
                    .with_context(|| format!("become --uid {} and --gid {}", user.uid, user.gid)),
            }
        });
        let line = self.command_line(program, times);
        let result = result.and_then(|()| match &self.program {
            None => confine::stay_user(user.uid).context("give up the rights of who made the jail"),
            Some(_) => Err(execute(program, &line, user, umask)),
        });
        match result {
            Ok(()) => {
                process::set_umask(umask);
                Ok(line)
            }
            Err(error) => {
                if !user.is_mapped {
                    confine::become_root_user();
                }
                Err(error)
            }
        }
    }

    fn limit(&self) -> Result<()> {
        if let Some(bytes) = self.file_size {
            confine::limit(libc::RLIMIT_FSIZE, bytes)
                .with_context(|| format!("--resource-limit fsize={bytes}: set it"))?;
        }
        // A user cannot have more descriptors than the host allows, which is no error if no number was given.
        let count = self.descriptors.unwrap_or(DESCRIPTORS);
        match confine::limit(libc::RLIMIT_NOFILE, count) {
            Err(_) if self.descriptors.is_none() => Ok(()),
            result => result.with_context(|| format!("--resource-limit no-file={count}: set it")),
        }
    }

    /// The program's name and its arguments. The times are when the jail was begun, and how much CPU time the process
    /// that becomes the program, and those before it, had used then.
    fn command_line(&self, program: &Program, times: [Duration; 3]) -> Vec<OsString> {
        let Arguments { command, takes_times, rest } = &self.arguments;
        let mut line = vec![Path::new("/").join(&program.name).into_os_string()];
        line.extend(command.clone());
        line.extend(["--id".into(), OsString::from(&self.id)]);
        if *takes_times {
            let options = ["--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"];
            for (option, time) in options.into_iter().zip(times) {
                line.extend([option.into(), time.as_micros().to_string().into()]);
            }
        }
        line.extend(rest.iter().cloned());
        line
    }
}

/// Has another program take this one's place, with this command line; returns only why that could not be.
fn execute(program: &Program, line: &[OsString], user: User, umask: u32) -> Error {
    let words = line.iter().map(|word| CString::new(word.as_bytes()));
    let arguments =
        match words.collect::<std::result::Result<Vec<_>, _>>().context("pass the program's arguments") {
            Ok(arguments) => arguments,
            Err(error) => return error,
        };
    process::set_umask(umask);
    let error = confine::execute(program.descriptor(), &arguments);
    let more = match error.raw_os_error() {
        Some(libc::ENOENT) => {
            ": it needs a loader or an interpreter, which the jail does not have: name a program \
                               that is linked statically"
                .to_owned()
        }
        Some(libc::EACCES) => format!(": user {} may not execute it: `chmod a+rx`", user.uid),
        _ => String::new(),
    };
    Error::host(format!("--exec-file: execute `{}`: {error}{more}", program.name.display()))
}
