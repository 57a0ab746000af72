//! The serial console: a 16550A UART (National Semiconductor PC16550D) by `vm-superio`, with the
//! host's output behind it and room for what is typed.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::host::console::Output;
use crate::limiter::{self, Limiter, RateLimiter, TokenBucket};
use crate::metrics::{Counter, Group, View, metrics};
use crate::part::Component;
use crate::platform::node::{AcpiDevice, AcpiValue, TreeNode, stdout};
use crate::platform::{Node, Place};
use crate::poll::EventFd;
use crate::snapshot::Snapshot;

/// The clock that the UART divides, as in PCs.
const CLOCK_HZ: u32 = 1_843_200;
/// The UART's data register.
const DATA: u8 = 0;

/// Body of `PUT /serial`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "SerialDevice"))]
#[serde(deny_unknown_fields, expecting = "struct SerialConfig")]
pub struct Config {
    /// A file, created if it is missing, or a FIFO; none: standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// The limit of what goes out, in bytes in a time; more is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

/// The interrupt line, as the UART pulls it.
#[derive(Clone)]
struct Line(Arc<EventFd>);

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

metrics! {
    /// Counts of what went through the UART; the names are as in Firecracker's metrics.
    pub struct Metrics {
        /// Bytes that the guest read.
        read_count: Counter,
        /// Bytes that the guest wrote.
        write_count: Counter,
        /// Bytes that the host's output did not take.
        missed_write_count: Counter,
        /// Accesses that are not one byte wide.
        error_count: Counter,
        /// Bytes that the rate limiter dropped.
        rate_limiter_dropped_bytes: Counter,
    }
}

/// The UART.
pub struct Console {
    // Host
    room: Arc<EventFd>,
    /// The counts of what went through the UART.
    pub metrics: Arc<Metrics>,
    // Host and guest-visible
    serial: Serial<Line, Room, MeteredOutput>,
}

impl Console {
    /// A UART that raises `interrupt` and writes what the guest sends to `output`. It writes to `room` when the guest
    /// has read all that was typed.
    pub fn new(
        interrupt: Arc<EventFd>,
        room: Arc<EventFd>,
        output: Output,
        limit: Option<TokenBucket>,
    ) -> Self {
        let metrics = Arc::new(Metrics::new());
        let limiter = Limiter::new(RateLimiter { bandwidth: limit, ops: None });
        let output = MeteredOutput { output, limiter, metrics: metrics.clone() };
        let serial = Serial::with_events(Line(interrupt), Room(room.clone()), output);
        Self { room, metrics, serial }
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

    /// Takes the output away, with what is kept for a slow reader. What the guest writes now goes nowhere.
    pub fn take_output(&mut self) -> Output {
        std::mem::replace(&mut self.serial.writer_mut().output, Output::nowhere())
    }

    /// Where the guest's words go, for another console of it.
    pub fn output(&self) -> &Output {
        &self.serial.writer().output
    }

    /// Writes what is kept for a slow reader, as far as it reads now.
    pub fn flush(&mut self) {
        // A reader that is gone loses it; the guest goes on.
        let _ = self.serial.writer_mut().output.flush();
    }
}

impl FixedDevice for Console {
    const NAME: &'static str = "serial";
    const METRICS: Option<&'static str> = Some("uart");

    fn build(place: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        let limit = site.serial.and_then(|serial| serial.rate_limiter);
        let path = site.serial.and_then(|serial| serial.serial_out_path.as_deref());
        let output = site.host.console(path)?;
        Ok(Some(Self::new(site.interrupt(place)?, site.room.clone(), output, limit)))
    }
}

/// The UART as it is saved: its registers, what was typed and not read, and what the limit lets through.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    divisor: [u8; 2],
    interrupt_enable: u8,
    /// The interrupt of an empty transmitter stands here until the guest has read of it: a driver in the middle of a
    /// transmission waits for that.
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    typed: Vec<u8>,
    limits: limiter::State,
}

impl Snapshot for Console {
    type State = State;

    fn save(&self) -> Result<State> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.serial.state();
        Ok(State {
            divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            typed: in_buffer,
            limits: self.serial.writer().limiter.save()?,
        })
    }

    /// An interrupt that the guest may not have seen is raised again.
    fn restore(&mut self, state: State) -> Result<()> {
        let registers = SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.typed,
        };
        let (line, room) = (self.serial.interrupt_evt().clone(), Room(self.room.clone()));
        let (output, limiter) = (Output::nowhere(), Limiter::default());
        let nowhere = MeteredOutput { output, limiter, metrics: self.metrics.clone() };
        let mut serial = Serial::from_state(&registers, line, room, nowhere)
            .map_err(|error| Error::config(format!("the saved serial console cannot be: {error}")))?;
        std::mem::swap(serial.writer_mut(), self.serial.writer_mut());
        serial.writer_mut().limiter.restore(state.limits)?;
        self.serial = serial;
        Ok(())
    }
}

impl Component for Console {
    fn nodes(&self, place: Place) -> Vec<Node> {
        let acpi = AcpiDevice::new("COM1", AcpiValue::Eisa("PNP0501"), place.resources());
        let tree = TreeNode::at("serial", place)
            .texts("compatible", &["ns16550a"])
            .registers(place)
            .cells("clock-frequency", &[CLOCK_HZ])
            .interrupt(place);
        vec![
            Node::Acpi(acpi.with("_UID", AcpiValue::Number(0))),
            Node::Tree(tree),
            Node::Chosen(stdout("serial", place)),
        ]
    }

    fn metrics(&self, view: View) -> Option<Value> {
        Some(self.metrics.collect(view))
    }
}

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([data], Ok(offset)) = (data, u8::try_from(offset)) {
            *data = self.serial.read(offset);
            if offset == DATA {
                self.metrics.read_count.add(1);
            }
        } else {
            self.metrics.error_count.add(1);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([data], Ok(offset)) = (data, u8::try_from(offset)) {
            // A host that takes no more output loses it; the guest goes on.
            let _ = self.serial.write(offset, *data);
        } else {
            self.metrics.error_count.add(1);
        }
    }
}

/// Where the UART's bytes go, counted and at most so many in a time.
struct MeteredOutput {
    output: Output,
    limiter: Limiter,
    metrics: Arc<Metrics>,
}

impl Write for MeteredOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len() as u64;
        self.metrics.write_count.add(count);
        if self.limiter.take(count).is_err() {
            self.metrics.rate_limiter_dropped_bytes.add(count);
            return Ok(bytes.len());
        }
        match self.output.write(bytes) {
            Ok(written) => {
                self.metrics.missed_write_count.add(count - written as u64);
                Ok(bytes.len())
            }
            Err(error) => {
                self.metrics.missed_write_count.add(count);
                Err(error)
            }
        }
    }

    /// The UART flushes after each byte: what the host keeps goes out by itself, or when it is looked at.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Host(Arc<Mutex<Vec<u8>>>);
    impl Write for Host {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> Arc<EventFd> {
        Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    fn console() -> (Console, Host) {
        let output = Host::default();
        (Console::new(event(), event(), Output::other(Box::new(output.clone())), None), output)
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
        assert!(console.room.read().is_err(), "no room yet");
        for _ in 0..typed {
            let mut byte = [0];
            console.read(0, &mut byte);
            assert_eq!(byte, *b"x");
        }
        console.room.read().unwrap();
        assert_eq!(console.type_bytes(b"y"), 1);
    }

    #[test]
    fn a_restored_console_goes_on_in_the_middle_of_a_transmission() {
        const IER: u64 = 1;
        const IIR: u64 = 2;
        let read = |console: &mut Console, offset| {
            let mut byte = [0];
            console.read(offset, &mut byte);
            byte[0]
        };
        let (mut console, output) = console();
        // The driver waits for the interrupts of received data and of the empty transmitter.
        console.write(IER, &[3]);
        console.write(0, b"h");
        assert_eq!(console.type_bytes(b"typed"), 5);
        assert_eq!(read(&mut console, 0), b't');
        let state = console.save().unwrap();
        drop(console);

        let raised = event();
        let mut other = Console::new(raised.clone(), event(), Output::other(Box::new(output.clone())), None);
        other.restore(state.clone()).unwrap();
        assert_eq!(other.save().unwrap(), state);
        raised.read().expect("the interrupt may not have been seen");
        assert_eq!(read(&mut other, IIR) & 6, 2, "the transmitter is empty");
        other.write(0, b"i");
        raised.read().expect("the transmitter is empty again");
        assert_eq!([(); 4].map(|()| read(&mut other, 0)), *b"yped");
        other.room.read().unwrap();
        assert_eq!(*output.0.lock().unwrap(), b"hi");

        let full = State { typed: vec![0; 1000], ..state.clone() };
        assert!(other.restore(full).unwrap_err().to_string().contains("cannot be: No space left in FIFO"));
    }

    #[test]
    fn what_goes_beyond_the_limit_is_dropped_and_counted() {
        let output = Host::default();
        let limit = TokenBucket { size: 10, one_time_burst: None, refill_time: 1 << 40 };
        let mut console =
            Console::new(event(), event(), Output::other(Box::new(output.clone())), Some(limit));
        for _ in 0..25 {
            console.write(0, b"x");
        }
        console.write(0, b"xx");
        assert_eq!(output.0.lock().unwrap().len(), 10);
        let mut other = Console::new(event(), event(), Output::other(Box::new(output.clone())), Some(limit));
        other.restore(console.save().unwrap()).unwrap();
        other.write(0, b"x");
        assert_eq!(output.0.lock().unwrap().len(), 10, "what was used up stays used up");
        let count = |counter: &Counter| counter.total();
        let Metrics { write_count, rate_limiter_dropped_bytes, error_count, .. } = &*console.metrics;
        assert_eq!((count(write_count), count(rate_limiter_dropped_bytes), count(error_count)), (25, 15, 1));
    }
}
