//! What another process costs: system calls, counted by the kernel as they are made (a tracer would slow
//! them down and change what is measured), exits by KVM's own statistics, CPU time, memory.
//! Root's, as the kernel's tracepoints are.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::Result;

/// Where the kernel shows its statistics: mounted by us, for us alone.
pub struct Debug(PathBuf);

impl Drop for Debug {
    /// A folder that something is mounted on cannot be removed.
    fn drop(&mut self) {
        let place = std::ffi::CString::new(self.0.as_os_str().as_encoded_bytes()).expect("as when mounted");
        // SAFETY: the call reads a text and a number.
        unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) };
    }
}

impl Debug {
    /// Leaves the mounts of the system and has its own.
    pub fn mount(folder: &Path) -> Result<Self> {
        let place = folder.join("debug");
        std::fs::create_dir_all(&place)?;
        let c = |text: &str| std::ffi::CString::new(text).expect("a path has no zero in it");
        let target = c(&place.to_string_lossy());
        let failed = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
        // SAFETY: the calls read texts and numbers.
        unsafe {
            if libc::unshare(libc::CLONE_NEWNS) != 0 {
                return Err(failed("have mounts of its own").into());
            }
            let (none, root) = (std::ptr::null(), c("/"));
            libc::mount(none, root.as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast());
            let debugfs = c("debugfs");
            if libc::mount(debugfs.as_ptr(), target.as_ptr(), debugfs.as_ptr(), 0, none.cast()) != 0 {
                return Err(failed("mount debugfs").into());
            }
        }
        Ok(Self(place))
    }

    fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        std::fs::read_to_string(self.0.join(path)).ok()?.trim().parse().ok()
    }

    /// The cost of a boot so far, by KVM's statistics of the virtual machine of process `pid`: exits by kind,
    /// and page faults by what was mapped for them. Pages are those that are mapped now.
    pub fn boot(&self, pid: u32) -> Result<Boot> {
        let folder = self.machine(pid)?;
        let number = |file: &str| {
            let path = folder.join(file);
            self.number(&path).ok_or_else(|| format!("KVM does not tell {}", path.display()))
        };
        Ok(Boot {
            exits: self.exits(pid)?,
            faults: number("pf_fixed")?,
            huge_pages: number("pages_2m")?,
            small_pages: number("pages_4k")?,
        })
    }

    /// KVM's statistics of the virtual machine of process `pid`: all exits, and those of each kind. Which
    /// kinds there are differs by architecture.
    fn exits(&self, pid: u32) -> Result<Calls> {
        const KINDS: [(&str, &[&str]); 9] = [
            ("all", &["exits"]),
            ("MMIO", &["mmio_exits", "mmio_exit_user", "mmio_exit_kernel"]),
            ("port I/O", &["io_exits"]),
            ("halt", &["halt_exits", "wfi_exit_stat", "wfe_exit_stat"]),
            ("host interrupts", &["irq_exits"]),
            ("interrupt windows", &["irq_window_exits"]),
            ("page faults", &["pf_taken"]),
            ("hypercalls", &["hypercalls", "hvc_exit_stat"]),
            ("signals", &["signal_exits", "exits_signal"]),
        ];
        let folder = self.machine(pid)?;
        let sum = |files: &[&str]| files.iter().filter_map(|file| self.number(folder.join(file))).sum();
        Ok(KINDS.iter().map(|(name, files)| (*name, sum(files))).collect())
    }

    /// Where KVM shows the statistics of the virtual machine of process `pid`.
    fn machine(&self, pid: u32) -> Result<PathBuf> {
        let machines = std::fs::read_dir(self.0.join("kvm"))?;
        let mut names = machines.flatten().map(|entry| entry.path());
        let found = names.find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{pid}-")))
        });
        Ok(found.ok_or("KVM shows no statistics of this virtual machine")?)
    }
}

/// The cost of a boot.
pub struct Boot {
    /// Exits by kind. Those by host interrupts come with the host's time: a busy host makes a boot take longer,
    /// and more of them.
    pub exits: Calls,
    /// Page faults for which KVM mapped a page.
    pub faults: u64,
    /// Pages of 2 MiB and of 4 KiB that are mapped.
    pub huge_pages: u64,
    pub small_pages: u64,
}

/// System calls that are told apart; numbers differ by architecture, names do not.
const CALLS: [(&str, libc::c_long); 15] = [
    ("ioctl", libc::SYS_ioctl),
    ("read", libc::SYS_read),
    ("write", libc::SYS_write),
    ("readv", libc::SYS_readv),
    ("writev", libc::SYS_writev),
    ("preadv", libc::SYS_preadv),
    ("pwritev", libc::SYS_pwritev),
    ("pread", libc::SYS_pread64),
    ("pwrite", libc::SYS_pwrite64),
    ("epoll_pwait", libc::SYS_epoll_pwait),
    #[cfg(target_arch = "x86_64")]
    ("epoll_wait", libc::SYS_epoll_wait),
    #[cfg(not(target_arch = "x86_64"))]
    ("ppoll", libc::SYS_ppoll),
    ("io_uring_enter", libc::SYS_io_uring_enter),
    ("futex", libc::SYS_futex),
    ("recvmsg", libc::SYS_recvmsg),
    ("sendmsg", libc::SYS_sendmsg),
];

/// A thread of the monitor, and its events: all system calls, then those of `CALLS`.
struct Thread {
    schedstat: PathBuf,
    /// As last seen: the kernel ends workers of an io_uring when there is nothing to do.
    cpu_ns: Cell<u64>,
    is_vcpu: bool,
    events: Vec<File>,
    /// Accesses to devices, where KVM does not count exits.
    accesses: Vec<File>,
    /// Of a vCPU: exits that have to do with time.
    clock: Option<File>,
    /// Of a vCPU: interrupts by its own timer.
    timer: Option<File>,
    /// Of a vCPU: how often a program of the guest, or its kernel, has asked what the CPU can (x86_64).
    cpuid: Option<File>,
}

/// An interrupt comes to a local APIC: Linux' LOCAL_TIMER_VECTOR, from the vCPU's thread.
const TIMER: (&str, &str) = ("kvm_apic_accept_irq", "vec == 0xec");

/// Exits of a kind that KVM's statistics do not tell apart, but a tracepoint does: the guest sets its clock
/// (MSR TSC_DEADLINE), or an interrupt of the host's comes, which most often is a clock's.
#[cfg(target_arch = "x86_64")]
const CLOCK: (&str, &str, &str) = ("guest's clock", "kvm_msr", "ecx == 0x6e0");
#[cfg(not(target_arch = "x86_64"))]
const CLOCK: (&str, &str, &str) = ("host interrupts", "kvm_exit", "ret == 0");

/// The threads of a process that runs a virtual machine.
pub struct Counters<'a> {
    debug: &'a Debug,
    pid: u32,
    threads: Vec<Thread>,
}

/// How often what was done, by name; `all` is what one counts.
pub type Calls = BTreeMap<&'static str, u64>;

/// What was counted so far, or between two such.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub exits: Calls,
    /// Interrupts that KVM gave to the guest's CPUs, but those of their timers (x86_64).
    pub interrupts: Option<u64>,
    /// System calls of vCPU threads and of all others, by name; `all` is their sum.
    pub vcpu_calls: Calls,
    pub other_calls: Calls,
    /// CPU time of threads that are no vCPU's.
    pub cpu_ns: u64,
}

impl Counts {
    /// Exits of the load: without [`Self::clock_exits`].
    pub fn load_exits(&self) -> u64 {
        self.exits["all"].saturating_sub(self.clock_exits())
    }

    /// Exits that are not of the load: they come with time, however much is done in it.
    pub fn clock_exits(&self) -> u64 {
        let of = |name| self.exits.get(name).copied().unwrap_or(0);
        of("host interrupts") + of("guest's clock")
    }

    pub fn since(&self, before: &Self) -> Self {
        let minus = |now: &Calls, then: &Calls| {
            now.iter().map(|(name, count)| (*name, count - then.get(name).unwrap_or(&0))).collect()
        };
        Self {
            exits: minus(&self.exits, &before.exits),
            interrupts: self.interrupts.zip(before.interrupts).map(|(now, then)| now.saturating_sub(then)),
            vcpu_calls: minus(&self.vcpu_calls, &before.vcpu_calls),
            other_calls: minus(&self.other_calls, &before.other_calls),
            cpu_ns: self.cpu_ns - before.cpu_ns,
        }
    }
}

impl<'a> Counters<'a> {
    /// Counts from now on. Threads that are started later are counted with their parent.
    pub fn new(debug: &'a Debug, pid: u32) -> Result<Self> {
        let id = debug
            .number("tracing/events/raw_syscalls/sys_enter/id")
            .ok_or("this kernel has no tracepoint for system calls")?;
        let mut threads = Vec::new();
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let path = task?.path();
            let thread: i32 = path.file_name().ok_or("no thread")?.to_string_lossy().parse()?;
            let Ok(name) = std::fs::read_to_string(path.join("comm")) else { continue };
            let is_vcpu = name.to_lowercase().contains("vcpu");
            let tracepoint = |name| debug.number(format!("tracing/events/kvm/{name}/id"));
            let accesses = ["kvm_mmio", "kvm_pio"].into_iter().filter_map(tracepoint);
            let accesses = accesses.map(|id| count(id, thread, None)).collect::<Result<_>>()?;
            let clock = tracepoint(CLOCK.1).filter(|_| is_vcpu);
            let clock = clock.map(|id| count(id, thread, Some(CLOCK.2.to_owned()))).transpose()?;
            let timer = tracepoint(TIMER.0).filter(|_| is_vcpu);
            let timer = timer.map(|id| count(id, thread, Some(TIMER.1.to_owned()))).transpose()?;
            let cpuid = tracepoint("kvm_cpuid").filter(|_| is_vcpu);
            let cpuid = cpuid.map(|id| count(id, thread, None)).transpose()?;
            let filters = CALLS.iter().map(|(_, number)| Some(format!("id == {number}")));
            let events = [None].into_iter().chain(filters).map(|filter| count(id, thread, filter));
            let schedstat = path.join("schedstat");
            threads.push(Thread {
                schedstat,
                cpu_ns: Cell::new(0),
                is_vcpu,
                events: events.collect::<Result<_>>()?,
                accesses,
                clock,
                timer,
                cpuid,
            });
        }
        Ok(Self { debug, pid, threads })
    }

    pub fn read(&self) -> Result<Counts> {
        let interrupts = self.debug.number(self.debug.machine(self.pid)?.join("irq_injections"));
        let mut counts = Counts { exits: self.debug.exits(self.pid)?, interrupts, ..Counts::default() };
        let names = ["all"].into_iter().chain(CALLS.iter().map(|(name, _)| *name));
        // A software KVM does not leave the guest as hardware does, and counts nothing: there, what would
        // be an exit on hardware is.
        let is_counted = counts.exits["all"] > 0;
        for thread in &self.threads {
            for event in thread.accesses.iter().filter(|_| !is_counted) {
                *counts.exits.entry("all").or_default() += value(event)?;
            }
            if let (Some(timer), Some(interrupts)) = (&thread.timer, &mut counts.interrupts) {
                *interrupts = interrupts.saturating_sub(value(timer)?);
            }
            if let Some(clock) = &thread.clock {
                *counts.exits.entry(CLOCK.0).or_default() += value(clock)?;
            }
            if let Some(cpuid) = &thread.cpuid {
                *counts.exits.entry("CPUID").or_default() += value(cpuid)?;
            }
            let calls = if thread.is_vcpu { &mut counts.vcpu_calls } else { &mut counts.other_calls };
            for (name, event) in names.clone().zip(&thread.events) {
                *calls.entry(name).or_default() += value(event)?;
            }
            if !thread.is_vcpu {
                if let Ok(schedstat) = std::fs::read_to_string(&thread.schedstat) {
                    thread.cpu_ns.set(schedstat.split(' ').next().unwrap_or_default().parse()?);
                }
                counts.cpu_ns += thread.cpu_ns.get();
            }
        }
        Ok(counts)
    }
}

fn value(mut event: &File) -> Result<u64> {
    let mut value = [0; 8];
    event.read_exact(&mut value)?;
    Ok(u64::from_ne_bytes(value))
}

/// An event that counts what a thread and its children do (perf_event_open(2)).
fn count(tracepoint: u64, thread: i32, filter: Option<String>) -> Result<File> {
    const PERF_TYPE_TRACEPOINT: u32 = 2;
    const PERF_ATTR_SIZE_VER0: u32 = 64;
    const INHERIT: u64 = 1 << 1;
    const SET_FILTER: libc::c_ulong = 0x4008_2406;
    let mut attributes = [0_u64; 8];
    attributes[0] = u64::from(PERF_TYPE_TRACEPOINT) | u64::from(PERF_ATTR_SIZE_VER0) << 32;
    attributes[1] = tracepoint;
    attributes[5] = INHERIT;
    // SAFETY: the calls read a structure of the size that it names, and a text.
    unsafe {
        let fd = libc::syscall(libc::SYS_perf_event_open, &attributes, thread, -1, -1, 8_u64);
        if fd < 0 {
            return Err(format!("count system calls: {}", std::io::Error::last_os_error()).into());
        }
        let event = OwnedFd::from_raw_fd(fd as i32);
        if let Some(filter) = filter {
            let filter = std::ffi::CString::new(filter)?;
            if libc::ioctl(event.as_raw_fd(), SET_FILTER as libc::Ioctl, filter.as_ptr()) != 0 {
                return Err(format!("tell events apart: {}", std::io::Error::last_os_error()).into());
            }
        }
        Ok(event.into())
    }
}

/// Private memory of a monitor in KiB, without its guest's: mappings of the guest's size are left out.
pub fn own_memory(pid: u32) -> Result<u64> {
    const GUEST_KIB: u64 = 32 << 10;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut sum, mut size) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let field = words.next().unwrap_or_default();
        let value = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        match field {
            "Size:" => size = { value }(),
            "Anonymous:" if size < GUEST_KIB => sum += { value }(),
            _ => {}
        }
    }
    Ok(sum)
}
