//! Results as tables for people and as JSON for programs.

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
        &["POOL", "STATE", "SIZE", "FREE", "BAD READS", "PATH", "ID"];

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.state.clone(),
            size(self.capacity_bytes),
            size(self.free_bytes),
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
        })
    }
}

fn counters(c: Option<&v1::IoCounters>) -> Value {
    let c = c.copied().unwrap_or_default();
    json!({
        "reads": c.reads, "writes": c.writes, "flushes": c.flushes, "discards": c.discards,
        "read_bytes": c.read_bytes, "written_bytes": c.written_bytes, "errors": c.errors,
    })
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

impl Show for v1::Volume {
    const HEADS: &'static [&'static str] =
        &["VOLUME", "STATE", "SIZE", "ENCRYPTED", "IN SYNC", "HOSTS", "NQN", "ADDRESS"];

    fn row(&self) -> Vec<String> {
        let in_sync = self.children.iter().filter(|c| c.in_sync).count();
        vec![
            self.name.clone(),
            self.state.clone(),
            size(self.size_bytes),
            encryption_text(self.encryption.as_ref()),
            format!("{in_sync}/{}", self.children.len()),
            self.hosts.len().to_string(),
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
            "serving": self.serving, "epoch": self.epoch, "children": children, "hosts": hosts,
            "counters": counters(self.counters.as_ref()), "in_flight": self.in_flight,
            "addresses": self.addresses,
            "encryption": self.encryption.as_ref().map(|e| {
                json!({"cipher": e.cipher, "key_id": e.key_id})
            }),
        })
    }
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
         requests  {} reads, {} writes, {} flushes, {} discards, {} errors, {} in flight\n",
        volume.name,
        volume.id,
        volume.state,
        volume.detail,
        size(volume.size_bytes),
        volume.block_size,
        encryption_text(volume.encryption.as_ref()),
        volume.epoch,
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
    let rows = volume.children.iter().map(|c| {
        vec![
            c.replica_id.clone(),
            c.state.clone(),
            if c.in_sync { "yes" } else { "no" }.to_owned(),
            c.uri.clone(),
            c.reason.clone(),
        ]
    });
    text.push_str(&table(&["REPLICA", "STATE", "IN SYNC", "URI", "REASON"], rows).to_string());
    text
}

/// What a Linux host types to use a volume.
pub(crate) fn connect_line(address: &str, nqn: &str) -> String {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "4420"));
    let host = host.trim_start_matches('[').trim_end_matches(']');
    format!("nvme connect -t tcp -a {host} -s {port} -n {nqn}")
}
