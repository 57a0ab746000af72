//! The Async engine: what the kernel can do itself goes to it through an io_uring.

use std::io::Result;
use std::os::fd::AsRawFd;

use super::image::Image;
use super::request::{Extent, Request, RequestKind};
use super::{device, holes};
use crate::error;
use crate::sys::vectors::VECTORS_MAX;
use crate::uring::{Operation, Transfer, Uring};

/// A ring whose operations are steps of requests.
pub struct Ring {
    uring: Uring,
}

impl Ring {
    /// A ring for at most `in_flight` requests, to be used by this thread.
    pub fn new(in_flight: u16) -> error::Result<Self> {
        Ok(Self { uring: Uring::new(in_flight.into())? })
    }

    /// The ring itself.
    pub fn uring(&mut self) -> &mut Uring {
        &mut self.uring
    }

    /// Starts the next step of a request, which `index` names until it completes; false: it is not
    /// one for the ring.
    pub fn push(&mut self, request: &Request, index: u16, image: &Image, durable: bool) -> Result<bool> {
        let place = |write| image.place(&request.data, request.offset, write);
        let operation = match (request.kind, image.raw(), request.ranges.last()) {
            (RequestKind::Read, ..) => {
                let transfer = place(false).map(|(file, offset)| Transfer::Read { file, offset });
                return self.transfer(transfer, request, index);
            }
            (RequestKind::Write, ..) => {
                let transfer = place(true).map(|(file, offset)| Transfer::Write { file, offset });
                return self.transfer(transfer, request, index);
            }
            (RequestKind::Flush, Some(raw), _) if durable => Operation::Sync { file: raw.file().as_raw_fd() },
            (RequestKind::Discard | RequestKind::Zero, Some(raw), Some(range))
                if !device::is_block_device(raw.file()) =>
            {
                let (file, Extent { offset, length, unmap }) = (raw.file().as_raw_fd(), *range);
                let mode =
                    if request.kind == RequestKind::Zero && !unmap { holes::ZERO } else { holes::PUNCH };
                Operation::Allocate { file, mode, offset, length }
            }
            _ => return Ok(false),
        };
        self.uring.push(operation, index.into())?;
        Ok(true)
    }

    #[allow(unsafe_code)]
    fn transfer(&mut self, transfer: Option<Transfer>, request: &Request, index: u16) -> Result<bool> {
        let Some(transfer) = transfer else { return Ok(false) };
        let vectors = request.data.vectors();
        let vectors = vectors.range(0..vectors.count().min(VECTORS_MAX));
        // SAFETY: the vectors are the request's, which does not change before its step completes; they
        // lie in guest memory, and the file is the image's. All of them are kept by the worker, which
        // drops its ring first, and the ring waits for what is in flight.
        unsafe { self.uring.transfer(transfer, vectors, index.into()) }?;
        Ok(true)
    }

    /// Takes a step that is complete: whose it is, and what became of it.
    pub fn next(&mut self) -> Option<(u16, Result<u32>)> {
        self.uring.next().map(|completion| (completion.user_data as u16, completion.result))
    }
}
