//! The seam between what decides and what touches the kernel.
//!
//! A [`Driver`] takes operations and reports completions. The engine is generic over it, so the same
//! shard runs on io_uring and in the simulator. Limits: one [`Op::Send`] per socket at a time; every
//! operation is answered by exactly one [`Completion`], except [`Op::Accept`] and [`Op::Receive`],
//! which go on until they are ended, and [`Op::PauseReceive`], which is answered by
//! [`Completion::ReceiveEnded`].

use std::net::SocketAddr;

use cairn_block::{BufSlice, ByteOffset, Memory};

/// The caller's name for an operation. The top byte belongs to the driver and is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Token(u64);

impl Token {
    /// # Panics
    /// Where the top byte of `value` is not zero.
    #[must_use]
    pub const fn new(value: u64) -> Self {
        assert!(value >> 56 == 0, "the top byte of a token belongs to the driver");
        Self(value)
    }

    /// The value that it was made from.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }
}

/// A block device, file or memory region attached to a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// A connected socket. Never reused for another connection while the driver lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId {
    /// The slot in the driver's table.
    pub index: u32,
    /// Counts the sockets that have had this slot.
    pub generation: u32,
}

/// A listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(pub u32);

/// What a driver is asked to do. Lengths and offsets are in bytes.
#[derive(Debug, Clone, Copy)]
pub enum Op<'a> {
    /// Fill `buf` from the device.
    Read {
        /// From which device.
        device: DeviceId,
        /// From where on it.
        offset: ByteOffset,
        /// Into where.
        buf: BufSlice,
    },
    /// Write `buf` to the device. It must not change until the completion.
    Write {
        /// To which device.
        device: DeviceId,
        /// Where on it.
        offset: ByteOffset,
        /// From where.
        buf: BufSlice,
        /// Complete only when this data is durable.
        fua: bool,
    },
    /// Make every write completed so far durable.
    Flush {
        /// Of which device.
        device: DeviceId,
    },
    /// Make a range read as zeros.
    Zero {
        /// Of which device.
        device: DeviceId,
        /// From where.
        offset: ByteOffset,
        /// How many bytes.
        len: u64,
        /// Give the space back to what is beneath.
        punch: bool,
    },
    /// Report each connection that arrives.
    Accept {
        /// On which listener.
        listener: ListenerId,
    },
    /// Open a connection.
    Connect {
        /// To where.
        peer: SocketAddr,
        /// Give up after so long.
        timeout_ms: u32,
    },
    /// Report what arrives on a socket until it ends.
    Receive {
        /// The socket.
        socket: SocketId,
    },
    /// Stop reporting; what arrived meanwhile is still reported before `ReceiveEnded(Paused)`.
    PauseReceive {
        /// The socket.
        socket: SocketId,
    },
    /// Send all of the windows, in order. None of them may change until the completion.
    Send {
        /// The socket.
        socket: SocketId,
        /// What to send. The list itself is copied before `submit` returns.
        windows: &'a [BufSlice],
    },
    /// Shut the connection down. A send in flight is answered first; then `Closed`.
    Close {
        /// The socket.
        socket: SocketId,
    },
}

/// Why a disk operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiskFault {
    /// What is beneath the device has no room (a sparse file on a full filesystem).
    #[error("no space left beneath the device")]
    NoSpace,
    /// Anything else.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// The device ended before the range did.
    #[error("the device is shorter than the range")]
    Short,
}

/// Why a socket operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SocketFault {
    /// The system's error number.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// It took longer than the caller allowed.
    #[error("timed out")]
    TimedOut,
    /// Every socket slot is taken.
    #[error("no socket slot is free")]
    NoSlot,
}

/// Why a receive ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The peer closed its side.
    Eof,
    /// [`Op::PauseReceive`] asked for it.
    Paused,
    /// The connection failed.
    Fault(SocketFault),
}

/// Received bytes in one of the driver's receive buffers; given back by [`Driver::release_chunk`].
#[derive(Debug)]
#[must_use = "a chunk that is dropped is lost to the receive ring"]
pub struct Chunk {
    /// The driver's name for the buffer.
    pub id: u16,
    /// The bytes.
    pub slice: BufSlice,
}

/// What happened.
#[derive(Debug)]
pub enum Completion {
    /// A read, write, flush or zero is over.
    Disk {
        /// As submitted.
        token: Token,
        /// How it ended.
        result: Result<(), DiskFault>,
    },
    /// A connection arrived.
    Accepted {
        /// Of the `Accept`.
        token: Token,
        /// The connection, or why it could not be taken. Accepting goes on after a fault.
        result: Result<SocketId, SocketFault>,
    },
    /// A `Connect` is over.
    Connected {
        /// As submitted.
        token: Token,
        /// How it ended.
        result: Result<SocketId, SocketFault>,
    },
    /// Bytes arrived.
    Received {
        /// Of the `Receive`.
        token: Token,
        /// The bytes.
        chunk: Chunk,
    },
    /// Nothing more is reported of this `Receive`.
    ReceiveEnded {
        /// Of the `Receive`.
        token: Token,
        /// Why.
        reason: EndReason,
    },
    /// A `Send` is over.
    Sent {
        /// As submitted.
        token: Token,
        /// Whether all of it went out.
        result: Result<(), SocketFault>,
    },
    /// The socket is gone; its slot and everything it used are free.
    Closed {
        /// Of the `Close`.
        token: Token,
    },
    /// Another thread woke this one.
    Woken,
}

/// Submits operations and reports completions.
pub trait Driver {
    /// The arena that every [`BufSlice`] of this driver points into.
    type Memory: Memory;
    /// What can be attached as a device.
    type Device;
    /// What can be attached as a listener.
    type Listener;
    /// A connection on its way from one driver to another.
    type Socket;

    /// The arena.
    fn memory(&mut self) -> &mut Self::Memory;

    /// Takes an operation. It may be started as late as the next [`Driver::poll`].
    fn submit(&mut self, op: Op<'_>, token: Token);

    /// Starts what was submitted and appends what completed to `out`. Waits for at least one
    /// completion, but not past `deadline_ns`; a deadline that has passed means "do not wait".
    fn poll(&mut self, out: &mut Vec<Completion>, deadline_ns: Option<u64>);

    /// Reports at most about so many completions at once, as far as each is one. What comes of them is submitted
    /// before the others are told of.
    fn set_batch(&mut self, most: usize) {
        // Who is asked for everything at once has nothing to send in between.
        let _ = most;
    }

    /// Nanoseconds of a monotonic clock that goes on while the machine is suspended.
    fn now_ns(&self) -> u64;

    /// Gives a receive buffer back.
    fn release_chunk(&mut self, chunk: Chunk);

    /// Makes a device usable by [`Op`]s.
    ///
    /// # Errors
    /// Where the kernel refuses it.
    fn attach_device(&mut self, device: Self::Device) -> std::io::Result<DeviceId>;

    /// Forgets a device that has nothing in flight.
    fn detach_device(&mut self, device: DeviceId) -> Option<Self::Device>;

    /// Makes a listener usable by [`Op::Accept`].
    ///
    /// # Errors
    /// Where the kernel refuses it.
    fn attach_listener(&mut self, listener: Self::Listener) -> std::io::Result<ListenerId>;

    /// Stops listening.
    fn detach_listener(&mut self, listener: ListenerId);

    /// Lets go of a quiet socket, for another driver to have: one that is not received from, has no send in flight and
    /// is not being closed. Its slot is free afterwards. Nothing where it is not quiet, or gone.
    fn detach_socket(&mut self, socket: SocketId) -> Option<Self::Socket>;

    /// Takes up a socket that another driver let go of. What arrived meanwhile is reported by a [`Op::Receive`].
    ///
    /// # Errors
    /// [`SocketFault::NoSlot`] where every slot is taken; the connection ends.
    fn attach_socket(&mut self, socket: Self::Socket) -> Result<SocketId, SocketFault>;
}
