//! Features of CPUs: those that KVM has to be asked for when it makes them (aarch64), and what two hosts differ in.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::path::Path;

use common::{Service, run};
use serde_json::{Value, json};

#[test]
fn features_that_a_guest_cannot_have_are_refused() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let is_x86 = cfg!(target_arch = "x86_64");
    for (index, bitmap, of_aarch64) in [
        (0, "0b1", "guests cannot be given 0x1 of word 0: of word 0 there are bits 2 (PSCI), 4 (SVE)"),
        (0, "0b1xxx", "guests cannot be given 0x8 of word 0"),
        (1, "0b1", "guests cannot be given 0x1 of word 1"),
        (7, "0b0", "guests cannot be given 0x0 of word 7"),
    ] {
        let body = json!({ "vcpu_features": [{ "index": index, "bitmap": bitmap }] }).to_string();
        let fault = client.request("PUT", "/cpu-config", &body).fault();
        let expected = if is_x86 { "x86_64 has no features of aarch64" } else { of_aarch64 };
        assert!(fault.contains(&format!("`vcpu_features`: {expected}")), "{body}: {fault}");
    }
    let fault =
        client.request("PUT", "/cpu-config", r#"{"vcpu_features": [{"index": 0, "bitmap": "1"}]}"#).fault();
    assert!(fault.contains("a text with at most 32 of `0`, `1` and `x` after `0b`"), "{fault}");
}

/// Runs `alula cpu` with these words, and returns its exit code and what it says.
fn cpu(words: &[&str]) -> (Option<i32>, String) {
    let ended = run([&["cpu"][..], words].concat());
    (ended.code, ended.text)
}

#[test]
fn what_a_cpu_is_here_is_told_and_compared() {
    let (code, dump) = cpu(&["dump"]);
    assert_eq!(code, Some(0), "{dump}");
    // A guest can be given what was told.
    let service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", "/cpu-config", &dump);
    service.boot_source("end=idle");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let saved = service.folder.path("saved");
    client.ok("PUT", "/snapshot/create", &json!({ "folder": saved }).to_string());

    let mut less: Value = serde_json::from_str(&dump).unwrap();
    let is_x86 = cfg!(target_arch = "x86_64");
    // SYSCALL (bit 11), and what the manual has of processors without AdvSIMD: all bits of fields 16 and 20.
    let (bits, bit, lacking) = if is_x86 { (11..12, '0', "syscall") } else { (16..24, '1', "AdvSIMD of") };
    let registers = if is_x86 {
        let leaves = less["cpuid_modifiers"].as_array_mut().unwrap();
        &mut leaves.iter_mut().find(|leaf| leaf["leaf"] == "0x80000001").unwrap()["modifiers"]
    } else {
        &mut less["reg_modifiers"]
    };
    let is_it = |it: &Value| it["register"] == "edx" || it["addr"] == "0x603000000013c020";
    let register = registers.as_array_mut().unwrap().iter_mut().find(|it| is_it(it)).unwrap();
    let letters = register["bitmap"].as_str().unwrap().chars().rev().enumerate();
    let changed: Vec<_> =
        letters.map(|(place, letter)| if bits.contains(&place) { bit } else { letter }).collect();
    register["bitmap"] = changed.into_iter().rev().collect::<String>().into();
    let (here, less) = (service.folder.write("here", &dump), service.folder.write("less", less.to_string()));
    let [here, less, saved] = [&here, &less, &saved].map(|path| path.to_str().unwrap());
    for words in
        [&["compare", saved][..], &["compare", here], &["compare", saved, here], &["compare", less, here]]
    {
        let (code, text) = cpu(words);
        assert!(code == Some(0) && text.contains(" has all that the CPU of `"), "{words:?}: {text}");
    }
    for needed in [here, saved] {
        let (code, text) = cpu(&["compare", needed, less]);
        assert!(code == Some(2) && text.lines().any(|line| line.starts_with(lacking)), "{needed}: {text}");
        let (code, text) = cpu(&["compare", "--json", needed, less]);
        let told: Vec<String> = serde_json::from_str(&text).unwrap();
        assert!(code == Some(2) && told.iter().any(|one| one.starts_with(lacking)), "{needed}: {text}");
    }
    let none = service.folder.write("none", "neither");
    let open = service.folder.write("open", "{}");
    let foreign = service.folder.write("foreign", r#"{"cpuid": []}"#);
    for (path, expected) in [
        (&*none, "read the state of a machine"),
        (&*foreign, "unknown field `cpuid`"),
        (&*open, "it leaves bits as a host has them"),
        (Path::new("/nonexistent"), "`/nonexistent`: No such file"),
    ] {
        let (code, text) = cpu(&["compare", path.to_str().unwrap(), here]);
        assert!(code == Some(1) && text.contains(expected), "{text}");
    }
}

#[cfg(target_arch = "aarch64")]
mod of_aarch64 {
    use std::io::Write;

    use super::*;

    /// Two registers that a CPU of aarch64 has with a feature only, with the feature's bits and the number of KVM's capability
    /// (ZCR_EL1 with SVE, KVM_CAP_ARM_SVE; APIAKEYLO_EL1 with pointer authentication, KVM_CAP_ARM_PTRAUTH_ADDRESS).
    const FEATURES: [(&str, &str, u32); 2] =
        [("0b1xxxx", "0x603000000013c090", 170), ("0b11xxxxx", "0x603000000013c108", 171)];

    #[test]
    fn cpus_have_features_that_the_configuration_asks_for() {
        for (bitmap, register, capability) in FEATURES {
            let start = |features: Value, more: Value| {
                let service = Service::start(&[]);
                let mut body = json!({ "vcpu_features": features });
                body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
                let mut client = service.client();
                client.ok("PUT", "/cpu-config", &body.to_string());
                client.ok("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#);
                service.boot_source("echo end=idle");
                let started = client.request("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
                (service, started)
            };
            let features = json!([{ "index": 0, "bitmap": bitmap }]);
            let registers = json!({ "reg_modifiers": [{ "addr": register, "bitmap": "0b1" }] });
            let (_, refused) = start(json!([]), registers.clone());
            assert!(refused.fault().contains(&format!("change the register {register}")), "{}", refused.body);
            let (_, asked) = start(json!([]), json!({ "kvm_capabilities": [capability.to_string()] }));
            let (service, started) = start(features, registers);
            if asked.status() != "204" {
                let expected = "with other features than this host's KVM prefers (`vcpu_features`)";
                assert!(started.fault().contains(expected), "{}", started.body);
                continue;
            }
            assert_eq!(started.status(), "204", "{}", started.body);
            // The state of such a CPU is saved and restored whole.
            let mut client = service.client();
            client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
            let paths = ["state", "memory"].map(|name| service.folder.path(name));
            let body = json!({ "snapshot_path": paths[0], "mem_file_path": paths[1] });
            client.ok("PUT", "/snapshot/create", &body.to_string());
            let mut second = Service::start(&["--warm", "cpus=2,memory=64M"]);
            let backend = json!({ "backend_type": "File", "backend_path": paths[1] });
            let body = json!({ "snapshot_path": paths[0], "mem_backend": backend, "resume_vm": true });
            second.client().ok("PUT", "/snapshot/load", &body.to_string());
            second.process.expect("without `vcpu_features`");
            second.process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
            second.process.expect(" cases, 0 failed");
        }
    }
}
