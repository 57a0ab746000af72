//! The entropy device (virtio 1.2, 5.4): random bytes from the host's `getrandom`.

use std::io::Write;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddressSpace;

use crate::error::{Context, Result};
use crate::event::Interest;
use crate::memory::Memory;
use crate::virtio::{Chain, Io, Queue, Registrar, VirtioDevice, Worker};

/// So much is given at once, whatever is asked for: a request of 4 GiB would keep the host at work
/// for seconds.
const REQUEST_MAX: usize = 64 << 10;

/// Body of `PUT /entropy`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {}

impl Config {
    /// The device.
    pub fn open(&self) -> Box<dyn VirtioDevice> {
        Box::new(Entropy)
    }
}

/// The device.
struct Entropy;

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let Io { memory, queues, .. } = io;
        let [queue] = <[Queue; 1]>::try_from(queues).ok().expect("one queue was asked for");
        Ok(vec![Box::new(Running { memory, queue })])
    }
}

struct Running {
    memory: Memory,
    queue: Queue,
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.add(self.queue.kick(), Interest::IN, 0)
    }
    fn handle(&mut self, _token: u32) -> Result<()> {
        let memory = self.memory.memory();
        self.queue.serve(&memory, |chain| fill(&memory, chain))
    }
}

fn fill(memory: &crate::memory::Regions, chain: Chain<'_>) -> Result<u32> {
    let mut writer = chain.writer(memory).context("look at a request")?;
    let mut bytes = vec![0; writer.available_bytes().min(REQUEST_MAX)];
    random(&mut bytes)?;
    writer.write_all(&bytes).context("write to a request")?;
    Ok(bytes.len() as u32)
}

#[allow(unsafe_code)]
fn random(bytes: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the call writes at most the length of the slice to it.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(error).context("get random bytes of the host");
                }
            }
        }
    }
    Ok(())
}
