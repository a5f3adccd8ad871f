//! One device flush at a time: whoever comes while it runs shares the next one.

/// Who waits for a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiter {
    /// A request: a flush, or zeroes with FUA.
    Request(u32),
    /// The journal block in flight.
    Journal,
    /// An extent that was zeroed for this allocation.
    Alloc(u32),
    /// The checksum page of this extent, and the data that it tells of.
    Sum(u32),
    /// Blocks of this extent that a crash had left half copied, and that were zeroed.
    SumClean(u32),
    /// Blocks of this extent, of which nothing was known, that this request has written.
    Redeemed { extent: u32, request: u32 },
    /// What this merge has copied.
    Merge(u32),
    /// A freed extent that was zeroed.
    Clean(u32),
    /// The checkpoint's or the grow's next step.
    Maintain,
    /// The catalog write of this slot.
    Catalog(u16),
}

#[derive(Debug, Default)]
pub(crate) struct Flusher {
    pub(crate) in_flight: bool,
    /// Covered by the flush in flight.
    pub(crate) current: Vec<Waiter>,
    /// Covered by the one after it.
    pub(crate) next: Vec<Waiter>,
}

impl Flusher {
    pub(crate) fn with_capacity(n: usize) -> Self {
        Self { in_flight: false, current: Vec::with_capacity(n), next: Vec::with_capacity(n) }
    }

    /// Whether a flush is to be issued now; what waits for it is then settled.
    pub(crate) fn start(&mut self) -> bool {
        if self.in_flight || self.next.is_empty() {
            return false;
        }
        assert!(self.current.is_empty(), "nobody waits for a flush that is not in flight");
        core::mem::swap(&mut self.current, &mut self.next);
        self.in_flight = true;
        true
    }

    pub(crate) fn clear(&mut self) {
        self.current.clear();
        self.next.clear();
    }
}
