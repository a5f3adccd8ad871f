//! Encrypted volumes and ones that grow, in the cluster of `cairn up --check`: what is in the pool files,
//! what survives a restart of the nexus, and which keys are refused.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cairn_api::v1;
use cairn_engine::block::{BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};
use indicatif::ProgressBar;

use super::{UNIT, transfer};
use crate::client::{connect, said, volumes};
use crate::nvme::{Host, HostConfig, Target};
use crate::output::say;
use crate::pattern::{self, BLOCK, Stamp};
use crate::up::{Cluster, REPLICAS};

/// Size of each of the two volumes.
const SIZE: u64 = 16 << 20;
/// What the encrypted one grows to.
const GROWN: u64 = 24 << 20;
/// How much is written.
const DATA: u64 = 4 << 20;
/// What a pool's file grows by.
const MORE: u64 = 64 << 20;
const SECRET: &str = "secret";
const PLAIN: &str = "plain";
/// The nexus serves again within this time, or says why not.
const RESTART_TIMEOUT: Duration = Duration::from_secs(20);

/// Blocks of a pattern that pool files hold: of which run, and how many.
fn count_blocks(pool: &Path, seed: u64) -> Result<u64> {
    let mut expected = [0; BLOCK];
    pattern::fill(&mut expected, Stamp { seed, lba: 0, sequence: 1 });
    let bytes = std::fs::read(pool).with_context(|| format!("reading {}", pool.display()))?;
    // The first words of a block: a fixed one and the run's.
    let found = bytes.chunks(BLOCK).filter(|block| block.starts_with(&expected[..16])).count();
    Ok(found as u64)
}

pub(super) fn write_key(path: &Path, key: &[u8]) -> Result<()> {
    let mut file =
        std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(key)?;
    Ok(())
}

pub(super) fn key_file(path: &Path) -> v1::KeySource {
    v1::KeySource { file: path.display().to_string(), ..v1::KeySource::default() }
}

pub(super) async fn make(
    cluster: &mut Cluster,
    name: &str,
    key: Option<v1::KeySource>,
) -> Result<()> {
    make_of(cluster, name, key, 4096).await
}

/// A volume in blocks of this size, with a replica in each pool.
pub(super) async fn make_of(
    cluster: &mut Cluster,
    name: &str,
    key: Option<v1::KeySource>,
    block_size: u32,
) -> Result<()> {
    let volume_id = uuid::Uuid::new_v4().to_string();
    let mut replicas = Vec::new();
    for i in 1..=REPLICAS {
        let mut client = connect(&cluster.socket(&format!("r{i}"))).await?;
        let request = v1::CreateReplicaRequest {
            pool: "pool".to_owned(),
            volume_id: volume_id.clone(),
            name: name.to_owned(),
            size_bytes: SIZE,
            id: String::new(),
            thick: false,
        };
        let made = client.create_replica(request).await.map_err(|s| said(&s))?;
        replicas.push(made.into_inner().uri);
    }
    let request = v1::CreateVolumeRequest {
        name: name.to_owned(),
        size_bytes: SIZE,
        replicas,
        id: volume_id,
        encryption: key,
        block_size,
        ..v1::CreateVolumeRequest::default()
    };
    cluster.client.create_volume(request).await.map_err(|s| said(&s))?;
    Ok(())
}

/// The volume once it is served or refused.
async fn settled(cluster: &mut Cluster, name: &str) -> Result<v1::Volume> {
    let until = Instant::now() + RESTART_TIMEOUT;
    loop {
        let all = volumes(&mut cluster.client).await?;
        let volume = all.into_iter().find(|v| v.name == name);
        match volume {
            Some(volume) if volume.serving || volume.state == "refused" => return Ok(volume),
            volume if Instant::now() > until => {
                bail!("volume `{name}` does not settle: {volume:?}")
            }
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

pub(super) async fn host(cluster: &mut Cluster, name: &str) -> Result<Host> {
    let volume = settled(cluster, name).await?;
    ensure!(volume.serving, "volume `{name}` is {}: {}", volume.state, volume.detail);
    let address = volume.addresses.first().context("the nexus exports nothing")?;
    let target = Target { peer: address.parse().context("the nexus' address")?, nqn: volume.nqn };
    Host::connect(&target, &HostConfig::default())
}

fn read_zeros(host: &mut Host, lba: u64) -> Result<()> {
    let buf = host.alloc(UNIT)?;
    host.memory().bytes_mut(buf.slice()).fill(0xee);
    host.request(IoOp::Read, lba, u64::from(UNIT) / BLOCK as u64, buf.slice())?;
    let zeros = host.memory().bytes(buf.slice()).iter().all(|&b| b == 0);
    host.memory().release(buf);
    ensure!(
        zeros,
        "what was never written, or was discarded, at block {lba} does not read as zeros"
    );
    Ok(())
}

/// Writes the last unit of the volume, as large as it is to be. Whether it was taken.
fn write_end(host: &mut Host, size: u64, seed: u64) -> Result<bool> {
    let blocks = u64::from(UNIT) / BLOCK as u64;
    let first = size / BLOCK as u64 - blocks;
    let buf = host.alloc(UNIT)?;
    let bytes = host.memory().bytes_mut(buf.slice());
    for (lba, block) in (first..).zip(bytes.chunks_mut(BLOCK)) {
        pattern::fill(block, Stamp { seed, lba, sequence: 1 });
    }
    let range = LbaRange::new(Lba(first), blocks)?;
    let op = IoOp::Write { fua: true };
    host.submit(0, IoRequest { op, range, buf: buf.slice() })?;
    let mut done = Vec::new();
    let until = host.now_ns() + 60_000_000_000;
    while done.is_empty() && host.now_ns() < until {
        host.poll(&mut done, Some(until))?;
    }
    host.memory().release(buf);
    let status = done.first().context("a write was not answered in 60 s")?.io_status;
    Ok(status == IoStatus::Ok)
}

/// Makes a pool's file longer under its running process.
async fn grow_pool(cluster: &Cluster, folder: &Path) -> Result<()> {
    let mut client = connect(&cluster.socket("r1")).await?;
    let listed = client.list_pools(v1::ListPoolsRequest {}).await.map_err(|s| said(&s))?;
    let before = listed.into_inner().pools.first().context("r1 has no pool")?.capacity_bytes;
    let len = std::fs::metadata(folder.join("r1").join("pool.img"))?.len();
    let grow = |size_bytes| v1::GrowPoolRequest { name: "pool".to_owned(), size_bytes };
    let nothing = client.grow_pool(grow(0)).await;
    ensure!(nothing.is_err(), "a pool grew though its file had not");
    let grown = client.grow_pool(grow(len + MORE)).await.map_err(|s| said(&s))?;
    let after = grown.into_inner().capacity_bytes;
    ensure!(after > before + MORE / 2, "the pool had {before} bytes of room and has {after}");
    Ok(())
}

pub(super) async fn run(cluster: &mut Cluster, folder: &Path) -> Result<()> {
    let [first, second]: [PathBuf; 2] = ["first.key", "second.key"].map(|name| folder.join(name));
    let key = |n: u8| [n; 32];
    write_key(&first, &key(1))?;
    write_key(&second, "2".repeat(64).as_bytes())?;
    make(cluster, SECRET, Some(key_file(&first))).await?;
    make(cluster, PLAIN, None).await?;
    let seed = u64::from(std::process::id()) << 32 | 0x5ec;
    let units = DATA / u64::from(UNIT);
    let blocks = DATA / BLOCK as u64;
    let bar = ProgressBar::hidden();
    let mut secret = host(cluster, SECRET).await?;
    let mut plain = host(cluster, PLAIN).await?;
    for (host, seed) in [(&mut secret, seed), (&mut plain, seed + 1)] {
        transfer(host, 0..units, seed, true, &bar)?;
        // Discarded, and never written.
        let gone = LbaRange::new(Lba(blocks), u64::from(UNIT) / BLOCK as u64)?;
        transfer(host, units..units + 1, seed, true, &bar)?;
        let zeroes = IoOp::WriteZeroes { fua: false, unmap: true };
        host.request(zeroes, gone.start().0, gone.blocks(), BufSlice::EMPTY)?;
        host.request(IoOp::Flush, 0, 0, BufSlice::EMPTY)?;
        read_zeros(host, gone.start().0)?;
        read_zeros(host, 2 * blocks)?;
        transfer(host, 0..units, seed, false, &bar)?;
    }
    for i in 1..=REPLICAS {
        let pool = folder.join(format!("r{i}")).join("pool.img");
        let found = (count_blocks(&pool, seed)?, count_blocks(&pool, seed + 1)?);
        ensure!(
            found.0 == 0 && found.1 >= blocks,
            "{} holds {} blocks of the encrypted volume and {} of {blocks} of the other as they were \
             written",
            pool.display(),
            found.0,
            found.1
        );
    }
    say!(
        "  an encrypted volume's blocks are in no pool as they were written, another's are in each"
    );

    let resize =
        |name: &str, size_bytes| v1::ResizeVolumeRequest { name: name.to_owned(), size_bytes };
    ensure!(!write_end(&mut secret, GROWN, seed)?, "a write past the end was taken");
    let grown = cluster.client.resize_volume(resize(SECRET, GROWN)).await.map_err(|s| said(&s))?;
    ensure!(grown.into_inner().size_bytes == GROWN, "the volume did not grow");
    ensure!(write_end(&mut secret, GROWN, seed)?, "a write to what the volume grew by was refused");
    read_zeros(&mut secret, SIZE / BLOCK as u64)?;
    let shrink = cluster.client.resize_volume(resize(SECRET, SIZE)).await;
    let why = shrink.err().context("the volume shrank")?;
    ensure!(why.message().contains("cannot shrink"), "{}", why.message());
    say!("  it grew from 16 to 24 MiB under a connected host, on every replica");
    drop((secret, plain));
    grow_pool(cluster, folder).await?;

    let request =
        v1::RotateVolumeKeyRequest { name: SECRET.to_owned(), key: Some(key_file(&second)) };
    let rotated =
        cluster.client.rotate_volume_key(request).await.map_err(|s| said(&s))?.into_inner();
    let new_id = rotated.encryption.context("the volume is not encrypted any more")?.key_id;
    std::fs::remove_file(&first)?;
    cluster.restart_nexus().await?;
    let mut secret = host(cluster, SECRET).await?;
    transfer(&mut secret, 0..units, seed, false, &bar)?;
    let end = GROWN / u64::from(UNIT);
    transfer(&mut secret, end - 1..end, seed, false, &bar)?;
    drop(secret);
    say!("  its key was changed, the nexus killed and started again: every byte is right");

    // As a nexus that was killed between asking for another key and hearing that it is stored.
    let state = folder.join("nexus").join("volumes.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&state)?)?;
    let saved = json["volumes"].as_array_mut().context("no volumes in the state file")?;
    let saved = saved.iter_mut().find(|v| v["name"] == SECRET).context("it is not remembered")?;
    let current = saved["encryption"]["key"].take();
    saved["encryption"] = serde_json::json!({
        "key": {"key_file": first.display().to_string(), "key_id": ""}, "next": current.clone(),
    });
    std::fs::write(&state, serde_json::to_vec(&json)?)?;
    cluster.restart_nexus().await?;
    drop(host(cluster, SECRET).await?);
    let until = Instant::now() + RESTART_TIMEOUT;
    loop {
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&state)?)?;
        let saved = json["volumes"].as_array().and_then(|v| v.iter().find(|v| v["name"] == SECRET));
        let encryption = saved.map(|v| v["encryption"].clone()).unwrap_or_default();
        if encryption == serde_json::json!({"key": current}) {
            break;
        }
        ensure!(Instant::now() < until, "which key it has is not learnt: {encryption}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // The old key in the place of the new one.
    write_key(&second, &key(1))?;
    cluster.restart_nexus().await?;
    let refused = settled(cluster, SECRET).await?;
    ensure!(
        !refused.serving && refused.detail.contains(&format!("expected key id {new_id}, got")),
        "with the old key the volume is {}: {}",
        refused.state,
        refused.detail
    );
    drop(host(cluster, PLAIN).await?);
    let unlock = v1::UnlockVolumeRequest { name: SECRET.to_owned(), key: None };
    let still = cluster.client.unlock_volume(unlock.clone()).await;
    ensure!(still.is_err(), "the old key unlocked the volume");
    write_key(&second, "2".repeat(64).as_bytes())?;
    cluster.client.unlock_volume(unlock).await.map_err(|s| said(&s))?;
    let mut secret = host(cluster, SECRET).await?;
    transfer(&mut secret, 0..units, seed, false, &bar)?;
    say!("  the old key is refused, and the new one unlocks it");
    Ok(())
}
