//! What a pool keeps its replicas' undo logs in: a replica of its own, that nobody is shown.

use cairn_block::{BlockSize, ReplicaId, VolumeId, undo};

use crate::ReplicaSpec;
use crate::pool::Slot;

/// The id of the replica that holds the undo logs: "cairn undo logs\0".
const UNDO_LOG: u128 = 0x6361_6972_6e20_756e_646f_206c_6f67_7300;

/// Whether a replica holds the undo logs.
pub(crate) fn is_undo_log(id: ReplicaId) -> bool {
    id.0 == UNDO_LOG
}

/// The replica that holds the undo logs of all slots, one after the other.
pub(crate) fn spec(slots: u16) -> ReplicaSpec {
    ReplicaSpec {
        id: ReplicaId(UNDO_LOG),
        volume: VolumeId(UNDO_LOG),
        name: "undo logs".to_owned(),
        blocks: u64::from(slots) * undo::BLOCKS,
        block_size: BlockSize::B4096,
        thick: false,
        source: None,
    }
}

impl Slot {
    /// Whether it may be full one day, and what it takes then was promised to somebody.
    pub(crate) fn is_promised(&self) -> bool {
        self.is_live() && !is_undo_log(self.page.replica)
    }
}
