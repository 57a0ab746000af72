//! The API on the main loop: its sockets, and what their clients ask of the microVM.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use super::handle::Handler;
use super::server::Server;
use crate::error::Result;
use crate::jobs::Ticket;
use crate::microvm::Microvm;
use crate::microvm::monitor::Front;
use crate::poll::{Events, Ready};

/// The API, served.
pub struct Api {
    server: Server,
    handler: Handler,
}

impl Api {
    /// Listens at `path`, as [`Server::bind`] does.
    pub fn bind(path: &Path, body_max: usize) -> Result<Self> {
        Ok(Self { server: Server::bind(path, body_max)?, handler: Handler::default() })
    }
}

impl Front for Api {
    fn register(&mut self, events: &Events, token: u64) -> Result<()> {
        self.server.register(events, token)
    }

    fn handle(&mut self, ready: Ready, events: &Events, microvm: &mut Microvm) -> Result<bool> {
        let Self { server, handler } = self;
        let mut serve = |method: &str, path: &str, body: &[u8]| handler.serve(microvm, method, path, body);
        server.handle(ready, events, &mut serve)
    }

    fn job_ended(
        &mut self,
        (ticket, result): (Ticket, Result<Option<Value>>),
        events: &Events,
        microvm: &mut Microvm,
    ) -> Result<()> {
        let Self { server, handler } = self;
        let Some(response) = handler.job_ended(ticket, result) else { return Ok(()) };
        let mut serve = |method: &str, path: &str, body: &[u8]| handler.serve(microvm, method, path, body);
        server.answer(ticket, &response, events, &mut serve)
    }

    fn expires_at(&self) -> Option<Instant> {
        self.server.expires_at()
    }

    fn expire(&mut self, now: Instant, events: &Events) -> Result<()> {
        self.server.expire(now, events)
    }

    fn tell(&mut self, events: &Events) -> Result<()> {
        self.server.tell(events)
    }

    fn has_readers(&self) -> bool {
        self.server.has_readers()
    }

    fn is_behind(&self) -> bool {
        self.server.is_behind()
    }
}
