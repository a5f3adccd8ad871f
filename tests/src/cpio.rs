//! Writes the "newc" cpio archives that the kernel unpacks as its first root file system.

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const DIR: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;

/// An archive being written; [`Cpio::finish`] ends it, padded so that another may follow.
#[derive(Debug)]
pub(crate) struct Cpio<W> {
    out: W,
    inode: u32,
    written: usize,
}

impl<W: Write> Cpio<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, inode: 0, written: 0 }
    }

    pub(crate) fn dir(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIR, &[])
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | (mode & 0o7777), data)
    }

    fn symlink(&mut self, name: &str, to: &Path) -> io::Result<()> {
        self.entry(name, SYMLINK, to.as_os_str().as_encoded_bytes())
    }

    /// Everything below `root`, by names relative to it, in sorted order.
    pub(crate) fn tree(&mut self, root: &Path) -> io::Result<()> {
        self.tree_below(root, "")
    }

    fn tree_below(&mut self, dir: &Path, prefix: &str) -> io::Result<()> {
        let mut entries = std::fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let (path, meta) = (entry.path(), entry.metadata()?);
            if meta.is_dir() {
                self.dir(&name)?;
                self.tree_below(&path, &format!("{name}/"))?;
            } else if meta.is_symlink() {
                self.symlink(&name, &std::fs::read_link(&path)?)?;
            } else {
                self.file(&name, meta.permissions().mode(), &std::fs::read(&path)?)?;
            }
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let links = if mode == DIR { 2 } else { 1 };
        let fields = [
            self.inode as usize,
            mode as usize,
            0,
            0,
            links,
            0,
            data.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.bytes(header.as_bytes())?;
        self.bytes(name.as_bytes())?;
        self.bytes(&[0])?;
        self.pad()?;
        self.bytes(data)?;
        self.pad()
    }

    fn bytes(&mut self, data: &[u8]) -> io::Result<()> {
        self.written += data.len();
        self.out.write_all(data)
    }

    fn pad(&mut self) -> io::Result<()> {
        let over = self.written % 4;
        if over == 0 { Ok(()) } else { self.bytes(&[0; 4][over..]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_laid_out_as_the_kernel_reads_it() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.file("job/a", 0o755, b"hello").unwrap();
        let bytes = cpio.finish().unwrap();
        assert_eq!(&bytes[..6], b"070701");
        // ino, mode, ..., filesize at field 6, namesize at field 11.
        assert_eq!(&bytes[6..22], b"00000001000081ed");
        assert_eq!(&bytes[6 + 6 * 8..6 + 7 * 8], b"00000005");
        assert_eq!(&bytes[6 + 11 * 8..6 + 12 * 8], b"00000006");
        assert_eq!(&bytes[110..116], b"job/a\0");
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }
}
