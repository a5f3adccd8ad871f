//! A buddy allocator over page numbers: constant work per call, nothing allocated once built.

const NONE: u32 = u32::MAX;
/// A page that is the first of no free block.
const NOT_FREE: u8 = u8::MAX;

/// Hands out naturally aligned runs of `2^order` pages.
#[derive(Debug)]
pub struct Buddy {
    pages: u32,
    max_order: u8,
    /// First free block of each order.
    heads: Vec<u32>,
    next: Vec<u32>,
    prev: Vec<u32>,
    /// The order of the free block that begins at this page, or `NOT_FREE`.
    free_order: Vec<u8>,
    /// The order of the block in use that begins at this page, or `NOT_FREE`.
    used_order: Vec<u8>,
    free_pages: u32,
}

impl Buddy {
    /// An allocator of `pages` pages whose largest block is `2^max_order` pages.
    ///
    /// # Panics
    /// Where `max_order` is over 20.
    #[must_use]
    pub fn new(pages: u32, max_order: u8) -> Self {
        assert!(max_order <= 20, "a block of 2^{max_order} pages is larger than any buffer");
        let n = pages as usize;
        let mut buddy = Self {
            pages,
            max_order,
            heads: vec![NONE; usize::from(max_order) + 1],
            next: vec![NONE; n],
            prev: vec![NONE; n],
            free_order: vec![NOT_FREE; n],
            used_order: vec![NOT_FREE; n],
            free_pages: 0,
        };
        // From the top down, so that the lowest pages are handed out first and the highest stay untouched.
        let mut at = 0;
        let mut blocks = Vec::new();
        while at < pages {
            let mut order = max_order;
            while at % (1 << order) != 0 || at + (1 << order) > pages {
                order -= 1;
            }
            blocks.push((at, order));
            at += 1 << order;
        }
        for &(page, order) in blocks.iter().rev() {
            buddy.push(page, order);
        }
        buddy.free_pages = pages;
        buddy
    }

    /// Pages that are not in use.
    #[must_use]
    pub fn free_pages(&self) -> u32 {
        self.free_pages
    }

    /// Pages in all.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The largest order that [`Buddy::alloc`] takes.
    #[must_use]
    pub fn max_order(&self) -> u8 {
        self.max_order
    }

    /// A run of `2^order` pages: its first page, or nothing when there is no such run left.
    pub fn alloc(&mut self, order: u8) -> Option<u32> {
        let mut found = order;
        while found <= self.max_order && self.heads[usize::from(found)] == NONE {
            found += 1;
        }
        if found > self.max_order {
            return None;
        }
        let page = self.heads[usize::from(found)];
        self.unlink(page, found);
        while found > order {
            found -= 1;
            self.push(page + (1 << found), found);
        }
        self.used_order[page as usize] = order;
        self.free_pages -= 1 << order;
        Some(page)
    }

    /// Takes back the run that [`Buddy::alloc`] returned as `page`.
    ///
    /// # Panics
    /// Where no run in use of that order begins at `page`: a buffer was released twice.
    pub fn release(&mut self, page: u32, order: u8) {
        assert_eq!(
            self.used_order[page as usize], order,
            "page {page} is not the start of a run of order {order} in use"
        );
        self.used_order[page as usize] = NOT_FREE;
        self.free_pages += 1 << order;
        let (mut page, mut order) = (page, order);
        while order < self.max_order {
            let twin = page ^ (1 << order);
            if twin >= self.pages || self.free_order[twin as usize] != order {
                break;
            }
            self.unlink(twin, order);
            page = page.min(twin);
            order += 1;
        }
        self.push(page, order);
    }

    fn push(&mut self, page: u32, order: u8) {
        let head = self.heads[usize::from(order)];
        self.next[page as usize] = head;
        self.prev[page as usize] = NONE;
        if head != NONE {
            self.prev[head as usize] = page;
        }
        self.heads[usize::from(order)] = page;
        self.free_order[page as usize] = order;
    }

    fn unlink(&mut self, page: u32, order: u8) {
        let (next, prev) = (self.next[page as usize], self.prev[page as usize]);
        if prev == NONE {
            self.heads[usize::from(order)] = next;
        } else {
            self.next[prev as usize] = next;
        }
        if next != NONE {
            self.prev[next as usize] = prev;
        }
        self.free_order[page as usize] = NOT_FREE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn everything_comes_back_whole() {
        let mut b = Buddy::new(100, 5);
        let mut held = Vec::new();
        while let Some(p) = b.alloc(0) {
            held.push(p);
        }
        assert_eq!(held.len(), 100);
        for p in held {
            b.release(p, 0);
        }
        assert_eq!(b.free_pages(), 100);
        for _ in 0..3 {
            assert!(b.alloc(5).is_some());
        }
        assert!(b.alloc(5).is_none());
    }

    #[test]
    #[should_panic(expected = "not the start of a run")]
    fn a_double_release_is_caught() {
        let mut b = Buddy::new(8, 3);
        let p = b.alloc(1).unwrap();
        b.release(p, 1);
        b.release(p, 1);
    }

    proptest! {
        /// Against the plain model: a map of which page is taken.
        #[test]
        fn no_page_is_handed_out_twice(steps in prop::collection::vec((0u8..6, any::<bool>(), any::<prop::sample::Index>()), 1..300)) {
            let mut b = Buddy::new(77, 5);
            let mut held: Vec<(u32, u8)> = Vec::new();
            let mut taken = [false; 77];
            for (order, take, which) in steps {
                if take || held.is_empty() {
                    if let Some(p) = b.alloc(order) {
                        prop_assert_eq!(p % (1 << order), 0);
                        for i in p..p + (1 << order) {
                            prop_assert!(!taken[i as usize]);
                            taken[i as usize] = true;
                        }
                        held.push((p, order));
                    }
                } else {
                    let (p, order) = held.swap_remove(which.index(held.len()));
                    for i in p..p + (1 << order) {
                        taken[i as usize] = false;
                    }
                    b.release(p, order);
                }
                let used = taken.iter().filter(|t| **t).count();
                prop_assert_eq!(b.free_pages() as usize, 77 - used);
            }
        }
    }
}
