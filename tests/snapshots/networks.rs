//! Guests with a network of passt: each restore has a passt of its own, and the guest's driver hears of that.

use std::fs;
use std::net::TcpStream;
use std::process::Command;

use serde_json::{Value, json};

use super::template::Template;
use super::{GO_ON, PAUSE, fault};
use crate::common::ended::is_over;
use crate::common::network::{self, passts};
use crate::common::{Client, Folder, Process, Service, alula, await_child, wait_for};

/// Saves a guest that watches its link, over a passt with these options and behind this transport.
fn saved(folder: &Folder, user: &Value, extra: &[&str]) {
    let mut service = Service::start(extra);
    let mut client = service.client();
    let net = json!({ "iface_id": "lan", "user": user });
    client.ok("PUT", "/network-interfaces/lan", &net.to_string());
    service.boot_source("case=net-restored");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("has a link");
    client.ok("PATCH", "/vm", PAUSE);
    client.ok("PUT", "/snapshot/create", &json!({ "folder": folder.path("saved") }).to_string());
    let passts = passts(service.process.child.id());
    drop(service);
    // Its ports are free when it has ended.
    wait_for(|| passts.iter().all(|passt| is_over(*passt)));
}

#[test]
fn each_restore_has_a_passt_before_its_guest_and_another_link() {
    network::enter();
    network::add_uplink();
    for extra in [&[][..], &["--enable-pci"]] {
        let folder = Folder::new();
        saved(&folder, &json!({}), extra);
        let mut load = json!({ "folder": folder.path("saved") });
        let service = Service::start(&[]);
        let mut client = service.client();
        client.ok("PUT", "/snapshot/load", &load.to_string());
        assert_eq!(client.ok("GET", "/", "").json()["state"], "Paused");
        // The process is called otherwise until it runs its program.
        wait_for(|| passts(service.process.child.id()).len() == 1);
        client.ok("PATCH", "/vm", GO_ON);
        let ended = service.process.end();
        assert!(ended.code == Some(0) && ended.text.contains("down, and up again"), "{}", ended.text);
        // A network of another kind is none that the guest's driver knows.
        load["network_overrides"] = json!([{ "iface_id": "lan", "host_dev_name": "up0" }]);
        let service = Service::start(&[]);
        let refusal = "`network_overrides` of `lan`: `host_dev_name` and `user` exclude each other";
        fault(&mut service.client(), "/snapshot/load", &load.to_string(), refusal);
    }
}

#[test]
fn clones_of_a_template_have_a_passt_each_but_no_port_twice() {
    network::enter();
    network::add_uplink();
    let port = "127.0.0.1:8099";
    for publish in [None, Some(format!("{port}:80"))] {
        let folder = Folder::new();
        saved(&folder, &json!({ "publish": publish.as_slice() }), &[]);
        let mut command = Command::new(std::path::absolute(alula()).unwrap());
        command.args(["template", "saved", "--api-sock", "t.sock"]).current_dir(&folder.0);
        let process = Process::spawn(command);
        wait_for(|| folder.path("t.sock").exists());
        let mut template = Template { folder, process, clones: Vec::new() };
        let mut client = template.client();
        let order = |id: &str| {
            let (socket, console) = (format!("{id}.sock"), format!("{id}.console"));
            json!({ "id": id, "api_sock": socket, "serial": { "serial_out_path": console } }).to_string()
        };
        let mut clones = vec![("first", template.make(&mut client, &order("first")))];
        if let Some(publish) = publish {
            wait_for(|| TcpStream::connect(port).is_ok());
            let refusal = format!("publish `{publish}`: ");
            fault(&mut client, "/clones", &order("second"), &refusal);
            fault(&mut client, "/clones", &order("second"), "free those that it publishes");
        } else {
            clones.push(("second", template.make(&mut client, &order("second"))));
        }
        for (id, clone) in clones {
            wait_for(|| passts(clone).len() == 1);
            Client::connect(&template.path(&format!("{id}.sock"))).ok("PATCH", "/vm", GO_ON);
            let console = template.path(&format!("{id}.console"));
            assert_eq!(await_child(clone).0, Some(0), "{:?}", fs::read_to_string(&console));
            assert!(fs::read_to_string(console).unwrap().contains("down, and up again"));
        }
    }
}
