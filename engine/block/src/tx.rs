//! What one connection has to send, in order: headers from a ring, payload by reference.

use std::collections::VecDeque;

use crate::{Buf, BufSlice, Memory};

/// `len` as the width of a window's length.
fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("no buffer is over 4 GiB")
}

#[derive(Debug)]
enum Content {
    /// Bytes of the ring, given back when they are sent.
    Ring,
    /// Someone else's buffer.
    Borrowed,
    /// A buffer to release when it is sent.
    Owned(Buf),
}

#[derive(Debug)]
struct Item {
    window: BufSlice,
    content: Content,
}

/// The bytes to send on one connection, in order.
///
/// At most one batch is in flight: [`TxQueue::take_batch`] begins it, [`TxQueue::handle_sent`] ends
/// it. The ring never overflows: whoever pushes asks how much is free before it takes on work.
#[derive(Debug)]
pub struct TxQueue {
    ring: Buf,
    /// Where the next header byte goes.
    head: u32,
    /// Ring bytes that are queued or in flight.
    used: u32,
    items: VecDeque<Item>,
    /// Items at the front that are being sent.
    in_flight: usize,
    /// Items that were ever queued, and those that were ever sent.
    pushed: u64,
    /// Bytes that were ever copied to the ring.
    copied: u64,
    sent: u64,
    /// More items than this are not queued without allocating.
    max_items: usize,
}

impl TxQueue {
    /// A queue with a ring of at least `ring_len` bytes, and room for `max_items` windows.
    #[must_use]
    pub fn new<M: Memory>(ring_len: u32, max_items: usize, mem: &mut M) -> Option<Self> {
        let ring = mem.alloc(ring_len.next_multiple_of(4096))?;
        Some(Self {
            ring,
            head: 0,
            used: 0,
            items: VecDeque::with_capacity(max_items),
            in_flight: 0,
            pushed: 0,
            copied: 0,
            sent: 0,
            max_items,
        })
    }

    /// Takes a ring of at least `ring_len` bytes in place of its own. Nothing may be queued. False where `mem` has no
    /// room for it.
    #[must_use]
    pub fn enlarge<M: Memory>(&mut self, ring_len: u32, mem: &mut M) -> bool {
        debug_assert!(self.is_idle(), "the ring is in use");
        if self.ring.len() >= ring_len {
            return true;
        }
        let Some(ring) = mem.alloc(ring_len.next_multiple_of(4096)) else { return false };
        mem.release(std::mem::replace(&mut self.ring, ring));
        self.head = 0;
        true
    }

    /// Whether nothing is queued and nothing is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether a batch is in flight.
    #[must_use]
    pub fn is_in_flight(&self) -> bool {
        self.in_flight > 0
    }

    /// Whether there is something to send and no batch is in flight.
    #[must_use]
    pub fn wants_send(&self) -> bool {
        self.in_flight == 0 && !self.items.is_empty()
    }

    /// Fills `out` (cleared first; it never grows past its capacity) with the next windows to send,
    /// in order. They are in flight until [`TxQueue::handle_sent`].
    ///
    /// # Panics
    /// Where a batch is in flight already.
    pub fn take_batch(&mut self, out: &mut Vec<BufSlice>) {
        assert_eq!(self.in_flight, 0, "a batch was taken while one is in flight");
        out.clear();
        let n = self.items.len().min(out.capacity());
        out.extend(self.items.iter().take(n).map(|item| item.window));
        self.in_flight = n;
    }

    /// The whole batch went out: owned payload goes back to `mem`, header space to the ring.
    pub fn handle_sent<M: Memory>(&mut self, mem: &mut M) {
        for _ in 0..self.in_flight {
            let Some(item) = self.items.pop_front() else { break };
            self.sent += 1;
            match item.content {
                Content::Ring => self.used -= item.window.len(),
                Content::Borrowed => {}
                Content::Owned(buf) => mem.release(buf),
            }
        }
        self.in_flight = 0;
    }

    /// Drops what is queued, as if it had been sent.
    ///
    /// # Panics
    /// Where a batch is in flight.
    pub fn forget<M: Memory>(&mut self, mem: &mut M) {
        assert_eq!(self.in_flight, 0, "what is being sent cannot be forgotten");
        self.in_flight = self.items.len();
        self.handle_sent(mem);
    }

    /// Ring bytes that are free.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.ring.len() - self.used
    }

    /// Windows that can be queued before the list of them has to grow.
    #[must_use]
    pub fn free_items(&self) -> usize {
        self.max_items.saturating_sub(self.items.len())
    }

    /// A mark for what has been queued so far.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.pushed
    }

    /// How many bytes were copied to the ring since the beginning: the same for the same calls, whenever what came of
    /// them was sent.
    #[must_use]
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// Whether all that was queued up to `mark` has at least been taken for sending.
    #[must_use]
    pub fn was_taken(&self, mark: u64) -> bool {
        self.sent + self.in_flight as u64 >= mark
    }

    /// Whether all that was queued up to `mark` was sent.
    #[must_use]
    pub fn was_sent(&self, mark: u64) -> bool {
        self.sent >= mark
    }

    /// Copies `bytes` to the ring.
    ///
    /// # Panics
    /// Where the ring is full: the caller took on work without asking for room.
    pub fn push_bytes<M: Memory>(&mut self, bytes: &[u8], mem: &mut M) {
        assert!(len32(bytes.len()) <= self.free(), "the header ring overflows");
        self.copied += bytes.len() as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            let n = rest.len().min((self.ring.len() - self.head) as usize);
            let (now, later) = rest.split_at(n);
            let window = self.ring.slice().sub(self.head, len32(n));
            mem.bytes_mut(window).copy_from_slice(now);
            self.used += window.len();
            self.head = (self.head + window.len()) % self.ring.len();
            self.push_ring_window(window);
            rest = later;
        }
    }

    /// Queues a ring window, as part of the last item where the two touch.
    fn push_ring_window(&mut self, window: BufSlice) {
        if self.items.len() > self.in_flight
            && let Some(Item { window: last, content: Content::Ring }) = self.items.back_mut()
            && last.offset() + last.len() == window.offset()
        {
            *last = BufSlice::new(last.offset(), last.len() + window.len());
            return;
        }
        self.push(Item { window, content: Content::Ring });
    }

    /// Queues payload that stays the caller's: it must not change until it is sent.
    pub fn push_borrowed(&mut self, window: BufSlice) {
        self.push(Item { window, content: Content::Borrowed });
    }

    /// Queues the first `len` bytes of a buffer that is released once they are sent.
    pub fn push_owned(&mut self, buf: Buf, len: u32) {
        self.push(Item { window: buf.slice().sub(0, len), content: Content::Owned(buf) });
    }

    /// Queues `window`, the last that is sent of a buffer: the buffer is released once it is sent.
    pub fn push_last(&mut self, buf: Buf, window: BufSlice) {
        self.push(Item { window, content: Content::Owned(buf) });
    }

    fn push(&mut self, item: Item) {
        self.pushed += 1;
        self.items.push_back(item);
    }

    /// Gives every buffer back. Nothing may be in flight any more.
    pub fn close<M: Memory>(self, mem: &mut M) {
        for item in self.items {
            if let Content::Owned(buf) = item.content {
                mem.release(buf);
            }
        }
        mem.release(self.ring);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::HeapMemory;

    proptest! {
        /// Against the plain model: a vector of bytes.
        #[test]
        fn bytes_come_out_in_order(
            steps in prop::collection::vec((0u8..4, 1usize..600, any::<u8>()), 1..200),
        ) {
            let mut mem = HeapMemory::new(1 << 20);
            let mut tx = TxQueue::new(4096, 64, &mut mem).unwrap();
            let mut batch = Vec::with_capacity(3);
            let (mut want, mut got) = (Vec::new(), Vec::new());
            for (what, len, fill) in steps {
                match what {
                    0 | 1 if len32(len) <= tx.free() => {
                        tx.push_bytes(&vec![fill; len], &mut mem);
                        want.extend(std::iter::repeat_n(fill, len));
                    }
                    2 => {
                        let buf = mem.alloc(len32(len)).unwrap();
                        mem.bytes_mut(buf.slice()).fill(fill);
                        tx.push_owned(buf, len32(len));
                        want.extend(std::iter::repeat_n(fill, len));
                    }
                    _ if tx.wants_send() => {
                        tx.take_batch(&mut batch);
                        prop_assert!(!tx.wants_send() && batch.len() <= 3);
                        for w in &batch {
                            got.extend_from_slice(mem.bytes(*w));
                        }
                        tx.handle_sent(&mut mem);
                    }
                    _ => {}
                }
            }
            while tx.wants_send() {
                tx.take_batch(&mut batch);
                for w in &batch {
                    got.extend_from_slice(mem.bytes(*w));
                }
                tx.handle_sent(&mut mem);
            }
            prop_assert!(tx.is_idle() && tx.free() == 4096);
            prop_assert_eq!(got, want);
            tx.close(&mut mem);
            prop_assert_eq!(mem.in_use(), 0);
        }
    }

    #[test]
    fn adjacent_headers_are_one_window() {
        let mut mem = HeapMemory::new(1 << 16);
        let mut tx = TxQueue::new(4096, 8, &mut mem).unwrap();
        tx.push_bytes(&[1; 24], &mut mem);
        tx.push_bytes(&[2; 24], &mut mem);
        let mut batch = Vec::with_capacity(8);
        tx.take_batch(&mut batch);
        assert_eq!(batch.len(), 1);
        assert_eq!(batch[0].len(), 48);
        // What is in flight does not change under the sender.
        tx.push_bytes(&[3; 24], &mut mem);
        assert!(!tx.wants_send());
        tx.handle_sent(&mut mem);
        assert!(tx.wants_send());
        tx.close(&mut mem);
        assert_eq!(mem.in_use(), 0);
    }
}
