//! What comes back to the file system when everything is discarded.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use cairn_block::IoOp;
use cairn_reactor::{Attach, BlockFile, IoMode};
use clap::Args;

use crate::Figure;
use crate::rig::{Ask, BLOCK, DEPTH, Real, Rig, Rng, make_file};

/// How much.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// MiB that are written.
    #[arg(long, default_value_t = 1024)]
    mib: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { mib: 1024 }
    }
}

/// Pieces of 4 KiB to 1 MiB that cover a volume once, in any order.
fn pieces(blocks: u64, seed: u64) -> Vec<(u64, u64)> {
    let mut rng = Rng(seed);
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < blocks {
        let len = (1 + rng.below(256)).min(blocks - at);
        pieces.push((at, len));
        at += len;
    }
    for i in (1..pieces.len()).rev() {
        let other = usize::try_from(rng.below(i as u64 + 1)).expect("an index");
        pieces.swap(i, other);
    }
    pieces
}

fn used(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

pub(crate) fn run(dir: &Path, options: &Options) -> Result<Vec<Figure>> {
    let path = dir.join(format!("measure-discard-{}", std::process::id()));
    let measured = storm(&path, options.mib << 20);
    std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    measured
}

fn storm(path: &Path, bytes: u64) -> Result<Vec<Figure>> {
    make_file(path, 2 * bytes)?;
    let (disk, pool) = Real::open(Attach::File(BlockFile::open(path, IoMode::Direct)?))?;
    let mut rig = Rig::new(pool, disk, bytes, 1 << 20)?;
    rig.checkpoint()?;
    let empty = used(path)?;
    rig.fill();
    let mut writes = pieces(bytes / BLOCK, 1).into_iter();
    rig.run(DEPTH, || writes.next().map(|(lba, blocks)| Ask::write(lba, blocks)))?;
    rig.settle()?;
    let full = used(path)?;
    let mut discards = pieces(bytes / BLOCK, 2).into_iter();
    rig.run(DEPTH, || discards.next().map(|(lba, blocks)| Ask { op: IoOp::Discard, lba, blocks }))?;
    rig.settle()?;
    let after = used(path)?;
    let held = rig.pool.usage().extents_allocated;
    #[expect(clippy::cast_precision_loss, reason = "a share for people")]
    let back = 100.0 * full.saturating_sub(after) as f64 / full.saturating_sub(empty) as f64;
    let note = format!(
        "{} MiB in the file when empty, {} when full, {} after; {held} extents still allocated",
        empty >> 20,
        full >> 20,
        after >> 20
    );
    Ok(vec![Figure::new("discard storm: space returned", back, "%").at_least(99.0).note(note)])
}
