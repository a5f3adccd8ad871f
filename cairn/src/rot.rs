//! `cairn up --rot N`: bits are flipped in the pools of a running cluster. Every read is right and a scrub
//! heals everything, as long as one copy is good; where none is, the host is told, and gets no wrong data.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cairn_api::v1;
use cairn_engine::block::{IoOp, Memory as _};
use indicatif::ProgressBar;

use crate::check::{Scratch, UNIT, transfer};
use crate::client::said;
use crate::nvme::{Host, HostConfig, Target};
use crate::output::say;
use crate::pattern::{self, BLOCK, Stamp};
use crate::up::{Cluster, REPLICAS, VOLUME};

/// How much is written.
const DATA: u64 = 64 << 20;
const VOLUME_SIZE: u64 = 96 << 20;
/// The replica whose pool rots.
const VICTIM: usize = 1;
/// A scrub of so little ends within this time.
const SCRUB_TIMEOUT: Duration = Duration::from_secs(120);
/// Blocks that are damaged on every replica, at most.
const MOST_LOST: usize = 100;

pub(crate) async fn run(flips: usize) -> Result<ExitCode> {
    let started = Instant::now();
    let folder = Scratch::new()?;
    say!("flipping bits in {}", folder.path.display());
    let mut cluster =
        Cluster::start(&folder.path, None, VOLUME_SIZE, |text| say!("  {text}")).await?;
    if let Err(error) = check(&mut cluster, &folder.path, flips).await {
        let kept = folder.keep();
        drop(cluster);
        return Err(
            error.context(format!("the check failed; pools and logs are in {}", kept.display()))
        );
    }
    cluster.stop().await?;
    drop(folder);
    say!("no read was wrong, and all was healed; {:.1} s", started.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

/// The pools' files, and where each block of the volume lies in each.
struct Pools {
    files: Vec<File>,
    places: Vec<BTreeMap<u64, u64>>,
    rng: u64,
}

impl Pools {
    /// Finds the blocks by what they hold.
    fn open(data: &Path, seed: u64) -> Result<Self> {
        let mut pools = Self { files: Vec::new(), places: Vec::new(), rng: seed };
        for replica in 1..=REPLICAS {
            let path = data.join(format!("r{replica}")).join("pool.img");
            let file = File::options().read(true).write(true).open(&path);
            let file = file.with_context(|| format!("cannot open {}", path.display()))?;
            let mut places = BTreeMap::new();
            let mut bytes = vec![0; 1 << 20];
            for at in (0..file.metadata()?.len()).step_by(1 << 20) {
                let n = file.read_at(&mut bytes, at)?;
                for (i, block) in (0u64..).zip(bytes[..n].chunks_exact(BLOCK)) {
                    if let Some(lba) = pattern::lba_of(block, seed) {
                        places.insert(lba, at + i * BLOCK as u64);
                    }
                }
            }
            let blocks = DATA / BLOCK as u64;
            ensure!(
                places.len() as u64 == blocks,
                "{} holds {} of {blocks} blocks",
                path.display(),
                places.len()
            );
            pools.files.push(file);
            pools.places.push(places);
        }
        Ok(pools)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.rng = self.rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.rng >> 33) % n
    }

    fn any_block(&mut self) -> u64 {
        self.below(DATA / BLOCK as u64)
    }

    /// Flips one bit of a block of a replica.
    fn flip(&mut self, replica: usize, lba: u64) -> Result<()> {
        let place = *self.places[replica].get(&lba).context("every block has its place")?;
        let at = place + self.below(BLOCK as u64);
        let bit = self.below(8);
        let mut byte = [0];
        self.files[replica].read_exact_at(&mut byte, at)?;
        byte[0] ^= 1 << bit;
        self.files[replica].write_all_at(&byte, at)?;
        // The daemon reads past the page cache.
        self.files[replica].sync_data()?;
        Ok(())
    }
}

async fn check(cluster: &mut Cluster, data: &Path, flips: usize) -> Result<()> {
    let volume = cluster.volume(VOLUME_SIZE).await?;
    let address = volume.addresses.first().context("the nexus exports nothing")?;
    let front =
        Target { peer: address.parse().context("the nexus' address")?, nqn: volume.nqn.clone() };
    let seed = u64::from(std::process::id()) << 32 | 0x707;
    let units = DATA / u64::from(UNIT);
    let mut host = Host::connect(&front, &HostConfig::default())?;
    transfer(&mut host, 0..units, seed, true, &ProgressBar::hidden())?;
    host.request(IoOp::Flush, 0, 0, cairn_engine::block::BufSlice::EMPTY)?;
    // A host that does nothing sends no keep alive: each has its time.
    drop(host);
    let mut pools = Pools::open(data, seed)?;

    under_load(&mut pools, &front, seed, flips)?;
    let first = scrub(cluster).await?;
    ensure!(first.unrecoverable_blocks == 0, "blocks were lost: {first:?}");
    ensure!(first.bad_blocks == first.healed_blocks, "not all was healed: {first:?}");
    say!("  {flips} flips under load: no read was wrong; the scrub healed {}", first.bad_blocks);

    let mut rotten = BTreeSet::new();
    while rotten.len() < flips {
        rotten.insert(pools.any_block());
    }
    for &lba in &rotten {
        pools.flip(VICTIM, lba)?;
    }
    let second = scrub(cluster).await?;
    let found = (second.bad_blocks, second.healed_blocks, second.unrecoverable_blocks);
    ensure!(found == (flips as u64, flips as u64, 0), "{flips} blocks rotted: {second:?}");
    ensure!(
        second.findings.iter().all(|f| rotten.contains(&f.lba) && f.outcome == "healed"),
        "the findings name other blocks: {second:?}"
    );
    say!("  {flips} blocks rotted at rest: the scrub found and healed each");
    let mut host = Host::connect(&front, &HostConfig::default())?;
    transfer(&mut host, 0..units, seed, false, &ProgressBar::hidden())?;
    drop(host);

    let lost: BTreeSet<u64> = rotten.iter().copied().take(MOST_LOST).collect();
    for &lba in &lost {
        for replica in 0..REPLICAS {
            pools.flip(replica, lba)?;
        }
    }
    lost_everywhere(cluster, &front, seed, &lost).await
}

/// Flips bits of one replica while hosts read, and write the same again.
fn under_load(pools: &mut Pools, front: &Target, seed: u64, flips: usize) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let moved = Arc::new(AtomicU64::new(0));
    let load = {
        let (front, stop, moved) = (front.clone(), Arc::clone(&stop), Arc::clone(&moved));
        std::thread::spawn(move || -> Result<()> {
            let mut host = Host::connect(&front, &HostConfig::default())?;
            let parts = DATA / u64::from(UNIT) / 16;
            let mut turn = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let part = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) % parts;
                let write = turn % 5 == 4;
                let units = part * 16..part * 16 + 16;
                transfer(&mut host, units, seed, write, &ProgressBar::hidden())?;
                moved.fetch_add(16, Ordering::Relaxed);
                turn += 1;
            }
            Ok(())
        })
    };
    let flipped = (0..flips).try_for_each(|_| {
        let lba = pools.any_block();
        pools.flip(VICTIM, lba)
    });
    // Each block is read once at least.
    let until = Instant::now() + Duration::from_secs(60);
    let least = moved.load(Ordering::Relaxed) + DATA / u64::from(UNIT);
    while moved.load(Ordering::Relaxed) < least && !load.is_finished() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    stop.store(true, Ordering::Relaxed);
    match load.join() {
        Ok(result) => result.context("a host under load")?,
        Err(_) => bail!("the host's thread panicked"),
    }
    flipped
}

/// Blocks that are damaged in every copy are errors, their neighbours are not, and a write makes them
/// good again.
async fn lost_everywhere(
    cluster: &mut Cluster,
    front: &Target,
    seed: u64,
    lost: &BTreeSet<u64>,
) -> Result<()> {
    let mut host = Host::connect(front, &HostConfig::default())?;
    let buf = host.alloc(4096)?;
    let window = buf.slice();
    for &lba in lost {
        ensure!(
            host.request(IoOp::Read, lba, 1, window).is_err(),
            "block {lba} is damaged everywhere, and was read"
        );
        for near in [lba.saturating_sub(1), lba + 1] {
            if near < DATA / BLOCK as u64 && !lost.contains(&near) {
                host.request(IoOp::Read, near, 1, window)?;
                let stamp = Stamp { seed, lba: near, sequence: 1 };
                pattern::check(host.memory().bytes(window), stamp)?;
            }
        }
    }
    drop(host);
    let report = scrub(cluster).await?;
    let found = (report.unrecoverable_blocks, report.healed_blocks);
    ensure!(found == (lost.len() as u64, 0), "{} blocks are lost: {report:?}", lost.len());
    let mut host = Host::connect(front, &HostConfig::default())?;
    let buf = host.alloc(4096)?;
    let window = buf.slice();
    for &lba in lost {
        let stamp = Stamp { seed, lba, sequence: 1 };
        pattern::fill(host.memory().bytes_mut(window), stamp);
        host.request(IoOp::Write { fua: false }, lba, 1, window)?;
    }
    host.memory().release(buf);
    drop(host);
    let report = scrub(cluster).await?;
    ensure!(report.bad_blocks == 0, "blocks that were written anew are bad: {report:?}");
    let units = DATA / u64::from(UNIT);
    let mut host = Host::connect(front, &HostConfig::default())?;
    transfer(&mut host, 0..units, seed, false, &ProgressBar::hidden())?;
    say!("  {} blocks rotted on every replica: errors, and no wrong data", lost.len());
    Ok(())
}

/// Scrubs the volume, and tells what came of it. Nobody may be taken out by that.
async fn scrub(cluster: &mut Cluster) -> Result<v1::Scrub> {
    use v1::scrub_volume_request::Action;
    let request = |action: Action| v1::ScrubVolumeRequest {
        name: VOLUME.to_owned(),
        action: action.into(),
        rate_mib_s: 1024,
    };
    cluster.client.scrub_volume(request(Action::Start)).await.map_err(|s| said(&s))?;
    let until = Instant::now() + SCRUB_TIMEOUT;
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let told = cluster.client.scrub_volume(request(Action::Unspecified)).await;
        let volume = told.map_err(|s| said(&s))?.into_inner();
        ensure!(volume.state == "online", "the volume is {}: {}", volume.state, volume.detail);
        let scrub = volume.scrub.context("the process knows nothing of scrubs")?;
        if scrub.state == "finished" {
            return Ok(scrub);
        }
        ensure!(Instant::now() < until, "the scrub does not end: {scrub:?}");
    }
}
