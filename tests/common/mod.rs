//! What the tests share: where the binary is, processes that end with the test, an API client.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod allocator;
pub mod cache;
pub mod disk;
pub mod driver;
pub mod ended;
pub mod faults;
pub mod held;
pub mod inject;
pub mod loopback;
pub mod network;
pub mod root;
pub mod suspend;
pub mod terminal;
pub mod vsock;
pub mod walls;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Far more than anything here takes, on a slow machine under load too: only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(100);

/// The monitor under test: in a rig, where it was put.
pub fn alula() -> PathBuf {
    std::env::var_os("ALULA").map_or(env!("CARGO_BIN_EXE_alula").into(), PathBuf::from)
}

/// The monitor by another name, as an orchestrator calls it: a symbolic link in `folder`.
pub fn called(name: &str, folder: &Folder) -> PathBuf {
    let path = folder.path(name);
    std::os::unix::fs::symlink(std::path::absolute(alula()).unwrap(), &path).unwrap();
    path
}

/// A folder of the test's own, gone with it.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Self {
        Self::within(&std::env::temp_dir())
    }
    /// One whose files are on a disk, not in memory: they can be used past the page cache.
    pub fn on_disk() -> Self {
        Self::within(Path::new("/var/tmp"))
    }
    fn within(place: &Path) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("alula-test-{}-{number}", std::process::id());
            let path = place.join(name);
            match std::fs::create_dir(&path) {
                Ok(()) => return Self(path),
                // Left by a process that was killed and had the same number.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => panic!("{}: {error}", path.display()),
            }
        }
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name)
    }
    /// The firmware guest as a kernel file.
    pub fn firmware(&self) -> PathBuf {
        self.write("firmware", alula::firmware::IMAGE)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What this thread sees mounted on it, or in it, keeps it from being removed.
        let mounts = std::fs::read_to_string("/proc/thread-self/mounts").unwrap_or_default();
        let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        for place in places.filter(|place| Path::new(place).starts_with(&self.0)) {
            let _ = Command::new("umount").args(["-l", place]).status();
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Lets a system call fail with `errno` in this thread, and in those that it starts, from now on.
#[allow(unsafe_code)]
pub fn forbid(call: libc::c_long, errno: i32) {
    let statement = |code: u32, k: u32, jf| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call as u32, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the calls read the local structures.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
    }
}

/// Lets a process, 0 for this one, have no more than `soft` of a resource, and returns what the limit was.
#[allow(unsafe_code)]
pub fn limit(process: u32, resource: libc::__rlimit_resource_t, soft: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the calls read and write the local structure.
    unsafe {
        assert_eq!(libc::prlimit(process as i32, resource, std::ptr::null_mut(), &mut limit), 0);
        let before = std::mem::replace(&mut limit.rlim_cur, soft);
        assert_eq!(libc::prlimit(process as i32, resource, &limit, std::ptr::null_mut()), 0);
        before
    }
}

pub fn limit_descriptors(process: u32, soft: u64) -> u64 {
    limit(process, libc::RLIMIT_NOFILE, soft)
}

pub fn send(child: &Child, signal: i32) {
    send_to(child.id(), signal);
}

#[allow(unsafe_code)]
pub fn send_to(pid: u32, signal: i32) {
    // SAFETY: the call takes numbers.
    unsafe { libc::kill(pid as i32, signal) };
}

/// Waits until a child has ended that this process has not started itself, and returns its code, or None and the signal.
#[allow(unsafe_code)]
pub fn await_child(pid: u32) -> (Option<i32>, i32) {
    let mut status = 0;
    wait_for(|| {
        // SAFETY: the call writes the local number.
        let ended = unsafe { libc::waitpid(pid as i32, &mut status, libc::WNOHANG) };
        assert!(ended >= 0, "{pid} is no child: {}", std::io::Error::last_os_error());
        ended > 0
    });
    (libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)), libc::WTERMSIG(status))
}

/// A running process, killed when the test ends.
pub struct Process {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    seen: String,
}

/// Standard output and error of an ended process, and its exit code.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub text: String,
}

impl Process {
    /// Starts `alula` with `arguments`; its output and errors arrive together.
    pub fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(alula());
        command.args(arguments);
        Self::spawn(command)
    }

    pub fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = loop {
            match command.spawn() {
                // Another test forked while a copy of the binary was being written.
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                    std::thread::yield_now()
                }
                result => break result.unwrap_or_else(|error| panic!("start {command:?}: {error}")),
            }
        };
        let (sender, lines) = channel();
        let pipes: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for pipe in pipes {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut pipe = BufReader::new(pipe);
                let mut line = Vec::new();
                while pipe.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                    let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
                    line.clear();
                }
            });
        }
        let stdin = child.stdin.take();
        Self { child, stdin, lines, seen: String::new() }
    }

    /// Waits for a line that contains `text`.
    pub fn expect(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen += &line;
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(_) => panic!("waited for `{text}`, got:\n{}", self.seen),
            }
        }
    }

    /// The lines that have come so far and were not waited for.
    pub fn drain(&mut self) -> String {
        let text: String = self.lines.try_iter().collect();
        self.seen += &text;
        text
    }

    pub fn send(&mut self, signal: i32) {
        send(&self.child, signal);
    }

    /// What its threads do, for who must find out why it does not end: two looks, a second apart.
    fn threads(&self) -> String {
        let mut text = String::new();
        for _ in 0..2 {
            std::thread::sleep(Duration::from_secs(1));
            for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten() {
                let path = task.unwrap().path();
                for file in ["comm", "schedstat", "wchan", "syscall"] {
                    let content = std::fs::read_to_string(path.join(file)).unwrap_or_default();
                    text += &format!("{file} {} ", content.trim());
                }
                text.push('\n');
            }
        }
        text
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it ends by itself.
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        while self.is_running() {
            if Instant::now() >= deadline {
                self.drain();
                panic!("it does not end; so far:\n{}\n{}", self.seen, self.threads());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let code = self.child.wait().unwrap().code();
        // The readers end with the pipes.
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.seen += &line;
        }
        Ended { code, text: std::mem::take(&mut self.seen) }
    }
}

/// So many characters of what a process said are told when a test fails.
const SAID_LAST: usize = 2000;

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What it said last, and whether it has ended by itself, may be why.
            let ended = self.child.try_wait();
            let said = self.drain();
            let from = said.len() - said.chars().rev().take(SAID_LAST).map(char::len_utf8).sum::<usize>();
            println!("process {}: {ended:?}, not waited for: {}", self.child.id(), &said[from..]);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `alula` to its end, with nothing on standard input.
pub fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ended {
    let mut process = Process::start(arguments);
    process.stdin = None;
    process.end()
}

/// Gives this thread, and what it starts, a /dev of its own whose devices everybody may use.
#[allow(unsafe_code)]
pub fn open_devices() {
    // SAFETY: the call takes a number and changes this thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(result, 0, "a mount namespace: {}", std::io::Error::last_os_error());
    let script = "mount --make-rprivate / && mount -t tmpfs -o mode=755 devices /dev && mkdir /dev/net &&
        mknod /dev/kvm c 10 232 && mknod /dev/net/tun c 10 200 && mknod /dev/null c 1 3 &&
        mknod /dev/zero c 1 5 && mknod /dev/urandom c 1 9 && mknod /dev/random c 1 8 &&
        chmod 666 /dev/kvm /dev/net/tun /dev/null /dev/zero /dev/urandom /dev/random";
    output("sh", &["-c", script]);
}

/// The binary where anybody may run it.
pub fn for_everybody(folder: &Folder) -> PathBuf {
    let path = folder.path("alula");
    std::fs::copy(alula(), &path).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    path
}

/// The monitor under test, in `folder`, as a user without any rights of its own.
pub fn as_nobody(folder: &Folder, arguments: &[&str]) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(for_everybody(folder));
    command.args(arguments).uid(65534).gid(65534);
    command
}

/// A service that listens, and its socket.
pub struct Service {
    pub process: Process,
    pub socket: PathBuf,
    pub folder: Folder,
}

impl Service {
    pub fn start(extra: &[&str]) -> Self {
        let folder = Folder::new();
        let socket = folder.path("api.socket");
        let mut command = Command::new(std::path::absolute(alula()).unwrap());
        // What a client names by a relative path, and is made there, goes with the folder.
        command.current_dir(folder.path("."));
        command.args(["serve", "--api-sock", socket.to_str().unwrap()]).args(extra);
        let process = Process::spawn(command);
        let service = Self { process, socket, folder };
        wait_for(|| UnixStream::connect(&service.socket).is_ok());
        service
    }

    /// A service whose guest, the firmware with `words`, is running.
    pub fn running(words: &str) -> Self {
        let service = Self::start(&[]);
        service.boot_source(words);
        service.client().ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        service
    }

    pub fn boot_source(&self, words: &str) {
        let body = serde_json::json!({ "kernel_image_path": self.folder.firmware(), "boot_args": words });
        self.client().ok("PUT", "/boot-source", &body.to_string());
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket)
    }
}

/// Whether this host's KVM emulates all code of kernels: it ends a guest whose code it cannot do. Any other lets
/// the guest go on with an exception.
pub fn is_software_kvm() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

pub fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs `body`, which tells of every step: a step that takes longer than our patience fails the test, where it would hang.
pub fn in_steps(body: impl FnOnce(&dyn Fn(String)) + Send + 'static) {
    let (steps, told) = channel();
    let body = std::thread::spawn(move || body(&|step| steps.send(step).expect("the test listens")));
    let mut last = "the beginning".to_owned();
    loop {
        match told.recv_timeout(PATIENCE) {
            Ok(step) => last = step,
            Err(RecvTimeoutError::Timeout) => panic!("{last}: nothing more in {} s", PATIENCE.as_secs()),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    if let Err(panic) = body.join() {
        std::panic::resume_unwind(panic);
    }
}

/// One connection to the API.
pub struct Client {
    pub stream: UnixStream,
}

/// A response as it came over the wire.
#[derive(Debug, PartialEq)]
pub struct Response {
    pub head: String,
    pub body: String,
}

impl Response {
    pub fn status(&self) -> &str {
        self.head.split(' ').nth(1).unwrap_or_default()
    }
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
    pub fn fault(&self) -> String {
        assert_eq!(self.status(), "400", "{self:?}");
        self.json()["fault_message"].as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned()
    }
}

impl Client {
    /// A socket is there a moment before its process listens at it.
    pub fn connect(socket: &Path) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                    std::thread::yield_now();
                }
                connected => break connected.unwrap(),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    pub fn send(&mut self, bytes: &str) {
        self.stream.write_all(bytes.as_bytes()).unwrap();
    }

    /// The next response; an empty one when the server hung up.
    pub fn receive(&mut self) -> Response {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            match self.stream.read(&mut byte) {
                Ok(0) => break,
                Ok(_) => head.push(byte[0]),
                // With a timeout, a read is not begun again by the kernel (signal(7)).
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                Err(error) => panic!("read a response: {error}"),
            }
        }
        let head = String::from_utf8(head).unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.stream.read_exact(&mut body).unwrap();
        Response { head, body: String::from_utf8(body).unwrap() }
    }

    pub fn request(&mut self, method: &str, path: &str, body: &str) -> Response {
        let length = match body.len() {
            0 => String::new(),
            length => format!("Content-Length: {length}\r\n"),
        };
        self.send(&format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}"));
        self.receive()
    }

    /// A request that must succeed.
    pub fn ok(&mut self, method: &str, path: &str, body: &str) -> Response {
        let response = self.request(method, path, body);
        assert!(["200", "204"].contains(&response.status()), "{method} {path} {body}: {response:?}");
        response
    }
}

/// The output of another program, which must succeed.
pub fn output(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    output
}

/// Mounts a file system of `bytes` bytes, which this thread, and what it starts from now on, alone sees.
pub fn mount_tmpfs(place: &Path, bytes: u64) {
    mount(place, "tmpfs", &format!("size={bytes}"));
}

/// The same of any kind of file system in memory.
#[allow(unsafe_code)]
pub fn mount(place: &Path, kind: &str, options: &str) {
    // SAFETY: the call takes a number and changes this thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(result, 0, "a mount namespace: {}", std::io::Error::last_os_error());
    output("mount", &["--make-rprivate", "/"]);
    output("mount", &["-t", kind, "-o", options, kind, place.to_str().unwrap()]);
}
