//! The 16550 UART, and printing on it. No `core::fmt`: where every instruction is emulated, that
//! would cost more than the machine's whole start.

use crate::arch::{read_serial as read, write_serial as write};

const DATA: u64 = 0;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const DATA_READY: u8 = 1;
const LOOPBACK: u8 = 1 << 4;

/// Sends one byte. The monitor's UART has always room, so nobody asks.
pub fn send(byte: u8) {
    write(DATA, byte);
}

/// The next byte typed, if there is one.
pub fn receive() -> Option<u8> {
    (read(LINE_STATUS) & DATA_READY != 0).then(|| read(DATA))
}

/// Connects the UART's output to its input, or no longer.
pub fn set_loopback(on: bool) {
    write(MODEM_CONTROL, if on { LOOPBACK } else { 0 });
}

/// Something that can be printed.
pub trait Show {
    /// Prints it.
    fn show(&self);
}

// Not inlined: the firmware is loaded into every guest that is measured.
impl Show for &str {
    #[inline(never)]
    fn show(&self) {
        for byte in self.bytes() {
            send(byte);
        }
    }
}

impl Show for u64 {
    #[inline(never)]
    fn show(&self) {
        if *self >= 10 {
            (*self / 10).show();
        }
        send(b'0' + (*self % 10) as u8);
    }
}

impl Show for usize {
    fn show(&self) {
        (*self as u64).show();
    }
}

impl Show for u32 {
    fn show(&self) {
        u64::from(*self).show();
    }
}

/// A number in hexadecimal.
pub struct Hex(pub u64);

impl Show for Hex {
    #[inline(never)]
    fn show(&self) {
        "0x".show();
        let digits = (67 - self.0.leading_zeros()).max(4) / 4;
        for digit in (0..digits).rev() {
            send(b"0123456789abcdef"[(self.0 >> (4 * digit) & 0xf) as usize]);
        }
    }
}

/// Prints its arguments one after the other.
macro_rules! say {
    ($($what:expr),+ $(,)?) => {{
        use $crate::console::Show as _;
        $($what.show();)+
    }};
}
pub(crate) use say;
