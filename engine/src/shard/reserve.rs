//! Memory that the payload of hosts cannot take: what requests wait for goes on when they hold all the rest.
//!
//! | what | kept | for |
//! |---|---|---|
//! | the lifeline | 1 MiB, where there are pools | the pools' own work |
//! | pages | [`PAGES`] | registers, settling, lists of extents, calls of snapshots |
//! | a session of each link | while the link is down | its next session |
//! | connections | [`CONNECTIONS`], where there are pools | another node's link to a replica |
//!
//! What is used of it is kept anew as soon as there is memory, before payload is given any.

use cairn_block::{Buf, Memory};
use cairn_nvmf::target::{Queue, QueueConfig};
use cairn_reactor::Driver;

use super::Shard;
use super::moves::FRONT;

/// Bytes of the lifeline: what hashing an extent takes.
const LIFELINE: u32 = 1 << 20;
/// Bytes of a page.
pub(super) const PAGE: u32 = 4096;
/// A register operation and a settling round at each of eight links.
const PAGES: usize = 16;
/// An admin and an I/O queue.
const CONNECTIONS: usize = 2;

/// What pools are given in their need. While they use a part of it the rest is kept in pieces: payload that
/// took some would have to end before it is whole again, and may wait for the pool.
#[derive(Debug, Default)]
struct Lifeline {
    pieces: Vec<Buf>,
}

impl Lifeline {
    fn is_whole(&self) -> bool {
        self.pieces.first().is_some_and(|piece| piece.slice().len() == LIFELINE)
    }

    /// Gives the pools what there is of it.
    fn release<M: Memory>(&mut self, memory: &mut M) -> bool {
        let any = !self.pieces.is_empty();
        self.pieces.drain(..).for_each(|piece| memory.release(piece));
        any
    }

    /// Takes it back: whole, or as much of it as there is.
    fn keep<M: Memory>(&mut self, memory: &mut M) {
        if self.is_whole() {
            return;
        }
        self.release(memory);
        let (mut size, mut left) = (LIFELINE, LIFELINE);
        while left >= PAGE && size >= PAGE {
            match memory.alloc(size) {
                Some(piece) if size <= left => {
                    self.pieces.push(piece);
                    left -= size;
                }
                Some(piece) => {
                    memory.release(piece);
                    size /= 2;
                }
                None => size /= 2,
            }
        }
    }
}

/// What is kept at the moment.
#[derive(Debug, Default)]
pub(super) struct Reserve {
    lifeline: Lifeline,
    pages: Vec<Buf>,
    connections: Vec<Queue>,
}

impl Reserve {
    /// Takes what is not kept yet, as far as there is memory.
    fn keep<M: Memory>(&mut self, pools: bool, connections: bool, memory: &mut M) {
        if pools {
            self.lifeline.keep(memory);
        }
        while self.pages.len() < PAGES
            && let Some(page) = memory.alloc(PAGE)
        {
            self.pages.push(page);
        }
        while connections
            && self.connections.len() < CONNECTIONS
            && let Some(queue) = Queue::new(&QueueConfig::default(), memory)
        {
            self.connections.push(queue);
        }
    }

    fn page<M: Memory>(&mut self, memory: &mut M) -> Option<Buf> {
        memory.alloc(PAGE).or_else(|| self.pages.pop())
    }

    fn connection<M: Memory>(&mut self, memory: &mut M) -> Option<Queue> {
        Queue::new(&QueueConfig::default(), memory).or_else(|| self.connections.pop())
    }
}

impl<D: Driver> Shard<D> {
    /// Before anybody else is given memory.
    pub(super) fn keep_reserve(&mut self) {
        // Connections to replicas of other shards arrive here, too.
        let front = self.config.shards > 1 && self.config.shard == FRONT;
        let pools = !self.pools.is_empty();
        if pools || front || !self.volumes.is_empty() {
            self.reserve.keep(pools, pools || front, self.driver.memory());
        }
    }

    /// A pool has given memory back: before anybody else is given it.
    pub(super) fn keep_lifeline(&mut self) {
        self.reserve.lifeline.keep(self.driver.memory());
    }

    /// A page for what the shard does by itself.
    pub(super) fn own_page(&mut self) -> Option<Buf> {
        self.reserve.page(self.driver.memory())
    }

    /// The queue of a connection that was just accepted.
    pub(super) fn new_queue(&mut self) -> Option<Queue> {
        self.reserve.connection(self.driver.memory())
    }

    /// Tries the pools' own work again that waited for memory. Requests may hold all of it and wait for that
    /// work: then it gets what is kept for this.
    pub(super) fn retry_pools(&mut self) -> bool {
        let mut moved = false;
        for local in &mut self.pools {
            let memory = self.driver.memory();
            let mut goes_on = local.pool.retry_short(memory);
            if !goes_on && local.pool.is_short() && self.reserve.lifeline.release(memory) {
                goes_on = local.pool.retry_short(memory);
                self.reserve.lifeline.keep(memory);
            }
            local.busy |= goes_on;
            moved |= goes_on;
        }
        moved
    }

    /// Tries the work of a volume's nexus again that waited for memory: requests may hold all of it, and wait
    /// for that work.
    pub(super) fn retry_mends(&mut self, at: u32, now: u64) -> bool {
        if self.run_mends(at, now) {
            return true;
        }
        let short = self.volumes.get(at).is_some_and(|v| v.nexus.waits_for_memory());
        let Some(page) = self.reserve.pages.pop_if(|_| short) else { return false };
        self.release(page);
        let moved = self.run_mends(at, now);
        self.keep_reserve();
        moved
    }
}

#[cfg(test)]
mod tests {
    use cairn_block::HeapMemory;

    use super::*;

    fn fill(memory: &mut HeapMemory) -> Vec<Buf> {
        std::iter::from_fn(|| memory.alloc(PAGE)).collect()
    }

    #[test]
    fn payload_that_takes_all_leaves_what_is_kept() {
        let mut memory = HeapMemory::new(4 << 20);
        let mut reserve = Reserve::default();
        reserve.keep(true, true, &mut memory);
        let payload = fill(&mut memory);
        assert!(memory.alloc(PAGE).is_none());
        let own: Vec<Buf> = std::iter::from_fn(|| reserve.page(&mut memory)).collect();
        assert_eq!(own.len(), PAGES);
        let connections: Vec<Queue> =
            std::iter::from_fn(|| reserve.connection(&mut memory)).collect();
        assert_eq!(connections.len(), CONNECTIONS);
        assert!(reserve.lifeline.is_whole());
        // What comes back first is kept anew, and nothing more than was.
        own.into_iter().for_each(|page| memory.release(page));
        reserve.keep(true, true, &mut memory);
        assert_eq!(reserve.pages.len(), PAGES);
        payload.into_iter().for_each(|page| memory.release(page));
        reserve.keep(true, true, &mut memory);
        let left = fill(&mut memory).len();
        connections.into_iter().for_each(|queue| queue.close(&mut memory));
        assert_eq!(fill(&mut memory).len() + left, {
            let mut memory = HeapMemory::new(4 << 20);
            Reserve::default().keep(true, true, &mut memory);
            fill(&mut memory).len()
        });
    }

    /// A pool took a page of it, and payload the rest, which waited for the pool: it never got the whole again.
    #[test]
    fn what_pools_do_not_use_of_the_lifeline_is_kept() {
        let mut memory = HeapMemory::new(4 << 20);
        let mut reserve = Reserve::default();
        reserve.keep(true, true, &mut memory);
        let payload = fill(&mut memory);
        assert!(reserve.lifeline.release(&mut memory));
        let pages = memory.alloc(2 * PAGE).expect("it was given back");
        reserve.lifeline.keep(&mut memory);
        assert!(!reserve.lifeline.is_whole());
        assert!(memory.alloc(PAGE).is_none(), "payload gets nothing of it");
        memory.release(pages);
        reserve.lifeline.keep(&mut memory);
        assert!(reserve.lifeline.is_whole());
        drop(payload);
    }

    #[test]
    fn a_process_without_pools_keeps_pages_alone() {
        let mut memory = HeapMemory::new(1 << 20);
        let mut reserve = Reserve::default();
        reserve.keep(false, false, &mut memory);
        assert_eq!(fill(&mut memory).len(), 256 - PAGES);
        assert!(reserve.lifeline.pieces.is_empty() && reserve.connections.is_empty());
    }
}
