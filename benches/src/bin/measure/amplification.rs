//! Bytes to the device for each byte of the host: counted, so the same on every machine.

use anyhow::Result;
use cairn_replica::Pool;

use crate::Figure;
use crate::rig::{Ask, BLOCK, Counted, Counting, DEPTH, EXTENT, Rig, Rng};

const GIB: u64 = 1 << 30;
const POOL: u64 = 64 * GIB;
/// As many extents as may be dirty.
const NEAR: u64 = 4 * GIB;
/// Four times as many.
const FAR: u64 = 16 * GIB;
const WRITES: u64 = 40_000;
const BLOCKS_PER_EXTENT: u64 = EXTENT / BLOCK;

fn rig() -> Result<Rig<Counting>> {
    let (disk, pool): (Counting, Pool) = Counting::new(POOL)?;
    let mut rig = Rig::new(pool, disk, 60 * GIB, 4096)?;
    rig.fill();
    Ok(rig)
}

/// Writes a block of each extent of the first `bytes`, and brings the pool to rest.
fn touch(rig: &mut Rig<Counting>, bytes: u64) -> Result<()> {
    let mut extents = 0..bytes / EXTENT;
    rig.run(DEPTH, || extents.next().map(|e| Ask::write(e * BLOCKS_PER_EXTENT, 1)))?;
    rig.settle()
}

fn random(rig: &mut Rig<Counting>, bytes: u64, writes: u64, seed: u64) -> Result<Counted> {
    let mut rng = Rng(seed);
    let mut left = writes;
    rig.disk.counted = Counted::default();
    rig.run(DEPTH, || {
        left = left.checked_sub(1)?;
        Some(Ask::write(rng.below(bytes / BLOCK), 1))
    })?;
    rig.settle()?;
    Ok(rig.disk.counted)
}

/// One write to each extent, none twice.
fn each_extent(rig: &mut Rig<Counting>, bytes: u64) -> Result<Counted> {
    let extents = bytes / EXTENT;
    let mut i = 0;
    rig.disk.counted = Counted::default();
    rig.run(DEPTH, || {
        // An odd step walks through all of a power of two.
        let extent = i * 0x9e3b % extents;
        i += 1;
        (i <= extents).then(|| Ask::write(extent * BLOCKS_PER_EXTENT + i % 200, 1))
    })?;
    rig.settle()?;
    Ok(rig.disk.counted)
}

fn figure(name: &str, writes: u64, counted: Counted) -> Figure {
    let host = writes * BLOCK;
    let to_device = counted.data + counted.metadata;
    // Both are far below 2^52.
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    let (ratio, flushes, meta) = (
        to_device as f64 / host as f64,
        counted.flushes as f64 * 1000.0 / writes as f64,
        counted.metadata as f64 / host as f64,
    );
    let note = format!(
        "{writes} writes; metadata {meta:.3}x, {flushes:.1} flushes per 1000 writes, {} MiB zeroed",
        counted.zeroed >> 20
    );
    Figure::new(name, ratio, "x").note(note)
}

pub(crate) fn run() -> Result<Vec<Figure>> {
    let mut figures = Vec::new();

    let mut steady = rig()?;
    touch(&mut steady, NEAR)?;
    random(&mut steady, NEAR, WRITES, 1)?;
    let counted = random(&mut steady, NEAR, WRITES, 2)?;
    figures.push(figure("overwrite, 4 GiB in use", WRITES, counted).at_most(1.10));

    let mut wide = rig()?;
    touch(&mut wide, FAR)?;
    let counted = random(&mut wide, FAR, WRITES, 3)?;
    figures.push(figure("overwrite, 16 GiB in use", WRITES, counted));
    drop(wide);

    let mut thin = rig()?;
    let counted = random(&mut thin, NEAR, WRITES, 4)?;
    figures.push(figure("first touch, random in 4 GiB", WRITES, counted).at_most(1.3));
    let mut thin = rig()?;
    let counted = each_extent(&mut thin, NEAR)?;
    let name = "first touch, each write a new extent, 4 GiB";
    figures.push(figure(name, NEAR / EXTENT, counted).at_most(1.3));
    let mut thin = rig()?;
    let counted = each_extent(&mut thin, FAR)?;
    let name = "first touch, each write a new extent, 16 GiB";
    figures.push(figure(name, FAR / EXTENT, counted));
    drop(thin);

    for (clean, each) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut layered = rig()?;
        touch(&mut layered, NEAR)?;
        if clean {
            layered.checkpoint()?;
        }
        layered.snapshot(1)?;
        let (counted, writes) = if each {
            (each_extent(&mut layered, NEAR)?, NEAR / EXTENT)
        } else {
            (random(&mut layered, NEAR, WRITES, 5)?, WRITES)
        };
        let what = if each { "each write a new extent" } else { "random in 4 GiB" };
        let was = if clean { "washed" } else { "dirty" };
        let name = format!("after a snapshot, {what}, {was} before");
        let bar = figure(&name, writes, counted);
        figures.push(if each && !clean { bar } else { bar.at_most(1.5) });
    }
    Ok(figures)
}
