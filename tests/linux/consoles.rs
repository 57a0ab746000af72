//! A guest with its console and a port by virtio.

use std::io::{BufReader, ErrorKind};
use std::os::unix::net::UnixStream;

use alula::arch;

use super::common::terminal::Terminal;
use super::*;

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_console_and_a_port_by_virtio_are_used() {
    let (mut terminal, folder) = (Terminal::new(), Folder::new());
    terminal.set_size(24, 80);
    let (kernel, initrd, socket) = (asset(KERNELS[0]), asset("initramfs.cpio"), folder.path("port"));
    let line = format!("{} quiet cryptomgr.notests alula.run=console", arch::DEFAULT_COMMAND_LINE_OF_VIRTIO);
    let port = format!("org.test.0={}", socket.display());
    let arguments =
        ["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap(), "--memory", "256M"];
    let mut alula = terminal
        .start(&[&arguments[..], &["--console", "virtio", "--port", &port, "--cmdline", &line]].concat());
    // What the kernel says before it has the driver, that it has no console for its init, comes by the serial port.
    let early = terminal.read_until("console: 24 80");
    assert_eq!(early.matches("unable to open an initial console").count(), 1, "{early}");
    terminal.set_size(50, 132);
    // A terminal tells the foreground of its session; this one has none.
    common::send(&alula, libc::SIGWINCH);
    terminal.read_until("console: now 50 132");
    terminal.user.write_all(b"hello\r").unwrap();
    terminal.read_until("console: typed hello");
    let mut program = BufReader::new(UnixStream::connect(&socket).unwrap());
    let mut line = String::new();
    program.read_line(&mut line).unwrap();
    program.get_mut().write_all(b"hello\n").unwrap();
    program.read_line(&mut line).unwrap();
    assert_eq!(line, "port: first\nport: to hello\n");
    assert_eq!(terminal.code_of(&mut alula), Some(0));
    let ended = program.read_line(&mut line);
    assert!(
        ended.as_ref().is_ok_and(|count| *count == 0)
            || ended.is_err_and(|it| it.kind() == ErrorKind::ConnectionReset)
    );
    assert!(!socket.exists(), "the socket is left");
}
