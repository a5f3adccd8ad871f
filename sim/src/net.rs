//! The network: connections as byte streams that are cut up, delayed, reset and partitioned.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use cairn_block::{BufSlice, HeapMemory, Memory};
use cairn_engine::reactor::{EndReason, SocketFault, SocketId, Token};

use crate::stream::Stream;
use crate::world::{CHUNK, CHUNKS_OF_CONNECTED, Inbox, MS, Machine, NodeId, US, World};

/// Bytes that may be on their way in one direction.
const WINDOW: usize = 128 << 10;
/// A segment held up by a partition is sent again after so long.
const RETRANSMIT_NS: u64 = 20 * MS;

const EPIPE: i32 = 32;
const ENOTCONN: i32 = 107;
const ECONNRESET: i32 = 104;
const ECONNREFUSED: i32 = 111;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum NetEvent {
    /// A connect reaches its peer.
    Connect {
        request: usize,
    },
    /// Bytes of `side` reach the other one.
    Arrive {
        conn: usize,
        side: usize,
        bytes: usize,
    },
    /// The end of `side`'s stream reaches the other one.
    Fin {
        conn: usize,
        side: usize,
    },
    /// `side` learns that the connection is broken.
    Broken {
        conn: usize,
        side: usize,
    },
    SendDone {
        conn: usize,
        side: usize,
    },
    PauseDone {
        conn: usize,
        side: usize,
    },
    CloseDone {
        conn: usize,
        side: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    Off,
    Armed,
    Stopping,
}

#[derive(Debug)]
struct SendInFlight {
    token: Token,
    windows: Vec<BufSlice>,
    sum: u32,
}

/// The side of a connection that was accepted.
const ACCEPTED: usize = 1;

#[derive(Debug)]
struct Side {
    node: NodeId,
    socket: SocketId,
    receiving: Receiving,
    recv_token: Token,
    send: Option<SendInFlight>,
    closing: Option<Token>,
    /// The process is dead, or the socket is closed for good.
    gone: bool,
    /// Sends fail from now on.
    broken: bool,
    /// Sent and not yet on the wire.
    out: Stream,
    /// On the wire towards the other side.
    wire: Stream,
    /// When the last of it arrives.
    last_arrival: u64,
    fin_sent: bool,
    /// Arrived and not yet received.
    rx: Stream,
    rx_end: Option<EndReason>,
}

impl Side {
    fn new(node: NodeId, socket: SocketId) -> Self {
        Self {
            node,
            socket,
            receiving: Receiving::Off,
            recv_token: Token::default(),
            send: None,
            closing: None,
            gone: false,
            broken: false,
            out: Stream::default(),
            wire: Stream::default(),
            last_arrival: 0,
            fin_sent: false,
            rx: Stream::default(),
            rx_end: None,
        }
    }
}

#[derive(Debug)]
struct Conn {
    sides: [Side; 2],
}

#[derive(Debug)]
struct Listener {
    node: NodeId,
    accept: Option<Token>,
}

#[derive(Debug)]
struct ConnectRequest {
    node: NodeId,
    peer: SocketAddr,
    token: Token,
    give_up_at: u64,
}

/// A connection's end on its way from one process's shard to another.
#[derive(Debug)]
pub struct SimSocket {
    conn: usize,
    side: usize,
}

/// Sockets of one node.
#[derive(Debug, Default)]
struct Sockets {
    /// The connection and side behind each slot, and its generation.
    slots: Vec<(Option<(usize, usize)>, u32)>,
    free: Vec<u32>,
    /// Sockets with bytes for which no chunk was free.
    starved: Vec<(usize, usize)>,
}

/// How the network behaves in this run.
#[derive(Debug, Clone, Copy)]
pub struct NetManners {
    /// The longest usual latency.
    pub latency_ns: u64,
    /// Of a thousand segments so many are late.
    pub late_per_mille: u64,
    /// Of a thousand chunks so many are short.
    pub short_per_mille: u64,
}

impl Default for NetManners {
    fn default() -> Self {
        Self { latency_ns: 40 * US, late_per_mille: 5, short_per_mille: 100 }
    }
}

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Net {
    pub(crate) manners: NetManners,
    conns: Vec<Conn>,
    requests: Vec<Option<ConnectRequest>>,
    listeners: BTreeMap<SocketAddr, Listener>,
    addresses: BTreeMap<SocketAddr, Machine>,
    sockets: Vec<Sockets>,
    /// From one machine to another nothing arrives before this time.
    blocked: BTreeMap<(Machine, Machine), u64>,
}

impl Net {
    pub(crate) fn listener(&self, address: SocketAddr) -> Option<NodeId> {
        self.listeners.get(&address).map(|l| l.node)
    }

    fn sockets(&mut self, node: NodeId) -> &mut Sockets {
        if self.sockets.len() <= node.0 {
            self.sockets.resize_with(node.0 + 1, Sockets::default);
        }
        &mut self.sockets[node.0]
    }

    fn find(&self, node: NodeId, id: SocketId) -> Option<(usize, usize)> {
        let slot = self.sockets.get(node.0)?.slots.get(id.index as usize)?;
        slot.0.filter(|_| slot.1 == id.generation)
    }

    fn new_socket(&mut self, node: NodeId, at: (usize, usize)) -> SocketId {
        let sockets = self.sockets(node);
        let index = match sockets.free.pop() {
            Some(index) => index,
            None => {
                sockets.slots.push((None, 0));
                u32::try_from(sockets.slots.len() - 1).expect("fewer than 2^32 sockets")
            }
        };
        let slot = &mut sockets.slots[index as usize];
        slot.0 = Some(at);
        SocketId { index, generation: slot.1 }
    }
}

impl World {
    /// How the network behaves from now on.
    pub fn set_net_manners(&mut self, manners: NetManners) {
        self.net.manners = manners;
    }

    // ---- what drivers ask for

    pub(crate) fn listen(&mut self, node: NodeId, address: SocketAddr) -> std::io::Result<()> {
        if self.net.listeners.contains_key(&address) {
            return Err(std::io::ErrorKind::AddrInUse.into());
        }
        self.net.listeners.insert(address, Listener { node, accept: None });
        let machine = self.machine(node);
        self.net.addresses.insert(address, machine);
        Ok(())
    }

    pub(crate) fn stop_listening(&mut self, address: SocketAddr) {
        self.net.listeners.remove(&address);
    }

    pub(crate) fn accept(&mut self, address: SocketAddr, token: Token) {
        if let Some(listener) = self.net.listeners.get_mut(&address) {
            listener.accept = Some(token);
        }
    }

    pub(crate) fn connect(&mut self, node: NodeId, peer: SocketAddr, ms: u32, token: Token) {
        let give_up_at = self.now + u64::from(ms) * MS;
        self.net.requests.push(Some(ConnectRequest { node, peer, token, give_up_at }));
        let request = self.net.requests.len() - 1;
        let at = self.now + self.latency();
        self.net_at(at, NetEvent::Connect { request });
    }

    pub(crate) fn receive(&mut self, node: NodeId, id: SocketId, token: Token) {
        let Some((conn, side)) = self.net.find(node, id) else {
            let reason = EndReason::Fault(SocketFault::Errno(ENOTCONN));
            self.deliver(node, Inbox::ReceiveEnded { socket: id, token, reason });
            return;
        };
        let end = &mut self.net.conns[conn].sides[side];
        assert!(end.closing.is_none(), "a receive on a socket that is being closed");
        assert!(end.receiving == Receiving::Off, "a socket is received from once");
        end.receiving = Receiving::Armed;
        end.recv_token = token;
        self.hand_over(conn, side);
    }

    pub(crate) fn pause_receive(&mut self, node: NodeId, id: SocketId) {
        let Some((conn, side)) = self.net.find(node, id) else { return };
        let end = &mut self.net.conns[conn].sides[side];
        if end.receiving == Receiving::Armed {
            end.receiving = Receiving::Stopping;
            let at = self.now + self.rng.below(20 * US);
            self.net_at(at, NetEvent::PauseDone { conn, side });
        }
    }

    pub(crate) fn send(
        &mut self,
        node: NodeId,
        id: SocketId,
        token: Token,
        windows: &[BufSlice],
        memory: &HeapMemory,
    ) {
        let found = self.net.find(node, id);
        let Some((conn, side)) = found.filter(|&(c, s)| {
            let end = &self.net.conns[c].sides[s];
            end.closing.is_none() && !end.broken
        }) else {
            if let Some((c, s)) = found {
                let end = &self.net.conns[c].sides[s];
                assert!(end.send.is_none(), "one send at a time on a socket");
            }
            let result = Err(SocketFault::Errno(EPIPE));
            self.deliver(node, Inbox::Sent { socket: id, token, result });
            return;
        };
        let end = &mut self.net.conns[conn].sides[side];
        assert!(end.send.is_none(), "one send at a time on a socket");
        assert!(!windows.is_empty() && windows.len() <= 256, "a send of {} windows", windows.len());
        let mut sum = 0;
        for &window in windows {
            let bytes = memory.bytes(window);
            sum = checksum(sum, bytes);
            end.out.push(bytes);
        }
        end.send = Some(SendInFlight { token, windows: windows.to_vec(), sum });
        self.pump(conn, side);
    }

    pub(crate) fn close(&mut self, node: NodeId, id: SocketId, token: Token) {
        let Some((conn, side)) =
            self.net.find(node, id).filter(|&(c, s)| self.net.conns[c].sides[s].closing.is_none())
        else {
            self.deliver(node, Inbox::Closed { token });
            return;
        };
        let end = &mut self.net.conns[conn].sides[side];
        end.closing = Some(token);
        end.receiving = Receiving::Off;
        end.rx.clear();
        self.fin(conn, side);
        let at = self.now + self.rng.below(50 * US);
        self.net_at(at, NetEvent::CloseDone { conn, side });
    }

    /// Gives a quiet socket away; the peer notices nothing.
    pub(crate) fn detach_socket(&mut self, node: NodeId, id: SocketId) -> Option<SimSocket> {
        let (conn, side) = self.net.find(node, id)?;
        let end = &self.net.conns[conn].sides[side];
        let quiet = end.receiving == Receiving::Off && end.send.is_none() && end.closing.is_none();
        if !quiet || end.gone {
            return None;
        }
        let sockets = self.net.sockets(node);
        let slot = &mut sockets.slots[id.index as usize];
        slot.0 = None;
        slot.1 += 1;
        sockets.free.push(id.index);
        Some(SimSocket { conn, side })
    }

    /// Takes up a socket that another shard's driver gave away.
    pub(crate) fn attach_socket(&mut self, node: NodeId, socket: &SimSocket) -> SocketId {
        let (conn, side) = (socket.conn, socket.side);
        let id = self.net.new_socket(node, (conn, side));
        let end = &mut self.net.conns[conn].sides[side];
        end.node = node;
        end.socket = id;
        id
    }

    /// The windows of the send in flight, when its end is reported, and what they held at its start.
    pub(crate) fn sent_windows(
        &mut self,
        node: NodeId,
        id: SocketId,
    ) -> Option<(Vec<BufSlice>, u32)> {
        let (conn, side) = self.net.find(node, id)?;
        let send = self.net.conns[conn].sides[side].send.take()?;
        Some((send.windows, send.sum))
    }

    pub(crate) fn is_closing(&self, node: NodeId, id: SocketId) -> bool {
        self.net
            .find(node, id)
            .is_none_or(|(conn, side)| self.net.conns[conn].sides[side].closing.is_some())
    }

    pub(crate) fn free_chunk(&mut self, node: NodeId, chunk: u16) {
        let free = &mut self.nodes[node.0].free_chunks;
        assert!(!free.contains(&chunk), "chunk {chunk} was given back twice");
        free.push(chunk);
        let starved = std::mem::take(&mut self.net.sockets(node).starved);
        for (conn, side) in starved {
            self.hand_over(conn, side);
        }
    }

    // ---- faults

    /// Nothing passes from one machine to the other for so long.
    pub fn block(&mut self, from: Machine, to: Machine, for_ns: u64) {
        self.say(format_args!(
            "nothing from machine {} to {} for {} ms",
            from.0,
            to.0,
            for_ns / MS
        ));
        let until = self.now + for_ns;
        let entry = self.net.blocked.entry((from, to)).or_default();
        *entry = (*entry).max(until);
    }

    /// Ends every partition.
    pub fn heal(&mut self) {
        self.net.blocked.clear();
    }

    /// Resets about so many of a thousand connections between two machines.
    pub fn reset(&mut self, a: Machine, b: Machine, per_mille: u64) {
        for conn in 0..self.net.conns.len() {
            let [x, y] = &self.net.conns[conn].sides;
            let ends = (self.machine(x.node), self.machine(y.node));
            let open = !x.gone && !y.gone;
            if open && (ends == (a, b) || ends == (b, a)) && self.rng.chance(per_mille) {
                self.say(format_args!("reset connection {conn}"));
                for side in 0..2 {
                    let end = &mut self.net.conns[conn].sides[side];
                    end.wire.clear();
                    end.out.clear();
                    let at = self.now + self.rng.below(200 * US);
                    self.net_at(at, NetEvent::Broken { conn, side });
                }
            }
        }
    }

    pub(crate) fn kill_sockets(&mut self, node: NodeId) {
        self.net.listeners.retain(|_, listener| listener.node != node);
        for conn in 0..self.net.conns.len() {
            for side in 0..2 {
                let end = &mut self.net.conns[conn].sides[side];
                if end.node != node || end.gone {
                    continue;
                }
                end.gone = true;
                end.send = None;
                end.receiving = Receiving::Off;
                let unread = !end.rx.is_empty();
                end.rx.clear();
                if unread {
                    // The kernel resets a connection that it closes with bytes unread.
                    let at = self.now + self.latency();
                    self.net_at(at, NetEvent::Broken { conn, side: 1 - side });
                } else {
                    self.fin(conn, side);
                }
            }
        }
    }

    // ---- how bytes move

    fn latency(&mut self) -> u64 {
        let manners = self.net.manners;
        let usual = 2 * US + self.rng.below(manners.latency_ns);
        if self.rng.chance(manners.late_per_mille) {
            usual + self.rng.below(20 * MS)
        } else {
            usual
        }
    }

    fn held_until(&self, from: NodeId, to: NodeId) -> Option<u64> {
        let pair = (self.machine(from), self.machine(to));
        self.net.blocked.get(&pair).copied().filter(|&until| until > self.now)
    }

    /// Puts on the wire what the window allows.
    fn pump(&mut self, conn: usize, side: usize) {
        loop {
            let [a, b] = &mut self.net.conns[conn].sides;
            let (end, peer) = if side == 0 { (a, b) } else { (b, a) };
            let room = WINDOW.saturating_sub(end.wire.len() + peer.rx.len());
            let most = end.out.len().min(room);
            if most == 0 {
                if end.out.is_empty() && end.send.is_some() {
                    let at = self.now + self.rng.below(10 * US);
                    self.net_at(at, NetEvent::SendDone { conn, side });
                }
                return;
            }
            let bytes = if self.rng.chance(100) { 1 + self.rng.index(most) } else { most };
            let end = &mut self.net.conns[conn].sides[side];
            end.out.move_to(bytes, &mut end.wire);
            let at = (self.now + self.latency()).max(self.net.conns[conn].sides[side].last_arrival);
            self.net.conns[conn].sides[side].last_arrival = at;
            self.net_at(at, NetEvent::Arrive { conn, side, bytes });
        }
    }

    /// Ends the stream of a side after what is on the wire.
    fn fin(&mut self, conn: usize, side: usize) {
        let end = &mut self.net.conns[conn].sides[side];
        if end.fin_sent {
            return;
        }
        end.fin_sent = true;
        let at = (self.now + self.latency()).max(self.net.conns[conn].sides[side].last_arrival);
        self.net_at(at, NetEvent::Fin { conn, side });
    }

    /// Gives a side what has arrived for it, as far as it receives and has chunks.
    fn hand_over(&mut self, conn: usize, side: usize) {
        loop {
            let short = self.net.manners.short_per_mille;
            let end = &mut self.net.conns[conn].sides[side];
            let (node, socket, token) = (end.node, end.socket, end.recv_token);
            if end.gone || end.closing.is_some() || end.receiving == Receiving::Off {
                return;
            }
            if end.rx.is_empty() {
                if let Some(reason) = end.rx_end {
                    end.receiving = Receiving::Off;
                    self.deliver(node, Inbox::ReceiveEnded { socket, token, reason });
                }
                return;
            }
            let target = &mut self.nodes[node.0];
            // Some are for connections that this side made.
            let kept = if side == ACCEPTED { CHUNKS_OF_CONNECTED } else { 0 };
            let free = &mut target.free_chunks;
            let Some(chunk) = (free.len() > kept).then(|| free.pop()).flatten() else {
                self.net.sockets(node).starved.push((conn, side));
                return;
            };
            let most = end.rx.len().min(CHUNK);
            let len = match self.rng.chance(short) {
                true if self.rng.chance(500) => 1 + self.rng.index(most.min(32)),
                true => 1 + self.rng.index(most),
                false => most,
            };
            let staging = &mut target.staging[usize::from(chunk)];
            staging.clear();
            staging.extend_from_slice(end.rx.front(len));
            end.rx.skip(len);
            self.deliver(node, Inbox::Received { socket, token, chunk, len });
            self.pump(conn, 1 - side);
        }
    }

    pub(crate) fn net_event(&mut self, event: NetEvent) {
        match event {
            NetEvent::Connect { request } => self.connect_arrives(request),
            NetEvent::Arrive { conn, side, bytes } => {
                if !self.hold(conn, side, event) {
                    self.arrive(conn, side, bytes);
                }
            }
            NetEvent::Fin { conn, side } => {
                if self.hold(conn, side, event) {
                    return;
                }
                if !self.net.conns[conn].sides[side].wire.is_empty() {
                    self.net_at(self.now + 50 * US, event);
                    return;
                }
                let peer = &mut self.net.conns[conn].sides[1 - side];
                peer.rx_end.get_or_insert(EndReason::Eof);
                self.hand_over(conn, 1 - side);
            }
            NetEvent::Broken { conn, side } => self.broken(conn, side),
            NetEvent::SendDone { conn, side } => {
                let end = &mut self.net.conns[conn].sides[side];
                // A later send may have begun since; it is done when its bytes are out.
                if let Some(send) = &end.send
                    && end.out.is_empty()
                    && end.closing.is_none()
                    && !end.gone
                    && !end.broken
                {
                    let item =
                        Inbox::Sent { socket: end.socket, token: send.token, result: Ok(()) };
                    let node = end.node;
                    self.deliver_sent(node, item);
                }
            }
            NetEvent::PauseDone { conn, side } => {
                let end = &mut self.net.conns[conn].sides[side];
                if end.receiving == Receiving::Stopping {
                    end.receiving = Receiving::Off;
                    let (node, socket, token) = (end.node, end.socket, end.recv_token);
                    let reason = EndReason::Paused;
                    self.deliver(node, Inbox::ReceiveEnded { socket, token, reason });
                }
            }
            NetEvent::CloseDone { conn, side } => self.close_done(conn, side),
        }
    }

    /// A `Sent` is reported once, though several events may lead to it.
    fn deliver_sent(&mut self, node: NodeId, item: Inbox) {
        let Inbox::Sent { token, socket, .. } = item else { return };
        let there = self.nodes[node.0].inbox.iter().any(
            |i| matches!(i, Inbox::Sent { token: t, socket: s, .. } if *t == token && *s == socket),
        );
        if !there {
            self.deliver(node, item);
        }
    }

    /// Puts an event off while its direction is blocked.
    fn hold(&mut self, conn: usize, side: usize, event: NetEvent) -> bool {
        let [a, b] = &self.net.conns[conn].sides;
        let (from, to) = if side == 0 { (a.node, b.node) } else { (b.node, a.node) };
        match self.held_until(from, to) {
            Some(until) => {
                let at = until + self.rng.below(RETRANSMIT_NS);
                self.net_at(at, event);
                true
            }
            None => false,
        }
    }

    fn arrive(&mut self, conn: usize, side: usize, bytes: usize) {
        let [a, b] = &mut self.net.conns[conn].sides;
        let (end, peer) = if side == 0 { (a, b) } else { (b, a) };
        let bytes = bytes.min(end.wire.len());
        let refused = peer.gone || peer.closing.is_some();
        if refused {
            end.wire.skip(bytes);
            let at = self.now + self.latency();
            self.net_at(at, NetEvent::Broken { conn, side });
            return;
        }
        end.wire.move_to(bytes, &mut peer.rx);
        self.note(4, conn as u64 * 2 + side as u64, bytes as u64);
        self.hand_over(conn, 1 - side);
    }

    fn broken(&mut self, conn: usize, side: usize) {
        let drop_rx = self.rng.chance(500);
        let end = &mut self.net.conns[conn].sides[side];
        if end.gone || end.broken {
            return;
        }
        end.broken = true;
        end.wire.clear();
        end.out.clear();
        let fault = SocketFault::Errno(ECONNRESET);
        if drop_rx {
            end.rx.clear();
        }
        end.rx_end = Some(EndReason::Fault(fault));
        if end.closing.is_none()
            && let Some(send) = &end.send
        {
            let item = Inbox::Sent { socket: end.socket, token: send.token, result: Err(fault) };
            let node = end.node;
            self.deliver_sent(node, item);
        }
        self.hand_over(conn, side);
    }

    fn close_done(&mut self, conn: usize, side: usize) {
        let end = &mut self.net.conns[conn].sides[side];
        if end.gone {
            return;
        }
        let (node, socket) = (end.node, end.socket);
        let Some(token) = end.closing else { return };
        if let Some(send) = &end.send {
            // Bytes that were not out when the socket was shut down never go.
            let result = if end.out.is_empty() { Ok(()) } else { Err(SocketFault::Errno(EPIPE)) };
            let item = Inbox::Sent { socket, token: send.token, result };
            self.deliver_sent(node, item);
        }
        let end = &mut self.net.conns[conn].sides[side];
        end.out.clear();
        end.gone = true;
        self.deliver(node, Inbox::Closed { token });
    }

    /// The node has seen the socket closed: its slot is free.
    pub(crate) fn forget_socket(&mut self, node: NodeId, token: Token) {
        let sockets = self.net.sockets(node);
        let found = (0..sockets.slots.len()).find(|&i| {
            let slot = &self.net.sockets[node.0].slots[i];
            slot.0.is_some_and(|(conn, side)| {
                let end = &self.net.conns[conn].sides[side];
                end.gone && end.closing == Some(token)
            })
        });
        if let Some(i) = found {
            let sockets = self.net.sockets(node);
            sockets.slots[i].0 = None;
            sockets.slots[i].1 += 1;
            sockets.free.push(u32::try_from(i).expect("fewer than 2^32 sockets"));
        }
    }

    fn connect_arrives(&mut self, request: usize) {
        let Some(asked) = self.net.requests[request].as_ref() else { return };
        let (node, peer, token, give_up_at) =
            (asked.node, asked.peer, asked.token, asked.give_up_at);
        if !self.nodes[node.0].alive {
            self.net.requests[request] = None;
            return;
        }
        if self.now >= give_up_at {
            self.net.requests[request] = None;
            let result = Err(SocketFault::TimedOut);
            self.deliver(node, Inbox::Connected { token, result });
            return;
        }
        let here = self.machine(node);
        let there = self.net.addresses.get(&peer).copied();
        let blocked = there.and_then(|there| {
            let blocked = |pair| self.net.blocked.get(&pair).copied().unwrap_or(0);
            let until = blocked((here, there)).max(blocked((there, here)));
            (until > self.now).then_some(until)
        });
        if let Some(until) = blocked {
            let at = (until + self.rng.below(RETRANSMIT_NS)).min(give_up_at);
            self.net_at(at, NetEvent::Connect { request });
            return;
        }
        self.net.requests[request] = None;
        let listening =
            self.net.listeners.get(&peer).and_then(|l| l.accept.map(|accept| (l.node, accept)));
        let Some((server, accept)) = listening else {
            let result = Err(SocketFault::Errno(ECONNREFUSED));
            self.deliver(node, Inbox::Connected { token, result });
            return;
        };
        let conn = self.net.conns.len();
        let ours = self.net.new_socket(node, (conn, 0));
        let theirs = self.net.new_socket(server, (conn, 1));
        self.net.conns.push(Conn { sides: [Side::new(node, ours), Side::new(server, theirs)] });
        self.say(format_args!("connection {conn}: node {} to node {} ({peer})", node.0, server.0));
        self.deliver(server, Inbox::Accepted { token: accept, socket: theirs });
        self.deliver(node, Inbox::Connected { token, result: Ok(ours) });
    }
}

/// A sum that changes when a byte does.
pub(crate) fn checksum(sum: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(sum);
    hasher.update(bytes);
    hasher.finalize()
}
