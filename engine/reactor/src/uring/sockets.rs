//! Connected sockets: receiving, sending, and a close that waits for both to end.

use std::collections::VecDeque;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use cairn_block::BufSlice;
use io_uring::{cqueue, opcode, squeue, types};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage};

use super::recv_ring::{GROUPS, Group, RecvBuffers};
use super::{Core, Kind, Target, with_target};
use crate::seam::{Chunk, Completion, EndReason, SocketFault, SocketId, Token};

/// Windows of one send: a batch of responses with their payloads.
const MAX_WINDOWS: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    /// Not asked for.
    Off,
    /// The kernel has it.
    Armed,
    /// Asked for, but no buffer was free: armed again when one comes back.
    Starved,
    /// The kernel has it and was told to stop.
    Stopping,
}

/// What must stay put while a connect is in flight.
struct Connecting {
    token: Token,
    address: SockaddrStorage,
    limit: types::Timespec,
}

struct Socket {
    stream: TcpStream,
    target: Target,
    generation: u32,
    group: Group,
    receiving: Receiving,
    recv_token: Token,
    send_token: Option<Token>,
    send_len: usize,
    iovecs: Vec<libc::iovec>,
    message: Box<libc::msghdr>,
    connecting: Option<Box<Connecting>>,
    closing: Option<Token>,
}

impl Socket {
    fn is_quiet(&self) -> bool {
        matches!(self.receiving, Receiving::Off | Receiving::Starved)
            && self.send_token.is_none()
            && self.connecting.is_none()
    }
}

pub(super) struct Sockets {
    slots: Vec<Option<Socket>>,
    generations: Vec<u32>,
    free: Vec<u32>,
    max: u32,
    /// Of each group.
    starved: [VecDeque<u32>; 2],
}

/// Closes a connection that was accepted after its listener went away.
pub(super) fn close_stray(fd: i32) {
    if fd >= 0 {
        // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

impl Sockets {
    pub(super) fn new(max: u32) -> Self {
        Self {
            slots: Vec::new(),
            generations: Vec::new(),
            free: Vec::new(),
            max,
            starved: [VecDeque::with_capacity(64), VecDeque::with_capacity(64)],
        }
    }

    /// Takes an accepted descriptor (or the negative error in its place) into the table.
    pub(super) fn adopt(&mut self, core: &mut Core, fd: i32) -> Result<SocketId, SocketFault> {
        if fd < 0 {
            return Err(SocketFault::Errno(-fd));
        }
        // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        self.insert(core, TcpStream::from(fd), Group::Accepted)
    }

    /// Takes a socket into the table that was another driver's.
    pub(super) fn attach(
        &mut self,
        core: &mut Core,
        stream: TcpStream,
    ) -> Result<SocketId, SocketFault> {
        self.insert(core, stream, Group::Accepted)
    }

    /// Gives a quiet socket away.
    pub(super) fn detach(&mut self, core: &mut Core, id: SocketId) -> Option<TcpStream> {
        let quiet =
            |s: &&mut Socket| s.receiving == Receiving::Off && s.is_quiet() && s.closing.is_none();
        self.socket(id).filter(quiet)?;
        self.remove(core, id.index)
    }

    fn insert(
        &mut self,
        core: &mut Core,
        stream: TcpStream,
        group: Group,
    ) -> Result<SocketId, SocketFault> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let next = u32::try_from(self.slots.len()).map_err(|_| SocketFault::NoSlot)?;
                if next >= self.max {
                    return Err(SocketFault::NoSlot);
                }
                self.slots.push(None);
                self.generations.push(0);
                next
            }
        };
        let generation = self.generations[index as usize];
        let target = core.register(stream.as_raw_fd());
        // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
        let message: libc::msghdr = unsafe { std::mem::zeroed() };
        self.slots[index as usize] = Some(Socket {
            stream,
            target,
            generation,
            group,
            receiving: Receiving::Off,
            recv_token: Token::default(),
            send_token: None,
            send_len: 0,
            iovecs: Vec::with_capacity(MAX_WINDOWS),
            message: Box::new(message),
            connecting: None,
            closing: None,
        });
        Ok(SocketId { index, generation })
    }

    fn socket(&mut self, id: SocketId) -> Option<&mut Socket> {
        self.slots
            .get_mut(id.index as usize)?
            .as_mut()
            .filter(|socket| socket.generation == id.generation)
    }

    pub(super) fn connect(
        &mut self,
        core: &mut Core,
        peer: SocketAddr,
        timeout_ms: u32,
        token: Token,
    ) {
        if let Err(fault) = self.try_connect(core, peer, timeout_ms, token) {
            core.ready.push_back(Completion::Connected { token, result: Err(fault) });
        }
    }

    fn try_connect(
        &mut self,
        core: &mut Core,
        peer: SocketAddr,
        timeout_ms: u32,
        token: Token,
    ) -> Result<(), SocketFault> {
        let errno = |e: nix::errno::Errno| SocketFault::Errno(e as i32);
        let family = if peer.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let fd = nix::sys::socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .map_err(errno)?;
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::TcpNoDelay, &true)
            .map_err(errno)?;
        let id = self.insert(core, TcpStream::from(fd), Group::Connected)?;
        let limit = types::Timespec::from(Duration::from_millis(u64::from(timeout_ms)));
        let connecting =
            Box::new(Connecting { token, address: SockaddrStorage::from(peer), limit });
        let socket = self.slots[id.index as usize].as_mut().expect("it was just inserted");
        let connecting = socket.connecting.insert(connecting);
        let (address, len) = (connecting.address.as_ptr(), connecting.address.len());
        let limit: *const types::Timespec = &raw const connecting.limit;
        let entry = with_target!(socket.target, |fd| opcode::Connect::new(fd, address, len)
            .build())
        .flags(squeue::Flags::IO_LINK)
        .user_data(Kind::Connect.user_data(id.index));
        let timeout = opcode::LinkTimeout::new(limit).build().user_data(Kind::Ignored.user_data(0));
        core.push_linked(&entry, &timeout);
        Ok(())
    }

    pub(super) fn handle_connect(
        &mut self,
        core: &mut Core,
        index: u32,
        result: i32,
        out: &mut Vec<Completion>,
    ) {
        let socket = self.slots[index as usize].as_mut().expect("its connect was in flight");
        let connecting = socket.connecting.take().expect("its connect was in flight");
        let token = connecting.token;
        if result < 0 {
            let fault = match -result {
                libc::ECANCELED => SocketFault::TimedOut,
                errno => SocketFault::Errno(errno),
            };
            self.remove(core, index);
            out.push(Completion::Connected { token, result: Err(fault) });
            return;
        }
        let id = SocketId { index, generation: socket.generation };
        out.push(Completion::Connected { token, result: Ok(id) });
    }

    pub(super) fn receive(&mut self, core: &mut Core, id: SocketId, token: Token) {
        let gone = SocketFault::Errno(libc::ENOTCONN);
        let Some(socket) = self.socket(id).filter(|s| s.closing.is_none()) else {
            core.ready
                .push_back(Completion::ReceiveEnded { token, reason: EndReason::Fault(gone) });
            return;
        };
        assert!(socket.receiving == Receiving::Off, "a socket is received from once");
        socket.recv_token = token;
        socket.receiving = Receiving::Armed;
        arm(core, id.index, socket);
    }

    pub(super) fn pause_receive(&mut self, core: &mut Core, id: SocketId) {
        let Some(socket) = self.socket(id) else { return };
        match socket.receiving {
            Receiving::Armed => {
                socket.receiving = Receiving::Stopping;
                cancel(core, Kind::Recv, id.index);
            }
            Receiving::Starved => {
                socket.receiving = Receiving::Off;
                let token = socket.recv_token;
                core.ready.push_back(Completion::ReceiveEnded { token, reason: EndReason::Paused });
            }
            Receiving::Off | Receiving::Stopping => {}
        }
    }

    pub(super) fn handle_recv(
        &mut self,
        core: &mut Core,
        ring: &mut RecvBuffers,
        index: u32,
        result: i32,
        flags: u32,
        out: &mut Vec<Completion>,
    ) {
        let socket = self.slots[index as usize].as_mut().expect("its receive was in flight");
        let (token, group) = (socket.recv_token, socket.group);
        let chunk = cqueue::buffer_select(flags).map(|id| {
            let len = u32::try_from(result).unwrap_or(0);
            Chunk { id, slice: ring.take(&mut core.arena, group, id, len) }
        });
        if let Some(chunk) = chunk {
            if socket.closing.is_some() || chunk.slice.is_empty() {
                ring.give_back(&mut core.arena, chunk.id);
            } else {
                out.push(Completion::Received { token, chunk });
            }
        }
        if cqueue::more(flags) {
            return;
        }
        if socket.closing.is_some() {
            socket.receiving = Receiving::Off;
            self.finish_close(core, index);
            return;
        }
        let reason = match result {
            0 => EndReason::Eof,
            n if n > 0 || -n == libc::EINTR || -n == libc::EAGAIN => {
                // The kernel ended a multishot of its own accord, or it was a single one.
                if socket.receiving != Receiving::Stopping {
                    arm(core, index, socket);
                    return;
                }
                EndReason::Paused
            }
            n if -n == libc::ENOBUFS => {
                ring.ran_out(&core.arena, group);
                if socket.receiving != Receiving::Stopping {
                    socket.receiving = Receiving::Starved;
                    self.starved[group as usize].push_back(index);
                    return;
                }
                EndReason::Paused
            }
            n if -n == libc::ECANCELED && socket.receiving == Receiving::Stopping => {
                EndReason::Paused
            }
            n => EndReason::Fault(SocketFault::Errno(-n)),
        };
        socket.receiving = Receiving::Off;
        out.push(Completion::ReceiveEnded { token, reason });
    }

    /// Arms sockets that had found no buffer, those that have waited longest first: as many as there are buffers
    /// now. Those that find none again wait behind all others, or some would never get one.
    pub(super) fn rearm(&mut self, core: &mut Core, ring: &RecvBuffers) {
        for group in GROUPS {
            self.rearm_some(core, group, ring.offered(group));
        }
    }

    /// As [`Sockets::rearm`], before a sleep: one that is armed and has nothing to receive takes no buffer, and none that
    /// has something may be left out while there are buffers.
    pub(super) fn rearm_all(&mut self, core: &mut Core, ring: &RecvBuffers) {
        for group in GROUPS {
            if ring.offered(group) > 0 {
                self.rearm_some(core, group, usize::MAX);
            }
        }
    }

    fn rearm_some(&mut self, core: &mut Core, group: Group, mut most: usize) {
        while most > 0
            && let Some(index) = self.starved[group as usize].pop_front()
        {
            let Some(socket) = self.slots[index as usize].as_mut() else { continue };
            if socket.receiving == Receiving::Starved {
                socket.receiving = Receiving::Armed;
                arm(core, index, socket);
                most -= 1;
            }
        }
    }

    pub(super) fn send(
        &mut self,
        core: &mut Core,
        id: SocketId,
        windows: &[BufSlice],
        token: Token,
    ) {
        let Some(socket) = self.socket(id).filter(|s| s.closing.is_none()) else {
            let result = Err(SocketFault::Errno(libc::ENOTCONN));
            core.ready.push_back(Completion::Sent { token, result });
            return;
        };
        assert!(socket.send_token.is_none(), "one send at a time on a socket");
        assert!(windows.len() <= MAX_WINDOWS, "a send of {} windows", windows.len());
        socket.send_token = Some(token);
        socket.iovecs.clear();
        socket.iovecs.extend(windows.iter().map(|&w| libc::iovec {
            iov_base: core.arena.ptr(w).cast(),
            iov_len: w.len() as usize,
        }));
        socket.send_len = windows.iter().map(|w| w.len() as usize).sum();
        start_send(core, id.index, socket);
    }

    pub(super) fn handle_send(
        &mut self,
        core: &mut Core,
        index: u32,
        result: i32,
        out: &mut Vec<Completion>,
    ) {
        let socket = self.slots[index as usize].as_mut().expect("its send was in flight");
        let sent = usize::try_from(result).unwrap_or(0);
        let result = match result {
            n if -n == libc::EINTR || -n == libc::EAGAIN => {
                start_send(core, index, socket);
                return;
            }
            n if n < 0 => Err(SocketFault::Errno(-n)),
            _ if sent < socket.send_len && sent > 0 => {
                socket.send_len -= sent;
                skip(&mut socket.iovecs, sent);
                start_send(core, index, socket);
                return;
            }
            _ if sent < socket.send_len => Err(SocketFault::Errno(libc::EPIPE)),
            _ => Ok(()),
        };
        let token = socket.send_token.take().expect("its send was in flight");
        out.push(Completion::Sent { token, result });
        if socket.closing.is_some() {
            self.finish_close(core, index);
        }
    }

    pub(super) fn close(&mut self, core: &mut Core, id: SocketId, token: Token) {
        let Some(socket) = self.socket(id).filter(|s| s.closing.is_none()) else {
            core.ready.push_back(Completion::Closed { token });
            return;
        };
        socket.closing = Some(token);
        // Ends a receive and a send that are in flight; it fails where the peer was first.
        let _done = socket.stream.shutdown(Shutdown::Both);
        if socket.connecting.is_some() {
            cancel(core, Kind::Connect, id.index);
        }
        if matches!(socket.receiving, Receiving::Armed | Receiving::Stopping) {
            cancel(core, Kind::Recv, id.index);
        }
        self.finish_close(core, id.index);
    }

    fn finish_close(&mut self, core: &mut Core, index: u32) {
        let socket = self.slots[index as usize].as_ref().expect("it is being closed");
        if let Some(token) = socket.closing.filter(|_| socket.is_quiet()) {
            self.remove(core, index);
            core.ready.push_back(Completion::Closed { token });
        }
    }

    fn remove(&mut self, core: &mut Core, index: u32) -> Option<TcpStream> {
        let socket = self.slots[index as usize].take()?;
        core.unregister(socket.target);
        self.generations[index as usize] = socket.generation.wrapping_add(1);
        self.starved.iter_mut().for_each(|starved| starved.retain(|&s| s != index));
        self.free.push(index);
        Some(socket.stream)
    }
}

impl Core {
    /// Queues two linked entries; a link must not be cut by a submit between them.
    fn push_linked(&mut self, first: &squeue::Entry, second: &squeue::Entry) {
        let room = {
            let queue = self.ring.submission();
            queue.capacity() - queue.len()
        };
        if room < 2 {
            self.enter(0, None);
        }
        self.push(first);
        self.push(second);
    }
}

fn arm(core: &mut Core, index: u32, socket: &Socket) {
    let (target, group) = (socket.target, socket.group as u16);
    let entry = if core.features.multishot_receive {
        with_target!(target, |fd| opcode::RecvMulti::new(fd, group).build())
    } else {
        with_target!(target, |fd| opcode::Recv::new(fd, std::ptr::null_mut(), 0)
            .buf_group(group)
            .build())
        .flags(squeue::Flags::BUFFER_SELECT)
    };
    core.push(&entry.user_data(Kind::Recv.user_data(index)));
}

fn cancel(core: &mut Core, kind: Kind, index: u32) {
    let entry = opcode::AsyncCancel::new(kind.user_data(index))
        .build()
        .user_data(Kind::Ignored.user_data(0));
    core.push(&entry);
}

/// Sends what the iovecs name. With `MSG_WAITALL` the kernel itself goes on after a short send.
fn start_send(core: &mut Core, index: u32, socket: &mut Socket) {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
    let entry = if let [only] = socket.iovecs[..] {
        let len = u32::try_from(only.iov_len).expect("a window is shorter than 2^32");
        with_target!(socket.target, |fd| opcode::Send::new(fd, only.iov_base.cast(), len)
            .flags(flags)
            .build())
    } else {
        socket.message.msg_iov = socket.iovecs.as_mut_ptr();
        socket.message.msg_iovlen = socket.iovecs.len();
        let message: *const libc::msghdr = &raw const *socket.message;
        #[expect(clippy::cast_sign_loss, reason = "the flags are a bit mask")]
        let flags = flags as u32;
        with_target!(socket.target, |fd| opcode::SendMsg::new(fd, message).flags(flags).build())
    };
    core.push(&entry.user_data(Kind::Send.user_data(index)));
}

/// Drops the first `sent` bytes of the list.
fn skip(iovecs: &mut Vec<libc::iovec>, mut sent: usize) {
    let whole = iovecs
        .iter()
        .take_while(|v| {
            let all = v.iov_len <= sent;
            if all {
                sent -= v.iov_len;
            }
            all
        })
        .count();
    iovecs.drain(..whole);
    if let Some(first) = iovecs.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(sent).cast();
        first.iov_len -= sent;
    }
}
