//! What the machine gives to the messages and the disk work of a volume of three, with next to nothing decided on the
//! way: a process that passes writes and flushes on to three others and reads to one of them, each of those with a file;
//! or one process that passes all of it on to itself, three times over, with memory behind it. Messages have NVMe/TCP's
//! sizes, and all but the client is on the project's own driver. No volume that is reached over TCP and reaches its
//! replicas over TCP can be expected to be much faster on this machine.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use cairn_block::{Buf, BufSlice, ByteOffset, Memory};
use cairn_reactor::{
    Arena, Attach, BlockFile, Completion, DeviceId, Driver, DriverConfig, IoMode, MemRegion, Op,
    SocketId, Token, UringDriver,
};
use clap::Args;

use super::loopback::{CAPSULE, HEADER};
use super::{Group, Place, Running, Stack, full_file};
use crate::load::{Load, Measured};
use crate::procs::{Daemon, pinned, run_json, wait_for};

pub(crate) const STACK: Stack = Stack {
    name: "relay",
    title: "ceiling: 4 minimal programs, 3 files, loopback TCP",
    group: Group::Files,
    programs: &[],
    start: in_files,
};

pub(crate) const MEMORY: Stack = Stack {
    name: "relay-memory",
    title: "ceiling: minimal program, over TCP to itself thrice",
    group: Group::Memory,
    programs: &[],
    start: in_memory,
};

struct Relay {
    place: Place,
    /// The one in front, and those behind it.
    nodes: Vec<Daemon>,
    front: SocketAddr,
    /// Server and client have a core each, and the client looks for answers so long before it sleeps.
    pin: bool,
    spin_us: u64,
}

fn in_memory(place: &Place) -> Result<Box<dyn Running>> {
    let mut command = pinned(&place.own, place.cores.map(|(server, _)| server));
    command.args(["relay-node", "--memory", &place.size.to_string()]);
    let (node, front) = node(place, "node", &command)?;
    let spin_us = place.client_spin_us;
    Ok(Box::new(Relay { place: place.clone(), nodes: vec![node], front, pin: true, spin_us }))
}

fn in_files(place: &Place) -> Result<Box<dyn Running>> {
    let (mut nodes, mut peers) = (Vec::new(), Vec::new());
    for i in 0..3 {
        let file = place.dir.join(format!("file{i}"));
        full_file(&file, place.size)?;
        let mut command = Command::new(&place.own);
        command.args(["relay-node", "--file"]).arg(&file);
        let (node, address) = node(place, &format!("store{i}"), &command)?;
        nodes.push(node);
        peers.push(address.to_string());
    }
    let mut command = Command::new(&place.own);
    command.args(["relay-node", "--peers", &peers.join(",")]);
    let (hub, front) = node(place, "hub", &command)?;
    nodes.insert(0, hub);
    Ok(Box::new(Relay { place: place.clone(), nodes, front, pin: false, spin_us: 0 }))
}

/// A node that runs, and its address.
fn node(place: &Place, name: &str, command: &Command) -> Result<(Daemon, SocketAddr)> {
    let log = place.log(name);
    let mut daemon = Daemon::start(command, &log)?;
    let mut address = None;
    wait_for(name, 10, || {
        daemon.check(&log)?;
        address = std::fs::read_to_string(&log)?.trim().parse().ok();
        Ok(address.is_some())
    })?;
    Ok((daemon, address.context("just found")?))
}

impl Running for Relay {
    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        let core = self.place.cores.filter(|_| self.pin).map(|(_, client)| client);
        let mut command = pinned(&self.place.own, core);
        command.args(["relay-client", &self.front.to_string()]);
        command.args(["--size", &self.place.size.to_string()]);
        load.tell(&mut command, seconds, self.spin_us);
        Measured::told(&run_json(&mut command)?, load)
    }

    fn servers(&self) -> Vec<u32> {
        self.nodes.iter().map(Daemon::pid).collect()
    }
}

/// A request, as it stands in its capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) verb: u8,
    pub(crate) tag: u32,
    pub(crate) len: u32,
    pub(crate) offset: u64,
}

pub(crate) const READ: u8 = 0;
pub(crate) const WRITE: u8 = 1;
pub(crate) const FLUSH: u8 = 2;
/// With one of these: it was passed on once, and goes no further.
const HERE: u8 = 0x80;

impl Asked {
    pub(crate) fn put(self, out: &mut [u8]) {
        out[0] = self.verb;
        out[4..8].copy_from_slice(&self.tag.to_le_bytes());
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[16..24].copy_from_slice(&self.offset.to_le_bytes());
    }

    /// From a capsule or, but for the offset, from the header of an answer.
    pub(crate) fn get(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let offset = u64::from(word(16)) | u64::from(word(20)) << 32;
        Self { verb: bytes[0], tag: word(4), len: word(8), offset }
    }

    fn verb(self) -> u8 {
        self.verb & !HERE
    }

    /// Bytes that follow it on its way, there or back.
    fn brings(self, answer: bool) -> u32 {
        if (self.verb() == READ) == answer && self.verb() != FLUSH { self.len } else { 0 }
    }
}

/// `relay-node`: passes on to its peers, or does to its file.
#[derive(Debug, Args)]
pub(crate) struct RelayNode {
    #[arg(long)]
    file: Option<PathBuf>,
    /// Bytes of memory, and it is its own three peers.
    #[arg(long, conflicts_with_all = ["file", "peers"])]
    memory: Option<u64>,
    #[arg(long, value_delimiter = ',')]
    peers: Vec<SocketAddr>,
}

/// Requests under way at most.
const SLOTS: u32 = 1024;
/// Bytes of memory of a slot: a capsule to pass on, and behind it the header of an answer.
const ROOM: u32 = 128;
/// Reads that go to one peer before the next one has its turn, as Cairn's.
const RUN: u32 = 8;

/// A request under way.
#[derive(Default)]
struct Slot {
    asked: Option<Asked>,
    conn: usize,
    data: Option<Buf>,
    /// Answers or completions that are still to come.
    missing: usize,
}

/// A request or an answer, and the data that came with it.
type Message = (Asked, Option<Buf>);

/// A connection and what is half received of it.
struct Conn {
    socket: SocketId,
    /// To a peer: what comes are answers.
    answers: bool,
    head: Vec<u8>,
    asked: Option<Asked>,
    data: Option<Buf>,
    filled: u32,
    out: Vec<BufSlice>,
    /// Slots that are done once what is being sent is sent, and once what is to be sent is.
    ending: [Vec<u32>; 2],
    sending: bool,
}

impl Conn {
    fn new(socket: SocketId, answers: bool) -> Self {
        Self {
            socket,
            answers,
            head: Vec::with_capacity(CAPSULE as usize),
            asked: None,
            data: None,
            filled: 0,
            out: Vec::new(),
            ending: [const { Vec::new() }; 2],
            sending: false,
        }
    }

    /// Takes a part of a chunk: the message that it completes, and what is left.
    fn take(
        &mut self,
        arena: &mut Arena,
        mut rest: BufSlice,
    ) -> Result<(Option<Message>, BufSlice)> {
        if self.asked.is_none() {
            let size = if self.answers { HEADER } else { CAPSULE };
            let missing = size - u32::try_from(self.head.len())?;
            let got = missing.min(rest.len());
            self.head.extend_from_slice(arena.bytes(rest.sub(0, got)));
            rest = rest.from(got);
            if got < missing {
                return Ok((None, rest));
            }
            let asked = Asked::get(&self.head);
            self.head.clear();
            self.filled = 0;
            let brings = asked.brings(self.answers);
            if brings > 0 {
                self.data = Some(arena.alloc(brings).context("no memory for a request")?);
            }
            self.asked = Some(asked);
        }
        if let Some(data) = &self.data {
            let len = rest.len().min(data.slice().len() - self.filled);
            if len > 0 {
                arena.copy(rest.sub(0, len), data.slice().sub(self.filled, len));
            }
            self.filled += len;
            rest = rest.from(len);
            if self.filled < data.slice().len() {
                return Ok((None, rest));
            }
        }
        Ok((self.asked.take().map(|asked| (asked, self.data.take())), rest))
    }
}

struct Node {
    driver: UringDriver,
    device: Option<DeviceId>,
    /// Those to the peers come first.
    conns: Vec<Option<Conn>>,
    peers: usize,
    reads: u32,
    slots: Vec<Slot>,
    free: Vec<u32>,
    room: Buf,
}

const ACCEPT: u64 = 1 << 48;
const RECEIVE: u64 = 2 << 48;
const SEND: u64 = 3 << 48;
const CONNECT: u64 = 4 << 48;
const CLOSE: u64 = 5 << 48;
const DISK: u64 = 6 << 48;

impl Node {
    fn capsule(&self, slot: u32) -> BufSlice {
        self.room.slice().sub(slot * ROOM, CAPSULE)
    }

    fn header(&self, slot: u32) -> BufSlice {
        self.room.slice().sub(slot * ROOM + CAPSULE, HEADER)
    }

    fn received(&mut self, at: usize, chunk: BufSlice) -> Result<()> {
        let mut rest = chunk;
        while !rest.is_empty() {
            let Some(conn) = &mut self.conns[at] else { return Ok(()) };
            let answers = conn.answers;
            let (message, left) = conn.take(self.driver.memory(), rest)?;
            rest = left;
            match message {
                Some((asked, data)) if answers => self.answered(asked, data),
                Some((asked, data)) => self.asked(at, asked, data)?,
                None => {}
            }
        }
        Ok(())
    }

    fn asked(&mut self, conn: usize, asked: Asked, data: Option<Buf>) -> Result<()> {
        let slot = self.free.pop().context("more requests at once than there is room for")?;
        let window = data.as_ref().map(Buf::slice);
        let here = self.peers == 0 || asked.verb & HERE != 0;
        let missing = if here || asked.verb == READ { 1 } else { self.peers };
        self.slots[slot as usize] = Slot { asked: Some(asked), conn, data, missing };
        if let Some(device) = self.device.filter(|_| here) {
            self.start_disk(device, slot, asked);
            return Ok(());
        }
        let capsule = self.capsule(slot);
        let verb = asked.verb | HERE;
        Asked { tag: slot, verb, ..asked }.put(self.driver.memory().bytes_mut(capsule));
        let peers = if asked.verb == READ {
            self.reads += 1;
            let to = (self.reads / RUN) as usize % self.peers;
            to..to + 1
        } else {
            0..self.peers
        };
        for peer in self.conns[peers].iter_mut().flatten() {
            peer.out.push(capsule);
            peer.out.extend(window);
        }
        Ok(())
    }

    fn start_disk(&mut self, device: DeviceId, slot: u32, asked: Asked) {
        if asked.verb() == READ {
            let data = self.driver.memory().alloc(asked.len);
            self.slots[slot as usize].data = data;
        }
        let buf = self.slots[slot as usize].data.as_ref().map(Buf::slice).unwrap_or_default();
        let offset = ByteOffset(asked.offset);
        let op = match asked.verb() {
            READ => Op::Read { device, offset, buf },
            WRITE => Op::Write { device, offset, buf, fua: false },
            _ => Op::Flush { device },
        };
        self.driver.submit(op, Token::new(DISK | u64::from(slot)));
    }

    fn answered(&mut self, answer: Asked, data: Option<Buf>) {
        if data.is_some() {
            self.slots[answer.tag as usize].data = data;
        }
        self.one_done(answer.tag);
    }

    /// One of those that a request waits for has done its part.
    fn one_done(&mut self, at: u32) {
        let slot = &mut self.slots[at as usize];
        slot.missing -= 1;
        if slot.missing > 0 {
            return;
        }
        let Some(asked) = slot.asked else { return };
        let (conn, data) = (slot.conn, slot.data.as_ref().map(Buf::slice));
        let header = self.header(at);
        let mut bytes = [0; CAPSULE as usize];
        asked.put(&mut bytes);
        let out = self.driver.memory().bytes_mut(header);
        out.copy_from_slice(&bytes[..HEADER as usize]);
        let Some(conn) = &mut self.conns[conn] else { return self.end(at) };
        conn.out.push(header);
        if asked.verb() == READ {
            conn.out.extend(data);
        }
        conn.ending[1].push(at);
    }

    fn end(&mut self, at: u32) {
        let slot = std::mem::take(&mut self.slots[at as usize]);
        if let Some(data) = slot.data {
            self.driver.memory().release(data);
        }
        self.free.push(at);
    }

    /// Sends what has piled up, a batch each.
    fn flush(&mut self) {
        for at in 0..self.conns.len() {
            let Some(conn) = &mut self.conns[at] else { continue };
            if conn.sending || conn.out.is_empty() {
                continue;
            }
            conn.sending = true;
            conn.ending.swap(0, 1);
            let op = Op::Send { socket: conn.socket, windows: &conn.out };
            self.driver.submit(op, Token::new(SEND | at as u64));
            conn.out.clear();
        }
    }

    fn add(&mut self, socket: SocketId, answers: bool) {
        let at = self.conns.len();
        self.conns.push(Some(Conn::new(socket, answers)));
        self.driver.submit(Op::Receive { socket }, Token::new(RECEIVE | at as u64));
    }

    fn close(&mut self, at: usize) {
        if let Some(conn) = self.conns[at].take() {
            self.driver.submit(Op::Close { socket: conn.socket }, Token::new(CLOSE));
            conn.ending.into_iter().flatten().for_each(|slot| self.end(slot));
        }
    }

    fn act(&mut self, completion: Completion) -> Result<()> {
        let index = |token: Token| usize::try_from(token.value() & 0xffff_ffff);
        match completion {
            Completion::Disk { token, result } => {
                result.map_err(|fault| anyhow::anyhow!("the file failed: {fault}"))?;
                self.one_done(u32::try_from(index(token)?)?);
            }
            Completion::Accepted { result, .. } => self.add(result?, false),
            Completion::Connected { result, .. } => {
                self.add(result?, true);
                self.peers += 1;
            }
            Completion::Received { token, chunk } => {
                let taken = self.received(index(token)?, chunk.slice);
                self.driver.release_chunk(chunk);
                taken?;
            }
            Completion::ReceiveEnded { token, .. } => {
                let at = index(token)?;
                if at < self.peers {
                    bail!("a peer is gone");
                }
                self.close(at);
            }
            Completion::Sent { token, .. } => {
                let at = index(token)?;
                if let Some(conn) = &mut self.conns[at] {
                    conn.sending = false;
                    std::mem::take(&mut conn.ending[0]).into_iter().for_each(|s| self.end(s));
                }
            }
            Completion::Closed { .. } | Completion::Woken => {}
        }
        Ok(())
    }

    fn turn(&mut self, out: &mut Vec<Completion>) -> Result<()> {
        self.driver.poll(out, None);
        out.drain(..).try_for_each(|completion| self.act(completion))?;
        self.flush();
        Ok(())
    }
}

/// Memory that is all there, as that of a volume which was written once.
fn full_memory(driver: &mut UringDriver, size: u64) -> Result<DeviceId> {
    const PIECE: u32 = 1 << 20;
    let region = MemRegion::new(usize::try_from(size)?)?;
    let device = driver.attach_device(Attach::Memory(region))?;
    let piece = driver.memory().alloc(PIECE).context("no memory")?;
    driver.memory().bytes_mut(piece.slice()).fill(0x5a);
    let mut out = Vec::new();
    for offset in (0..size / u64::from(PIECE)).map(|at| ByteOffset(at * u64::from(PIECE))) {
        let op = Op::Write { device, offset, buf: piece.slice(), fua: false };
        driver.submit(op, Token::new(DISK));
        driver.poll(&mut out, None);
    }
    driver.memory().release(piece);
    Ok(device)
}

/// Prints its address, and serves until it is ended.
pub(crate) fn node_main(options: &RelayNode) -> Result<()> {
    let mut driver = UringDriver::new(&DriverConfig::default())?;
    let mut device = match &options.file {
        Some(path) => {
            let file = BlockFile::open(path, IoMode::Direct)?;
            Some(driver.attach_device(Attach::File(file))?)
        }
        None => None,
    };
    if let Some(size) = options.memory {
        device = Some(full_memory(&mut driver, size)?);
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let itself = vec![address; if options.memory.is_some() { 3 } else { 0 }];
    let peers = [&options.peers[..], &itself].concat();
    let room = driver.memory().alloc(SLOTS * ROOM).context("no memory")?;
    let slots = (0..SLOTS).map(|_| Slot::default()).collect();
    let free = (0..SLOTS).rev().collect();
    let mut node =
        Node { driver, device, conns: Vec::new(), peers: 0, reads: 0, slots, free, room };
    for &peer in &peers {
        node.driver.submit(Op::Connect { peer, timeout_ms: 5000 }, Token::new(CONNECT));
    }
    let mut out = Vec::with_capacity(1024);
    while node.peers < peers.len() {
        node.turn(&mut out)?;
    }
    let listener = node.driver.attach_listener(listener)?;
    node.driver.submit(Op::Accept { listener }, Token::new(ACCEPT));
    println!("{address}");
    loop {
        node.turn(&mut out)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_what_follows_it() {
        let asked = Asked { verb: WRITE, tag: 7, len: 4096, offset: 5 << 40 };
        let mut bytes = [0; CAPSULE as usize];
        asked.put(&mut bytes);
        assert_eq!(Asked::get(&bytes), asked);
        assert_eq!((asked.brings(false), asked.brings(true)), (4096, 0));
        let read = Asked { verb: READ, ..asked };
        assert_eq!((read.brings(false), read.brings(true)), (0, 4096));
        assert_eq!(Asked { verb: FLUSH, ..asked }.brings(true), 0);
    }
}
