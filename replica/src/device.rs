//! The synchronous seam for format, open and inspection: never on the data path.

use std::collections::BTreeMap;
use std::io;

use crate::disk::BLOCK;

/// A device to format, open or inspect. Buffers and offsets are multiples of 4096 bytes.
pub trait Device {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Whatever the device says.
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes `buf` at `offset`; durable after the next [`Device::flush`].
    ///
    /// # Errors
    /// Whatever the device says.
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes every earlier write durable.
    ///
    /// # Errors
    /// Whatever the device says.
    fn flush(&mut self) -> io::Result<()>;

    /// Makes `len` bytes at `offset` read as zeros.
    ///
    /// # Errors
    /// Whatever the device says.
    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()>;
}

impl<D: Device + ?Sized> Device for &mut D {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, buf)
    }

    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        (**self).zero(offset, len)
    }
}

fn past_end() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "past the end of the device")
}

/// A device in memory, for tests.
#[derive(Debug, Clone)]
pub struct MemDevice(pub Vec<u8>);

impl MemDevice {
    /// A zeroed device of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self(vec![0; len])
    }

    fn window(&mut self, offset: u64, len: u64) -> io::Result<&mut [u8]> {
        let start = usize::try_from(offset).map_err(|_| past_end())?;
        let end = usize::try_from(offset.saturating_add(len)).map_err(|_| past_end())?;
        self.0.get_mut(start..end).ok_or_else(past_end)
    }
}

impl Device for MemDevice {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(self.window(offset, buf.len() as u64)?);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.window(offset, buf.len() as u64)?.copy_from_slice(buf);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.window(offset, len)?.fill(0);
        Ok(())
    }
}

/// A device of any length in memory: only pages that were written take room. For tests.
#[derive(Debug, Clone)]
pub struct SparseDevice {
    len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl SparseDevice {
    /// A zeroed device of `len` bytes.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self { len, pages: BTreeMap::new() }
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK), "aligned to 4096");
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(past_end()),
        }
    }
}

impl Device for SparseDevice {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        buf.fill(0);
        let last = offset + buf.len() as u64;
        for (&at, page) in self.pages.range(offset..last) {
            let at = usize::try_from(at - offset).map_err(|_| past_end())?;
            buf[at..at + page.len()].copy_from_slice(page);
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        for (at, page) in (offset..).step_by(4096).zip(buf.chunks(4096)) {
            self.pages.insert(at, page.into());
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let mut tail = self.pages.split_off(&offset);
        let mut rest = tail.split_off(&(offset + len));
        self.pages.append(&mut rest);
        Ok(())
    }
}
