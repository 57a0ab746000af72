//! Registers behind virtio-mmio that a guest may read from memory: what it finds there is compared with what the device
//! answers, at each read.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use alula::bus::BusDevice;
use alula::memory::registers::{self, RegisterPage};
use alula::poll::EventFd;
use alula::virtio::mmio::{CONFIG, Mmio};
use alula::virtio::transport::Transport;
use alula::virtio::{Interrupts, VirtioDevice};

/// The interrupts of `device` by a line, and the page of its registers, if they can be read from memory.
pub fn line(device: &dyn VirtioDevice, event: Arc<EventFd>) -> (Arc<Interrupts>, Option<Arc<RegisterPage>>) {
    let page = device.has_steady_configuration().then(RegisterPage::new);
    (Interrupts::line(event, None, page.clone()), page)
}

/// A device, and the page of its registers.
pub struct Shown(Mmio, Option<Arc<RegisterPage>>);

impl Shown {
    pub fn new(transport: Arc<Mutex<Transport>>, page: Option<Arc<RegisterPage>>) -> Self {
        Self(Mmio(transport), page)
    }

    fn seen(&self, offset: u64, size: usize) -> Option<Vec<u8>> {
        let byte =
            |at: u64| self.1.as_ref().unwrap().word(at).load(Ordering::SeqCst).to_le_bytes()[at as usize % 4];
        let is_there = offset + size as u64 <= registers::SIZE;
        self.1.as_ref().filter(|_| is_there).map(|_| (offset..).take(size).map(byte).collect())
    }
}

impl BusDevice for Shown {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The device may change them between.
        let before = self.seen(offset, data.len());
        self.0.read(offset, data);
        // A driver reads registers in whole words (virtio 1.2, 4.2.2.2): who does not finds ones, or bytes of memory.
        if offset < CONFIG && (data.len() != 4 || !offset.is_multiple_of(4)) {
            return;
        }
        let after = self.seen(offset, data.len());
        let is_there = |seen: Option<Vec<u8>>| seen.is_none_or(|seen| seen == data);
        assert!(is_there(before.clone()) || is_there(after), "{before:?} at {offset:#x}, not {data:?}");
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}
