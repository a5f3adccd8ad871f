//! A volume that two processes share, in the cluster of `cairn up --check`: handed over and taken over while a
//! host with a path to each writes, by hand and by itself; the host sees pauses and no error.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cairn_api::v1::{self, cairn_client::CairnClient};
use indicatif::ProgressBar;
use parking_lot::Mutex;
use tonic::transport::Channel;

use super::{keep, transfer};
use crate::client::{connect, said, share, volumes};
use crate::nvme::{Host, HostConfig, Target};
use crate::output::say;
use crate::up::{Cluster, REPLICAS};

const NAME: &str = "shared";
/// Units that are written, over and over.
const UNITS: u64 = 16;
/// The process that stands by.
const OTHER: &str = "r1";
/// A host tries for so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is waited for happens within this time.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Where the paths lead: a process that is started again has another port.
type Targets = Arc<Mutex<[Target; 2]>>;

/// A host with two paths to one volume.
struct Paths {
    targets: Targets,
    at: usize,
    host: Option<Host>,
}

impl Paths {
    /// Writes or reads a unit, by whichever path goes. Returns how long that took.
    fn transfer(&mut self, unit: u64, seed: u64, write: bool) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let host = match self.host.take() {
                Some(host) => Ok(host),
                None => {
                    let target = self.targets.lock()[self.at].clone();
                    Host::connect(&target, &HostConfig::default())
                }
            };
            let done = host.and_then(|mut host| {
                transfer(&mut host, unit..unit + 1, seed, write, &ProgressBar::hidden())?;
                Ok(host)
            });
            match done {
                Ok(host) => {
                    self.host = Some(host);
                    return Ok(start.elapsed());
                }
                Err(error) if start.elapsed() > PATIENCE => {
                    return Err(error.context("neither path goes"));
                }
                Err(_) => {
                    self.at = 1 - self.at;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }
}

/// The longest that one request took since it was looked at last, in milliseconds.
struct Worst(AtomicU64);

impl Worst {
    fn take(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

/// Writes all units again and again, each time something else, and reads them back.
fn work(targets: Targets, stop: &AtomicBool, worst: &Worst) -> Result<u64> {
    let mut paths = Paths { targets, at: 0, host: None };
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        rounds += 1;
        for write in [true, false] {
            for unit in 0..UNITS {
                let took = paths.transfer(unit, rounds, write)?;
                let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
                worst.0.fetch_max(ms, Ordering::Relaxed);
            }
        }
    }
    Ok(rounds)
}

async fn until_state(client: &mut CairnClient<Channel>, state: &str) -> Result<v1::Volume> {
    let start = Instant::now();
    loop {
        let all = volumes(client).await?;
        let volume = all.into_iter().find(|v| v.name == NAME).context("the volume is gone")?;
        if volume.state == state {
            return Ok(volume);
        }
        if start.elapsed() > TIMEOUT {
            bail!("volume `{NAME}` is {}, not {state}: {}", volume.state, volume.detail);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn hand_over(from: &mut CairnClient<Channel>, to: &mut CairnClient<Channel>) -> Result<()> {
    let request = v1::HandOverVolumeRequest { name: NAME.to_owned() };
    from.hand_over_volume(request).await.map_err(|s| said(&s)).context("handing over")?;
    take_over(to).await
}

async fn take_over(to: &mut CairnClient<Channel>) -> Result<()> {
    let request = v1::TakeOverVolumeRequest { name: NAME.to_owned() };
    to.take_over_volume(request).await.map_err(|s| said(&s)).context("taking over")?;
    Ok(())
}

pub(super) async fn run(cluster: &mut Cluster) -> Result<()> {
    keep::make(cluster, NAME, None).await?;
    let mut other = connect(&cluster.socket(OTHER)).await?;
    let mut request = v1::StandByVolumeRequest { name: NAME.to_owned(), ..Default::default() };
    // By itself, but not while this check tries it by hand.
    let sharing = share::SharingArgs {
        auto: true,
        auto_after_ms: 3_000,
        elsewhere: Vec::new(),
        iscsi_elsewhere: Vec::new(),
    };
    share::learn(&mut other, &mut cluster.client, &mut request, sharing).await?;
    other.stand_by_volume(request).await.map_err(|s| said(&s))?;
    let target = |volume: v1::Volume| -> Result<Target> {
        let address = volume.addresses.first().context("it exports nothing")?;
        Ok(Target { peer: address.parse()?, nqn: volume.nqn })
    };
    let here = until_state(&mut cluster.client, "online").await?;
    let there = until_state(&mut other, "standby").await?;
    let targets = Arc::new(Mutex::new([target(here)?, target(there)?]));
    let known = Arc::clone(&targets);

    let (stop, worst) = (Arc::new(AtomicBool::new(false)), Arc::new(Worst(AtomicU64::new(0))));
    let (stopped, seen) = (Arc::clone(&stop), Arc::clone(&worst));
    let worker = tokio::task::spawn_blocking(move || work(known, &stopped, &seen));
    let settle = || tokio::time::sleep(Duration::from_millis(300));

    settle().await;
    worst.take();
    hand_over(&mut cluster.client, &mut other).await?;
    settle().await;
    hand_over(&mut other, &mut cluster.client).await?;
    settle().await;
    let planned = worst.take();

    cluster.kill_nexus()?;
    take_over(&mut other).await?;
    settle().await;
    let by_hand = worst.take();

    // It does not take back what it lost.
    cluster.start_nexus().await?;
    targets.lock()[0] = target(until_state(&mut cluster.client, "standby").await?)?;
    hand_over(&mut other, &mut cluster.client).await?;
    until_state(&mut other, "standby").await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    worst.take();
    cluster.kill_nexus()?;
    until_state(&mut other, "online").await?;
    settle().await;
    let by_itself = worst.take();

    stop.store(true, Ordering::Relaxed);
    let rounds = worker.await?.context("a host with two paths")?;
    ensure!(rounds > 1, "the host did nothing");
    cluster.start_nexus().await?;
    say!(
        "  handed over, taken over by hand and by itself: no error at the host, pauses of {planned}, {by_hand} \
         and {by_itself} ms at most"
    );
    for client in [&mut cluster.client, &mut other] {
        let request = v1::DeleteVolumeRequest { name: NAME.to_owned() };
        client.delete_volume(request).await.map_err(|s| said(&s))?;
    }
    for i in 1..=REPLICAS {
        let mut client = connect(&cluster.socket(&format!("r{i}"))).await?;
        let reply = client.list_replicas(v1::ListReplicasRequest {}).await.map_err(|s| said(&s))?;
        for replica in reply.into_inner().replicas.into_iter().filter(|r| r.name == NAME) {
            let request = v1::DeleteReplicaRequest { id: replica.id };
            client.delete_replica(request).await.map_err(|s| said(&s))?;
        }
    }
    Ok(())
}
