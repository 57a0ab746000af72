//! A guest that grows while it serves, and becomes as small again, by the commands of docs/elastic.md.

use super::{shared, *};

/// The page's part that this is about.
const SECTION: &str = "## A guest that grows while it serves\n";

/// An event, as a descriptor is told of.
const EVENT: &str = "anon_inode:[eventfd]";

/// The blocks of shell of that part: the guest's start, how it grows, what uses that, how it shrinks.
fn blocks() -> [&'static str; 4] {
    let page = include_str!("../../docs/elastic.md");
    let section = page.split_once(SECTION).unwrap().1.split("\n## ").next().unwrap();
    let blocks = section.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.collect::<Vec<_>>().try_into().unwrap()
}

/// How the guest is started.
pub fn start() -> &'static str {
    blocks()[0]
}

/// Somebody who asks the guest for its page, again and again.
struct Visitor {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<usize>>,
}

impl Visitor {
    fn comes() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        let visits = move || {
            let mut count = 0;
            while !is_over.load(Ordering::Relaxed) {
                let mut stream = std::net::TcpStream::connect("172.16.0.2:80").unwrap();
                stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
                stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert!(answer.contains(" 200 OK\r\n") && answer.ends_with("\r\n\r\na page\n"), "{answer}");
                count += 1;
                // The guest, whose machine is emulated, has something else to do, too.
                std::thread::sleep(Duration::from_millis(50));
            }
            count
        };
        Self { over, thread: Some(std::thread::spawn(visits)) }
    }

    /// How often the page was there, which it was each time.
    fn leaves(mut self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// The threads of the process by name, but for those that the kernel keeps for io_uring, and its descriptors by what they
/// are, in order.
fn has(process: u32) -> Vec<String> {
    let folder = |name| std::fs::read_dir(format!("/proc/{process}/{name}")).unwrap().flatten();
    // One may be gone by the time that it is looked at.
    let threads = folder("task").filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    let files = folder("fd").filter_map(|file| std::fs::read_link(file.path()).ok());
    let files = files.map(|file| file.display().to_string());
    let mut all: Vec<_> = threads.filter(|name| !name.starts_with("iou-")).chain(files).collect();
    // Sockets are told by their numbers.
    all.iter_mut().filter(|name| name.starts_with("socket:")).for_each(|name| name.truncate(6));
    all.sort();
    all
}

/// The threads and descriptors that the process had not `before`, once they are as expected, or stay otherwise. Those that
/// the first interface has for frames in batches are left out: they are made with the first batch, whenever there is one.
fn more_than(before: &[String], process: u32, expected: &[&str]) -> Vec<String> {
    let mut more = Vec::new();
    let begin = std::time::Instant::now();
    while begin.elapsed() < common::PATIENCE {
        more = has(process);
        let mut leave_out = |name: &str| {
            let found = more.iter().position(|other| other == name);
            found.map(|at| more.remove(at)).is_some()
        };
        before.iter().for_each(|name| _ = leave_out(name));
        if leave_out("anon_inode:[io_uring]") {
            leave_out(EVENT);
        }
        if more == expected {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    more
}

/// The guest waits until its CPUs are so many, and it has a disk and an interface more, or not.
fn until(guest: &shared::Guest, cpus: u16, has_more: bool) {
    let not = if has_more { "" } else { "!" };
    guest.shell(&format!(
        "until [ $(nproc) = {cpus} ]; do usleep 10000; done
        until {not} grep -qsx data /sys/block/vd*/serial; do usleep 10000; done
        until {not} [ -e /sys/class/net/eth1 ]; do usleep 10000; done"
    ));
}

/// The guest's memory, as it tells it, in MiB.
fn memory_of(guest: &shared::Guest) -> u64 {
    let told = guest.shell("grep MemTotal /proc/meminfo");
    told.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

pub fn grows_and_shrinks(guest: &shared::Guest) {
    let [start, grow, using, shrink] = blocks();
    let mut client = guest.client();
    if guest.queues == 1 || !X86_64 {
        return;
    }
    assert!(start.contains("--memory 128M ") && start.contains("--cpus 1 "));
    network::add_tap("tap1", "172.17.0.1/24");
    let config = client.ok("GET", "/vm/config", "").json();
    let small = memory_of(guest);
    assert!(small <= 128, "{small}");
    let visitor = Visitor::comes();
    let process = guest.process.child.id();
    let (before, little) = (has(process), memory::own(process));
    let mut plugged = |mib: u64| {
        wait_for(|| client.ok("GET", "/hotplug/memory", "").json()["plugged_size_mib"] == mib);
    };

    guest.host(grow);
    plugged(896);
    until(guest, 4, true);
    guest.host(using);
    assert!(memory_of(guest) >= small + 896 - 16);
    let worked = guest.shell("for mask in 1 2 4 8; do taskset $mask cut -d ' ' -f 39 /proc/self/stat; done");
    assert_eq!(worked, "0\n1\n2\n3\n");
    // More than the guest had; and what was written to the disk is read from it, not from what it remembers.
    guest.shell(
        "mkdir /more && mount -t tmpfs -o size=50% none /more
        dd if=/dev/zero of=/more/file bs=1M count=160 2>/dev/null
        disk=$(grep ' /mnt ' /proc/mounts | cut -d ' ' -f 1)
        umount /mnt && mount $disk /mnt && cmp /bin/busybox /mnt/busybox",
    );
    let much = memory::own(process);
    assert!(much >= little + 150, "{little} MiB, then {much}");
    guest.shell("umount /more");

    guest.host(shrink);
    plugged(0);
    until(guest, 1, false);
    wait_for(|| client.ok("GET", "/vm/config", "").json() == config);
    assert!(memory_of(guest) <= small);
    println!("{} visits", visitor.leaves());
    // A CPU that has gone keeps its thread. The event is that of jobs, which had none before.
    let expected = [EVENT, "vcpu1\n", "vcpu2\n", "vcpu3\n"];
    assert_eq!(more_than(&before, process, &expected), expected);
    let left = memory::own(process);
    println!("the process's own memory: {little} MiB, {much}, {left}");
    assert!(left <= little + 64, "{little} MiB, {much}, then {left}");
    let link = common::output("ip", &["link", "show", "tap1"]);
    assert!(String::from_utf8_lossy(&link.stdout).contains("NO-CARRIER"), "{link:?}");
    common::output("ip", &["link", "del", "tap1"]);
    std::fs::remove_file(guest.folder.path("data.img")).unwrap();
    // The cases that come after this one have as much as elsewhere.
    client.ok("PATCH", "/machine-config", r#"{"vcpu_count": 2}"#);
    client.ok("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 128}"#);
    guest.shell("until [ $(nproc) = 2 ]; do usleep 10000; done");
    wait_for(|| client.ok("GET", "/hotplug/memory", "").json()["plugged_size_mib"] == 128);
}
