//! A ring against files, sockets and events of this kernel.

use super::*;
use crate::poll::{Events, Interest};
use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::slice;
use std::time::Duration;

fn rings(in_flight: u32) -> [Uring; 2] {
    [Uring::new(in_flight).unwrap(), Uring::build(IoUring::builder(), in_flight).unwrap()]
}

fn file(content: &[u8]) -> File {
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
    std::os::unix::fs::FileExt::write_all_at(&file, content, 0).unwrap();
    file
}

fn vector(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

fn all(ring: &mut Uring) -> Vec<(u64, Option<u32>)> {
    let mut done = Vec::new();
    while ring.in_flight() > 0 {
        ring.wait().unwrap();
        while let Some(completion) = ring.next() {
            done.push((completion.user_data, completion.result.ok()));
        }
    }
    done.sort();
    done
}

#[test]
fn more_operations_than_one_batch_complete_with_their_user_data() {
    let content: Vec<u8> = (0..=255).cycle().take(200 * 512).collect();
    let file = file(&content);
    for mut ring in rings(200) {
        let mut buffers = vec![[0; 512]; 200];
        let vectors: Vec<_> = buffers.iter_mut().map(|buffer| vector(buffer)).collect();
        for (index, vectors) in vectors.iter().enumerate() {
            let offset = index as u64 * 512;
            let read = Transfer::Read { file: file.as_raw_fd(), offset };
            transfer(&mut ring, read, slice::from_ref(vectors), index as u64);
        }
        assert_eq!(ring.in_flight(), 200);
        let expected: Vec<_> = (0..200).map(|index| (index, Some(512))).collect();
        assert_eq!(all(&mut ring), expected);
        assert!(buffers.concat() == content);
    }
}

#[test]
fn writes_syncs_and_holes_reach_the_file_and_errors_reach_us() {
    for mut ring in rings(8) {
        let mut file = file(&[7; 8192]);
        let mut bytes = [9; 4096];
        let vectors = &[vector(&mut bytes)];
        let fd = file.as_raw_fd();
        transfer(&mut ring, Transfer::Write { file: fd, offset: 0 }, vectors, 1);
        ring.push(Operation::Sync { file: fd }, 2).unwrap();
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        ring.push(Operation::Allocate { file: fd, mode, offset: 4096, length: 4096 }, 3).unwrap();
        ring.push(Operation::Sync { file: -1 }, 4).unwrap();
        assert_eq!(all(&mut ring), [(1, Some(4096)), (2, Some(0)), (3, Some(0)), (4, None)]);
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert!(content == [[9; 4096], [0; 4096]].concat());
    }
}

#[test]
fn the_event_tells_of_what_completes_after_a_turn_and_a_turn_is_told_of_what_came_in_it() {
    for mut ring in rings(8) {
        let (reader, writer) = UnixStream::pair().unwrap();
        let mut byte = [0];
        let read = Transfer::Read { file: reader.as_raw_fd(), offset: Transfer::NO_OFFSET };
        let vectors = &[vector(&mut byte)];
        transfer(&mut ring, read, vectors, 1);
        ring.submit().unwrap();
        assert!(ring.next().is_none() && !ring.rearm());
        assert!(ring.event().read().is_err());
        std::io::Write::write_all(&mut &writer, b"x").unwrap();
        while ring.event().read().is_err() {
            std::thread::yield_now();
        }
        ring.submit().unwrap();
        assert_eq!(ring.next().unwrap().result.unwrap(), 1);
        assert!(!ring.rearm());
        // Complete at once: no event, but the end of the turn knows.
        std::io::Write::write_all(&mut &writer, b"y").unwrap();
        transfer(&mut ring, read, vectors, 2);
        ring.submit().unwrap();
        assert!(ring.rearm());
        assert_eq!(all(&mut ring), [(2, Some(1))]);
    }
}

#[test]
fn a_wait_in_the_ring_ends_by_what_is_complete_and_by_what_is_ready_beside_it() {
    for mut ring in rings(8) {
        let (reader, writer) = UnixStream::pair().unwrap();
        let (events, kick) = (Events::new().unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
        events.add(&kick, Interest::IN | Interest::EDGE_TRIGGERED, 1).unwrap();
        let mut byte = [0];
        let vectors = &[vector(&mut byte)];
        let read = Transfer::Read { file: reader.as_raw_fd(), offset: Transfer::NO_OFFSET };
        for round in 0..3 {
            transfer(&mut ring, read, vectors, round);
            kick.write(1).unwrap();
            ring.wait_beside(events.as_raw_fd()).unwrap();
            assert!(ring.next().is_none() && ring.woke());
            let mut ready = Vec::new();
            events.wait(Some(Duration::ZERO), &mut ready).unwrap();
            assert_eq!(ready.len(), 1);
            std::io::Write::write_all(&mut &writer, b"x").unwrap();
            ring.wait_beside(events.as_raw_fd()).unwrap();
            assert_eq!(ring.next().unwrap().user_data, round);
            assert!(ring.next().is_none() && !ring.woke());
        }
    }
}

#[test]
fn a_wait_in_the_ring_ends_by_an_event_that_it_watches_and_hands_signals_over() {
    for mut ring in rings(8) {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (events, watched, signalled) = (Events::new().unwrap(), event(), event());
        // What was written before counts.
        watched.write(1).unwrap();
        assert!(ring.watch(&watched).unwrap(), "Linux 5.17 is needed");
        assert!(ring.is_busy());
        // More often than the ring has room for what it tells.
        for round in 0..3 * BATCH {
            assert!(ring.signal(&signalled).unwrap());
            ring.wait_beside(events.as_raw_fd()).unwrap();
            assert!(ring.next().is_none() && !ring.woke() && !ring.is_busy(), "{round}");
            assert_eq!(signalled.read().unwrap(), 1, "{round}");
            watched.write(1).unwrap();
        }
        // The end of a turn knows of it as well.
        assert!(ring.rearm() && !ring.is_quiet());
        ring.submit().unwrap();
        assert!(ring.next().is_none() && ring.is_quiet());
        // And the ring's own event tells of it, in another thread's hands, too.
        std::thread::scope(|scope| {
            let watched = &watched;
            scope.spawn(move || watched.write(1).unwrap());
            events.add(ring.event(), Interest::IN | Interest::EDGE_TRIGGERED, 1).unwrap();
            let mut ready = Vec::new();
            while ready.is_empty() {
                events.wait(None, &mut ready).unwrap();
            }
        });
        assert!(!ring.is_quiet() || ring.next().is_none());
    }
}

#[test]
fn what_an_event_tells_is_not_lost_when_there_is_no_room_for_it() {
    for mut ring in rings(8) {
        let watched = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        assert!(ring.watch(&watched).unwrap(), "Linux 5.17 is needed");
        ring.submit().unwrap();
        for _ in 0..3 * BATCH {
            watched.write(1).unwrap();
            // Into the kernel, where it is told.
            std::thread::yield_now();
        }
        for round in 0..4 {
            while ring.rearm() {
                ring.submit().unwrap();
                assert!(ring.next().is_none());
            }
            watched.write(1).unwrap();
            assert!(ring.rearm(), "{round}");
        }
    }
}

#[test]
fn a_batch_takes_what_is_there_and_one_call_though_there_is_less_than_was_asked_for() {
    for mut ring in rings(8) {
        assert!(ring.can_cancel(), "Linux 5.19 is needed");
        let (reader, writer) = UnixStream::pair().unwrap();
        reader.set_nonblocking(true).unwrap();
        for round in 0..3 {
            std::io::Write::write_all(&mut &writer, b"xy").unwrap();
            let mut bytes = [[0]; 4];
            let vectors: Vec<_> = bytes.iter_mut().map(|byte| vector(byte)).collect();
            let read = Transfer::Read { file: reader.as_raw_fd(), offset: Transfer::NO_OFFSET };
            let parts = [0, 1, 2, 3].map(|index| index..index + 1);
            let mut results = Vec::new();
            assert_eq!(ring.transfer_all(read, lent(&vectors), &parts, &mut results), 1, "{round}");
            assert_eq!(results, [Some(1), Some(1), None, None], "{round}");
            assert_eq!((ring.in_flight(), bytes), (0, [[b'x'], [b'y'], [0], [0]]));
        }
    }
}
