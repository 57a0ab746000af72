//! A device that is stopped or reset has stopped when the driver or the machine is told so.

use super::*;

#[test]
fn a_reset_device_is_like_a_new_one() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        let new = guest.save();
        guest.start(F_EVENT_IDX);
        host.exercise(device, &mut guest, 1);
        guest.reset();
        assert_eq!(guest.save()[0], new[0]);
        // With other features, and in the middle of a request.
        guest.start(0);
        host.offer(device, &mut guest, 2);
        kick_all(&mut guest);
        guest.reset();
        assert_eq!(guest.save()[0], new[0]);
        drop(guest);
        let mut guest = host.guest(kind, device);
        guest.start(0);
        if is_net(device) {
            // The frame of the request that the reset cut short may have left.
            host.wire.discard();
        }
        host.exercise(device, &mut guest, 3);
    });
}

/// The two ways in which a driver tells a device to touch its memory no more: true, the device is behind PCI.
fn stop_by(guest: &mut Guest, by_mastering: bool) {
    match by_mastering {
        true => assert!(guest.set_bus_master(false)),
        false => guest.set_status(0),
    }
}

#[test]
fn nothing_is_written_once_a_driver_has_stopped_its_device() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        for round in 0..20_u8 {
            let by_mastering = kind == TransportKind::Pci && round % 2 == 1;
            if kind == TransportKind::Pci {
                guest.set_bus_master(true);
            }
            guest.start(F_EVENT_IDX);
            // As many requests as the smallest ring holds: some are done by then, some are not.
            for request in 0..5 {
                host.offer(device, &mut guest, 5 * round + request);
            }
            kick_all(&mut guest);
            if is_net(device) {
                (0..5).for_each(|_| host.wire.send(&[0xff; 60]));
            }
            std::thread::sleep(std::time::Duration::from_micros(40 * u64::from(round)));
            stop_by(&mut guest, by_mastering);
            // The memory is somebody else's now.
            guest.fill(0, driver::MEMORY, round);
            assert_eq!(guest.status() & DRIVER_OK, 0, "it still runs");
            if !by_mastering {
                assert_eq!(guest.status(), 0);
                guest.write(0x30, 0x16, 2, 0);
                assert_eq!(
                    [guest.read(0x44, 0x1c, 2), guest.read(0x80, 0x20, 4)],
                    [0, 0],
                    "queue 0 is set up"
                );
            }
            // Long enough for a device that goes on to show it.
            std::thread::sleep(std::time::Duration::from_millis(10));
            // Compared at once: a debug build takes long for four million bytes one by one.
            let is_as_filled =
                guest.bytes((0, driver::MEMORY as u32)) == vec![round; driver::MEMORY as usize];
            assert!(is_as_filled, "round {round}: the device wrote to memory that was taken from it");
            guest.notes.allocated = 0;
        }
        if kind == TransportKind::Pci {
            guest.set_bus_master(true);
        }
        guest.start(0);
        if is_net(device) {
            host.wire.discard();
        }
        host.exercise(device, &mut guest, 101);
    });
}

#[test]
fn a_device_whose_bus_mastering_was_taken_waits_for_its_driver() {
    Host::new().each(|host, kind, device| {
        if kind != TransportKind::Pci {
            return;
        }
        let mut guest = host.guest(kind, device);
        guest.set_bus_master(true);
        guest.start(F_EVENT_IDX);
        host.exercise(device, &mut guest, 1);
        guest.set_bus_master(false);
        // The next kernel allows bus mastering again before it resets the device, whose rings are gone by then.
        let before = used(&guest);
        let check = host.offer(device, &mut guest, 2);
        kick_all(&mut guest);
        guest.set_bus_master(true);
        guest.pause();
        let suspended = guest.suspend();
        let mut guest = host.guest(kind, device);
        guest.take_over(&suspended).unwrap();
        guest.resume();
        guest.pause();
        guest.resume();
        assert_eq!(used(&guest), before, "it went on without its driver");
        // The driver says that it is ready while the device may not reach memory, and then while it may.
        guest.set_bus_master(false);
        guest.set_status(11 | DRIVER_OK);
        guest.pause();
        guest.resume();
        assert_eq!(used(&guest), before, "it went on without bus mastering");
        guest.set_bus_master(true);
        host.check(&mut guest, check);
        // A device would stand still for ever after a restore from a state that has bus mastering in the function's
        // register, but not in the device.
        guest.pause();
        guest.set_bus_master(false);
        let mut state = guest.save();
        drop(guest);
        host.guest(kind, device).restore(&state).unwrap();
        // Version, length of the configuration space, and its command register.
        let command = 1 + 2 + 4;
        assert_eq!(state[1][command], 2);
        state[1][command] = 6;
        let error = host.guest(kind, device).restore(&state).unwrap_err().to_string();
        assert!(error.contains("is a bus master, and its device is not"), "{error}");
    });
}

/// A device whose worker has something in flight when it is stopped, for as long as the test says.
struct Lingering(Arc<InFlight>);

#[derive(Default)]
struct InFlight {
    /// How many workers were started, asked to stop, may, and have.
    started: AtomicU32,
    asked: AtomicU32,
    may: AtomicU32,
    done: AtomicU32,
}

impl InFlight {
    /// Nothing is in flight when it is stopped.
    fn free() -> Self {
        Self { may: u32::MAX.into(), ..Self::default() }
    }
}

struct LingeringWorker(Queue, Arc<InFlight>);

impl Snapshot for Lingering {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Lingering {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let worker = |queue| -> Box<dyn Worker> { Box::new(LingeringWorker(queue, self.0.clone())) };
        Ok(io.queues.into_iter().map(worker).collect())
    }
}

impl Worker for LingeringWorker {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        self.1.started.fetch_add(1, Ordering::SeqCst);
        registrar.kick(&self.0, 0)
    }
    fn handle(&mut self, _token: u32) -> Result<()> {
        Ok(())
    }
    fn stop(self: Box<Self>) -> Vec<Queue> {
        let asked = self.1.asked.fetch_add(1, Ordering::SeqCst) + 1;
        wait_for(|| self.1.may.load(Ordering::SeqCst) >= asked);
        self.1.done.fetch_add(1, Ordering::SeqCst);
        vec![self.0]
    }
}

#[test]
fn a_vcpu_waits_for_what_is_in_flight_and_nobody_for_it() {
    for (kind, by_mastering) in
        [(TransportKind::Mmio, false), (TransportKind::Pci, false), (TransportKind::Pci, true)]
    {
        let in_flight = Arc::new(InFlight::default());
        let mut guest = Guest::new(kind, Box::new(Lingering(in_flight.clone())));
        let transport = guest.transport.clone();
        for round in 1..=3 {
            guest.set_bus_master(true);
            guest.start(0);
            wait_for(|| in_flight.started.load(Ordering::SeqCst) == round);
            std::thread::scope(|scope| {
                let vcpu = scope.spawn(|| {
                    stop_by(&mut guest, by_mastering);
                    in_flight.done.load(Ordering::SeqCst)
                });
                wait_for(|| in_flight.asked.load(Ordering::SeqCst) == round);
                // Meanwhile the user looks at the machine and pauses it.
                let (sender, stopped) = std::sync::mpsc::channel();
                drop(transport.lock().unwrap().metrics(View::Total));
                transport.lock().unwrap().pause(sender);
                assert_eq!(stopped.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
                in_flight.may.store(round, Ordering::SeqCst);
                assert_eq!(
                    vcpu.join().unwrap(),
                    round,
                    "{kind:?}: the write returned before the device stopped"
                );
                assert!(stopped.recv().is_err());
                transport.lock().unwrap().resume();
            });
        }
        assert_eq!(in_flight.started.load(Ordering::SeqCst), 3, "it was started again by itself");
    }
}

#[test]
fn a_device_that_was_reset_while_paused_waits_for_the_machine() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        guest.start(0);
        guest.pause();
        guest.reset();
        guest.start(0);
        let before = used(&guest);
        let check = host.offer(device, &mut guest, 1);
        kick_all(&mut guest);
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert_eq!(used(&guest), before);
        guest.resume();
        host.check(&mut guest, check);
    });
}

/// A device of two workers, whose user pauses it when the first of them is at work. The device does not own the
/// transport that owns it.
struct Two {
    transport: Arc<OnceLock<Weak<Mutex<Transport>>>>,
    handled: Arc<AtomicU32>,
}

struct OneOfTwo {
    queue: Queue,
    transport: Arc<OnceLock<Weak<Mutex<Transport>>>>,
    handled: Arc<AtomicU32>,
}

impl Snapshot for Two {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Two {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let worker = |queue| -> Box<dyn Worker> {
            let (transport, handled) = (self.transport.clone(), self.handled.clone());
            Box::new(OneOfTwo { queue, transport, handled })
        };
        Ok(io.queues.into_iter().map(worker).collect())
    }
}

impl Worker for OneOfTwo {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.queue, 0)
    }
    fn handle(&mut self, _token: u32) -> Result<()> {
        self.handled.fetch_add(1, Ordering::SeqCst);
        let transport = self.transport.get().unwrap().upgrade().unwrap();
        transport.lock().unwrap().pause(std::sync::mpsc::channel().0);
        Ok(())
    }
    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

#[test]
fn a_stop_waits_for_one_worker_not_for_all_that_are_ready() {
    let (transport, handled) = (Arc::new(OnceLock::new()), Arc::new(AtomicU32::new(0)));
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let two = Box::new(Two { transport: transport.clone(), handled: handled.clone() });
    let mut guest = Guest::by_hand(TransportKind::Mmio, two, memory);
    assert!(transport.set(Arc::downgrade(&guest.transport)).is_ok());
    // Both are kicked by the start.
    guest.start(0);
    guest.turn();
    assert_eq!(handled.load(Ordering::SeqCst), 1);
}

/// A device that notes by which thread it is started and reset, and does not start with a feature of its own.
#[derive(Clone, Default)]
struct Placed(Arc<Mutex<Vec<String>>>);

impl Placed {
    const FAILS: u64 = 1;

    fn note(&self, what: &str) {
        let thread = std::thread::current();
        self.0.lock().unwrap().push(format!("{what} by {}", thread.name().unwrap_or_default()));
    }
}

impl Snapshot for Placed {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Placed {
    fn device_type(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        Self::FAILS
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        self.note("start");
        if io.features & Self::FAILS != 0 {
            return Err(alula::error::Error::host("it cannot"));
        }
        let worker =
            |queue| -> Box<dyn Worker> { Box::new(LingeringWorker(queue, Arc::new(InFlight::free()))) };
        Ok(io.queues.into_iter().map(worker).collect())
    }
    fn reset(&mut self) {
        self.note("reset");
    }
}

#[test]
fn a_device_is_reset_by_the_thread_that_starts_it() {
    for kind in TRANSPORTS {
        let device = Placed::default();
        let mut guest = Guest::new(kind, Box::new(device.clone()));
        let noted = || std::mem::take(&mut *device.0.lock().unwrap());
        // At power-on there is nothing to reset.
        guest.reset();
        assert!(noted().is_empty());
        let start = |guest: &mut Guest, features: u64| {
            guest.start(features);
            wait_for(|| noted_by(&device) == ["start by io"]);
        };
        start(&mut guest, 0);
        guest.reset();
        assert_eq!(noted(), ["start by io", "reset by io"], "it ran");
        start(&mut guest, Placed::FAILS);
        wait_for(|| guest.status() & NEEDS_RESET != 0);
        guest.reset();
        guest.reset();
        assert_eq!(noted(), ["start by io", "reset by io"], "it could not run, and is reset once");
        guest.set_config(0, &[1]);
        guest.reset();
        assert_eq!(noted(), ["reset by io"], "its configuration was written");
        if kind == TransportKind::Pci {
            start(&mut guest, 0);
            guest.set_bus_master(false);
            guest.reset();
            guest.set_bus_master(true);
            assert_eq!(noted(), ["start by io", "reset by io"], "it was stopped before");
        }
        // In a machine built anew over its state, before anything else.
        start(&mut guest, 0);
        guest.pause();
        let state = guest.save();
        let again = Placed::default();
        let mut guest = Guest::new(kind, Box::new(again.clone()));
        guest.restore(&state).unwrap();
        guest.reset();
        assert_eq!(noted_by(&again), ["reset by io"]);
    }
}

fn noted_by(device: &Placed) -> Vec<String> {
    device.0.lock().unwrap().clone()
}

#[test]
fn a_driver_is_told_of_what_was_finished_when_its_disk_was_stopped() {
    let host = Host::new();
    let config = host.config();
    let fast = config.devices().find(|device| device.id() == "fast").unwrap();
    for kind in TRANSPORTS {
        let opened = fast.open("contract", &mut host::Host::default()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(kind, opened, memory);
        guest.start(F_EVENT_IDX);
        guest.turn();
        host.offer(fast, &mut guest, 1);
        guest.kick(0);
        // Asked for before the disk has seen the request, in whose turn it then is.
        guest.pause();
        assert_eq!((guest.used_index(0), guest.is_interrupted(Some(0))), (1, true), "{kind:?}");
    }
}
