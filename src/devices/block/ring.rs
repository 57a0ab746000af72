//! The Async engine: requests on a raw image go to the kernel through an io_uring.

use std::io::Result;
use std::os::fd::AsRawFd;

use super::holes;
use super::image::Image;
use super::request::{Kind, Request};
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
        let Some(raw) = image.raw() else { return Ok(false) };
        let file = raw.file().as_raw_fd();
        let vectors = request.data.vectors();
        let count = vectors.len().min(VECTORS_MAX) as u32;
        let (vectors, offset) = (vectors.as_ptr(), request.offset);
        let operation = match (request.kind, request.ranges.last()) {
            (Kind::Read, _) if raw.takes(&request.data) => Operation::Read { file, vectors, count, offset },
            (Kind::Write, _) if raw.takes(&request.data) => Operation::Write { file, vectors, count, offset },
            (Kind::Flush, _) if durable => Operation::Sync { file },
            (Kind::Discard | Kind::Zero, Some(range)) if !holes::is_block_device(raw.file()) => {
                let mode =
                    if request.kind == Kind::Zero && !range.unmap { holes::ZERO } else { holes::PUNCH };
                Operation::Allocate { file, mode, offset: range.offset, length: range.length }
            }
            _ => return Ok(false),
        };
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
