//! A monitor under measurement: a process, its API, its guest's serial line.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::Result;

/// Starts a monitor whose guest's output is to be read. Another one is called by the name under which any
/// version of ours, too, takes Firecracker's command line.
pub fn spawn(binary: &str, is_ours: bool, socket: &Path, more: &[&str], stdin: Stdio) -> Result<Child> {
    let mut command = Command::new(binary);
    if is_ours {
        command.arg("serve");
    } else {
        command.arg0("firecracker");
    }
    command.arg("--api-sock").arg(socket).args(more);
    command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::null());
    Ok(command.spawn()?)
}

/// Connects to a monitor as soon as it listens.
pub fn connect(child: &mut Child, socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(_) if let Some(status) = child.try_wait()? => {
                return Err(format!("it ended instead of serving its API: {status}").into());
            }
            Err(error) if Instant::now() > deadline => {
                return Err(format!("wait for its API: {error}").into());
            }
            Err(_) => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}

/// Connects to a monitor that listens already.
pub fn connect_to(socket: &Path) -> Result<UnixStream> {
    Ok(UnixStream::connect(socket)?)
}

/// Sends a request and waits for its answer, which must be a success.
pub fn request(client: &mut UnixStream, method: &str, path: &str, body: &str) -> Result<()> {
    request_body(client, method, path, body).map(drop)
}

/// Sends a request as [`request`] does, and returns the answer's body, too.
pub fn request_body(client: &mut UnixStream, method: &str, path: &str, body: &str) -> Result<String> {
    send(client, method, path, body)?;
    answer(client).map_err(|error| format!("{method} {path}: {error}").into())
}

/// Waits for the answer to a request that was sent, which must be a success, and returns its body.
pub fn answer(client: &mut UnixStream) -> Result<String> {
    let mut answer = [0; 4096];
    let count = client.read(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..count]);
    let body = answer.lines().last().unwrap_or_default();
    if answer.starts_with("HTTP/1.1 2") { Ok(body.to_owned()) } else { Err(body.into()) }
}

/// Sends a request alone.
pub fn send(client: &mut UnixStream, method: &str, path: &str, body: &str) -> Result<()> {
    let length = match body.len() {
        0 => String::new(),
        length => format!("Content-Length: {length}\r\n"),
    };
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}");
    Ok(client.write_all(request.as_bytes())?)
}

/// A monitor whose guest takes commands on its serial line. It ends with this.
pub struct Monitor {
    pub child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Monitor {
    /// Starts a guest with this configuration: paths of the API and their bodies.
    pub fn start(
        binary: &str,
        is_ours: bool,
        socket: &Path,
        more: &[&str],
        config: &[(&str, serde_json::Value)],
    ) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let mut child = spawn(binary, is_ours, socket, more, Stdio::piped())?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (sender, lines) = channel();
        let mut stdout = BufReader::new(stdout.ok_or("no output")?);
        std::thread::spawn(move || {
            let mut line = Vec::new();
            while stdout.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let _ = sender.send(String::from_utf8_lossy(&line).trim().to_owned());
                line.clear();
            }
        });
        let mut monitor = Self { child, stdin: stdin.ok_or("no input")?, lines };
        let mut client = connect(&mut monitor.child, socket)?;
        for (path, body) in config {
            request(&mut client, "PUT", path, &body.to_string())?;
        }
        request(&mut client, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?;
        Ok(monitor)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that begins so, and returns the rest of it.
    pub fn expect(&self, starts: &[&str]) -> Result<String> {
        let mut seen = String::new();
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(300)).map_err(|error| {
                let how = match error {
                    RecvTimeoutError::Timeout => "took too long",
                    RecvTimeoutError::Disconnected => "ended",
                };
                let starts = starts.join("` or `");
                format!("it {how} before its guest said `{starts}`; it said: `{}`", seen.trim())
            })?;
            if starts.iter().any(|start| line.starts_with(start)) {
                return Ok(line);
            }
            seen += &line;
            seen.push('\n');
        }
    }

    /// Types this on the guest's serial line.
    pub fn type_in(&mut self, text: &[u8]) -> Result<()> {
        Ok(self.stdin.write_all(text)?)
    }

    /// Types a command and waits until it is done: how often.
    pub fn command(&mut self, command: &str) -> Result<u64> {
        self.type_in(format!("{command}\n").as_bytes())?;
        let line = self.expect(&["done ", "cannot"])?;
        let count = line.strip_prefix("done ").ok_or(format!("the guest cannot `{command}`: {line}"))?;
        Ok(count.parse()?)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
