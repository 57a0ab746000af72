//! A Linux guest that goes on in machines built anew, again and again, while it works on its disk and its network.

use alula::config::Config;
use alula::machine::Exit;

use super::*;
use crate::common::suspend::{self, Random, Screen, Suspended};

/// A program of the host that guests connect to: it sends back what it is sent, until this value is dropped.
struct Host {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    fn start() -> Self {
        let listener = TcpListener::bind("172.16.0.1:5001").unwrap();
        listener.set_nonblocking(true).unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let ends = is_over.clone();
        let serve = move || {
            while !ends.load(Ordering::SeqCst) {
                let Ok((mut stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).unwrap();
                // A guest that has ended meanwhile needs it no more.
                let _ = stream.write_all(&bytes);
            }
        };
        Self { is_over, thread: Some(std::thread::spawn(serve)) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let served = self.thread.take().unwrap().join();
        assert!(served.is_ok() || std::thread::panicking());
    }
}

fn config(pci: bool, cpus: u32, disk: &Path) -> Config {
    let config = json!({
        "boot-source": {
            "kernel_image_path": asset(KERNELS[0]),
            "initrd_path": asset("initramfs.cpio"),
            "boot_args": command_line("disk-write,entropy,work,exit=5"),
        },
        "machine-config": { "vcpu_count": cpus, "mem_size_mib": 256 },
        "drives": [{ "drive_id": "disk", "path_on_host": disk, "is_root_device": false }],
        "network-interfaces": [{ "iface_id": "net", "host_dev_name": "tap0" }],
        "entropy": {},
    });
    let mut config = Config::parse(config.to_string().as_bytes()).unwrap();
    config.pci = pci;
    config
}

/// Has a guest go on in so many machines, one after the other, and looks at what it has done.
fn goes_on(pci: bool, cpus: u32, cycles: usize) {
    let (mut random, folder, screen) = (Random::default(), Folder::new(), Screen::default());
    let disk = folder.write("disk", []);
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(16 << 20).unwrap();
    let mut machine = suspend::boot(&config(pci, cpus, &disk), &screen);
    // The guest has said so many times that it has written, and sent.
    let rounds = || ["wrote", "sent"].map(|what| screen.text().matches(&format!("work: {what} ")).count());
    let has_done_more = |before: [usize; 2]| rounds().iter().zip(before).all(|(now, before)| *now > before);
    for cycle in 0..cycles {
        // Each time somewhere in what the guest does then: writing, waiting for its random numbers, or all at once.
        let before = rounds();
        wait_for(|| match cycle {
            0 => screen.text().contains("guest: does disk-write"),
            1 => screen.text().contains("guest: does entropy"),
            _ => has_done_more(before),
        });
        std::thread::sleep(Duration::from_millis(random.below(300)));
        machine.pause().unwrap();
        machine = Suspended::new(machine).go_on(&screen);
    }
    let before = rounds();
    wait_for(|| has_done_more(before));
    machine.type_on_console(b"\n");
    wait_for(|| machine.exit().is_some());
    let text = screen.text();
    assert_eq!(machine.exit(), Some(Exit::Code(5)), "{text}");
    assert!(text.contains("disk: read and written, 32768 sectors"), "{text}");
    assert!(text.contains("work: 4 files are as they were written"), "{text}");
    for complaint in ["differ", "EOF on", "rcu:", "stall", "lockup", "BUG", "WARNING", "EXT4-fs error"] {
        assert!(!text.contains(complaint), "{complaint}: {text}");
    }
    drop(machine);
    common::output("e2fsck", &["-fn", disk.to_str().unwrap()]);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_goes_on_in_a_machine_built_anew() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let _host = Host::start();
    let (cycles, cpus) = if times() > 1 { (20, &[1, 2][..]) } else { (3, &[2][..]) };
    for cpus in cpus {
        [false, true].into_iter().for_each(|pci| goes_on(pci, *cpus, cycles));
    }
}
