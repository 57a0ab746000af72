//! This bench measures what a restore of a Linux guest with three devices costs behind virtio-pci, against the same
//! behind virtio-mmio: each vector of a device behind PCI has a route of its own in KVM.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Instant;

use serde_json::json;

use crate::host::network;
use crate::monitor::{Monitor, connect, request, send, spawn};
use crate::restore::{AHEAD, spread};
use crate::start::median;
use crate::table::verdict;
use crate::{Folder, Result, loads};

const TRANSPORTS: [(&str, &[&str]); 2] = [("virtio-mmio", &[]), ("virtio-pci", &["--enable-pci"])];
/// The bar: the time of a load behind PCI, as a multiple of the one behind MMIO.
const RATIO_MAX: f64 = 1.1;
/// The guest does not know this command, and says so.
const COMMAND: &[u8] = b"x\n";

/// The saved guest of a transport, and how long its restores took, in ms: until the load was answered, and until the guest
/// said something.
struct Saved {
    folder: PathBuf,
    answers: Vec<f64>,
    words: Vec<f64>,
}

/// The table of loads of a guest with this kernel and initramfs, as medians of `runs` in turn.
pub fn transports(ours: &str, linux: &(PathBuf, PathBuf), runs: usize) -> Result<()> {
    let folder = Folder::new()?;
    network::enter();
    network::add_tap(loads::TAP, &format!("{}/24", loads::HOST));
    let socket = folder.0.join("api.socket");
    let mut all = Vec::new();
    for (name, options) in TRANSPORTS {
        let saved = folder.0.join(name);
        save(ours, linux, options, &folder.0, &saved)?;
        all.push(Saved { folder: saved, answers: Vec::new(), words: Vec::new() });
    }
    for _ in 0..runs {
        for saved in &mut all {
            let mut child = spawn(ours, true, &socket, &[], Stdio::null())?;
            let loaded = load(&mut child, &socket, saved);
            child.kill()?;
            child.wait()?;
            loaded?;
            for path in [&socket, &folder.0.join("v")] {
                std::fs::remove_file(path)?;
            }
        }
    }
    println!(
        "load of a Linux guest with a disk, a network and a vsock, ms; medians (least, p99) of {runs} runs"
    );
    println!("{:<34} {:>23} {:>23}", "", "to the answer", "to the guest's word");
    for ((name, _), saved) in TRANSPORTS.iter().zip(&all) {
        println!("{name:<34} {} {}", spread(&saved.answers), spread(&saved.words));
    }
    if let [mmio, pci] = &all[..] {
        let answer = median(&pci.answers) / median(&mmio.answers);
        let word = median(&pci.words) / median(&mmio.words);
        let is_met = verdict(answer <= RATIO_MAX);
        println!("{:<34} {answer:>23.2} {word:>23.2}  to the answer <= {RATIO_MAX}: {is_met}", "ratio");
    }
    Ok(())
}

/// Boots the guest, types a command that it has not seen, and saves it.
fn save(
    ours: &str,
    (kernel, initrd): &(PathBuf, PathBuf),
    options: &[&str],
    folder: &Path,
    saved: &Path,
) -> Result<()> {
    let (disk, socket) = (folder.join("disk"), folder.join("api.socket"));
    std::fs::write(&disk, vec![0x5a; 1 << 20])?;
    let words = "console=ttyS0 panic=-1 quiet reboot=k alula.run=bench";
    let config = [
        ("/boot-source", json!({ "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": words })),
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })),
        ("/drives/disk", json!({ "drive_id": "disk", "path_on_host": disk, "is_root_device": false })),
        ("/network-interfaces/net", json!({ "iface_id": "net", "host_dev_name": loads::TAP })),
        ("/vsock", json!({ "guest_cid": 3, "uds_path": folder.join("v") })),
    ];
    let mut monitor = Monitor::start(ours, true, &socket, options, &config)?;
    monitor.expect(&["bench: ready"])?;
    let mut client = connect(&mut monitor.child, &socket)?;
    request(&mut client, "PATCH", "/vm", r#"{"state":"Paused"}"#)?;
    monitor.type_in(COMMAND)?;
    // The monitor needs time to take what is typed to the serial port, with which it is saved.
    std::thread::sleep(AHEAD);
    request(&mut client, "PUT", "/snapshot/create", &json!({ "folder": saved }).to_string())?;
    drop(monitor);
    std::fs::remove_file(&socket)?;
    Ok(std::fs::remove_file(folder.join("v"))?)
}

fn load(child: &mut Child, socket: &Path, saved: &mut Saved) -> Result<()> {
    let mut client = connect(child, socket)?;
    request(&mut client, "GET", "/", "")?;
    std::thread::sleep(AHEAD);
    let body = json!({ "folder": saved.folder, "resume_vm": true }).to_string();
    let asked = Instant::now();
    send(&mut client, "PUT", "/snapshot/load", &body)?;
    let mut answer = [0; 4096];
    let count = client.read(&mut answer)?;
    saved.answers.push(asked.elapsed().as_secs_f64() * 1e3);
    if !answer[..count].starts_with(b"HTTP/1.1 2") {
        return Err(format!("it answered {}", String::from_utf8_lossy(&answer[..count])).into());
    }
    child.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0])?;
    saved.words.push(asked.elapsed().as_secs_f64() * 1e3);
    Ok(())
}
