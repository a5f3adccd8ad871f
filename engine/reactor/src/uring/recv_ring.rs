//! The ring of receive buffers that the kernel picks from (Linux 5.19, `IORING_REGISTER_PBUF_RING`).

use std::sync::atomic::{AtomicU16, Ordering};

use cairn_block::{Buf, BufSlice, Memory, Received};
use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::features::DriverError;
use crate::arena::{Arena, Mapping};

/// The only buffer group of a driver.
pub(super) const GROUP: u16 = 0;
/// So many are offered at first. The kernel picks them in the order in which they were offered: the fewer there are, the
/// sooner one is used again, while its bytes are in the caches.
const FEW: u16 = 16;
/// After so many that were picked without running out, half as many are offered.
const SETTLED: u32 = 1 << 14;

/// Receive buffers: their bytes lie in the arena, the ring that offers them to the kernel in a
/// mapping of its own.
pub(super) struct RecvRing {
    ring: Mapping,
    mask: u16,
    tail: u16,
    buffers: Vec<Buf>,
    /// Those that nobody uses and that are not offered; the one that was used last is offered first.
    idle: Vec<u16>,
    /// How many the kernel may pick from now.
    offered: u16,
    /// How many it should be able to pick from.
    want: u16,
    /// Picked since `want` changed.
    picked: u32,
}

impl RecvRing {
    pub(super) fn new(
        uring: &IoUring,
        arena: &mut Arena,
        count: u16,
        len: u32,
    ) -> Result<Self, DriverError> {
        let setup = |source| DriverError::Setup { what: "the receive buffers", source };
        assert!(count.is_power_of_two(), "the kernel wants a power of two");
        let bytes = usize::from(count) * size_of::<BufRingEntry>();
        let ring = Mapping::new(bytes.next_multiple_of(4096)).map_err(setup)?;
        let address = ring.at(0, bytes) as u64;
        // SAFETY: the mapping holds `count` entries and lives as long as this value, which the
        // driver drops after the ring.
        let registered =
            unsafe { uring.submitter().register_buf_ring_with_flags(address, count, GROUP, 0) };
        registered.map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => {
                DriverError::Missing { feature: "IORING_REGISTER_PBUF_RING", since: "5.19" }
            }
            _ => setup(source),
        })?;
        let mut buffers = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
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
        *arena.received() = Received::new(base, len, count);
        let idle = (0..count).rev().collect();
        let mut this = Self {
            ring,
            mask: count - 1,
            tail: 0,
            buffers,
            idle,
            offered: 0,
            want: FEW.min(count),
            picked: 0,
        };
        this.offer(arena);
        Ok(this)
    }

    /// How many buffers the kernel may pick from.
    pub(super) fn offered(&self) -> usize {
        usize::from(self.offered)
    }

    /// The kernel has picked buffer `id` and filled `len` bytes of it.
    pub(super) fn take(&mut self, arena: &mut Arena, id: u16, len: u32) -> BufSlice {
        self.offered -= 1;
        if self.want > FEW {
            self.picked += 1;
            if self.picked == SETTLED {
                (self.want, self.picked) = (self.want / 2, 0);
            }
        }
        arena.received().take(id);
        self.offer(arena);
        self.buffers[usize::from(id)].slice().sub(0, len)
    }

    /// The kernel has found none to pick.
    pub(super) fn ran_out(&mut self, arena: &Arena) {
        (self.want, self.picked) = (self.want.saturating_mul(2).min(self.mask + 1), 0);
        self.offer(arena);
    }

    /// Whoever received into buffer `id` has no more use for it.
    pub(super) fn give_back(&mut self, arena: &mut Arena, id: u16) {
        arena.received().give_back(id);
        self.take_free(arena);
    }

    /// Takes back those that nobody uses any more.
    pub(super) fn take_free(&mut self, arena: &mut Arena) {
        while let Some(id) = arena.received().poll_free() {
            self.idle.push(id);
        }
        self.offer(arena);
    }

    /// Offers as many as the kernel should be able to pick from.
    fn offer(&mut self, arena: &Arena) {
        let before = self.tail;
        while self.offered < self.want
            && let Some(id) = self.idle.pop()
        {
            self.push(arena, id);
        }
        if self.tail != before {
            self.publish();
        }
    }

    fn push(&mut self, arena: &Arena, id: u16) {
        let window = self.buffers[usize::from(id)].slice();
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
