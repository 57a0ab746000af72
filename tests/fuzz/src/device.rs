//! Every device behind both transports: the bytes are a driver, and what the machine does meanwhile.
//! Whatever they are, nothing outside guest memory is touched; a driver that keeps to the ring's rules
//! gets every chain back or is asked for a reset, whatever the chains say; after a reset the device works.

use arbitrary::Unstructured;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::driver::{
    DATA, DRIVER_OK, F_VERSION_1, FEATURES_OK, Guest, MEMORY, NEEDS_RESET, NEXT, TransportKind, WRITE,
};
use crate::ground::SEAM;
use crate::host::{self, Host, TX};

/// Steps of one input: more find nothing that fewer would not, slower.
const STEPS_MAX: usize = 64;
/// Queues of the balloon: one gives pages to the host, whose numbers are up to the bytes.
const INFLATE: usize = 0;
const STATISTICS: usize = 2;
/// The queue of a port by which the guest says what it does with the port.
const MESSAGES: usize = 3;
/// Flags of a descriptor.
const INDIRECT: u16 = 4;

pub fn run(bytes: &[u8]) {
    host::with(|host| {
        let mut bytes = Unstructured::new(bytes);
        let choice = usize::from(bytes.arbitrary::<u8>().unwrap_or(0));
        let device = &host.devices[choice / 2 % host.devices.len()];
        let kind = if choice % 2 == 0 { TransportKind::Mmio } else { TransportKind::Pci };
        let guest = Some(host.guest(kind, device));
        let mut run = Run { host, device, guest, bytes, sound: false, paused: false };
        for _ in 0..STEPS_MAX {
            if run.bytes.is_empty() {
                break;
            }
            run.step();
        }
        run.conclude();
    });
}

struct Run<'a> {
    host: &'a Host,
    device: &'a alula::devices::kind::ConfiguredDevice,
    /// There but while it is built anew.
    guest: Option<Guest>,
    bytes: Unstructured<'a>,
    /// The driver has kept to the rules since it set the device up: the rings are where they should be
    /// and nobody wrote to them but by the rules.
    sound: bool,
    paused: bool,
}

impl Run<'_> {
    fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().expect("it is there between steps")
    }

    fn u8(&mut self) -> u8 {
        self.bytes.arbitrary().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        self.bytes.arbitrary().unwrap_or(0)
    }

    fn u32(&mut self) -> u32 {
        self.bytes.arbitrary().unwrap_or(0)
    }

    fn u64(&mut self) -> u64 {
        self.bytes.arbitrary().unwrap_or(0)
    }

    fn some_bytes(&mut self, most: usize) -> Vec<u8> {
        let count = usize::from(self.u8()) % (most + 1);
        self.bytes.bytes(count.min(self.bytes.len())).unwrap_or_default().to_vec()
    }

    fn queue(&mut self) -> usize {
        let queues = self.guest().queues();
        usize::from(self.u8()) % queues
    }

    fn step(&mut self) {
        match self.u8() % 20 {
            0 | 1 => self.start(),
            2..=4 => self.offer(),
            5 => self.offer_request(),
            6..=8 => self.kick(),
            9 => self.pause(),
            10 => self.resume(),
            11 => self.build_anew(),
            12 => self.write_register(),
            13 => self.read_register(),
            14 => self.access_config(),
            15 => self.write_memory(),
            16 => self.break_ring(),
            17 => self.set_queue(),
            18 => {
                let payload = self.some_bytes(255);
                self.host.send(&payload);
                self.guest().turn();
            }
            _ => self.access_function(),
        }
    }

    fn start(&mut self) {
        let asked = self.u64();
        let guest = self.guest();
        let features = guest.features() & asked;
        guest.start(features);
        guest.turn();
        self.sound = true;
    }

    /// Where a buffer is, and how long it is; some lie where guest memory ends, or beyond.
    fn buffer(&mut self) -> (u64, u32) {
        let start = match self.u8() % 16 {
            0..=7 => DATA + u64::from(self.u16()) * 8,
            8 | 9 => SEAM - u64::from(self.u8()) * 16,
            10 => MEMORY - u64::from(self.u8()) * 16,
            11 => 2 * MEMORY + u64::from(self.u16()) * 16,
            12 => u64::from(self.u16()) * 4,
            13 => 0_u64.wrapping_sub(self.u8().into()),
            14 => u64::from(self.u32()),
            _ => self.u64(),
        };
        let length = match self.u8() % 8 {
            0 => u32::from(self.u8()),
            1 => 16,
            2 | 3 => 512 * u32::from(self.u8() % 8),
            4 => 1,
            5 => u32::from(self.u16()),
            6 => 1526,
            _ => self.u32(),
        };
        (start, length)
    }

    /// A request to this queue may have the host take the pages of the rings.
    fn may_give_rings(&self, queue: usize) -> bool {
        self.device.kind().section == "balloon" && queue == INFLATE
    }

    /// What is written there is not the ring's.
    fn spares_rings(buffer: (u64, u32)) -> bool {
        buffer.0 >= DATA && buffer.0.checked_add(buffer.1.into()).is_some()
    }

    /// One chain of any buffers, some of them through an indirect table.
    fn offer(&mut self) {
        let (queue, count) = (self.queue(), usize::from(self.u8() % 8));
        let (_, size) = self.guest().available(queue);
        if size == 0 || !self.may_offer() {
            return;
        }
        self.sound &= !self.may_give_rings(queue);
        let mut buffers = Vec::new();
        for _ in 0..count.min(size.into()) {
            let flags = u16::from(self.u8());
            let flags = match flags {
                0..=0x5f => 0,
                0x60..=0xbf => WRITE,
                0xc0..=0xef => INDIRECT,
                other => other,
            };
            let buffer = match flags & INDIRECT {
                0 => self.buffer(),
                _ => self.table(),
            };
            self.sound &= flags & WRITE == 0 || Self::spares_rings(buffer);
            buffers.push((buffer, flags & !NEXT));
        }
        if buffers.is_empty() {
            // A head without a chain.
            let head = self.u16();
            return self.guest().make_available(queue, head);
        }
        self.guest().offer(queue, &buffers);
    }

    /// An indirect table and where it is.
    fn table(&mut self) -> (u64, u32) {
        let (at, count) = (DATA + 0x8_0000 + u64::from(self.u8()) * 256, u32::from(self.u8() % 9));
        for index in 0..count {
            let buffer = self.buffer();
            let flags = u16::from(self.u8() % 8);
            let next = match self.u8() {
                wild @ 0xf0.. => wild.into(),
                _ => index as u16 + 1,
            };
            self.sound &= flags & WRITE == 0 || Self::spares_rings(buffer);
            let place = at + 16 * u64::from(index);
            self.store(place, &buffer.0.to_le_bytes());
            self.store(place + 8, &buffer.1.to_le_bytes());
            self.store(place + 12, &[flags.to_le_bytes(), next.to_le_bytes()].concat());
        }
        (at, count * 16 + u32::from(self.u8() % 16 == 15))
    }

    /// A chain as the device wants it, nearly: what it says is up to the bytes.
    fn offer_request(&mut self) {
        let queue = self.queue();
        if self.guest().available(queue).1 < 3 || !self.may_offer() {
            return;
        }
        self.sound &= !self.may_give_rings(queue);
        let mut header = self.some_bytes(32);
        header.resize(header.len().max(16), 0);
        // A small kind and a sector of the disk, mostly.
        if self.u8() < 0xe0 {
            header[1..8].fill(0);
            header[9..16].fill(0);
        }
        let place = DATA + 0x1000 * (1 + u64::from(self.u8() % 8));
        self.store(place, &header);
        let readable = ((place, header.len() as u32), 0);
        let data = self.buffer();
        let flags = if self.u8() & 1 == 0 { WRITE } else { 0 };
        self.sound &= flags == 0 || Self::spares_rings(data);
        let status = ((place + 0x800, 1), WRITE);
        self.guest().offer(queue, &[readable, (data, flags), status]);
    }

    /// A chain more than the ring holds would be against the rules.
    fn may_offer(&mut self) -> bool {
        let guest = self.guest();
        (0..guest.queues()).all(|queue| {
            let (available, size) = guest.available(queue);
            available.wrapping_sub(guest.used_index(queue)) < size
        }) || !self.sound
    }

    fn kick(&mut self) {
        for queue in 0..self.guest().queues() {
            self.guest().kick(queue);
        }
        self.guest().turn();
        self.look();
    }

    /// Whether a device that runs has used every chain, if the driver is sound.
    fn look(&mut self) {
        let section = self.device.kind().section;
        if !self.sound || self.paused {
            return;
        }
        // Room for frames, packets and events waits for them, queue pairs for a command, and statistics for the time
        // to be told anew.
        let is_used = |queue: &usize| match section {
            "network-interfaces" | "vsock" => *queue == TX,
            "balloon" => *queue != STATISTICS,
            // What is typed and who comes to a port is not up to the bytes.
            "console" => *queue == TX,
            "ports" => *queue == MESSAGES,
            _ => true,
        };
        for queue in (0..self.guest().queues()).filter(is_used) {
            self.guest().wait_for(|guest| {
                let done = guest.used_index(queue) == guest.available(queue).0;
                done || guest.status() & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK
            });
        }
    }

    fn pause(&mut self) {
        self.guest().pause();
        self.paused = true;
    }

    fn resume(&mut self) {
        self.guest().resume();
        self.paused = false;
        self.kick();
    }

    /// Another machine goes on from the state of this one.
    fn build_anew(&mut self) {
        self.pause();
        let old = self.guest.take().expect("it is there between steps");
        let (state, notes) = (old.save(), old.notes.clone());
        let mut guest = self.host.guest_anew(self.device, old);
        guest.notes = notes;
        guest.pause();
        // Every state into which a guest can bring a device can be restored, unless the guest's rings are unsound.
        let restored = guest.restore(&state);
        assert!(restored.is_ok() || !self.sound, "{}", restored.unwrap_err());
        if restored.is_ok() {
            assert!(guest.save() == state, "what was restored is not what was saved");
            self.guest = Some(guest);
        } else {
            self.guest = Some(self.host.guest_anew(self.device, guest));
            self.paused = false;
        }
    }

    fn width(&mut self) -> usize {
        [1, 2, 4, 8, 4, 4, 2, 1][usize::from(self.u8() % 8)]
    }

    fn offset(&mut self) -> u64 {
        u64::from(self.u16()) % 0x4000
    }

    fn write_register(&mut self) {
        let (offset, width, value) = (self.offset(), self.width(), self.u64());
        self.guest().registers().write(offset, &value.to_le_bytes()[..width]);
        self.guest().turn();
        self.sound = false;
    }

    fn read_register(&mut self) {
        let (offset, width) = (self.offset(), self.width());
        self.guest().registers().read(offset, &mut [0xff; 8][..width]);
    }

    fn access_config(&mut self) {
        let (offset, width, value) = (u64::from(self.u8()), self.width(), self.u64());
        let mut data = value.to_le_bytes();
        self.guest().config(offset, &mut data[..width]);
        self.guest().set_config(offset, &value.to_le_bytes()[..width]);
        self.guest().turn();
    }

    fn store(&mut self, address: u64, bytes: &[u8]) {
        // Beyond the end of memory a guest has nothing to write to.
        let _ = self.guest().memory.memory().write_slice(bytes, GuestAddress(address));
    }

    fn write_memory(&mut self) {
        let (address, bytes) = (u64::from(self.u16()) * 2, self.some_bytes(64));
        self.store(address, &bytes);
        self.sound = false;
    }

    /// An index that runs away, or stands still.
    fn break_ring(&mut self) {
        let (queue, index, place) = (self.queue(), self.u16(), self.u8());
        let [table, available, used] = Guest::parts(queue);
        let place = [table + u64::from(place), available, available + 2, used, used + 2, available + 36];
        let choice = usize::from(self.u8()) % place.len();
        self.store(place[choice], &index.to_le_bytes());
        self.sound = false;
    }

    /// Rings anywhere, of any size, and the device is told that they are ready.
    fn set_queue(&mut self) {
        let (queue, size, asked) = (self.queue(), self.u16(), self.u64());
        let size = if size & 1 == 0 { 1 << (size % 16) } else { size };
        let parts: [u64; 3] = std::array::from_fn(|part| match self.u8() % 4 {
            0 => Guest::parts(queue)[part],
            1 => MEMORY - u64::from(self.u16()),
            2 => u64::from(self.u16()) * 16,
            _ => self.u64(),
        });
        let guest = self.guest();
        let features = guest.features() & asked | F_VERSION_1;
        if guest.negotiate(features) {
            guest.set_queue(queue, size, parts);
            guest.set_status(3 | FEATURES_OK | DRIVER_OK);
        }
        guest.turn();
        self.sound = false;
    }

    /// Configuration space, behind PCI: MSI-X control and the access window are in it.
    fn access_function(&mut self) {
        let (offset, width, value) = (usize::from(self.u8()), self.width(), self.u64());
        let Some(function) = self.guest().function() else { return };
        function.read_config(offset, &mut [0xff; 8][..width]);
        function.write_config(offset, &value.to_le_bytes()[..width]);
        self.guest().turn();
        // The window reaches every register.
        self.sound = false;
    }

    /// Whatever became of it: after a reset it works.
    fn conclude(&mut self) {
        self.guest().resume();
        let guest = self.guest.as_mut().expect("it is there between steps");
        guest.start(0);
        self.host.exercise(self.device, guest);
        assert_eq!(guest.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
    }
}
