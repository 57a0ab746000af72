//! What the driver puts into guest memory: buffers, and its side of the rings (virtio 1.2, 2.7).

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{DATA, Guest, MEMORY, NEXT};

impl Guest {
    /// A piece of guest memory that nothing else uses.
    pub fn allocate(&mut self, bytes: &[u8]) -> (u64, u32) {
        let address = DATA + self.notes.allocated;
        self.notes.allocated += bytes.len().next_multiple_of(64) as u64;
        assert!(address + bytes.len() as u64 <= MEMORY, "the test's guest is out of memory");
        self.memory.memory().write_slice(bytes, GuestAddress(address)).unwrap();
        (address, bytes.len() as u32)
    }

    pub fn fill(&self, address: u64, length: u64, byte: u8) {
        self.memory.memory().write_slice(&vec![byte; length as usize], GuestAddress(address)).unwrap();
    }

    pub fn bytes(&self, (address, length): (u64, u32)) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(super) fn store<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
        self.memory.memory().write_obj(value, GuestAddress(address)).unwrap();
    }

    fn load(&self, address: u64) -> u16 {
        let order = std::sync::atomic::Ordering::Acquire;
        self.memory.memory().load(GuestAddress(address), order).unwrap()
    }

    /// Writes one descriptor.
    pub fn set_descriptor(&self, queue: usize, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = Self::parts(queue)[0] + 16 * u64::from(index);
        self.store(address, at);
        self.store(length, at + 8);
        self.store(flags, at + 12);
        self.store(next, at + 14);
    }

    /// Makes a chain available, without a kick; returns its head.
    pub fn offer(&mut self, queue: usize, buffers: &[((u64, u32), u16)]) -> u16 {
        let ring = self.notes.rings[queue];
        let place = |index: usize| (ring.descriptors + index as u16) % ring.size;
        for (index, ((address, length), flags)) in buffers.iter().enumerate() {
            let more = if index + 1 < buffers.len() { NEXT } else { 0 };
            self.set_descriptor(queue, place(index), *address, *length, flags | more, place(index + 1));
        }
        let head = place(0);
        self.notes.rings[queue].descriptors = place(buffers.len());
        self.make_available(queue, head);
        head
    }

    /// Writes an indirect table, of descriptors that follow each other; returns where it is.
    pub fn allocate_table(&mut self, buffers: &[((u64, u32), u16)]) -> (u64, u32) {
        let entry = |(index, ((address, length), flags)): (usize, &((u64, u32), u16))| {
            let more = if index + 1 < buffers.len() { NEXT } else { 0 };
            let tail = [flags | more, index as u16 + 1].map(u16::to_le_bytes).concat();
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &tail].concat()
        };
        let table: Vec<u8> = buffers.iter().enumerate().flat_map(entry).collect();
        self.allocate(&table)
    }

    /// Puts `head` into the available ring.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.notes.rings[queue];
        let [_, available, _] = Self::parts(queue);
        let (place, index) = (available + 4 + 2 * u64::from(ring.available % ring.size), available + 2);
        ring.available = ring.available.wrapping_add(1);
        let new = ring.available;
        self.store(head, place);
        self.memory.memory().store(new, GuestAddress(index), std::sync::atomic::Ordering::Release).unwrap();
    }

    /// Makes so many requests available at once that were never put there.
    pub fn run_away(&mut self, queue: usize, count: u16) {
        let ring = &mut self.notes.rings[queue];
        ring.available = ring.available.wrapping_add(count);
        let (new, [_, available, _]) = (ring.available, Self::parts(queue));
        let index = GuestAddress(available + 2);
        self.memory.memory().store(new, index, std::sync::atomic::Ordering::Release).unwrap();
    }

    /// Kicks a queue by its register.
    pub fn kick(&mut self, queue: usize) {
        self.write(0x50, 0x2000 + 4 * queue as u64, 4, queue as u32);
    }

    /// How many chains the device has used in all.
    pub fn used_index(&self, queue: usize) -> u16 {
        self.load(Self::parts(queue)[2] + 2)
    }

    /// Whether the device has used a chain that nobody has looked at.
    pub fn has_used(&self, queue: usize) -> bool {
        self.used_index(queue) != self.notes.rings[queue].seen
    }

    /// Waits for the next used chain: its head and how many bytes were written.
    pub fn next_used(&mut self, queue: usize) -> (u16, u32) {
        self.wait_for(|guest| guest.has_used(queue));
        self.take_used(queue)
    }

    /// Takes a chain that the device has used, without a turn of the device: a timer that went off meanwhile is not
    /// handled by it.
    pub fn take_used(&mut self, queue: usize) -> (u16, u32) {
        assert!(self.has_used(queue), "nothing was used on queue {queue}");
        let ring = &mut self.notes.rings[queue];
        let at = Self::parts(queue)[2] + 4 + 8 * u64::from(ring.seen % ring.size);
        ring.seen = ring.seen.wrapping_add(1);
        let read = |address| self.memory.memory().read_obj::<u32>(GuestAddress(address)).unwrap();
        (read(at) as u16, read(at + 4))
    }

    /// Offers a chain, kicks, and waits for it: how many bytes were written.
    pub fn request(&mut self, queue: usize, buffers: &[((u64, u32), u16)]) -> u32 {
        let head = self.offer(queue, buffers);
        self.kick(queue);
        let (used, length) = self.next_used(queue);
        assert_eq!(used, head, "another chain came back");
        length
    }
}
