//! The console of a guest that is there for a command: nobody sees it unless the guest ends too early, and then its end
//! is to say why.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use crate::agent::init;
use crate::log::in_one_line;

/// The end of a console that is kept, in bytes, to be shown if the guest ends before its command.
const KEPT_MAX: usize = 32 << 10;
/// The number of the last lines that are shown.
const LINES_MAX: usize = 20;

/// How a Linux that cannot go on says why (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing: ";
/// How a Linux says that it leaves its trace.
const TRACE_END: &str = "---[ end ";
/// A line of each start of an x86_64 Linux with devices behind virtio-mmio, whether it is told that there is no PCI
/// (`pci=off`) or finds none (arch/x86/pci/init.c); nothing is wrong then.
const NO_PCI: &str = "PCI: Fatal: No config space access function found";
/// How an end that the guest has asked for begins (kernel/reboot.c): how a guest has ended is told anyway.
const REBOOT: &str = "reboot: ";
/// How lines begin in which a Linux shows registers outside of its trace, in the words of either architecture
/// (arch/x86/kernel/process_64.c and dumpstack.c, arch/arm64/kernel/process.c).
const REGISTERS: &str = "RIP: |Code: |RSP: |RAX: |RDX: |RBP: |R10: |R13: |FS:  |CS:  |CR2: |DR0: |DR3: |PKRU: |pc : |lr : |sp : \
                         |pstate: |x29: |x26: |x23: |x20: |x17: |x14: |x11: |x8 : |x5 : |x2 : |Kernel Offset: |CPU features: \
                         |Memory Limit: |SMP: stopping |Rebooting in |Modules linked in: |Hardware name: ";

/// The end of what came from the console.
#[derive(Default)]
pub struct Console(Mutex<Vec<u8>>);

impl Console {
    fn add(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        let more = kept.len().saturating_sub(KEPT_MAX);
        kept.drain(..more);
    }

    /// The part of it that is to be told.
    pub fn tail(&self) -> Tail {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Tail::of(&String::from_utf8_lossy(&kept))
    }
}

/// Where the guest's console writes.
pub struct ConsoleEnd(pub Arc<Console>);

impl Write for ConsoleEnd {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The end of a console, as it is told.
#[derive(Debug, PartialEq)]
pub struct Tail {
    /// The last lines, without what helps nobody, and without the reason.
    pub lines: Vec<String>,
    /// Why the guest could not go on, if its init or its kernel has said so.
    pub reason: Option<String>,
}

impl Tail {
    fn of(text: &str) -> Self {
        let (mut lines, mut reason, mut is_trace) = (Vec::new(), None, false);
        for line in text.lines() {
            let line = in_one_line(line.trim_end());
            let said = without_time(&line);
            if let Some(why) = said.strip_prefix(init::FAILED) {
                (reason, is_trace) = (Some(why.to_owned()), false);
            } else if said.starts_with(PANIC) {
                // A trace and its end come after it. A panic for the end of an init says nothing of its own.
                reason = reason.or_else(|| Some(said.to_owned()));
                is_trace = true;
            } else if said.starts_with("CPU: ") && said.contains(" Comm: ") {
                is_trace = true;
            } else if said.starts_with(TRACE_END) {
                is_trace = false;
            } else if !is_trace && !is_noise(said) {
                lines.push(line);
            }
        }
        lines.drain(..lines.len().saturating_sub(LINES_MAX));
        Self { lines, reason }
    }
}

/// A line of the kernel without the time before it (`[    1.234567] `).
fn without_time(line: &str) -> &str {
    let time = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    time.filter(|(time, _)| time.trim_start().bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'))
        .map_or(line, |(_, said)| said)
}

fn is_noise(said: &str) -> bool {
    let begins = |begin: &str| said.starts_with(begin);
    said.is_empty() || said == NO_PCI || begins(REBOOT) || REGISTERS.split('|').any(begins)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(text: &str) -> (Vec<String>, Option<String>) {
        let console = Arc::new(Console::default());
        ConsoleEnd(console.clone()).write_all(text.as_bytes()).unwrap();
        let Tail { lines, reason } = console.tail();
        (lines, reason)
    }

    #[test]
    fn the_reason_is_what_an_init_or_a_kernel_says_of_its_end() {
        let (lines, reason) = tail(
            "[    0.170816] PCI: Fatal: No config space access function found\r\n\
             [    5.022318] EXT4-fs (vda): group descriptors corrupted!\r\n\r\n\
             alula: the guest's init cannot go on: mount it: Invalid argument\r\n\
             [    5.230707] reboot: Restarting system\r\n",
        );
        assert_eq!(lines, ["[    5.022318] EXT4-fs (vda): group descriptors corrupted!"]);
        assert_eq!(reason.as_deref(), Some("mount it: Invalid argument"));
        // The words of others are none.
        let (lines, reason) = tail("alula: load module `x`: No such device\n[x] PCI: Fatal: no\n");
        assert_eq!((lines.len(), reason), (2, None));
        let (lines, _) = tail(&(0..100).map(|number| format!("{number}\n")).collect::<String>());
        assert_eq!((lines.len(), &lines[0][..]), (20, "80"));
    }

    #[test]
    fn registers_hide_no_reason() {
        // Of Linux 6.1 on x86_64, with a warning before.
        let (lines, reason) = tail(
            "[    1.0] ------------[ cut here ]------------\n\
             [    1.0] WARNING: CPU: 0 PID: 1 at kernel/x.c:1 x+0x1/0x2\n\
             [    1.0] Modules linked in: overlay\n\
             [    1.0] CPU: 0 PID: 1 Comm: init Not tainted 6.1.0-56-cloud-amd64 #1\n\
             [    1.0] RIP: 0010:x+0x1/0x2\n\
             [    1.0] Call Trace:\n\
             [    1.0]  <TASK>\n\
             [    1.0] ---[ end trace 0000000000000000 ]---\n\
             [    2.0] sysrq: Trigger a crash\n\
             [    2.0] Kernel panic - not syncing: sysrq triggered crash\n\
             [    2.0] CPU: 0 PID: 9 Comm: sh Not tainted 6.1.0-56-cloud-amd64 #1\n\
             [    2.0] Call Trace:\n\
             [    2.0]  panic+0x118/0x2ed\n\
             [    2.0] RAX: ffffffffffffffda RBX: 0000000000000002 RCX: 00007f4ba9a6d6e0\n\
             [    2.0] Kernel Offset: disabled\n\
             [    2.0] Rebooting in 1 seconds..\n",
        );
        assert_eq!(
            lines,
            [
                "[    1.0] ------------[ cut here ]------------",
                "[    1.0] WARNING: CPU: 0 PID: 1 at kernel/x.c:1 x+0x1/0x2",
                "[    2.0] sysrq: Trigger a crash"
            ]
        );
        assert_eq!(reason.as_deref(), Some("Kernel panic - not syncing: sysrq triggered crash"));
        // After an oops, registers come again behind the trace; of aarch64, too.
        let (lines, reason) = tail(
            "BUG: kernel NULL pointer dereference, address: 0000000000000000\n\
             CPU: 1 PID: 7 Comm: x Not tainted 6.1.0 #1\n\
             pstate: 60400005 (nZCv daif +PAN -UAO)\n\
             ---[ end trace 0000000000000000 ]---\n\
             RIP: 0010:x+0x1/0x2\n\
             x29: ffff800008003f50 x28: ffffb2f0a4e9a000\n\
             Kernel panic - not syncing: Fatal exception\n\
             ---[ end Kernel panic - not syncing: Fatal exception ]---\n",
        );
        assert_eq!(lines, ["BUG: kernel NULL pointer dereference, address: 0000000000000000"]);
        assert_eq!(reason.as_deref(), Some("Kernel panic - not syncing: Fatal exception"));
    }
}
