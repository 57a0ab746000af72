//! What the agent in a guest and those who ask it say to each other (docs/agent.md): spoken by both sides.

pub mod frame;
pub mod request;

/// The vsock port that agents listen on. Ports below 1024 are root's: nobody else in a guest can take it.
pub const PORT: u32 = 52;
/// The port of the host that an agent connects to once it listens on [`PORT`]: by that a monitor learns that there
/// is somebody to ask, without asking again and again. Nobody need listen there.
pub const READY_PORT: u32 = 1_000_052;
/// The port of the guest that the agent does so from: root's alone, as all below 1024 are, so that no other user of
/// the guest can tell the monitor that.
pub const READY_FROM: u32 = 51;

/// Whether a connection from this port of the guest is one that only root can make.
pub fn is_of_root(guest_port: u32) -> bool {
    guest_port < 1024
}
