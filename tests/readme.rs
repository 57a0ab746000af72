//! The README's examples of the control socket, as a newcomer types them.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::process::Command;

use common::{Folder, called};

/// The block of shell that contains `text`.
fn example(text: &str) -> String {
    let readme = include_str!("../README.md");
    let blocks = readme.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.into_iter().find(|block| block.contains(text)).unwrap().to_owned()
}

#[test]
fn curl_drives_a_guest_as_the_readme_says() {
    let folder = Folder::new();
    called("alula", &folder);
    // While the guest runs, also what the page says of `alula ctl` and of events.
    let more = "
alula ctl --api-sock alula.sock status
alula ctl --api-sock alula.sock pause
timeout 2 curl -sN --unix-socket alula.sock http://localhost/events
kill %1";
    // The guest speaks beside the others: what it says must not come between their words.
    let script = example("alula serve --api-sock")
        .replace("\nkill %1", more)
        .replace("< /dev/null &", "< /dev/null > guest &");
    let path = format!("{}:{}", folder.0.display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        .args(["-e", "-c", &script.replace("timeout 2 curl", "! timeout 2 curl")])
        .current_dir(&folder.0)
        .env("PATH", path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    for expected in [
        r#""state":"Paused""#,
        "anonymous-instance: running; 2 CPUs, 128 MiB of memory",
        "\npaused\n",
        r#"{"event":"started""#,
        r#"{"event":"resumed""#,
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(output.status.success() && !text.contains("fault_message"), "{text}");
}
