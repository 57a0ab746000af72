//! Damaged images, and processes that are killed while they write.

use super::*;

/// The most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn two_hundred_damaged_images_are_refused_or_read_and_nothing_worse() {
    let folder = Folder::new();
    let mut sound = chain(&folder, &[]);
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    scribble(&mut disk, &mut sound, 8);
    disk.end();
    let image = std::fs::read(folder.path("disk")).unwrap();
    let mut random = 1_u64;
    let mut pick = |below: usize| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) as usize % below
    };
    let before = peak();
    let (mut works, mut refused) = (0, 0);
    for round in 0..200 {
        let mut damaged = image.clone();
        // The header, then the tables: L1, refcounts and L2 are within the first clusters.
        let reach = if round % 2 == 0 { 256 } else { damaged.len() };
        for _ in 0..1 + pick(4) {
            let at = match pick(3) {
                0 => pick(reach),
                1 => pick(reach.min(112)) & !7,
                _ => pick(reach / CLUSTER + 1) * CLUSTER + pick(64),
            };
            let length = 1 + pick(8);
            let value = [0, 0xff, 0x7f, 0x80, 1, pick(256) as u8][pick(6)];
            let at = at.min(image.len() - 1);
            damaged[at..(at + length).min(image.len())].fill(value);
        }
        if pick(10) == 0 {
            damaged.truncate(pick(image.len()));
        }
        folder.write("damaged", &damaged);
        match Disk::new(config(&folder.path("damaged"), json!({}))) {
            Ok(mut disk) => {
                works += 1;
                for _ in 0..20 {
                    let sector = pick(SIZE / 512) as u64;
                    // Whatever comes: the guest gets an answer.
                    let _ = disk.read(sector, 4096);
                    let _ = disk.write(sector, &[1; 4096]);
                    let _ = disk.ranges(DISCARD, &[(sector, 256, 0)]);
                }
                let _ = disk.flush();
                assert!(!disk.is_broken());
            }
            Err(error) => {
                refused += 1;
                assert!(error.contains("damaged`: "), "{error}");
            }
        }
    }
    println!("{works} could be used, {refused} were refused");
    assert!(works > 20 && refused > 20);
    let grown = peak() - before;
    assert!(grown < 100 << 20, "{} MiB more were needed", grown >> 20);
}

/// The environment variable by which a test tells its own program, started again, which image to write to.
const VICTIM: &str = "ALULA_TEST_VICTIM";
/// How often the process is killed, if that is told.
const KILLS: &str = "ALULA_TEST_KILLS";
const QUEUES: usize = 3;
/// Sectors of a block, each of which is written at once; a queue has those whose number it is modulo 3.
const BLOCK: usize = 8;

/// What the `number`th round of a victim does with a block, if anything: bytes of that value, or zeros.
fn deed(seed: u64, round: u64, block: usize) -> Option<(u32, u8)> {
    let hash = (seed << 40 ^ round << 20 ^ block as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    match hash % 64 {
        0..8 => Some((OUT, 1 + (hash >> 8) as u8 % 250)),
        8 => Some((DISCARD, 0)),
        9 => Some((WRITE_ZEROES, 0)),
        _ => None,
    }
}

/// Not a test, but the process that is killed: writes and flushes, and tells on its output what it did.
#[test]
fn a_victim_writes_until_it_is_killed() {
    let Ok(victim) = std::env::var(VICTIM) else { return };
    let (seed, path) = victim.split_once(':').unwrap();
    let seed = seed.parse().unwrap();
    let more = json!({ "num_queues": QUEUES, "threads": QUEUES });
    let mut disk = Disk::new(config(Path::new(path), more)).unwrap();
    let can_discard = disk.features() >> 13 & 1 == 1;
    for round in 0.. {
        eprintln!("begun {round}");
        let mut in_flight = [0; QUEUES];
        for block in 0..SIZE / 512 / BLOCK {
            let Some((kind, value)) = deed(seed, round, block).filter(|deed| deed.0 == OUT || can_discard)
            else {
                continue;
            };
            let (queue, sector) = (block % QUEUES, (block * BLOCK) as u64);
            let slot = in_flight[queue];
            let data = match kind {
                OUT => vec![value; BLOCK * 512],
                _ => [&sector.to_le_bytes()[..], &(BLOCK as u32).to_le_bytes(), &[0; 4]].concat(),
            };
            disk.set_data(queue, slot, &data);
            disk.put(queue, slot, kind, sector, data.len());
            in_flight[queue] += 1;
        }
        (0..QUEUES).for_each(|queue| disk.kick(queue));
        for (queue, in_flight) in in_flight.into_iter().enumerate() {
            (0..in_flight).for_each(|_| assert_eq!(disk.wait(queue).1, 1));
        }
        assert_eq!(disk.flush(), Ok(()));
        eprintln!("flushed {round}");
    }
}

#[test]
fn an_image_whose_process_is_killed_has_all_that_was_flushed() {
    use std::io::{BufRead, BufReader};
    let kills = std::env::var(KILLS).map_or(20, |kills| kills.parse().unwrap());
    for seed in 0..kills {
        let folder = Folder::new();
        let options =
            ["cluster_size=4k", "compat=0.10", "lazy_refcounts=on", "cluster_size=512,refcount_bits=64"];
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-o", options[seed as usize % 4], "disk", "4M"]);
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "damage::a_victim_writes_until_it_is_killed", "--nocapture"])
            .env(VICTIM, format!("{seed}:{}", folder.path("disk").display()))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The victim is killed some lines later, in the middle of something.
        let mut lines = BufReader::new(victim.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut told: Vec<String> = lines.by_ref().take(2 + seed as usize % 5).collect();
        std::thread::sleep(std::time::Duration::from_micros(seed * 7919 % 5000));
        victim.kill().unwrap();
        victim.wait().unwrap();
        told.extend(lines);
        let count = |word: &str| told.iter().filter(|line| line.starts_with(word)).count() as u64;
        let (begun, flushed) = (count("begun "), count("flushed "));
        assert!(flushed > 0 || begun == 1, "{told:?}");
        // Without a version that knows zeros, nothing is given back; of large clusters, no part.
        let does = move |kind| kind == OUT || seed % 4 != 1 && (kind != DISCARD || seed % 4 != 2);
        let deeds = |block, rounds: std::ops::Range<u64>| {
            let of = move |round| deed(seed, round, block).filter(|deed| does(deed.0));
            rounds.filter_map(of).map(|(_, value)| value).collect::<Vec<u8>>()
        };
        // 1: it could not look, as while a process that another test has just started holds a lock of its parent.
        let mut code = None;
        common::wait_for(|| {
            let mut check = Command::new("qemu-img");
            code = check.args(["check", "-q", "disk"]).current_dir(&folder.0).status().unwrap().code();
            code != Some(1)
        });
        // 3: clusters that nothing uses.
        assert!(matches!(code, Some(0 | 3)), "{seed}: {code:?}");
        let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
        let found = content(&mut disk);
        for (block, bytes) in found.chunks(BLOCK * 512).enumerate() {
            let mut allowed = deeds(block, flushed..begun);
            allowed.push(deeds(block, 0..flushed).last().copied().unwrap_or(0));
            for sector in bytes.chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "{seed}: block {block} is mixed");
                assert!(
                    allowed.contains(&sector[0]),
                    "{seed}: block {block} is {}, not of {allowed:?}",
                    sector[0]
                );
            }
        }
        assert_eq!(disk.write(0, &found[..512]), Ok(()));
        disk.end();
        let raw = folder.write("expected", &found);
        qemu_img(&folder, &["compare", "-f", "qcow2", "-F", "raw", "disk", raw.to_str().unwrap()]);
    }
}

#[test]
fn a_file_longer_than_its_counts_can_tell_of_is_written() {
    let folder = Folder::new();
    // A block has the counts of 64 clusters of 512 bytes, and the table has the places of 64 blocks: 2 MiB.
    qemu_img(
        &folder,
        &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "disk", "4M"],
    );
    let image = File::options().write(true).open(folder.path("disk")).unwrap();
    image.write_all_at(&[0xee; 4096], 3 << 20).unwrap();
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    let expected = pattern(5, SIZE);
    for at in (0..SIZE).step_by(CLUSTER) {
        assert_eq!(disk.write((at / 512) as u64, &expected[at..at + CLUSTER]), Ok(()));
    }
    disk.end();
    check(&folder, &expected);
}
