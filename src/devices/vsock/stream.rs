//! Bytes from the guest on their way to the programs of the host, and the ends of both.

use std::net::Shutdown;

use super::connection::Phase;
use super::mux::Mux;
use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::socket;
use crate::error::Result;
use crate::log;
use crate::sys::vectors::{Gather, Room, VECTORS_MAX};

impl Mux {
    /// Gives the host's program what the guest has sent, and keeps what it does not take now.
    pub(super) fn forward(&mut self, index: u32, list: &mut Gather<'_>) -> Result<()> {
        let Some((connection, blocks, metrics)) = self.split(index) else { return Ok(()) };
        let length = list.len();
        metrics.tx_bytes_count.add(length as u64);
        let Some(stream) = connection.stream.as_mut().filter(|_| !connection.host_is_deaf) else {
            // Nobody reads it, which the guest is told.
            connection.flow.forward(length as u32, &mut blocks.promises);
            return Ok(());
        };
        let was_empty = connection.backlog.is_empty();
        if was_empty {
            let (written, calls) = socket::write(list, stream);
            metrics.tx_call_count.add(calls);
            match written {
                Ok(count) => connection.flow.forward(count as u32, &mut blocks.promises),
                Err(_) => return self.deafen(index),
            }
        }
        if !list.is_empty() {
            if !socket::keep(list, &mut connection.backlog, blocks) {
                log::guest_debug(format_args!(
                    "a vsock connection is reset: programs of the host that do not read use up all memory for it"
                ));
                metrics.conns_refused.add(1);
                self.kill(index);
                return Ok(());
            }
            if was_empty {
                stream.want_room(true)?;
            }
        }
        self.tell_of_room(index);
        Ok(())
    }

    /// Gives the host's program what was kept for it, as much as it takes now.
    pub(super) fn flush(&mut self, index: u32) -> Result<()> {
        let mut room = std::mem::take(&mut self.room);
        let written = self.write_backlog(index, &mut room);
        self.room = room;
        if !written? {
            return self.deafen(index);
        }
        self.tell_of_room(index);
        self.settle(index)
    }

    /// False: the program of the host takes nothing any more.
    fn write_backlog(&mut self, index: u32, room: &mut Room) -> Result<bool> {
        let Some((connection, blocks, metrics)) = self.split(index) else { return Ok(true) };
        let Some(stream) = &mut connection.stream else { return Ok(true) };
        let mut list = room.gather();
        // The list takes as much as one system call does.
        connection.backlog.pieces(blocks, |piece| {
            list.add_bytes(piece);
            list.count() < VECTORS_MAX
        });
        let (written, calls) = socket::write(&mut list, stream);
        metrics.tx_call_count.add(calls);
        let Ok(count) = written else { return Ok(false) };
        connection.backlog.advance(blocks, count);
        connection.flow.forward(count as u32, &mut blocks.promises);
        if connection.backlog.is_empty() {
            stream.want_room(false)?;
        }
        Ok(true)
    }

    /// Tells the guest that it may send more, when that is worth a packet.
    fn tell_of_room(&mut self, index: u32) {
        if let Some((connection, blocks, _)) = self.split(index)
            && connection.flow.owes_word(&blocks.promises)
        {
            connection.owed.credit = true;
            self.queue(index);
        }
    }

    /// The program of the host takes no bytes any more. It may send some still.
    fn deafen(&mut self, index: u32) -> Result<()> {
        let Some((connection, blocks, metrics)) = self.split(index) else { return Ok(()) };
        metrics.tx_write_fails.add(1);
        connection.backlog.clear(blocks);
        connection.flow.forward_all(&mut blocks.promises);
        connection.host_is_deaf = true;
        if let Some(stream) = &mut connection.stream {
            stream.want_room(false)?;
        }
        self.queue(index);
        self.look_whether_gone(index);
        self.settle(index)
    }

    /// A program of the host that has closed its end both ways is gone.
    pub(super) fn look_whether_gone(&mut self, index: u32) {
        let Some(connection) = self.get(index) else { return };
        if connection.stream.as_ref().is_some_and(|stream| socket::is_gone(stream)) {
            self.lose(index);
        }
    }

    /// The program of the host is gone.
    pub(super) fn lose(&mut self, index: u32) {
        let Some((connection, blocks, _)) = self.split(index) else { return };
        connection.backlog.clear(blocks);
        connection.flow.forward_all(&mut blocks.promises);
        connection.stream = None;
        (connection.host_ended, connection.host_is_deaf) = (true, true);
        match connection.is_detached {
            true => self.remove(index),
            false => self.queue(index),
        }
    }

    /// Tells the program of the host what the guest will not do any more, once it has everything that the guest
    /// has sent; ends what has ended both ways.
    pub(super) fn settle(&mut self, index: u32) -> Result<()> {
        let Some(connection) = self.get(index) else { return Ok(()) };
        if connection.is_over() {
            connection.stream = None;
            match connection.is_detached {
                true => self.remove(index),
                false => {
                    // By which the guest knows that everything has arrived.
                    self.set_phase(index, Phase::Reset);
                    self.queue(index);
                }
            }
            return Ok(());
        }
        let mut news = connection.guest_shut & !connection.passed_shut;
        if !connection.backlog.is_empty() {
            news &= !SHUTDOWN_SEND;
        }
        connection.passed_shut |= news;
        for (flag, how) in [(SHUTDOWN_SEND, Shutdown::Write), (SHUTDOWN_RECEIVE, Shutdown::Read)] {
            if news & flag != 0
                && let Some(stream) = &connection.stream
            {
                // It may be gone, which is told by its event.
                let _ = stream.shutdown(how);
            }
        }
        Ok(())
    }
}
