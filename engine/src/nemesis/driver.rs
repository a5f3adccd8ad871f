//! The driver of a process that the nemesis torments: io_uring beneath, with disks and a clock that can be wrong.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::ops::Range;

use cairn_block::{BufSlice, ByteOffset, Memory as _};
use cairn_reactor::{
    Arena, Attach, Chunk, Completion, DeviceId, DiskFault, Driver, ListenerId, Op, SocketFault,
    SocketId, Token, UringDriver,
};

use super::disk::{CachedDisk, Medium, PAGE};
use super::{Chance, Control};

const EIO: i32 = nix::errno::Errno::EIO as i32;
/// How old what is known of the control file may be, in nanoseconds.
const FRESH_NS: u64 = 30_000_000;
const MS: u64 = 1_000_000;

/// What is wrong at the moment.
#[derive(Debug, Default)]
struct Trouble {
    slow_ns: u64,
    eio_read: Range<u64>,
    eio_write: Range<u64>,
    full: bool,
}

/// A disk operation that is over, and is told of later.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due_ns: u64,
    number: u64,
    token: u64,
}

/// The engine's driver in a process with the feature `nemesis`.
#[derive(Debug)]
pub struct FaultyDriver {
    inner: UringDriver,
    /// Where `kill -9` is to be a loss of power: the caches of the devices, and what is beneath.
    caches: BTreeMap<u32, CachedDisk>,
    /// For looking at what a device holds.
    files: BTreeMap<u32, Medium>,
    volatile: bool,
    tears: bool,
    /// Parts per million that the clock is too fast by.
    rate_ppm: i64,
    trouble: Trouble,
    looked_ns: Option<u64>,
    chance: Chance,
    held: BinaryHeap<Reverse<Held>>,
    results: BTreeMap<u64, Result<(), DiskFault>>,
    number: u64,
    scratch: Vec<Completion>,
}

impl FaultyDriver {
    /// Torments what this driver does, as the control file says.
    #[must_use]
    pub fn new(inner: UringDriver) -> Self {
        let control = Control::read();
        let seed = control.number("seed").unwrap_or(1);
        Self {
            inner,
            caches: BTreeMap::new(),
            files: BTreeMap::new(),
            volatile: control.text("cache") == Some("volatile"),
            tears: control.text("tears").is_some(),
            rate_ppm: control.number("rate_ppm").unwrap_or(0),
            trouble: Trouble::default(),
            looked_ns: None,
            chance: Chance::new(seed),
            held: BinaryHeap::new(),
            results: BTreeMap::new(),
            number: 0,
            scratch: Vec::new(),
        }
    }

    fn look(&mut self) {
        let now = self.inner.now_ns();
        if self.looked_ns.is_some_and(|at| now < at + FRESH_NS) {
            return;
        }
        self.looked_ns = Some(now);
        let control = Control::read();
        self.trouble = Trouble {
            slow_ns: control.number::<u64>("slow_ms").unwrap_or(0) * MS,
            eio_read: control.range("eio_read").unwrap_or_default(),
            eio_write: control.range("eio_write").unwrap_or_default(),
            full: control.text("full").is_some(),
        };
        if control.text("cache") == Some("volatile") && !self.volatile {
            self.volatile = true;
            for (id, file) in &self.files {
                self.caches.insert(*id, file.cached(self.tears, self.chance.below(u64::MAX)));
            }
        }
    }

    /// A time of the driver beneath, by the clock that is wrong.
    fn wrong(&self, ns: u64) -> u64 {
        scaled(ns, 1_000_000 + self.rate_ppm, 1_000_000)
    }

    /// What is the matter with an operation before anything is done for it.
    fn verdict(&self, op: &Op<'_>) -> Option<DiskFault> {
        let trouble = &self.trouble;
        let hits = |range: &Range<u64>, offset: ByteOffset, len: u64| {
            offset.0 < range.end && range.start < offset.0 + len
        };
        let eio = Some(DiskFault::Errno(EIO));
        match *op {
            Op::Read { offset, buf, .. } if hits(&trouble.eio_read, offset, buf.len().into()) => {
                eio
            }
            Op::Write { offset, buf, .. } if hits(&trouble.eio_write, offset, buf.len().into()) => {
                eio
            }
            Op::Zero { offset, len, .. } if hits(&trouble.eio_write, offset, len) => eio,
            Op::Write { device, offset, buf, .. }
                if trouble.full && self.is_hole(device, offset, buf) =>
            {
                Some(DiskFault::NoSpace)
            }
            _ => None,
        }
    }

    /// Whether nothing was ever written there: only such writes need room beneath.
    fn is_hole(&self, device: DeviceId, offset: ByteOffset, buf: BufSlice) -> bool {
        let mut bytes = vec![0; buf.len() as usize];
        let read = match (self.caches.get(&device.0), self.files.get(&device.0)) {
            (Some(cache), _) => cache.read(offset.0, &mut bytes).is_ok(),
            (None, Some(medium)) => medium.read(offset.0, &mut bytes).is_ok(),
            (None, None) => false,
        };
        read && bytes.chunks(PAGE).any(|page| page.iter().all(|&byte| byte == 0))
    }

    fn device_of(op: &Op<'_>) -> Option<DeviceId> {
        match *op {
            Op::Read { device, .. }
            | Op::Write { device, .. }
            | Op::Flush { device }
            | Op::Zero { device, .. } => Some(device),
            _ => None,
        }
    }

    fn in_cache(&mut self, device: DeviceId, op: &Op<'_>) -> Result<(), DiskFault> {
        let cache = self.caches.get_mut(&device.0).expect("the caller has looked");
        match *op {
            Op::Read { offset, buf, .. } => {
                cache.read(offset.0, self.inner.memory().bytes_mut(buf))
            }
            Op::Write { offset, buf, fua, .. } => {
                cache.write(offset.0, self.inner.memory().bytes(buf), fua)
            }
            Op::Zero { offset, len, .. } => cache.zero(offset.0, len),
            _ => cache.flush(),
        }
    }

    /// Tells of a disk operation's end, later where the disk is slow.
    fn hold(&mut self, token: Token, result: Result<(), DiskFault>) {
        let slow = self.trouble.slow_ns;
        let delay = if slow == 0 { 0 } else { slow / 2 + self.chance.below(slow) };
        self.number += 1;
        let due_ns = self.inner.now_ns() + delay;
        self.held.push(Reverse(Held { due_ns, number: self.number, token: token.value() }));
        self.results.insert(self.number, result);
    }
}

fn scaled(ns: u64, by: i64, over: i64) -> u64 {
    let scaled = i128::from(ns) * i128::from(by) / i128::from(over);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

impl Driver for FaultyDriver {
    type Memory = Arena;
    type Device = Attach;
    type Listener = TcpListener;
    type Socket = TcpStream;

    fn memory(&mut self) -> &mut Arena {
        self.inner.memory()
    }

    fn submit(&mut self, op: Op<'_>, token: Token) {
        let Some(device) = Self::device_of(&op) else {
            self.inner.submit(op, token);
            return;
        };
        self.look();
        if let Some(fault) = self.verdict(&op) {
            self.hold(token, Err(fault));
        } else if self.caches.contains_key(&device.0) {
            let result = self.in_cache(device, &op);
            self.hold(token, result);
        } else {
            self.inner.submit(op, token);
        }
    }

    fn set_batch(&mut self, most: usize) {
        self.inner.set_batch(most);
    }

    fn poll(&mut self, out: &mut Vec<Completion>, deadline_ns: Option<u64>) {
        self.look();
        let deadline = deadline_ns.map(|at| scaled(at, 1_000_000, 1_000_000 + self.rate_ppm));
        let due = self.held.peek().map(|Reverse(held)| held.due_ns);
        let until = match (deadline, due) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        self.inner.poll(&mut scratch, until);
        for completion in scratch.drain(..) {
            match completion {
                Completion::Disk { token, result } if self.trouble.slow_ns > 0 => {
                    self.hold(token, result);
                }
                other => out.push(other),
            }
        }
        self.scratch = scratch;
        let now = self.inner.now_ns();
        while self.held.peek().is_some_and(|Reverse(held)| held.due_ns <= now) {
            let Some(Reverse(held)) = self.held.pop() else { break };
            let result = self.results.remove(&held.number).unwrap_or(Ok(()));
            out.push(Completion::Disk { token: Token::new(held.token), result });
        }
    }

    fn now_ns(&self) -> u64 {
        self.wrong(self.inner.now_ns())
    }

    fn release_chunk(&mut self, chunk: Chunk) {
        self.inner.release_chunk(chunk);
    }

    fn attach_device(&mut self, device: Attach) -> io::Result<DeviceId> {
        let beneath = match &device {
            Attach::File(file) => Some((file.path().to_owned(), file.len())),
            Attach::Memory(_) => None,
        };
        let id = self.inner.attach_device(device)?;
        if let Some((path, len)) = beneath {
            let medium = Medium::open(&path, len)?;
            if self.volatile {
                let seed = self.chance.below(u64::MAX);
                self.caches.insert(id.0, medium.cached(self.tears, seed));
            }
            self.files.insert(id.0, medium);
        }
        Ok(id)
    }

    fn detach_device(&mut self, device: DeviceId) -> Option<Attach> {
        self.files.remove(&device.0);
        if let Some(mut cache) = self.caches.remove(&device.0)
            && let Err(error) = cache.flush()
        {
            tracing::warn!(%error, "the cache of a device that is detached is lost");
        }
        self.inner.detach_device(device)
    }

    fn attach_listener(&mut self, listener: TcpListener) -> io::Result<ListenerId> {
        self.inner.attach_listener(listener)
    }

    fn detach_listener(&mut self, listener: ListenerId) {
        self.inner.detach_listener(listener);
    }

    fn detach_socket(&mut self, socket: SocketId) -> Option<TcpStream> {
        self.inner.detach_socket(socket)
    }

    fn attach_socket(&mut self, socket: TcpStream) -> Result<SocketId, SocketFault> {
        self.inner.attach_socket(socket)
    }
}
