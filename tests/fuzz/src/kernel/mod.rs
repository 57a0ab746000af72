//! Kernels, initial ramdisks and command lines that somebody made, through the loader of each architecture into guest
//! memory. What is loaded is where the file says, the boot tables are sound and describe the machine, nothing lies over
//! anything else, and however long a file claims to be, little is read and allocated for it.

mod images;
#[cfg(target_arch = "x86_64")]
mod pc;
mod source;
mod tree;

use alula::arch::layout;
use alula::memory::{Memory, Range, Regions};
use alula::platform::node::{AcpiDevice, AcpiValue, PowerRegisters, TreeNode};
use alula::platform::{Gic, Node, Place, Platform};
use alula::virtio::mmio;
use arbitrary::{Result, Unstructured};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::arch::kernel::{Format, format};
use crate::driver::MEMORY;
use crate::state::change;
use crate::{allocator, ground};
use source::Source;

const PAGE: u64 = 4096;
/// As many CPUs as the interrupt controllers take: KVM's x2APICs, a GICv3, a GICv2.
const CPUS_MAX: [u16; 3] = [4096, 512, 8];
/// Pages of registers that there are for devices behind virtio-mmio.
const DEVICES_MAX: u8 = 255;
/// One segment of notes, or boot tables that grow: whatever a file says.
const ALLOCATED_MAX: i64 = 2 << 20;
/// The window of a zstd frame may be 128 MiB (`WINDOW_MAX`), and the decoder rounds its buffer up to a power of two.
const UNPACKING_MAX: i64 = 257 << 20;
/// An error is a sentence for people.
const MESSAGE_MAX: usize = 1000;

/// A kernel, what goes beside it and a machine, all made of one input.
struct Case {
    arm: bool,
    kernel: Source,
    initrd: Option<Source>,
    platform: Platform,
}

pub fn run(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let case = Case::new(&mut bytes).expect("numbers end as zeros");
    let memory = ground::memory();
    if case.arm {
        run_arm(case, &memory);
    } else {
        run_here(case, &memory);
    }
}

impl Case {
    fn new(bytes: &mut Unstructured<'_>) -> Result<Self> {
        let choice = usize::from(bytes.arbitrary::<u8>()?);
        let sound = images::all();
        let image = sound.get(choice % (sound.len() + 1));
        // Every one is given to both loaders.
        let arm = choice & 0x80 != 0;
        let (cpus, shape) = (bytes.arbitrary::<u16>()?, bytes.arbitrary::<u8>()?);
        let platform = platform(arm, cpus, shape, bytes)?;
        let initrd = match shape & 8 {
            0 => None,
            _ => Some(Source::new(vec![0x77; usize::from(bytes.arbitrary::<u16>()? % 9000)])),
        };
        let lengths = [bytes.arbitrary()?, bytes.arbitrary()?];
        let kernel = match image {
            Some(image) => {
                let mut image = image.clone();
                set_numbers(&mut image, bytes)?;
                let mut parts = [image];
                change(&mut parts, bytes)?;
                let [image] = parts;
                image
            }
            None => bytes.bytes(bytes.len())?.to_vec(),
        };
        let mut case = Self { arm, kernel: Source::new(kernel), initrd, platform };
        set_length(&mut case.kernel, lengths[0]);
        if let Some(initrd) = &mut case.initrd {
            set_length(initrd, lengths[1]);
        }
        Ok(case)
    }
}

/// Replaces numbers of the file by those that bounds are about.
fn set_numbers(file: &mut [u8], bytes: &mut Unstructured<'_>) -> Result<()> {
    for _ in 0..bytes.arbitrary::<u8>()? % 6 {
        let numbers = [
            0,
            PAGE,
            images::START,
            ground::SEAM,
            MEMORY,
            2 * MEMORY,
            ground::REGIONS[2].0 + ground::REGIONS[2].1,
            file.len() as u64,
            64 << 10,
            1 << 30,
            u32::MAX.into(),
            i64::MAX as u64,
            u64::MAX,
        ];
        let at = usize::from(bytes.arbitrary::<u16>()?) % file.len();
        let number = numbers[usize::from(bytes.arbitrary::<u8>()?) % numbers.len()];
        let number = number.wrapping_add_signed(bytes.arbitrary::<i8>()?.into()).to_le_bytes();
        // Fields have 2, 4 or 8 bytes, at multiples of 2.
        let size = [2, 4, 8, 8][usize::from(bytes.arbitrary::<u8>()?) % 4];
        let at = at & !1;
        let room = (file.len() - at).min(size);
        file[at..at + room].copy_from_slice(&number[..room]);
    }
    Ok(())
}

/// Makes the file one with a hole at its end, one that becomes shorter, one that is read in pieces.
fn set_length(file: &mut Source, choice: u8) {
    let known = file.bytes.len() as u64;
    file.length = match choice & 7 {
        0..4 => known,
        4 => known + 1,
        // Two files of this length do not fit beside each other.
        5 => known + ground::SEAM - PAGE,
        6 => known + MEMORY,
        _ => i64::MAX as u64,
    };
    // A packed hole is read to its end, and the loader's limit for that is far from what an input may take here.
    if matches!(format(file), Ok((Format::Compressed(_), _))) {
        file.length = file.length.min(known + MEMORY);
    }
    file.end = match choice >> 3 & 7 {
        0..6 => file.length,
        6 => known.saturating_sub(1),
        _ => known / 2,
    };
    if choice & 0x40 != 0 {
        file.most = 256 + usize::from(choice);
    }
    file.at = 0;
    file.done.take();
}

/// The machine that the boot tables describe.
fn platform(arm: bool, cpus: u16, shape: u8, bytes: &mut Unstructured<'_>) -> Result<Platform> {
    let frame = crate::arch::aarch64::layout::GIC_MESSAGE_FRAME;
    let gic = match (arm, shape & 1) {
        (false, _) => None,
        (true, 0) => Some(Gic::V3),
        (true, _) => Some(Gic::V2(frame)),
    };
    let most = CPUS_MAX[usize::from(arm) + usize::from(arm && shape & 1 != 0)];
    let mut nodes = vec![Node::Power(PowerRegisters { port: 0x600, off: 5, reset: 1 })];
    let pci = shape & 2 != 0;
    if pci {
        nodes.push(Node::Ecam(layout::ECAM));
        nodes.push(Node::MessageTree(TreeNode::new("messages").flag("msi-controller")));
    }
    let devices = bytes.arbitrary::<u8>()? % DEVICES_MAX;
    for number in 0..devices.into() {
        let range = Range { start: layout::VIRTIO_MMIO.start + number * PAGE, size: PAGE };
        let gsi = layout::DEVICE_GSIS.start + number as u32 % layout::DEVICE_GSIS.len() as u32;
        nodes.extend(mmio::nodes(Place::Registers { range, gsi: Some(gsi) }));
    }
    let command_line = match shape >> 4 {
        0..8 => "console=ttyS0 reboot=k".to_owned(),
        8..14 => "w ".repeat(usize::from(bytes.arbitrary::<u16>()? % 1100)),
        _ => String::from_utf8_lossy(bytes.bytes(bytes.len().min(16))?).into_owned(),
    };
    let (first, third) = (Range { start: 0, size: MEMORY }, ground::REGIONS[2]);
    let mut memory = vec![first];
    if shape & 4 != 0 && !arm {
        memory.push(Range { start: third.0, size: third.1 });
    }
    for (index, (_, place)) in layout::in_memory(&memory).into_iter().enumerate() {
        let device = AcpiDevice::new(format!("MEM{index}"), AcpiValue::Text("ALUL0000"), place.resources());
        nodes.extend(Node::of_memory(place, "counter", "alula,counter", device));
    }
    let (cpus, random_seed) = (1 + cpus % most, [7; 32]);
    Ok(Platform { cpus, smt: false, memory, command_line, initrd: None, random_seed, nodes, pci, gic })
}

fn run_arm(mut case: Case, memory: &Memory) {
    use crate::arch::aarch64::{boot, layout};
    let regions = memory.memory();
    let packed = matches!(format(&mut case.kernel), Ok((Format::Compressed(_), _)));
    let before = allocator::begin_peak();
    let loaded = boot::load(&regions, &mut case.kernel, case.initrd.as_mut(), &mut case.platform);
    check_peak(before, if packed { UNPACKING_MAX } else { ALLOCATED_MAX });
    match loaded {
        Err(error) => check_message(&error.to_string()),
        Ok(entry) => {
            let ram = layout::ram(&case.platform.memory);
            assert!((ram.start..ram.end()).contains(&entry.address), "{:#x}", entry.address);
            let mut kernel = Range { start: entry.address, size: 64 };
            if !packed {
                kernel.size = case.kernel.length;
                check_content(&regions, &case.kernel, 0, kernel);
            }
            let tree = tree::check(&regions, &case.platform, entry.fdt);
            check_initrd(&regions, &case, &[kernel, tree], ram);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn run_here(mut case: Case, memory: &Memory) {
    let regions = memory.memory();
    let before = allocator::begin_peak();
    let loaded = alula::arch::load(&regions, &mut case.kernel, case.initrd.as_mut(), &mut case.platform);
    check_peak(before, ALLOCATED_MAX);
    match loaded {
        Err(error) => check_message(&error.to_string()),
        Ok(entry) => {
            let kernel = pc::check_kernel(&regions, &case.kernel, &entry);
            pc::check_tables(&regions, &case.platform, &entry);
            check_initrd(&regions, &case, &kernel, case.platform.memory[0]);
        }
    }
}

/// The loader of this machine is the one for arm64.
#[cfg(not(target_arch = "x86_64"))]
fn run_here(case: Case, memory: &Memory) {
    run_arm(case, memory);
}

fn check_peak(before: i64, most: i64) {
    let peak = allocator::peak() - before;
    assert!(peak <= most, "{peak} bytes were allocated");
}

fn check_message(message: &str) {
    assert!(!message.is_empty() && message.len() <= MESSAGE_MAX, "{message}");
    assert!(!message.chars().any(char::is_control), "{message:?}");
}

/// Checks that `place` of guest memory holds the bytes that the file has at `offset`.
fn check_content(memory: &Regions, file: &Source, offset: u64, place: Range) {
    let mut pieces = [vec![0; 64 << 10], vec![0; 64 << 10]];
    let mut done = 0;
    while done < place.size {
        let count = (place.size - done).min(64 << 10) as usize;
        let [found, expected] = &mut pieces;
        memory.read_slice(&mut found[..count], GuestAddress(place.start + done)).unwrap();
        file.content(offset + done, &mut expected[..count]);
        assert!(found[..count] == expected[..count], "{place} is not what the file has at {offset:#x}");
        done += count as u64;
    }
}

/// The initrd is in memory that the guest knows as its own, whole, and beside everything else.
fn check_initrd(memory: &Regions, case: &Case, others: &[Range], ram: Range) {
    let place = case.platform.initrd;
    assert_eq!(place.is_some(), case.initrd.is_some());
    let (Some(place), Some(initrd)) = (place, &case.initrd) else { return };
    assert!(
        place.size == initrd.length && place.start.is_multiple_of(PAGE) && ram.contains(place),
        "{place}"
    );
    for other in others {
        assert!(other.end() <= place.start || place.end() <= other.start, "{place} lies over {other}");
    }
    check_content(memory, initrd, 0, place);
}

/// Numbers of guest memory.
fn read<const N: usize>(memory: &Regions, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn text_in(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap()
}
