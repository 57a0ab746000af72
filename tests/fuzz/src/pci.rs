//! The PCI bus: configuration space by memory and by ports, BARs that move, MSI-X, the access window,
//! saved state. Whatever the guest writes, a function stays what it is; its registers answer where it
//! says they are or nowhere, never outside the window; set up soundly afterwards, every function answers.

use std::sync::{Arc, Mutex};

use alula::arch::layout::{ECAM, PCI_MEMORY, PCI_PORTS};
use alula::bus::Bus;
use alula::pci::root::{Ecam, FunctionRegisters, Ports, Root};
use alula::snapshot::SaveState;
use alula::virtio::pci::{BAR_SIZE, HostBridge};
use alula::virtio::transport::Transport;
use alula::virtio::workers::ByHand;
use arbitrary::Unstructured;

use crate::driver::{self, function};
use crate::ground;
use crate::host::{self, Host};

const STEPS_MAX: usize = 64;
/// Where functions are: beside each other, and the last place there is.
const PLACES: [u32; 3] = [1, 2, 31];
/// Offsets in configuration space, and in a function's registers.
const COMMAND: u64 = 0x04;
const BAR: u64 = 0x10;
const QUEUES: u64 = 0x12;
const TABLE: u64 = 0x3000;
const COMMAND_MEMORY: u16 = 2;

pub fn run(bytes: &[u8]) {
    host::with(|host| {
        let mut world = World::new(host);
        let mut bytes = Unstructured::new(bytes);
        for _ in 0..STEPS_MAX {
            if bytes.is_empty() {
                break;
            }
            world = step(world, host, &mut bytes).expect("numbers end as zeros");
        }
        world.conclude();
    });
}

fn step(mut world: World, host: &Host, bytes: &mut Unstructured<'_>) -> arbitrary::Result<World> {
    let place = PLACES[usize::from(bytes.arbitrary::<u8>()?) % PLACES.len()];
    let width = [1, 2, 4, 8][usize::from(bytes.arbitrary::<u8>()?) % 4];
    let value = |bytes: &mut Unstructured<'_>| Ok(bytes.arbitrary::<u64>()?.to_le_bytes());
    match bytes.arbitrary::<u8>()? % 12 {
        0 => {
            let offset = bytes.arbitrary::<u32>()? % ECAM.size as u32;
            world.mmio.read(ECAM.start + u64::from(offset), &mut [0; 8][..width]);
            world.mmio.write(ECAM.start + u64::from(offset), &value(bytes)?[..width]);
        }
        1 | 2 => {
            let offset = u64::from(bytes.arbitrary::<u8>()?);
            world.set_config(place, offset, &value(bytes)?[..width]);
            world.config(place, offset, &mut [0; 8][..width]);
        }
        3 => {
            if let Some(ports) = PCI_PORTS {
                let address = bytes.arbitrary::<u32>()?;
                world.pio.write(ports.start, &address.to_le_bytes());
                let port = ports.start + u64::from(bytes.arbitrary::<u8>()? % 8);
                world.pio.read(port, &mut [0; 8][..width]);
                world.pio.write(port, &value(bytes)?[..width]);
            }
        }
        4 => world.compare_ports(place, bytes.arbitrary::<u8>()?),
        5 | 6 => move_bar(&mut world, place, bytes)?,
        7 | 8 => {
            let offset = u64::from(bytes.arbitrary::<u16>()?) % BAR_SIZE;
            let offset = if bytes.arbitrary::<bool>()? { TABLE + offset % 128 } else { offset };
            if let Some(bar) = world.place_of(place) {
                world.mmio.read(bar.wrapping_add(offset), &mut [0; 8][..width]);
                world.mmio.write(bar.wrapping_add(offset), &value(bytes)?[..width]);
            }
        }
        9 => {
            // Interrupts by whatever vectors there are.
            for transport in &world.transports {
                transport.lock().unwrap().configuration_changed();
            }
        }
        10 => {
            let state = world.save();
            drop(world);
            world = World::new(host);
            world.restore(&state).expect("what a guest brings a bus into can be taken over");
            assert!(world.save() == state, "what was restored is not what was saved");
            world.resume();
        }
        _ => {
            let mut state = world.save();
            let (part, at) = (usize::from(bytes.arbitrary::<u8>()?), usize::from(bytes.arbitrary::<u16>()?));
            let part = part % state.len();
            let at = at % state[part].len();
            state[part][at] ^= bytes.arbitrary::<u8>()?;
            drop(world);
            world = rebuilt(host, &state);
        }
    }
    world.turn();
    world.look();
    Ok(world)
}

/// Puts a function's registers somewhere, and switches them on or off.
fn move_bar(world: &mut World, place: u32, bytes: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let place = if bytes.ratio(1, 4)? { 0 } else { place };
    let bar = match bytes.arbitrary::<u8>()? % 8 {
        0..=3 => PCI_MEMORY.start + u64::from(bytes.arbitrary::<u8>()? % 8) * BAR_SIZE,
        4 => PCI_MEMORY.end() - u64::from(bytes.arbitrary::<u8>()?) * 0x1000,
        5 => ECAM.start,
        6 => bytes.arbitrary::<u32>()?.into(),
        _ => bytes.arbitrary()?,
    };
    world.set_config(place, BAR, &bar.to_le_bytes());
    world.set_config(place, COMMAND, &u16::from(bytes.arbitrary::<u8>()?).to_le_bytes());
    Ok(())
}

/// A bus as it was saved, or a new one, if the state is refused: what refused it must not be used any more.
fn rebuilt(host: &Host, state: &[Vec<u8>]) -> World {
    let mut world = World::new(host);
    if world.restore(state).is_err() {
        drop(world);
        world = World::new(host);
    }
    world.resume();
    world
}

/// A bus with its functions, and the two that a guest reaches it by.
struct World {
    mmio: Arc<Bus>,
    pio: Bus,
    root: Arc<Mutex<Root>>,
    transports: Vec<Arc<Mutex<Transport>>>,
    queues: Vec<u16>,
    by_hand: ByHand,
}

impl World {
    fn new(host: &Host) -> Self {
        let (mmio, pio) = (Arc::new(Bus::default()), Bus::default());
        let by_hand = ByHand::new().unwrap();
        let mut root = Root::new(driver::vm(), &mmio);
        root.add(0, Arc::new(Mutex::new(HostBridge::default())), None).unwrap();
        let (mut transports, mut queues) = (Vec::new(), Vec::new());
        for (index, place) in PLACES.into_iter().enumerate() {
            let device = host.open(&host.devices[index % host.devices.len()]);
            queues.push(device.queue_sizes().len() as u16);
            let event_loop = by_hand.event_loop();
            let (transport, function) = function(device, ground::memory(), event_loop, place);
            // Kicks come as writes: KVM takes milliseconds to connect an event.
            let registers =
                FunctionRegisters { device: Arc::new(Mutex::new(function.registers())), kicks: Vec::new() };
            root.add(place, Arc::new(Mutex::new(function)), Some(registers)).unwrap();
            transports.push(transport);
        }
        let root = Arc::new(Mutex::new(root));
        mmio.attach(ECAM, Arc::new(Mutex::new(Ecam(root.clone())))).unwrap();
        if let Some(ports) = PCI_PORTS {
            pio.attach(ports, Arc::new(Mutex::new(Ports(root.clone())))).unwrap();
        }
        Self { mmio, pio, root, transports, queues, by_hand }
    }

    fn config(&self, place: u32, offset: u64, data: &mut [u8]) {
        self.mmio.read(ECAM.start + u64::from(place << 15) + offset, data);
    }

    fn set_config(&self, place: u32, offset: u64, data: &[u8]) {
        self.mmio.write(ECAM.start + u64::from(place << 15) + offset, data);
    }

    /// Where a function says that its registers are.
    fn place_of(&self, place: u32) -> Option<u64> {
        let (mut command, mut bar) = ([0; 2], [0; 8]);
        self.config(place, COMMAND, &mut command);
        self.config(place, BAR, &mut bar);
        let decodes = u16::from_le_bytes(command) & COMMAND_MEMORY != 0;
        decodes.then_some(u64::from_le_bytes(bar) & !0xf)
    }

    /// The same byte comes both ways, where reading has no effects.
    fn compare_ports(&self, place: u32, offset: u8) {
        let Some(ports) = PCI_PORTS.filter(|_| offset < 0x40) else { return };
        let (mut one, mut other) = ([0], [0]);
        self.config(place, offset.into(), &mut one);
        let address = 1 << 31 | place << 11 | u32::from(offset & 0xfc);
        self.pio.write(ports.start, &address.to_le_bytes());
        self.pio.read(ports.start + 4 + u64::from(offset & 3), &mut other);
        assert_eq!(one, other, "device {place}, offset {offset:#x}");
    }

    /// What holds at any time.
    fn look(&self) {
        for (index, place) in PLACES.into_iter().enumerate() {
            let mut id = [0; 4];
            self.config(place, 0, &mut id);
            assert_eq!(id[..2], [0xf4, 0x1a], "device {place} is another one");
            let Some(bar) = self.place_of(place) else { continue };
            let mut queues = [0; 2];
            self.mmio.read(bar.wrapping_add(QUEUES), &mut queues);
            let in_window = bar >= PCI_MEMORY.start && bar <= PCI_MEMORY.end() - BAR_SIZE;
            let others = PLACES.into_iter().filter(|other| *other != place);
            let alone = others.filter_map(|other| self.place_of(other)).all(|other| other != bar);
            let ecam = bar.wrapping_sub(ECAM.start) < ECAM.size;
            match u16::from_le_bytes(queues) {
                // Nobody: there, or another one was there first.
                0xffff => {}
                _ if ecam => {}
                count => assert!(in_window && (count == self.queues[index] || !alone), "{bar:#x}: {count}"),
            }
        }
    }

    fn turn(&mut self) {
        let _ = (0..100).find(|_| !self.by_hand.turn().unwrap());
    }

    /// Stops it for good.
    fn save(&mut self) -> Vec<Vec<u8>> {
        for transport in &self.transports {
            transport.lock().unwrap().pause(std::sync::mpsc::channel().0);
        }
        self.turn();
        let mut state: Vec<_> =
            self.transports.iter().map(|transport| transport.lock().unwrap().save_state().unwrap()).collect();
        state.push(self.root.lock().unwrap().save_state().unwrap());
        state
    }

    fn restore(&self, state: &[Vec<u8>]) -> alula::error::Result<()> {
        for (transport, state) in self.transports.iter().zip(state) {
            transport.lock().unwrap().restore_state(state)?;
        }
        self.root.lock().unwrap().restore_state(&state[self.transports.len()])
    }

    fn resume(&self) {
        for transport in &self.transports {
            transport.lock().unwrap().resume();
        }
    }

    /// Set up by a sound driver, every function answers where it was put.
    fn conclude(&self) {
        for place in PLACES {
            self.set_config(place, COMMAND, &[0, 0]);
        }
        for (place, queues) in PLACES.into_iter().zip(&self.queues) {
            let bar = PCI_MEMORY.start + u64::from(place) * BAR_SIZE;
            self.set_config(place, BAR, &bar.to_le_bytes());
            self.set_config(place, COMMAND, &COMMAND_MEMORY.to_le_bytes());
            let mut count = [0; 2];
            self.mmio.read(bar + QUEUES, &mut count);
            assert_eq!(u16::from_le_bytes(count), *queues, "device {place} does not answer");
        }
    }
}

/// The bus and its root know each other.
impl Drop for World {
    fn drop(&mut self) {
        self.mmio.detach(ECAM.start);
    }
}
