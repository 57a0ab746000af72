//! Reads the flattened device tree (Devicetree specification 0.4, 5): memory, CPUs, the interrupt
//! controller, the command line.

use crate::machine::{Machine, text_at};

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
const MAGIC: u32 = 0xd00d_feed;
/// Nodes above a property whose names matter.
const DEPTH: usize = 3;

/// Byte by byte: the tree is big-endian, and 64-bit values are aligned to 4 bytes only.
fn u32_at(address: u64) -> u32 {
    // SAFETY: memory is mapped one to one, and the loader put the tree there.
    (0..4).fold(0, |value, index| value << 8 | u32::from(unsafe { *((address + index) as *const u8) }))
}

fn u64_at(address: u64) -> u64 {
    u64::from(u32_at(address)) << 32 | u64::from(u32_at(address + 4))
}

/// Calls `visit` with (node path, property name, address of the value, its length) for every
/// property; false: it is not a sound tree.
fn walk(tree: u64, mut visit: impl FnMut(&[&[u8]; DEPTH], &[u8], u64, u64)) -> bool {
    if u32_at(tree) != MAGIC {
        return false;
    }
    let strings = tree + u64::from(u32_at(tree + 12));
    let mut at = tree + u64::from(u32_at(tree + 8));
    let mut path: [&[u8]; DEPTH] = [b""; DEPTH];
    let mut depth = 0;
    loop {
        let token = u32_at(at);
        at += 4;
        match token {
            BEGIN_NODE => {
                // SAFETY: names in the tree end with a zero.
                let name = unsafe { text_at(at) };
                if let Some(slot) = path.get_mut(depth) {
                    *slot = name;
                }
                depth += 1;
                at += (name.len() as u64 + 4) & !3;
            }
            END_NODE if depth == 0 => return false,
            END_NODE => {
                depth -= 1;
                if let Some(slot) = path.get_mut(depth) {
                    *slot = b"";
                }
                if depth == 0 {
                    return true;
                }
            }
            PROPERTY => {
                let (length, name) = (u64::from(u32_at(at)), strings + u64::from(u32_at(at + 4)));
                // SAFETY: as above.
                visit(&path, unsafe { text_at(name) }, at + 8, length);
                at += 8 + ((length + 3) & !3);
            }
            NOP => {}
            _ => return false,
        }
    }
}

/// The kernel's command line.
pub fn command_line(tree: u64) -> &'static [u8] {
    let mut line: &[u8] = b"";
    walk(tree, |path, name, value, _| {
        if path[1] == b"chosen" && name == b"bootargs" {
            // SAFETY: a text property ends with a zero.
            line = unsafe { text_at(value) };
        }
    });
    line
}

/// Reads the tree into `machine`; returns where the CPU interface of a GICv2 is, 0 for a GICv3.
pub fn read(machine: &mut Machine, tree: u64) -> u64 {
    let (mut interface, mut is_v2) = (0, false);
    let sound = walk(tree, |path, name, value, length| {
        let is_gic = path[1].starts_with(b"intc@");
        if is_gic && path[2].is_empty() && name == b"compatible" {
            // SAFETY: a text property ends with a zero.
            is_v2 = unsafe { text_at(value) } == b"arm,gic-400";
        } else if name != b"reg" {
        } else if is_gic && path[2].is_empty() {
            // The distributor, then the CPU interface or the redistributors.
            interface = u64_at(value + 16);
        } else if is_gic && path[2].starts_with(b"v2m@") {
            machine.message_frame = Some(u64_at(value));
        } else if path[1].starts_with(b"vmgenid@") {
            machine.generation_id = u64_at(value);
        } else if path[1].starts_with(b"vmclock@") {
            machine.vm_clock = u64_at(value);
        } else if path[1].starts_with(b"memory@") {
            for entry in 0..length / 16 {
                machine.add_memory(u64_at(value + 16 * entry), u64_at(value + 16 * entry + 8));
            }
        } else if path[1] == b"cpus" && path[2].starts_with(b"cpu@") {
            machine.add_cpu(u32_at(value + length - 4));
        }
    });
    if !sound {
        machine.fault = Some("no sound device tree");
    }
    if is_v2 { interface } else { 0 }
}
