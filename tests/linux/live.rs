//! A program of a Linux guest that works while the guest is saved: what it has written is true in the clone, and in the
//! guest that went on.

use super::*;

/// Writes pieces to a disk and to memory, and looks at earlier ones, until `/tmp/stop` is there. No place of the disk is
/// written twice with other content, since a clone finds there what its original has written after the save.
const WRITER: &str = r#"
cd /tmp
n=0
while [ $n -lt 4000 ] && [ ! -e stop ]; do
    busybox yes "piece $n" | busybox head -c 65536 >piece
    busybox dd if=piece of=/dev/vdb bs=64k seek=$n oflag=direct conv=notrunc 2>/dev/null
    echo "$(busybox md5sum <piece) $n" >>on-disk
    kept=kept$((n % 8))
    busybox dd if=/dev/urandom of=$kept bs=64k count=4 2>/dev/null
    busybox md5sum $kept >$kept.sum
    n=$((n + 1))
    look=$((n / 2))
    busybox dd if=/dev/vdb of=read bs=64k skip=$look count=1 iflag=direct 2>/dev/null
    busybox grep -qF "$(busybox md5sum <read) $look" on-disk || echo "piece $look" >>wrong
    busybox cat kept?.sum | busybox md5sum -c >/dev/null 2>&1 || echo "memory in round $n" >>wrong
    echo $n >rounds.new
    busybox mv rounds.new rounds
done
"#;

/// Has a script run in the guest, and returns what it says.
pub fn has_run(vsock: &str, script: &str) -> String {
    let mut command = Command::new(common::alula());
    command.args(["exec", "--vsock", vsock, "busybox", "sh", "-c", script]);
    shared::said(command.stdin(Stdio::null()).output().unwrap())
}

/// Starts the program in the guest, in a session of its own: it goes on in clones.
pub fn start(vsock: &str) {
    has_run(vsock, &format!("busybox setsid busybox sh -c '{WRITER}' </dev/null >/dev/null 2>&1 &"));
}

/// Waits until the program has done more, and nothing that it looked at was wrong.
pub fn works(vsock: &str) {
    let look = || {
        let said = has_run(vsock, "busybox cat /tmp/rounds /tmp/wrong 2>/dev/null; true");
        let (rounds, wrong) = said.split_once('\n').unwrap_or_default();
        assert_eq!(wrong, "", "what the guest has written is not so");
        rounds.parse::<u32>().unwrap_or(0)
    };
    let before = look();
    wait_for(|| look() > before);
}
