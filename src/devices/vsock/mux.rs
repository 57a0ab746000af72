//! All connections of a guest: a table of them, and the queue of those that have something for the guest.
//! [`super::host`] is what is done with the programs of the host, [`super::guest`] what comes of the guest's
//! packets.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::backlog::Blocks;
use super::connection::{Connection, Key, Phase, Stream};
use super::metrics::Metrics;
use super::packet::{HOST_CID, Header, STREAM, op};
use crate::descriptors::Named;
use crate::error::Result;
use crate::host::listener::Listener;
use crate::poll::Timer;
use crate::sys::vectors::Room;
use crate::virtio::{Desk, Watched};

/// Connections at once. Each takes a descriptor and some hundred bytes: a guest, or a program of the host, that
/// opens more and more would use up both.
pub const CONNECTIONS_MAX: usize = 16_384;
/// Programs of the host that have not said which port they want, or whom the guest has not answered: one that
/// connects again and again and says nothing keeps nobody else out, as the oldest of these goes.
pub const WAITING_MAX: usize = 1024;
/// Connections that the guest waits for: each is asked for again as long as a program of the host has no room
/// for one more client.
pub const CONNECTING_MAX: usize = 1024;
/// Refusals that wait for the guest's buffers: a guest that sends packets of connections that there are not, and
/// gives no buffers, would have one kept for each.
pub const REFUSALS_MAX: usize = 1024;
/// The first port that a program of the host has: those below are for programs that listen.
pub const FIRST_PORT: u32 = 1 << 30;
/// The tokens of connections, two for each, begin here: that of its stream, and that of its errand.
pub const FIRST_TOKEN: u32 = 16;

/// Whether the guest has been told that all its connections are gone (virtio 1.2, 5.10.6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// There is nothing to tell.
    Nothing,
    /// It is to be told.
    Owed,
    /// It was told, and has not given a buffer for the next event beside so many that it gave before.
    Sent(usize),
}

/// The connections.
pub struct Mux {
    // Fixed
    pub(super) cid: u64,
    pub(super) path: PathBuf,
    // Host
    pub(super) listener: Listener,
    /// A descriptor to do without when there is none left: who waits can then be told so.
    pub(super) spare: Option<Named<OwnedFd>>,
    pub(super) metrics: Arc<Metrics>,
    /// Of the loop that its worker lives on, while there is one.
    pub(super) desk: Option<Desk>,
    /// It goes off when programs of the host are to be asked again.
    pub(super) timer: Option<Watched<Timer>>,
    /// Clients are left that no turn has taken yet.
    pub(super) may_accept: bool,
    /// Room for the list of a system call.
    pub(super) room: Room,
    // Guest-visible
    table: Vec<Option<Connection>>,
    free: Vec<u32>,
    keys: HashMap<Key, u32>,
    /// Those that have something for the guest, in their order.
    queue: VecDeque<u32>,
    /// Packets that refuse what is no connection: its ports, and the kind that the guest took it for.
    refusals: VecDeque<(Key, u16)>,
    pub(super) blocks: Blocks,
    waiting: usize,
    connecting: usize,
    serial: u64,
    /// The next port of the host's. It goes on in a restored guest: an earlier port may be half open there.
    pub(super) next_port: u32,
    /// What the guest knows of a restore.
    pub(super) told: Told,
}

/// What the guest is sent next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// A refusal of what is no connection.
    Refusal(Header),
    /// Something of the connection of this index.
    Of(u32),
}

impl Mux {
    /// No connections yet, of the guest with this address. Programs of the host come in by `listener`; those
    /// that the guest connects to listen at `path`, an underscore and the port.
    pub fn new(cid: u32, path: PathBuf, listener: Listener, metrics: Arc<Metrics>) -> Self {
        Self {
            cid: cid.into(),
            path,
            spare: spare(&listener),
            listener,
            metrics,
            desk: None,
            timer: None,
            may_accept: false,
            room: Room::default(),
            table: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            queue: VecDeque::new(),
            refusals: VecDeque::new(),
            blocks: Blocks::default(),
            waiting: 0,
            connecting: 0,
            serial: 0,
            next_port: FIRST_PORT,
            told: Told::Nothing,
        }
    }

    /// All connections are gone, and the guest does not know of them.
    pub fn reset(&mut self) {
        (0..self.table.len() as u32).for_each(|index| self.remove(index));
        let Self { table, free, keys, queue, refusals, blocks, next_port, told, .. } = self;
        (*table, *free, *keys, *queue) = (Vec::new(), Vec::new(), HashMap::new(), VecDeque::new());
        (*refusals, *blocks) = (VecDeque::new(), Blocks::default());
        (*next_port, *told) = (FIRST_PORT, Told::Nothing);
    }

    /// The connection of this index.
    pub(super) fn get(&mut self, index: u32) -> Option<&mut Connection> {
        self.table.get_mut(index as usize)?.as_mut()
    }

    /// The connection of this index, and what all of them share.
    pub(super) fn split(&mut self, index: u32) -> Option<(&mut Connection, &mut Blocks, &Metrics)> {
        let Self { table, blocks, metrics, .. } = self;
        Some((table.get_mut(index as usize)?.as_mut()?, blocks, metrics))
    }

    /// The index of a connection that the guest knows.
    pub(super) fn find(&self, key: Key) -> Option<u32> {
        self.keys.get(&key).copied()
    }

    /// All connections.
    pub(super) fn indices(&self) -> impl Iterator<Item = u32> + use<> {
        0..self.table.len() as u32
    }

    /// How many programs of the host wait for a connection.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// How many connections the guest waits for.
    pub(super) fn connecting(&self) -> usize {
        self.connecting
    }

    /// A new connection, which the guest does not know yet.
    pub(super) fn add(&mut self, key: Key, phase: Phase, stream: Option<Stream>) -> Option<u32> {
        if self.table.len() - self.free.len() >= CONNECTIONS_MAX && !self.let_a_lost_one_go() {
            self.metrics.conns_refused.add(1);
            return None;
        }
        self.metrics.conns_added.add(1);
        self.blocks.promises.connections += 1;
        self.serial += 1;
        let connection = Connection::new(key, phase, stream, self.serial);
        self.waiting += usize::from(connection.is_waiting());
        self.connecting += usize::from(connection.is_connecting());
        match self.free.pop() {
            Some(index) => {
                self.table[index as usize] = Some(connection);
                Some(index)
            }
            None => {
                self.table.push(Some(connection));
                Some(self.table.len() as u32 - 1)
            }
        }
    }

    /// From now on the guest's packets for `key` are for this connection.
    pub(super) fn name(&mut self, index: u32, key: Key) {
        if let Some(connection) = self.get(index) {
            connection.key = key;
            self.keys.insert(key, index);
        }
    }

    /// The connection is further.
    pub(super) fn set_phase(&mut self, index: u32, phase: Phase) {
        let Some(connection) = self.table.get_mut(index as usize).and_then(Option::as_mut) else { return };
        self.waiting -= usize::from(connection.is_waiting());
        self.connecting -= usize::from(connection.is_connecting());
        connection.phase = phase;
        self.waiting += usize::from(connection.is_waiting());
        self.connecting += usize::from(connection.is_connecting());
    }

    /// Forgets a connection; its stream is closed.
    pub(super) fn remove(&mut self, index: u32) {
        let Some(mut connection) = self.table.get_mut(index as usize).and_then(Option::take) else { return };
        connection.backlog.clear(&mut self.blocks);
        connection.flow.forward_all(&mut self.blocks.promises);
        connection.flow.end(&mut self.blocks.promises);
        self.blocks.promises.connections -= 1;
        if self.keys.get(&connection.key) == Some(&index) {
            self.keys.remove(&connection.key);
        }
        self.waiting -= usize::from(connection.is_waiting());
        self.connecting -= usize::from(connection.is_connecting());
        self.metrics.conns_removed.add(1);
        self.free.push(index);
    }

    /// The guest forgets a connection, of which something is kept for the host's program still.
    pub(super) fn detach(&mut self, index: u32) {
        let Some(connection) = self.table.get_mut(index as usize).and_then(Option::as_mut) else { return };
        connection.is_detached = true;
        connection.flow.end(&mut self.blocks.promises);
        if self.keys.get(&connection.key) == Some(&index) {
            self.keys.remove(&connection.key);
        }
    }

    /// Ends a connection, and tells the guest if it knows of it.
    pub(super) fn kill(&mut self, index: u32) {
        let Some(connection) = self.table.get_mut(index as usize).and_then(Option::as_mut) else { return };
        self.metrics.conns_killed.add(1);
        connection.backlog.clear(&mut self.blocks);
        connection.stream = None;
        if matches!(connection.phase, Phase::Greeting { .. }) || connection.is_detached {
            return self.remove(index);
        }
        self.set_phase(index, Phase::Reset);
        self.queue(index);
    }

    /// The oldest of the connections for which `is_meant`.
    pub(super) fn oldest(&self, is_meant: impl Fn(&Connection) -> bool) -> Option<u32> {
        let all = self.table.iter().enumerate();
        let meant = all.filter_map(|(index, connection)| Some((index, connection.as_ref()?)));
        let oldest = meant.filter(|(_, connection)| is_meant(connection)).min_by_key(|(_, it)| it.serial);
        oldest.map(|(index, _)| index as u32)
    }

    /// Makes room for another connection: of those that the host's programs have left and the guest has not, the
    /// oldest goes. False: there is none.
    fn let_a_lost_one_go(&mut self) -> bool {
        let lost = self.oldest(|it| it.is_open() && it.stream.is_none());
        if let Some(index) = lost {
            let key = self.get(index).map(|connection| connection.key);
            self.remove(index);
            key.into_iter().for_each(|key| self.refuse(key, STREAM));
        }
        lost.is_some()
    }

    /// The connection has something for the guest.
    pub(super) fn queue(&mut self, index: u32) {
        if let Some(connection) = self.table.get_mut(index as usize).and_then(Option::as_mut)
            && !connection.is_detached
            && !std::mem::replace(&mut connection.is_queued, true)
        {
            self.queue.push_back(index);
        }
    }

    /// The guest is told that there is no such connection.
    pub(super) fn refuse(&mut self, key: Key, kind: u16) {
        match self.refusals.len() < REFUSALS_MAX {
            true => self.refusals.push_back((key, kind)),
            false => self.metrics.conns_refused.add(1),
        }
    }

    /// Whether there is something for the guest, and it may have it.
    pub(super) fn has_something(&self) -> bool {
        self.told == Told::Nothing && !(self.queue.is_empty() && self.refusals.is_empty())
    }

    /// What the guest is sent next. A connection that has more to say is to be queued again.
    pub(super) fn next(&mut self) -> Option<Next> {
        if let Some((key, kind)) = self.refusals.pop_front() {
            let header = Header { kind, ..self.bare_header(key, op::RST) };
            return Some(Next::Refusal(header));
        }
        while let Some(index) = self.queue.pop_front() {
            // It may have gone since, and another one may have its place.
            if let Some(connection) = self.get(index)
                && std::mem::take(&mut connection.is_queued)
            {
                return Some(Next::Of(index));
            }
        }
        None
    }

    fn bare_header(&self, key: Key, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: STREAM,
            op,
            ..Header::default()
        }
    }

    /// The header of a packet of a connection, which tells of its credit as well.
    pub(super) fn header(&mut self, index: u32, op: u16, flags: u32) -> Option<Header> {
        let (connection, blocks, _) = self.split(index)?;
        let ((buf_alloc, fwd_cnt), key) = (connection.flow.grant(&mut blocks.promises), connection.key);
        connection.owed.credit = false;
        Some(Header { flags, buf_alloc, fwd_cnt, ..self.bare_header(key, op) })
    }

    /// The worker stops: nothing is on its loop any more.
    pub(super) fn rest(&mut self) {
        self.desk = None;
        self.timer = None;
        for index in self.indices() {
            let Some(connection) = self.get(index) else { continue };
            if let Some(stream) = connection.stream.take() {
                connection.stream = Some(Stream::Resting(stream.rest()));
            }
            if connection.is_connecting() {
                self.set_phase(index, Phase::Connecting(None));
            }
        }
    }

    /// A worker begins on a loop: everything is waited for again.
    pub(super) fn wake(&mut self, desk: &Desk) -> Result<()> {
        self.desk = Some(desk.clone());
        self.may_accept = true;
        for index in self.indices() {
            let Some(connection) = self.get(index) else { continue };
            let is_blocked = !connection.backlog.is_empty();
            if let Some(stream) = connection.stream.take() {
                // What is there already is an event.
                let mut stream = stream.watch(desk, FIRST_TOKEN + 2 * index)?;
                stream.want_room(is_blocked)?;
                connection.stream = Some(stream);
            }
        }
        self.ask_again()
    }
}

/// A descriptor of which nothing is wanted.
pub(super) fn spare(listener: &Listener) -> Option<Named<OwnedFd>> {
    let copy = listener.as_fd().try_clone_to_owned().ok()?;
    Some(Named::new("vsock, spare", copy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_beyond_16384_live_ones_is_refused() {
        let path = std::env::temp_dir().join(format!("alula-mux-{}", std::process::id()));
        let listener = Listener::bind("vsock", &path).unwrap();
        let metrics = Arc::<Metrics>::default();
        let mut mux = Mux::new(3, path, listener, metrics.clone());
        let key = |guest_port| Key { host_port: 80, guest_port };
        let all = CONNECTIONS_MAX as u32;
        for port in 0..all {
            // No connection is open yet, and so none was left by its program.
            let index = mux.add(key(port), Phase::Requested, None).unwrap();
            mux.name(index, key(port));
        }
        let counts =
            || [&metrics.conns_added, &metrics.conns_removed, &metrics.conns_refused].map(|it| it.total());
        assert_eq!(counts(), [u64::from(all), 0, 0]);
        for _ in 0..3 {
            assert_eq!(mux.add(key(all), Phase::Requested, None), None);
        }
        assert_eq!(counts(), [u64::from(all), 0, 3]);
        assert!(mux.next().is_none() && (0..all).all(|port| mux.find(key(port)).is_some()));
        // One whose program has left goes for it, and the guest is told; one whose program has not stays.
        let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        mux.get(7).unwrap().stream = Some(Stream::Resting(Named::new("vsock connection", stream)));
        [7, 9].into_iter().for_each(|index| mux.set_phase(index, Phase::Open));
        assert_eq!(mux.add(key(all), Phase::Requested, None), Some(9));
        assert_eq!(mux.add(key(all + 1), Phase::Requested, None), None);
        assert!(matches!(mux.next(), Some(Next::Refusal(Header { dst_port: 9, op: op::RST, .. }))));
        assert!(mux.find(key(7)).is_some() && mux.find(key(9)).is_none());
    }
}
