//! `alula ctl list`: all guests of this user, for root those of all users, what each costs its host, and the sockets that
//! guests have left behind.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::arguments::{self, Command};
use super::persona::Persona;
use super::table::{self, Align};
use crate::api::client::Client;
use crate::error::Result;
use crate::guest::runtime;
use crate::host::listener::Listener;
use crate::jail::Jail;
use crate::json;
use crate::log::in_one_line;
use crate::process as process_costs;
use crate::sys::process;

/// A monitor that does not answer for so long is shown as silent: the others are not to wait for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a table that is watched is made anew.
const PERIOD: Duration = Duration::from_secs(1);
/// Where Firecracker, and a service without a name, has its socket.
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";

/// The costs of a guest and its monitor to the host so far: sums since the monitor's start, but for the memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    pub uptime_ms: u64,
    pub cpu_us: u64,
    /// A page that several guests share, as clones do, counts for each of them in part.
    pub memory_bytes: u64,
    read_bytes: u64,
    written_bytes: u64,
    received_bytes: u64,
    sent_bytes: u64,
    exits: u64,
}

impl Usage {
    /// The costs that the monitor tells. None: it tells nothing of the kind, as another monitor with the same API.
    pub fn of(client: &mut Client) -> Option<Self> {
        let answer = client.request("GET", "/metrics", "").ok().filter(|answer| answer.status == 200)?;
        let mut metrics: Value = json::from_text(&answer.body).ok()?;
        if metrics["process"]["memory"]["resident_bytes"] == 0
            && let process @ Some(_) = client.process()
        {
            // In a jail, the monitor has no /proc that would tell; from outside, there is one.
            metrics["process"]["memory"] = process_costs::memory(process);
            metrics["process"]["cpu_us"] = process_costs::cpu_us(process).into();
        }
        Self::read(&metrics)
    }

    fn read(metrics: &Value) -> Option<Self> {
        let count = |group: &str, fields: &[&str]| -> u64 {
            let numbers = fields.iter().filter_map(|field| metrics[group][field].as_u64());
            numbers.fold(0, u64::saturating_add)
        };
        let process = &metrics["process"];
        let threads = process["cpu_us"].as_object()?.values().filter_map(Value::as_u64);
        Some(Self {
            uptime_ms: process["uptime_ms"].as_u64()?,
            cpu_us: threads.fold(0, u64::saturating_add),
            memory_bytes: process["memory"]["proportional_bytes"].as_u64()?,
            read_bytes: count("block", &["read_bytes"]),
            written_bytes: count("block", &["write_bytes"]),
            received_bytes: count("net", &["rx_bytes_count"]),
            sent_bytes: count("net", &["tx_bytes_count"]),
            exits: count("vcpu", &["exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write"]),
        })
    }

    /// The costs as JSON, for programs.
    pub fn json(&self) -> Value {
        json!({
            "uptime_ms": self.uptime_ms, "cpu_us": self.cpu_us, "memory_bytes": self.memory_bytes,
            "read_bytes": self.read_bytes, "written_bytes": self.written_bytes,
            "received_bytes": self.received_bytes, "sent_bytes": self.sent_bytes, "exits": self.exits,
        })
    }
}

/// The state of a guest whose monitor gives no answer.
const SILENT: &str = "Silent";
/// The state of a guest at whose socket nobody listens any more.
const ENDED: &str = "Ended";

/// One socket, and the guest whose monitor answers there.
struct Guest {
    socket: PathBuf,
    id: String,
    /// The state in the API's spelling (`Running`, `Paused`, `Not started`), or [`SILENT`], or [`ENDED`].
    state: String,
    process: Option<u32>,
    usage: Option<Usage>,
}

impl Guest {
    /// The guest whose monitor answers at `socket`, which is there. None: somebody else answers there than the process
    /// that is `expected` to.
    fn at(socket: PathBuf, expected: Option<u32>) -> Option<Self> {
        let name = socket.file_stem().unwrap_or_default().to_string_lossy();
        let mut guest =
            Self { id: in_one_line(&name), socket, state: SILENT.to_owned(), process: None, usage: None };
        let is_left = || Listener::look("socket", &guest.socket).is_ok();
        let Ok(mut client) = Client::connect_within(&guest.socket, PATIENCE) else {
            if is_left() {
                guest.state = ENDED.to_owned();
            }
            return Some(guest);
        };
        guest.process = client.process();
        if expected.is_some_and(|expected| guest.process != Some(expected)) {
            return None;
        }
        let Ok(answer) = client.request("GET", "/", "") else { return Some(guest) };
        let instance: Value = json::from_text(&answer.body).unwrap_or_default();
        if let (Some(id), Some(state)) = (instance["id"].as_str(), instance["state"].as_str()) {
            guest.id = in_one_line(id);
            guest.state = in_one_line(state);
            guest.usage = Usage::of(&mut client);
        }
        Some(guest)
    }

    fn json(&self) -> Value {
        let Self { socket, id, state, process, usage } = self;
        let mut value = json!({ "id": id, "state": state, "socket": socket, "pid": process });
        if let (Value::Object(fields), Some(Value::Object(usage))) =
            (&mut value, usage.as_ref().map(Usage::json))
        {
            fields.extend(usage);
        }
        value
    }
}

/// The guests, by their sockets: those in the folders of guests with a name, and those that processes were told to
/// make, of this user, or of all users if this one is root. A process of another user can have root connect to any
/// socket by its command line, and nothing is asked of one that another process serves.
fn all() -> Vec<Guest> {
    let mut sockets: BTreeMap<PathBuf, Option<u32>> = named().map(|socket| (socket, None)).collect();
    for (socket, process) in of_processes().filter(|(socket, _)| socket.exists()) {
        sockets.entry(socket).or_insert(process);
    }
    let mut guests: Vec<_> =
        sockets.into_iter().filter_map(|(socket, process)| Guest::at(socket, process)).collect();
    guests.sort_by(|one, other| one.id.cmp(&other.id));
    guests
}

/// The socket of a guest of this name that is in no folder of guests with a name: in a jail, or at a path of its own.
pub fn elsewhere(id: &str) -> Option<PathBuf> {
    let sockets = of_processes().filter(|(socket, _)| socket.exists());
    let mut guests = sockets.filter_map(|(socket, process)| Guest::at(socket, process));
    guests.find(|guest| guest.id == id && guest.process.is_some()).map(|guest| guest.socket)
}

fn named() -> impl Iterator<Item = PathBuf> {
    let entries = runtime::folders().into_iter().flat_map(fs::read_dir).flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension() == Some("sock".as_ref()))
}

/// The sockets of processes, each with the process that is to answer there, if that is another user's.
fn of_processes() -> impl Iterator<Item = (PathBuf, Option<u32>)> {
    let (own, _) = process::identity();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    // Any of the processes may end at any time.
    processes.filter_map(move |process| {
        let number = process.file_name()?.to_str()?.parse::<u32>().ok()?;
        let owner = fs::metadata(&process).ok()?.uid();
        if own != owner && own != 0 {
            return None;
        }
        let served = socket_of(&fs::read(process.join("cmdline")).ok()?)?;
        let root = root_of(&process)?;
        let socket = match served {
            Served::At(socket) => fs::read_link(process.join("cwd")).ok()?.join(socket),
            // Among the folders of guests with a name is this process's own, not one in another root.
            Served::ByName(id) if root != Path::new("/") => runtime::of_system(&id),
            Served::ByName(_) => return None,
        };
        let socket = root.join(socket.strip_prefix("/").unwrap_or(&socket));
        Some((socket, (own != owner).then_some(number)))
    })
}

/// The root in which a process finds its files, as this process reaches it.
fn root_of(process: &Path) -> Option<PathBuf> {
    let link = process.join("root");
    let identity = |path: &Path| fs::metadata(path).ok().map(|root| (root.dev(), root.ino()));
    match fs::read_link(&link).ok()? {
        // The root of another mount namespace has no path here: the kernel's link leads there all the same.
        root if root == Path::new("/") && identity(&link)? != identity(&root)? => Some(link),
        root => Some(root),
    }
}

/// The way in which a process serves its API.
#[derive(Debug, PartialEq)]
enum Served {
    /// At this path, in the root and the folder that the process has.
    At(PathBuf),
    /// In the folder of guests with a name, by this one.
    ByName(String),
}

/// The socket that a process was told to serve, by its command line; None: it has no such socket.
fn socket_of(command_line: &[u8]) -> Option<Served> {
    let mut words = command_line.split(|byte| *byte == 0).map(OsStr::from_bytes);
    let program = words.next()?;
    let is_service = match Persona::of(program) {
        Persona::Firecracker => true,
        Persona::Alula if Path::new(program).file_name() == Some("alula".as_ref()) => {
            match words.next()?.to_str()? {
                "serve" => true,
                "run" => false,
                "jail" => return socket_of(&inside_jail(command_line)?),
                _ => return None,
            }
        }
        _ => return None,
    };
    let words: Vec<_> = words.take_while(|word| *word != "--").collect();
    let value = |option: &str| {
        words.iter().zip(1..).find_map(|(word, next)| {
            match word.as_bytes().strip_prefix(option.as_bytes())? {
                [] => words.get(next).map(PathBuf::from),
                [b'=', value @ ..] => Some(OsStr::from_bytes(value).into()),
                _ => None,
            }
        })
    };
    if let Some(path) = value("--api-sock") {
        return Some(Served::At(path));
    }
    match value("--id").filter(|_| Persona::of(program) == Persona::Alula) {
        Some(id) => runtime::check_id(id.to_str()?).is_ok().then(|| Served::ByName(id.display().to_string())),
        None => is_service.then(|| Served::At(DEFAULT_SOCKET.into())),
    }
}

/// The command line by which a process goes on in the jail that it has made, by the one that made it; None: the jail is
/// another program's, which takes the process's place.
fn inside_jail(command_line: &[u8]) -> Option<Vec<u8>> {
    let words = command_line.strip_suffix(b"\0").unwrap_or(command_line).split(|byte| *byte == 0);
    let parsed = arguments::parse(words.map(|word| OsStr::from_bytes(word).to_owned()));
    let Ok(Command::Jail(jail)) = parsed else { return None };
    if jail.program.is_some() {
        return None;
    }
    let Jail { id, arguments, .. } = *jail;
    let mut line = vec![OsString::from("alula")];
    line.extend(arguments.command);
    line.extend(["--id".into(), id.into()]);
    line.extend(arguments.rest);
    Some(line.join(OsStr::new("\0")).into_encoded_bytes())
}

/// Shows all guests once, as a table, or for programs as JSON.
pub fn list(json: bool) -> Result<()> {
    let guests = all();
    if json {
        return print(&format!("{:#}\n", guests.iter().map(Guest::json).collect::<Value>()));
    }
    let left = guests.iter().filter(|guest| guest.state == ENDED).count();
    print(&shown(&guests))?;
    match left {
        0 => Ok(()),
        1 => print("one of them has ended and left its socket: `alula ctl list --sweep` removes it\n"),
        left => print(&format!(
            "{left} of them have ended and left their sockets: `alula ctl list --sweep` removes them\n"
        )),
    }
}

/// Removes the sockets of guests with a name that have ended without doing so themselves.
pub fn sweep() -> Result<()> {
    for socket in named() {
        if Listener::sweep(&socket)? {
            print(&format!("removed `{}`\n", socket.display()))?;
        }
    }
    Ok(())
}

/// Shows what guests do, anew every second, until the process is ended or nobody reads it.
pub fn watch(json: bool) -> Result<()> {
    let is_terminal = std::io::stdout().is_terminal();
    let mut before = BTreeMap::new();
    loop {
        let begun = Instant::now();
        let guests = all();
        let text = match json {
            true => format!("{}\n", guests.iter().map(Guest::json).collect::<Value>()),
            false => rates(&guests, &before),
        };
        let text = match is_terminal && !json {
            // From the upper left corner, each line over the one that was there.
            true => format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")),
            false => text,
        };
        if !super::put_out(text.as_bytes())? {
            return Ok(());
        }
        let known = guests.into_iter().filter_map(|guest| Some((guest.socket, guest.usage?)));
        before = known.collect();
        std::thread::sleep(PERIOD.saturating_sub(begun.elapsed()));
    }
}

fn shown(guests: &[Guest]) -> String {
    let head = ["NAME", "STATE", "PID", "UP", "CPU", "MEMORY", "SOCKET"];
    let rows = guests.iter().map(|guest| {
        let of_usage = |tell: fn(&Usage) -> String| guest.usage.as_ref().map(tell).unwrap_or_default();
        [
            guest.id.clone(),
            guest.state.clone(),
            guest.process.map(|process| process.to_string()).unwrap_or_default(),
            of_usage(|usage| table::time(Duration::from_millis(usage.uptime_ms))),
            of_usage(|usage| table::time(Duration::from_micros(usage.cpu_us))),
            of_usage(|usage| table::size(usage.memory_bytes)),
            in_one_line(guest.socket.to_string_lossy()),
        ]
    });
    use Align::{Left, Right};
    table::text(head, [Left, Left, Right, Right, Right, Right, Left], rows)
}

/// A table of what guests have done a second, in the time since `before`.
fn rates(guests: &[Guest], before: &BTreeMap<PathBuf, Usage>) -> String {
    let head = ["NAME", "STATE", "CPU %", "MEMORY", "READ/s", "WRITTEN/s", "RECEIVED/s", "SENT/s", "EXITS/s"];
    let rows = guests.iter().map(|guest| {
        let mut row = [const { String::new() }; 9];
        (row[0], row[1]) = (guest.id.clone(), guest.state.clone());
        let Some(now) = &guest.usage else { return row };
        row[3] = table::size(now.memory_bytes);
        let Some(before) = before.get(&guest.socket) else { return row };
        let passed_ms = now.uptime_ms.saturating_sub(before.uptime_ms).max(1);
        let rate = |count: fn(&Usage) -> u64| {
            count(now).saturating_sub(count(before)).saturating_mul(1000) / passed_ms
        };
        row[2] = format!("{}", rate(|usage| usage.cpu_us) / 10_000);
        row[4] = table::size(rate(|usage| usage.read_bytes));
        row[5] = table::size(rate(|usage| usage.written_bytes));
        row[6] = table::size(rate(|usage| usage.received_bytes));
        row[7] = table::size(rate(|usage| usage.sent_bytes));
        row[8] = rate(|usage| usage.exits).to_string();
        row
    });
    use Align::{Left, Right};
    table::text(head, [Left, Left, Right, Right, Right, Right, Right, Right, Right], rows)
}

fn print(text: &str) -> Result<()> {
    super::put_out(text.as_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_tells_the_socket_of_its_process() {
        for (line, expected) in [
            ("alula serve --api-sock a.sock", Some("a.sock")),
            ("/usr/bin/alula run --cpus 2 --api-sock=/s vmlinux", Some("/s")),
            ("alula serve", Some("/run/firecracker.socket")),
            ("alula serve --id web", Some(":web")),
            ("alula run --id web", Some(":web")),
            ("alula run --id ../web", None),
            ("alula run -- alula serve --api-sock x", None),
            ("alula ctl --api-sock a.sock status", None),
            ("alula run vmlinux --api-sock", None),
            ("firecracker --id web", Some("/run/firecracker.socket")),
            ("firecracker-v1.17.0-x86_64 --id web --api-sock /fc", Some("/fc")),
            ("alula jail --id web --uid 1 --gid 1 -- --api-sock /run/a", Some("/run/a")),
            ("alula jail --id web --uid 1 --gid 1 -- run --cpus 2", Some(":web")),
            ("alula jail --id web --uid 1 --gid 1 --exec-file /bin/other -- --api-sock /run/a", None),
            ("bash serve --api-sock a.sock", None),
            ("", None),
        ] {
            let bytes = line.replace(' ', "\0").into_bytes();
            let expected = expected.map(|text| match text.strip_prefix(':') {
                Some(id) => Served::ByName(id.to_owned()),
                None => Served::At(text.into()),
            });
            assert_eq!(socket_of(&bytes), expected, "{line}");
        }
    }

    #[test]
    fn rates_are_what_came_within_the_guests_own_time() {
        let usage = |uptime_ms, cpu_us, exits| Usage { uptime_ms, cpu_us, exits, ..Usage::default() };
        let guest = |id: &str, usage| Guest {
            socket: id.into(),
            id: id.to_owned(),
            state: "Running".to_owned(),
            process: None,
            usage,
        };
        let before = BTreeMap::from([(PathBuf::from("a"), usage(1000, 500_000, 10))]);
        // The guests: one with half a CPU for two seconds, one that is new, one that tells nothing.
        let guests = [
            guest("a", Some(usage(3000, 1_500_000, 110))),
            guest("b", Some(usage(5, 5, 5))),
            guest("c", None),
        ];
        let text = rates(&guests, &before);
        let rows: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["a", "Running", "50", "0", "B", "0", "B", "0", "B", "0", "B", "0", "B", "50"]);
        assert_eq!(rows[2], ["b", "Running", "0", "B"]);
        assert_eq!(rows[3], ["c", "Running"]);
    }

    #[test]
    fn usage_is_the_sum_of_threads_and_directions() {
        let metrics = json!({
            "process": { "uptime_ms": 7, "cpu_us": { "main": 1, "vcpu 0": 2 }, "memory": { "proportional_bytes": 4096 } },
            "block": { "read_bytes": 3, "write_bytes": 4 }, "net": { "rx_bytes_count": 5, "tx_bytes_count": 6 },
            "vcpu": { "exit_io_in": 1, "exit_io_out": 1, "exit_mmio_read": u64::MAX, "exit_mmio_write": 1 },
        });
        let usage = Usage::read(&metrics).unwrap();
        assert_eq!((usage.uptime_ms, usage.cpu_us, usage.memory_bytes, usage.exits), (7, 3, 4096, u64::MAX));
        assert_eq!(
            (usage.read_bytes, usage.written_bytes, usage.received_bytes, usage.sent_bytes),
            (3, 4, 5, 6)
        );
        assert_eq!(Usage::read(&json!({ "process": {} })), None);
    }
}
