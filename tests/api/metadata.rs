//! The metadata service as the API and the command line set it up.

use super::*;
#[test]
fn metadata_is_put_changed_and_limited() {
    let folder = common::Folder::new();
    let file = folder.write("metadata.json", r#"{ "a": { "b": 1 } }"#);
    let service = Service::start(&["--metadata", file.to_str().unwrap(), "--mmds-size-limit", "60"]);
    let mut client = service.client();
    let get = || service.client().ok("GET", "/mmds", "").json();
    assert_eq!(get(), json!({ "a": { "b": 1 } }));
    client.ok("PATCH", "/mmds", r#"{"a": {"b": null, "c": "x"}, "d": [1]}"#);
    assert_eq!(get(), json!({ "a": { "c": "x" }, "d": [1] }));
    client.ok("PUT", "/mmds", r#"{"a": 1, "a": 2}"#);
    assert_eq!(get(), json!({ "a": 2 }), "the last one wins");
    // Neither what is no object nor what is too large changes anything.
    for body in ["[]", "7", "null", r#""x""#, "{"] {
        for method in ["PUT", "PATCH"] {
            let fault = client.request(method, "/mmds", body).fault();
            assert!(fault.starts_with("An error occurred when deserializing the json body"), "{fault}");
        }
    }
    for method in ["PUT", "PATCH"] {
        let large = json!({ "large": "x".repeat(60) }).to_string();
        let response = client.request(method, "/mmds", &large);
        let fault = response.json()["fault_message"].as_str().unwrap().to_owned();
        assert_eq!(response.status(), "413");
        assert!(fault.starts_with("MMDS limit exceeded error: The MMDS data store has "), "{fault}");
    }
    assert_eq!(get(), json!({ "a": 2 }));
    let metrics = client.ok("GET", "/metrics", "").json();
    assert_eq!(metrics["put_api_requests"]["mmds_fails"], 6);
    assert_eq!(metrics["mmds"]["connections_created"], 0);
}

#[test]
fn the_metadata_service_answers_on_interfaces_that_exist() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let put = |client: &mut Client, body: &str| client.request("PUT", "/mmds/config", body);
    let fault = client.request("PATCH", "/mmds", "{}").fault();
    assert_eq!(fault, "MMDS error: The MMDS data store is not initialized.");
    assert_eq!(client.ok("GET", "/mmds", "").json(), json!({}));
    let error = "MMMDS config error: The list of network interface IDs";
    let fault = put(&mut client, r#"{"network_interfaces": ["a"]}"#).fault();
    assert!(fault.starts_with(&format!("{error} provided contains at least one ID")), "{fault}");
    client.ok("PUT", "/network-interfaces/a", r#"{"iface_id": "a", "user": {}}"#);
    let fault = put(&mut client, r#"{"network_interfaces": []}"#).fault();
    assert!(fault.starts_with(&format!("{error} that allow forwarding MMDS requests is empty")), "{fault}");
    let fault = put(&mut client, r#"{"network_interfaces": ["a"], "ipv4_address": "8.8.8.8"}"#).fault();
    assert!(fault.contains("The MMDS IPv4 address is not link local"), "{fault}");
    assert_eq!(client.ok("GET", "/vm/config", "").json()["mmds-config"], json!(null));
    let v1 = put(&mut client, r#"{"network_interfaces": ["a"]}"#);
    assert!(v1.status() == "204" && v1.head.contains("\r\nDeprecation: true"), "{v1:?}");
    let v2 = put(&mut client, r#"{"network_interfaces": ["a"], "version": "V2"}"#);
    assert!(v2.status() == "204" && !v2.head.contains("Deprecation"), "{v2:?}");
    let expected = json!({
        "version": "V2", "network_interfaces": ["a"], "ipv4_address": "169.254.169.254", "imds_compat": false
    });
    assert_eq!(client.ok("GET", "/vm/config", "").json()["mmds-config"], expected);
    drop(service);

    // After the start, of a microVM without the service: nobody will ask.
    let service = Service::running("hello");
    let mut client = service.client();
    for method in ["GET", "PUT", "PATCH"] {
        let fault = client.request(method, "/mmds", if method == "GET" { "" } else { "{}" }).fault();
        assert_eq!(fault, "MMDS error: The MMDS data store is not initialized.");
    }
    let fault = put(&mut client, r#"{"network_interfaces": ["a"]}"#).fault();
    assert_eq!(fault, "The requested operation is not supported after starting the microVM.");
}

#[test]
fn metadata_files_that_make_no_sense_are_refused() {
    let folder = common::Folder::new();
    let kernel = folder.firmware();
    let (kernel, long) = (kernel.to_str().unwrap(), json!({ "a": "x".repeat(51_200) }).to_string());
    for (text, expected) in [
        ("[]", "an object, found a list"),
        ("{", "the text ends within an object"),
        (&long, "may have 51200"),
    ] {
        let file = folder.write("metadata.json", text);
        let ended = run(["run", kernel, "--net", "user", "--metadata", file.to_str().unwrap()]);
        assert!(ended.code == Some(125) && ended.text.contains(expected), "{text}: {}", ended.text);
        assert!(ended.text.contains("read metadata `"), "{}", ended.text);
    }
    let file = folder.write("metadata.json", "{}");
    let ended = run(["run", kernel, "--metadata", file.to_str().unwrap()]);
    assert!(ended.text.contains("there is none: add --net"), "{}", ended.text);
    let boot = format!(r#""boot-source": {{"kernel_image_path": "{kernel}"}}"#);
    let config =
        folder.write("vm.json", format!(r#"{{{boot}, "mmds-config": {{"network_interfaces": ["a"]}}}}"#));
    let ended = run(["check", config.to_str().unwrap()]);
    assert!(ended.text.contains("`mmds-config`: The list of network interface IDs"), "{}", ended.text);
}
