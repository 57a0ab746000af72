//! Queues of a device that an io thread works with, until somebody stops the device or ends the thread
//! (`src/virtio/workers.rs`, `src/virtio/transport.rs`).

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use super::inbox::{Inbox, Wake};

/// The counter by which a loop is woken (eventfd(2)), as level-triggered epoll sees it.
#[derive(Default)]
struct Counter {
    count: Mutex<u32>,
    written: Condvar,
}

impl Counter {
    fn wait(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.written.wait(count).unwrap();
        }
    }
}

impl Wake for Counter {
    fn wake(&self) {
        *self.count.lock().unwrap() += 1;
        self.written.notify_one();
    }

    fn hush(&self) {
        *self.count.lock().unwrap() = 0;
    }
}

enum Job {
    Start(Arc<Device>),
    Stop(Arc<Device>),
    End,
}

/// A device with one queue, as its transport has it.
#[derive(Default)]
struct Device {
    /// The position in the queue: whoever has the queue reads and writes it without a lock.
    position: UnsafeCell<u32>,
    /// The queue is back.
    is_back: Mutex<bool>,
    came_back: Condvar,
}

impl Device {
    /// Takes a request from the queue. loom fails the case if somebody else does so at the same time.
    fn work(&self) {
        // SAFETY: loom watches each use, and ends the case at the first that another thread's may meet.
        self.position.with_mut(|position| unsafe { *position += 1 });
    }

    fn give_back(&self) {
        *self.is_back.lock().unwrap() = true;
        self.came_back.notify_one();
    }

    fn wait(&self) {
        let mut is_back = self.is_back.lock().unwrap();
        while !*is_back {
            is_back = self.came_back.wait(is_back).unwrap();
        }
    }
}

struct Loop(Inbox<Job, Counter>);

impl Loop {
    fn new() -> Arc<Self> {
        Arc::new(Self(Inbox::new(Counter::default())))
    }

    /// The loop's thread (`Loop::run`, `Seats::handle_all`).
    fn run(&self) {
        let mut device = None;
        'turns: loop {
            self.0.wake.wait();
            if !self.0.has_jobs() {
                continue;
            }
            for job in self.0.take() {
                match job {
                    Job::Start(new) => {
                        new.work();
                        device = Some(new);
                    }
                    Job::Stop(old) => {
                        device = None;
                        old.give_back();
                    }
                    Job::End => break 'turns,
                }
            }
            device.iter().for_each(|device| device.work());
        }
        drop(device);
        for job in self.0.close() {
            if let Job::Stop(device) = job {
                device.give_back();
            }
        }
    }
}

#[test]
fn a_queue_is_handed_over_and_comes_back_in_every_order() {
    loom::model(|| {
        let (this, device) = (Loop::new(), Arc::new(Device::default()));
        let running = this.clone();
        let thread = thread::spawn(move || running.run());
        this.0.attend();
        // Whoever has the device has its queue, before and after.
        device.work();
        assert!(this.0.post(Job::Start(device.clone())));
        assert!(this.0.post(Job::Stop(device.clone())));
        device.wait();
        device.work();
        this.0.post_last(Job::End);
        assert!(!this.0.post(Job::Stop(device)), "nobody is there any more");
        thread.join().unwrap();
    });
}

/// A vCPU resets its device while the machine ends.
#[test]
fn who_waits_for_a_queue_has_it_back_though_its_loop_ends() {
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(super::PREEMPTIONS);
    bounded.check(|| {
        let (this, device) = (Loop::new(), Arc::new(Device::default()));
        let running = this.clone();
        let thread = thread::spawn(move || running.run());
        this.0.attend();
        assert!(this.0.post(Job::Start(device.clone())));
        let (asking, asked) = (this.clone(), device.clone());
        let vcpu = thread::spawn(move || {
            if asking.0.post(Job::Stop(asked.clone())) {
                asked.wait();
                asked.work();
            }
        });
        this.0.post_last(Job::End);
        thread.join().unwrap();
        vcpu.join().unwrap();
        // Nobody else is there: the queue is the device's, wherever it was.
        device.work();
    });
}
