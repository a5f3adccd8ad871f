//! The structures themselves, copy by copy.

use cairn_engine::crypt::Envelope;
use cairn_engine::nexus::Config;
use cairn_engine::replica::disk::{CatalogState, EntryState, MemberState, Superblock};
use cairn_engine::replica::{CatalogInfo, ExtentInfo, JournalInfo, PageInfo, SuperblockInfo};
use serde_json::{Value, json};

use crate::output::{Show, size};

pub(super) fn damage(error: &impl std::fmt::Display) -> String {
    format!("damaged: {error}")
}

fn member_state(state: MemberState) -> String {
    format!("{state:?}").to_lowercase()
}

/// The devices of the pool, for people.
fn member_list(s: &Superblock) -> String {
    let members = s.membership.members.iter();
    members
        .map(|m| {
            let this = if m.id == s.device { " (this)" } else { "" };
            format!("{}{this} {}", m.id, member_state(m.state))
        })
        .collect::<Vec<_>>()
        .join("\n")
}

fn superblock_json(s: &Superblock) -> Value {
    let segments: Vec<Value> = s
        .segments
        .iter()
        .map(|g| json!({"table": g.table, "data": g.data, "extents": g.extents}))
        .collect();
    let members: Vec<Value> = s
        .membership
        .members
        .iter()
        .map(|m| json!({"device": m.id.to_string(), "state": member_state(m.state)}))
        .collect();
    let lost: Vec<u16> = (0..s.slots).filter(|&slot| s.membership.is_lost(slot)).collect();
    json!({
        "device": s.device.to_string(), "generation": s.membership.generation,
        "members": members, "lost_slots": lost,
        "pool": s.pool.to_string(), "sequence": s.sequence, "compat": s.compat,
        "incompat": s.incompat, "device_len": s.device_len, "sector_size": s.sector_size,
        "slots": s.slots, "catalog": s.catalog, "journal": s.journal,
        "journal_blocks": s.journal_blocks, "journal_tail": s.journal_tail,
        "checkpoint": s.checkpoint, "table_digest": s.table_digest, "segments": segments,
    })
}

impl Show for SuperblockInfo {
    const HEADS: &'static [&'static str] = &[
        "BLOCK",
        "STATE",
        "SEQUENCE",
        "POOL",
        "DEVICE",
        "EXTENTS",
        "JOURNAL TAIL",
        "CHECKPOINT",
        "GENERATION",
        "DEVICES",
    ];

    fn row(&self) -> Vec<String> {
        match &self.content {
            Ok(s) => vec![
                self.address.to_string(),
                "whole".to_owned(),
                s.sequence.to_string(),
                s.pool.to_string(),
                size(s.device_len),
                s.extents().to_string(),
                s.journal_tail.to_string(),
                s.checkpoint.to_string(),
                s.membership.generation.to_string(),
                member_list(s),
            ],
            Err(e) => vec![self.address.to_string(), damage(e)],
        }
    }

    fn json(&self) -> Value {
        match &self.content {
            Ok(s) => {
                json!({"block": self.address, "state": "whole", "content": superblock_json(s)})
            }
            Err(e) => json!({"block": self.address, "state": damage(e)}),
        }
    }
}

pub(super) fn catalog_state(state: CatalogState) -> &'static str {
    match state {
        CatalogState::Free => "free",
        CatalogState::Live => "live",
        CatalogState::Snapshot => "snapshot",
        CatalogState::Deleting => "deleting",
    }
}

/// The id of the key that a volume's key is wrapped with, where the volume is encrypted.
fn key_id(config: &Config) -> Option<String> {
    Envelope::decode(&config.encryption).ok().map(|envelope| envelope.key_id.to_string())
}

/// The in-sync members that a register's configuration names, for people.
fn members(config: &[u8]) -> String {
    if config.is_empty() {
        return "none".to_owned();
    }
    match Config::decode(config) {
        Ok(config) => {
            let in_sync = config.members.iter().filter(|m| m.in_sync).count();
            let key = key_id(&config).map_or_else(String::new, |id| format!(", key {id}"));
            format!("{in_sync} of {} in sync{key}", config.members.len())
        }
        Err(e) => format!("unreadable: {e}"),
    }
}

impl Show for CatalogInfo {
    const HEADS: &'static [&'static str] =
        &["SLOT", "BLOCK", "STATE", "REPLICA", "NAME", "SIZE", "PROMISED", "ACCEPTED", "CONFIG"];

    fn row(&self) -> Vec<String> {
        let (slot, address) = (self.slot.to_string(), self.address.to_string());
        match &self.content {
            Ok(p) => vec![
                slot,
                address,
                catalog_state(p.state).to_owned(),
                p.replica.to_string(),
                p.name.clone(),
                size(p.blocks * u64::from(p.block_size.bytes())),
                p.promised_epoch.to_string(),
                format!("{}.{}", p.accepted_epoch, p.register_seq),
                members(&p.config),
            ],
            Err(e) => vec![slot, address, damage(e)],
        }
    }

    fn json(&self) -> Value {
        match &self.content {
            Ok(p) => {
                let config = Config::decode(&p.config).ok().map(|c| {
                    let members: Vec<Value> = c
                        .members
                        .iter()
                        .map(|m| json!({"replica": m.replica.to_string(), "in_sync": m.in_sync}))
                        .collect();
                    json!({
                        "volume": c.volume.to_string(), "blocks": c.blocks,
                        "lineage": c.lineage, "members": members,
                        "key_id": key_id(&c),
                    })
                });
                json!({
                    "slot": self.slot, "block": self.address, "state": catalog_state(p.state),
                    "sequence": p.sequence, "replica": p.replica.to_string(),
                    "volume": p.volume.to_string(), "name": p.name, "blocks": p.blocks,
                    "block_size": p.block_size.bytes(), "promised_epoch": p.promised_epoch.0,
                    "accepted_epoch": p.accepted_epoch.0, "register_seq": p.register_seq,
                    "config": config,
                })
            }
            Err(e) => json!({"slot": self.slot, "block": self.address, "state": damage(e)}),
        }
    }
}

fn entry_state(state: EntryState) -> String {
    format!("{state:?}").to_lowercase()
}

impl Show for JournalInfo {
    const HEADS: &'static [&'static str] = &["SEQUENCE", "BLOCK", "CHECKPOINTED", "RECORDS"];

    fn row(&self) -> Vec<String> {
        vec![
            self.sequence.to_string(),
            self.address.to_string(),
            if self.checkpointed { "yes" } else { "no" }.to_owned(),
            self.records.len().to_string(),
        ]
    }

    fn json(&self) -> Value {
        let records: Vec<Value> = self
            .records
            .iter()
            .map(|r| {
                json!({
                    "extent": r.extent, "state": entry_state(r.entry.state),
                    "layer": r.entry.layer, "logical": r.entry.logical, "open": r.entry.open,
                    "stamp": r.entry.stamp,
                })
            })
            .collect();
        json!({
            "sequence": self.sequence, "block": self.address,
            "checkpointed": self.checkpointed, "records": records,
        })
    }
}

impl Show for PageInfo {
    const HEADS: &'static [&'static str] =
        &["BLOCK", "STATE", "INDEX", "SEQUENCE", "ENTRIES", "CHECKPOINT"];

    fn row(&self) -> Vec<String> {
        match &self.head {
            Ok(p) => vec![
                self.address.to_string(),
                "whole".to_owned(),
                p.index.to_string(),
                p.sequence.to_string(),
                p.entries.to_string(),
                p.checkpoint.to_string(),
            ],
            Err(_) if self.blank => vec![self.address.to_string(), "never written".to_owned()],
            Err(e) => vec![self.address.to_string(), damage(e)],
        }
    }

    fn json(&self) -> Value {
        match &self.head {
            Ok(p) => json!({
                "block": self.address, "state": "whole", "index": p.index,
                "sequence": p.sequence, "entries": p.entries, "checkpoint": p.checkpoint,
                "base": p.base,
            }),
            Err(_) if self.blank => json!({"block": self.address, "state": "never written"}),
            Err(e) => json!({"block": self.address, "state": damage(e)}),
        }
    }
}

impl Show for ExtentInfo {
    const HEADS: &'static [&'static str] =
        &["EXTENT", "OFFSET", "STATE", "DIRTY", "OPEN", "STAMP", "LAYER", "LOGICAL"];

    fn row(&self) -> Vec<String> {
        vec![
            self.extent.to_string(),
            self.offset.to_string(),
            entry_state(self.entry.state),
            if self.entry.dirty { "yes" } else { "no" }.to_owned(),
            if self.entry.open { "yes" } else { "no" }.to_owned(),
            self.entry.stamp.to_string(),
            self.entry.layer.to_string(),
            self.entry.logical.to_string(),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "extent": self.extent, "offset": self.offset,
            "state": entry_state(self.entry.state), "layer": self.entry.layer,
            "logical": self.entry.logical, "stamp": self.entry.stamp,
            "dirty": self.entry.dirty, "open": self.entry.open, "birth": self.entry.birth,
        })
    }
}
