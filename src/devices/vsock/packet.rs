//! The header of a packet (virtio 1.2, 5.10.6).

/// The length of a header, in bytes.
pub const HEADER: usize = 44;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// Connections that carry a stream of bytes, the only ones that there are here.
pub const STREAM: u16 = 1;

/// What packets are for (virtio 1.2, 5.10.6: `op`).
pub mod op {
    /// Wants a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u16 = 2;
    /// Ends a connection, or refuses it.
    pub const RST: u16 = 3;
    /// Will not send, or not receive, any more.
    pub const SHUTDOWN: u16 = 4;
    /// Carries bytes.
    pub const RW: u16 = 5;
    /// Tells how much room there is for bytes.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks how much room there is.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of a SHUTDOWN: the sender will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of a SHUTDOWN: the sender will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The header of a packet: struct virtio_vsock_hdr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's address.
    pub src_cid: u64,
    /// The receiver's address.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// How many bytes follow the header.
    pub len: u32,
    /// The kind of the connection.
    pub kind: u16,
    /// What the packet is for.
    pub op: u16,
    /// More of that.
    pub flags: u32,
    /// How many bytes the sender has room for in all.
    pub buf_alloc: u32,
    /// How many bytes the sender has passed on since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// From its little-endian form in guest memory.
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Its little-endian form.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let Self { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt } = self;
        let mut bytes = [0; HEADER];
        let mut rest = &mut bytes[..];
        put(&mut rest, src_cid.to_le_bytes());
        put(&mut rest, dst_cid.to_le_bytes());
        put(&mut rest, src_port.to_le_bytes());
        put(&mut rest, dst_port.to_le_bytes());
        put(&mut rest, len.to_le_bytes());
        put(&mut rest, kind.to_le_bytes());
        put(&mut rest, op.to_le_bytes());
        put(&mut rest, flags.to_le_bytes());
        put(&mut rest, buf_alloc.to_le_bytes());
        put(&mut rest, fwd_cnt.to_le_bytes());
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (first, after) = rest.split_first_chunk().expect("a header has room for its fields");
    *rest = after;
    *first
}

fn put<const N: usize>(rest: &mut &mut [u8], bytes: [u8; N]) {
    let (first, after) =
        std::mem::take(rest).split_first_chunk_mut().expect("a header has room for its fields");
    *first = bytes;
    *rest = after;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_the_specification_says() {
        let bytes: [u8; HEADER] = std::array::from_fn(|index| index as u8 + 1);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.dst_cid, 0x100f_0e0d_0c0b_0a09);
        assert_eq!((header.src_port, header.dst_port), (0x1413_1211, 0x1817_1615));
        assert_eq!((header.len, header.kind, header.op), (0x1c1b_1a19, 0x1e1d, 0x201f));
        assert_eq!((header.flags, header.buf_alloc, header.fwd_cnt), (0x2423_2221, 0x2827_2625, 0x2c2b_2a29));
        assert_eq!(header.to_bytes(), bytes);
    }
}
