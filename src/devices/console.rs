//! The serial console: a 16550A UART (National Semiconductor PC16550D) by `vm-superio`, with the
//! host's output behind it and room for what is typed.

use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};

use crate::bus::BusDevice;
use crate::error::{Context, Result};
use crate::event::EventFd;

/// The interrupt line, as the UART pulls it.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the host that the guest has read all that was typed.
struct Room(Arc<EventFd>);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A counter that is full says the same already.
        let _ = self.0.write(1);
    }
}

/// The UART.
pub struct Console {
    // Host
    room: Arc<EventFd>,
    // Host and guest-visible
    serial: Serial<Line, Room, Box<dyn Write + Send>>,
}

impl Console {
    /// A UART that raises `interrupt` and writes what the guest sends to `output`.
    pub fn new(interrupt: EventFd, output: Box<dyn Write + Send>) -> Result<Self> {
        let room =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("create an event descriptor")?;
        let room = Arc::new(room);
        let serial = Serial::with_events(Line(interrupt), Room(room.clone()), output);
        Ok(Self { room, serial })
    }

    /// Types as many of `bytes` as there is room for, and returns how many. When some are left,
    /// `room` becomes readable once the guest has read.
    pub fn type_bytes(&mut self, bytes: &[u8]) -> usize {
        let room = self.serial.fifo_capacity();
        if room == 0 {
            return 0;
        }
        // Fails only when the interrupt cannot be raised; the bytes are in the FIFO then.
        self.serial.enqueue_raw_bytes(&bytes[..bytes.len().min(room)]).unwrap_or(bytes.len().min(room))
    }

    /// Writes what is kept for a slow reader, as far as it reads now.
    pub fn flush(&mut self) {
        // A reader that is gone loses it; the guest goes on.
        let _ = self.serial.writer_mut().flush();
    }

    /// Readable once the guest has read all that was typed.
    pub fn room(&self) -> Arc<EventFd> {
        self.room.clone()
    }
}

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([data], Ok(offset)) = (data, u8::try_from(offset)) {
            *data = self.serial.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([data], Ok(offset)) = (data, u8::try_from(offset)) {
            // A host that takes no more output loses it; the guest goes on.
            let _ = self.serial.write(offset, *data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);
    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console() -> (Console, Output) {
        let output = Output::default();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (Console::new(interrupt, Box::new(output.clone())).unwrap(), output)
    }

    #[test]
    fn what_the_guest_sends_comes_out() {
        let (mut console, output) = console();
        for byte in b"hi" {
            console.write(0, &[*byte]);
        }
        console.write(0, &[1, 2]);
        assert_eq!(*output.0.lock().unwrap(), b"hi");
    }

    #[test]
    fn typing_stops_when_the_fifo_is_full_and_room_is_told() {
        let (mut console, _) = console();
        let typed = console.type_bytes(&[b'x'; 1000]);
        assert!(typed > 0 && typed < 1000);
        assert_eq!(console.type_bytes(b"y"), 0);
        assert!(console.room().read().is_err(), "no room yet");
        for _ in 0..typed {
            let mut byte = [0];
            console.read(0, &mut byte);
            assert_eq!(byte, *b"x");
        }
        console.room().read().unwrap();
        assert_eq!(console.type_bytes(b"y"), 1);
    }
}
