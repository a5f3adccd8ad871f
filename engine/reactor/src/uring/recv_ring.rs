//! The ring of receive buffers that the kernel picks from (Linux 5.19, `IORING_REGISTER_PBUF_RING`).

use std::sync::atomic::{AtomicU16, Ordering};

use cairn_block::{Buf, BufSlice, Memory};
use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::features::DriverError;
use crate::arena::{Arena, Mapping};

/// The only buffer group of a driver.
pub(super) const GROUP: u16 = 0;

/// Receive buffers: their bytes lie in the arena, the ring that offers them to the kernel in a
/// mapping of its own.
pub(super) struct RecvRing {
    ring: Mapping,
    mask: u16,
    tail: u16,
    buffers: Vec<Buf>,
    /// How many the kernel may pick from now.
    offered: u16,
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
        let mut this = Self { ring, mask: count - 1, tail: 0, buffers: Vec::new(), offered: 0 };
        for id in 0..count {
            let buf = arena.alloc(len).ok_or_else(|| {
                setup(std::io::Error::other("the arena is too small for the receive buffers"))
            })?;
            this.buffers.push(buf);
            this.give_back(arena, id);
        }
        Ok(this)
    }

    /// How many buffers the kernel may pick from.
    pub(super) fn offered(&self) -> usize {
        usize::from(self.offered)
    }

    /// The kernel has picked buffer `id` and filled `len` bytes of it.
    pub(super) fn take(&mut self, id: u16, len: u32) -> BufSlice {
        self.offered -= 1;
        self.buffers[usize::from(id)].slice().sub(0, len)
    }

    /// Offers buffer `id` to the kernel again.
    pub(super) fn give_back(&mut self, arena: &Arena, id: u16) {
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
        let base: *const BufRingEntry = self.ring.at(0, size_of::<BufRingEntry>()).cast();
        // SAFETY: `base` is the first entry of the registered ring, as `tail` demands.
        let tail = unsafe { BufRingEntry::tail(base) }.cast_mut();
        // SAFETY: the tail is an aligned u16 inside the mapping that is only accessed atomically
        // while the kernel shares it.
        let tail = unsafe { AtomicU16::from_ptr(tail) };
        tail.store(self.tail, Ordering::Release);
    }
}
