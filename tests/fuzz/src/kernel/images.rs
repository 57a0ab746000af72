//! Sound kernels of every format, made by code and small: the bytes of an input change one of them.

use std::io::Write;
use std::sync::OnceLock;

use flate2::{Compression, write::GzEncoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

/// Where kernels begin on a PC.
pub const START: u64 = 1 << 20;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// Every kernel, those for x86_64 first.
pub fn all() -> &'static [Vec<u8>] {
    static ALL: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    ALL.get_or_init(|| {
        let (xen, linux) = (note(b"Xen\0", 18, &START.to_le_bytes()), note(b"Linux\0", 257, &[7; 3]));
        let both = [&xen[..], &linux].concat();
        let packed = [gzip(&arm64(4096)), compress_to_vec(&arm64(4096)[..], CompressionLevel::Fastest)];
        let zboots = [zboot(b"gzip", &packed[0]), zboot(b"zstd", &packed[1])];
        let images = [elf(&xen), elf(&linux), elf(&both), elf(&[]), bzimage(), arm64(512)];
        images.into_iter().chain(packed).chain(zboots).collect()
    })
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let sizes = [name.len() as u32, description.len() as u32, kind];
    let mut note: Vec<u8> = sizes.into_iter().flat_map(u32::to_le_bytes).collect();
    for part in [name, description] {
        note.extend_from_slice(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// ELF with three segments, the last one of which goes to the second range of memory, and these notes.
fn elf(notes: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 64 + 4 * PROGRAM_HEADER];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 24, &START.to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &(PROGRAM_HEADER as u16).to_le_bytes());
    put(&mut file, 56, &4u16.to_le_bytes());
    // The second one crosses the seam between two regions.
    let seam = crate::ground::SEAM - 8;
    let segments: [(u32, u64, &[u8], u64); 4] = [
        (PT_LOAD, START, &[0x90; 48], 4096),
        (PT_LOAD, seam, &[0x5a; 32], 64),
        (PT_NOTE, 0, notes, notes.len() as u64),
        (PT_LOAD, 2 * crate::driver::MEMORY, &[0xa5; 16], 32),
    ];
    for (index, (kind, address, content, size)) in segments.into_iter().enumerate() {
        let at = 64 + index * PROGRAM_HEADER;
        let offset = file.len() as u64;
        put(&mut file, at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, content.len() as u64), (40, size), (48, 4)] {
            put(&mut file, at + field, &value.to_le_bytes());
        }
        file.extend_from_slice(content);
    }
    file
}

/// Two sectors of setup and 64 bytes of kernel (Documentation/arch/x86/boot.rst).
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 1024];
    put(&mut file, 0x1f1, &[1]);
    put(&mut file, 0x1f4, &4u32.to_le_bytes());
    put(&mut file, 0x1fe, &[0x55, 0xaa]);
    put(&mut file, 0x202, b"HdrS\x0f\x02");
    // LOADED_HIGH, XLF_KERNEL_64.
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x236, &[1]);
    put(&mut file, 0x258, &START.to_le_bytes());
    put(&mut file, 0x260, &0x1_0000u32.to_le_bytes());
    file.extend([0xc3; 64]);
    file
}

/// An Image of so many bytes (Documentation/arch/arm64/booting.rst).
fn arm64(size: u64) -> Vec<u8> {
    let mut file: Vec<u8> = (0..size).map(|at| at as u8).collect();
    put(&mut file, 8, &0x1000u64.to_le_bytes());
    put(&mut file, 16, &(2 * size).to_le_bytes());
    put(&mut file, 56, b"ARM\x64");
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zboot(how: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 128];
    put(&mut file, 0, b"MZ\0\0zimg");
    put(&mut file, 8, &128u32.to_le_bytes());
    put(&mut file, 12, &(payload.len() as u32).to_le_bytes());
    put(&mut file, 24, how);
    file.extend(payload);
    file
}
