//! The network device (virtio 1.2, 5.1) over a TAP interface of the host, or over passt, which needs no
//! rights; the metadata service can answer beside it ([`answers`]). [`config`] is what can be said of an interface, [`device`] the device. [`tap`] and [`stream`] are what
//! carries the frames of a pair of queues, each with its way in and its batches; [`transmit`] is the way out, over
//! either.

mod answers;
mod config;
mod control;
mod device;
mod features;
mod header;
mod metrics;
mod status;
mod stream;
mod tap;
mod transmit;

pub use config::{Config, Mac, Patch, Publish, User, publish};
pub use stream::framing;

/// Frames moved in one turn; then other devices of the loop have theirs.
const TURN: usize = 256;
