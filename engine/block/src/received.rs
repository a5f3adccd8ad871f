//! Receive buffers that lie in the arena, and who still uses what is in them: payload that arrived whole in one of
//! them, and suits the devices as it lies there, is not copied to a buffer of its own.

use crate::{Buf, BufSlice};

/// The order of a [`Buf`] that is a part of a receive buffer.
const KEPT: u8 = u8::MAX;

#[derive(Debug, Clone, Copy, Default)]
struct User {
    /// Whoever received it has not given it back.
    taken: bool,
    /// Buffers that are parts of it.
    kept: u32,
}

/// The receive buffers of one arena: `count` of `len` bytes each, side by side.
#[derive(Debug)]
pub struct Received {
    base: u32,
    len: u32,
    users: Vec<User>,
    /// Those with parts that are kept, and how many these may be.
    kept: u16,
    most: u16,
    /// What the bytes that are kept are to be aligned to.
    alignment: u32,
    /// Those that nobody uses any more.
    free: Vec<u16>,
}

impl Received {
    /// Receive buffers from byte `base` of the arena on, of which `most` may be kept: fewer than there are to receive into.
    #[must_use]
    pub fn new(base: u32, len: u32, count: u16, most: u16) -> Self {
        let n = usize::from(count);
        Self {
            base,
            len,
            users: vec![User::default(); n],
            kept: 0,
            most,
            alignment: 1,
            free: Vec::with_capacity(n),
        }
    }

    /// Keeps only what is aligned to so many bytes from now on, a power of two: what a device wants that may be given it.
    pub fn demand_alignment(&mut self, bytes: u32) {
        self.alignment = self.alignment.max(bytes);
    }

    /// Something has been received into buffer `id`.
    pub fn take(&mut self, id: u16) {
        self.users[usize::from(id)].taken = true;
    }

    /// Whoever received buffer `id` has no more use for it.
    pub fn give_back(&mut self, id: u16) {
        self.users[usize::from(id)].taken = false;
        self.free_if_unused(usize::from(id));
    }

    /// A buffer that is these bytes; nothing where they do not lie in one receive buffer, lie badly, or where so many
    /// receive buffers are kept that those that are left may be too few.
    pub fn keep(&mut self, slice: BufSlice) -> Option<Buf> {
        let at = slice.offset().checked_sub(self.base)?;
        let id = (at / self.len) as usize;
        let user = self.users.get_mut(id)?;
        let fits = at % self.len + slice.len() <= self.len;
        if !user.taken || !fits || !slice.offset().is_multiple_of(self.alignment) {
            return None;
        }
        if user.kept == 0 {
            if self.kept >= self.most {
                return None;
            }
            self.kept += 1;
        }
        user.kept += 1;
        Some(Buf::from_parts(slice.offset(), slice.len(), KEPT))
    }

    /// Takes back what [`Received::keep`] gave; any other buffer is returned.
    ///
    /// # Panics
    /// Where it was released before.
    pub fn release(&mut self, buf: Buf) -> Option<Buf> {
        if buf.order() != KEPT {
            return Some(buf);
        }
        let id = ((buf.slice().offset() - self.base) / self.len) as usize;
        let user = &mut self.users[id];
        assert!(user.kept > 0, "a part of receive buffer {id} is released twice");
        user.kept -= 1;
        if user.kept == 0 {
            self.kept -= 1;
            self.free_if_unused(id);
        }
        None
    }

    /// The next receive buffer that may be received into again.
    pub fn poll_free(&mut self) -> Option<u16> {
        self.free.pop()
    }

    fn free_if_unused(&mut self, id: usize) {
        let user = self.users[id];
        if !user.taken && user.kept == 0 {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "there are no more than a u16 counts"
            )]
            self.free.push(id as u16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(offset: u32, len: u32) -> BufSlice {
        BufSlice::new(offset, len)
    }

    #[test]
    fn a_receive_buffer_is_free_once_nobody_uses_it() {
        let mut received = Received::new(4096, 1000, 4, 2);
        received.take(1);
        let a = received.keep(slice(5100, 100)).unwrap();
        let b = received.keep(slice(5200, 100)).unwrap();
        assert_eq!(a.slice(), slice(5100, 100));
        received.give_back(1);
        assert_eq!(received.poll_free(), None);
        assert_eq!(received.release(a), None);
        assert_eq!(received.poll_free(), None);
        assert_eq!(received.release(b), None);
        assert_eq!(received.poll_free(), Some(1));
        assert_eq!(received.poll_free(), None);
        received.take(0);
        received.give_back(0);
        assert_eq!(received.poll_free(), Some(0));
    }

    #[test]
    fn only_what_lies_well_in_one_of_them_is_kept() {
        let mut received = Received::new(4096, 1024, 4, 2);
        received.take(1);
        assert!(received.keep(slice(0, 10)).is_none(), "before them");
        assert!(received.keep(slice(4096, 10)).is_none(), "nothing was received there");
        assert!(received.keep(slice(4096 + 2000, 100)).is_none(), "across two");
        assert!(received.keep(slice(4096 + 4096, 10)).is_none(), "behind them");
        received.demand_alignment(8);
        received.demand_alignment(4);
        assert!(received.keep(slice(4096 + 1028, 10)).is_none());
        assert!(received.keep(slice(4096 + 1032, 10)).is_some());
        let other = Buf::from_parts(0, 4096, 0);
        assert_eq!(received.release(other), Some(Buf::from_parts(0, 4096, 0)));
    }

    #[test]
    fn some_are_left_to_receive_into() {
        let mut received = Received::new(0, 1000, 4, 2);
        (0..4).for_each(|id| received.take(id));
        let first = received.keep(slice(0, 10)).unwrap();
        let _second = received.keep(slice(1000, 10)).unwrap();
        assert!(received.keep(slice(2000, 10)).is_none());
        assert!(received.keep(slice(1010, 10)).is_some(), "one that is kept anyway");
        received.release(first);
        assert!(received.keep(slice(2000, 10)).is_some());
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn a_double_release_is_caught() {
        let mut received = Received::new(0, 1000, 4, 2);
        received.take(0);
        let part = received.keep(slice(0, 10)).unwrap();
        received.release(Buf::from_parts(0, 10, part.order()));
        received.release(part);
    }
}
