//! Results as tables for people and as JSON for programs.

mod iscsi;
pub(crate) mod rebuilds;

use anyhow::Result;
use bytesize::ByteSize;
use cairn_api::v1;
use comfy_table::{Table, presets};
use serde_json::{Value, json};

use crate::cli::Output;

/// Prints a line. Where nobody reads any more, the program ends quietly, as others in a pipe do.
pub(crate) fn line(text: std::fmt::Arguments<'_>) {
    use std::io::Write as _;
    if writeln!(std::io::stdout(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// `println!`, without its panic on a closed pipe.
macro_rules! say {
    () => { $crate::output::line(format_args!("")) };
    ($($arg:tt)*) => { $crate::output::line(format_args!($($arg)*)) };
}
pub(crate) use say;

/// Something that can be printed both ways.
pub(crate) trait Show {
    /// Column heads.
    const HEADS: &'static [&'static str];
    /// A row of the table.
    fn row(&self) -> Vec<String>;
    /// All of it.
    fn json(&self) -> Value;
}

pub(crate) fn table(heads: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(heads);
    for row in rows {
        table.add_row(row);
    }
    table
}

/// Prints a list.
pub(crate) fn list<T: Show>(output: Output, items: &[T]) -> Result<()> {
    match output {
        Output::Table => say!("{}", table(T::HEADS, items.iter().map(Show::row))),
        Output::Json => {
            let all: Vec<Value> = items.iter().map(Show::json).collect();
            say!("{}", serde_json::to_string_pretty(&all)?);
        }
    }
    Ok(())
}

/// Prints one thing.
pub(crate) fn one<T: Show>(output: Output, item: &T) -> Result<()> {
    match output {
        Output::Table => say!("{}", table(T::HEADS, [item.row()])),
        Output::Json => say!("{}", serde_json::to_string_pretty(&item.json())?),
    }
    Ok(())
}

/// Bytes as people read them.
pub(crate) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

impl Show for v1::Pool {
    const HEADS: &'static [&'static str] =
        &["POOL", "STATE", "SIZE", "FREE", "PROMISED", "BAD READS", "PATH", "ID"];

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            match self.warning.as_str() {
                "" => self.state.clone(),
                warning => format!("{}, {warning}", self.state),
            },
            size(self.capacity_bytes),
            size(self.free_bytes),
            size(self.provisioned_bytes),
            self.checksum_mismatches.to_string(),
            self.path.clone(),
            self.id.clone(),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name, "id": self.id, "path": self.path, "state": self.state,
            "capacity_bytes": self.capacity_bytes, "free_bytes": self.free_bytes,
            "extent_bytes": self.extent_bytes, "dirty_extents": self.dirty_extents,
            "checksum_mismatches": self.checksum_mismatches,
            "devices": self.devices.iter().map(device_json).collect::<Vec<_>>(),
            "reserved_bytes": self.reserved_bytes, "provisioned_bytes": self.provisioned_bytes,
            "warning": self.warning, "open_extents": self.open_extents, "shard": self.shard,
        })
    }
}

/// A device, and the name of its pool.
pub(crate) struct PoolDevice {
    pub(crate) pool: String,
    pub(crate) device: v1::Device,
}

/// The devices of pools.
pub(crate) fn devices(pools: &[v1::Pool]) -> Vec<PoolDevice> {
    let of = |pool: &v1::Pool| {
        let name = pool.name.clone();
        pool.devices
            .clone()
            .into_iter()
            .map(move |device| PoolDevice { pool: name.clone(), device })
    };
    pools.iter().flat_map(of).collect()
}

fn device_json(device: &v1::Device) -> Value {
    json!({
        "id": device.id, "path": device.path, "state": device.state, "reason": device.reason,
        "size_bytes": device.size_bytes, "free_bytes": device.free_bytes,
        "extents_left": device.extents_left,
    })
}

impl Show for PoolDevice {
    const HEADS: &'static [&'static str] =
        &["POOL", "DEVICE", "STATE", "SIZE", "FREE", "PATH", "REASON"];

    fn row(&self) -> Vec<String> {
        let device = &self.device;
        vec![
            self.pool.clone(),
            device.id.clone(),
            device.state.clone(),
            size(device.size_bytes),
            size(device.free_bytes),
            device.path.clone(),
            device.reason.clone(),
        ]
    }

    fn json(&self) -> Value {
        let mut json = device_json(&self.device);
        json["pool"] = json!(self.pool);
        json
    }
}

fn counters(c: Option<&v1::IoCounters>) -> Value {
    let c = c.copied().unwrap_or_default();
    json!({
        "reads": c.reads, "writes": c.writes, "flushes": c.flushes, "discards": c.discards,
        "read_bytes": c.read_bytes, "written_bytes": c.written_bytes, "errors": c.errors,
    })
}

fn mends(m: Option<&v1::Mends>) -> Value {
    let m = m.copied().unwrap_or_default();
    json!({
        "attempted": m.attempted, "healed_blocks": m.healed_blocks,
        "unrecoverable_blocks": m.unrecoverable_blocks, "converged_writes": m.converged_writes,
    })
}

impl Show for v1::Scrub {
    const HEADS: &'static [&'static str] = &["SCRUB"];

    fn row(&self) -> Vec<String> {
        vec![scrub_line(self)]
    }

    fn json(&self) -> Value {
        let finding = |f: &v1::ScrubFinding| json!({"lba": f.lba, "replica_id": f.replica_id, "outcome": f.outcome});
        let findings: Vec<Value> = self.findings.iter().map(finding).collect();
        json!({
            "state": self.state, "compare": self.compare, "rate_mib_s": self.rate_mib_s,
            "started_unix_s": self.started_unix_s, "finished_unix_s": self.finished_unix_s,
            "cursor_bytes": self.cursor_bytes, "verified_bytes": self.verified_bytes,
            "bad_blocks": self.bad_blocks, "healed_blocks": self.healed_blocks,
            "unrecoverable_blocks": self.unrecoverable_blocks,
            "differing_blocks": self.differing_blocks, "findings": findings,
        })
    }
}

impl Show for v1::Replica {
    const HEADS: &'static [&'static str] =
        &["REPLICA", "POOL", "NAME", "STATE", "SIZE", "USED", "URI"];

    fn row(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.pool.clone(),
            self.name.clone(),
            self.state.clone(),
            size(self.size_bytes),
            size(self.allocated_bytes),
            self.uri.clone(),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "id": self.id, "volume_id": self.volume_id, "name": self.name, "pool": self.pool,
            "state": self.state, "size_bytes": self.size_bytes, "block_size": self.block_size,
            "allocated_bytes": self.allocated_bytes, "nqn": self.nqn, "uri": self.uri,
            "counters": counters(self.counters.as_ref()),
        })
    }
}

impl Show for v1::Snapshot {
    const HEADS: &'static [&'static str] =
        &["SNAPSHOT", "NAME", "VOLUME", "TAKEN", "SIZE", "OWN", "STATE", "REPLICAS"];

    fn row(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.name.clone(),
            self.volume.clone(),
            time(self.created_unix_s),
            size(self.size_bytes),
            size(self.own_bytes),
            self.state.clone(),
            format!("{}/{}", self.replicas, self.of_replicas),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "id": self.id, "name": self.name, "volume": self.volume,
            "created_unix_s": self.created_unix_s, "size_bytes": self.size_bytes,
            "own_bytes": self.own_bytes, "state": self.state, "replicas": self.replicas,
            "of_replicas": self.of_replicas,
        })
    }
}

impl Show for v1::Volume {
    const HEADS: &'static [&'static str] = &[
        "VOLUME",
        "STATE",
        "SIZE",
        "ENCRYPTED",
        "IN SYNC",
        "HOSTS",
        "HEALED",
        "LOST",
        "NQN",
        "ADDRESS",
    ];

    fn row(&self) -> Vec<String> {
        let (in_sync, of) = in_sync(self);
        vec![
            self.name.clone(),
            self.state.clone(),
            size(self.size_bytes),
            encryption_text(self.encryption.as_ref()),
            format!("{in_sync}/{of}"),
            self.hosts.len().to_string(),
            self.mends.unwrap_or_default().healed_blocks.to_string(),
            self.mends.unwrap_or_default().unrecoverable_blocks.to_string(),
            self.nqn.clone(),
            self.addresses.join(" "),
        ]
    }

    fn json(&self) -> Value {
        let children: Vec<Value> = self
            .children
            .iter()
            .map(|c| {
                json!({
                    "replica_id": c.replica_id, "uri": c.uri, "state": c.state,
                    "reason": c.reason, "in_sync": c.in_sync, "load": c.load,
                    "witness": c.witness, "connected": c.connected,
                })
            })
            .collect();
        let hosts: Vec<Value> = self
            .hosts
            .iter()
            .map(|h| json!({"nqn": h.nqn, "controller": h.controller, "io_queues": h.io_queues}))
            .collect();
        json!({
            "id": self.id, "name": self.name, "nqn": self.nqn, "size_bytes": self.size_bytes,
            "block_size": self.block_size, "state": self.state, "detail": self.detail,
            "serving": self.serving, "unfit": self.unfit, "epoch": self.epoch, "children": children, "hosts": hosts,
            "counters": counters(self.counters.as_ref()), "in_flight": self.in_flight,
            "encryption": self.encryption.as_ref().map(|e| {
                json!({"cipher": e.cipher, "key_id": e.key_id})
            }),
            "addresses": self.addresses, "mends": mends(self.mends.as_ref()),
            "scrub": self.scrub.as_ref().map(Show::json),
            "rebuild": self.rebuild.as_ref().map(rebuilds::running_json),
            "rebuilt": self.rebuilt.iter().map(Show::json).collect::<Vec<_>>(),
            "replacement": self.replacement.as_ref().map(rebuilds::replacement_json),
            "unreconciled_mib": self.unreconciled_mib, "reconcile_mib": self.reconcile_mib,
            "shard": self.shard,
            "iscsi": self.iscsi.as_ref().map(iscsi::unit_json),
        })
    }
}

/// Replicas that hold every acked write, of how many that hold data.
fn in_sync(volume: &v1::Volume) -> (usize, usize) {
    let data = volume.children.iter().filter(|c| !c.witness && c.state != "idle");
    (data.clone().filter(|c| c.in_sync).count(), data.count())
}

fn encryption_text(encryption: Option<&v1::Encryption>) -> String {
    encryption.map_or_else(|| "no".to_owned(), |e| format!("{}, key {}", e.cipher, e.key_id))
}

/// A volume and each of its replicas, for people.
pub(crate) fn volume_status(volume: &v1::Volume) -> String {
    let c = volume.counters.unwrap_or_default();
    let mut text = format!(
        "volume    {} ({})\nstate     {}: {}\nsize      {}, blocks of {} bytes\nencrypted {}\n\
         epoch     {}\n\
         shard     {}\n\
         requests  {} reads, {} writes, {} flushes, {} discards, {} errors, {} in flight\n",
        volume.name,
        volume.id,
        volume.state,
        volume.detail,
        size(volume.size_bytes),
        volume.block_size,
        encryption_text(volume.encryption.as_ref()),
        volume.epoch,
        volume.shard,
        c.reads,
        c.writes,
        c.flushes,
        c.discards,
        c.errors,
        volume.in_flight,
    );
    for address in &volume.addresses {
        text.push_str(&format!("connect   {}\n", connect_line(address, &volume.nqn)));
    }
    if let Some(unit) = &volume.iscsi {
        text.push_str(&iscsi::unit_text(unit));
        text.push('\n');
    }
    let mends = volume.mends.unwrap_or_default();
    text.push_str(&format!(
        "mends     {} bad blocks met, {} copies healed, {} blocks unrecoverable, {} writes met a full pool\n",
        mends.attempted, mends.healed_blocks, mends.unrecoverable_blocks, mends.converged_writes
    ));
    if let Some(scrub) = &volume.scrub {
        text.push_str(&format!("scrub     {}\n", scrub_line(scrub)));
    }
    if volume.unreconciled_mib > 0 {
        text.push_str(&format!(
            "reconcile {} of {} MiB that were being written when it was last served may still differ\n",
            volume.unreconciled_mib, volume.reconcile_mib
        ));
    }
    if let Some(rebuild) = &volume.rebuild {
        text.push_str(&format!("rebuild   {}\n", rebuilds::running_line(rebuild)));
    } else if let Some(last) = volume.rebuilt.last() {
        text.push_str(&format!("rebuilt   {}\n", rebuilds::ended_line(last)));
    }
    if let Some(replacement) = &volume.replacement {
        text.push_str(&format!("replacing {}\n", rebuilds::replacement_line(replacement)));
    }
    let rows = volume.children.iter().map(|c| {
        vec![
            c.replica_id.clone(),
            c.state.clone(),
            match (c.witness, c.in_sync) {
                (true, _) => "-",
                (_, true) => "yes",
                (_, false) => "no",
            }
            .to_owned(),
            c.uri.clone(),
            c.reason.clone(),
        ]
    });
    text.push_str(&table(&["REPLICA", "STATE", "IN SYNC", "URI", "REASON"], rows).to_string());
    text
}

/// A scrub in one line.
fn scrub_line(scrub: &v1::Scrub) -> String {
    if scrub.state == "never" {
        return "never".to_owned();
    }
    let ended = if scrub.finished_unix_s > 0 {
        format!(", ended {}", time(scrub.finished_unix_s))
    } else {
        String::new()
    };
    format!(
        "{}{}: {} verified at {} MiB/s, {} copies bad, {} healed, {} blocks unrecoverable, \
         {} copies different; started {}{ended}",
        scrub.state,
        if scrub.compare { ", comparing" } else { "" },
        size(scrub.verified_bytes),
        scrub.rate_mib_s,
        scrub.bad_blocks,
        scrub.healed_blocks,
        scrub.unrecoverable_blocks,
        scrub.differing_blocks,
        time(scrub.started_unix_s),
    )
}

/// A scrub and what it found.
pub(crate) fn scrub_status(scrub: &v1::Scrub) -> String {
    let mut text = scrub_line(scrub);
    if !scrub.findings.is_empty() {
        let rows = scrub
            .findings
            .iter()
            .map(|f| vec![f.lba.to_string(), f.replica_id.clone(), f.outcome.clone()]);
        text.push_str(&format!("\n{}", table(&["LBA", "REPLICA", "OUTCOME"], rows)));
    }
    text
}

/// A time as UTC, to the second.
fn time(unix_s: u64) -> String {
    let (days, s) = (unix_s / 86_400, unix_s % 86_400);
    // Days since 0000-03-01, so that leap days come last: the usual civil-from-days arithmetic.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (s / 3600, s / 60 % 60, s % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// What a Linux host types to use a volume.
pub(crate) fn connect_line(address: &str, nqn: &str) -> String {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "4420"));
    let host = host.trim_start_matches('[').trim_end_matches(']');
    format!("nvme connect -t tcp -a {host} -s {port} -n {nqn}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_utc() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(time(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_795_248_000), "2026-11-21T08:00:00Z");
    }
}
