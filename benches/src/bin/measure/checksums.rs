//! What checksums cost a shard that does nothing else: two pools in memory, one without, in turns.
//! `served.rs` tells what they cost a host.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use cairn_engine::device::PoolDevice;
use cairn_reactor::{Attach, MemRegion};
use cairn_replica::Pool;
use clap::Args;

use crate::Figure;
use crate::rig::{Ask, BLOCK, DEPTH, Real, Rig, Rng, options};

/// How long, and how often.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Pairs of runs of each pattern.
    #[arg(long, default_value_t = 9)]
    pairs: u32,
    /// Requests of a run.
    #[arg(long, default_value_t = 200_000)]
    requests: u64,
    /// Seconds of a run over loopback.
    #[arg(long, default_value_t = 1.0)]
    time: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { pairs: 9, requests: 200_000, time: 1.0 }
    }
}

const POOL: usize = 320 << 20;
const VOLUME: u64 = 256 << 20;

fn rig(checksums: bool) -> Result<Rig<Real>> {
    let mut device = PoolDevice(Attach::Memory(MemRegion::new(POOL)?));
    Pool::format(&mut device, &options(true))?;
    let (disk, mut pool) = Real::open(device.0)?;
    if !checksums {
        pool.disable_checksums_for_benchmark();
    }
    let mut rig = Rig::new(pool, disk, VOLUME, 64 << 10)?;
    rig.fill();
    let mut at = 0;
    rig.run(DEPTH, || {
        let ask = Ask::write(at, 16);
        at += 16;
        (at <= VOLUME / BLOCK).then_some(ask)
    })?;
    rig.settle()?;
    Ok(rig)
}

/// Requests each second.
fn once(rig: &mut Rig<Real>, write: bool, requests: u64, seed: u64) -> Result<f64> {
    let (mut rng, mut left) = (Rng(seed), requests);
    let begun = Instant::now();
    rig.run(DEPTH, || {
        left = left.checked_sub(1)?;
        let lba = rng.below(VOLUME / BLOCK);
        Some(if write { Ask::write(lba, 1) } else { Ask::read(lba) })
    })?;
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    Ok(requests as f64 / begun.elapsed().as_secs_f64())
}

pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(crate) fn run(dir: &Path, options: &Options) -> Result<Vec<Figure>> {
    let mut figures = crate::served::run(dir, options.pairs, options.time)?;
    let (mut with, mut without) = (rig(true)?, rig(false)?);
    for (name, write) in [("randread", false), ("randwrite", true)] {
        let (mut ratios, mut on, mut off) = (Vec::new(), Vec::new(), Vec::new());
        // One of each before it counts; then who goes first alternates.
        for pair in 0..=options.pairs.max(5) {
            let seed = u64::from(pair);
            let (a, b) = if pair % 2 == 0 {
                let a = once(&mut with, write, options.requests, seed)?;
                (a, once(&mut without, write, options.requests, seed)?)
            } else {
                let b = once(&mut without, write, options.requests, seed)?;
                (once(&mut with, write, options.requests, seed)?, b)
            };
            if pair > 0 {
                ratios.push(a / b);
                on.push(a);
                off.push(b);
            }
        }
        let note = format!(
            "{:.0} IOPS with, {:.0} without; median of {} pairs",
            median(&mut on),
            median(&mut off),
            ratios.len()
        );
        let lost = 100.0 * (1.0 - median(&mut ratios));
        let name = format!("checksums, pool alone, {name} 4K QD 32: IOPS lost");
        figures.push(Figure::new(name, lost, "%").note(note));
    }
    Ok(figures)
}
