//! What is attached to a driver, as the replica crate's synchronous device: for format and open.

use std::io;

use cairn_reactor::Attach;

/// Adapts an attached file or memory region.
#[derive(Debug)]
pub struct PoolDevice(pub Attach);

impl cairn_replica::Device for PoolDevice {
    fn len(&self) -> u64 {
        match &self.0 {
            Attach::File(file) => file.len(),
            Attach::Memory(region) => region.len(),
        }
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match &self.0 {
            Attach::File(file) => file.read_at(offset, buf),
            Attach::Memory(region) => region.read_at(offset, buf),
        }
    }

    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            Attach::File(file) => file.write_at(offset, buf),
            Attach::Memory(region) => region.write_at(offset, buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &self.0 {
            Attach::File(file) => file.flush(),
            Attach::Memory(_) => Ok(()),
        }
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match &mut self.0 {
            Attach::File(file) => file.zero(offset, len),
            Attach::Memory(region) => region.zero(offset, len),
        }
    }
}
