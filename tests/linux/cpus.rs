//! CPUs that come and go, aarch64: Linux knows them from its start, and the agent switches on and off those that it is given
//! and is to let go.

use super::clones::User;
use super::*;

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn the_agent_switches_cpus_on_and_off() {
    let user = User { folder: Folder::new() };
    let root = asset("root.ext4");
    let mut guest = Process::spawn({
        let words = ["run", "--rootfs", root.to_str().unwrap(), "--vsock", "v.sock", "--id", "web"];
        let script = "busybox --install -s /bin; echo up; while :; do sleep 1000; done";
        let more = ["--cpus", "1", "--max-cpus", "3", "--", "busybox", "sh", "-c", script];
        user.command(&[&words[..], &more].concat())
    });
    if !hold_back::can_hold_back() {
        let ended = guest.end();
        assert!(
            ended.code == Some(125) && ended.text.contains("SMCCC filter (since Linux 6.4)"),
            "{ended:?}"
        );
        return;
    }
    guest.expect("up\n");
    user.shell("web", "[ $(nproc) = 1 ] && dmesg -c >/dev/null");
    for _ in 0..2 {
        user.has_cpus("web", 3);
        let script = "for mask in 1 2 4; do taskset $mask cut -d ' ' -f 39 /proc/self/stat; done";
        assert_eq!(user.shell("web", script), "0\n1\n2\n");
        user.has_cpus("web", 1);
        wait_for(|| user.says(&["ctl", "web", "cpus"]).trim() == "max_vcpus: 3\nvcpu_count: 1");
    }
    let refused = "echo 1 >/sys/devices/system/cpu/cpu1/online || echo refused";
    assert_eq!(user.shell("web", refused), "refused\n");
    let complaints = user.shell("web", "dmesg | grep -iE 'stuck|not responding|BUG|WARNING' || :");
    assert_eq!(complaints, "");
}
