//! The Async engine: what the kernel can do itself goes to it through an io_uring.

use std::io::Result;
use std::os::fd::AsRawFd;

use super::image::Image;
use super::request::{Extent, Request, RequestKind};
use super::{device, holes};
use crate::error;
use crate::uring::{Operation, Uring};
use crate::virtio::buffers::VECTORS_MAX;

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
    #[allow(unsafe_code)]
    pub fn push(&mut self, request: &Request, index: u16, image: &Image, durable: bool) -> Result<bool> {
        let vectors = request.data.vectors();
        let (vectors, count) = (vectors.as_ptr(), vectors.len().min(VECTORS_MAX) as u32);
        let place = |write| image.place(&request.data, request.offset, write);
        let operation = match (request.kind, image.raw(), request.ranges.last()) {
            (RequestKind::Read, ..) => {
                place(false).map(|(file, offset)| Operation::Read { file, vectors, count, offset })
            }
            (RequestKind::Write, ..) => {
                place(true).map(|(file, offset)| Operation::Write { file, vectors, count, offset })
            }
            (RequestKind::Flush, Some(raw), _) if durable => {
                Some(Operation::Sync { file: raw.file().as_raw_fd() })
            }
            (RequestKind::Discard | RequestKind::Zero, Some(raw), Some(range))
                if !device::is_block_device(raw.file()) =>
            {
                let (file, Extent { offset, length, unmap }) = (raw.file().as_raw_fd(), *range);
                let mode =
                    if request.kind == RequestKind::Zero && !unmap { holes::ZERO } else { holes::PUNCH };
                Some(Operation::Allocate { file, mode, offset, length })
            }
            _ => None,
        };
        let Some(operation) = operation else { return Ok(false) };
        // SAFETY: the vectors are the request's, which does not change before its step completes; they
        // lie in guest memory, and the file is the image's. All of them are kept by the worker, which
        // drops its ring first, and the ring waits for what is in flight.
        unsafe { self.uring.push(operation, index.into()) }?;
        Ok(true)
    }

    /// Takes a step that is complete: whose it is, and what became of it.
    pub fn next(&mut self) -> Option<(u16, Result<u32>)> {
        self.uring.next().map(|completion| (completion.user_data as u16, completion.result))
    }
}
