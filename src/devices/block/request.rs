//! One request of a block device (virtio 1.2, 5.2.6): header, data, status.

use std::sync::Arc;

use super::{Image, SECTOR};
use crate::error::Result;
use crate::events::{self, Event};
use crate::log;
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
    pub image: Arc<Image>,
    pub flushes: bool,
    pub id: String,
    pub readable: Buffers,
    pub writable: Buffers,
}

impl Disk {
    /// Does a request, and returns how many bytes were written to it. Whatever fails is an error of
    /// this request alone; only a request without room for a status goes unanswered.
    pub fn serve(&mut self, chain: Chain<'_>) -> Result<u32> {
        Buffers::split(chain, &mut self.readable, &mut self.writable)?;
        let Some(status) = self.writable.take_last() else { return Ok(0) };
        let length = self.writable.len() as u32;
        let mut header = [0; 16];
        let code = match self.readable.read_front(&mut header) {
            true => {
                let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
                let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
                self.execute(kind, sector)
            }
            false => IO_ERROR,
        };
        self.writable.write_byte(status, code);
        Ok(if code == OK { length + 1 } else { 1 })
    }

    fn execute(&mut self, kind: u32, sector: u64) -> u8 {
        let Self { image, readable, writable, .. } = self;
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
                writable.copy_from(0, &id);
                Ok(())
            }
            _ => return UNSUPPORTED,
        };
        match result {
            Ok(()) => OK,
            Err(error) => {
                let what =
                    ["read", "write", "", "", "flush"].get(kind as usize).copied().unwrap_or("request");
                let reason = format!("{what} at sector {sector}: {error}");
                log::guest_line(format_args!("disk `{}`: {reason}", self.id));
                let device = format!("disk `{}`", self.id);
                events::tell(|| Event::DeviceError { device, reason, needs_reset: false });
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
