//! The costs of a process to its host, as Linux tells them (proc(5)). They are looked up only when somebody asks.

use std::fs;

use serde_json::{Map, Value, json};

/// The CPU time that each thread of a process has used, in microseconds, by the threads' names; threads of one name
/// together. The first thread is called `main`.
pub fn cpu_us(process: Option<u32>) -> Map<String, Value> {
    let mut times = Map::new();
    let own = process.unwrap_or_else(std::process::id).to_string();
    for task in fs::read_dir(format!("/proc/{}/task", place(process))).into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let name = match task.file_name() == *own {
            true => "main".to_owned(),
            false => read("comm").trim().to_owned(),
        };
        // Nanoseconds on a CPU, then waiting for one, then how often. A thread may just have ended.
        let schedstat = read("schedstat");
        let Some(nanos) = schedstat.split(' ').next().and_then(|nanos| nanos.parse::<u64>().ok()) else {
            continue;
        };
        let before = times.get(&name).and_then(Value::as_u64).unwrap_or(0);
        times.insert(name, (before + nanos / 1000).into());
    }
    times
}

/// The host's memory that a process and its guest have, in bytes; zeros where the kernel does not tell, as in a jail, which
/// has no /proc. Guest memory that was touched is part of `anonymous_bytes`.
pub fn memory(process: Option<u32>) -> Value {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", place(process))).unwrap_or_default();
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.unwrap_or(0) << 10
    };
    json!({
        "anonymous_bytes": bytes("Anonymous"),
        "resident_bytes": bytes("Rss"),
        "proportional_bytes": bytes("Pss"),
    })
}

/// The name of a process in /proc; None: this one.
fn place(process: Option<u32>) -> String {
    process.map_or_else(|| "self".to_owned(), |process| process.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_apart_by_name_and_memory_is_counted() {
        let block = vec![1u8; 8 << 20];
        let worker = std::thread::Builder::new().name("worker".to_owned());
        let (sender, receiver) = std::sync::mpsc::channel();
        let worker = worker.spawn(move || {
            let begun = std::time::Instant::now();
            while begun.elapsed().as_millis() < 20 {
                std::hint::spin_loop();
            }
            sender.send(()).unwrap();
            std::thread::park();
        });
        receiver.recv().unwrap();
        let times = cpu_us(None);
        assert_eq!(cpu_us(Some(std::process::id())).keys().max(), times.keys().max());
        assert!(times["worker"].as_u64().unwrap() > 0 && times.contains_key("main"), "{times:?}");
        // While other cases map memory, some kernels leave areas out (smaps_rollup looks for its place anew whenever
        // somebody waits for the lock of the address space).
        let counted = (0..100).map(|_| memory(Some(std::process::id())));
        let whole = counted.into_iter().find(|memory| memory["anonymous_bytes"].as_u64().unwrap() >= 8 << 20);
        let memory = whole.expect("8 MiB of this process are nowhere");
        assert!(memory["resident_bytes"].as_u64() >= memory["proportional_bytes"].as_u64(), "{memory}");
        let worker = worker.unwrap();
        worker.thread().unpark();
        worker.join().unwrap();
        assert_eq!(block[0], 1);
    }
}
