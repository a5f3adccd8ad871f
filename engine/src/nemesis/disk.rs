//! A disk with a volatile write cache that dies with the process: `kill -9` is a loss of power.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use cairn_reactor::DiskFault;

use super::Chance;

/// The unit of every transfer.
pub(super) const PAGE: usize = 4096;
/// What a loss of power tears a page into.
const SECTOR: usize = 512;
/// Of a hundred writes so many are on the medium at once, as where a cache is written back meanwhile.
const WRITTEN_BACK: u64 = 25;
/// And so many in part.
const TORN: u64 = 8;

/// A page's bytes; `None` stands for zeros.
type Page = Option<Box<[u8; PAGE]>>;

/// What is beneath a device, beside the handle of the driver, which has the lock.
#[derive(Debug, Clone)]
pub(super) struct Medium {
    file: Arc<File>,
    len: u64,
}

/// The medium, and what is written and was not flushed.
#[derive(Debug)]
pub(super) struct CachedDisk {
    medium: Medium,
    cached: BTreeMap<u64, Page>,
    tears: bool,
    chance: Chance,
}

impl Medium {
    pub(super) fn open(path: &Path, len: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file: Arc::new(file), len })
    }

    /// From now on with a cache.
    pub(super) fn cached(&self, tears: bool, seed: u64) -> CachedDisk {
        let chance = Chance::new(seed);
        CachedDisk { medium: self.clone(), cached: BTreeMap::new(), tears, chance }
    }

    fn holds(&self, offset: u64, len: u64) -> Result<(), DiskFault> {
        // The pool's file may have been made longer since.
        let longer = |end| self.file.metadata().is_ok_and(|found| end <= found.len());
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len || longer(end));
        if fits { Ok(()) } else { Err(DiskFault::Short) }
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskFault> {
        self.holds(offset, out.len() as u64)?;
        self.file.read_exact_at(out, offset).map_err(|e| fault(&e))
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskFault> {
        self.holds(offset, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset).map_err(|e| fault(&e))
    }
}

impl CachedDisk {
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskFault> {
        self.medium.read(offset, out)?;
        for (number, bytes) in (offset / PAGE as u64..).zip(out.chunks_mut(PAGE)) {
            match self.cached.get(&number) {
                Some(Some(page)) => bytes.copy_from_slice(&page[..bytes.len()]),
                Some(None) => bytes.fill(0),
                None => {}
            }
        }
        Ok(())
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8], fua: bool) -> Result<(), DiskFault> {
        self.medium.holds(offset, bytes.len() as u64)?;
        for (number, bytes) in (offset / PAGE as u64..).zip(bytes.chunks(PAGE)) {
            let page = <[u8; PAGE]>::try_from(bytes).map_err(|_| DiskFault::Errno(EINVAL))?;
            self.put(number, Some(Box::new(page)), fua)?;
        }
        Ok(())
    }

    pub(super) fn zero(&mut self, offset: u64, len: u64) -> Result<(), DiskFault> {
        self.medium.holds(offset, len)?;
        for number in offset / PAGE as u64..(offset + len) / PAGE as u64 {
            self.put(number, None, false)?;
        }
        Ok(())
    }

    fn put(&mut self, number: u64, page: Page, fua: bool) -> Result<(), DiskFault> {
        let roll = self.chance.below(100);
        let at = number * PAGE as u64;
        if fua || roll < WRITTEN_BACK {
            self.medium.write(at, bytes_of(&page))?;
        } else if self.tears && roll < WRITTEN_BACK + TORN {
            for (i, sector) in (0..).zip(bytes_of(&page).chunks(SECTOR)) {
                if self.chance.below(2) == 0 {
                    let at = at + i * SECTOR as u64;
                    self.medium.write(at, sector)?;
                }
            }
        }
        if fua {
            self.cached.remove(&number);
        } else {
            self.cached.insert(number, page);
        }
        Ok(())
    }

    /// Makes everything that was written durable.
    pub(super) fn flush(&mut self) -> Result<(), DiskFault> {
        while let Some((number, page)) = self.cached.pop_first() {
            if let Err(fault) = self.medium.write(number * PAGE as u64, bytes_of(&page)) {
                self.cached.insert(number, page);
                return Err(fault);
            }
        }
        Ok(())
    }
}

fn bytes_of(page: &Page) -> &[u8; PAGE] {
    const ZEROS: [u8; PAGE] = [0; PAGE];
    match page {
        Some(page) => page,
        None => &ZEROS,
    }
}

const EINVAL: i32 = nix::errno::Errno::EINVAL as i32;

fn fault(error: &io::Error) -> DiskFault {
    match error.raw_os_error() {
        Some(code) if code == nix::errno::Errno::ENOSPC as i32 => DiskFault::NoSpace,
        Some(code) => DiskFault::Errno(code),
        None => DiskFault::Short,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> std::path::PathBuf {
        let path =
            std::env::temp_dir().join(format!("cairn-nemesis-{name}-{}", std::process::id()));
        std::fs::write(&path, vec![0; 4 * PAGE]).unwrap();
        path
    }

    fn page(path: &Path, number: usize) -> Vec<u8> {
        std::fs::read(path).unwrap()[number * PAGE..][..PAGE].to_vec()
    }

    #[test]
    fn flushed_pages_survive_and_the_rest_may_not() {
        let path = scratch("cache");
        let mut kept = 0;
        for seed in 0..64 {
            std::fs::write(&path, vec![0; 4 * PAGE]).unwrap();
            let medium = Medium::open(&path, 4 * PAGE as u64).unwrap();
            let mut disk = medium.cached(false, seed);
            disk.write(0, &[1; PAGE], false).unwrap();
            disk.flush().unwrap();
            disk.write(0, &[2; 2 * PAGE], false).unwrap();
            disk.write(2 * PAGE as u64, &[4; PAGE], true).unwrap();
            let mut seen = [0; 3 * PAGE];
            disk.read(0, &mut seen).unwrap();
            assert!(seen[..2 * PAGE].iter().all(|&b| b == 2), "reads see what was written");
            drop(disk);
            assert!(page(&path, 0).iter().all(|&b| b == 1) || page(&path, 0) == [2; PAGE]);
            assert_eq!(page(&path, 2), [4; PAGE]);
            kept += usize::from(page(&path, 1) == [2; PAGE]);
        }
        assert!((1..64).contains(&kept));
        std::fs::remove_file(path).unwrap();
    }
}
