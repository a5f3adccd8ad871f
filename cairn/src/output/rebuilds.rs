//! What is told of rebuilds, and of replicas that are replaced.

use cairn_api::v1;
use serde_json::{Value, json};

use super::{Show, size, table, time};

/// How long a rebuild will still take at the rate that it has.
fn seconds_left(rebuild: &v1::Rebuild) -> Option<u64> {
    rebuild.bytes_total.saturating_sub(rebuild.bytes_done).checked_div(rebuild.bytes_per_s)
}

/// A rebuild in one line.
pub(crate) fn running_line(rebuild: &v1::Rebuild) -> String {
    let left = seconds_left(rebuild).map_or_else(String::new, |s| format!(", about {s} s left"));
    format!(
        "{} replica {}: {} of {} at {}/s{left}",
        rebuild.stage,
        rebuild.replica_id,
        size(rebuild.bytes_done),
        size(rebuild.bytes_total),
        size(rebuild.bytes_per_s),
    )
}

/// A rebuild that ended, in one line.
pub(super) fn ended_line(record: &v1::RebuildRecord) -> String {
    let end = if record.failed.is_empty() {
        "done".to_owned()
    } else {
        format!("given up: {}", record.failed)
    };
    format!(
        "replica {} at {} after {:.1} s, {} copied, {end}; it was out because {}",
        record.replica_id,
        time(record.ended_unix_s),
        record.took_ms as f64 / 1000.0,
        size(record.bytes),
        record.why,
    )
}

pub(super) fn running_json(rebuild: &v1::Rebuild) -> Value {
    json!({
        "replica_id": rebuild.replica_id, "stage": rebuild.stage,
        "bytes_total": rebuild.bytes_total, "bytes_done": rebuild.bytes_done,
        "bytes_per_s": rebuild.bytes_per_s, "running_ms": rebuild.running_ms,
        "seconds_left": seconds_left(rebuild),
    })
}

impl Show for v1::RebuildRecord {
    const HEADS: &'static [&'static str] =
        &["ENDED", "REPLICA", "TOOK", "COPIED", "OUTCOME", "IT WAS OUT BECAUSE"];

    fn row(&self) -> Vec<String> {
        let outcome = match self.failed.as_str() {
            "" => "done".to_owned(),
            why => format!("given up: {why}"),
        };
        vec![
            time(self.ended_unix_s),
            self.replica_id.clone(),
            format!("{:.1} s", self.took_ms as f64 / 1000.0),
            size(self.bytes),
            outcome,
            self.why.clone(),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "replica_id": self.replica_id, "why": self.why, "failed": self.failed,
            "ended_unix_s": self.ended_unix_s, "took_ms": self.took_ms, "bytes": self.bytes,
        })
    }
}

/// A replacement in one line.
pub(crate) fn replacement_line(replacement: &v1::Replacement) -> String {
    let spare = match replacement.spare.as_str() {
        "" => String::new(),
        spare => format!(" in spare pool {spare}"),
    };
    let problem = match replacement.problem.as_str() {
        "" => String::new(),
        problem => format!("; it waits: {problem}"),
    };
    let (old, new) = (&replacement.old_replica_id, &replacement.new_replica_id);
    let stage = match replacement.stage.as_str() {
        "making" => "the new one is being made",
        "adding" => "the new one is being added",
        "rebuilding" => "the new one gets its data",
        _ => "the old one is being removed",
    };
    format!("replica {old} by {new}{spare}: {stage}{problem}")
}

pub(super) fn replacement_json(replacement: &v1::Replacement) -> Value {
    json!({
        "old_replica_id": replacement.old_replica_id,
        "new_replica_id": replacement.new_replica_id, "uri": replacement.uri,
        "stage": replacement.stage, "spare": replacement.spare, "problem": replacement.problem,
    })
}

/// All that is told of a volume's rebuilds.
pub(crate) fn volume_rebuilds(volume: &v1::Volume) -> String {
    let mut text = match &volume.rebuild {
        Some(rebuild) => format!("rebuild   {}\n", running_line(rebuild)),
        None => "rebuild   none runs\n".to_owned(),
    };
    if volume.reconcile_mib > 0 {
        let done = volume.reconcile_mib - volume.unreconciled_mib.min(volume.reconcile_mib);
        text.push_str(&format!(
            "reconcile {done} of {} MiB that were being written when the nexus before this one died are alike \
             again\n",
            volume.reconcile_mib
        ));
    }
    if let Some(replacement) = &volume.replacement {
        text.push_str(&format!("replacing {}\n", replacement_line(replacement)));
    }
    for child in volume.children.iter().filter(|c| !c.witness && !c.in_sync) {
        let join = if child.reason.is_empty() { "" } else { ": " };
        text.push_str(&format!(
            "out       replica {} is {}{join}{}\n",
            child.replica_id, child.state, child.reason
        ));
    }
    let totals = volume.rebuild_totals.unwrap_or_default();
    text.push_str(&format!(
        "in all    {} done, {} given up, {} copied\n",
        totals.done,
        totals.given_up,
        size(totals.bytes)
    ));
    if !volume.rebuilt.is_empty() {
        let rows = volume.rebuilt.iter().rev().map(Show::row);
        text.push_str(&table(v1::RebuildRecord::HEADS, rows).to_string());
    }
    text.trim_end().to_owned()
}

/// The same, for programs.
pub(crate) fn volume_rebuilds_json(volume: &v1::Volume) -> Value {
    let totals = volume.rebuild_totals.unwrap_or_default();
    json!({
        "volume": volume.name, "rebuild": volume.rebuild.as_ref().map(running_json),
        "rebuilt": volume.rebuilt.iter().map(Show::json).collect::<Vec<_>>(),
        "done": totals.done, "given_up": totals.given_up, "bytes": totals.bytes,
        "replacement": volume.replacement.as_ref().map(replacement_json),
        "unreconciled_mib": volume.unreconciled_mib, "reconcile_mib": volume.reconcile_mib,
    })
}
