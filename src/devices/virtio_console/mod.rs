//! The console device (virtio 1.3, 5.3): a console of the guest, `hvc0` in Linux, for whoever is at this terminal
//! ([`console`]), and ports with names, which are Unix sockets of the host ([`port`]). Each port is a device of its own:
//! it comes and goes alone, and a guest that floods one holds no other up.

pub mod console;
mod console_worker;
mod control;
mod outgoing;
pub mod port;
mod port_client;
mod port_worker;

/// The type of the device (virtio 1.3, 5).
const DEVICE_TYPE: u32 = 3;
/// Feature bits (5.3.3): the configuration tells the terminal's size; there are control queues.
const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u64 = 1 << 1;

/// Queues of both devices (5.3.2): what the guest receives, and what the guest sends.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;

/// Bytes that go one way in a turn; then other devices of the loop have theirs. A driver can name the same bytes again
/// and again, gigabytes in one request.
const BYTES_PER_TURN: usize = 64 << 10;

/// The configuration of a device with one port (struct virtio_console_config, 5.3.4): columns, rows, the number of
/// ports, and the register of an early console, which is not offered.
fn configuration((rows, columns): (u16, u16)) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..2].copy_from_slice(&columns.to_le_bytes());
    bytes[2..4].copy_from_slice(&rows.to_le_bytes());
    bytes[4..8].copy_from_slice(&1_u32.to_le_bytes());
    bytes
}
