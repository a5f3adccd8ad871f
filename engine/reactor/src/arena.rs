//! The arena: one anonymous mapping that every payload and header byte of a shard lives in.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use cairn_block::{Buddy, Buf, BufSlice, Memory, Received};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Unit of allocation and alignment, in bytes.
const PAGE: u32 = 4096;
/// What the system calls a huge page, on every machine that this is for.
pub(crate) const LARGE_PAGE: usize = 2 << 20;
/// The largest buffer is `2^MAX_ORDER` pages: 1 MiB, the largest transfer.
const MAX_ORDER: u8 = 8;

/// A private zero-filled mapping. Pages cost memory only once they are touched.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone; nothing about it is tied to a thread.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(len)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty mapping"))?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }?;
        Ok(Self { base: base.cast(), len })
    }

    /// Asks for large pages, or for small ones, in all of the large pages that the range touches: copies all over them
    /// are a quarter faster then. It works as well without, where the system has none to give.
    pub(crate) fn ask_for_large_pages(&self, at: usize, len: usize, large: bool) {
        let base = self.base.as_ptr() as usize;
        let begin = ((base + at) & !(LARGE_PAGE - 1)).max(base) - base;
        let end = (base + at + len).next_multiple_of(LARGE_PAGE).min(base + self.len) - base;
        let start = self.at(begin, end - begin);
        let advice = if large { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: the range lies in this mapping; the advice changes nothing but the size of its pages.
        let _hint = unsafe { libc::madvise(start.cast(), end - begin, advice) };
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of byte `at`; `len` bytes from there are inside the mapping.
    pub(crate) fn at(&self, at: usize, len: usize) -> *mut u8 {
        assert!(
            at <= self.len && len <= self.len - at,
            "{at}+{len} is outside a mapping of {} bytes",
            self.len
        );
        self.base.as_ptr().wrapping_add(at)
    }

    pub(crate) fn bytes(&self, at: usize, len: usize) -> &[u8] {
        let start = self.at(at, len);
        // SAFETY: `at` checked that the range lies in the mapping, which lives as long as `self`;
        // every byte of an anonymous mapping is initialised; the shard does not read a window
        // while an operation that fills it is in flight.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    pub(crate) fn bytes_mut(&mut self, at: usize, len: usize) -> &mut [u8] {
        let start = self.at(at, len);
        // SAFETY: as in `bytes`, and `&mut self` makes this the only reference into the mapping.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// Writes whole blocks of 4096 past the caches: to memory that none of them has, in half the time. Nobody may look at it
    /// before [`settle_stores`].
    pub(crate) fn write_past_caches(&mut self, at: usize, blocks: &[u8]) {
        let to = self.at(at, blocks.len());
        #[cfg(target_arch = "x86_64")]
        if at.is_multiple_of(PAGE as usize) && blocks.len().is_multiple_of(PAGE as usize) {
            use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
            const WORD: usize = size_of::<__m128i>();
            for (word, i) in blocks.chunks_exact(WORD).zip((0..).step_by(WORD)) {
                // SAFETY: it is as long as that, and any alignment may be loaded from.
                let value = unsafe { _mm_loadu_si128(word.as_ptr().cast()) };
                // SAFETY: `at` checked that as many bytes lie in the mapping from `to` on; it begins on a page, and `at` is
                // on one, so each word is aligned. The caller settles the stores before the bytes are looked at.
                unsafe { _mm_stream_si128(to.wrapping_add(i).cast(), value) };
            }
            return;
        }
        // SAFETY: both ranges were checked, and what is outside the mapping does not overlap it; a part of it cannot be
        // borrowed while it is borrowed to be changed.
        unsafe { std::ptr::copy_nonoverlapping(blocks.as_ptr(), to, blocks.len()) };
    }

    /// Gives whole pages back to the system; they read as zeros afterwards.
    pub(crate) fn discard_pages(&mut self, at: usize, len: usize) {
        let start = self.at(at, len);
        // SAFETY: the range lies in this private anonymous mapping, to which `&mut self` is the
        // only reference; MADV_DONTNEED leaves it mapped and zero-filled.
        let rc = unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) };
        if rc != 0 {
            self.bytes_mut(at, len).fill(0);
        }
    }
}

/// Lets what was written past the caches be looked at.
pub(crate) fn settle_stores() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every processor of this architecture has the instruction, which touches no memory.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are what mmap returned, and no reference outlives `self`.
        let _unmapped = unsafe { munmap(self.base.cast(), self.len) };
    }
}

/// Buffers of a shard, handed out by a buddy allocator: nothing on the I/O path asks the system for
/// memory. When it is empty, callers wait; it never grows.
#[derive(Debug)]
pub struct Arena {
    map: Mapping,
    buddy: Buddy,
    received: Received,
}

impl Arena {
    /// An arena of `len` bytes, rounded down to whole MiB, at least one.
    ///
    /// # Errors
    /// Where the system has no address space left.
    pub fn new(len: u32) -> io::Result<Self> {
        let pages = (len / PAGE / (1 << MAX_ORDER)).max(1) << MAX_ORDER;
        let map = Mapping::new(pages as usize * PAGE as usize)?;
        map.ask_for_large_pages(0, map.len(), true);
        let none = Received::new(0, 1, 0, 0);
        Ok(Self { map, buddy: Buddy::new(pages, MAX_ORDER), received: none })
    }

    /// Who uses the receive buffers.
    pub(crate) fn received(&mut self) -> &mut Received {
        &mut self.received
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether it holds nothing: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes handed out, rounded up to the allocator's blocks.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        u64::from(self.buddy.pages() - self.buddy.free_pages()) * u64::from(PAGE)
    }

    /// The address of a window, for the kernel.
    pub(crate) fn ptr(&self, slice: BufSlice) -> *mut u8 {
        self.map.at(slice.offset() as usize, slice.len() as usize)
    }

    /// The whole arena as the kernel registers it.
    pub(crate) fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.map.at(0, 0).cast(), iov_len: self.map.len() }
    }
}

impl Memory for Arena {
    fn alloc(&mut self, len: u32) -> Option<Buf> {
        self.buddy.alloc_buf(len)
    }

    fn release(&mut self, buf: Buf) {
        if let Some(buf) = self.received.release(buf) {
            self.buddy.release_buf(buf);
        }
    }

    fn keep(&mut self, slice: BufSlice) -> Option<Buf> {
        self.received.keep(slice)
    }

    fn max_alloc(&self) -> u32 {
        PAGE << MAX_ORDER
    }

    fn bytes(&self, slice: BufSlice) -> &[u8] {
        self.map.bytes(slice.offset() as usize, slice.len() as usize)
    }

    fn bytes_mut(&mut self, slice: BufSlice) -> &mut [u8] {
        self.map.bytes_mut(slice.offset() as usize, slice.len() as usize)
    }

    fn copy(&mut self, src: BufSlice, dst: BufSlice) {
        assert_eq!(src.len(), dst.len(), "a copy between windows of different lengths");
        let len = src.len() as usize;
        let (from, to) = (self.ptr(src), self.ptr(dst));
        // SAFETY: both ranges were checked to lie in the mapping; `copy` allows overlap.
        unsafe { std::ptr::copy(from, to, len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_distinct_and_returned() {
        let mut arena = Arena::new(4 << 20).unwrap();
        let a = arena.alloc(4096).unwrap();
        let b = arena.alloc(1 << 20).unwrap();
        assert_eq!(arena.ptr(a.slice()) as usize % 4096, 0);
        arena.bytes_mut(a.slice()).fill(1);
        arena.bytes_mut(b.slice()).fill(2);
        let head = b.slice().sub(0, 4096);
        arena.copy(a.slice(), head);
        assert!(arena.bytes(head).iter().all(|&x| x == 1));
        assert!(arena.alloc((1 << 20) + 1).is_none());
        arena.release(a);
        arena.release(b);
        assert_eq!(arena.in_use(), 0);
    }

    #[test]
    #[should_panic(expected = "is outside a mapping")]
    fn a_window_outside_the_arena_is_caught() {
        let arena = Arena::new(1 << 20).unwrap();
        let _ = arena.bytes(BufSlice::new(1 << 20, 1));
    }
}
