//! What comes of the guest's packets.

use super::connection::{Key, Phase};
use super::mux::{CONNECTING_MAX, Mux};
use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_SEND, STREAM, op};
use crate::error::Result;
use crate::log;

impl Mux {
    /// Takes a packet of the guest's. Returns the connection that its bytes are for, if it has any that are for
    /// somebody.
    pub(super) fn hear(&mut self, header: &Header) -> Result<Option<u32>> {
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            // Nobody else is reached from here, and nobody is answered who has not asked.
            self.metrics.tx_malformed_packets.add(1);
            return Ok(None);
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let Some(index) = self.find(key) else {
            match (header.op, header.kind) {
                (op::REQUEST, STREAM) => self.request(key, header)?,
                // A refusal of a refusal would have no end.
                (op::RST, _) => {}
                (_, kind) => self.refuse(key, kind),
            }
            return Ok(None);
        };
        let Some(connection) = self.get(index) else { return Ok(None) };
        connection.flow.hear(header.buf_alloc, header.fwd_cnt);
        if connection.flow.credit() > 0 {
            connection.has_asked = false;
            if connection.wants_to_read() {
                self.queue(index);
            }
        }
        if header.kind != STREAM {
            self.kill(index);
            return Ok(None);
        }
        self.hear_of(index, key, header)
    }

    /// The same of a connection that there is.
    fn hear_of(&mut self, index: u32, key: Key, header: &Header) -> Result<Option<u32>> {
        let Some(connection) = self.get(index) else { return Ok(None) };
        match (header.op, &connection.phase) {
            (op::RST, _) => {
                self.metrics.conns_killed.add(1);
                self.leave(index);
            }
            // It has not heard yet that it is over.
            (_, Phase::Reset) => {}
            (op::RW, Phase::Open) => {
                let may_send = connection.guest_shut & SHUTDOWN_SEND == 0;
                if may_send && connection.flow.receive(header.len) {
                    return Ok((header.len > 0).then_some(index));
                }
                log::guest_debug(format_args!("the guest sent port {} more than it may", key.host_port));
                self.kill(index);
            }
            (op::CREDIT_UPDATE, Phase::Open) => {}
            (op::CREDIT_REQUEST, Phase::Open) => {
                connection.owed.credit = true;
                self.queue(index);
            }
            (op::SHUTDOWN, Phase::Open) => {
                connection.guest_shut |= header.flags & SHUTDOWN_BOTH;
                self.settle(index)?;
            }
            (op::RESPONSE, Phase::Requested) => self.open_to_host(index)?,
            // The guest has closed its end, and what it has sent is kept: its port is free again.
            (op::REQUEST, Phase::Open) if connection.guest_shut == SHUTDOWN_BOTH => {
                self.detach(index);
                self.request(key, header)?;
            }
            _ => self.kill(index),
        }
        Ok(None)
    }

    /// The guest wants to connect to a program of the host.
    fn request(&mut self, key: Key, header: &Header) -> Result<()> {
        let is_full = self.connecting() >= CONNECTING_MAX;
        let added = (!is_full).then(|| self.add(key, Phase::Connecting(None), None)).flatten();
        let Some(index) = added else {
            self.metrics.conns_refused.add(u64::from(is_full));
            self.refuse(key, STREAM);
            return Ok(());
        };
        self.name(index, key);
        if let Some(connection) = self.get(index) {
            connection.flow.hear(header.buf_alloc, header.fwd_cnt);
        }
        self.connect(index)
    }

    /// The guest knows of the connection no more. What it has sent before is still for the host's program.
    fn leave(&mut self, index: u32) {
        let Some(connection) = self.get(index) else { return };
        match connection.backlog.is_empty() {
            true => self.remove(index),
            false => {
                connection.guest_shut = SHUTDOWN_BOTH;
                self.detach(index);
            }
        }
    }
}
