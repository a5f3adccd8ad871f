//! `cairn inspect`: the structures of a pool, as they are on the device.

mod layers;
mod raw;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use cairn_engine::block::ReplicaId;
use cairn_engine::device::PoolDevice;
use cairn_engine::reactor::{Attach, BlockFile, IoMode};
use cairn_engine::replica::disk::{CatalogState, EntryState};
use cairn_engine::replica::{
    CatalogInfo, inspect_catalog, inspect_checksums, inspect_dirty, inspect_extents,
    inspect_journal, inspect_map, inspect_superblock,
};
use clap::{Args, ValueEnum};

use crate::cli::Global;
use crate::output;

/// Options of `cairn inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Which structure.
    #[arg(value_enum)]
    what: Structure,

    /// The pool's file or block device.
    pool: PathBuf,

    /// Print what is free as well.
    #[arg(long)]
    all: bool,

    /// With map: only this replica, its snapshots with it.
    #[arg(long, value_name = "ID")]
    replica: Option<ReplicaId>,

    /// With checksums: only this extent.
    #[arg(long, value_name = "N")]
    extent: Option<u32>,

    /// With checksums: read each extent and compare its blocks.
    #[arg(long)]
    verify: bool,

    /// Go through the page cache: for filesystems that refuse O_DIRECT.
    #[arg(long)]
    buffered: bool,
}

/// A structure on the device; docs/format.md draws each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Structure {
    /// All copies of the superblock.
    Superblock,
    /// The replicas and their registers.
    Catalog,
    /// The journal's blocks.
    Journal,
    /// The copies of the allocation table's pages.
    Table,
    /// What each extent is used for, the journal not applied.
    Extents,
    /// Where the extents of each replica and snapshot are, and which layer answers reads of them.
    Map,
    /// The extents that a start would read and hash anew after a crash now.
    Dirty,
    /// The checksum pages of the extents in use.
    Checksums,
}

/// Options that belong to one structure are refused with another.
fn check_options(args: &InspectArgs) -> Result<()> {
    if args.replica.is_some() && args.what != Structure::Map {
        bail!("--replica narrows `cairn inspect map`; this structure is not by replica");
    }
    let of_checksums = args.extent.is_some() || args.verify;
    if of_checksums && args.what != Structure::Checksums {
        bail!("--extent and --verify are options of `cairn inspect checksums`");
    }
    Ok(())
}

pub(crate) fn run(global: &Global, args: &InspectArgs) -> Result<ExitCode> {
    check_options(args)?;
    let mode = if args.buffered { IoMode::Buffered } else { IoMode::Direct };
    let file = BlockFile::open_read_only(&args.pool, mode)?;
    let mut dev = PoolDevice(Attach::File(file));
    let context = || format!("reading {}", args.pool.display());
    let whole = match args.what {
        Structure::Superblock => {
            let copies = inspect_superblock(&mut dev).with_context(context)?;
            output::list(global.output, &copies)?;
            copies.iter().all(|c| c.content.is_ok())
        }
        Structure::Catalog => {
            let mut pages = inspect_catalog(&mut dev).with_context(context)?;
            let whole = pages.iter().all(|p| p.content.is_ok());
            let free = |p: &CatalogInfo| {
                p.content.as_ref().is_ok_and(|page| page.state == CatalogState::Free)
            };
            pages.retain(|p| args.all || !free(p));
            output::list(global.output, &pages)?;
            whole
        }
        Structure::Journal => {
            let mut blocks = inspect_journal(&mut dev).with_context(context)?;
            blocks.retain(|b| args.all || !b.checkpointed);
            output::list(global.output, &blocks)?;
            true
        }
        Structure::Table => {
            let (pages, _) = inspect_extents(&mut dev).with_context(context)?;
            output::list(global.output, &pages)?;
            pages.iter().all(|p| p.head.is_ok() || p.blank)
        }
        Structure::Extents => {
            let (pages, mut extents) = inspect_extents(&mut dev).with_context(context)?;
            extents.retain(|e| args.all || e.entry.state == EntryState::Allocated);
            output::list(global.output, &extents)?;
            pages.iter().all(|p| p.head.is_ok() || p.blank)
        }
        Structure::Map => {
            let maps = inspect_map(&mut dev, args.replica).with_context(context)?;
            layers::map(global.output, &maps)?
        }
        Structure::Dirty => {
            let dirty = inspect_dirty(&mut dev).with_context(context)?;
            layers::dirty(global.output, &dirty)?
        }
        Structure::Checksums => {
            let pages =
                inspect_checksums(&mut dev, args.extent, args.verify).with_context(context)?;
            layers::checksums(global.output, &pages)?
        }
    };
    // A damaged copy is told by the exit code too; a torn older copy is usual after a crash.
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(2) })
}
