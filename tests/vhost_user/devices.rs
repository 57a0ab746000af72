//! Devices of any type that a backend does the work of: a file system of QEMU's virtiofsd, a disk of its storage daemon, and
//! backends of our own that have more or less to say.

use std::path::Path;
use std::process::{Child, Command};

use alula::devices::vhost_user::Config;

use super::backend::{Act, SET_CONFIG};
use super::*;
use common::{Service, run};

/// The first bit of each kind: of a device, of a ring that nobody here knows, of a device again.
const FEATURES: [u64; 3] = [1 << 3, 1 << 35, 1 << 51];

fn config(place: &Place, more: Value) -> Config {
    let mut config = json!({ "id": "d", "socket": place.folder.path("backend"), "device_type": "block" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config: Config = serde_json::from_value(config).unwrap();
    config.check().unwrap();
    config
}

fn guest(place: &Place, kind: TransportKind, more: Value) -> Guest {
    let device = config(place, more).open("vm", &mut Host::default()).unwrap();
    Guest::by_hand(kind, device, shared_memory())
}

fn patch(guest: &mut Guest) -> Result<(), String> {
    let change = DeviceKind::of::<Config>().parse_patch("", br#"{ "id": "d" }"#).unwrap();
    guest.pause();
    let result = guest.transport.lock().unwrap().patch(change.patch(), &mut Host::default());
    guest.resume();
    result.map_err(|error| error.to_string())
}

#[test]
fn a_device_has_the_features_and_the_configuration_of_its_backend() {
    let place = Place::new();
    for kind in TRANSPORTS {
        let backend = place.backend(64);
        backend.plan.lock().unwrap().features |= FEATURES.iter().sum::<u64>();
        let mut guest = guest(&place, kind, json!({ "num_queues": 2 }));
        let of_device = FEATURES[0] | FEATURES[2] | F_FLUSH | F_MQ;
        assert_eq!(guest.features(), F_VERSION_1 | F_RINGS | of_device, "{kind:?}");
        let mut sectors = [0; 8];
        guest.config(0, &mut sectors);
        assert_eq!(u64::from_le_bytes(sectors), 64);
        guest.start(F_EVENT_IDX);
        for (queue, byte) in [(0, 7), (1, 8)] {
            assert_eq!(ask(&mut guest, queue, 1, 3, &[byte; SECTOR]).0, 0);
            guest.wait_for(|guest| guest.is_interrupted(Some(queue)));
            assert_eq!(ask(&mut guest, queue, 0, 3, &[0; SECTOR]), (0, vec![byte; SECTOR]));
        }
        let told = backend.heard().into_iter().find(|(request, _)| *request == SET_FEATURES).unwrap();
        assert_eq!(told.1 & FEATURES[1], 0);
        // What the driver writes to the configuration is the backend's to take.
        guest.set_config(32, &[1]);
        assert!(backend.heard().contains(&(SET_CONFIG, 1 << 32 | 32)));
        guest.set_config(300, &[1]);
        assert_eq!(backend.heard(), []);
        assert_eq!(ask(&mut guest, 0, 0, 3, &[0; SECTOR]), (0, vec![8; SECTOR]));
    }
}

#[test]
fn a_backend_that_comes_again_is_met_by_a_patch() {
    let place = Place::new();
    for kind in TRANSPORTS {
        let backend = place.backend(64);
        let mut guest = guest(&place, kind, json!({}));
        guest.start(0);
        backend.plan.lock().unwrap().content.resize(100 * SECTOR, 0);
        patch(&mut guest).unwrap();
        let mut sectors = [0; 8];
        guest.config(0, &mut sectors);
        assert_eq!(u64::from_le_bytes(sectors), 100);
        assert!(guest.is_interrupted(None), "{kind:?}");
        // A configuration that the backend does not take costs the guest the device, and nothing else.
        backend.act(SET_CONFIG, Act::Body(vec![0; 9]));
        guest.set_config(32, &[1]);
        guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
        drop(backend);
        let gone = patch(&mut guest).unwrap_err();
        assert!(gone.contains("vhost-user device `d`"), "{gone}");
        let _again = place.backend(64);
        patch(&mut guest).unwrap();
        guest.start(0);
        assert_eq!(ask(&mut guest, 0, 1, 0, &[5; SECTOR]).0, 0);
    }
}

#[test]
fn a_backend_with_too_little_for_a_device_is_refused() {
    let place = Place::new();
    for (more, queues, expected) in [
        (
            json!({ "device_type": "99", "num_queues": 5 }),
            4,
            "5 queues (`num_queues`), and the vhost-user backend has 4",
        ),
        (json!({ "device_type": "scsi", "config_size": 60 }), 2, "the device has 3 queues"),
        (json!({ "device_type": "net", "config_size": 0 }), 1, "the device has 2 queues"),
    ] {
        let backend = place.backend(64);
        backend.plan.lock().unwrap().queues = queues;
        let error = config(&place, more).open("vm", &mut Host::default()).map(drop).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_makes_no_device_of_a_backend_is_refused_by_name() {
    for (field, value, expected) in [
        ("id", json!("a-b"), "can only contain alphanumeric"),
        ("socket", json!(""), "`socket` is missing"),
        ("device_type", json!("disk"), "it is one of net, block, console"),
        ("device_type", json!("0"), "or a number of virtio's, 1 to 255"),
        ("device_type", json!("256"), "or a number of virtio's, 1 to 255"),
        ("num_queues", json!(0), "`num_queues` is 0: it is 1 to 16"),
        ("num_queues", json!(17), "`num_queues` is 17: it is 1 to 16"),
        ("queue_size", json!(0), "`queue_size` is 0: it is a power of two"),
        ("queue_size", json!(100), "`queue_size` is 100: it is a power of two"),
        ("queue_size", json!(2048), "at most 1024"),
        ("config_size", json!(257), "`config_size` is more than 256"),
        ("tag", json!("share"), "the device is no file system"),
    ] {
        let mut body = json!({ "id": "d", "socket": "/s", "device_type": "block" });
        body[field] = value;
        let error = serde_json::from_value::<Config>(body).unwrap().check().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    for (field, value, expected) in [
        ("tag", json!(""), "it has 1 to 36 bytes"),
        ("tag", json!("x".repeat(37)), "it has 1 to 36 bytes"),
        ("tag", json!("a\0b"), "it has 1 to 36 bytes"),
        ("num_queues", json!(1), "has a queue for requests after the first"),
        ("config_size", json!(40), "`tag` is given beside `config_size`"),
    ] {
        let mut body = json!({ "id": "d", "socket": "/s", "device_type": "26", "tag": "share" });
        body[field] = value;
        let error = serde_json::from_value::<Config>(body).unwrap().check().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let option = |text: &str| Config::from_option(text, 1);
    let share = option("fs,socket=/s,tag=share,queues=3,queue-size=64").unwrap();
    let expected = json!({ "id": "device1", "socket": "/s", "device_type": "fs", "tag": "share", "num_queues": 3, "queue_size": 64 });
    assert_eq!(serde_json::to_value(&share).unwrap(), expected);
    for (text, expected) in [
        ("fs,sock=/s", "`sock=/s` is not understood: expected TYPE,socket=PATH"),
        ("fs,queues=x", "`x` is no number"),
        ("fs,readonly", "`readonly` is not understood"),
    ] {
        let error = option(text).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    assert!(option("").unwrap().check().is_err());
}

/// A backend that is another program, until it is dropped.
struct Program(Child);

impl Program {
    fn start(mut command: Command, socket: &Path) -> Self {
        let child = command.spawn();
        let child =
            child.unwrap_or_else(|error| panic!("{command:?} ({error}): scripts/test gets its package"));
        // Some are at their socket before they listen, and serve one who connects: the kernel says who listens (proc(5)).
        common::wait_for(|| {
            let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
            let path = format!(" {}", socket.display());
            sockets.lines().any(|line| line.ends_with(&path) && line.contains(" 00010000 "))
        });
        Self(child)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program of a newer Debian, whose libraries come with it: `ALULA_NEWER` is the folder that its packages were unpacked
/// in.
fn newer(program: &str) -> Command {
    let root =
        std::env::var("ALULA_NEWER").expect("scripts/test names the folder of newer programs in ALULA_NEWER");
    let libraries = format!("{root}/usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(format!("{libraries}/ld-linux-x86-64.so.2"));
    command.args(["--library-path", &libraries, &format!("{root}/usr/{program}")]);
    command
}

/// A request of FUSE to the file system of a guest (linux/fuse.h): what is answered after the head of the answer.
fn fuse(guest: &mut Guest, opcode: u32, node: u64, body: &[u8], room: usize) -> Vec<u8> {
    const HEAD: usize = 16;
    let length = 40 + body.len() as u32;
    let mut request = [length, opcode].map(u32::to_le_bytes).concat();
    request.extend([7, node, 0, 0].map(u64::to_le_bytes).concat());
    request.extend_from_slice(body);
    let (request, answer) = (guest.allocate(&request), guest.allocate(&vec![0; HEAD + room]));
    guest.request(1, &[(request, 0), (answer, WRITE)]);
    let answer = guest.bytes(answer);
    let word = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
    assert_eq!((word(4), word(8)), (0, 7), "request {opcode} has an error, and the number of its request");
    answer[HEAD..word(0) as usize].to_vec()
}

/// Reads a file of a folder of the host as a guest's driver does; `virtiofsd` shares that folder by this socket.
fn reads_a_shared_file(more: &Value, virtiofsd: impl Fn(&Path, &Path) -> Command) {
    const CONTENT: &[u8] = b"from the host";
    let place = Place::new();
    let (folder, socket) = (place.folder.path("shared"), place.folder.path("backend"));
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("file"), CONTENT).unwrap();
    for kind in TRANSPORTS {
        let _ = std::fs::remove_file(&socket);
        let _daemon = Program::start(virtiofsd(&socket, &folder), &socket);
        let mut guest = guest(&place, kind, more.clone());
        let mut space = [0xff; 40];
        guest.config(0, &mut space);
        assert!(space.starts_with(b"share\0") && space[5..36].iter().all(|byte| *byte == 0));
        assert_eq!(space[36..], 1_u32.to_le_bytes());
        guest.start(0);
        // INIT, by version 7.31; LOOKUP of the root's `file`; OPEN; READ.
        let init = fuse(&mut guest, 26, 0, &[7, 31, 0, 0].map(u32::to_le_bytes).concat(), 64);
        assert_eq!(init[..4], 7_u32.to_le_bytes());
        let found = fuse(&mut guest, 1, 1, b"file\0", 128);
        let node = u64::from_le_bytes(found[..8].try_into().unwrap());
        let opened = fuse(&mut guest, 14, node, &[0; 8], 16);
        let mut read = [0; 40];
        read[..8].copy_from_slice(&opened[..8]);
        read[16..20].copy_from_slice(&4096_u32.to_le_bytes());
        assert_eq!(fuse(&mut guest, 15, node, &read, 4096), CONTENT, "{kind:?}");
        guest.wait_for(|guest| guest.is_interrupted(Some(1)));
    }
}

#[test]
fn a_folder_of_the_host_is_a_file_system_by_virtiofsd() {
    reads_a_shared_file(&json!({ "device_type": "fs", "tag": "share" }), |socket, folder| {
        let mut command = Command::new("/usr/lib/qemu/virtiofsd");
        command.arg(format!("--socket-path={}", socket.display()));
        command.args(["-o", &format!("source={}", folder.display()), "-o", "sandbox=chroot"]);
        command.args(["-o", "log_level=err", "-f"]);
        command
    });
}

/// The one in Rust, which is asked for the name that the guest mounts.
#[test]
#[ignore = "a newer program: scripts/test names its folder in ALULA_NEWER"]
fn a_folder_is_shared_by_a_newer_virtiofsd_that_names_it() {
    reads_a_shared_file(&json!({ "device_type": "fs" }), |socket, folder| {
        let mut command = newer("libexec/virtiofsd");
        command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(folder);
        command.args(["--tag", "share", "--sandbox", "none", "--log-level", "error"]);
        command
    });
}

/// A network of passt, which has no configuration to be asked for: the guest asks who has its gateway's address.
#[test]
#[ignore = "a newer program: scripts/test names its folder in ALULA_NEWER"]
fn a_network_is_that_of_a_newer_passt() {
    /// The head of each packet (virtio 1.2, 5.1.6), and an ARP request for 10.0.2.2 from 10.0.2.15.
    const HEAD: usize = 12;
    let place = Place::new();
    let socket = place.folder.path("backend");
    for kind in TRANSPORTS {
        let _ = std::fs::remove_file(&socket);
        let mut passt = newer("bin/passt");
        passt.args(["--vhost-user", "--foreground", "--quiet", "--socket"]).arg(&socket);
        passt.args(["--address", "10.0.2.15", "--gateway", "10.0.2.2", "--ipv4-only"]);
        let _passt = Program::start(passt, &socket);
        let mut guest = guest(&place, kind, json!({ "device_type": "net", "config_size": 0 }));
        guest.start(0);
        let room = guest.allocate(&[0; HEAD + 1514]);
        guest.offer(0, &[(room, WRITE)]);
        guest.kick(0);
        let own = [2, 0, 0, 0, 0, 1];
        let mut frame = [&[0; HEAD][..], &[0xff; 6], &own, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
        frame.extend([&own[..], &[10, 0, 2, 15], &[0; 6], &[10, 0, 2, 2]].concat());
        let frame = guest.allocate(&frame);
        guest.request(1, &[(frame, 0)]);
        guest.wait_for(|guest| guest.has_used(0));
        let answer = guest.bytes(room);
        // It is an answer, from the gateway, to this guest.
        assert_eq!(answer[HEAD..HEAD + 6], own, "{kind:?}");
        assert_eq!(
            (&answer[HEAD + 20..HEAD + 22], &answer[HEAD + 28..HEAD + 32]),
            (&[0, 2][..], &[10, 0, 2, 2][..])
        );
    }
}

#[test]
fn a_guest_has_a_disk_of_a_daemon_as_any_other_device() {
    let place = Place::new();
    let mut content = qemu::image(&place);
    let _daemon = qemu::Daemon::start(&place.folder);
    let device = format!("block,socket={},id=d,queues=2", place.folder.path("backend").display());
    for transport in qemu::TRANSPORT_WORDS {
        let ended = run([&["run", "--vhost-user", &device, "--cmdline", "case=block"], transport].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains("block: ok (16384 sectors)"), "{}", ended.text);
        (0..SECTOR).for_each(|index| content[SECTOR + index] = index as u8 ^ 0x5a);
        assert!(std::fs::read(place.folder.path("image")).unwrap() == content);
    }
    let service = Service::start(&["--enable-pci"]);
    let mut client = service.client();
    let body =
        json!({ "id": "d", "socket": place.folder.path("backend"), "device_type": "2", "num_queues": 2 });
    client.ok("PUT", "/vhost-user/d", &body.to_string());
    assert_eq!(client.ok("GET", "/vm/config", "").json()["vhost-user"], json!([body]));
    service.boot_source("end=idle");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    client.ok("PATCH", "/vhost-user/d", r#"{"id": "d"}"#);
    // Memory is shared with one from the start: another may come and go.
    let other = Backend::new(&place.folder.path("other"), 64);
    let device = json!({ "id": "e", "socket": other.path, "device_type": "block" });
    client.ok("PUT", "/vhost-user/e", &device.to_string());
    assert_eq!(client.ok("GET", "/vm/config", "").json()["vhost-user"], json!([body, device]));
    client.ok("DELETE", "/vhost-user/e", "");
    common::wait_for(|| client.ok("GET", "/vm/config", "").json()["vhost-user"] == json!([body]));
    // The memory stays so when the last one has gone.
    client.ok("DELETE", "/vhost-user/d", "");
    client.ok("PUT", "/vhost-user/d", &body.to_string());
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let paths = json!({ "snapshot_path": place.folder.path("s"), "mem_file_path": place.folder.path("m") });
    let fault = client.request("PUT", "/snapshot/create", &paths.to_string()).fault();
    assert!(fault.contains("shared with the vhost-user backend of vhost-user device `d`"), "{fault}");
}
