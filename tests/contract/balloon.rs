//! The balloon in use: what goes back to the host and what does not, and drivers that do not behave.

use serde_json::Value;

use super::*;

const REPORTING: usize = 4;
const HINTING: usize = 3;
const DEFLATE: usize = 1;
/// The last quarter of memory, which nothing else is in.
const FIRST: u64 = 768;
const PAGES: u64 = driver::MEMORY / PAGE;

fn config(more: Value) -> ConfiguredDevice {
    let mut config = json!({
        "amount_mib": 1, "deflate_on_oom": false, "stats_polling_interval_s": 3600,
        "free_page_hinting": true, "free_page_reporting": true,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let kind = KINDS.iter().find(|kind| kind.section == "balloon").unwrap();
    kind.parse(config.to_string().as_bytes()).unwrap()
}

/// A guest whose driver runs; the last quarter of its memory is full of sevens.
fn guest() -> Guest {
    let opened = config(json!({})).open("it", &mut host::Host::default()).unwrap();
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let mut guest = Guest::by_hand(TransportKind::Pci, opened, memory);
    guest.start(F_EVENT_IDX);
    guest.turn();
    guest.fill(FIRST * PAGE, (PAGES - FIRST) * PAGE, 7);
    guest
}

/// The numbers of the pages in the last quarter of memory that are zeros; asserts that the others are as they were.
fn given_back(guest: &Guest) -> Vec<u64> {
    let bytes = guest.bytes((FIRST * PAGE, ((PAGES - FIRST) * PAGE) as u32));
    let pages = bytes.chunks(PAGE as usize).zip(FIRST..);
    let is_given = |(page, number): (&[u8], u64)| {
        let byte = page[0];
        assert!(page.iter().all(|other| *other == byte) && [0, 7].contains(&byte), "a part of page {number}");
        (byte == 0).then_some(number)
    };
    pages.filter_map(is_given).collect()
}

fn numbers(guest: &mut Guest, numbers: &[u32]) -> (u64, u32) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    guest.allocate(&bytes)
}

fn patch(guest: &mut Guest, place: &str, body: &str) -> Result<()> {
    let change = config(json!({})).kind().parse_patch(place, body.as_bytes()).unwrap();
    guest.pause();
    let result = guest.transport.lock().unwrap().patch(change.patch(), &mut host::Host::default());
    guest.resume();
    guest.turn();
    result
}

fn told(guest: &Guest, what: &str) -> Value {
    guest.transport.lock().unwrap().tell(what).unwrap()
}

fn word(guest: &mut Guest, offset: u64) -> u32 {
    let mut word = [0; 4];
    guest.config(offset, &mut word);
    u32::from_le_bytes(word)
}

fn counted(guest: &Guest, name: &str) -> u64 {
    guest.transport.lock().unwrap().metrics(View::Total)[name].as_u64().unwrap()
}

#[test]
fn page_numbers_that_are_none_are_left_out_and_one_twice_is_once() {
    let mut guest = guest();
    let first = FIRST as u32;
    // The numbers are not in order, one of them twice, beyond memory, at the end of all addresses; and half a number.
    let all = [first + 5, u32::MAX, first + 1, PAGES as u32, first + 1, 1 << 31, first + 6];
    let (address, length) = numbers(&mut guest, &all);
    guest.request(INFLATE, &[((address, length + 3), 0)]);
    assert_eq!(given_back(&guest), [FIRST + 1, FIRST + 5, FIRST + 6]);
    // A driver touches the pages that it takes back; pages that it never gave are its own all the same.
    guest.fill((FIRST + 1) * PAGE, PAGE, 7);
    let back = numbers(&mut guest, &[first + 1, 3, u32::MAX]);
    guest.request(DEFLATE, &[(back, 0)]);
    assert_eq!(given_back(&guest), [FIRST + 5, FIRST + 6]);
    // Requests with numbers that the device may not read, with none, and with more than fit one turn give no page back.
    guest.request(INFLATE, &[(back, WRITE)]);
    guest.request(INFLATE, &[((back.0, 0), 0)]);
    guest.request(INFLATE, &[((FIRST * PAGE, 0x8000), 0)]);
    assert_eq!(given_back(&guest), [FIRST + 5, FIRST + 6]);
    assert_eq!(guest.status() & NEEDS_RESET, 0);
    // A buffer that is not in memory is no request at all.
    guest.offer(INFLATE, &[((driver::MEMORY - 4, 8), 0)]);
    guest.kick(INFLATE);
    guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
}

#[test]
fn a_turn_gives_back_no_more_than_its_share() {
    let mut guest = guest();
    // Each of these numbers would take a system call of its own, were there such pages.
    let scattered: Vec<u32> = (0..1024).map(|number| 0x8000_0000 + 2 * number).collect();
    let scattered = numbers(&mut guest, &scattered);
    let free = ((1 << 40, 256 << 20), WRITE);
    for (queue, request) in [(INFLATE, (scattered, 0)), (REPORTING, free)] {
        for _ in 0..10 {
            guest.offer(queue, &[request]);
        }
        guest.kick(queue);
        for done in 1..=10 {
            while guest.used_index(queue) < done {
                assert!(guest.turn_once());
            }
            assert_eq!(guest.used_index(queue), done, "a turn is longer");
            // A device that stops in between goes on where it was.
            guest.pause();
            guest.resume();
        }
    }
}

#[test]
fn whole_pages_alone_of_what_is_free_go_back() {
    let mut guest = guest();
    let start = FIRST * PAGE;
    let pieces = [
        ((start + 1, 2 * PAGE as u32), WRITE),
        ((start + 8 * PAGE, PAGE as u32), WRITE),
        ((start + 9 * PAGE, 2 * PAGE as u32), WRITE),
        ((start + 10 * PAGE, PAGE as u32), WRITE),
        // A piece that the device may only read is not free.
        ((start + 20 * PAGE, PAGE as u32), 0),
        ((driver::MEMORY - PAGE, 1 << 30), WRITE),
        ((u64::MAX - 5, 3), WRITE),
        ((1 << 40, 4096), WRITE),
    ];
    guest.request(REPORTING, &pieces);
    assert_eq!(given_back(&guest), [1, 8, 9, 10, 255].map(|page| FIRST + page));
    assert_eq!(counted(&guest, "free_page_report_count"), 7);
    assert_eq!(counted(&guest, "free_page_report_freed"), 5 * PAGE);
    assert_eq!(counted(&guest, "free_page_report_fails"), 0);
}

#[test]
fn what_is_given_back_is_in_the_next_difference() {
    let mut guest = guest();
    let regions = guest.memory.memory();
    let region = vm_memory::GuestMemoryBackend::iter(&*regions).next().unwrap();
    region.written().start();
    let pages = numbers(&mut guest, &[FIRST as u32 + 64, FIRST as u32 + 65]);
    guest.request(INFLATE, &[(pages, 0)]);
    let written = region.written().take();
    assert_eq!(written[(FIRST / 64 + 1) as usize], 0b11);
    region.written().stop();
}

#[test]
fn free_pages_are_taken_of_the_run_that_was_asked_for() {
    let mut guest = guest();
    let hint = |guest: &mut Guest, page: u64| {
        guest.request(HINTING, &[(((FIRST + page) * PAGE, PAGE as u32), WRITE)]);
    };
    let say = |guest: &mut Guest, command: u32| {
        let command = guest.allocate(&command.to_le_bytes());
        guest.request(HINTING, &[(command, 0)]);
    };
    // No run of hinting was asked for: hinted pages stay, whether the driver has named a run or not.
    hint(&mut guest, 1);
    say(&mut guest, 2);
    hint(&mut guest, 2);
    assert!(given_back(&guest).is_empty());
    patch(&mut guest, "hinting/start", r#"{"acknowledge_on_stop": false}"#).unwrap();
    assert!(guest.is_interrupted(None), "the driver is not told");
    let first = word(&mut guest, 8);
    assert_eq!((first, told(&guest, "hinting/status")), (2, json!({ "host_cmd": 2, "guest_cmd": 2 })));
    say(&mut guest, first);
    hint(&mut guest, 3);
    say(&mut guest, 0);
    // The driver has told of all pages, and is not to use them yet: no page that comes now is of that run.
    assert_eq!(word(&mut guest, 8), first);
    hint(&mut guest, 4);
    patch(&mut guest, "hinting/stop", "").unwrap();
    assert_eq!(told(&guest, "hinting/status"), json!({ "host_cmd": 1, "guest_cmd": 0 }));
    say(&mut guest, first);
    hint(&mut guest, 5);
    // A second run has another number, and ends by itself.
    patch(&mut guest, "hinting/start", "").unwrap();
    let second = word(&mut guest, 8);
    assert_ne!(first, second);
    hint(&mut guest, 6);
    say(&mut guest, second);
    hint(&mut guest, 7);
    say(&mut guest, 0);
    assert_eq!(word(&mut guest, 8), 1);
    hint(&mut guest, 8);
    assert_eq!(given_back(&guest), [FIRST + 3, FIRST + 7]);
    assert_eq!(counted(&guest, "free_page_hint_freed"), 2 * PAGE);
    // A buffer of less than four bytes is no command: the driver broke a rule.
    let short = guest.allocate(&[0; 3]);
    guest.offer(HINTING, &[(short, 0)]);
    guest.kick(HINTING);
    guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
}

#[test]
fn statistics_are_what_the_driver_said_last_whatever_it_says() {
    let mut guest = guest();
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let say = |guest: &mut Guest, bytes: &[u8]| {
        let bytes = guest.allocate(bytes);
        let head = guest.offer(STATISTICS, &[(bytes, 0)]);
        guest.kick(STATISTICS);
        guest.turn();
        head
    };
    let head = say(&mut guest, &[entry(4, u64::MAX), entry(99, 1), entry(0, 3)].concat());
    let mut expected = json!({
        "target_pages": 256, "actual_pages": 0, "target_mib": 1, "actual_mib": 0,
        "free_memory": u64::MAX, "swap_in": 3,
    });
    assert_eq!(told(&guest, "statistics"), expected);
    assert_eq!(counted(&guest, "stats_update_fails"), 1);
    // The buffer stays with the device until statistics are wanted anew; another buffer sends it back.
    assert_eq!(guest.used_index(STATISTICS), 0);
    say(&mut guest, &[1, 2, 3]);
    assert_eq!(guest.next_used(STATISTICS).0, head);
    // The driver writes the number of pages that it has given; the fields that are not for it to write stay.
    guest.set_config(0, &[0xff; 6]);
    guest.set_config(7, &[1, 0xff, 0xff]);
    assert_eq!([0, 4, 8, 12].map(|offset| word(&mut guest, offset)), [256, 0x0100_ffff, 0, 0]);
    for (name, value) in [("actual_pages", 0x0100_ffff), ("actual_mib", 0x0100_ffff / 256)] {
        expected[name] = value.into();
    }
    for name in ["free_memory", "swap_in"] {
        expected.as_object_mut().unwrap().remove(name);
    }
    assert_eq!(told(&guest, "statistics"), expected);
    // Statistics of 4 GiB, most of them not in memory: the driver broke a rule, and the device goes on after a reset.
    guest.offer(STATISTICS, &[((driver::MEMORY - 100, u32::MAX), 0)]);
    guest.kick(STATISTICS);
    guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
    guest.start(0);
    say(&mut guest, &entry(5, 9));
    assert_eq!(told(&guest, "statistics")["total_memory"], 9);
}

#[test]
fn a_driver_that_is_to_tell_anew_gets_its_buffer_back() {
    let opened = config(json!({ "stats_polling_interval_s": 1 }));
    let opened = opened.open("it", &mut host::Host::default()).unwrap();
    let mut guest = Guest::new(TransportKind::Mmio, opened);
    guest.start(F_EVENT_IDX);
    let bytes = guest.allocate(&[4, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    for round in 0..3 {
        let head = guest.offer(STATISTICS, &[(bytes, 0)]);
        guest.kick(STATISTICS);
        if round == 0 {
            // A pause in between loses nothing.
            guest.pause();
            guest.resume();
        }
        assert_eq!(guest.next_used(STATISTICS), (head, 0));
        assert_eq!(told(&guest, "statistics")["free_memory"], 8);
    }
    // A driver that never answers again is not asked again.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert!(!guest.has_used(STATISTICS) && guest.status() & NEEDS_RESET == 0);
}

#[test]
fn a_target_is_changed_for_a_driver_that_is_there() {
    let opened = config(json!({})).open("it", &mut host::Host::default()).unwrap();
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let mut guest = Guest::by_hand(TransportKind::Mmio, opened, memory);
    let early = patch(&mut guest, "", r#"{"amount_mib": 2}"#).unwrap_err().to_string();
    assert!(early.starts_with("Device not activated yet."), "{early}");
    guest.start(0);
    guest.turn();
    patch(&mut guest, "", r#"{"amount_mib": 3}"#).unwrap();
    assert!(guest.is_interrupted(None), "the driver is not told");
    assert_eq!(word(&mut guest, 0), 3 * 256);
    // In a machine built anew, the target is changed without a driver having started the device there.
    let suspended = guest.suspend();
    let opened = config(json!({ "amount_mib": 3 })).open("it", &mut host::Host::default()).unwrap();
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let mut guest = Guest::by_hand(TransportKind::Mmio, opened, memory);
    guest.take_over(&suspended).unwrap();
    patch(&mut guest, "", r#"{"amount_mib": 1}"#).unwrap();
    assert_eq!(word(&mut guest, 0), 256);
    patch(&mut guest, "statistics", r#"{"stats_polling_interval_s": 5}"#).unwrap();
    let never = patch(&mut guest, "statistics", r#"{"stats_polling_interval_s": 0}"#).unwrap_err();
    assert_eq!(never.to_string(), "Statistics cannot be enabled/disabled after activation.");
    // After a reset the driver is gone, and the pages that it gave are the guest's.
    guest.reset();
    assert_eq!(word(&mut guest, 4), 0);
    assert!(patch(&mut guest, "", r#"{"amount_mib": 2}"#).is_err());
}
