//! `cairn up --check`: the demo cluster, checked byte by byte with a replica killed half-way.

mod keep;
mod members;
mod sectors;
mod shards;
mod share;
mod snapshots;
mod standby;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cairn_engine::block::{IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};
use indicatif::{ProgressBar, ProgressStyle};

use crate::client::volumes;
use crate::nvme::{Host, HostConfig, Target};
use crate::output::say;
use crate::pattern::{self, BLOCK, Stamp};
use crate::up::{Cluster, REPLICAS, VOLUME};

/// How much is written and read.
const DATA: u64 = 256 << 20;
/// The volume is a little larger.
const VOLUME_SIZE: u64 = 320 << 20;
/// Bytes in a request.
pub(crate) const UNIT: u32 = 128 << 10;
/// Requests in flight.
const DEPTH: usize = 8;
/// The replica that is killed.
const VICTIM: usize = 1;
/// The nexus must have taken the killed replica out within this time.
const DEGRADED_TIMEOUT: Duration = Duration::from_secs(15);

pub(crate) async fn run() -> Result<ExitCode> {
    let started = Instant::now();
    let folder = Scratch::new()?;
    say!("checking in {}", folder.path.display());
    let settings = members::settings(&folder.path)?;
    let tell = |text: &str| say!("  {text}");
    let mut cluster = Cluster::start_with(&folder.path, None, VOLUME_SIZE, settings, tell).await?;
    let checked = check(&mut cluster, &folder.path).await;
    if let Err(error) = checked {
        let kept = folder.keep();
        drop(cluster);
        return Err(
            error.context(format!("the check failed; pools and logs are in {}", kept.display()))
        );
    }
    cluster.stop().await?;
    drop(folder);
    say!("every byte is right; {:.1} s", started.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

async fn check(cluster: &mut Cluster, folder: &Path) -> Result<()> {
    let volume = cluster.volume(VOLUME_SIZE).await?;
    say!("  volume `{VOLUME}` is {}", volume.state);
    shards::run(cluster, folder).await?;
    keep::run(cluster, folder).await?;
    snapshots::run(cluster, folder).await?;
    sectors::run(cluster, folder).await?;
    share::run(cluster).await?;
    standby::run(cluster, folder).await?;
    let volume = cluster.volume(VOLUME_SIZE).await?;
    let address = volume.addresses.first().context("the nexus exports nothing")?;
    let front =
        Target { peer: address.parse().context("the nexus' address")?, nqn: volume.nqn.clone() };
    let seed = u64::from(std::process::id()) << 32 | 0xc41;
    let units = DATA / u64::from(UNIT);

    let mut host = Host::connect(&front, &HostConfig::default())?;
    let bar = progress("writing through the nexus");
    transfer(&mut host, 0..units / 2, seed, true, &bar)?;
    cluster.kill(VICTIM)?;
    bar.suspend(|| say!("  killed replica process r{} with SIGKILL", VICTIM + 1));
    transfer(&mut host, units / 2..units, seed, true, &bar)?;
    host.request(IoOp::Flush, 0, 0, cairn_engine::block::BufSlice::EMPTY)?;
    bar.finish();

    let until = Instant::now() + DEGRADED_TIMEOUT;
    let after = loop {
        let all = volumes(&mut cluster.client).await?;
        let now = all.into_iter().find(|v| v.name == VOLUME).context("the volume is gone")?;
        if now.state == "degraded" {
            break now;
        }
        if Instant::now() > until {
            bail!("a replica was killed, yet the volume is {}: {}", now.state, now.detail);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let in_sync = after.children.iter().filter(|c| c.in_sync).count();
    if in_sync != REPLICAS - 1 {
        bail!("{in_sync} replicas are in sync after one of {REPLICAS} was killed");
    }
    say!("  the volume is degraded, {in_sync} replicas in sync, no request failed");

    let bar = progress("reading back from the nexus");
    transfer(&mut host, 0..units, seed, false, &bar)?;
    bar.finish();
    drop(host);
    for (at, replica) in cluster.replicas.iter().enumerate() {
        if at == VICTIM {
            continue;
        }
        let bar = progress(&format!("reading back from replica r{}", at + 1));
        read_replica(&replica.uri, 0..units, seed, &bar)?;
        bar.finish();
    }
    members::run(cluster, folder, VICTIM, async |cluster| {
        let rebuilt = cluster.replicas.get(VICTIM).context("a replica")?.uri.clone();
        let bar = progress(&format!("reading back from replica r{}", VICTIM + 1));
        read_replica(&rebuilt, 0..units, seed, &bar)?;
        bar.finish();
        Ok(())
    })
    .await
}

/// Reads units of the pattern from one replica, beside its nexus.
fn read_replica(
    uri: &str,
    units: std::ops::Range<u64>,
    seed: u64,
    bar: &ProgressBar,
) -> Result<()> {
    let target: Target = uri.parse().map_err(anyhow::Error::msg)?;
    let mut host = Host::connect(&target, &HostConfig::default())?;
    host.join_epoch()?;
    transfer(&mut host, units, seed, false, bar)
}

fn progress(what: &str) -> ProgressBar {
    let bar = ProgressBar::new(DATA);
    let style = ProgressStyle::with_template(
        "  {prefix:32} [{bar:30}] {bytes:>11} of {total_bytes} {bytes_per_sec}",
    );
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_prefix(what.to_owned());
    if bar.is_hidden() {
        say!("  {what}");
    }
    bar
}

/// Writes or reads units of the pattern, several in flight, and checks what is read.
pub(crate) fn transfer(
    host: &mut Host,
    units: std::ops::Range<u64>,
    seed: u64,
    write: bool,
    bar: &ProgressBar,
) -> Result<()> {
    let blocks = u64::from(UNIT) / BLOCK as u64;
    let mut free = Vec::new();
    for _ in 0..DEPTH {
        free.push(host.alloc(UNIT)?);
    }
    let mut flights: Vec<Option<(u64, cairn_engine::block::Buf)>> =
        (0..DEPTH).map(|_| None).collect();
    let mut next = units.start;
    let mut left = units.end - units.start;
    let mut done = Vec::new();
    while left > 0 {
        while next < units.end
            && let Some(slot) = flights.iter().position(Option::is_none)
            && let Some(buf) = free.pop()
        {
            if write {
                let bytes = host.memory().bytes_mut(buf.slice());
                for (lba, block) in (next * blocks..).zip(bytes.chunks_mut(BLOCK)) {
                    pattern::fill(block, Stamp { seed, lba, sequence: 1 });
                }
            } else {
                host.memory().bytes_mut(buf.slice()).fill(0xee);
            }
            let op = if write { IoOp::Write { fua: false } } else { IoOp::Read };
            let range = LbaRange::new(Lba(next * blocks), blocks)?;
            host.submit(u32::try_from(slot)?, IoRequest { op, range, buf: buf.slice() })?;
            flights[slot] = Some((next, buf));
            next += 1;
        }
        done.clear();
        let deadline = host.now_ns() + 60_000_000_000;
        host.poll(&mut done, Some(deadline))?;
        if done.is_empty() && host.now_ns() > deadline {
            bail!("a request was not answered in 60 s");
        }
        for answer in &done {
            let flight = flights.get_mut(answer.tag as usize).and_then(Option::take);
            let (unit, buf) = flight.context("an answer to a request that was not made")?;
            if answer.io_status != IoStatus::Ok {
                bail!("a request at block {} failed: {}", unit * blocks, answer.status);
            }
            if !write {
                let bytes = host.memory().bytes(buf.slice());
                for (lba, block) in (unit * blocks..).zip(bytes.chunks(BLOCK)) {
                    pattern::check(block, Stamp { seed, lba, sequence: 1 })?;
                }
            }
            free.push(buf);
            left -= 1;
            bar.inc(u64::from(UNIT));
        }
    }
    for buf in free {
        host.memory().release(buf);
    }
    Ok(())
}

/// A folder of its own that is removed with what is in it, unless it is kept.
pub(crate) struct Scratch {
    pub(crate) path: PathBuf,
    keep: bool,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        // Direct I/O is not to be had on every filesystem; the first that has it is taken.
        let name = format!("cairn-check-{}", std::process::id());
        let candidates =
            [std::env::temp_dir(), PathBuf::from("/var/tmp"), std::env::current_dir()?];
        for parent in candidates {
            let path = parent.join(&name);
            if std::fs::create_dir_all(&path).is_err() {
                continue;
            }
            let scratch = Self { path, keep: false };
            let probe = scratch.path.join("probe");
            use cairn_engine::reactor::{BlockFile, IoMode};
            let direct = BlockFile::create(&probe, 4096)
                .and_then(|()| BlockFile::open(&probe, IoMode::Direct));
            if direct.is_ok() {
                std::fs::remove_file(&probe)?;
                return Ok(scratch);
            }
        }
        bail!("neither the temporary folder nor this one takes O_DIRECT; run it from one that does")
    }

    pub(crate) fn keep(mut self) -> PathBuf {
        self.keep = true;
        self.path.clone()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be removed is left for the system's own cleaning of temporary files.
            let _removed = std::fs::remove_dir_all(&self.path);
        }
    }
}
