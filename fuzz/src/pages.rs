//! The pages of vendor commands between a nexus and its replicas.

use cairn_block::{SnapshotId, VolumeId};
use cairn_engine::snapshot::{self, SnapshotCall, SnapshotEntry};
use cairn_engine::upkeep::{self, SettleCall};
use cairn_engine::{self as engine, register};
use cairn_replica::SnapshotSpec;

/// A page of any command: what decodes survives being encoded again.
pub fn pages(data: &[u8]) {
    let mut page = data.to_vec();
    page.resize(snapshot::PAGE as usize, 0);
    let mut again = vec![0; page.len()];
    if let Some(call) = snapshot::decode(&page) {
        snapshot::encode(&call, &mut again);
        assert_eq!(snapshot::decode(&again), Some(call));
    }
    if let Some((_, shares, entries)) = snapshot::decode_list(&page) {
        snapshot::encode_list(&entries, 0, shares, &mut again);
        assert_eq!(snapshot::decode_list(&again), Some((entries.len(), shares, entries)));
    }
    if let Some(call) = upkeep::decode(&page) {
        upkeep::encode(call, &mut again);
        assert_eq!(upkeep::decode(&again), Some(call));
    }
    let known = data.iter().all(|&byte| byte < 16);
    assert_eq!(upkeep::is_changes(data), known);
    if let Some(held) = register::decode(&page) {
        register::encode(&held, &mut again);
        assert_eq!(register::decode(&again), Some(held));
    }
}

/// A call, a list, a register and the end of a round.
pub fn seeds() -> Vec<Vec<u8>> {
    let page = || vec![0; snapshot::PAGE as usize];
    let spec = SnapshotSpec { id: SnapshotId(7), name: "nightly".to_owned(), created: 9 };
    let clone = snapshot::CloneSpec { volume: VolumeId(3), blocks: 77, partial: true };
    let mut call = page();
    snapshot::encode(&SnapshotCall { spec, clone: Some(clone) }, &mut call);
    let entry = SnapshotEntry {
        id: SnapshotId(7),
        name: "nightly".to_owned(),
        created: 9,
        own_bytes: 1 << 20,
        blocks: 1000,
        deleting: false,
    };
    let mut list = page();
    snapshot::encode_list(&[entry.clone(), entry], 0, true, &mut list);
    let mut held = page();
    register::encode(&engine::nexus::Register::default(), &mut held);
    let mut settle = page();
    upkeep::encode(SettleCall::End { round: 3, stamp: 9, below: 7 }, &mut settle);
    vec![call, list, held, settle]
}
