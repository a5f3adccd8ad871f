//! `cairn up --recovery SIZE`: how long it takes until a volume serves again after its nexus was killed, and how
//! fast a replica that was away is rebuilt, beside a plain copy of as much and beside hosts.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytesize::ByteSize;
use cairn_api::v1;
use cairn_engine::block::{BufSlice, IoOp, Memory as _};
use indicatif::ProgressBar;

use crate::check::{Scratch, UNIT, transfer};
use crate::client::{said, volumes};
use crate::nvme::{Host, HostConfig, Target};
use crate::output::{say, size};
use crate::pattern::{self, BLOCK, Stamp};
use crate::up::{Cluster, VOLUME};

/// A sparse volume whose nexus is killed, and how many of its extents are being written then.
const SPARSE: u64 = 64 << 30;
const OPEN_EXTENTS: u64 = 1024;
const EXTENT: u64 = 1 << 20;
/// What is written while a replica is away for a moment.
const BRIEF: u64 = 64 << 20;
/// The replica that goes away.
const VICTIM: usize = 1;
/// Nothing here takes longer.
const TIMEOUT: Duration = Duration::from_secs(1200);
/// How much a rebuild copies in a second beside hosts.
const LIMIT_MIB_S: u32 = 64;
/// How often hosts are measured with and without it, and for how long each.
const PAIRS: usize = 3;
const LOAD_S: u32 = 4;

pub(crate) async fn run(bytes: u64) -> Result<ExitCode> {
    crash().await?;
    rebuild(bytes).await?;
    Ok(ExitCode::SUCCESS)
}

async fn with_cluster<F>(bytes: u64, of: F) -> Result<()>
where
    F: AsyncFnOnce(&mut Cluster, &Path) -> Result<()>,
{
    let folder = Scratch::new()?;
    let mut cluster = Cluster::start(&folder.path, None, bytes, |_| ()).await?;
    if let Err(error) = of(&mut cluster, &folder.path).await {
        let kept = folder.keep();
        drop(cluster);
        return Err(error.context(format!("pools and logs are in {}", kept.display())));
    }
    cluster.stop().await
}

async fn front(cluster: &mut Cluster, bytes: u64) -> Result<Target> {
    let volume = cluster.volume(bytes).await?;
    let address = volume.addresses.first().context("the nexus exports nothing")?;
    Ok(Target { peer: address.parse().context("the nexus' address")?, nqn: volume.nqn })
}

async fn status(cluster: &mut Cluster) -> Result<v1::Volume> {
    let all = volumes(&mut cluster.client).await?;
    all.into_iter().find(|v| v.name == VOLUME).context("the volume is gone")
}

/// Waits until the volume is as wanted.
async fn until(
    cluster: &mut Cluster,
    what: &str,
    wanted: impl Fn(&v1::Volume) -> bool,
) -> Result<v1::Volume> {
    let start = Instant::now();
    loop {
        let volume = status(cluster).await?;
        if wanted(&volume) {
            return Ok(volume);
        }
        if start.elapsed() > TIMEOUT {
            bail!("the volume is not {what}: {} ({})", volume.state, volume.detail);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn in_sync(volume: &v1::Volume) -> usize {
    volume.children.iter().filter(|c| c.in_sync).count()
}

// ---- the nexus is killed

async fn crash() -> Result<()> {
    with_cluster(SPARSE, async |cluster, _| {
        let front = front(cluster, SPARSE).await?;
        let mut host = Host::connect(&front, &HostConfig::default())?;
        let seed = u64::from(std::process::id()) << 32 | 0x9ec;
        let buf = host.alloc(u32::try_from(BLOCK)?)?;
        let place = |i: u64| i * (SPARSE / OPEN_EXTENTS / EXTENT) * (EXTENT / BLOCK as u64);
        for i in 0..OPEN_EXTENTS {
            let stamp = Stamp { seed, lba: place(i), sequence: 1 };
            pattern::fill(host.memory().bytes_mut(buf.slice()), stamp);
            host.request(IoOp::Write { fua: false }, place(i), 1, buf.slice())?;
        }
        cluster.kill_nexus()?;
        let start = Instant::now();
        cluster.start_nexus().await?;
        let serving = until(cluster, "serving", |v| v.serving).await?;
        let served = start.elapsed();
        // On another port now. The last one first: what is waited for is made alike before the rest.
        let front = self::front(cluster, SPARSE).await?;
        let mut host = Host::connect(&front, &HostConfig::default())?;
        let buf = host.alloc(u32::try_from(BLOCK)?)?;
        let mut first = None;
        for i in (0..OPEN_EXTENTS).rev() {
            host.request(IoOp::Read, place(i), 1, buf.slice())?;
            first.get_or_insert(start.elapsed());
            let stamp = Stamp { seed, lba: place(i), sequence: 1 };
            pattern::check(host.memory().bytes(buf.slice()), stamp)?;
        }
        let done = until(cluster, "reconciled", |v| v.unreconciled_mib == 0).await?;
        say!(
            "nexus killed, {} sparse, {OPEN_EXTENTS} extents being written: serves after {:.2} s, first \
             read after {:.2} s, {} MiB compared after {:.2} s, of which {} blocks differed",
            size(SPARSE),
            served.as_secs_f64(),
            first.unwrap_or_default().as_secs_f64(),
            serving.reconcile_mib,
            start.elapsed().as_secs_f64(),
            done.mends.map_or(0, |m| m.healed_blocks),
        );
        ensure!(serving.reconcile_mib == OPEN_EXTENTS, "{} MiB", serving.reconcile_mib);
        Ok(())
    })
    .await
}

// ---- a replica goes away

/// Writes so much, from the start.
fn write(front: &Target, bytes: u64, seed: u64) -> Result<()> {
    let mut host = Host::connect(front, &HostConfig::default())?;
    transfer(&mut host, 0..bytes / u64::from(UNIT), seed, true, &ProgressBar::hidden())?;
    host.request(IoOp::Flush, 0, 0, BufSlice::EMPTY)
}

async fn set_rate(cluster: &mut Cluster, rate_mib_s: u32) -> Result<()> {
    let request = v1::RebuildRateRequest { name: VOLUME.to_owned(), rate_mib_s };
    cluster.client.set_rebuild_rate(request).await.map_err(|s| said(&s))?;
    Ok(())
}

/// Waits until the last rebuild is done, and tells of it.
async fn rebuilt(cluster: &mut Cluster, before: usize) -> Result<v1::RebuildRecord> {
    let done = |v: &v1::Volume| in_sync(v) == 3 && v.rebuilt.len() > before;
    let volume = until(cluster, "rebuilt", done).await?;
    let record = volume.rebuilt.last().cloned().context("a rebuild")?;
    ensure!(record.failed.is_empty(), "the rebuild was given up: {}", record.failed);
    Ok(record)
}

async fn rebuild(bytes: u64) -> Result<()> {
    with_cluster(bytes, async |cluster, data| {
        let front = front(cluster, bytes).await?;
        let out = |v: &v1::Volume| in_sync(v) == 2;
        let seed = u64::from(std::process::id()) << 32;
        write(&front, bytes, seed | 1)?;

        // All of it was written while it was away.
        cluster.kill(VICTIM)?;
        write(&front, bytes, seed | 2)?;
        until(cluster, "degraded", out).await?;
        cluster.start_replica(VICTIM).await?;
        let all = rebuilt(cluster, 0).await?;
        let rate = per_second(all.bytes, all.took_ms);
        let copy = copy(data, bytes)?;
        say!(
            "rebuild of {}: {:.1} s, {}/s; a copy with O_DIRECT on the same disk {}/s: {:.0} %",
            size(all.bytes),
            all.took_ms as f64 / 1000.0,
            size(rate),
            size(copy),
            100.0 * rate as f64 / copy as f64,
        );
        read_back(cluster, bytes, seed | 2)?;

        // A little of it was.
        cluster.kill(VICTIM)?;
        write(&front, BRIEF, seed | 3)?;
        until(cluster, "degraded", out).await?;
        tokio::time::sleep(Duration::from_secs(10)).await;
        cluster.start_replica(VICTIM).await?;
        let brief = rebuilt(cluster, 1).await?;
        say!(
            "absence of 10 s in which {} were written: {} copied, {:.2} s",
            size(BRIEF),
            size(brief.bytes),
            brief.took_ms as f64 / 1000.0
        );
        ensure!(brief.bytes <= BRIEF + 4 * EXTENT, "more than was written");
        read_back(cluster, BRIEF, seed | 3)?;

        // Hosts beside a rebuild that is held back.
        let mut ratios = Vec::new();
        for pair in 0..PAIRS {
            let alone = load(&front)?;
            cluster.kill(VICTIM)?;
            write(&front, bytes, seed | 4)?;
            until(cluster, "degraded", out).await?;
            set_rate(cluster, LIMIT_MIB_S).await?;
            cluster.start_replica(VICTIM).await?;
            let copying = |v: &v1::Volume| v.rebuild.as_ref().is_some_and(|r| r.stage == "copying");
            until(cluster, "copying", copying).await?;
            let beside = load(&front)?;
            ensure!(copying(&status(cluster).await?), "the rebuild was over too soon");
            set_rate(cluster, 0).await?;
            rebuilt(cluster, 2 + pair).await?;
            ratios.push((beside / alone, alone, beside));
        }
        ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ratio, alone, beside) = ratios[PAIRS / 2];
        say!(
            "hosts, 4k randrw QD32: {alone:.0} IOPS alone, {beside:.0} beside a rebuild at {LIMIT_MIB_S} \
             MiB/s: {:.0} % lost (median of {PAIRS})",
            100.0 * (1.0 - ratio)
        );
        Ok(())
    })
    .await
}

fn per_second(bytes: u64, ms: u64) -> u64 {
    bytes.saturating_mul(1000) / ms.max(1)
}

/// Bytes a second of a plain copy of as much of a pool's file.
fn copy(data: &Path, bytes: u64) -> Result<u64> {
    let (from, to) = (data.join("r1").join("pool.img"), data.join("copy"));
    let start = Instant::now();
    let dd = Command::new("dd")
        .arg(format!("if={}", from.display()))
        .arg(format!("of={}", to.display()))
        .args(["bs=1M", "iflag=direct", "oflag=direct", "conv=fsync", "status=none"])
        .arg(format!("count={}", bytes >> 20))
        .status()
        .context("cannot run dd")?;
    ensure!(dd.success(), "dd failed");
    let ms = u64::try_from(start.elapsed().as_millis())?;
    std::fs::remove_file(&to)?;
    Ok(per_second(bytes, ms))
}

/// Reads it all from the replica that was rebuilt.
fn read_back(cluster: &Cluster, bytes: u64, seed: u64) -> Result<()> {
    let replica = cluster.replicas.get(VICTIM).context("a replica")?;
    let target: Target = replica.uri.parse().map_err(anyhow::Error::msg)?;
    let mut host = Host::connect(&target, &HostConfig::default())?;
    host.join_epoch()?;
    transfer(&mut host, 0..bytes / u64::from(UNIT), seed, false, &ProgressBar::hidden())
}

/// Requests a second that a host gets.
fn load(front: &Target) -> Result<f64> {
    let told = Command::new(std::env::current_exe()?)
        .arg("bench")
        .arg(format!("nvme+tcp://{}/{}", front.peer, front.nqn))
        .args(["--rw", "randrw", "--bs", "4k", "--qd", "32", "--json"])
        .arg(format!("--time={LOAD_S}"))
        .output()
        .context("cannot run the load")?;
    ensure!(told.status.success(), "the load failed: {}", String::from_utf8_lossy(&told.stderr));
    let told: serde_json::Value = serde_json::from_slice(&told.stdout)?;
    let side = |name: &str| told[name]["iops"].as_f64().unwrap_or_default();
    let iops = side("read") + side("write");
    ensure!(iops > 0.0, "the load did nothing: {told}");
    Ok(iops)
}

/// As text, for the options of `cairn up`.
pub(crate) fn size_of(size: ByteSize) -> Result<u64> {
    let bytes = size.as_u64();
    ensure!(bytes >= 256 << 20 && bytes.is_multiple_of(EXTENT), "whole MiB, 256 at least");
    Ok(bytes)
}
