//! One request of a block device (virtio 1.2, 5.2.6): header, data, status.

use super::{Image, SECTOR, SharedImage, lock};
use crate::error::Result;
use crate::log;
use crate::memory::Regions;
use crate::virtio::Chain;
use crate::virtio::buffers::Buffers;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// The length of the answer to GET_ID.
const ID_LENGTH: usize = 20;

/// What requests are done on.
pub struct Disk {
    pub image: SharedImage,
    pub flushes: bool,
    pub id: String,
}

impl Disk {
    /// Does a request, and returns how many bytes were written to it. Whatever fails is an error of
    /// this request alone; only a request without room for a status goes unanswered.
    pub fn serve(&mut self, memory: &Regions, chain: Chain<'_>) -> Result<u32> {
        let mut readable = Buffers::readable(memory, chain.clone())?;
        let mut writable = Buffers::writable(memory, chain)?;
        let Some(status) = writable.take_last() else { return Ok(0) };
        let mut header = [0; 16];
        let code = match readable.take_front(header.len()) {
            Some(buffers) => {
                buffers.copy_to(&mut header);
                let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
                let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
                self.execute(&lock(&self.image), kind, sector, &readable, &writable)
            }
            None => IO_ERROR,
        };
        status.copy_from(&[code]);
        Ok(if code == OK { writable.len() as u32 + 1 } else { 1 })
    }

    fn execute(
        &self,
        image: &Image,
        kind: u32,
        sector: u64,
        readable: &Buffers<'_>,
        writable: &Buffers<'_>,
    ) -> u8 {
        let result = match kind {
            IN => match place(image, sector, writable.len()) {
                Some(offset) => image.read(writable, offset),
                None => return IO_ERROR,
            },
            OUT => match place(image, sector, readable.len()) {
                Some(offset) => image.write(readable, offset),
                None => return IO_ERROR,
            },
            FLUSH if self.flushes => image.flush(),
            // Not offered, so nobody counts on it.
            FLUSH => Ok(()),
            GET_ID => {
                let mut id = [0; ID_LENGTH];
                let count = self.id.len().min(ID_LENGTH);
                id[..count].copy_from_slice(&self.id.as_bytes()[..count]);
                writable.copy_from(&id);
                Ok(())
            }
            _ => return UNSUPPORTED,
        };
        match result {
            Ok(()) => OK,
            Err(error) => {
                let what =
                    ["read", "write", "", "", "flush"].get(kind as usize).copied().unwrap_or("request");
                log::guest_line(format_args!("disk `{}`: {what} at sector {sector}: {error}", self.id));
                IO_ERROR
            }
        }
    }
}

/// The byte offset of a transfer that lies within the disk.
fn place(image: &Image, sector: u64, length: usize) -> Option<u64> {
    let length = length as u64;
    let end = sector.checked_add(length / SECTOR)?;
    (length.is_multiple_of(SECTOR) && end <= image.sectors()).then(|| sector * SECTOR)
}
