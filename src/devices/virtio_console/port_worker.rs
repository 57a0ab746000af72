//! The running half of a port: bytes both ways between the program of the host that is there and the guest's, and
//! messages of who is there.
//!
//! Bytes that the guest sends stay in its own memory until a program of the host takes them, and those that a program of
//! the host sends stay in its socket until the guest does: nothing is kept here, whatever either of them floods the other with.

use std::sync::{Arc, PoisonError};

use vm_memory::GuestAddressSpace;

use super::control::LENGTH;
use super::outgoing::Outgoing;
use super::port::Metrics;
use super::port_client::{Home, Port};
use super::{BYTES_PER_TURN, F_MULTIPORT, RECEIVE, TRANSMIT};
use crate::error::{Error, Result};
use crate::memory::{Memory, Regions};
use crate::poll::Interest;
use crate::sys::vectors::Room;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Desk, Io, Queue, Registrar, Worker};

/// The control queues (virtio 1.3, 5.3.2): what the guest is told, and what the guest says.
const TOLD: u32 = 2;
const SAID: u32 = 3;
const LISTENER: u32 = 4;
const CLIENT: u32 = 5;

/// The worker.
pub struct Running {
    memory: Memory,
    receive: Queue,
    transmit: Outgoing,
    told: Queue,
    said: Queue,
    buffers: Buffers,
    room: Room,
    /// The driver speaks of ports. One that does not has one port, which is open.
    is_multiport: bool,
    desk: Option<Desk>,
    port: Box<Port>,
    home: Home,
    metrics: Arc<Metrics>,
}

impl Running {
    /// Takes the port from its home.
    pub fn new(io: Io, home: &Home, metrics: &Arc<Metrics>) -> Result<Self> {
        let Io { memory, features, queues, .. } = io;
        let [receive, transmit, told, said] =
            <[Queue; 4]>::try_from(queues).ok().expect("four queues were asked for");
        let port = home.lock().unwrap_or_else(PoisonError::into_inner).take();
        let port = port.ok_or_else(|| Error::host("an earlier worker still has the port"))?;
        Ok(Self {
            receive,
            transmit: Outgoing::new(&memory, transmit, port.gone),
            told,
            said,
            buffers: Buffers::new(memory.clone()),
            room: Room::default(),
            is_multiport: features & F_MULTIPORT != 0,
            desk: None,
            port,
            home: home.clone(),
            metrics: metrics.clone(),
            memory,
        })
    }

    /// Takes what the guest says of the port.
    fn hear(&mut self, memory: &Regions) -> Result<()> {
        let Self { said, port, metrics, .. } = self;
        said.serve(memory, |chain| {
            let mut message = [0; LENGTH];
            if !chain.read_front(&mut message) || !port.talk.hear(message) {
                metrics.control_fails.add(1);
            }
            Ok(Some(0))
        })
    }

    /// Tells the guest what there is to say of the port, as far as it gives buffers.
    fn tell(&mut self, memory: &Regions) -> Result<()> {
        let Self { told, port, buffers, .. } = self;
        let mut later = port.talk;
        if later.say(&port.name, port.client.is_some()).is_none() {
            return Ok(());
        }
        told.serve(memory, |chain| {
            buffers.clear();
            let room = buffers.add_writable(chain)?;
            let Some(message) = port.talk.say(&port.name, port.client.is_some()) else { return Ok(None) };
            if message.len() > room {
                return Err(Error::guest(format!(
                    "the driver gave a control buffer of {room} bytes, too small for a message of {}",
                    message.len()
                )));
            }
            buffers.copy_from(0, &message);
            Ok(Some(message.len() as u32))
        })
    }

    /// Gives the guest what the program has sent, as far as it gives buffers.
    fn receive(&mut self, memory: &Regions) -> Result<()> {
        let Self { receive, buffers, port, metrics, is_multiport, .. } = self;
        let Port { client: Some(client), talk, .. } = &mut **port else { return Ok(()) };
        // A driver throws away what comes for a port that nobody has open.
        if *is_multiport && !(talk.is_open && talk.told_open) || !client.may_read() {
            return Ok(());
        }
        let mut left = BYTES_PER_TURN;
        receive.serve_within(memory, |chain, share| {
            buffers.clear();
            if buffers.add_writable(chain)? == 0 {
                return Ok(Some(0));
            }
            let Some(count) = client.read(buffers) else { return Ok(None) };
            metrics.rx_bytes_count.add(count as u64);
            left = left.saturating_sub(count);
            share.use_up_if(left == 0);
            Ok(Some(count as u32))
        })
    }

    /// Gives the program what the guest has sent, as far as it takes that. Without a program, all of it waits.
    fn transmit(&mut self, memory: &Regions) -> Result<()> {
        let Self { transmit, room, port, metrics, .. } = self;
        let Some(client) = &mut port.client else { return Ok(()) };
        transmit.send(memory, |buffers, most| {
            let mut list = room.gather();
            list.add(buffers.vectors(), 0, most);
            let count = client.write(&mut list);
            metrics.tx_bytes_count.add(count as u64);
            Ok(count)
        })
    }
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.receive, RECEIVE)?;
        registrar.kick(self.transmit.queue(), TRANSMIT)?;
        registrar.kick(&self.told, TOLD)?;
        registrar.kick(&self.said, SAID)?;
        // Edge-triggered: programs that are not let in yet must not keep the loop awake.
        registrar.add(&self.port.listener, Interest::IN | Interest::EDGE_TRIGGERED, LISTENER)?;
        let desk = registrar.desk().clone();
        self.port.watch(&desk, CLIENT)?;
        self.desk = Some(desk);
        // A program that has connected before is let in now.
        self.handle_ready(LISTENER, Interest::empty())
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        self.handle_ready(token, Interest::empty())
    }

    fn handle_ready(&mut self, token: u32, ready: Interest) -> Result<()> {
        let memory = self.memory.memory();
        match (token, &mut self.port.client) {
            (SAID, _) => self.hear(&memory)?,
            (CLIENT, Some(client)) => client.note(ready),
            _ => {}
        }
        self.transmit(&memory)?;
        self.receive(&memory)?;
        self.port.let_go();
        // The guest is told that a program has left before the next one is let in.
        self.tell(&memory)?;
        if let Some(desk) = &self.desk
            && self.port.accept(desk, CLIENT)?
        {
            self.metrics.clients_count.add(1);
            self.tell(&memory)?;
            self.transmit(&memory)?;
        }
        Ok(())
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        let Self { receive, transmit, told, said, mut port, home, .. } = *self;
        let (transmit, gone) = transmit.stop();
        port.rest();
        port.gone = gone;
        *home.lock().unwrap_or_else(PoisonError::into_inner) = Some(port);
        vec![receive, transmit, told, said]
    }
}
