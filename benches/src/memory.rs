//! A [`Driver`] without a kernel: devices, connections and the clock are in this process, and whatever is asked is
//! done by the next poll. What a shard costs on it is what the shard itself costs, and two copies of what it
//! sends; and it is the same every time. The function `not_counted` does what a kernel and a disk would have
//! done: where instructions are counted ([`Wires::count`]), theirs are not.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;

use cairn_block::{Buf, BufSlice, HeapMemory, Memory};
use cairn_engine::device::PoolDevice;
use cairn_engine::replica::Device as _;
use cairn_reactor::{
    Attach, Chunk, Completion, DeviceId, DiskFault, Driver, EndReason, ListenerId, Op, SocketFault,
    SocketId, Token,
};

/// Bytes of a receive buffer, as io_uring's driver has them.
const CHUNK: u32 = 32 << 10;
const CHUNKS: u16 = 64;
/// What one poll takes. A shard does not poll again before it has looked at all.
const TICK_NS: u64 = 1_000;

/// One direction of a connection's end: who owns it, and what has arrived for it.
#[derive(Debug, Default)]
struct End {
    node: usize,
    /// Of the `Receive` that goes on.
    receiving: Option<Token>,
    arrived: Vec<u8>,
    taken: usize,
    open: bool,
}

/// Everything between the drivers.
#[derive(Debug, Default)]
pub struct Wires {
    ends: Vec<End>,
    /// By node: what is to be reported.
    ready: Vec<VecDeque<Completion>>,
    /// By node: where it listens, and the `Accept` that goes on.
    listeners: Vec<(SocketAddr, usize, Option<Token>)>,
    counting: bool,
}

impl Wires {
    /// Nothing, and nobody on it.
    #[must_use]
    pub fn new() -> Rc<RefCell<Self>> {
        Rc::default()
    }

    /// Whether instructions are counted from now on. A counter that is turned around by the functions that it is not
    /// to count must not see them before.
    pub fn count(&mut self, counting: bool) {
        self.counting = counting;
    }
}

/// A process's way to its devices and to the others.
#[derive(Debug)]
pub struct MemoryDriver {
    wires: Rc<RefCell<Wires>>,
    node: usize,
    memory: HeapMemory,
    chunks: Vec<Buf>,
    free: Vec<u16>,
    devices: Vec<Option<PoolDevice>>,
    /// The ends that are this one's.
    ends: Vec<usize>,
    now_ns: u64,
}

impl MemoryDriver {
    /// A process with so many bytes of arena.
    ///
    /// # Panics
    /// Where that is less than the receive buffers take.
    #[must_use]
    pub fn new(wires: &Rc<RefCell<Wires>>, arena_len: u32) -> Self {
        let mut memory = HeapMemory::new(arena_len);
        let chunks =
            (0..CHUNKS).map(|_| memory.alloc(CHUNK).expect("room for the chunks")).collect();
        let node = wires.borrow().ready.len();
        wires.borrow_mut().ready.push(VecDeque::with_capacity(1024));
        Self {
            wires: Rc::clone(wires),
            node,
            memory,
            chunks,
            free: (0..CHUNKS).rev().collect(),
            devices: Vec::new(),
            ends: Vec::new(),
            now_ns: 1_000_000_000,
        }
    }

    fn report(&mut self, completion: Completion) {
        self.wires.borrow_mut().ready[self.node].push_back(completion);
    }

    fn on_device(
        &mut self,
        id: DeviceId,
        token: Token,
        work: impl FnOnce(&mut PoolDevice, &mut HeapMemory) -> std::io::Result<()>,
    ) {
        let device = self.devices[id.0 as usize].as_mut().expect("it is attached");
        let counting = self.wires.borrow().counting;
        let result = outside(counting, || work(device, &mut self.memory));
        self.report(Completion::Disk { token, result: result.map_err(|_| DiskFault::Short) });
    }

    fn connect(&mut self, peer: SocketAddr, token: Token) {
        let mut wires = self.wires.borrow_mut();
        let listener = wires.listeners.iter().find(|(at, ..)| *at == peer);
        let Some(&(_, node, Some(accept))) = listener else {
            let result = Err(SocketFault::TimedOut);
            wires.ready[self.node].push_back(Completion::Connected { token, result });
            return;
        };
        let at = wires.ends.len();
        for owner in [self.node, node] {
            wires.ends.push(End {
                node: owner,
                arrived: Vec::with_capacity(4 << 20),
                open: true,
                ..End::default()
            });
        }
        wires.ready[self.node].push_back(Completion::Connected { token, result: Ok(socket(at)) });
        let accepted = Completion::Accepted { token: accept, result: Ok(socket(at + 1)) };
        wires.ready[node].push_back(accepted);
    }

    fn send(&mut self, socket: SocketId, windows: &[BufSlice], token: Token) {
        let mut wires = self.wires.borrow_mut();
        let counting = wires.counting;
        let peer = &mut wires.ends[end(socket) ^ 1];
        for &window in windows {
            outside(counting, || peer.arrived.extend_from_slice(self.memory.bytes(window)));
        }
        wires.ready[self.node].push_back(Completion::Sent { token, result: Ok(()) });
    }

    fn close(&mut self, socket: SocketId, token: Token) {
        let mut wires = self.wires.borrow_mut();
        for at in [end(socket), end(socket) ^ 1] {
            let End { node, receiving, open, .. } = &mut wires.ends[at];
            let (node, receiving, was_open) = (*node, receiving.take(), std::mem::take(open));
            if at != end(socket)
                && was_open
                && let Some(token) = receiving
            {
                let reason = EndReason::Eof;
                wires.ready[node].push_back(Completion::ReceiveEnded { token, reason });
            }
        }
        wires.ready[self.node].push_back(Completion::Closed { token });
        self.ends.retain(|at| *at != end(socket));
    }
}

/// What is done for the driver's user, out of sight of the counter.
#[inline(never)]
fn not_counted<T>(work: impl FnOnce() -> T) -> T {
    work()
}

fn outside<T>(counting: bool, work: impl FnOnce() -> T) -> T {
    if counting { not_counted(work) } else { work() }
}

fn socket(at: usize) -> SocketId {
    SocketId { index: u32::try_from(at).expect("few sockets"), generation: 0 }
}

fn end(socket: SocketId) -> usize {
    socket.index as usize
}

impl Driver for MemoryDriver {
    type Memory = HeapMemory;
    type Device = Attach;
    type Listener = SocketAddr;
    type Socket = SocketId;

    fn memory(&mut self) -> &mut HeapMemory {
        &mut self.memory
    }

    fn submit(&mut self, op: Op<'_>, token: Token) {
        match op {
            Op::Read { device, offset, buf } => {
                self.on_device(device, token, |d, mem| d.read_at(offset.0, mem.bytes_mut(buf)));
            }
            Op::Write { device, offset, buf, .. } => {
                self.on_device(device, token, |d, mem| d.write_at(offset.0, mem.bytes(buf)));
            }
            Op::Flush { device } => self.on_device(device, token, |_, _| Ok(())),
            Op::Zero { device, offset, len, .. } => {
                self.on_device(device, token, |d, _| d.zero(offset.0, len));
            }
            Op::Accept { listener } => {
                self.wires.borrow_mut().listeners[listener.0 as usize].2 = Some(token);
            }
            Op::Connect { peer, .. } => self.connect(peer, token),
            Op::Receive { socket } => {
                let mut wires = self.wires.borrow_mut();
                wires.ends[end(socket)].receiving = Some(token);
                drop(wires);
                if !self.ends.contains(&end(socket)) {
                    self.ends.push(end(socket));
                }
            }
            Op::PauseReceive { socket } => {
                let receiving = self.wires.borrow_mut().ends[end(socket)].receiving.take();
                if let Some(token) = receiving {
                    self.report(Completion::ReceiveEnded { token, reason: EndReason::Paused });
                }
            }
            Op::Send { socket, windows } => self.send(socket, windows, token),
            Op::Close { socket } => self.close(socket, token),
        }
    }

    /// Never waits: whoever else is to do something is on the same thread.
    fn poll(&mut self, out: &mut Vec<Completion>, _deadline_ns: Option<u64>) {
        self.now_ns += TICK_NS;
        let mut wires = self.wires.borrow_mut();
        out.extend(wires.ready[self.node].drain(..));
        let counting = wires.counting;
        for &at in &self.ends {
            let end = &mut wires.ends[at];
            let Some(token) = end.receiving else { continue };
            while end.taken < end.arrived.len() {
                let Some(id) = self.free.pop() else { return };
                let rest = &end.arrived[end.taken..];
                let len = CHUNK.min(u32::try_from(rest.len()).unwrap_or(CHUNK));
                let slice = self.chunks[usize::from(id)].slice().sub(0, len);
                let to = self.memory.bytes_mut(slice);
                outside(counting, || to.copy_from_slice(&rest[..len as usize]));
                end.taken += len as usize;
                out.push(Completion::Received { token, chunk: Chunk { id, slice } });
            }
            end.arrived.clear();
            end.taken = 0;
        }
    }

    fn now_ns(&self) -> u64 {
        self.now_ns
    }

    fn release_chunk(&mut self, chunk: Chunk) {
        self.free.push(chunk.id);
    }

    fn attach_device(&mut self, device: Attach) -> std::io::Result<DeviceId> {
        self.devices.push(Some(PoolDevice(device)));
        Ok(DeviceId(u32::try_from(self.devices.len() - 1).expect("few devices")))
    }

    fn detach_device(&mut self, device: DeviceId) -> Option<Attach> {
        self.devices[device.0 as usize].take().map(|device| device.0)
    }

    fn attach_listener(&mut self, listener: SocketAddr) -> std::io::Result<ListenerId> {
        let mut wires = self.wires.borrow_mut();
        wires.listeners.push((listener, self.node, None));
        Ok(ListenerId(u32::try_from(wires.listeners.len() - 1).expect("few listeners")))
    }

    fn detach_listener(&mut self, listener: ListenerId) {
        self.wires.borrow_mut().listeners[listener.0 as usize].2 = None;
    }

    fn detach_socket(&mut self, socket: SocketId) -> Option<SocketId> {
        let receiving = self.wires.borrow().ends[end(socket)].receiving.is_some();
        self.ends.retain(|at| *at != end(socket));
        (!receiving).then_some(socket)
    }

    /// Its number is the same for all drivers.
    fn attach_socket(&mut self, socket: SocketId) -> Result<SocketId, SocketFault> {
        self.wires.borrow_mut().ends[end(socket)].node = self.node;
        Ok(socket)
    }
}
