//! A disk in memory with a volatile write cache: what reads see, and what a power loss leaves.

use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use crate::rng::Rng;

/// The unit of every transfer.
pub const PAGE: usize = 4096;
/// What a power loss tears a page into.
const SECTOR: usize = 512;

/// A page's bytes; `None` stands for zeros.
pub(crate) type Page = Option<Rc<[u8; PAGE]>>;

/// What is wrong with a disk at the moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiskTrouble {
    /// Each operation takes up to so much longer, in nanoseconds.
    pub slow_ns: u64,
    /// Of a thousand operations so many take up to `late_ns` longer, as where a device collects garbage.
    pub late_per_mille: u64,
    /// How late those are at most, in nanoseconds.
    pub late_ns: u64,
    /// Operations started before this time complete after it.
    pub hung_until_ns: u64,
    /// Of a thousand operations so many fail with EIO.
    pub eio_per_mille: u64,
    /// Of a thousand writes so many find no room beneath.
    pub no_space_per_mille: u64,
    /// So many of the next operations fail with EIO.
    pub eio_next: u32,
    /// So many of the next flushes fail with EIO.
    pub eio_flushes: u32,
    /// A flush that fails takes with it what it was to cover, as a loss of power does.
    pub forgets: bool,
    /// So many of the next writes at or after page `data` end up on another page of it.
    pub astray: u32,
    /// The first page that such a write may be for, or may hit.
    pub data: u64,
}

/// The contents of one disk.
#[derive(Debug, Clone)]
pub struct SimDisk {
    len: u64,
    /// What a read returns, by page number.
    live: BTreeMap<u64, Rc<[u8; PAGE]>>,
    /// What a power loss cannot take.
    durable: BTreeMap<u64, Rc<[u8; PAGE]>>,
    /// Versions of a page, oldest first, that completed and were not flushed.
    cached: BTreeMap<u64, Vec<(u64, Page)>>,
    seq: u64,
    /// From this page on a loss of power tears no page: the device writes it whole or not at all.
    pub whole_from: Option<u64>,
    /// What is wrong with it.
    pub trouble: DiskTrouble,
    /// A write of it has failed: what is there is not known, and may not be readable until it is written again.
    pub has_failed: bool,
}

impl SimDisk {
    /// A zeroed disk of `len` bytes.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self {
            len,
            live: BTreeMap::new(),
            durable: BTreeMap::new(),
            cached: BTreeMap::new(),
            seq: 0,
            whole_from: None,
            trouble: DiskTrouble::default(),
            has_failed: false,
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn holds(&self, offset: u64, len: u64) -> bool {
        assert!(
            offset.is_multiple_of(PAGE as u64) && len.is_multiple_of(PAGE as u64),
            "an unaligned transfer of {len} bytes at {offset}"
        );
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    pub(crate) fn page(&self, number: u64) -> Page {
        self.live.get(&number).cloned()
    }

    /// Completes a write of one page.
    pub(crate) fn write_page(&mut self, number: u64, page: Page, fua: bool) {
        self.seq += 1;
        put(&mut self.live, number, page.clone());
        if fua {
            self.cached.remove(&number);
            put(&mut self.durable, number, page);
        } else {
            self.cached.entry(number).or_default().push((self.seq, page));
        }
    }

    /// Names everything that has completed so far, for a later [`SimDisk::flush_to`].
    pub(crate) fn mark(&self) -> u64 {
        self.seq
    }

    /// Makes durable what had completed at `mark`.
    pub(crate) fn flush_to(&mut self, mark: u64) {
        let durable = &mut self.durable;
        self.cached.retain(|&number, versions| {
            let old = versions.partition_point(|(seq, _)| *seq <= mark);
            if let Some((_, page)) = versions.drain(..old).next_back() {
                put(durable, number, page);
            }
            !versions.is_empty()
        });
    }

    /// Where a write that is to be misdirected goes: to another page of the data that was written.
    pub(crate) fn goes_astray(&mut self, page: u64, rng: &mut Rng) -> Option<u64> {
        let from = self.trouble.data;
        if self.trouble.astray == 0 || page < from {
            return None;
        }
        let n = self.live.range(from..).count();
        let (&other, _) = self.live.range(from..).nth(rng.index(n.max(1)))?;
        if other == page {
            return None;
        }
        self.trouble.astray -= 1;
        Some(other)
    }

    /// Flips a bit of a page that was written, at or after page `from`. Returns which.
    pub fn rot(&mut self, from: u64, rng: &mut Rng) -> Option<u64> {
        let n = self.live.range(from..).count();
        if n == 0 {
            return None;
        }
        let (&number, page) = self.live.range(from..).nth(rng.index(n))?;
        let mut bytes = **page;
        bytes[rng.index(PAGE)] ^= 1 << rng.below(8);
        let page = Rc::new(bytes);
        if self.durable.get(&number).is_some_and(|durable| self.live[&number] == *durable) {
            self.durable.insert(number, Rc::clone(&page));
        }
        self.live.insert(number, page);
        Some(number)
    }

    /// Cuts the power: each cached page keeps any of its versions, or a mixture of their sectors.
    pub fn lose_power(&mut self, rng: &mut Rng) {
        let cached = std::mem::take(&mut self.cached);
        for (number, versions) in cached {
            let mut choices = vec![self.durable.get(&number).cloned()];
            choices.extend(versions.into_iter().map(|(_, page)| page));
            let whole = self.whole_from.is_some_and(|from| number >= from);
            let page = if rng.chance(250) && !whole {
                let mut torn = [0; PAGE];
                for sector in torn.chunks_mut(SECTOR).enumerate() {
                    let (at, bytes) = (sector.0 * SECTOR, sector.1);
                    if let Some(from) = &choices[rng.index(choices.len())] {
                        bytes.copy_from_slice(&from[at..at + SECTOR]);
                    }
                }
                Some(Rc::new(torn))
            } else {
                choices.swap_remove(rng.index(choices.len()))
            };
            put(&mut self.durable, number, page);
        }
        self.live = self.durable.clone();
    }
}

fn put(map: &mut BTreeMap<u64, Rc<[u8; PAGE]>>, number: u64, page: Page) {
    match page {
        Some(page) => map.insert(number, page),
        None => map.remove(&number),
    };
}

/// The page that begins `bytes`.
pub(crate) fn page_of(bytes: &[u8]) -> Page {
    let page: &[u8; PAGE] = bytes.first_chunk().expect("whole pages");
    Some(Rc::new(*page))
}

/// The synchronous view, for format and open.
impl cairn_engine::replica::Device for SimDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if !self.holds(offset, buf.len() as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (number, bytes) in (offset / PAGE as u64..).zip(buf.chunks_mut(PAGE)) {
            match self.live.get(&number) {
                Some(page) => bytes.copy_from_slice(&page[..]),
                None => bytes.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if !self.holds(offset, buf.len() as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (number, bytes) in (offset / PAGE as u64..).zip(buf.chunks(PAGE)) {
            self.write_page(number, page_of(bytes), false);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flush_to(self.seq);
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if !self.holds(offset, len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for number in offset / PAGE as u64..(offset + len) / PAGE as u64 {
            self.write_page(number, None, false);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_engine::replica::Device;

    #[test]
    fn flushed_pages_survive_and_the_rest_may_not() {
        let mut kept = 0;
        for seed in 0..64 {
            let mut disk = SimDisk::new(1 << 20);
            disk.write_at(0, &[1; PAGE]).unwrap();
            Device::flush(&mut disk).unwrap();
            disk.write_at(0, &[2; PAGE]).unwrap();
            disk.write_at(4096, &[3; PAGE]).unwrap();
            disk.write_page(2, page_of(&[4; PAGE]), true);
            disk.lose_power(&mut Rng::new(seed));
            let mut page = [0; 3 * PAGE];
            disk.read_at(0, &mut page).unwrap();
            assert!(page[..PAGE].iter().all(|&b| b == 1 || b == 2));
            assert!(page[2 * PAGE..].iter().all(|&b| b == 4));
            kept += usize::from(page[PAGE..2 * PAGE].iter().all(|&b| b == 3));
        }
        assert!((1..64).contains(&kept));
    }
}
