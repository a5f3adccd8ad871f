//! The [`Driver`] of one simulated process.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;

use cairn_block::{Buf, HeapMemory, Memory, Received};
use cairn_engine::reactor::{
    Chunk, Completion, DeviceId, Driver, ListenerId, Op, SocketFault, SocketId, Token,
};

use crate::disk::{PAGE, page_of};
use crate::net::{SimSocket, checksum};
use crate::world::{CHUNK, CHUNKS, DiskRef, DiskWork, Inbox, Machine, NodeId, World};

/// What a buffer is filled with while a read that was asked to fill it is under way.
const NOT_YET: u8 = 0xee;

/// A process's way to the world.
#[derive(Debug)]
pub struct SimDriver {
    world: Rc<RefCell<World>>,
    node: NodeId,
    memory: HeapMemory,
    chunks: Vec<Buf>,
    listeners: Vec<Option<SocketAddr>>,
}

impl SimDriver {
    /// The driver of a new process on a machine, with an arena of `arena_len` bytes besides its
    /// receive buffers.
    ///
    /// # Panics
    /// Where the arena is smaller than one receive buffer.
    #[must_use]
    pub fn new(world: &Rc<RefCell<World>>, machine: Machine, arena_len: u32) -> Self {
        let node = world.borrow_mut().add_node(machine);
        let len = u32::try_from(CHUNK).expect("a chunk is short");
        let mut memory = HeapMemory::new(arena_len + u32::from(CHUNKS) * len);
        let chunks: Vec<Buf> =
            (0..CHUNKS).map(|_| memory.alloc(len).expect("the arena holds the chunks")).collect();
        let mut received = Received::new(chunks[0].slice().offset(), len, CHUNKS, CHUNKS / 3);
        // Some processes have devices that take nothing as it was received.
        if node.0 % 3 == 2 {
            received.demand_alignment(4096);
        }
        memory.set_received(received);
        Self { world: Rc::clone(world), node, memory, chunks, listeners: Vec::new() }
    }

    /// Which process this is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    fn world(&self) -> std::cell::RefMut<'_, World> {
        self.world.borrow_mut()
    }

    fn finish_disk(&mut self, op: usize) -> Completion {
        let done = self.world().take_disk_op(op);
        match done.work {
            DiskWork::Read { buf, data, .. } => {
                let bytes = self.memory.bytes_mut(buf);
                assert!(
                    bytes.chunks(PAGE).all(|page| page == [NOT_YET; PAGE]),
                    "somebody wrote to the buffer of a read in flight"
                );
                for (to, page) in bytes.chunks_mut(PAGE).zip(&data) {
                    match page {
                        Some(page) if done.result.is_ok() => to.copy_from_slice(&page[..]),
                        None if done.result.is_ok() => to.fill(0),
                        _ => {}
                    }
                }
            }
            DiskWork::Write { buf, data, .. } => {
                let same = self
                    .memory
                    .bytes(buf)
                    .chunks(PAGE)
                    .zip(&data)
                    .all(|(now, page)| page.as_ref().is_some_and(|page| now == &page[..]));
                assert!(same, "the buffer of a write changed while it was in flight");
            }
            DiskWork::Flush { .. } | DiskWork::Zero { .. } => {}
        }
        Completion::Disk { token: done.token, result: done.result }
    }

    fn finish(&mut self, item: Inbox) -> Option<Completion> {
        Some(match item {
            Inbox::Disk { op } => self.finish_disk(op),
            Inbox::Accepted { token, socket } => Completion::Accepted { token, result: Ok(socket) },
            Inbox::Connected { token, result } => Completion::Connected { token, result },
            Inbox::Received { socket, token, chunk, len } => {
                let mut world = self.world.borrow_mut();
                if world.is_closing(self.node, socket) {
                    world.free_chunk(self.node, chunk);
                    return None;
                }
                let len = u32::try_from(len).expect("a chunk is short");
                let slice = self.chunks[usize::from(chunk)].slice().sub(0, len);
                let bytes = &world.nodes[self.node.0].staging[usize::from(chunk)];
                self.memory.bytes_mut(slice).copy_from_slice(bytes);
                self.memory.received().expect("it was set").take(chunk);
                Completion::Received { token, chunk: Chunk { id: chunk, slice } }
            }
            Inbox::ReceiveEnded { socket, token, reason } => {
                if self.world().is_closing(self.node, socket) {
                    return None;
                }
                Completion::ReceiveEnded { token, reason }
            }
            Inbox::Sent { socket, token, result } => {
                let sent = self.world().sent_windows(self.node, socket);
                if let Some((windows, sum)) = sent {
                    let now = windows.iter().fold(0, |sum, &w| checksum(sum, self.memory.bytes(w)));
                    assert_eq!(now, sum, "what was sent changed while it was in flight");
                }
                Completion::Sent { token, result }
            }
            Inbox::Woken => Completion::Woken,
            Inbox::Closed { token } => {
                self.world().forget_socket(self.node, token);
                Completion::Closed { token }
            }
        })
    }

    /// What nobody uses any more can be received into again.
    fn take_free_chunks(&mut self) {
        while let Some(chunk) = self.memory.received().and_then(Received::poll_free) {
            self.world().free_chunk(self.node, chunk);
        }
    }

    fn page(offset: u64) -> u64 {
        assert!(offset.is_multiple_of(PAGE as u64), "an unaligned transfer at {offset}");
        offset / PAGE as u64
    }

    fn submit_disk(&mut self, device: DeviceId, token: Token, work: DiskWork) {
        self.world().submit_disk(self.node, device.0 as usize, token, work);
    }
}

impl Driver for SimDriver {
    type Memory = HeapMemory;
    type Device = DiskRef;
    type Listener = SocketAddr;
    type Socket = SimSocket;

    fn memory(&mut self) -> &mut HeapMemory {
        &mut self.memory
    }

    fn submit(&mut self, op: Op<'_>, token: Token) {
        match op {
            Op::Read { device, offset, buf } => {
                assert!(!buf.is_empty(), "a read of nothing");
                self.memory.bytes_mut(buf).fill(NOT_YET);
                let work = DiskWork::Read { page: Self::page(offset.0), buf, data: Vec::new() };
                self.submit_disk(device, token, work);
            }
            Op::Write { device, offset, buf, fua } => {
                assert!(!buf.is_empty(), "a write of nothing");
                let data = self.memory.bytes(buf).chunks(PAGE).map(page_of).collect();
                let page = Self::page(offset.0);
                self.submit_disk(device, token, DiskWork::Write { page, buf, data, fua });
            }
            Op::Flush { device } => {
                let mark = self.world().disks[device.0 as usize].mark();
                self.submit_disk(device, token, DiskWork::Flush { mark });
            }
            Op::Zero { device, offset, len, .. } => {
                let (page, pages) = (Self::page(offset.0), Self::page(len));
                self.submit_disk(device, token, DiskWork::Zero { page, pages });
            }
            Op::Accept { listener } => {
                if let Some(Some(address)) = self.listeners.get(listener.0 as usize).copied() {
                    self.world().accept(address, token);
                }
            }
            Op::Connect { peer, timeout_ms } => {
                self.world().connect(self.node, peer, timeout_ms, token);
            }
            Op::Receive { socket } => self.world().receive(self.node, socket, token),
            Op::PauseReceive { socket } => self.world().pause_receive(self.node, socket),
            Op::Send { socket, windows } => {
                self.world.borrow_mut().send(self.node, socket, token, windows, &self.memory);
            }
            Op::Close { socket } => self.world().close(self.node, socket, token),
        }
    }

    /// Never blocks: a poll with nothing due tells the world until when it would have waited.
    fn poll(&mut self, out: &mut Vec<Completion>, deadline_ns: Option<u64>) {
        self.take_free_chunks();
        self.world().wait_until(self.node, deadline_ns);
        let due = self.world().nodes[self.node.0].inbox.len();
        for _ in 0..due {
            let Some(item) = self.world().nodes[self.node.0].inbox.pop_front() else { break };
            if let Some(completion) = self.finish(item) {
                out.push(completion);
            }
        }
    }

    fn now_ns(&self) -> u64 {
        self.world.borrow().now
    }

    fn release_chunk(&mut self, chunk: Chunk) {
        self.memory.received().expect("it was set").give_back(chunk.id);
        self.take_free_chunks();
    }

    fn attach_device(&mut self, device: DiskRef) -> std::io::Result<DeviceId> {
        Ok(DeviceId(u32::try_from(device.0).expect("few disks")))
    }

    fn detach_device(&mut self, device: DeviceId) -> Option<DiskRef> {
        Some(DiskRef(device.0 as usize))
    }

    fn attach_listener(&mut self, listener: SocketAddr) -> std::io::Result<ListenerId> {
        self.world().listen(self.node, listener)?;
        self.listeners.push(Some(listener));
        Ok(ListenerId(u32::try_from(self.listeners.len() - 1).expect("few listeners")))
    }

    fn detach_listener(&mut self, listener: ListenerId) {
        let address = self.listeners.get_mut(listener.0 as usize).and_then(Option::take);
        if let Some(address) = address {
            self.world().stop_listening(address);
        }
    }

    fn detach_socket(&mut self, socket: SocketId) -> Option<SimSocket> {
        self.world().detach_socket(self.node, socket)
    }

    fn attach_socket(&mut self, socket: SimSocket) -> Result<SocketId, SocketFault> {
        Ok(self.world().attach_socket(self.node, &socket))
    }
}
