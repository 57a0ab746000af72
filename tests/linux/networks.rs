//! Networks of Linux guests.

use super::{shared, *};

/// Numbers that do not repeat: a lost, doubled or swapped segment shows.
fn numbers() -> Vec<u8> {
    (0..1_u32 << 20).flat_map(|number| number.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect()
}

pub fn bulk(guest: &shared::Guest) {
    let data = numbers();
    let [down, up] = [5001, 5002].map(|port| TcpListener::bind(("172.16.0.1", port)).unwrap());
    let program = guest.command("", &["bulk"]).spawn().unwrap();
    network::accept(&down).write_all(&data).unwrap();
    let mut back = Vec::new();
    network::accept(&up).read_to_end(&mut back).unwrap();
    assert!(back == data, "{} bytes came back changed", back.len());
    let text = shared::said(program.wait_with_output().unwrap());
    assert!(text.contains("network: 4194304 bytes came and went"), "{text}");
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn bulk_data_is_unharmed_on_several_queues_while_limits_change() {
    network::enter();
    network::add_interface("tap0", network::TAP | libc::IFF_MULTI_QUEUE);
    common::output("ip", &["addr", "add", "172.16.0.1/24", "dev", "tap0"]);
    common::output("ip", &["link", "set", "tap0", "up"]);
    let data = numbers();
    let [down, up] = [5001, 5002].map(|port| TcpListener::bind(("172.16.0.1", port)).unwrap());
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let boot = json!({
        "kernel_image_path": asset(KERNELS[0]),
        "initrd_path": asset("initramfs.cpio"),
        "boot_args": command_line("bulk"),
    });
    client.ok("PUT", "/boot-source", &boot.to_string());
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 256}"#);
    let net = json!({ "iface_id": "n", "host_dev_name": "tap0", "queue_pairs": 2, "threads": 2 });
    client.ok("PUT", "/network-interfaces/n", &net.to_string());
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let mut down = network::accept(&down);
    let sent = data.clone();
    let sender = std::thread::spawn(move || down.write_all(&sent).unwrap());
    let limits = [
        json!({ "rx_rate_limiter": { "bandwidth": { "size": 200_000, "refill_time": 100 } } }),
        json!({ "rx_rate_limiter": { "ops": { "size": 20, "refill_time": 20 } } }),
        json!({ "tx_rate_limiter": { "ops": { "size": 50, "refill_time": 20, "one_time_burst": 100 } } }),
        json!({ "tx_rate_limiter": { "bandwidth": { "size": 400_000, "refill_time": 100 } } }),
    ];
    let none =
        json!({ "bandwidth": { "size": 0, "refill_time": 0 }, "ops": { "size": 0, "refill_time": 0 } });
    let done = json!({ "iface_id": "n", "rx_rate_limiter": none, "tx_rate_limiter": none });
    let mut change = |limit: &serde_json::Value| {
        let mut body = limit.clone();
        body["iface_id"] = json!("n");
        client.ok("PATCH", "/network-interfaces/n", &body.to_string());
        std::thread::sleep(Duration::from_millis(100));
    };
    limits.iter().for_each(&mut change);
    sender.join().unwrap();
    let mut up = network::accept(&up);
    let receiver = std::thread::spawn(move || {
        let mut back = Vec::new();
        up.read_to_end(&mut back).unwrap();
        back
    });
    limits.iter().for_each(&mut change);
    change(&done);
    let back = receiver.join().unwrap();
    assert!(back == data, "{} bytes came back changed", back.len());
    service.process.expect("network: 4194304 bytes came and went");
    let Service { process, folder, .. } = service;
    assert_eq!(process.end().code, Some(0));
    drop(folder);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn an_ordinary_users_guest_has_a_network_by_passt() {
    network::enter();
    network::add_uplink();
    common::open_devices();
    let page = TcpListener::bind("127.0.0.1:8000").unwrap();
    let folder = Folder::new();
    let (kernel, initrd, line) = (asset(KERNELS[0]), asset("initramfs.cpio"), command_line("user-network"));
    let arguments =
        ["run", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap(), "--memory", "256M"];
    let net = ["--net", "user,loopback", "--publish", "8080:80", "--cmdline", &line];
    let mut guest = Process::spawn(common::as_nobody(&folder, &[&arguments[..], &net].concat()));
    // The address of the host's own uplink.
    guest.expect("user network: 10.9.8.2/24");
    let mut client = network::accept(&page);
    client.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 13\r\n\r\na host's page").unwrap();
    drop(client);
    guest.expect("fetched: a host's page");
    let mut answer = String::new();
    common::wait_for(|| {
        // The guest may not listen yet: then the connection ends at once.
        let mut stream = std::net::TcpStream::connect("127.0.0.1:8080").unwrap();
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        // Debian 12's passt passes on what the guest says only when the client has spoken.
        stream.write_all(b"hello\n").is_ok()
            && std::io::BufReader::new(stream).read_line(&mut answer).is_ok_and(|count| count > 0)
    });
    assert_eq!(answer.trim(), "a guest's answer");
    let ended = guest.end();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
}
