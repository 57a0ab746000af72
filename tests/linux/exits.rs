//! The exits that a guest makes, by KVM's statistics of its virtual machine.

use super::*;

/// Where the kernel shows them.
const DEBUG: &str = "/sys/kernel/debug";

/// The exits of a guest.
#[derive(Clone, Copy)]
pub struct Exits {
    /// By accesses to ports and to registers in memory, for which the vCPU's thread left KVM: what the guest does makes
    /// them, however long it takes.
    pub ports: u64,
    pub memory: u64,
    /// Of all kinds: timers and interrupts, which come with time, too.
    pub all: u64,
}

/// The statistics of one virtual machine.
pub struct Statistics(PathBuf);

impl Statistics {
    /// Those of the process's machine, which this thread alone sees where nobody has mounted them.
    pub fn of(process: u32) -> Self {
        let machines = Path::new(DEBUG).join("kvm");
        if !machines.exists() {
            common::mount(Path::new(DEBUG), "debugfs", "mode=700");
        }
        let mut machines = std::fs::read_dir(machines).unwrap().map(|entry| entry.unwrap());
        let name = format!("{process}-");
        Self(machines.find(|entry| entry.file_name().to_string_lossy().starts_with(&name)).unwrap().path())
    }

    fn read(&self) -> Exits {
        let number = |name| std::fs::read_to_string(self.0.join(name)).unwrap().trim().parse().unwrap();
        let [ports, memory] =
            if X86_64 { ["io_exits", "mmio_exits"].map(number) } else { [0, number("mmio_exit_user")] };
        Exits { ports, memory, all: number("exits") }
    }

    /// The exits that `work` makes, until no access has come for a while.
    pub fn during(&self, work: impl FnOnce()) -> Exits {
        let before = self.read();
        work();
        let mut now = self.read();
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let then = std::mem::replace(&mut now, self.read());
            if (then.ports, then.memory) == (now.ports, now.memory) {
                return Exits {
                    ports: then.ports - before.ports,
                    memory: then.memory - before.memory,
                    all: then.all - before.all,
                };
            }
        }
    }
}
