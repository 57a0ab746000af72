//! Disks in Linux guests.

use super::backend::Backend;
use super::{memory, shared, *};

/// The content that the writers of `disk-scatter=write` (resources/guest-init) leave on a disk of 32 MiB.
fn scattered() -> Vec<u8> {
    const PIECE: usize = 64 << 10;
    let mut content = vec![0; 32 << 20];
    for writer in 0..4 {
        let mut state = writer as u64;
        for round in 1..=12 {
            state = (state * 1_103_515_245 + 12345) & 0x7fff_ffff;
            let piece = (state / 65536 % 24) as usize;
            let line = format!("{writer} {piece} {round}\n");
            let bytes: Vec<u8> = line.bytes().cycle().take(PIECE).collect();
            content[(writer * 24 + piece) * PIECE..][..PIECE].copy_from_slice(&bytes);
        }
    }
    content
}

/// An empty qcow2 image of 32 MiB: header, table of reference counts, their one block, table of clusters.
fn qcow2() -> Vec<u8> {
    let mut image = vec![0; 4 << 16];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    for (at, word) in [(4, 3), (20, 16), (36, 1), (56, 1), (96, 4), (100, 104)] {
        put(at, &u32::to_be_bytes(word));
    }
    for (at, long) in [(24, 32 << 20), (40, 3 << 16), (48, 1 << 16), (1 << 16, 2 << 16)] {
        put(at, &u64::to_be_bytes(long));
    }
    put(2 << 16, &[0, 1, 0, 1, 0, 1, 0, 1]);
    image
}

/// What a guest sees of an image.
fn content_of(path: &Path, format: &str) -> Vec<u8> {
    let config = json!({
        "drive_id": "d", "is_root_device": false, "is_read_only": true, "path_on_host": path,
        "format": format,
    });
    let mut disk = Disk::new(config).unwrap();
    (0..32 << 20 >> 16).flat_map(|piece| disk.read(piece << 7, 64 << 10).unwrap()).collect()
}

/// Makes an image of 32 MiB in which nothing is written.
pub fn image(folder: &Folder, name: &str, format: &str) -> PathBuf {
    let path = folder.write(name, if format == "qcow2" { qcow2() } else { Vec::new() });
    if format == "raw" {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(32 << 20).unwrap();
    }
    path
}

/// The host checks every byte that the guest wrote, and the guest reads it again when it has been given the image anew.
pub fn four_writers(guest: &shared::Guest, format: &str, engine: &str) {
    // A disk's engine knows nothing of the transport: behind virtio-mmio, each format and each engine is there once.
    if guest.queues == 1 && (format == "raw") != (engine == "sync") {
        return;
    }
    let disk = format!("{format}_{engine}");
    let path = guest.fresh(&disk, format);
    let says = |what: &str| {
        let text = guest.does(&disk, &[&format!("disk-scatter={what}")]);
        let said = format!("disk: four writers, {what} done, {} queues", guest.queues);
        assert!(text.contains(&said) && !text.contains("is not as it was"), "{text}");
    };
    says("write");
    let other = image(&guest.folder, "other", format);
    guest.show(&disk, &other);
    assert!(content_of(&path, format) == scattered(), "{format} {engine}");
    guest.show(&disk, &path);
    says("check");
}

pub fn gives_back(guest: &shared::Guest, format: &str, engine: &str) {
    use std::os::unix::fs::MetadataExt;
    let disk = format!("{format}_{engine}");
    let path = guest.fresh(&disk, format);
    // The room that the image takes on the host when the guest has done the word, in MiB.
    let takes = |word: &str| {
        let text = guest.does(&disk, &[word]);
        (text, std::fs::metadata(&path).unwrap().blocks() >> 11)
    };
    let (_, filled) = takes("disk-fill");
    assert!(filled >= 16, "{filled} MiB");
    let (_, trimmed) = takes("disk-trim");
    assert!(trimmed <= filled - 15, "{trimmed} MiB of {filled}");
    let (text, discarded) = takes("disk-discard");
    assert!(line_of(&text, "disk: discarded,") == "0" && discarded == 0, "{discarded} MiB: {text}");
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_disk_is_swapped_while_the_guest_runs() {
    for transport in TRANSPORTS {
        let mut service = Service::start(transport);
        let mut client = service.client();
        // Behind one transport the guest reports its free memory by itself; behind the other it is asked for memory.
        let reports = transport.is_empty();
        let boot = json!({
            "kernel_image_path": asset(KERNELS[0]),
            "initrd_path": asset("initramfs.cpio"),
            "boot_args": command_line(match reports {
                true => "disk-swap,memory-give-back",
                false => "disk-swap,memory-hotplug,memory-give-back",
            }),
        });
        memory::add_balloon(&mut client, reports);
        client.ok("PUT", "/hotplug/memory", r#"{"total_size_mib": 512}"#);
        client.ok("PUT", "/boot-source", &boot.to_string());
        let empty = service.folder.write("empty", "");
        let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": empty });
        client.ok("PUT", "/drives/d", &drive.to_string());
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        service.process.expect("disk: 0 sectors");
        let mut content = b"another image...".to_vec();
        content.resize(1 << 20, 0);
        let other = service.folder.write("other", content);
        client.ok("PATCH", "/drives/d", &json!({ "drive_id": "d", "path_on_host": other }).to_string());
        service.process.expect("disk: now 2048 sectors, another image...");
        if !reports {
            memory::is_plugged_and_unplugged(&mut service);
        }
        memory::comes_and_goes(&mut service, reports);
        let Service { process, folder, .. } = service;
        assert_eq!(process.end().code, Some(0));
        drop(folder);
    }
}

/// How many requests a guest makes that does `disk-reads`, of each of two disks.
const READS: u64 = 1024;

/// The guest, which does `disk-reads`, reads from the backend's disk and from one of ours, which take as many accesses to
/// registers: the guest tells the backend itself that there is a request, and the backend interrupts the guest itself.
fn takes_no_more_exits_than_ours(guest: &mut Process) {
    guest.expect("disk: both are there");
    let statistics = exits::Statistics::of(guest.child.id());
    let [backend, ours] = ["vda", "vdb"].map(|disk| {
        let exits::Exits { ports, memory, all } = statistics.during(|| {
            guest.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
            guest.expect(&format!("disk: {disk} was read"));
        });
        println!("exits: {READS} reads of {disk}: {ports} for ports, {memory} for registers in memory, {all} in all");
        ports + memory
    });
    guest.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    // A line that is typed, and one that is printed, take accesses to the serial port.
    assert!(ours > 0 && backend <= ours + (ours + READS) / 20, "{backend}, and {ours} of our own disk");
}

/// A guest behind one transport writes to a disk, and one behind the other reads that again, from a device that is a disk
/// because its backend says so.
#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_disk_of_a_vhost_user_backend_is_written_and_read() {
    let folder = Folder::new();
    let backend = Backend::new(&folder.path("backend"), 32 << 20 >> 9);
    let disk = format!("socket={},queues=2", backend.path.display());
    let device = format!("block,{disk}");
    let own = format!("{},queues=2", image(&folder, "own", "raw").display());
    let ways = [("check", vec!["--vhost-user", &device]), ("write", vec!["--disk", &disk, "--disk", &own])];
    // PCI comes first.
    for (transport, (what, devices)) in TRANSPORTS.into_iter().zip(ways).rev() {
        let words = format!("disk-scatter={what}{}", if what == "write" { ",disk-reads" } else { "" });
        let mut guest = start_with(KERNELS[0], 2, &words, &[&devices, transport].concat());
        if what == "write" {
            takes_no_more_exits_than_ours(&mut guest);
        }
        guest.stdin = None;
        let ended = guest.end();
        ends(&ended, 0, "powered off\n");
        let said = format!("disk: four writers, {what} done, 2 queues");
        assert!(ended.text.contains(&said) && !ended.text.contains("is not as it was"), "{}", ended.text);
        assert!(backend.plan.lock().unwrap().content == scattered(), "{what}");
    }
}

/// What a service says whose guest switches to the root file system on `disk`.
fn switch_root(transport: &[&str], mut drive: serde_json::Value, disk: &Path) -> String {
    let boot = json!({
        "kernel_image_path": asset(KERNELS[0]),
        "initrd_path": asset("initramfs.cpio"),
        "boot_args": command_line("root"),
    });
    for (field, value) in [("drive_id", json!("root")), ("is_root_device", json!(true))] {
        drive[field] = value;
    }
    drive["path_on_host"] = json!(disk);
    let folder = Folder::new();
    let config = json!({
        "boot-source": boot,
        "drives": [drive],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 256 },
    });
    let config = folder.write("config.json", config.to_string());
    let arguments = ["serve", "--no-api", "--config-file", config.to_str().unwrap()];
    let ended = run([&arguments, transport].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    ended.text
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_root_device_is_mounted_as_it_is_configured() {
    let folder = Folder::new();
    let disk = folder.write("root", std::fs::read(asset("root.ext4")).unwrap());
    let text = switch_root(TRANSPORTS[0], json!({}), &disk);
    assert!(text.contains("root: /dev/vda ext4 rw") && text.contains("root: written to"), "{text}");
    let written = std::fs::read(&disk).unwrap();
    let text = switch_root(TRANSPORTS[1], json!({ "is_read_only": true }), &disk);
    assert!(text.contains("root: /dev/vda ext4 ro") && text.contains("root: was written to"), "{text}");
    assert!(!text.contains("root: written to"), "{text}");
    assert!(std::fs::read(&disk).unwrap() == written, "a read-only disk was written to");
}

/// How a guest's kernel reaches a file in persistent memory: Debian's for arm64 has no DAX.
const PMEM: &str = if X86_64 { "by DAX" } else { "by the page cache" };

pub fn writes_to_pmem(guest: &shared::Guest) {
    let text = guest.does("", &["pmem=write", "pmem=check"]);
    for what in ["write", "check"] {
        let said = format!("pmem: {what} done, 65536 sectors, {PMEM}");
        assert!(text.contains(&said), "{text}");
    }
    // The superblock of ext4, and 4 MiB that are no zeros.
    let content = std::fs::read(guest.folder.path("pmem")).unwrap();
    assert_eq!(content[1080..1082], [0x53, 0xef]);
    assert!(content.iter().filter(|byte| **byte != 0).count() > 4_000_000);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn what_a_guest_writes_to_persistent_memory_stays() {
    let folder = Folder::new();
    let path = image(&folder, "pmem", "raw");
    let mut written = Vec::new();
    for ((what, access), transport) in [("write", ""), ("check", ",ro")].into_iter().zip(TRANSPORTS) {
        let pmem = format!("{}{access}", path.display());
        let ended =
            boot_with(KERNELS[0], 1, &format!("pmem={what}"), &[transport, &["--pmem", &pmem]].concat());
        let said = format!("pmem: {what} done, 65536 sectors, {PMEM}");
        assert!(ended.code == Some(0) && ended.text.contains(&said), "{}", ended.text);
        let content = std::fs::read(&path).unwrap();
        assert!(what == "write" || content == written, "a guest wrote to what is read-only");
        written = content;
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_root_on_persistent_memory_is_mounted_as_configured() {
    let folder = Folder::new();
    let root = folder.write("root", std::fs::read(asset("root.ext4")).unwrap());
    for (transport, access) in TRANSPORTS.into_iter().zip(["", ",ro"]) {
        let pmem = format!("{},root{access}", root.display());
        let ended = boot_with(KERNELS[0], 1, "root", &[transport, &["--pmem", &pmem]].concat());
        let said = if access.is_empty() { "root: written to" } else { "root: /dev/pmem0 ext4 ro" };
        assert!(ended.code == Some(0) && ended.text.contains(said), "{}", ended.text);
        assert!(ended.text.contains("root: was written to"), "{}", ended.text);
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_root_partition_is_found_by_its_partuuid() {
    const SECTOR: usize = 512;
    const START: usize = 2048;
    let root = std::fs::read(asset("root.ext4")).unwrap();
    // An MBR: the disk's signature, then one Linux partition by its first sector and length, no CHS.
    let mut disk = vec![0; START * SECTOR];
    disk[440..444].copy_from_slice(&0x5eed_1234_u32.to_le_bytes());
    let second = 446 + 16;
    disk[second + 4] = 0x83;
    disk[second + 8..second + 12].copy_from_slice(&(START as u32).to_le_bytes());
    disk[second + 12..second + 16].copy_from_slice(&((root.len() / SECTOR) as u32).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(root);
    let folder = Folder::new();
    let disk = folder.write("disk", &disk);
    let text = switch_root(TRANSPORTS[1], json!({ "partuuid": "5eed1234-02" }), &disk);
    assert!(text.contains("root: /dev/vda2 ext4 rw") && text.contains("root: written to"), "{text}");
}
