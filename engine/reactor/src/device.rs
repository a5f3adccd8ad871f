//! Devices opened for direct I/O, and memory regions that stand in for them.
//!
//! The calls here are synchronous: they serve formatting, opening and inspection. The data path goes
//! through the driver.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::arena::{LARGE_PAGE, Mapping, settle_stores};

/// Metadata and data blocks are this large; a device must take them at this alignment.
const BLOCK: usize = 4096;
/// Synchronous transfers go through a buffer of this size.
const BOUNCE: usize = 256 << 10;
/// What is written or given back in bulk, of memory.
const BULK: usize = 256 << 10;

/// How a file is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoMode {
    /// `O_DIRECT`: past the page cache.
    #[default]
    Direct,
    /// Through the page cache: for filesystems that refuse `O_DIRECT`. Flushes stay real.
    Buffered,
}

/// Why a device cannot be used. Each says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there or may not be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its filesystem has no direct I/O.
    #[error(
        "{} is on a filesystem that refuses O_DIRECT; move the pool to ext4, xfs or a block device, \
         or open it with io = \"buffered\"",
        path.display()
    )]
    NoDirectIo {
        /// The file.
        path: PathBuf,
    },
    /// Its direct-I/O unit is larger than a Cairn block.
    #[error("{} takes direct I/O in units of {unit} bytes; Cairn needs 4096 or less", path.display())]
    Alignment {
        /// The file.
        path: PathBuf,
        /// What it takes.
        unit: u32,
    },
    /// Another process has it.
    #[error("{} is in use by another process; a pool is opened by one process at a time", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// Neither a regular file nor a block device.
    #[error("{} is neither a regular file nor a block device", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
}

/// A page-aligned buffer for direct transfers.
struct Bounce {
    bytes: Vec<u8>,
    start: usize,
}

impl Bounce {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len.min(BOUNCE).next_multiple_of(BLOCK) + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    fn window(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..][..len]
    }
}

/// A regular file or block device, locked against other processes.
#[derive(Debug)]
pub struct BlockFile {
    file: File,
    path: PathBuf,
    len: u64,
    is_block: bool,
    sector_size: u32,
    memory_alignment: u32,
}

impl BlockFile {
    /// Creates a new file of `len` bytes that reads as zeros, and makes its name durable.
    ///
    /// # Errors
    /// Where the file is there already, or cannot be made.
    pub fn create(path: &Path, len: u64) -> Result<(), OpenError> {
        let fail = |source| OpenError::Open { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(fail)?;
        file.set_len(len).and_then(|()| file.sync_all()).map_err(fail)?;
        let parent = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(fail)
    }

    /// Opens a file or device for reading and writing, and locks it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path, mode: IoMode) -> Result<Self, OpenError> {
        Self::open_with(path, mode, true)
    }

    /// Opens a file or device for reading alone; a process that has it open is not disturbed.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_read_only(path: &Path, mode: IoMode) -> Result<Self, OpenError> {
        Self::open_with(path, mode, false)
    }

    fn open_with(path: &Path, mode: IoMode, write: bool) -> Result<Self, OpenError> {
        let owned = || path.to_owned();
        let fail = |source| OpenError::Open { path: owned(), source };
        let meta = std::fs::metadata(path).map_err(fail)?;
        let is_block = meta.file_type().is_block_device();
        if !is_block && !meta.is_file() {
            return Err(OpenError::Kind { path: owned() });
        }
        let mut flags = libc::O_CLOEXEC;
        if mode == IoMode::Direct {
            flags |= libc::O_DIRECT;
        }
        if is_block && write {
            flags |= libc::O_EXCL;
        }
        let file =
            OpenOptions::new().read(true).write(write).custom_flags(flags).open(path).map_err(
                |e| match e.raw_os_error() {
                    Some(libc::EINVAL) if mode == IoMode::Direct => {
                        OpenError::NoDirectIo { path: owned() }
                    }
                    Some(libc::EBUSY) => OpenError::Busy { path: owned() },
                    _ => fail(e),
                },
            )?;
        if write {
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(OpenError::Busy { path: owned() }),
                Err(TryLockError::Error(e)) => return Err(fail(e)),
            }
        }
        let mut sector_size = u32::try_from(meta.blksize()).unwrap_or(4096).clamp(512, 4096);
        let mut memory_alignment = 1;
        if mode == IoMode::Direct {
            match direct_io_unit(&file).map_err(fail)? {
                DirectIo::Unit { unit, memory } if unit as usize <= BLOCK => {
                    (sector_size, memory_alignment) = (unit.max(512), memory);
                }
                DirectIo::Unit { unit, .. } => {
                    return Err(OpenError::Alignment { path: owned(), unit });
                }
                DirectIo::Refused => return Err(OpenError::NoDirectIo { path: owned() }),
                DirectIo::Unknown => memory_alignment = 4096,
            }
        }
        let len = if is_block {
            use std::io::{Seek, SeekFrom};
            (&file).seek(SeekFrom::End(0)).map_err(fail)?
        } else {
            meta.len()
        };
        Ok(Self { file, path: owned(), len, is_block, sector_size, memory_alignment })
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

    /// Whether it is a block device.
    #[must_use]
    pub fn is_block(&self) -> bool {
        self.is_block
    }

    /// The unit of direct I/O in bytes: a write of this size is not torn by the interface.
    #[must_use]
    pub fn sector_size(&self) -> u32 {
        self.sector_size
    }

    /// What memory that is read into or written from is to be aligned to, in bytes.
    #[must_use]
    pub fn memory_alignment(&self) -> u32 {
        self.memory_alignment
    }

    /// Where it was opened from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a regular file longer; the new bytes read as zeros.
    ///
    /// # Errors
    /// Where it is a block device, would shrink, or the filesystem refuses.
    pub fn grow(&mut self, len: u64) -> io::Result<()> {
        if self.is_block || len < self.len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only a regular file can be grown, and nothing can be shrunk",
            ));
        }
        self.file.set_len(len)?;
        self.file.sync_all()?;
        self.len = len;
        Ok(())
    }

    /// Fills `buf` from `offset`; both multiples of 4096.
    ///
    /// # Errors
    /// Those of the device; a range past its end.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut bounce = Bounce::new(buf.len());
        let mut at = offset;
        for part in buf.chunks_mut(BOUNCE) {
            let staged = bounce.window(part.len());
            self.file.read_exact_at(staged, at)?;
            part.copy_from_slice(staged);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes `buf` at `offset`; both multiples of 4096.
    ///
    /// # Errors
    /// Those of the device.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut bounce = Bounce::new(buf.len());
        let mut at = offset;
        for part in buf.chunks(BOUNCE) {
            let staged = bounce.window(part.len());
            staged.copy_from_slice(part);
            self.file.write_all_at(staged, at)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// Those of the device.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes a range read as zeros, giving space back where that can be done.
    ///
    /// # Errors
    /// Those of the device.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let range = |mode| {
            let (o, l) = (i64::try_from(offset), i64::try_from(len));
            let (Ok(o), Ok(l)) = (o, l) else { return Err(nix::errno::Errno::EINVAL) };
            fallocate(&self.file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, o, l)
        };
        if range(FallocateFlags::FALLOC_FL_PUNCH_HOLE).is_ok()
            || range(FallocateFlags::FALLOC_FL_ZERO_RANGE).is_ok()
        {
            return Ok(());
        }
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let part = (end - at).min(BOUNCE as u64);
            #[expect(clippy::cast_possible_truncation, reason = "at most BOUNCE")]
            self.write_at(at, &vec![0; part as usize])?;
            at += part;
        }
        Ok(())
    }

    pub(crate) fn raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

enum DirectIo {
    /// What offsets and memory are to be aligned to, and memory alone.
    Unit {
        unit: u32,
        memory: u32,
    },
    Refused,
    /// The kernel is too old to tell.
    Unknown,
}

/// The alignment that direct I/O on this file demands. Source: statx(2), `STATX_DIOALIGN`.
fn direct_io_unit(file: &File) -> io::Result<DirectIo> {
    // SAFETY: an all-zero statx is a valid value of that plain C struct.
    let mut stx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the path is an empty C string as AT_EMPTY_PATH asks, and
    // `stx` is a statx to be written.
    let rc = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stx,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    if stx.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(DirectIo::Unknown);
    }
    if stx.stx_dio_offset_align == 0 {
        return Ok(DirectIo::Refused);
    }
    let memory = stx.stx_dio_mem_align.max(1);
    Ok(DirectIo::Unit { unit: stx.stx_dio_offset_align.max(memory), memory })
}

/// Memory that behaves as a device: for tests and benchmarks. It keeps nothing across a restart.
#[derive(Debug)]
pub struct MemRegion {
    map: Mapping,
    /// For each large page, whether it was asked for.
    large: Vec<bool>,
}

impl MemRegion {
    /// A region of `len` zero bytes; memory is used only where it is written.
    ///
    /// # Errors
    /// Where the system has no address space left.
    pub fn new(len: usize) -> io::Result<Self> {
        Ok(Self { map: Mapping::new(len)?, large: vec![false; len / LARGE_PAGE + 1] })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Whether it has no bytes: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    fn range(&self, offset: u64, len: u64) -> io::Result<(usize, usize)> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let at = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        Ok((at, len))
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// A range past the end.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (at, len) = self.range(offset, buf.len() as u64)?;
        buf.copy_from_slice(self.map.bytes(at, len));
        Ok(())
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// A range past the end.
    pub fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.write_past_caches(offset, buf)?;
        settle_stores();
        Ok(())
    }

    /// As [`MemRegion::write_at`]; nobody may look at it before [`settle_stores`].
    pub(crate) fn write_past_caches(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let (at, len) = self.range(offset, buf.len() as u64)?;
        if len >= BULK {
            self.ask_for_large_pages(at, len, true);
        }
        self.map.write_past_caches(at, buf);
        Ok(())
    }

    /// What is written in bulk gets large pages. A block here and there does not: the system would fill two MiB with
    /// zeros for each, and the memory would be used.
    fn ask_for_large_pages(&mut self, at: usize, len: usize, large: bool) {
        let pages = at / LARGE_PAGE..(at + len).div_ceil(LARGE_PAGE);
        if self.large[pages.clone()].iter().any(|asked| *asked != large) {
            self.map.ask_for_large_pages(at, len, large);
            self.large[pages].fill(large);
        }
    }

    /// Makes a range read as zeros and gives its whole pages back.
    ///
    /// # Errors
    /// A range past the end.
    pub fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let (at, len) = self.range(offset, len)?;
        if at.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK) {
            if len >= BULK {
                self.ask_for_large_pages(at, len, false);
            }
            self.map.discard_pages(at, len);
        } else {
            self.map.bytes_mut(at, len).fill(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/reactor-tests");
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join(format!("{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn a_file_is_written_read_zeroed_and_locked() {
        let path = scratch("device");
        BlockFile::create(&path, 1 << 20).unwrap();
        assert!(BlockFile::create(&path, 1).is_err());
        let dev = BlockFile::open(&path, IoMode::Direct).unwrap();
        assert_eq!(dev.len(), 1 << 20);
        assert!(matches!(BlockFile::open(&path, IoMode::Direct), Err(OpenError::Busy { .. })));
        let data: Vec<u8> = (0..8192u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        dev.write_at(4096, &data).unwrap();
        let mut back = vec![0; 16384];
        dev.read_at(0, &mut back).unwrap();
        assert_eq!(&back[4096..12288], data);
        dev.zero(4096, 4096).unwrap();
        dev.flush().unwrap();
        dev.read_at(4096, &mut back[..4096]).unwrap();
        assert!(back[..4096].iter().all(|&b| b == 0));
        assert!(dev.read_at(1 << 20, &mut back).is_err());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn errors_name_the_file_and_the_way_out() {
        let e = BlockFile::open(Path::new("/nonexistent/pool"), IoMode::Direct).unwrap_err();
        assert!(e.to_string().contains("/nonexistent/pool"), "{e}");
        let e = BlockFile::open(Path::new("/proc"), IoMode::Direct).unwrap_err();
        assert!(matches!(e, OpenError::Kind { .. }), "{e}");
        // procfs files are regular files without direct I/O.
        let e = BlockFile::open_read_only(Path::new("/proc/version"), IoMode::Direct).unwrap_err();
        assert!(e.to_string().contains("io = \"buffered\""), "{e}");
    }

    #[test]
    fn memory_stands_in_for_a_device() {
        let mut mem = MemRegion::new(1 << 20).unwrap();
        mem.write_at(8192, &[9; 4096]).unwrap();
        let mut back = [1; 4096];
        mem.read_at(8192, &mut back).unwrap();
        assert_eq!(back, [9; 4096]);
        mem.zero(8192, 4096).unwrap();
        mem.read_at(8192, &mut back).unwrap();
        assert_eq!(back, [0; 4096]);
        // In bulk, and given back: other pages, and the same bytes.
        mem.write_at(0, &vec![7; 1 << 20]).unwrap();
        mem.read_at((1 << 20) - 4096, &mut back).unwrap();
        assert_eq!(back, [7; 4096]);
        mem.zero(0, 1 << 20).unwrap();
        mem.write_at(4096, &[5; 4096]).unwrap();
        mem.read_at(4096, &mut back).unwrap();
        assert_eq!(back, [5; 4096]);
        mem.read_at(0, &mut back).unwrap();
        assert_eq!(back, [0; 4096]);
        assert!(mem.read_at(1 << 20, &mut back).is_err());
        assert!(mem.write_at(u64::MAX, &back).is_err());
    }
}
