//! Memory that a guest gives back: by what it reports as free, and by the balloon.

use super::*;

/// The guest's memory, and what the guest is to do without once it is asked, in MiB: not all that it can spare.
const MEMORY: u64 = 256;
const WITHOUT: u64 = 128;

/// The most time from when the guest has freed memory to when the host has nearly all of it.
const REPORT_TIME: Duration = Duration::from_secs(5);

/// Configures the memory and a balloon of a machine that is not started yet.
pub fn add_balloon(client: &mut common::Client, reports: bool) {
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY }).to_string();
    client.ok("PUT", "/machine-config", &machine);
    let balloon = json!({
        "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_reporting": reports,
    });
    client.ok("PUT", "/balloon", &balloon.to_string());
}

/// The memory that the process has of its own, in MiB.
pub fn own(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    line_of(&status, "RssAnon:").trim_end_matches(" kB").trim().parse::<u64>().unwrap() >> 10
}

/// The guest, which does `memory-give-back`, fills its memory and frees it; then it is asked to do without half of
/// it, and takes some back.
pub fn comes_and_goes(service: &mut Service, reports: bool) {
    let process = service.process.child.id();
    let mut client = service.client();
    let mut statistic = |name: &str| client.ok("GET", "/balloon/statistics", "").json()[name].as_u64();
    let said = service.process.expect(" MiB filled");
    let filled: u64 = line_of(&said, "memory: ").trim_end_matches(" MiB filled").parse().unwrap();
    let full = own(process);
    assert!(filled >= MEMORY / 3 && full >= filled, "{full} MiB, {filled} of them filled");
    let go_on = |service: &mut Service| service.process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    go_on(service);
    service.process.expect("memory: freed");
    if reports {
        let begin = std::time::Instant::now();
        wait_for(|| own(process) <= full - filled * 9 / 10);
        let time = begin.elapsed();
        println!("memory: 9 of 10 of {filled} MiB that were freed are the host's after {time:?}");
        // Linux waits 2 s with its report (mm/page_reporting.c), by its own clock. An emulated machine is slow.
        assert!(time <= REPORT_TIME || std::env::var_os("ALULA_RIG").is_some(), "{time:?}");
    }
    wait_for(|| statistic("free_memory").is_some_and(|free| free >> 20 >= filled));
    assert!(statistic("total_memory").is_some_and(|total| (MEMORY / 2..=MEMORY).contains(&(total >> 20))));
    assert!(reports || own(process) >= full - 8, "it gave memory back that nobody has asked for");
    service.client().ok("PATCH", "/balloon", &json!({ "amount_mib": WITHOUT }).to_string());
    wait_for(|| statistic("actual_mib") == Some(WITHOUT));
    // The guest has never touched much of the memory that it gives.
    let left = own(process);
    assert!(left <= full - WITHOUT / 8, "{left} MiB of {full}");
    // The guest takes more than it has left, and need not end a program for that.
    go_on(service);
    service.process.expect("memory: 100 MiB taken");
    wait_for(|| statistic("actual_mib").is_some_and(|actual| actual < WITHOUT - 8));
    let counted = service.client().ok("GET", "/metrics", "").json()["balloon"].clone();
    let reported = reports.then_some("free_page_report_freed");
    for name in ["inflate_count", "deflate_count", "stats_updates_count"].into_iter().chain(reported) {
        assert!(counted[name].as_u64().unwrap() > 0, "{name}: {counted}");
    }
    for name in ["event_fails", "free_page_report_fails", "stats_update_fails"] {
        assert_eq!(counted[name], 0, "{counted}");
    }
    go_on(service);
}

/// The guest, which does `memory-hotplug`, has files in memory that is plugged, and gives all of it back.
pub fn is_plugged_and_unplugged(service: &mut Service) {
    const SIZE: u64 = 256;
    let process = service.process.child.id();
    let mut client = service.client();
    service.process.expect("memory: driven");
    let request = |client: &mut common::Client, mib: u64| {
        client.ok("PATCH", "/hotplug/memory", &json!({ "requested_size_mib": mib }).to_string());
        wait_for(|| client.ok("GET", "/hotplug/memory", "").json()["plugged_size_mib"] == mib);
    };
    request(&mut client, SIZE);
    let said = service.process.expect(" sums");
    let files = 64 << 20;
    assert!(said.contains(&format!("memory: plugged, {files} bytes in files, 1 sums")), "{said}");
    let full = own(process);
    service.process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    service.process.expect("memory: files gone");
    // A guest that does not report what is free keeps it, until it is to unplug it.
    assert!(own(process) >= full - 8, "it gave memory back that nobody has asked for");
    request(&mut client, 0);
    let left = own(process);
    assert!(left <= full - (files >> 20), "{left} MiB of {full}");
    // The guest says every second how it is off.
    let total = |client: &mut common::Client| {
        client.ok("GET", "/balloon/statistics", "").json()["total_memory"].as_u64()
    };
    wait_for(|| total(&mut client).is_some_and(|total| total >> 20 <= MEMORY));
    let counted = client.ok("GET", "/metrics", "").json()["memory_hotplug"].clone();
    assert_eq!((&counted["plug_bytes"], &counted["unplug_discard_fails"]), (&json!(SIZE << 20), &json!(0)));
    for fails in ["event_fails", "queue_event_fails", "plug_fails", "unplug_fails"] {
        assert_eq!(counted[fails], 0, "{counted}");
    }
    service.process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
}
