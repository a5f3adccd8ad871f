//! Everything that is compared: one file for each.

pub(crate) mod cairn;
pub(crate) mod ceph;
pub(crate) mod floor;
pub(crate) mod gluster;
pub(crate) mod iscsi;
pub(crate) mod iscsi_client;
pub(crate) mod loopback;
pub(crate) mod quorum;
pub(crate) mod relay;
pub(crate) mod relay_client;
pub(crate) mod tgt;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::PosixFadviseAdvice;

use crate::load::{Load, Measured};

/// Stacks that are compared with each other, and up at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    /// Replicas in memory: what the software costs.
    Memory,
    /// Replicas in files of one file system.
    Files,
    /// One copy, in memory and in a file, over iSCSI.
    Iscsi,
}

impl Group {
    pub(crate) const ALL: [Self; 3] = [Self::Memory, Self::Files, Self::Iscsi];

    /// How it is chosen on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Files => "disk",
            Self::Iscsi => "iscsi",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Memory => "in memory, server and client on one core each",
            Self::Files => "in files",
            Self::Iscsi => "over iSCSI, server and client on one core each",
        }
    }
}

/// Where a stack is to run.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// A folder of its own, removed afterwards.
    pub(crate) dir: PathBuf,
    /// Bytes of the volume.
    pub(crate) size: u64,
    /// `cairn`, built for speed.
    pub(crate) cairn: PathBuf,
    /// This program.
    pub(crate) own: PathBuf,
    /// Cores of server and client, where there are two.
    pub(crate) cores: Option<(usize, usize)>,
    /// How long the client looks for answers before it sleeps.
    pub(crate) client_spin_us: u64,
    /// `spin_us` of Cairn's processes, where it is not what it is by itself.
    pub(crate) spin_us: Option<u64>,
}

impl Place {
    /// A new folder below this one.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let own = std::env::current_exe()?;
        let cairn = own.with_file_name("cairn");
        if !cairn.exists() {
            bail!("{} is not there; build it: cargo build --release -p cairn", cairn.display());
        }
        let dir = std::path::absolute(dir)?.join(std::process::id().to_string());
        std::fs::create_dir_all(&dir)?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cores = (cores > 1).then_some((0, 1));
        Ok(Self { dir, size: 0, cairn, own, cores, client_spin_us: 0, spin_us: None })
    }

    /// Nothing is left of it.
    pub(crate) fn remove(&self) -> Result<()> {
        std::fs::remove_dir_all(&self.dir)
            .with_context(|| format!("removing {}", self.dir.display()))
    }

    /// The folder of one stack.
    pub(crate) fn of(&self, stack: &str) -> Result<Self> {
        let dir = self.dir.join(stack);
        std::fs::create_dir_all(&dir)?;
        Ok(Self { dir, ..self.clone() })
    }

    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }
}

/// How a stack is begun.
type Start = fn(&Place) -> Result<Box<dyn Running>>;

/// Something to compare.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stack {
    /// How it is chosen on the command line, and named in JSON.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) group: Group,
    /// What it runs, each with the Debian package that it comes from.
    pub(crate) programs: &'static [(&'static str, &'static str)],
    pub(crate) start: Start,
}

/// A stack that is up. It ends when it is dropped.
pub(crate) trait Running {
    /// Whether this load means anything to it.
    fn takes(&self, _load: &Load) -> bool {
        true
    }

    /// Runs the load, without counting the servers' CPU time unless only the stack itself can.
    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured>;

    /// Its server processes; whatever they started counts too.
    fn servers(&self) -> Vec<u32>;

    /// A client that is connected and all but silent for so long.
    fn silent(&self, _seconds: u64) -> Option<Command> {
        None
    }
}

/// In the order of the table; the first of a group is what the others are held against.
pub(crate) const STACKS: &[Stack] = &[
    loopback::STACK,
    relay::MEMORY,
    cairn::REPLICA,
    cairn::VOLUME,
    cairn::LOCAL,
    cairn::OVER_TCP,
    floor::ONE,
    floor::THREE,
    relay::STACK,
    cairn::FILES,
    cairn::FILES_BESIDE,
    quorum::STACK,
    ceph::STACK,
    gluster::STACK,
    tgt::MEMORY,
    iscsi::MEMORY,
    tgt::FILE,
    iscsi::FILE,
];

/// A file of so many bytes that are no zeros, all there, and on the disk alone.
pub(crate) fn full_file(path: &Path, size: u64) -> Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path)?;
    let piece = vec![0x5a; 1 << 20];
    let mut left = size;
    while left > 0 {
        let len = left.min(1 << 20);
        file.write_all(&piece[..usize::try_from(len)?])?;
        left -= len;
    }
    file.sync_all()?;
    // What is in the page cache is written back and thrown out by every write past it.
    nix::fcntl::posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}
