//! The [`Driver`] on io_uring.
//!
//! One ring per shard, used by one thread (`SINGLE_ISSUER`), whose completions run only when that
//! thread asks (`DEFER_TASKRUN`). The arena is a registered buffer and descriptors are registered
//! files, where the kernel and the memory-lock limit allow. Receives are multishot into a ring of
//! provided buffers that lie in the arena too.

mod disk;
mod features;
mod recv_ring;
mod sockets;

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::arena::Arena;
use crate::device::{BlockFile, MemRegion};
use crate::seam::{
    Chunk, Completion, DeviceId, Driver, ListenerId, Op, SocketFault, SocketId, Token,
};
use crate::spin::Spinner;
use disk::Disks;
pub use features::{DriverError, Features};
use recv_ring::RecvBuffers;
use sockets::Sockets;

/// How a driver is set up.
#[derive(Debug, Clone)]
pub struct DriverConfig {
    /// Bytes of arena: all payload in flight lives there.
    pub arena_len: u32,
    /// How long to look for completions before sleeping, in nanoseconds; 0 never looks.
    pub spin_ns: u64,
    /// Submission queue entries.
    pub ring_entries: u32,
    /// Receive buffers for connections that are accepted, a power of two, and half as many for those that this side makes;
    /// fewer in a small arena.
    pub recv_buffers: u16,
    /// Bytes in each receive buffer.
    pub recv_buffer_len: u32,
    /// Sockets at most.
    pub max_sockets: u32,
    /// Registered descriptors at most; the rest are used by number.
    pub max_registered_files: u32,
    /// Kernel features that may be used; what the kernel lacks is left out anyway.
    pub allow: Features,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            arena_len: 64 << 20,
            spin_ns: 20_000,
            ring_entries: 1024,
            recv_buffers: 128,
            recv_buffer_len: 32 << 10,
            max_sockets: 4096,
            max_registered_files: 1024,
            allow: Features::all(),
        }
    }
}

/// Something to attach as a device.
#[derive(Debug)]
pub enum Attach {
    /// A file or block device.
    File(BlockFile),
    /// Memory.
    Memory(MemRegion),
}

/// Wakes a driver that sleeps in [`Driver::poll`], from any thread.
#[derive(Debug, Clone)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// Makes the driver's current or next `poll` return with [`Completion::Woken`].
    pub fn wake(&self) {
        // The counter is full only if 2^64 wakes were not seen; then it wakes anyway.
        let _counted = self.0.write(1);
    }
}

/// What a completion belongs to: the top byte of the ring's user data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Disk = 1,
    Accept = 2,
    Connect = 3,
    Recv = 4,
    Send = 5,
    Wake = 6,
    /// Cancellations and link timeouts: their own outcome tells nothing.
    Ignored = 7,
    /// The wait before accepting is tried again.
    AcceptRetry = 8,
}

/// How long a listener rests when the system has no descriptor or memory for a connection: asking
/// again at once fails at once, and burns the core.
static ACCEPT_REST: types::Timespec = types::Timespec::new().nsec(200_000_000);

impl Kind {
    fn user_data(self, index: u32) -> u64 {
        (u64::from(self as u8) << 56) | u64::from(index)
    }

    fn of(user_data: u64) -> (Self, u32) {
        let kind = match user_data >> 56 {
            1 => Self::Disk,
            2 => Self::Accept,
            3 => Self::Connect,
            4 => Self::Recv,
            5 => Self::Send,
            6 => Self::Wake,
            7 => Self::Ignored,
            8 => Self::AcceptRetry,
            other => unreachable!("the ring returned user data of kind {other}"),
        };
        #[expect(clippy::cast_possible_truncation, reason = "the index is the low half")]
        let index = user_data as u32;
        (kind, index)
    }
}

/// Where a descriptor is found by the kernel.
#[derive(Debug, Clone, Copy)]
enum Target {
    Registered(u32),
    Plain(i32),
}

/// Expands `$build` once for each kind of descriptor: the opcode builders are generic over it.
macro_rules! with_target {
    ($target:expr, |$fd:ident| $build:expr) => {
        match $target {
            $crate::uring::Target::Registered(slot) => {
                let $fd = io_uring::types::Fixed(slot);
                $build
            }
            $crate::uring::Target::Plain(raw) => {
                let $fd = io_uring::types::Fd(raw);
                $build
            }
        }
    };
}
use with_target;

/// The ring and the arena: what every part of the driver submits through.
struct Core {
    ring: IoUring,
    arena: Arena,
    features: Features,
    registered: Vec<bool>,
    /// Completions made without the kernel.
    ready: VecDeque<Completion>,
}

impl Core {
    /// Queues an entry; the kernel sees it at the next submit.
    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: every buffer, address and descriptor that the entry names belongs to the arena
            // or to the tables of this driver, which keep it until the completion is reaped.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            self.enter(0, None);
        }
    }

    /// Submits what is queued, runs deferred work, and waits for `want` completions.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) {
        let result = match timeout {
            Some(limit) => {
                let limit = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&limit);
                self.ring.submitter().submit_with_args(want, &args)
            }
            None => self.ring.submitter().submit_and_wait(want),
        };
        match result {
            Ok(_) => {}
            Err(e) => match e.raw_os_error() {
                // The deadline, a signal, a full completion queue (the caller reaps now), or a
                // passing lack of kernel memory: the caller comes back in each case.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => panic!("io_uring_enter failed: {e}; the ring cannot be used any more"),
            },
        }
    }

    fn has_work(&mut self) -> bool {
        !self.ready.is_empty() || !self.ring.completion().is_empty()
    }

    /// Registers a descriptor; where the table is full or absent it is used by its number.
    fn register(&mut self, fd: i32) -> Target {
        let Some(slot) = self.registered.iter().position(|taken| !taken) else {
            return Target::Plain(fd);
        };
        let Ok(at) = u32::try_from(slot) else { return Target::Plain(fd) };
        if self.ring.submitter().register_files_update(at, &[fd]).is_err() {
            return Target::Plain(fd);
        }
        self.registered[slot] = true;
        Target::Registered(at)
    }

    fn unregister(&mut self, target: Target) {
        if let Target::Registered(at) = target {
            // Leaving a stale entry would keep the file open: the kernel does not refuse -1.
            let _updated = self.ring.submitter().register_files_update(at, &[-1]);
            self.registered[at as usize] = false;
        }
    }
}

struct Listener {
    socket: TcpListener,
    target: Target,
    token: Option<Token>,
}

/// The [`Driver`] on io_uring. It stays on the thread that made it.
pub struct UringDriver {
    core: Core,
    disks: Disks,
    sockets: Sockets,
    recv: RecvBuffers,
    listeners: Vec<Option<Listener>>,
    wake: Arc<EventFd>,
    wake_value: Box<[u8; 8]>,
    spinner: Spinner,
    /// Completions that are told of at once.
    batch: usize,
    /// When it was made, by [`boot_clock`].
    started: Duration,
}

impl std::fmt::Debug for UringDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringDriver")
            .field("features", &self.core.features)
            .field("arena_in_use", &self.core.arena.in_use())
            .finish_non_exhaustive()
    }
}

impl UringDriver {
    /// Sets the ring up for this thread.
    ///
    /// # Errors
    /// [`DriverError`] names the kernel feature that is missing, or the limit that is too low.
    pub fn new(config: &DriverConfig) -> Result<Self, DriverError> {
        let (ring, mut features) = features::build_ring(config.ring_entries, config.allow)?;
        let mut arena = Arena::new(config.arena_len).map_err(DriverError::Arena)?;
        let files = config.max_registered_files.min(features::descriptor_limit() / 2);
        let mut registered = Vec::new();
        if features.registered_files {
            match ring.submitter().register_files_sparse(files) {
                Ok(()) => registered = vec![false; files as usize],
                Err(e) => {
                    tracing::debug!(error = %e, "descriptors are not registered");
                    features.registered_files = false;
                }
            }
        }
        if features.registered_buffers {
            // SAFETY: the arena outlives the ring: both belong to this driver, and the ring is
            // dropped first, being the first field of `Core`.
            let done = unsafe { ring.submitter().register_buffers(&[arena.iovec()]) };
            if let Err(e) = done {
                tracing::debug!(error = %e, "the arena is not registered (see RLIMIT_MEMLOCK)");
                features.registered_buffers = false;
            }
        }
        let (count, len) = (config.recv_buffers, config.recv_buffer_len);
        let recv = RecvBuffers::new(&ring, &mut arena, count, len)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|e| DriverError::Setup { what: "eventfd", source: e.into() })?;
        let mut driver = Self {
            core: Core { ring, arena, features, registered, ready: VecDeque::with_capacity(256) },
            disks: Disks::new(),
            sockets: Sockets::new(config.max_sockets),
            recv,
            listeners: Vec::new(),
            wake: Arc::new(wake),
            wake_value: Box::new([0; 8]),
            spinner: Spinner::new(config.spin_ns),
            batch: usize::MAX,
            started: boot_clock(),
        };
        driver.arm_wake();
        Ok(driver)
    }

    /// What is used of the kernel.
    #[must_use]
    pub fn features(&self) -> Features {
        self.core.features
    }

    /// A handle that wakes this driver.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.wake))
    }

    /// Where a listener is bound: the port that the system chose where 0 was asked for.
    ///
    /// # Errors
    /// Where the system does not tell.
    pub fn local_addr(&self, listener: ListenerId) -> io::Result<SocketAddr> {
        self.listeners
            .get(listener.0 as usize)
            .and_then(Option::as_ref)
            .ok_or(io::ErrorKind::NotFound)?
            .socket
            .local_addr()
    }

    fn arm_wake(&mut self) {
        let fd = types::Fd(self.wake.as_raw_fd());
        let entry = opcode::Read::new(fd, self.wake_value.as_mut_ptr(), 8)
            .build()
            .user_data(Kind::Wake.user_data(0));
        self.core.push(&entry);
    }

    fn arm_accept(&mut self, index: u32) {
        let Some(Some(listener)) = self.listeners.get(index as usize) else { return };
        let entry = if self.core.features.multishot_accept {
            with_target!(listener.target, |fd| opcode::AcceptMulti::new(fd)
                .flags(libc::SOCK_CLOEXEC)
                .build())
        } else {
            let null = std::ptr::null_mut();
            with_target!(listener.target, |fd| opcode::Accept::new(fd, null, null.cast())
                .flags(libc::SOCK_CLOEXEC)
                .build())
        };
        self.core.push(&entry.user_data(Kind::Accept.user_data(index)));
    }

    /// Moves what the kernel completed to `out`.
    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.take_ready(out);
        while out.len() < self.batch {
            let next = self.core.ring.completion().next();
            let Some(cqe) = next else { break };
            let (kind, index) = Kind::of(cqe.user_data());
            let (result, flags) = (cqe.result(), cqe.flags());
            match kind {
                Kind::Disk => {
                    if let Some(done) = self.disks.handle(&mut self.core, index, result) {
                        out.push(done);
                    }
                }
                Kind::Accept => self.handle_accept(index, result, flags, out),
                Kind::Connect => self.sockets.handle_connect(&mut self.core, index, result, out),
                Kind::Recv => self.sockets.handle_recv(
                    &mut self.core,
                    &mut self.recv,
                    index,
                    result,
                    flags,
                    out,
                ),
                Kind::Send => self.sockets.handle_send(&mut self.core, index, result, out),
                Kind::Wake => {
                    self.arm_wake();
                    out.push(Completion::Woken);
                }
                Kind::AcceptRetry => self.arm_accept(index),
                Kind::Ignored => {}
            }
        }
        self.take_ready(out);
    }

    fn take_ready(&mut self, out: &mut Vec<Completion>) {
        let room = self.batch.saturating_sub(out.len());
        let count = self.core.ready.len().min(room);
        out.extend(self.core.ready.drain(..count));
    }

    fn handle_accept(&mut self, index: u32, result: i32, flags: u32, out: &mut Vec<Completion>) {
        let more = io_uring::cqueue::more(flags);
        let token = self
            .listeners
            .get(index as usize)
            .and_then(Option::as_ref)
            .and_then(|listener| listener.token);
        let Some(token) = token else {
            sockets::close_stray(result);
            return;
        };
        let accepted = self.sockets.adopt(&mut self.core, result);
        out.push(Completion::Accepted { token, result: accepted });
        if more {
            return;
        }
        match -result {
            libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM => {
                let rest = opcode::Timeout::new(&raw const ACCEPT_REST)
                    .build()
                    .user_data(Kind::AcceptRetry.user_data(index));
                self.core.push(&rest);
            }
            _ => self.arm_accept(index),
        }
    }

    /// Looks for completions for up to `budget_ns` without sleeping.
    fn spin(&mut self, budget_ns: u64) -> bool {
        let until = Instant::now() + Duration::from_nanos(budget_ns);
        loop {
            for _ in 0..32 {
                if self.core.ring.submission().taskrun() {
                    self.core.enter(0, None);
                }
                if self.core.has_work() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= until {
                return false;
            }
        }
    }
}

/// A clock that goes on while the machine is suspended, as `Instant`'s does not: a nexus that wakes up must see
/// that its lease is over, for another may have taken its volume meanwhile. Needs no entry into the kernel.
fn boot_clock() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.expect("Linux has had this clock since 2.6.39").into()
}

impl Driver for UringDriver {
    type Memory = Arena;
    type Device = Attach;
    type Listener = TcpListener;
    type Socket = TcpStream;

    fn memory(&mut self) -> &mut Arena {
        &mut self.core.arena
    }

    fn submit(&mut self, op: Op<'_>, token: Token) {
        match op {
            Op::Read { device, offset, buf } => {
                self.disks.submit(
                    &mut self.core,
                    token,
                    device,
                    disk::Request::Read { offset, buf },
                );
            }
            Op::Write { device, offset, buf, fua } => {
                let request = disk::Request::Write { offset, buf, fua };
                self.disks.submit(&mut self.core, token, device, request);
            }
            Op::Flush { device } => {
                self.disks.submit(&mut self.core, token, device, disk::Request::Flush);
            }
            Op::Zero { device, offset, len, punch } => {
                let request = disk::Request::Zero { offset, len, punch };
                self.disks.submit(&mut self.core, token, device, request);
            }
            Op::Accept { listener } => {
                if let Some(Some(entry)) = self.listeners.get_mut(listener.0 as usize) {
                    entry.token = Some(token);
                    self.arm_accept(listener.0);
                }
            }
            Op::Connect { peer, timeout_ms } => {
                self.sockets.connect(&mut self.core, peer, timeout_ms, token);
            }
            Op::Receive { socket } => self.sockets.receive(&mut self.core, socket, token),
            Op::PauseReceive { socket } => self.sockets.pause_receive(&mut self.core, socket),
            Op::Send { socket, windows } => {
                self.sockets.send(&mut self.core, socket, windows, token);
            }
            Op::Close { socket } => self.sockets.close(&mut self.core, socket, token),
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>, deadline_ns: Option<u64>) {
        self.disks.copy(&mut self.core);
        self.recv.take_free(&mut self.core.arena);
        let wait = deadline_ns.map(|at| Duration::from_nanos(at.saturating_sub(self.now_ns())));
        let may_wait = !self.core.has_work() && wait.is_none_or(|w| !w.is_zero());
        if may_wait {
            self.sockets.rearm_all(&mut self.core, &self.recv);
        }
        let budget = if may_wait { self.spinner.budget_ns() } else { 0 };
        if !may_wait {
            self.core.enter(0, None);
        } else if budget == 0 {
            self.core.enter(1, wait);
        } else {
            self.core.enter(0, None);
            if !self.core.has_work() {
                let limit = wait.map_or(budget, |w| {
                    u64::try_from(w.as_nanos()).unwrap_or(u64::MAX).min(budget)
                });
                let found = self.spin(limit);
                self.spinner.record(found);
                if !found {
                    let left = deadline_ns
                        .map(|at| Duration::from_nanos(at.saturating_sub(self.now_ns())));
                    if left.is_none_or(|w| !w.is_zero()) {
                        self.core.enter(1, left);
                    }
                }
            }
        }
        self.reap(out);
        // Sockets that ran out of receive buffers are armed again as buffers come back; those of a
        // socket that is being closed come back here.
        self.sockets.rearm(&mut self.core, &self.recv);
    }

    fn set_batch(&mut self, most: usize) {
        self.batch = most.max(1);
    }

    fn now_ns(&self) -> u64 {
        let since = boot_clock().saturating_sub(self.started);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }

    fn release_chunk(&mut self, chunk: Chunk) {
        self.recv.give_back(&mut self.core.arena, chunk.id);
        self.sockets.rearm(&mut self.core, &self.recv);
    }

    fn attach_device(&mut self, device: Attach) -> io::Result<DeviceId> {
        self.disks.attach(&mut self.core, device)
    }

    fn detach_device(&mut self, device: DeviceId) -> Option<Attach> {
        self.disks.detach(&mut self.core, device)
    }

    fn attach_listener(&mut self, listener: TcpListener) -> io::Result<ListenerId> {
        // Inherited by the accepted sockets: a response must not wait for the peer's delayed ACK.
        nix::sys::socket::setsockopt(&listener, nix::sys::socket::sockopt::TcpNoDelay, &true)?;
        let target = self.core.register(listener.as_raw_fd());
        let index = u32::try_from(self.listeners.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.listeners.push(Some(Listener { socket: listener, target, token: None }));
        Ok(ListenerId(index))
    }

    fn detach_listener(&mut self, listener: ListenerId) {
        let Some(slot) = self.listeners.get_mut(listener.0 as usize) else { return };
        if let Some(gone) = slot.take() {
            let cancel = opcode::AsyncCancel::new(Kind::Accept.user_data(listener.0))
                .build()
                .user_data(Kind::Ignored.user_data(0));
            self.core.push(&cancel);
            self.core.enter(0, None);
            self.core.unregister(gone.target);
        }
    }

    fn detach_socket(&mut self, socket: SocketId) -> Option<TcpStream> {
        self.sockets.detach(&mut self.core, socket)
    }

    fn attach_socket(&mut self, socket: TcpStream) -> Result<SocketId, SocketFault> {
        self.sockets.attach(&mut self.core, socket)
    }
}

impl Drop for UringDriver {
    fn drop(&mut self) {
        // The ring is closed before the arena that it writes into is unmapped: the kernel waits for
        // or cancels what is in flight when the ring's last reference goes. Sending a cancellation
        // of everything first keeps that wait short.
        let all = types::CancelBuilder::any();
        let _cancelled = self.core.ring.submitter().register_sync_cancel(None, all);
    }
}

#[cfg(test)]
mod tests;
