//! A volume in blocks of 512 bytes, in the cluster of `cairn up --check`: requests that share blocks of
//! the replicas, many at once, against a copy in memory. It is encrypted.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use cairn_api::v1;
use cairn_engine::block::{Buf, BufSlice, IoOp, IoRequest, Lba, LbaRange, Memory};

use super::keep::{host, key_file, make_of, write_key};
use crate::client::said;
use crate::nvme::Host;
use crate::output::say;
use crate::up::Cluster;

const NAME: &str = "sectors";
const SECTOR: usize = 512;
/// The part that is worked on, in blocks of 512 bytes; some of it is at an edge of 1 MiB.
const FIRST: u64 = 2048 - 200;
const BLOCKS: u64 = 400;
const ROUNDS: u64 = 150;
/// Requests in flight together.
const DEPTH: u32 = 8;

struct Flight {
    op: IoOp,
    at: u64,
    blocks: u64,
    buf: Option<Buf>,
}

/// SplitMix64.
fn next(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *state;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) % below
}

pub(super) async fn run(cluster: &mut Cluster, folder: &Path) -> Result<()> {
    let key = folder.join("sectors.key");
    write_key(&key, &[9; 32])?;
    make_of(cluster, NAME, Some(key_file(&key)), 512).await?;
    let mut host = host(cluster, NAME).await?;
    let size = host.namespace().block_size.bytes();
    ensure!(size == 512, "the volume has blocks of {size} bytes");
    let mut model = vec![0u8; usize::try_from(BLOCKS)? * SECTOR];
    let mut seed = 0x5ec7;
    for round in 0..ROUNDS {
        let flights = submit(&mut host, &mut seed, round)?;
        settle(&mut host, flights, &mut model).with_context(|| format!("round {round}"))?;
    }
    drop(host);
    cluster.restart_nexus().await?;
    let mut host = super::keep::host(cluster, NAME).await?;
    let len = u32::try_from(model.len())?;
    let buf = host.alloc(len)?;
    host.request(IoOp::Read, FIRST, BLOCKS, buf.slice())?;
    ensure!(host.memory().bytes(buf.slice()) == model, "after a restart of the nexus");
    host.memory().release(buf);
    drop(host);
    let request = v1::DeleteVolumeRequest { name: NAME.to_owned() };
    cluster.client.delete_volume(request).await.map_err(|s| said(&s))?;
    say!("  a volume in blocks of 512 bytes is right to the byte, neighbours in flight together");
    Ok(())
}

/// Requests that overlap in no host block, and in many of the replicas' blocks.
fn submit(host: &mut Host, seed: &mut u64, round: u64) -> Result<Vec<Option<Flight>>> {
    let mut flights: Vec<Option<Flight>> = Vec::new();
    for tag in 0..DEPTH {
        let at = next(seed, BLOCKS - 1);
        let blocks = (1 + next(seed, 20)).min(BLOCKS - at);
        let apart = |f: &Flight| f.at + f.blocks <= at || at + blocks <= f.at;
        if !flights.iter().flatten().all(apart) {
            flights.push(None);
            continue;
        }
        let op = match next(seed, 8) {
            0..3 => IoOp::Read,
            3 => IoOp::Discard,
            4 => IoOp::WriteZeroes { fua: false, unmap: next(seed, 2) == 0 },
            _ => IoOp::Write { fua: next(seed, 4) == 0 },
        };
        let mut slice = BufSlice::EMPTY;
        let mut buf = None;
        if matches!(op, IoOp::Read | IoOp::Write { .. }) {
            let made = host.alloc(u32::try_from(blocks)? * 512)?;
            slice = made.slice();
            let value = u8::try_from((round * u64::from(DEPTH) + u64::from(tag)) % 255 + 1)?;
            host.memory().bytes_mut(slice).fill(value);
            buf = Some(made);
        }
        let range = LbaRange::new(Lba(FIRST + at), blocks)?;
        host.submit(tag, IoRequest { op, range, buf: slice })?;
        flights.push(Some(Flight { op, at, blocks, buf }));
    }
    Ok(flights)
}

fn settle(host: &mut Host, mut flights: Vec<Option<Flight>>, model: &mut [u8]) -> Result<()> {
    let mut done = Vec::new();
    let deadline = host.now_ns() + 30_000_000_000;
    while flights.iter().any(Option::is_some) {
        done.clear();
        host.poll(&mut done, Some(deadline))?;
        ensure!(!done.is_empty() || host.now_ns() < deadline, "a request was not answered in 30 s");
        for answer in &done {
            let flight = flights.get_mut(answer.tag as usize).and_then(Option::take);
            let flight = flight.context("an answer to a request that was not made")?;
            ensure!(
                answer.io_status.is_ok(),
                "{:?} of {} blocks at {} failed: {}",
                flight.op,
                flight.blocks,
                FIRST + flight.at,
                answer.status
            );
            let (from, to) = (flight.at, flight.at + flight.blocks);
            let part = usize::try_from(from)? * SECTOR..usize::try_from(to)? * SECTOR;
            let bytes = flight.buf.as_ref().map(|buf| host.memory().bytes(buf.slice()));
            match (flight.op, bytes) {
                (IoOp::Read, Some(bytes)) => ensure!(
                    bytes == &model[part],
                    "{} blocks at {} hold something else",
                    flight.blocks,
                    FIRST + flight.at
                ),
                (_, Some(bytes)) => model[part].copy_from_slice(bytes),
                (_, None) => model[part].fill(0),
            }
            if let Some(buf) = flight.buf {
                host.memory().release(buf);
            }
        }
    }
    Ok(())
}
