//! The header of a frame between driver and device: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).

/// Bytes of it.
pub const SIZE: usize = 12;
/// Where `num_buffers` is: how many of the driver's buffers a received frame fills.
pub const NUM_BUFFERS: usize = 10;

/// The header of a frame that is whole as it is, in so many buffers.
pub fn plain(buffers: u16) -> [u8; SIZE] {
    let mut header = [0; SIZE];
    header[NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    header
}
