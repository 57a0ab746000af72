//! The balloon, as clients ask for it.

use super::*;

const BALLOON: &str = r#"{"amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 1,
    "free_page_hinting": true}"#;
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const AFTER: &str = "The requested operation is not supported after starting the microVM.";
/// The requests for a balloon in use: for what is told of it, and for changes.
const IN_USE: [(&str, &str, &str); 6] = [
    ("GET", "/balloon/statistics", ""),
    ("GET", "/balloon/hinting/status", ""),
    ("PATCH", "/balloon", r#"{"amount_mib": 8}"#),
    ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 2}"#),
    ("PATCH", "/balloon/hinting/start", ""),
    ("PATCH", "/balloon/hinting/stop", "{}"),
];

#[test]
fn a_balloon_is_told_back_and_kept_within_the_memory() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let fault = client.request("GET", "/balloon", "").fault();
    assert_eq!(fault, "Balloon config error: No balloon device found.");
    for (method, path, body) in IN_USE {
        assert_eq!(client.request(method, path, body).fault(), BEFORE, "{method} {path}");
    }
    client.ok("PUT", "/balloon", BALLOON);
    let told = json!({
        "amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true,
        "free_page_reporting": false,
    });
    assert_eq!(client.ok("GET", "/balloon", "").json(), told);
    assert_eq!(client.ok("GET", "/vm/config", "").json()["balloon"], told);
    let larger = r#"{"amount_mib": 129, "deflate_on_oom": false}"#;
    let fault = client.request("PUT", "/balloon", larger).fault();
    let expected =
        "Balloon config error: Amount of pages requested is too large. (`amount_mib`: 129 of a guest";
    assert!(fault.starts_with(expected), "{fault}");
    let fault = client.request("PATCH", "/machine-config", r#"{"mem_size_mib": 15}"#).fault();
    let expected = "Machine config error: The memory size (MiB) is smaller than the previously set balloon device \
                    target size. (`mem_size_mib`, --memory: 15 MiB, `amount_mib`: 16 MiB)";
    assert_eq!(fault, expected);
    client.ok("PATCH", "/machine-config", r#"{"mem_size_mib": 16}"#);
    // The refused requests have changed nothing; another balloon replaces this one.
    assert_eq!(client.ok("GET", "/balloon", "").json(), told);
    client.ok("PUT", "/balloon", r#"{"amount_mib": 0, "deflate_on_oom": false}"#);
    assert_eq!(client.ok("GET", "/balloon", "").json()["stats_polling_interval_s"], 0);
}

#[test]
fn a_balloon_that_nobody_drives_says_so() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", "/balloon", BALLOON);
    // The firmware's case drives the balloon and then resets it.
    service.boot_source("case=balloon end=idle");
    client.ok("PUT", "/actions", START);
    service.process.expect("1 cases, 0 failed");
    let told = client.ok("GET", "/balloon/statistics", "").json();
    let nothing = json!({ "target_pages": 4096, "actual_pages": 0, "target_mib": 16, "actual_mib": 0 });
    assert_eq!(told, nothing);
    let status = client.ok("GET", "/balloon/hinting/status", "").json();
    assert_eq!(status, json!({ "host_cmd": 0, "guest_cmd": null }));
    for (method, path, body) in IN_USE.into_iter().filter(|(method, ..)| *method == "PATCH") {
        let fault = client.request(method, path, body).fault();
        assert!(fault.starts_with("Balloon update error: Device not activated yet."), "{path}: {fault}");
    }
    let larger = client.request("PATCH", "/balloon", r#"{"amount_mib": 129}"#).fault();
    assert!(larger.starts_with("Balloon update error: Amount of pages requested is too large."), "{larger}");
    let never = client.request("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 0}"#).fault();
    assert_eq!(never, "Balloon update error: Statistics cannot be enabled/disabled after activation.");
    assert_eq!(client.request("PUT", "/balloon", BALLOON).fault(), AFTER);
    // The refused requests have not changed the balloon.
    assert_eq!(client.ok("GET", "/balloon", "").json()["amount_mib"], 16);
    let counted = client.ok("GET", "/metrics", "").json()["balloon"].clone();
    assert!(counted["inflate_count"].as_u64().unwrap() > 0 && counted["event_fails"] == 0, "{counted}");
}

#[test]
fn what_a_balloon_was_not_made_for_is_refused() {
    let service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", "/balloon", r#"{"amount_mib": 0, "deflate_on_oom": false}"#);
    service.boot_source("case=serial end=idle");
    client.ok("PUT", "/actions", START);
    let fault = client.request("GET", "/balloon/statistics", "").fault();
    assert_eq!(fault, "Balloon update error: Received stats query when stats are disabled.");
    for (method, path) in
        [("GET", "/hinting/status"), ("PATCH", "/hinting/start"), ("PATCH", "/hinting/stop")]
    {
        let fault = client.request(method, &format!("/balloon{path}"), "").fault();
        assert_eq!(fault, "Balloon update error: Attempting to use hinting when not enabled", "{path}");
    }
}
