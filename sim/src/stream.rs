//! A queue of bytes that is filled and emptied by slices.

/// Bytes in order: in at the back, out at the front.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    bytes: Vec<u8>,
    start: usize,
}

impl Stream {
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The first `n` bytes, to be looked at and then dropped with [`Stream::skip`].
    pub(crate) fn front(&self, n: usize) -> &[u8] {
        &self.bytes[self.start..self.start + n]
    }

    pub(crate) fn skip(&mut self, n: usize) {
        assert!(n <= self.len(), "more bytes than there are");
        self.start += n;
        if self.start == self.bytes.len() {
            self.clear();
        } else if self.start > 64 << 10 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    /// Moves the first `n` bytes to the back of another queue.
    pub(crate) fn move_to(&mut self, n: usize, other: &mut Self) {
        other.push(self.front(n));
        self.skip(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order() {
        let (mut a, mut b) = (Stream::default(), Stream::default());
        let all: Vec<u8> = (0..=255).cycle().take(300_000).collect();
        a.push(&all);
        let mut out = Vec::new();
        while !a.is_empty() {
            let n = a.len().min(7001);
            a.move_to(n, &mut b);
            let m = b.len() / 2 + 1;
            out.extend_from_slice(b.front(m));
            b.skip(m);
        }
        out.extend_from_slice(b.front(b.len()));
        assert!(out == all);
    }
}
