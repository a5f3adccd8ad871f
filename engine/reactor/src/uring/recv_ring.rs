//! The ring of receive buffers that the kernel picks from (Linux 5.19, `IORING_REGISTER_PBUF_RING`).

use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};

use cairn_block::{Buf, BufSlice, Memory, Received};
use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::features::DriverError;
use crate::arena::{Arena, Mapping};

/// Who connected: each has receive buffers of their own. Peers that wait for memory hold the buffers that their bytes
/// are in, and may hold all that they can have; what others have to say, to whom this side connected, is what frees memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Group {
    /// The peer did.
    Accepted,
    /// This side did.
    Connected,
}

pub(super) const GROUPS: [Group; 2] = [Group::Accepted, Group::Connected];

/// So many are offered at first. The kernel picks them in the order in which they were offered: the fewer there are, the
/// sooner one is used again, while its bytes are in the caches.
const FEW: u16 = 16;
/// After so many that were picked without running out, half as many are offered.
const SETTLED: u32 = 1 << 14;

/// The receive buffers of both groups, side by side in the arena.
pub(super) struct RecvBuffers {
    rings: [RecvRing; 2],
    buffers: Vec<Buf>,
}

/// A ring that offers buffers to the kernel, in a mapping of its own.
struct RecvRing {
    ring: Mapping,
    mask: u16,
    tail: u16,
    /// Those that nobody uses and that are not offered; the one that was used last is offered first.
    idle: Vec<u16>,
    /// How many the kernel may pick from now.
    offered: u16,
    /// How many it should be able to pick from.
    want: u16,
    /// Picked since `want` changed.
    picked: u32,
}

impl RecvBuffers {
    /// `count` buffers of `len` bytes for connections that are accepted, of which half may be kept, and half as many for
    /// those that this side makes; fewer where these would take more than three eighths of the arena.
    pub(super) fn new(
        uring: &IoUring,
        arena: &mut Arena,
        count: u16,
        len: u32,
    ) -> Result<Self, DriverError> {
        let setup = |source| DriverError::Setup { what: "the receive buffers", source };
        assert!(count.is_power_of_two(), "the kernel wants a power of two");
        let quarter = u32::try_from(arena.len() / 4).unwrap_or(u32::MAX) / len;
        let mut accepted = count;
        while accepted > 2 && u32::from(accepted) > quarter {
            accepted /= 2;
        }
        let connected = (accepted / 2).max(1);
        let mut buffers = Vec::with_capacity(usize::from(accepted + connected));
        for _ in 0..accepted + connected {
            buffers.push(arena.alloc(len).ok_or_else(|| {
                setup(std::io::Error::other("the arena is too small for the receive buffers"))
            })?);
        }
        let base = buffers[0].slice().offset();
        let starts = (base..).step_by(len as usize);
        let in_a_row = starts.zip(&buffers).all(|(at, buf)| buf.slice().offset() == at);
        assert!(
            in_a_row,
            "an arena of which nothing is in use hands out one buffer after the other"
        );
        *arena.received() = Received::new(base, len, accepted + connected, accepted / 2);
        let rings = [
            RecvRing::new(uring, Group::Accepted, 0..accepted)?,
            RecvRing::new(uring, Group::Connected, accepted..accepted + connected)?,
        ];
        let mut this = Self { rings, buffers };
        GROUPS.iter().for_each(|&group| this.offer(arena, group));
        Ok(this)
    }

    /// How many buffers the kernel may pick from.
    pub(super) fn offered(&self, group: Group) -> usize {
        usize::from(self.rings[group as usize].offered)
    }

    /// The kernel has picked buffer `id` and filled `len` bytes of it.
    pub(super) fn take(&mut self, arena: &mut Arena, group: Group, id: u16, len: u32) -> BufSlice {
        self.rings[group as usize].picked();
        arena.received().take(id);
        self.offer(arena, group);
        self.buffers[usize::from(id)].slice().sub(0, len)
    }

    /// The kernel has found none to pick.
    pub(super) fn ran_out(&mut self, arena: &Arena, group: Group) {
        self.rings[group as usize].ran_out();
        self.offer(arena, group);
    }

    /// Whoever received into buffer `id` has no more use for it.
    pub(super) fn give_back(&mut self, arena: &mut Arena, id: u16) {
        arena.received().give_back(id);
        self.take_free(arena);
    }

    /// Takes back those that nobody uses any more.
    pub(super) fn take_free(&mut self, arena: &mut Arena) {
        while let Some(id) = arena.received().poll_free() {
            let connected = id > self.rings[0].mask;
            self.rings[usize::from(connected)].idle.push(id);
        }
        GROUPS.iter().for_each(|&group| self.offer(arena, group));
    }

    fn offer(&mut self, arena: &Arena, group: Group) {
        self.rings[group as usize].offer(arena, &self.buffers);
    }
}

impl RecvRing {
    fn new(uring: &IoUring, group: Group, ids: Range<u16>) -> Result<Self, DriverError> {
        let setup = |source| DriverError::Setup { what: "the receive buffers", source };
        let count = ids.len();
        let bytes = count * size_of::<BufRingEntry>();
        let count = u16::try_from(count).expect("a range of u16");
        let ring = Mapping::new(bytes.next_multiple_of(4096)).map_err(setup)?;
        let address = ring.at(0, bytes) as u64;
        // SAFETY: the mapping holds `count` entries and lives as long as this value, which the
        // driver drops after the ring.
        let registered = unsafe {
            uring.submitter().register_buf_ring_with_flags(address, count, group as u16, 0)
        };
        registered.map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => {
                DriverError::Missing { feature: "IORING_REGISTER_PBUF_RING", since: "5.19" }
            }
            _ => setup(source),
        })?;
        let idle = ids.rev().collect();
        Ok(Self {
            ring,
            mask: count - 1,
            tail: 0,
            idle,
            offered: 0,
            want: FEW.min(count),
            picked: 0,
        })
    }

    fn picked(&mut self) {
        self.offered -= 1;
        if self.want > FEW {
            self.picked += 1;
            if self.picked == SETTLED {
                (self.want, self.picked) = (self.want / 2, 0);
            }
        }
    }

    fn ran_out(&mut self) {
        (self.want, self.picked) = (self.want.saturating_mul(2).min(self.mask + 1), 0);
    }

    /// Offers as many as the kernel should be able to pick from.
    fn offer(&mut self, arena: &Arena, buffers: &[Buf]) {
        let before = self.tail;
        while self.offered < self.want
            && let Some(id) = self.idle.pop()
        {
            self.push(arena, &buffers[usize::from(id)], id);
        }
        if self.tail != before {
            self.publish();
        }
    }

    fn push(&mut self, arena: &Arena, buf: &Buf, id: u16) {
        let window = buf.slice();
        let at = usize::from(self.tail & self.mask) * size_of::<BufRingEntry>();
        let entry: *mut BufRingEntry = self.ring.at(at, size_of::<BufRingEntry>()).cast();
        // SAFETY: the entry lies in the mapping, aligned; the kernel reads it only once the tail,
        // stored below, has passed it.
        let entry = unsafe { &mut *entry };
        entry.set_addr(arena.ptr(window) as u64);
        entry.set_len(window.len());
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        self.offered += 1;
    }

    /// Lets the kernel see what was pushed.
    fn publish(&mut self) {
        let base: *const BufRingEntry = self.ring.at(0, size_of::<BufRingEntry>()).cast();
        // SAFETY: `base` is the first entry of the registered ring, as `tail` demands.
        let tail = unsafe { BufRingEntry::tail(base) }.cast_mut();
        // SAFETY: the tail is an aligned u16 inside the mapping that is only accessed atomically
        // while the kernel shares it.
        let tail = unsafe { AtomicU16::from_ptr(tail) };
        tail.store(self.tail, Ordering::Release);
    }
}
