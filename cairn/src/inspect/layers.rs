//! Layers, dirty extents and checksums. What could not be decoded is told after what could.

use anyhow::Result;
use cairn_engine::replica::{
    BadBlock, ChecksumCopy, ChecksumInfo, Damaged, DirtyInfo, Fault, Inspection, LayerMap, MarkedBy,
};
use serde_json::{Value, json};

use super::raw::{catalog_state, damage};
use crate::cli::Output;
use crate::output::{say, size, table};

/// Bytes of an extent.
const EXTENT_MIB: usize = 1;

fn damaged_json(damaged: &[Damaged]) -> Vec<Value> {
    let one = |d: &Damaged| json!({"structure": d.what.to_string(), "block": d.block, "reason": d.why.to_string()});
    damaged.iter().map(one).collect()
}

/// Prints it; whether nothing is damaged.
fn print(
    output: Output,
    name: &str,
    mut body: Value,
    tables: impl FnOnce(),
    damaged: &[Damaged],
) -> Result<bool> {
    match output {
        Output::Table => {
            tables();
            damaged.iter().for_each(|d| say!("damaged: {d}"));
        }
        Output::Json => {
            body["damaged"] = damaged_json(damaged).into();
            debug_assert!(body.get(name).is_some(), "what was asked for is in the answer");
            say!("{}", serde_json::to_string_pretty(&body)?);
        }
    }
    Ok(damaged.is_empty())
}

pub(super) fn map(output: Output, maps: &Inspection<Vec<LayerMap>>) -> Result<bool> {
    let all: Vec<Value> = maps.found.iter().map(map_json).collect();
    let tables = || maps.found.iter().for_each(print_map);
    let whole = print(output, "maps", json!({"maps": all}), tables, &maps.damaged)?;
    Ok(whole && !maps.found.iter().any(|map| map.circular))
}

fn map_json(map: &LayerMap) -> Value {
    let extents: Vec<Value> = map
        .extents
        .iter()
        .map(|extent| {
            let sources: Vec<Value> = extent
                .sources
                .iter()
                .map(|s| {
                    json!({"layer": s.layer, "extent": s.extent, "offset": s.offset, "blocks": s.blocks})
                })
                .collect();
            json!({"logical": extent.logical, "sources": sources})
        })
        .collect();
    json!({
        "slot": map.slot, "state": catalog_state(map.state), "replica": map.replica.to_string(),
        "snapshot": (map.snapshot.0 != 0).then(|| map.snapshot.to_string()), "name": map.name,
        "bytes": map.bytes, "layer": map.layer, "parent": map.parent, "depth": map.depth,
        "circular": map.circular, "extents": extents,
    })
}

fn print_map(map: &LayerMap) {
    let parent = map.parent.map_or_else(|| "none".to_owned(), |parent| parent.to_string());
    let snapshot = match map.snapshot.0 {
        0 => String::new(),
        _ => format!(", snapshot {}", map.snapshot),
    };
    say!(
        "slot {}, {}: replica {}{snapshot}, `{}`, {}",
        map.slot,
        catalog_state(map.state),
        map.replica,
        map.name,
        size(map.bytes)
    );
    say!("layer {}, parent {parent}, depth {}", map.layer, map.depth);
    if map.circular {
        say!("damaged: its layers are each other's parents");
    }
    let rows = map.extents.iter().flat_map(|extent| {
        extent.sources.iter().map(|source| {
            let blocks = source.blocks.map_or_else(|| "unknown".to_owned(), |n| n.to_string());
            vec![
                extent.logical.to_string(),
                source.layer.to_string(),
                source.extent.to_string(),
                source.offset.to_string(),
                blocks,
            ]
        })
    });
    say!("{}\n", table(&["LOGICAL", "LAYER", "EXTENT", "OFFSET", "BLOCKS"], rows));
}

pub(super) fn dirty(output: Output, dirty: &Inspection<Vec<DirtyInfo>>) -> Result<bool> {
    let count = dirty.found.iter().filter(|d| d.dirty).count();
    let open = dirty.found.iter().filter(|d| d.open).count();
    let mib = count * EXTENT_MIB;
    let marked = |by| match by {
        MarkedBy::Table => "table".to_owned(),
        MarkedBy::Journal(sequence) => format!("journal {sequence}"),
    };
    let all: Vec<Value> = dirty
        .found
        .iter()
        .map(|d| {
            json!({
                "extent": d.extent, "offset": d.offset, "layer": d.layer,
                "replica": d.replica.map(|r| r.to_string()), "logical": d.logical,
                "dirty": d.dirty, "open": d.open, "stamp": d.stamp,
                "marked_by": marked(d.marked_by),
            })
        })
        .collect();
    let tables = || {
        let rows = dirty.found.iter().map(|d| {
            vec![
                d.extent.to_string(),
                d.offset.to_string(),
                d.layer.to_string(),
                d.replica.map_or_else(|| "none".to_owned(), |r| r.to_string()),
                d.logical.to_string(),
                yes(d.dirty),
                yes(d.open),
                d.stamp.to_string(),
                marked(d.marked_by),
            ]
        });
        let heads = [
            "EXTENT",
            "OFFSET",
            "LAYER",
            "REPLICA",
            "LOGICAL",
            "DIRTY",
            "OPEN",
            "STAMP",
            "MARKED BY",
        ];
        say!("{}", table(&heads, rows));
        say!(
            "{count} dirty extents: a start now would read and hash {mib} MiB; {open} open extents"
        );
    };
    let body = json!({"extents": all, "to_hash_mib": mib});
    print(output, "extents", body, tables, &dirty.damaged)
}

pub(super) fn checksums(output: Output, pages: &Inspection<Vec<ChecksumInfo>>) -> Result<bool> {
    let all: Vec<Value> = pages.found.iter().map(checksums_json).collect();
    let tables = || {
        let rows = pages.found.iter().map(checksums_row);
        let heads =
            ["EXTENT", "LAYER", "LOGICAL", "DIRTY", "CURRENT", "COPY A", "COPY B", "GOOD", "BAD"];
        say!("{}", table(&heads, rows));
        for page in &pages.found {
            let note = if page.dirty { " (dirty: the page may be behind)" } else { "" };
            for bad in page.blocks.iter().flat_map(|blocks| &blocks.bad) {
                say!("bad: extent {}, {}{note}", page.extent, bad_text(page, bad));
            }
        }
    };
    let whole = print(output, "pages", json!({"pages": all}), tables, &pages.damaged)?;
    let bad = |page: &ChecksumInfo| {
        !page.dirty && page.blocks.as_ref().is_some_and(|blocks| !blocks.bad.is_empty())
    };
    Ok(whole && !pages.found.iter().any(bad))
}

fn bad_text(page: &ChecksumInfo, bad: &BadBlock) -> String {
    let of = match (page.replica, bad.lba) {
        (Some(replica), Some(lba)) => format!("block {lba} of replica {replica}"),
        _ => "of no replica".to_owned(),
    };
    let how = if bad.unreadable { "is not read by the device" } else { "does not verify" };
    format!("byte {}: {of} {how}", bad.offset)
}

fn copy_text(copy: &Result<ChecksumCopy, Fault>) -> String {
    match copy {
        Ok(c) => format!(
            "{} (birth {}): {} valid, {} zeroed, {} incoming",
            c.sequence, c.birth, c.valid, c.zeroed, c.incoming
        ),
        Err(e) => damage(e),
    }
}

fn current(page: &ChecksumInfo) -> &'static str {
    match page.current {
        Some(0) => "A",
        Some(_) => "B",
        None if page.dirty => "none yet",
        None => "lost",
    }
}

fn checksums_row(page: &ChecksumInfo) -> Vec<String> {
    let dirty = match (page.deleting, page.dirty) {
        (true, _) => "deleting",
        (false, true) => "yes",
        (false, false) => "no",
    };
    let counts = page.blocks.as_ref().map(|b| (b.good.to_string(), b.bad.len().to_string()));
    let (good, bad) = counts.unwrap_or_default();
    vec![
        page.extent.to_string(),
        page.layer.to_string(),
        page.logical.to_string(),
        dirty.to_owned(),
        current(page).to_owned(),
        copy_text(&page.copies[0]),
        copy_text(&page.copies[1]),
        good,
        bad,
    ]
}

fn checksums_json(page: &ChecksumInfo) -> Value {
    let copies: Vec<Value> = page
        .copies
        .iter()
        .map(|copy| match copy {
            Ok(c) => json!({
                "state": "whole", "sequence": c.sequence, "birth": c.birth, "valid": c.valid,
                "zeroed": c.zeroed, "incoming": c.incoming,
            }),
            Err(e) => json!({"state": damage(e)}),
        })
        .collect();
    let blocks = page.blocks.as_ref().map(|blocks| {
        let bad: Vec<Value> = blocks
            .bad
            .iter()
            .map(|b| {
                json!({
                    "block": b.block, "offset": b.offset, "lba": b.lba,
                    "unreadable": b.unreadable,
                })
            })
            .collect();
        json!({"good": blocks.good, "bad": bad})
    });
    json!({
        "extent": page.extent, "offset": page.offset, "layer": page.layer,
        "replica": page.replica.map(|r| r.to_string()), "logical": page.logical,
        "dirty": page.dirty, "deleting": page.deleting, "birth": page.birth, "block": page.block,
        "copies": copies, "current": page.current.map(|copy| if copy == 0 { "A" } else { "B" }),
        "verified": blocks,
    })
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}
