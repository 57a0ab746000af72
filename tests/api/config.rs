//! What a microVM is made of: by request, by config file, and told back.

use super::*;

#[test]
fn a_config_file_starts_its_guest_at_once_with_and_without_an_api() {
    let folder = common::Folder::new();
    let config = json!({
        "boot-source": { "kernel_image_path": folder.firmware(), "boot_args": "case=serial end=9" },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
        "drives": [],
    });
    let file = folder.write("vm.json", config.to_string());
    let file = file.to_str().unwrap();
    let ended = run(["serve", "--no-api", "--config-file", file]);
    assert_eq!(ended.code, Some(9), "{}", ended.text);
    let socket = folder.path("s");
    let ended = run(["serve", "--api-sock", socket.to_str().unwrap(), "--config-file", file]);
    assert_eq!(ended.code, Some(9), "{}", ended.text);
    assert!(!socket.exists());
    let ended = run(["run", "--config", file, "--cmdline", "case=serial end=4"]);
    assert_eq!(ended.code, Some(4), "{}", ended.text);
}

#[test]
fn config_files_that_make_no_sense_are_refused() {
    let folder = common::Folder::new();
    let kernel = folder.firmware();
    let kernel = kernel.to_str().unwrap();
    let boot = format!(r#""boot-source": {{"kernel_image_path": "{kernel}"}}"#);
    for (text, expected) in [
        (String::new(), "the text ends where a value is expected"),
        ("{".to_owned(), "the text ends within an object"),
        ("{}".to_owned(), "`boot-source` is missing"),
        (format!(r#"{{{boot}, "memory-hotplug": {{}}}}"#), "missing field `total_size_mib`"),
        (format!(r#"{{{boot}, "pmem": [{{"id": "a"}}]}}"#), "missing field `path_on_host`"),
        (format!(r#"{{{boot}, "drives": [{{"drive_id": "a"}}]}}"#), "missing field `is_root_device`"),
        (format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 1}}}}"#), "missing field `mem_size_mib`"),
        (
            format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 0, "mem_size_mib": 8}}}}"#),
            "number of vCPUs must be greater than 0",
        ),
        (
            r#"{"boot-source": {"kernel_image_path": "/none"}}"#.to_owned(),
            "open kernel `/none`: No such file",
        ),
    ] {
        let file = folder.write("vm.json", &text);
        let ended = run(["serve", "--no-api", "--config-file", file.to_str().unwrap()]);
        assert_eq!(ended.code, Some(1), "{text}: {}", ended.text);
        assert!(ended.text.contains(expected), "{text}: {}", ended.text);
    }
    let missing = run(["serve", "--no-api", "--config-file", "/nonexistent.json"]);
    assert!(missing.text.contains("read config file `/nonexistent.json`: No such file"), "{}", missing.text);
}

#[test]
fn a_running_microvm_without_pci_keeps_its_devices() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let service = Service::start(&[]);
    service.boot_source("hello");
    let mut client = service.client();
    let interface = json!({ "iface_id": "n", "host_dev_name": "tap0" }).to_string();
    client.ok("PUT", "/network-interfaces/n", &interface);
    let early = client.request("DELETE", "/network-interfaces/n", "").fault();
    assert!(early.contains("not supported before starting"), "{early}");
    client.ok("PUT", "/actions", START);
    let disk = service.folder.write("disk", [0; 4096]);
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk }).to_string();
    for (path, body) in [("/drives/d", &drive), ("/network-interfaces/n", &interface)] {
        for (method, body) in [("PUT", &**body), ("DELETE", "")] {
            let fault = client.request(method, path, body).fault();
            assert!(fault.contains("PCI is not enabled: devices come and go while"), "{method}: {fault}");
        }
    }
    assert!(client.request("PUT", "/entropy", "{}").fault().contains("not supported after starting"));
    // With the name alone there is nothing to change, and nothing wrong.
    client.ok("PATCH", "/network-interfaces/n", r#"{"iface_id": "n"}"#);
    for (path, body, expected) in [
        ("/network-interfaces/n", r#"{"iface_id": "m"}"#, "The id from the path [n] does not match"),
        ("/network-interfaces/n", r#"{"iface_id": "n", "mtu": 1500}"#, "unknown field `mtu`"),
        (
            "/network-interfaces/x",
            r#"{"iface_id": "x"}"#,
            "Network config error: there is no network interface `x`",
        ),
        ("/drives/x", r#"{"drive_id": "x"}"#, "Drive config error: there is no disk `x`"),
        ("/entropy", "{}", "Invalid request method and/or path: PATCH entropy."),
    ] {
        let fault = client.request("PATCH", path, body).fault();
        assert!(fault.contains(expected), "{path} {body}: {fault}");
    }
}

#[test]
fn a_put_says_everything_and_a_patch_what_it_names() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let whole = |cpus: u16, mib: u64| {
        json!({
            "vcpu_count": cpus, "mem_size_mib": mib, "smt": false, "track_dirty_pages": false, "huge_pages": "None"
        })
    };
    assert_eq!(client.ok("GET", "/machine-config", "").json(), whole(1, 128));
    for (method, body, expected) in [
        ("PUT", r#"{"vcpu_count": 2, "mem_size_mib": 64, "cpu_template": "None"}"#, whole(2, 64)),
        ("PUT", r#"{"vcpu_count": 1, "mem_size_mib": 64, "smt": false}"#, whole(1, 64)),
        ("PATCH", r#"{"mem_size_mib": 65}"#, whole(1, 65)),
        ("PATCH", r#"{"vcpu_count": 4, "smt": null}"#, whole(4, 65)),
        ("PATCH", r#"{"cpu_template": "None"}"#, whole(4, 65)),
    ] {
        let response = client.ok(method, "/machine-config", body);
        assert_eq!(response.head.contains("Deprecation: true\r\n"), body.contains("cpu_template"), "{body}");
        assert_eq!(client.ok("GET", "/machine-config", "").json(), expected, "{method} {body}");
    }
    let disk = service.folder.write("disk", [0; 4096]);
    let put = |client: &mut Client, more: serde_json::Value| {
        let mut body = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ok("PUT", "/drives/d", &body.to_string());
        client.ok("GET", "/vm/config", "").json()["drives"][0].clone()
    };
    let drive =
        put(&mut client, json!({ "is_read_only": true, "cache_type": "Writeback", "partuuid": "1-2" }));
    assert_eq!(
        (&drive["is_read_only"], &drive["cache_type"], &drive["partuuid"]),
        (&json!(true), &json!("Writeback"), &json!("1-2"))
    );
    let drive = put(&mut client, json!({ "partuuid": null, "rate_limiter": null, "socket": null }));
    assert_eq!(
        (&drive["is_read_only"], &drive["cache_type"], &drive["io_engine"], &drive["partuuid"]),
        (&json!(false), &json!("Unsafe"), &json!("Sync"), &json!(null))
    );
}

/// Bit 13 of ECX in leaf 1: CMPXCHG16B. A KVM that emulates all code of kernels gives back some bits of the
/// host's whatever it is told, but this one.
const CX16: u64 = 1 << 13;

/// A number that the firmware's case `features` tells after `name`.
fn told_hexadecimal(service: &mut Service, name: &str) -> u64 {
    let text = service.process.expect("edx ");
    let hex = text.split(&format!("{name} 0x")).nth(1).unwrap().split(',').next().unwrap();
    u64::from_str_radix(hex, 16).unwrap()
}

#[test]
fn a_guests_cpus_are_changed_as_their_configuration_says() {
    let start = |modifiers: &str| {
        let service = Service::start(&[]);
        let mut client = service.client();
        let body = format!(r#"{{"cpuid_modifiers": {modifiers}}}"#);
        let put = client.request("PUT", "/cpu-config", &body);
        if cfg!(not(target_arch = "x86_64")) && modifiers != "[]" {
            let expected = "Configure CPU error: `cpuid_modifiers`: aarch64 has no CPUID";
            assert_eq!(put.fault(), expected);
            return None;
        }
        assert_eq!(put.status(), "204", "{}", put.body);
        let told = client.ok("GET", "/vm/config", "").json();
        assert!(told["cpu-config"]["cpuid_modifiers"].is_array(), "{told}");
        service.boot_source("case=features end=idle");
        let started = client.request("PUT", "/actions", START);
        Some((service, started))
    };
    let change = |leaf: &str| {
        let bits = format!("0b0{}", "x".repeat(13));
        let register = format!(r#"{{"register": "ecx", "bitmap": "{bits}"}}"#);
        format!(r#"[{{"leaf": "{leaf}", "subleaf": "0x0", "flags": 0, "modifiers": [{register}]}}]"#)
    };
    let (mut as_is, started) = start("[]").unwrap();
    assert_eq!(started.status(), "204", "{}", started.body);
    if let Some((mut changed, started)) = start(&change("0x1")) {
        assert_eq!(started.status(), "204", "{}", started.body);
        let (before, after) = (told_hexadecimal(&mut as_is, "ecx"), told_hexadecimal(&mut changed, "ecx"));
        assert_eq!((before & CX16, before & !CX16), (CX16, after), "{before:#x} {after:#x}");
        let after_start = changed.client().request("PUT", "/cpu-config", "{}").fault();
        assert!(after_start.contains("not supported after starting the microVM"), "{after_start}");
        let (_, refused) = start(&change("0x7fff")).unwrap();
        let expected = "change leaf 0x7fff, subleaf 0x0 of CPUID (`cpuid_modifiers`, or those of `cpu_template`): this host's KVM does";
        assert!(refused.fault().contains(expected), "{}", refused.body);
    }
}

/// A template changes what CPUs show where the host's processor is one of those that it is for, and is refused by name
/// elsewhere. Whichever of template and changes is given last counts.
#[test]
fn a_template_of_cpus_is_for_processors_of_its_maker() {
    let start = |template: &str| {
        let service = Service::start(&[]);
        let mut client = service.client();
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": 64, "cpu_template": template });
        client.ok("PUT", "/machine-config", &machine.to_string());
        client.ok("PUT", "/cpu-config", "{}");
        let told = client.ok("GET", "/vm/config", "").json();
        assert!(told["machine-config"]["cpu_template"].is_null() && told["cpu-config"].is_object(), "{told}");
        client.ok("PATCH", "/machine-config", &json!({ "cpu_template": template }).to_string());
        let told = client.ok("GET", "/vm/config", "").json();
        assert!(told["machine-config"]["cpu_template"] == template && told["cpu-config"].is_null(), "{told}");
        service.boot_source("case=features end=idle");
        let started = client.request("PUT", "/actions", START);
        (service, started)
    };
    if cfg!(not(target_arch = "x86_64")) {
        let (_, started) = start("V1N1");
        // KVM has a say in what a processor hides, and an older one lets nothing be hidden.
        let expected = "change the register 0x603000000013c0";
        assert!(started.status() == "204" || started.fault().contains(expected), "{}", started.body);
        return;
    }
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let (ours, others, makers) = match processor.contains("AuthenticAMD") {
        true => ("T2A", "T2", ["GenuineIntel", "AuthenticAMD"]),
        false => ("T2", "T2A", ["AuthenticAMD", "GenuineIntel"]),
    };
    let (mut service, started) = start(ours);
    assert_eq!(started.status(), "204", "{}", started.body);
    let shown = told_hexadecimal(&mut service, "ecx");
    assert_eq!(shown & 0x0004_cdfc, 0, "what the template hides of leaf 1 is shown: {shown:#x}");
    let (_, refused) = start(others);
    let [expected, found] = makers;
    let expected = format!("is for processors of {expected}, and this host has one of {found}");
    assert!(refused.fault().contains(&expected), "{}", refused.body);
}

/// A register that only an operating system would use, as the firmware tells (IA32_SYSENTER_ESP, TPIDR_EL1), and one
/// that KVM does not have.
const REGISTERS: (&str, &str, &str) = if cfg!(target_arch = "x86_64") {
    ("msr_modifiers", "0x175", "0xdead")
} else {
    ("reg_modifiers", "0x603000000013c684", "0x603000000013dead")
};
/// KVM_CAP_IRQFD, which every KVM has, and a number that none has.
const CAPABILITIES: (u32, u32) = (32, 1_000_000);

#[test]
fn cpus_have_registers_and_kvm_what_the_configuration_asks() {
    let (field, register, missing) = REGISTERS;
    let (known, unknown) = CAPABILITIES;
    let start = |register: &str, capability: String| {
        let service = Service::start(&[]);
        let mut client = service.client();
        let modifiers = json!([{ "addr": register, "bitmap": "0b1x01_0000_0000_0000" }]);
        let body = json!({ field: modifiers, "kvm_capabilities": [capability, format!("!{unknown}")] });
        client.ok("PUT", "/cpu-config", &body.to_string());
        let told = client.ok("GET", "/vm/config", "").json();
        assert_eq!(told["cpu-config"][field][0]["addr"], register, "{told}");
        client.ok("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#);
        service.boot_source("case=features end=idle");
        let started = client.request("PUT", "/actions", START);
        (service, started)
    };
    let (mut service, started) = start(register, known.to_string());
    assert_eq!(started.status(), "204", "{}", started.body);
    // The bit that is left is as KVM has it at a reset, which is anything.
    assert_eq!(told_hexadecimal(&mut service, "register") & 0xbfff, 0x9000);
    let (_, refused) = start(missing, known.to_string());
    let expected = format!("register {missing}");
    assert!(refused.fault().contains(&expected) && refused.body.contains(field), "{}", refused.body);
    let (_, refused) = start(register, unknown.to_string());
    let expected = "capability 1000000 of KVM (`kvm_capabilities`): this host's KVM does not have it";
    assert!(refused.fault().contains(expected), "{}", refused.body);
}

#[test]
fn a_config_file_has_the_changes_of_cpus_or_names_their_file() {
    let folder = common::Folder::new();
    let check = |cpu: &str| {
        let boot = json!({ "kernel_image_path": folder.firmware() });
        let file = folder.write("vm.json", format!(r#"{{"boot-source": {boot}, "cpu-config": {cpu}}}"#));
        let ended = run(["check", file.to_str().unwrap()]);
        (ended.code, ended.text)
    };
    let template = folder.write("cpu.json", r#"{"cpuid_modifiers": [], "msr_modifiers": []}"#);
    let wrong = folder.write("wrong.json", "{\n\"cpuid\": []}");
    for cpu in ["{}".to_owned(), "null".to_owned(), json!(template).to_string()] {
        let (code, text) = check(&cpu);
        assert_eq!(code, Some(0), "{cpu}: {text}");
    }
    for (cpu, expected) in [
        ("[]".to_owned(), "`cpu-config`: expected an object, found a list"),
        (r#""/nonexistent/cpu.json""#.to_owned(), "read CPU config `/nonexistent/cpu.json`: No such file"),
        (json!(wrong).to_string(), "wrong.json`: `cpu-config`: unknown field `cpuid`"),
        (r#"{"msr_modifiers": [{"addr": "1", "bitmap": "0b1"}]}"#.to_owned(), "a number of 32 bits"),
    ] {
        let (code, text) = check(&cpu);
        assert!(code == Some(1) && text.contains(expected), "{cpu}: {code:?} {text}");
    }
}

#[test]
fn the_configuration_is_told_whole_with_the_root_drive_first() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let disk = service.folder.write("disk", [0; 4096]);
    let put = |client: &mut Client, id: &str, more: serde_json::Value| {
        let mut body = json!({ "drive_id": id, "is_root_device": false, "path_on_host": disk });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ok("PUT", &format!("/drives/{id}"), &body.to_string());
    };
    let bucket = |size: u64| json!({ "size": size, "refill_time": 5 });
    let limits = json!({ "bandwidth": bucket(7), "ops": bucket(0) });
    put(&mut client, "data", json!({ "rate_limiter": limits, "is_read_only": null, "io_engine": null }));
    put(&mut client, "root", json!({ "is_root_device": true, "partuuid": "1-2" }));
    let drives = client.ok("GET", "/vm/config/", "").json()["drives"].clone();
    let drive = |id: &str, is_root: bool, partuuid: Option<&str>, rate_limiter: serde_json::Value| {
        json!({
            "drive_id": id, "partuuid": partuuid, "is_root_device": is_root, "cache_type": "Unsafe",
            "is_read_only": false, "path_on_host": disk, "rate_limiter": rate_limiter, "io_engine": "Sync",
            "socket": null
        })
    };
    let told = json!({ "bandwidth": { "size": 7, "one_time_burst": null, "refill_time": 5 }, "ops": null });
    let expected = json!([drive("root", true, Some("1-2"), json!(null)), drive("data", false, None, told)]);
    assert_eq!(drives, expected);
    assert_eq!(client.ok("GET", "/version/more", "").json()["firecracker_version"], "1.17.0");
}
