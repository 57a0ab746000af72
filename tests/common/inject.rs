//! A thread of another process that is made to make system calls, as by somebody who has broken into it (ptrace(2)).
#![allow(unsafe_code)]

use std::io::Error;

/// The distance below the top of a thread's stack at which a call's text is put: nobody has anything there.
const BELOW: u64 = 4096;

/// The registers of a thread that was stopped within a system call.
#[cfg(target_arch = "x86_64")]
mod registers {
    pub type Registers = libc::user_regs_struct;

    pub fn stack(registers: &Registers) -> u64 {
        registers.rsp
    }

    /// Sets the registers back to the instruction that made the system call in which the thread was stopped, so that
    /// it makes the call `number` next.
    pub fn call(registers: &mut Registers, number: i64, arguments: [u64; 3]) {
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        (registers.r10, registers.rax) = (0, number as u64);
        // The kernel is not to begin the interrupted call again.
        registers.orig_rax = u64::MAX;
        registers.rip -= 2;
    }

    pub fn result(registers: &Registers) -> i64 {
        registers.rax as i64
    }

    pub fn is_within_a_call(_: i32, registers: &Registers) -> bool {
        registers.orig_rax as i64 >= 0
    }
}

#[cfg(target_arch = "aarch64")]
mod registers {
    pub type Registers = libc::user_regs_struct;

    pub fn stack(registers: &Registers) -> u64 {
        registers.sp
    }

    /// `svc #0`.
    pub const CALL: u32 = 0xd400_0001;

    /// Sets the registers back to the instruction that made the system call in which the thread was stopped, so that
    /// it makes the call `number` next.
    pub fn call(registers: &mut Registers, number: i64, arguments: [u64; 3]) {
        registers.regs[..3].copy_from_slice(&arguments);
        registers.regs[3] = 0;
        registers.regs[8] = number as u64;
    }

    pub fn result(registers: &Registers) -> i64 {
        registers.regs[0] as i64
    }

    /// The kernel stops a thread before a call that is to be begun again, and after any other one.
    pub fn is_within_a_call(thread: i32, registers: &Registers) -> bool {
        [registers.pc, registers.pc - 4]
            .iter()
            .any(|pc| super::ask_for(libc::PTRACE_PEEKTEXT, thread, *pc) as u32 == CALL)
    }
}

use registers::Registers;

/// A thread that stands still, and goes on when this value is dropped.
pub struct Injected {
    thread: i32,
    before: Registers,
    /// Whether the thread's calls are expected to be refused. Such a thread goes on without a single step, of which a
    /// signal would be left as well.
    pub is_refused: bool,
}

/// The outcome of a system call that the thread was made to make.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The value that the call returned: a negative number is an error's.
    Returned(i64),
    /// The signal that the thread got for the call.
    Signal(i32),
}

fn ask(request: libc::c_uint, thread: i32, address: u64, data: u64) -> i64 {
    // SAFETY: each request that is made here reads and writes what it is given alone.
    let answer = unsafe { libc::ptrace(request as _, thread, address, data) };
    assert_ne!(answer, -1, "ptrace request {request:#x} of {thread}: {}", Error::last_os_error());
    answer
}

/// The word that `request` reads at an address of the thread's memory.
#[cfg(target_arch = "aarch64")]
fn ask_for(request: libc::c_uint, thread: i32, address: u64) -> i64 {
    // SAFETY: the C library has the word in a local of its own, and returns it.
    unsafe { libc::ptrace(request as _, thread, address, 0_u64) }
}

impl Injected {
    /// Stops the thread of `process` that is called `name` within a system call, where all threads wait.
    pub fn new(process: u32, name: &str) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
        let thread = tasks.map(|task| task.unwrap().path()).find(|task| match name {
            "main" => task.ends_with(process.to_string()),
            name => std::fs::read_to_string(task.join("comm")).unwrap().trim() == name,
        });
        let thread = thread.unwrap_or_else(|| panic!("there is no thread `{name}`"));
        let thread = thread.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let mut before = None;
        super::wait_for(|| {
            ask(libc::PTRACE_SEIZE, thread, 0, 0);
            ask(libc::PTRACE_INTERRUPT, thread, 0, 0);
            wait(thread);
            let now = registers(thread);
            if registers::is_within_a_call(thread, &now) {
                before = Some(now);
            } else {
                // A thread that has just begun is on its way to where it waits.
                ask(libc::PTRACE_DETACH, thread, 0, 0);
            }
            before.is_some()
        });
        Self { thread, before: before.unwrap(), is_refused: false }
    }

    /// Has the thread make a call with these arguments; a text among them is put on the thread's stack.
    pub fn call(&mut self, number: i64, arguments: [u64; 3], text: (usize, &[u8])) -> Outcome {
        let (mut now, mut arguments) = (self.before, arguments);
        if !text.1.is_empty() {
            let place = (registers::stack(&now) - BELOW) & !15;
            for (index, word) in text.1.chunks(8).enumerate() {
                let mut bytes = [0; 8];
                bytes[..word.len()].copy_from_slice(word);
                let at = place + index as u64 * 8;
                ask(libc::PTRACE_POKEDATA, self.thread, at, u64::from_ne_bytes(bytes));
            }
            arguments[text.0] = place;
        }
        registers::call(&mut now, number, arguments);
        // The kernel stops a thread before a call that is to be begun again, and after any other one.
        #[cfg(target_arch = "aarch64")]
        if ask_for(libc::PTRACE_PEEKTEXT, self.thread, now.pc) as u32 != registers::CALL {
            now.pc -= 4;
        }
        set_registers(self.thread, &now);
        let go_on = if self.is_refused { libc::PTRACE_CONT } else { libc::PTRACE_SINGLESTEP };
        ask(go_on, self.thread, 0, 0);
        match wait(self.thread) {
            libc::SIGTRAP => Outcome::Returned(registers::result(&registers(self.thread))),
            signal => Outcome::Signal(signal),
        }
    }

    /// Lets the thread go on where it is, with this signal.
    pub fn end(self, signal: i32) {
        ask(libc::PTRACE_DETACH, self.thread, 0, signal as u64);
        std::mem::forget(self);
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        set_registers(self.thread, &self.before);
        ask(libc::PTRACE_DETACH, self.thread, 0, 0);
    }
}

/// Waits until the thread stands still, and returns the signal that stopped it.
fn wait(thread: i32) -> i32 {
    let (mut status, mut answer) = (0, 0);
    super::wait_for(|| {
        // SAFETY: the call writes to the local number.
        answer = unsafe { libc::waitpid(thread, &mut status, libc::__WALL | libc::WNOHANG) };
        answer != 0
    });
    assert!(answer == thread && libc::WIFSTOPPED(status), "{answer}, status {status:#x}");
    libc::WSTOPSIG(status)
}

/// The place of the set of registers that both architectures have (NT_PRSTATUS).
fn vector(registers: &mut Registers) -> libc::iovec {
    libc::iovec { iov_base: (&raw mut *registers).cast(), iov_len: size_of::<Registers>() }
}

fn registers(thread: i32) -> Registers {
    // SAFETY: all zeros are a value of this structure of numbers.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    let mut vector = vector(&mut registers);
    ask(libc::PTRACE_GETREGSET, thread, 1, (&raw mut vector) as u64);
    registers
}

fn set_registers(thread: i32, registers: &Registers) {
    #[cfg(target_arch = "aarch64")]
    {
        // The kernel is not to begin the interrupted call again (NT_ARM_SYSTEM_CALL).
        let mut none = -1_i32;
        let mut vector = libc::iovec { iov_base: (&raw mut none).cast(), iov_len: size_of::<i32>() };
        ask(libc::PTRACE_SETREGSET, thread, 0x404, (&raw mut vector) as u64);
    }
    let mut registers = *registers;
    let mut vector = vector(&mut registers);
    ask(libc::PTRACE_SETREGSET, thread, 1, (&raw mut vector) as u64);
}
