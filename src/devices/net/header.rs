//! The header of a frame between driver and device: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).

use crate::virtio::Chain;

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

/// How many bytes follow the header in a chain, as the driver says now; it is looked at again when the
/// frame is taken.
pub fn length_after(chain: &Chain<'_>) -> usize {
    let length = chain.clone().readable().map(|descriptor| descriptor.len() as usize).sum::<usize>();
    length.saturating_sub(SIZE)
}
