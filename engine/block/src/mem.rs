//! Payload as plain values. The memory itself belongs to whoever implements [`Memory`]: the reactor's
//! arena in production, a `Vec` in tests and in the simulator.

use crate::{Buddy, Received};

/// The unit of allocation: one page, which suits every device's direct-I/O alignment.
const PAGE: usize = 4096;

/// A window into the arena. `Copy`: it names bytes, it does not own them.
///
/// One word, the length above the offset: two halves that are stored one by one and loaded as one word make the processor
/// wait until all that was stored before them has reached the caches.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct BufSlice(u64);

impl std::fmt::Debug for BufSlice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BufSlice")
            .field("offset", &self.offset())
            .field("len", &self.len())
            .finish()
    }
}

impl BufSlice {
    /// No bytes.
    pub const EMPTY: Self = Self(0);

    /// The window of `len` bytes that begins `offset` bytes into the arena.
    #[must_use]
    pub const fn new(offset: u32, len: u32) -> Self {
        assert!(offset.checked_add(len).is_some(), "a window past the end of the arena");
        Self::of(offset, len)
    }

    const fn of(offset: u32, len: u32) -> Self {
        Self(((len as u64) << 32) | offset as u64)
    }

    /// Bytes from the start of the arena.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    pub const fn offset(self) -> u32 {
        self.0 as u32
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether it names no bytes.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// `len` bytes of this window from its byte `at`.
    ///
    /// # Panics
    /// Where that reaches past the end of the window.
    #[must_use]
    pub const fn sub(self, at: u32, len: u32) -> Self {
        assert!(at <= self.len() && len <= self.len() - at, "a window past the end of its parent");
        Self::of(self.offset() + at, len)
    }

    /// What is left of this window after its first `at` bytes.
    #[must_use]
    pub const fn from(self, at: u32) -> Self {
        self.sub(at, self.len() - at)
    }
}

/// Owns a run of the arena. Neither `Copy` nor `Clone`: it is given back once, by [`Memory::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is dropped is lost to the pool"]
pub struct Buf {
    offset: u32,
    len: u32,
    order: u8,
}

impl Buf {
    /// Only for implementations of [`Memory`].
    pub const fn from_parts(offset: u32, len: u32, order: u8) -> Self {
        Self { offset, len, order }
    }

    /// All the bytes that were asked for.
    #[must_use]
    pub const fn slice(&self) -> BufSlice {
        BufSlice::of(self.offset, self.len)
    }

    /// Length in bytes, as asked for.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Whether no byte was asked for.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buddy order of the run.
    #[must_use]
    pub const fn order(&self) -> u8 {
        self.order
    }
}

/// The arena as the pure crates see it.
pub trait Memory {
    /// `len` bytes, aligned to 4096; nothing when the arena is exhausted (wait for a release) or
    /// `len` is larger than [`Memory::max_alloc`]. The contents are whatever was there before.
    fn alloc(&mut self, len: u32) -> Option<Buf>;

    /// Takes a buffer back. Nothing in flight may still use it.
    fn release(&mut self, buf: Buf);

    /// The largest single buffer, in bytes.
    fn max_alloc(&self) -> u32;

    /// The bytes of a window.
    fn bytes(&self, slice: BufSlice) -> &[u8];

    /// The bytes of a window, to change them. No operation in flight may be using them.
    fn bytes_mut(&mut self, slice: BufSlice) -> &mut [u8];

    /// Copies `src` over `dst`; they have one length and do not overlap.
    fn copy(&mut self, src: BufSlice, dst: BufSlice);

    /// A buffer that is these bytes themselves, where they were received into memory that can be kept and lie as every
    /// device wants it; elsewhere nothing, and they are to be copied. It is released as any other.
    fn keep(&mut self, slice: BufSlice) -> Option<Buf> {
        let _ = slice;
        None
    }
}

/// The order of the smallest buddy block that holds `len` bytes.
const fn order_for(len: u32) -> u8 {
    let pages = (len as usize).div_ceil(PAGE).next_power_of_two();
    #[expect(clippy::cast_possible_truncation, reason = "at most 32")]
    let order = pages.trailing_zeros() as u8;
    order
}

impl Buddy {
    /// A buffer of `len` bytes out of an arena whose pages this allocator hands out.
    pub fn alloc_buf(&mut self, len: u32) -> Option<Buf> {
        let order = order_for(len);
        if order > self.max_order() {
            return None;
        }
        let page = self.alloc(order)?;
        #[expect(clippy::cast_possible_truncation, reason = "PAGE is 4096")]
        Some(Buf::from_parts(page * PAGE as u32, len, order))
    }

    /// Takes back what [`Buddy::alloc_buf`] gave.
    #[expect(clippy::needless_pass_by_value, reason = "the buffer ends here")]
    pub fn release_buf(&mut self, buf: Buf) {
        #[expect(clippy::cast_possible_truncation, reason = "PAGE is 4096")]
        self.release(buf.offset / PAGE as u32, buf.order);
    }
}

/// An arena on the heap, for tests and for the simulator.
#[derive(Debug)]
pub struct HeapMemory {
    bytes: Vec<u8>,
    buddy: Buddy,
    received: Option<Received>,
}

impl HeapMemory {
    /// An arena of `len` bytes (rounded down to whole pages) whose largest buffer is 1 MiB.
    #[must_use]
    pub fn new(len: u32) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "PAGE is 4096")]
        let pages = len / PAGE as u32;
        // Not zeros, so that a reader of memory that nobody wrote is noticed.
        let (bytes, buddy) = (vec![0xa5; pages as usize * PAGE], Buddy::new(pages, 8));
        Self { bytes, buddy, received: None }
    }

    /// What is received into these of its buffers can be kept.
    pub fn set_received(&mut self, received: Received) {
        self.received = Some(received);
    }

    /// See [`HeapMemory::set_received`].
    pub fn received(&mut self) -> Option<&mut Received> {
        self.received.as_mut()
    }

    /// Bytes in use, rounded up to the allocator's blocks: 0 when nothing has leaked.
    #[must_use]
    pub fn in_use(&self) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "PAGE is 4096")]
        let page = PAGE as u32;
        (self.buddy.pages() - self.buddy.free_pages()) * page
    }
}

impl Memory for HeapMemory {
    fn alloc(&mut self, len: u32) -> Option<Buf> {
        self.buddy.alloc_buf(len)
    }

    fn release(&mut self, buf: Buf) {
        let own = match &mut self.received {
            Some(received) => received.release(buf),
            None => Some(buf),
        };
        if let Some(buf) = own {
            self.buddy.release_buf(buf);
        }
    }

    fn keep(&mut self, slice: BufSlice) -> Option<Buf> {
        self.received.as_mut()?.keep(slice)
    }

    fn max_alloc(&self) -> u32 {
        1 << 20
    }

    fn bytes(&self, slice: BufSlice) -> &[u8] {
        &self.bytes[slice.offset() as usize..][..slice.len() as usize]
    }

    fn bytes_mut(&mut self, slice: BufSlice) -> &mut [u8] {
        &mut self.bytes[slice.offset() as usize..][..slice.len() as usize]
    }

    fn copy(&mut self, src: BufSlice, dst: BufSlice) {
        assert_eq!(src.len(), dst.len(), "a copy between windows of different lengths");
        let from = src.offset() as usize;
        self.bytes.copy_within(from..from + src.len() as usize, dst.offset() as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_page_aligned_and_come_back() {
        let mut mem = HeapMemory::new(1 << 20);
        let a = mem.alloc(1).unwrap();
        let b = mem.alloc(5000).unwrap();
        assert_eq!(a.slice().offset() % 4096, 0);
        assert_eq!(b.slice().len(), 5000);
        mem.bytes_mut(b.slice()).fill(7);
        let tail = a.slice().sub(0, 1);
        mem.copy(b.slice().sub(4999, 1), tail);
        assert_eq!(mem.bytes(tail), [7]);
        mem.release(a);
        mem.release(b);
        assert_eq!(mem.in_use(), 0);
        assert!(mem.alloc(2 << 20).is_none());
    }

    #[test]
    #[should_panic(expected = "past the end of its parent")]
    fn a_window_stays_inside_its_parent() {
        let _ = BufSlice::new(0, 10).sub(8, 3);
    }
}
