//! TCP/IP for the metadata service of one interface (by `smoltcp`): the guest's frames in, frames for the guest out.
//! Ethernet is done here: whoever asks for the service's address by ARP is told, and answers go to the address that
//! the last frame came from.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::http::{self, Progress, REQUEST_MAX};
use super::tokens::Tokens;
use super::{METRICS, Service};

/// The port of HTTP.
const PORT: u16 = 80;
/// Connections at once. One more has the one give way that is the least use: a guest could open any number.
const CONNECTIONS_MAX: usize = 16;
/// What is kept of a connection: what has come and was not looked at, and what has gone and was not acknowledged.
const RECEIVE_BUFFER: usize = 4096;
const SEND_BUFFER: usize = 16 << 10;
/// Frames that wait for the guest's buffers. More are not made: to TCP they are lost.
const FRAMES_MAX: usize = 32;
/// The largest packet. A guest that takes only smaller ones says so when it connects.
const MTU: usize = 1500;

/// Bytes of an Ethernet header, of an ARP packet for IPv4, and of the shortest IPv4 header.
const ETHERNET: usize = 14;
const ARP: usize = 28;
const IPV4: usize = 20;
/// Bytes of a frame by which [`is_for`] knows it.
pub const FRONT: usize = ETHERNET + ARP;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// A request for Ethernet and IPv4 (RFC 826): hardware, protocol, lengths, operation.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const PROTOCOL_TCP: u8 = 6;
const FLAG_SYN: u8 = 0x02;
const FLAG_ACK: u8 = 0x10;

/// Whether a frame that begins with `front` is for the service at `address`: a packet to it, or a question for it.
pub fn is_for(address: Ipv4Addr, front: &[u8; FRONT]) -> bool {
    let address = address.octets();
    match [front[12], front[13]] {
        TYPE_IPV4 => front[ETHERNET + 16..][..4] == address,
        TYPE_ARP => front[ETHERNET + 24..][..4] == address,
        _ => false,
    }
}

/// The service's end of the cable.
struct Wire {
    /// The guest's packet that has come, without its Ethernet header; empty: none.
    packet: Vec<u8>,
    /// Whole frames for the guest.
    frames: VecDeque<Vec<u8>>,
    own: [u8; 6],
    guest: [u8; 6],
}

struct Received<'a>(&'a mut Vec<u8>);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(self.0);
        self.0.clear();
        result
    }
}

struct Sent<'a> {
    frames: &'a mut VecDeque<Vec<u8>>,
    header: [u8; ETHERNET],
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = self.header.to_vec();
        frame.resize(ETHERNET + length, 0);
        let result = f(&mut frame[ETHERNET..]);
        push(self.frames, frame);
        result
    }
}

fn push(frames: &mut VecDeque<Vec<u8>>, frame: Vec<u8>) {
    METRICS.tx_frames.add(1);
    METRICS.tx_count.add(1);
    METRICS.tx_bytes.add(frame.len() as u64);
    frames.push_back(frame);
}

impl Wire {
    fn header(&self, kind: [u8; 2]) -> [u8; ETHERNET] {
        let mut header = [0; ETHERNET];
        header[..6].copy_from_slice(&self.guest);
        header[6..12].copy_from_slice(&self.own);
        header[12..].copy_from_slice(&kind);
        header
    }

    fn has_room(&self) -> bool {
        self.frames.len() < FRAMES_MAX
    }
}

impl Device for Wire {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sent<'_>)> {
        let header = self.header(TYPE_IPV4);
        (!self.packet.is_empty() && self.has_room())
            .then_some((Received(&mut self.packet), Sent { frames: &mut self.frames, header }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sent<'_>> {
        let header = self.header(TYPE_IPV4);
        self.has_room().then_some(Sent { frames: &mut self.frames, header })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // Nothing between the guest and here damages a frame, and a driver may leave checksums to the device.
        let checksum = &mut capabilities.checksum;
        (checksum.ipv4, checksum.tcp, checksum.icmpv4) = (Checksum::Tx, Checksum::Tx, Checksum::Tx);
        capabilities
    }
}

/// A connection, or a place that waits for one.
struct Connection {
    socket: SocketHandle,
    /// Of a request that is not complete, or of those after the one that is being answered.
    request: Vec<u8>,
    /// The answer, and how much of it has gone.
    response: Vec<u8>,
    sent: usize,
    /// The connection ends with the answer.
    closes: bool,
    /// The guest was last heard of then.
    heard: Duration,
    is_open: bool,
}

/// The stack of one interface.
pub struct Stack {
    service: Arc<Service>,
    tokens: Tokens,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
}

impl Stack {
    /// Answers with what `service` has; `seed` is what nobody can guess.
    pub fn new(service: Arc<Service>, seed: [u8; 32]) -> Self {
        let (mut key, mut numbers) = ([0; 16], [0; 8]);
        key.copy_from_slice(&seed[..16]);
        numbers.copy_from_slice(&seed[16..24]);
        let address = service.config.ipv4_address;
        let [a, b, c, d] = address.octets();
        // Locally administered, and the same whatever the host.
        let own = [0x06, 0x00, a, b, c, d];
        let mut wire = Wire { packet: Vec::new(), frames: VecDeque::new(), own, guest: [0xff; 6] };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_le_bytes(numbers);
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new(address.into(), 32));
        });
        // Everybody is behind the cable.
        let _ = interface.routes_mut().add_default_ipv4_route(address);
        let sockets = SocketSet::new(Vec::new());
        Self { service, tokens: Tokens::new(key), wire, interface, sockets, connections: Vec::new() }
    }

    /// Where the service is.
    pub fn address(&self) -> Ipv4Addr {
        self.service.config.ipv4_address
    }

    /// What is answered, and with what.
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Forgets all connections, as the guest has that set its device up anew.
    pub fn reset(&mut self) {
        self.sockets = SocketSet::new(Vec::new());
        self.connections.clear();
        self.wire.frames.clear();
    }

    /// Takes a frame of the guest, which [`is_for`] the service. `now` is the time by a clock that only goes on.
    pub fn take(&mut self, frame: &[u8], now: Duration) {
        METRICS.rx_accepted.add(1);
        let Some((front, _)) = frame.split_first_chunk::<FRONT>() else {
            METRICS.rx_accepted_err.add(1);
            return;
        };
        self.wire.guest.copy_from_slice(&front[6..12]);
        if [front[12], front[13]] == TYPE_ARP {
            self.answer_arp(&front[ETHERNET..]);
            return;
        }
        let packet = &frame[ETHERNET..];
        if self.asks_to_connect(packet) {
            self.make_room(now);
        }
        self.wire.packet.clear();
        self.wire.packet.extend_from_slice(packet);
        self.poll(now);
        // Without room for an answer, it is lost.
        if self.wire.packet.is_empty() {
            METRICS.rx_count.add(1);
        } else {
            METRICS.rx_accepted_err.add(1);
            self.wire.packet.clear();
        }
    }

    fn answer_arp(&mut self, question: &[u8]) {
        let (address, own) = (self.address().octets(), self.wire.own);
        if question[..8] != ARP_REQUEST || question[24..28] != address || !self.wire.has_room() {
            METRICS.rx_accepted_err.add(1);
            return;
        }
        let mut answer = self.wire.header(TYPE_ARP).to_vec();
        answer.extend_from_slice(&ARP_REQUEST[..7]);
        answer.push(2);
        answer.extend_from_slice(&own);
        answer.extend_from_slice(&address);
        // Who asked: both of its addresses.
        answer.extend_from_slice(&question[8..18]);
        push(&mut self.wire.frames, answer);
        METRICS.rx_count.add(1);
    }

    /// Whether a packet asks for a connection to the service.
    fn asks_to_connect(&self, packet: &[u8]) -> bool {
        let header = usize::from(packet[0] & 0xf) * 4;
        let Some(segment) = packet.get(header..header + 20) else { return false };
        header >= IPV4
            && packet[9] == PROTOCOL_TCP
            && segment[2..4] == PORT.to_be_bytes()
            && segment[13] & (FLAG_SYN | FLAG_ACK) == FLAG_SYN
    }

    /// Has a place wait for a connection: a free one, a new one, or that of the connection that is the least use.
    fn make_room(&mut self, now: Duration) {
        let sockets = &self.sockets;
        let state = |one: &Connection| sockets.get::<Socket<'_>>(one.socket).state();
        if self.connections.iter().any(|one| state(one) == State::Listen) {
            return;
        }
        if self.connections.len() == CONNECTIONS_MAX {
            let rank = |one: &Connection| match state(one) {
                State::Closed | State::TimeWait => 0,
                // A flood of half-open connections pushes out itself.
                State::SynReceived => 1,
                _ if one.response.is_empty() => 2,
                _ => 3,
            };
            let least = self.connections.iter().enumerate().min_by_key(|(_, one)| (rank(one), one.heard));
            let Some((least, rank)) = least.map(|(index, one)| (index, rank(one))) else { return };
            let gone = self.connections.swap_remove(least);
            if rank >= 2 {
                // The guest hears of it, if there is room.
                self.sockets.get_mut::<Socket<'_>>(gone.socket).abort();
                self.interface.poll(instant(now), &mut self.wire, &mut self.sockets);
            }
            self.sockets.remove(gone.socket);
            METRICS.connections_destroyed.add(u64::from(gone.is_open));
        }
        let buffer = |size: usize| SocketBuffer::new(vec![0; size]);
        let mut socket = Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
        // Answers are whole before they go.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let _ = socket.listen(PORT);
        let connection = Connection {
            socket: self.sockets.add(socket),
            request: Vec::new(),
            response: Vec::new(),
            sent: 0,
            closes: false,
            heard: now,
            is_open: false,
        };
        self.connections.push(connection);
    }

    /// Does what is to be done at `now`: answers requests, sends, sends again.
    pub fn poll(&mut self, now: Duration) {
        self.interface.poll(instant(now), &mut self.wire, &mut self.sockets);
        let Self { service, tokens, sockets, connections, .. } = self;
        let mut anything = false;
        for connection in connections {
            let socket = sockets.get_mut::<Socket<'_>>(connection.socket);
            anything |= connection.serve(socket, now, |input| http::answer(service, tokens, now, input));
        }
        if anything {
            self.interface.poll(instant(now), &mut self.wire, &mut self.sockets);
        }
    }

    /// When to poll next if nothing comes; none: never.
    pub fn next_poll(&mut self, now: Duration) -> Option<Duration> {
        self.interface.poll_delay(instant(now), &self.sockets).map(Duration::from)
    }

    /// The next frame for the guest.
    pub fn frame(&self) -> Option<&[u8]> {
        self.wire.frames.front().map(Vec::as_slice)
    }

    /// The guest has the next frame.
    pub fn frame_is_delivered(&mut self) {
        self.wire.frames.pop_front();
    }
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

impl Connection {
    /// Reads, answers and sends as far as that goes; whether anything was done.
    fn serve(
        &mut self,
        socket: &mut Socket<'_>,
        now: Duration,
        mut answer: impl FnMut(&[u8]) -> Progress,
    ) -> bool {
        self.look_at(socket);
        let mut anything = false;
        loop {
            if self.sent < self.response.len() {
                let Ok(sent @ 1..) = socket.send_slice(&self.response[self.sent..]) else { return anything };
                (self.sent, self.heard, anything) = (self.sent + sent, now, true);
                continue;
            }
            (self.response, self.sent) = (Vec::new(), 0);
            if self.closes {
                socket.close();
                self.request = Vec::new();
                return anything;
            }
            let room = REQUEST_MAX - self.request.len().min(REQUEST_MAX);
            let read = socket.recv(|bytes| {
                let count = bytes.len().min(room);
                self.request.extend_from_slice(&bytes[..count]);
                (count, count)
            });
            let has_come = matches!(read, Ok(1..));
            if has_come {
                (self.heard, anything) = (now, true);
            }
            // What is left of the last read may be a whole request.
            let progress = if self.request.is_empty() { Progress::Incomplete } else { answer(&self.request) };
            match progress {
                Progress::Answered { taken, response, closes } => {
                    self.request.drain(..taken.min(self.request.len()));
                    (self.response, self.closes, anything) = (response, closes, true);
                }
                Progress::Incomplete if has_come => {}
                Progress::Incomplete => {
                    if socket.state() == State::CloseWait {
                        // The guest sends no more.
                        self.closes = true;
                        continue;
                    }
                    return anything;
                }
            }
        }
    }

    /// Notes that the connection was opened, or has ended: then its place waits for another.
    fn look_at(&mut self, socket: &mut Socket<'_>) {
        match socket.state() {
            State::Listen | State::SynReceived => {}
            State::Closed => {
                METRICS.connections_destroyed.add(u64::from(self.is_open));
                (self.request, self.response, self.sent) = (Vec::new(), Vec::new(), 0);
                (self.closes, self.is_open) = (false, false);
                let _ = socket.listen(PORT);
            }
            _ if !self.is_open => {
                METRICS.connections_created.add(1);
                self.is_open = true;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
