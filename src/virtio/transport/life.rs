//! Whether a device runs: started on its loops, stopped with its queues given back, and why.

use std::any::Any;
use std::sync::mpsc::{Sender, channel};

use serde_json::Value;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::{DRIVER_OK, FEATURES_OK, NEEDS_RESET, Phase, QueueRegisters, Stopping, Transport};
use crate::error::{Error, Result};
use crate::history::{self, Event};
use crate::host::Host;
use crate::log;
use crate::virtio::workers::Job;
use crate::virtio::{F_EVENT_IDX, Gone, Io, Queue, VirtioDevice};

impl Transport {
    /// Starts it, soon, if everything is for it.
    pub(super) fn go_on(&mut self) {
        let wanted = self.status & (DRIVER_OK | FEATURES_OK | NEEDS_RESET) == DRIVER_OK | FEATURES_OK;
        if wanted && self.is_master && !self.paused && !self.resetting && self.phase == Phase::Idle {
            self.phase = Phase::Starting;
            self.loops[0].post(Job::Start(self.this()));
        }
    }

    /// Called by the first loop: builds the queues, starts the device and deals out its workers.
    pub(in crate::virtio) fn start(&mut self) {
        // Stopped meanwhile, before it began.
        if self.phase != Phase::Starting {
            return;
        }
        log::guest_debug(format_args!(
            "{} starts: its driver wants features {:#x}",
            self.name, self.driver_features
        ));
        self.phase = Phase::Running;
        self.is_used = true;
        let (memory, features) = (self.memory.clone(), self.driver_features);
        let interrupts = self.interrupts.clone();
        match self
            .build_queues()
            .and_then(|queues| self.device.start(Io { memory, features, queues, interrupts }))
        {
            Ok(workers) => {
                for (index, _) in self.queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
                    // A counter that is full says the same.
                    let _ = self.kicks[index].write(1);
                }
                // With the lock held: a stop that comes now comes after the workers.
                for (worker, event_loop) in workers.into_iter().zip(self.loops.iter().cycle()) {
                    event_loop.post(Job::Add(worker, self.this()));
                }
            }
            Err(error) => {
                self.metrics.activate_fails.add(1);
                self.phase = Phase::Idle;
                self.fail(&error);
            }
        }
        self.show();
    }

    fn build_queues(&self) -> Result<Vec<Queue>> {
        let build = |index: usize| {
            let ring = self.ring(index)?;
            Ok(Queue::new(ring, self.kicks[index].clone(), index, self.interrupts.clone()))
        };
        (0..self.queues.len()).map(build).collect()
    }

    /// The ring of a queue as the registers have it; one that the driver did not set up is not ready.
    pub(super) fn ring(&self, index: usize) -> Result<virtio_queue::Queue> {
        let QueueRegisters { size, ready, descriptors, driver, device, next_avail, next_used } =
            self.queues[index];
        let max = self.device.queue_sizes()[index];
        let broken = |what: &str| Error::guest(format!("the driver set up queue {index} with {what}"));
        let mut ring = virtio_queue::Queue::new(max).map_err(|_| broken("no size"))?;
        if ready {
            ring.try_set_size(size).map_err(|_| broken("a wrong size"))?;
            ring.try_set_desc_table_address(vm_memory::GuestAddress(descriptors))
                .and_then(|()| ring.try_set_avail_ring_address(vm_memory::GuestAddress(driver)))
                .and_then(|()| ring.try_set_used_ring_address(vm_memory::GuestAddress(device)))
                .map_err(|_| broken("unaligned rings"))?;
            ring.set_event_idx(self.driver_features & F_EVENT_IDX != 0);
            ring.set_next_avail(next_avail);
            ring.set_next_used(next_used);
            ring.set_ready(true);
            if !ring.is_valid(&*self.memory.memory()) {
                return Err(broken("rings outside memory"));
            }
        }
        Ok(ring)
    }

    /// Ends the workers, soon: every loop gives back the queues it has.
    pub(super) fn stop(&mut self) {
        let asked = self.loops.iter().filter(|event_loop| event_loop.post(Job::Stop(self.this()))).count();
        match asked {
            // There is no thread to run on.
            0 => drop(self.returned(Vec::new())),
            asked => self.phase = Phase::Stopping(asked),
        }
    }

    /// The driver wants the device to reach its memory no more.
    pub(super) fn stop_for_driver(&mut self) -> Stopping {
        if matches!(self.phase, Phase::Starting | Phase::Running) {
            self.stop();
        }
        // Who turns a loop by hand would wait for himself.
        let is_waited_for = self.phase != Phase::Idle && self.loops.iter().all(|it| it.has_thread());
        Stopping(is_waited_for.then(|| {
            let (sender, stopped) = channel();
            self.waiting.push(sender);
            stopped
        }))
    }

    /// The driver gives the function bus mastering, or takes it away (PCI Local Bus 3.0, 6.2.2). A device from
    /// which it was taken stops, and is no longer ready: a kernel that is started over this one gives bus
    /// mastering back before it resets the device, whose rings are not there any more.
    pub fn set_bus_master(&mut self, is_master: bool) -> Stopping {
        self.is_master = is_master;
        if is_master {
            self.go_on();
            return Stopping(None);
        }
        self.status &= !DRIVER_OK;
        self.stop_for_driver()
    }

    /// Whether it may reach memory: its driver has not taken bus mastering away.
    pub fn is_master(&self) -> bool {
        self.is_master
    }

    /// The same as saved state has it, before it runs for the first time.
    pub fn restore_bus_master(&mut self, is_master: bool) {
        self.is_master = is_master;
    }

    /// Called by each loop: none of the device's workers is left there, and these are their queues. Whoever waits
    /// for the device to stop is told when the answer is dropped: by a loop once it has let go of the device,
    /// which may be closed then.
    pub(in crate::virtio) fn returned(&mut self, queues: Vec<Queue>) -> Vec<Sender<()>> {
        for queue in queues {
            let registers = &mut self.queues[queue.index()];
            (registers.next_avail, registers.next_used) = queue.position();
        }
        match self.phase {
            Phase::Stopping(left @ 2..) => {
                self.phase = Phase::Stopping(left - 1);
                Vec::new()
            }
            _ => {
                self.phase = Phase::Idle;
                log::guest_debug(format_args!("{} is stopped", self.name));
                self.stopped()
            }
        }
    }

    /// The device has stopped. Whoever waits for that is told when the answer is dropped.
    pub(super) fn stopped(&mut self) -> Vec<Sender<()>> {
        if std::mem::take(&mut self.resetting) {
            if std::mem::take(&mut self.is_used) {
                self.device.reset();
            }
            self.reset_registers();
            self.show();
            log::guest_debug(format_args!("{} is reset by its driver", self.name));
        }
        let waiting = std::mem::take(&mut self.waiting);
        self.go_on();
        waiting
    }

    /// The device cannot go on: it asks its driver for a reset (virtio 1.2, 2.1.2).
    pub(in crate::virtio) fn fail(&mut self, error: &Error) {
        log::guest_line(format_args!("{} stopped and waits for a reset: {error}", self.name));
        history::tell(|| Event::DeviceError {
            device: self.name.clone(),
            reason: history::text(error),
            needs_reset: true,
        });
        self.metrics.event_fails.add(1);
        self.status |= NEEDS_RESET;
        self.show();
        if self.status & DRIVER_OK != 0 {
            self.interrupts.configuration_change();
        }
        if self.phase == Phase::Running {
            self.stop();
        }
    }

    /// Stops the device until `resume`; `stopped` is dropped once it touches neither guest memory nor
    /// interrupts any more.
    pub fn pause(&mut self, stopped: Sender<()>) {
        self.paused = true;
        if self.phase != Phase::Idle {
            self.waiting.push(stopped);
            if matches!(self.phase, Phase::Starting | Phase::Running) {
                self.stop();
            }
        }
    }

    /// The device, as it is at power-on, for another machine. It must have been paused, and this machine goes: nobody starts
    /// what is in its place.
    pub fn take_device(&mut self) -> Box<dyn VirtioDevice> {
        let mut device = std::mem::replace(&mut self.device, Box::new(Gone));
        device.power_on();
        device
    }

    /// Lets it go on, on the same queues. A device that was restored interrupts for each of its queues: an
    /// interrupt may have been under way when the device was saved. One too many finds nothing used, which
    /// drivers are made for (virtio 1.2, 2.7.7.1).
    pub fn resume(&mut self) {
        self.paused = false;
        let was_restored = std::mem::take(&mut self.was_restored);
        if was_restored && self.device.take_news() {
            self.configuration_changed();
        }
        if was_restored && self.status & DRIVER_OK != 0 {
            for (index, _) in self.queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
                if let Some(event) = self.interrupts.used_buffer(index) {
                    // A counter that is full has interrupted the driver already.
                    let _ = event.write(1);
                }
            }
        }
        self.go_on();
    }

    /// The answer to a client that asks about the device (`VirtioDevice::tell`).
    pub fn tell(&self, what: &str) -> Result<Value> {
        self.device.tell(what)
    }

    /// The user changes the device, which is paused (`VirtioDevice::patch`).
    pub fn patch(&mut self, change: &dyn Any, host: &mut Host) -> Result<()> {
        if self.device.patch(change, host)? {
            self.configuration_changed();
        }
        Ok(())
    }
}
