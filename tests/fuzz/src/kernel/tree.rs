//! Checks of guest memory as a kernel for arm64 finds it: the flattened device tree (Devicetree Specification 0.4, 5).

use alula::memory::{Range, Regions};
use alula::platform::Platform;
use vm_memory::{Bytes, GuestAddress};

use super::text_in;
use crate::arch::aarch64::layout;

const MAGIC: u32 = 0xd00d_feed;
const BEGIN: u32 = 1;
const END: u32 = 2;
const PROPERTY: u32 = 3;
const LAST: u32 = 9;

/// The tree at `at` is whole and describes `platform`; returns where the tree is.
pub fn check(memory: &Regions, platform: &Platform, at: u64) -> Range {
    let mut head = [0; 40];
    memory.read_slice(&mut head, GuestAddress(at)).unwrap();
    assert_eq!(word(&head, 0), MAGIC);
    let place = Range { start: at, size: word(&head, 4).into() };
    // Linux takes a tree of at most 2 MiB, at a multiple of 8 bytes.
    assert!(place.size <= 2 << 20 && place.start.is_multiple_of(8), "{place}");
    let ram = layout::ram(&platform.memory);
    assert!(ram.contains(place), "the tree has {place}");
    let mut tree = vec![0; place.size as usize];
    memory.read_slice(&mut tree, GuestAddress(at)).unwrap();

    let (mut path, mut cpus, mut line, mut initrd) = (Vec::new(), 0, None, [None; 2]);
    let strings = word(&tree, 12) as usize;
    let mut cursor = word(&tree, 8) as usize;
    loop {
        let token = word(&tree, cursor);
        cursor += 4;
        match token {
            BEGIN => {
                let name = text_in(&tree[cursor..]);
                cursor = (cursor + name.len() + 1).next_multiple_of(4);
                cpus += u16::from(name.starts_with(b"cpu@"));
                path.push(name);
            }
            END => assert!(path.pop().is_some(), "the tree ends a node that did not begin"),
            PROPERTY => {
                let size = word(&tree, cursor) as usize;
                let name = text_in(&tree[strings + word(&tree, cursor + 4) as usize..]);
                let value = &tree[cursor + 8..cursor + 8 + size];
                cursor = (cursor + 8 + size).next_multiple_of(4);
                match (path.last().copied(), name) {
                    (Some(b"chosen"), b"bootargs") => line = Some(value),
                    (Some(b"chosen"), b"linux,initrd-start") => initrd[0] = Some(number(value)),
                    (Some(b"chosen"), b"linux,initrd-end") => initrd[1] = Some(number(value)),
                    (Some(node), b"reg") if node.starts_with(b"memory@") => {
                        assert_eq!(value, [ram.start.to_be_bytes(), ram.size.to_be_bytes()].concat());
                    }
                    _ => {}
                }
            }
            LAST => break,
            other => panic!("token {other} at {cursor:#x}"),
        }
    }
    assert!(path.is_empty() && cpus == platform.cpus, "{cpus} CPUs");
    assert_eq!(line, Some(&[platform.command_line.as_bytes(), &[0]].concat()[..]));
    assert_eq!(initrd, [platform.initrd.map(|range| range.start), platform.initrd.map(|range| range.end())]);
    place
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn number(value: &[u8]) -> u64 {
    u64::from_be_bytes(value.try_into().unwrap())
}
