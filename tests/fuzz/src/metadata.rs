//! Frames for the metadata service: ARP, IPv4, ICMP, TCP with requests, and anything else that says it is for the
//! service's address. Whatever they are, each frame of the service's is a sound answer to who was heard last, their
//! number and the service's memory are bounded, and somebody who connects afterwards is answered.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use alula::metadata::stack::{FRONT, Stack, is_for};
use alula::metadata::store::Store;
use alula::metadata::{Config, Service, Version};
use arbitrary::{Result, Unstructured};
use serde_json::json;

use crate::allocator;

const STEPS_MAX: usize = 128;
const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const SERVICE_MAC: [u8; 6] = [6, 0, 169, 254, 169, 254];
const GUEST_MAC: [u8; 6] = [6, 0, 0, 0, 0, 2];
const ETHERNET: usize = 14;
const TCP_HEADERS: usize = ETHERNET + 40;
/// The largest frame: a packet of 1500 bytes.
const FRAME_MAX: usize = ETHERNET + 1500;
const TCP: u8 = 6;
const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// The guest's ports that the bytes choose from.
const PORTS: u16 = 24;
/// Data of the service, in bytes.
const DATA: usize = 30_000;
/// Of 16 connections, each with its buffers, a request, an answer, and that answer while it is made; and 32 frames.
const MEMORY_MAX: i64 = 16 * (4096 + (16 << 10) + 2 * 4096 + 4 * DATA as i64) + (256 << 10);
/// The most frames without one of the guest's between them: what 16 connections may have on its way, a byte each, as a
/// guest can ask for, and their ends.
const FRAMES_MAX: usize = 16 * ((16 << 10) + 16);

/// What the guest may say, in pieces that can follow each other.
const WORDS: [&str; 12] = [
    "GET /name HTTP/1.1\r\n\r\n",
    "GET /long HTTP/1.1\r\nConnection: close\r\n\r\n",
    "GET / HTTP/1.1\r\n",
    "PUT /latest/api/token HTTP/1.1\r\n",
    "X-metadata-token-ttl-seconds: 60\r\n",
    "X-metadata-token: 00\r\n",
    "Accept: application/json\r\n",
    "Content-Length: 3000\r\n",
    "\r\n",
    "GET //name/ HTTP/1.0\r\n\r\n",
    "DELETE /name HTTP/1.1\r\n\r\n",
    "Transfer-Encoding: chunked\r\n\r\n",
];

pub fn run(bytes: &[u8]) {
    let before = allocator::begin_peak();
    let mut bytes = Unstructured::new(bytes);
    let mut guest = Guest::new(if bytes.arbitrary().unwrap_or(false) { Version::V2 } else { Version::V1 });
    for _ in 0..STEPS_MAX {
        if bytes.is_empty() || guest.step(&mut bytes).is_err() {
            break;
        }
        let most = allocator::peak() - before;
        assert!(most <= MEMORY_MAX, "{most} bytes");
    }
    guest.take_all();
    // A segment of the bytes' may be a connection at one of these ports, and not at all.
    let is_answered = (50_000..50_003).any(|port| guest.is_answered(port));
    assert!(is_answered, "nobody is answered any more");
}

struct Guest {
    stack: Stack,
    now: Duration,
    mac: [u8; 6],
    /// What was heard last on each port: the service's next number, and its acknowledgement.
    heard: [(u32, u32); PORTS as usize],
    /// Payload for port 50,000 and later.
    answer: Vec<u8>,
    last: (u32, u32),
}

impl Guest {
    fn new(version: Version) -> Self {
        let store = Store::new(2 * DATA);
        let data = json!({ "name": "value", "long": "x".repeat(DATA), "more": { "": [1, null] } });
        store.put(data.as_object().unwrap().clone()).unwrap();
        let config = Config { version, ..Config::on(vec!["eth0".to_owned()]) };
        let service = Service { config, store: Arc::new(store) };
        Self {
            stack: Stack::new(Arc::new(service), [7; 32]),
            now: Duration::from_secs(1),
            mac: GUEST_MAC,
            heard: [(0, 0); PORTS as usize],
            answer: Vec::new(),
            last: (0, 0),
        }
    }

    fn send(&mut self, frame: &[u8]) {
        // Only those come here.
        if let Some(front) = frame.first_chunk::<FRONT>()
            && is_for(SERVICE, front)
        {
            self.mac.copy_from_slice(&front[6..12]);
            self.stack.take(frame, self.now);
        }
    }

    fn step(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        match bytes.arbitrary::<u8>()? % 16 {
            0 => {
                let mut frame = frame(&GUEST_MAC, [8, 6], &[0; 28]);
                frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
                frame[38..42].copy_from_slice(&SERVICE.octets());
                change(&mut frame, bytes)?;
                self.send(&frame);
            }
            1 => {
                let count = usize::from(bytes.arbitrary::<u16>()? % 2000).min(bytes.len());
                let mut frame = frame(&GUEST_MAC, [8, 0], bytes.bytes(count)?);
                if let Some(to) = frame.get_mut(30..34) {
                    to.copy_from_slice(&SERVICE.octets());
                }
                self.send(&frame);
            }
            2 => self.now += Duration::from_millis(bytes.arbitrary::<u16>()?.into()),
            3 if bytes.ratio(1, 8)? => self.stack.reset(),
            3 => self.stack.poll(self.now),
            4 | 5 => {
                let count = bytes.arbitrary::<u8>()?;
                (0..count).all(|_| self.take_one());
            }
            6 => self.take_all(),
            _ => self.send_segment(bytes)?,
        }
        if let Some(wait) = self.stack.next_poll(self.now) {
            assert!(wait < Duration::from_secs(100_000), "{wait:?}");
        }
        Ok(())
    }

    /// A segment of TCP that the service may take, with something changed now and then.
    fn send_segment(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let port = bytes.arbitrary::<u16>()? % PORTS;
        let (next, acknowledged) = self.heard[usize::from(port)];
        let (flags, payload) = match bytes.arbitrary::<u8>()? % 16 {
            0..4 => (SYN, Vec::new()),
            4..6 => (ACK, Vec::new()),
            6..13 => {
                let mut text = Vec::new();
                for _ in 0..=bytes.arbitrary::<u8>()? % 4 {
                    let word = WORDS.get(usize::from(bytes.arbitrary::<u8>()? % 16));
                    text.extend_from_slice(word.map_or(&[b'a'; 700][..], |word| word.as_bytes()));
                }
                (ACK, text)
            }
            13 => (ACK | FIN, Vec::new()),
            _ => (bytes.arbitrary()?, bytes.bytes(bytes.len().min(40))?.to_vec()),
        };
        let number = if flags == SYN { bytes.arbitrary()? } else { acknowledged };
        let mut options = Vec::new();
        if flags & SYN != 0 && bytes.ratio(1, 2)? {
            // The largest segment (RFC 9293, 3.2), and the scale of the window (RFC 7323, 2.2).
            let [high, low] = bytes.arbitrary::<u16>()?.to_be_bytes();
            options.extend([2, 4, high, low, 3, 3, bytes.arbitrary::<u8>()? % 16, 1]);
        }
        let window = if bytes.ratio(1, 8)? { bytes.arbitrary()? } else { u16::MAX };
        let mut frame = segment(port + 1000, number, next, flags, window, &options, &payload);
        if bytes.ratio(1, 4)? {
            change(&mut frame, bytes)?;
        }
        self.send(&frame);
        Ok(())
    }

    /// Takes one frame of the service's, which is sound; false: there is none.
    fn take_one(&mut self) -> bool {
        let Some(frame) = self.stack.frame() else { return false };
        assert!((ETHERNET..=FRAME_MAX).contains(&frame.len()), "{} bytes", frame.len());
        assert_eq!(frame[6..12], SERVICE_MAC);
        match [frame[12], frame[13]] {
            [8, 6] => {
                assert_eq!(frame.len(), ETHERNET + 28);
                assert!(frame[20..22] == [0, 2] && frame[22..28] == SERVICE_MAC);
                assert_eq!(frame[28..32], SERVICE.octets());
            }
            [8, 0] => {
                let packet = &frame[ETHERNET..];
                assert!(packet[0] == 0x45 && checksum(&[&packet[..20]]) == 0, "{packet:02x?}");
                assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len());
                assert_eq!(packet[12..16], SERVICE.octets());
                if packet[9] == TCP {
                    let number = |at: usize| u32::from_be_bytes(packet[at..at + 4].try_into().unwrap());
                    let length = (packet.len() - 20) as u16;
                    let pseudo = [&packet[12..20], &[0, TCP], &length.to_be_bytes()].concat();
                    assert_eq!(checksum(&[&pseudo, &packet[20..]]), 0, "{packet:02x?}");
                    let payload = &packet[20 + usize::from(packet[32] >> 4) * 4..];
                    let flags = packet[33];
                    let next = number(24)
                        .wrapping_add(payload.len() as u32)
                        .wrapping_add(u32::from(flags & (SYN | FIN) != 0));
                    let heard = (next, number(28));
                    let port = u16::from_be_bytes([packet[22], packet[23]]);
                    match port.checked_sub(1000).and_then(|port| self.heard.get_mut(usize::from(port))) {
                        Some(place) => *place = heard,
                        None if port >= 50_000 => {
                            self.answer.extend_from_slice(payload);
                            self.last = heard;
                        }
                        None => {}
                    }
                }
            }
            other => panic!("a frame of type {other:x?}"),
        }
        self.stack.frame_is_delivered();
        true
    }

    /// Takes frames until there are none: they have an end.
    fn take_all(&mut self) {
        for _ in 0..FRAMES_MAX {
            if !self.take_one() {
                self.stack.poll(self.now);
                if self.stack.frame().is_none() {
                    return;
                }
            }
        }
        panic!("frames without end");
    }

    /// Connects from `port`, and asks.
    fn is_answered(&mut self, port: u16) -> bool {
        self.mac = GUEST_MAC;
        self.answer.clear();
        self.send(&segment(port, 1, 0, SYN, u16::MAX, &[], &[]));
        self.take_all();
        let (next, acknowledged) = self.last;
        self.send(&segment(port, acknowledged, next, ACK, u16::MAX, &[], WORDS[0].as_bytes()));
        self.take_all();
        let expected: &[u8] = match self.stack.service().config.version {
            Version::V1 => b"HTTP/1.1 200 ",
            Version::V2 => b"HTTP/1.1 401 ",
        };
        self.answer.starts_with(expected)
    }
}

fn frame(from: &[u8; 6], kind: [u8; 2], content: &[u8]) -> Vec<u8> {
    [&SERVICE_MAC, &from[..], &kind, content].concat()
}

/// Other bytes at up to four places, or another length.
fn change(frame: &mut Vec<u8>, bytes: &mut Unstructured<'_>) -> Result<()> {
    for _ in 0..bytes.arbitrary::<u8>()? % 5 {
        let at = usize::from(bytes.arbitrary::<u8>()?) % frame.len().max(1);
        if let Some(byte) = frame.get_mut(at) {
            *byte = bytes.arbitrary()?;
        }
    }
    if bytes.ratio(1, 8)? {
        frame.truncate(usize::from(bytes.arbitrary::<u16>()?));
    }
    Ok(())
}

/// A segment for the service, as a driver may leave it: without a checksum of TCP.
fn segment(
    port: u16,
    number: u32,
    acknowledged: u32,
    flags: u8,
    window: u16,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let length = (TCP_HEADERS - ETHERNET + options.len() + payload.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, TCP, 0, 0, 172, 16, 0, 2]);
    packet.extend(SERVICE.octets());
    packet.extend(port.to_be_bytes());
    packet.extend(80_u16.to_be_bytes());
    packet.extend(number.to_be_bytes());
    packet.extend(acknowledged.to_be_bytes());
    packet.extend([0x50 + options.len() as u8 / 4 * 16, flags]);
    packet.extend(window.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend(options);
    packet.extend(payload);
    frame(&GUEST_MAC, [8, 0], &packet)
}

/// The Internet's checksum (RFC 1071); 0 over what has one.
fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
