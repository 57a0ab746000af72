//! A program that the agent starts: who it is, and what it has open.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::protocol::frame::Failure;
use crate::protocol::request::{Run, Window};
use crate::sys::descriptor;
use crate::sys::process::{self as calls, User};

/// The search path of programs that are told none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The most that is read of /etc/passwd and of /etc/group, in bytes: a guest can make its files endless.
const USERS_MAX: u64 = 4 << 20;

/// Why a program was not started.
pub type Refusal = (Failure, String);

/// Who a program runs as.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary ones.
    pub groups: Vec<u32>,
    /// The user's name, if it has one.
    pub name: Option<String>,
    /// The user's home.
    pub home: Option<String>,
}

/// A program that was started, and the agent's ends of the pipes or the terminal that the program has.
pub struct Started {
    pub pid: u32,
    pub stdin: Option<File>,
    pub stdout: Option<File>,
    pub stderr: Option<File>,
}

/// The users and groups of a system, as their files say.
struct Users {
    passwd: String,
    group: String,
}

impl Users {
    fn read() -> Self {
        let text = |path: &str| {
            let mut bytes = Vec::new();
            if let Ok(file) = File::open(path) {
                // A file that cannot be read names no user and no group.
                let _ = file.take(USERS_MAX).read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Self { passwd: text("/etc/passwd"), group: text("/etc/group") }
    }

    /// Who `USER[:GROUP]` is: names or numbers. A number needs no entry.
    fn find(&self, who: &str) -> Result<Identity, String> {
        let (user, group) = who.split_once(':').map_or((who, None), |(user, group)| (user, Some(group)));
        let lines =
            |text| -> Vec<Vec<&str>> { str::lines(text).map(|line| line.split(':').collect()).collect() };
        let is_it = |fields: &Vec<&str>, name: &str| {
            fields.len() > 2 && (fields[0] == name || (fields[2] == name && name.parse::<u32>().is_ok()))
        };
        let entry = lines(&self.passwd).into_iter().find(|fields| fields.len() > 5 && is_it(fields, user));
        let mut identity = match &entry {
            Some(fields) => {
                let number =
                    |text: &str| text.parse().map_err(|_| format!("/etc/passwd: `{user}` has no number"));
                Identity {
                    uid: number(fields[2])?,
                    gid: number(fields[3])?,
                    groups: Vec::new(),
                    name: Some(fields[0].to_owned()),
                    home: Some(fields[5].to_owned()),
                }
            }
            None => {
                let uid = user.parse().map_err(|_| format!("there is no user `{user}` in /etc/passwd"))?;
                Identity { uid, gid: uid, ..Identity::default() }
            }
        };
        let groups = lines(&self.group);
        match group {
            Some(group) => {
                let entry = groups.iter().find(|fields| is_it(fields, group));
                let number = entry.map_or(group, |fields| fields[2]);
                identity.gid =
                    number.parse().map_err(|_| format!("there is no group `{group}` in /etc/group"))?;
            }
            None => {
                let is_in = |fields: &&Vec<&str>| {
                    let name = identity.name.as_deref();
                    fields.len() > 3 && fields[3].split(',').any(|member| Some(member) == name)
                };
                identity.groups = groups.iter().filter(is_in).filter_map(|f| f[2].parse().ok()).collect();
            }
        }
        Ok(identity)
    }
}

/// Who `user` is; none: who this process is.
fn identity(user: Option<&str>) -> Result<Identity, Refusal> {
    let users = Users::read();
    match user {
        Some(user) => users.find(user),
        None => {
            let (uid, gid) = calls::identity();
            let known = users.find(&uid.to_string());
            Ok(Identity { uid, gid, ..known.unwrap_or_default() })
        }
    }
    .map_err(|why| (Failure::Other, why))
}

/// Starts `run`.
pub fn start(run: &Run) -> Result<Started, Refusal> {
    let Some((program, arguments)) = run.argv.split_first() else {
        return Err((Failure::NotFound, "no program is named".to_owned()));
    };
    let identity = identity(run.user.as_deref())?;
    let mut command = Command::new(program);
    command.args(arguments);
    let home = identity.home.clone().unwrap_or_else(|| "/".to_owned());
    let folder = match &run.workdir {
        Some(folder) => folder.clone(),
        // A home may be missing, as that of `nobody` is.
        None => PathBuf::from(&home).canonicalize().unwrap_or_else(|_| "/".into()),
    };
    // Told apart from a program that is not there.
    if !folder.is_dir() {
        let why = format!("there is no folder `{}` to start in", folder.display());
        return Err((Failure::Other, why));
    }
    command.current_dir(folder).env_clear().envs(environment(run, &home, &identity));
    launch(command, identity, run.user.is_some(), run.terminal).map_err(|error| refused(program, &error))
}

/// Starts this program itself, as `alula agent` with these words.
pub fn start_own(words: &[&Path], user: Option<&str>) -> Result<Started, Refusal> {
    let identity = identity(user)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("agent").args(words).env_clear().current_dir("/");
    launch(command, identity, user.is_some(), None).map_err(|error| refused("/proc/self/exe", &error))
}

fn refused(program: &str, error: &Error) -> Refusal {
    let failure = match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound | ErrorKind::NotADirectory, _) => Failure::NotFound,
        (ErrorKind::PermissionDenied, _) | (_, Some(libc::ENOEXEC | libc::EISDIR)) => Failure::NotExecutable,
        _ => Failure::Other,
    };
    // The kernel says the same of a file that is missing and of one whose loader is.
    if failure == Failure::NotFound && program.contains('/') && Path::new(program).is_file() {
        let why = "the file is there, and the interpreter or loader that it names is not";
        return (failure, format!("start `{program}`: {error}: {why}"));
    }
    (failure, format!("start `{program}`: {error}"))
}

/// The variables that a program is given.
fn environment(run: &Run, home: &str, identity: &Identity) -> BTreeMap<String, String> {
    let user = identity.name.clone().unwrap_or_else(|| identity.uid.to_string());
    let mut variables = BTreeMap::from([
        ("PATH".to_owned(), PATH.to_owned()),
        ("HOME".to_owned(), home.to_owned()),
        ("USER".to_owned(), user),
    ]);
    if run.terminal.is_some() {
        variables.insert("TERM".to_owned(), "linux".to_owned());
    }
    // A name alone is one that the client does not have either.
    let given = run.env.iter().filter_map(|pair| pair.split_once('='));
    variables
        .extend(given.filter(|(name, _)| !name.is_empty()).map(|(name, value)| (name.into(), value.into())));
    variables
}

fn launch(
    mut command: Command,
    identity: Identity,
    becomes: bool,
    terminal: Option<Window>,
) -> std::io::Result<Started> {
    let ends = match terminal {
        Some(size) => {
            let (ours, theirs) = calls::terminal((size.rows, size.columns), identity.uid)?;
            command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
            Some((File::from(ours.try_clone()?), File::from(ours)))
        }
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            None
        }
    };
    let Identity { uid, gid, groups, .. } = identity;
    calls::prepare(&mut command, becomes.then_some(User { uid, gid, groups }), terminal.is_some());
    // Reaped by `calls::reap`, with everybody else's children.
    let mut child = command.spawn()?;
    let pid = child.id();
    let started = match ends {
        Some((input, output)) => Started { pid, stdin: Some(input), stdout: Some(output), stderr: None },
        None => Started {
            pid,
            stdin: child.stdin.take().map(|pipe| OwnedFd::from(pipe).into()),
            stdout: child.stdout.take().map(|pipe| OwnedFd::from(pipe).into()),
            stderr: child.stderr.take().map(|pipe| OwnedFd::from(pipe).into()),
        },
    };
    for file in [&started.stdin, &started.stdout, &started.stderr].into_iter().flatten() {
        descriptor::set_status(file, descriptor::status(file)? | libc::O_NONBLOCK)?;
    }
    Ok(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_or_number_with_their_groups() {
        let users = Users {
            passwd:
                "root:x:0:0:root:/root:/bin/sh\nbad\n5:x:7:7::/five:\nann:x:1000:100::/home/ann:/bin/sh\n\
                     odd:x:many:1::/:\n"
                    .to_owned(),
            group: "root:x:0:\nwheel:x:10:root,ann\nusers:x:100:\nshort:x:11\n".to_owned(),
        };
        let found = |who| users.find(who).map(|i| (i.uid, i.gid, i.groups, i.home.unwrap_or_default()));
        assert_eq!(found("ann"), Ok((1000, 100, vec![10], "/home/ann".to_owned())));
        assert_eq!(found("1000"), found("ann"));
        assert_eq!(found("ann:wheel"), Ok((1000, 10, vec![], "/home/ann".to_owned())));
        assert_eq!(found("77"), Ok((77, 77, vec![], String::new())));
        assert_eq!(found("77:88"), Ok((77, 88, vec![], String::new())));
        // A name that looks like a number is a name first.
        assert_eq!(found("5"), Ok((7, 7, vec![], "/five".to_owned())));
        for who in ["", "nobody", "ann:none", "odd", "-1", "4294967296", ":"] {
            assert!(found(who).is_err(), "{who}");
        }
    }
}
