//! placeholder
/// x
pub static IMAGE: &[u8] = &[];
