//! Unpacks compressed Image kernels into guest memory.

use std::io::{BufReader, ErrorKind, Read, SeekFrom};

use flate2::read::GzDecoder;
use ruzstd::decoding::StreamingDecoder;
use vm_memory::{Bytes, GuestAddress};

use super::boot::{Header, place};
use crate::arch::kernel::{self, KernelSource, Packed};
use crate::error::{Context, Error, Result};
use crate::memory::{Range, Regions};

/// Far more than any kernel has. A file of a few kilobytes could unpack to gigabytes and fill guest
/// memory, which is the host's.
const IMAGE_MAX: u64 = 512 << 20;
/// More than any kernel has packed. A frame of zstd may have blocks of nothing without end, and a sparse file
/// has room for terabytes of them: reading those would keep the main thread from everything else.
const PACKED_MAX: u64 = 256 << 20;
/// zstd asks for memory of this size while it unpacks; this is what `zstd --ultra -22` asks for, with
/// which kernels are made. A file could ask for terabytes.
const WINDOW_MAX: u64 = 128 << 20;
/// What is unpacked at once.
const PIECE: usize = 64 << 10;

/// Unpacks the Image in `kernel` to where it belongs in `ram`; returns where it begins and ends.
pub fn load(
    memory: &Regions,
    kernel: &mut impl KernelSource,
    packed: Packed,
    ram: Range,
) -> Result<(u64, u64)> {
    let attempt = || format!("unpack it with {}", packed.how);
    let size = kernel::length(kernel)?.saturating_sub(packed.start).min(packed.size);
    if size > PACKED_MAX {
        let most = PACKED_MAX >> 20;
        return Err(Error::config(format!("it has {size} bytes, a kernel has less than {most} MiB")))
            .with_context(attempt);
    }
    kernel.seek(SeekFrom::Start(packed.start)).with_context(attempt)?;
    // A file that grows meanwhile has no more than that either.
    let bytes = BufReader::with_capacity(PIECE, kernel.take(size));
    match packed.how {
        "gzip" => copy(memory, &mut GzDecoder::new(bytes), ram),
        "zstd" => {
            let decoder = StreamingDecoder::new_with_max_window_size(bytes, WINDOW_MAX);
            let mut decoder =
                decoder.map_err(|error| Error::config(error.to_string())).with_context(attempt)?;
            copy(memory, &mut decoder, ram).and_then(|place| {
                let (told, found) =
                    (decoder.decoder.get_checksum_from_data(), decoder.decoder.get_calculated_checksum());
                match told.is_none() || told == found {
                    true => Ok(place),
                    false => Err(Error::config("its checksum is wrong: the file is damaged")),
                }
            })
        }
        how => Err(Error::config(format!("{how} is not known here: compress the Image with gzip or zstd"))),
    }
    .with_context(attempt)
}

fn copy(memory: &Regions, image: &mut impl Read, ram: Range) -> Result<(u64, u64)> {
    const DAMAGED: &str = "the file is damaged or not whole";
    let mut piece = vec![0; PIECE];
    let mut header: Header = [0; 64];
    image.read_exact(&mut header).context(DAMAGED)?;
    if !header[56..].starts_with(b"ARM\x64") {
        return Err(Error::config("what is in it is not an Image"));
    }
    let (start, end) = place(&header, 0, ram)?;
    memory.write_slice(&header, GuestAddress(start)).context("write the Image")?;
    let (mut at, limit) = (start + header.len() as u64, ram.end().min(start + IMAGE_MAX));
    loop {
        let count = match image.read(&mut piece) {
            Ok(0) => return Ok((start, end.max(at))),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context(DAMAGED),
        };
        if count as u64 > limit - at {
            return Err(Error::config(format!(
                "it unpacks to more than {} MiB: more than a kernel has, or than guest memory holds \
                 (`mem_size_mib`, --memory)",
                (limit - start) >> 20
            )));
        }
        memory.write_slice(&piece[..count], GuestAddress(at)).context("write the Image")?;
        at += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use flate2::{Compression, write::GzEncoder};
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    use vm_memory::GuestAddressSpace;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::arch::kernel::{Format, format};

    const RAM: Range = Range { start: 0x4000_0000, size: 8 << 20 };

    /// An Image at this text offset, of `size` bytes that do not repeat.
    fn image(text_offset: u64, size: usize) -> Vec<u8> {
        let mut image: Vec<u8> =
            (0..size as u32 / 4).flat_map(|n| n.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
        image[8..16].copy_from_slice(&text_offset.to_le_bytes());
        image[16..24].copy_from_slice(&(size as u64).to_le_bytes());
        image[56..60].copy_from_slice(b"ARM\x64");
        image
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    fn zboot(how: &str, payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 0x300];
        file[..8].copy_from_slice(b"MZ\0\0zimg");
        file[8..12].copy_from_slice(&0x300u32.to_le_bytes());
        file[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file[24..24 + how.len()].copy_from_slice(how.as_bytes());
        file.extend(payload);
        file.extend(b"what follows");
        file
    }

    fn load_into(memory: &Regions, file: &[u8]) -> Result<(u64, u64)> {
        let mut kernel = Cursor::new(file);
        match format(&mut kernel)?.0 {
            Format::Compressed(packed) => load(memory, &mut kernel, packed, RAM),
            other => panic!("{other:?}"),
        }
    }

    fn memory() -> Regions {
        (*crate::memory::allocate(&[RAM]).unwrap().memory()).clone()
    }

    #[test]
    fn every_kind_of_compressed_image_is_unpacked_to_its_place() {
        let image = image(0x8_0000, 300_000);
        let packed = [gzip(&image), zstd(&image)];
        let zboots = [zboot("gzip", &packed[0]), zboot("zstd", &packed[1])];
        for file in packed.iter().chain(&zboots) {
            let memory = memory();
            let (start, end) = load_into(&memory, file).unwrap();
            assert_eq!((start, end), (RAM.start + 0x8_0000, RAM.start + 0x8_0000 + 300_000));
            let mut found = vec![0; image.len()];
            memory.read_slice(&mut found, GuestAddress(start)).unwrap();
            assert!(found == image);
        }
    }

    #[test]
    fn a_damaged_file_is_an_error_wherever_the_damage_is() {
        let image = image(0, 20_000);
        let memory = memory();
        for file in [gzip(&image), zstd(&image), zboot("gzip", &gzip(&image))] {
            let body = if file.starts_with(b"MZ") { 0x300 + 20 } else { 20 };
            for at in (body..file.len() - 20).step_by(97) {
                let mut damaged = file.clone();
                damaged[at] ^= 0x10;
                let error = load_into(&memory, &damaged).unwrap_err().to_string();
                assert!(error.contains("unpack it with "), "{error}");
            }
            for length in (body..file.len() - 20).step_by(997) {
                let error = load_into(&memory, &file[..length]).unwrap_err().to_string();
                assert!(error.contains("unpack it with "), "{error}");
            }
        }
        // Outside the payload of a zboot image, and gzip's trailer: the checksum is the last to notice.
        let mut damaged = gzip(&image);
        let trailer = damaged.len() - 8;
        damaged[trailer] ^= 1;
        assert!(load_into(&memory, &damaged).unwrap_err().to_string().contains("the file is damaged"));
        let mut damaged = zstd(&image);
        let trailer = damaged.len() - 4;
        damaged[trailer] ^= 1;
        let error = load_into(&memory, &damaged).unwrap_err().to_string();
        assert!(error.contains("its checksum is wrong"), "{error}");
    }

    #[test]
    fn what_unpacks_to_more_than_memory_holds_is_refused() {
        let mut bomb = image(0, 4096);
        bomb.resize(10 << 20, 0);
        for file in [gzip(&bomb), zstd(&bomb)] {
            assert!(file.len() < 1 << 20, "a small file");
            let error = load_into(&memory(), &file).unwrap_err().to_string();
            assert!(error.contains("it unpacks to more than 8 MiB"), "{error}");
        }
    }

    #[test]
    fn a_frame_that_asks_for_too_large_a_window_is_refused() {
        // RFC 8878, 3.1.1.1: no single segment, no checksum; a window of 1 << 41 bytes.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 31 << 3, 1, 0, 0];
        let error = load_into(&memory(), &frame).unwrap_err().to_string();
        assert!(error.contains("unpack it with zstd") && error.contains("window"), "{error}");
    }

    #[test]
    fn blocks_of_nothing_without_end_are_refused() {
        // RFC 8878: a window of 1 MiB, no checksum; a block of zeros is one of no bytes that is not the last.
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&[0x28, 0xb5, 0x2f, 0xfd, 0, 10 << 3]).unwrap();
        file.set_len(1 << 40).unwrap();
        let Format::Compressed(packed) = format(&mut file).unwrap().0 else { panic!("it is zstd") };
        let error = load(&memory(), &mut file, packed, RAM).unwrap_err().to_string();
        assert!(error.contains("it has 1099511627776 bytes, a kernel has less than 256 MiB"), "{error}");
        file.set_len(1 << 20).unwrap();
        let error = load(&memory(), &mut file, packed, RAM).unwrap_err().to_string();
        assert!(error.contains("the file is damaged or not whole"), "{error}");
    }

    #[test]
    fn what_is_no_image_or_packed_in_another_way_is_told() {
        let error = load_into(&memory(), &gzip(&[7; 4096])).unwrap_err().to_string();
        assert!(error.contains("what is in it is not an Image"), "{error}");
        let error = load_into(&memory(), &zboot("xz", b"anything")).unwrap_err().to_string();
        assert!(error.contains("xz is not known here: compress the Image with gzip or zstd"), "{error}");
    }
}
