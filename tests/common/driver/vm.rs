//! Machines for tests of devices: KVM's interrupt controllers and one CPU, which does not run.

use std::sync::{Arc, OnceLock};

use alula::memory::{self, Memory};
use alula::platform::Platform;
use alula::vm::{Prepared, Vm};
use vm_memory::GuestAddressSpace;

/// A machine of a test's own, what `make_cpu` makes of it, and the memory that the machine has for as long.
pub fn machine<C>(make_cpu: impl FnOnce(&mut Vm) -> C) -> (Vm, C, Memory) {
    let ranges = alula::arch::layout::memory(2 << 20);
    let memory = memory::allocate(&ranges).unwrap();
    let mut platform = Platform {
        cpus: 1,
        smt: false,
        memory: ranges,
        command_line: String::new(),
        initrd: None,
        random_seed: [0; 32],
        nodes: Vec::new(),
        pci: true,
        gic: None,
    };
    let mut vm = Vm::new(Prepared::new().expect("KVM"), &memory.memory()).unwrap();
    let cpu = make_cpu(&mut vm);
    vm.complete(&mut platform).unwrap();
    (vm, cpu, memory)
}

/// The machine whose interrupts PCI devices use: one for all tests of a process.
pub fn vm() -> Arc<Vm> {
    static VM: OnceLock<(Arc<Vm>, Memory)> = OnceLock::new();
    let (vm, _) = VM.get_or_init(|| {
        let (vm, _, memory) = machine(|vm| vm.create_vcpus(1, Default::default()).unwrap().len());
        (Arc::new(vm), memory)
    });
    vm.clone()
}
