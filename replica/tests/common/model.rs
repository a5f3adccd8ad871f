//! What a block may hold: what was promised of it, and what a crash may have left.

use std::collections::BTreeMap;

use super::BLOCK;

/// A value that a block may hold. Zero is zeros; otherwise every word of the block is it.
pub(crate) type Value = u64;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    pub(crate) order: u64,
    pub(crate) value: Value,
    /// Answered with success. Otherwise it may be there or not.
    pub(crate) certain: bool,
}

/// Of each block that was ever written, from what is durable on to what is newest.
pub(crate) type Blocks = BTreeMap<u64, Vec<Held>>;

/// What has happened since a block was written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Since {
    /// Nothing, or a kill: what was answered is there.
    Kill,
    /// A power cut: what was not flushed may be gone, or torn over what was there before.
    PowerCut,
    /// A power cut, and what was written may have been the first write over a snapshot: where that is torn,
    /// zeros are in place of the rest.
    PowerCutOnLayers,
}

impl Since {
    /// After a crash, of a replica that has, or had, layers beneath it.
    pub(crate) fn crash(power: bool, layered: bool) -> Self {
        match (power, layered) {
            (false, _) => Self::Kill,
            (true, false) => Self::PowerCut,
            (true, true) => Self::PowerCutOnLayers,
        }
    }
}

/// After a crash, a block that was mixed of several writes is whatever it is; it must stay so.
pub(crate) fn settle_block(blocks: &mut Blocks, lba: u64, block: &[u8]) {
    if let Some(held) = blocks.get_mut(&lba) {
        let first = u64::from_le_bytes(block[..8].try_into().unwrap());
        let same = block[8..] == block[..BLOCK - 8];
        if same {
            *held = vec![Held { order: 0, value: first, certain: true }];
            return;
        }
        for h in held.iter_mut() {
            h.certain = false;
        }
        if block.chunks(512).any(|sector| sector == [0; 512]) {
            held.insert(0, Held { order: 0, value: 0, certain: false });
        }
        held[0].certain = true;
    }
}

pub(crate) fn verify(id: u128, blocks: &Blocks, lba: u64, block: &[u8], since: Since) {
    assert!(
        holds_block(blocks, lba, block, since),
        "block {lba} of {id} holds {:x?}; held: {:x?}",
        block
            .chunks(512)
            .map(|s| u64::from_le_bytes(s[..8].try_into().unwrap()))
            .collect::<Vec<_>>(),
        blocks.get(&lba)
    );
}

pub(crate) fn holds(blocks: &Blocks, start: u64, bytes: &[u8], since: Since) -> bool {
    (start..).zip(bytes.chunks(BLOCK)).all(|(lba, block)| holds_block(blocks, lba, block, since))
}

fn holds_block(blocks: &Blocks, lba: u64, block: &[u8], since: Since) -> bool {
    let Some(held) = blocks.get(&lba) else {
        return block == [0; BLOCK];
    };
    let first = held.iter().rposition(|h| h.certain).unwrap();
    let allowed = if since == Since::Kill { &held[first..] } else { &held[..] };
    let uniform = block[8..] == block[..BLOCK - 8];
    // Nothing tears what is durable.
    let tears = since == Since::PowerCutOnLayers && held.len() > 1 && !uniform;
    block.chunks(512).all(|sector| {
        let value = u64::from_le_bytes(sector[..8].try_into().unwrap());
        let torn = tears && value == 0;
        sector[8..] == sector[..504] && (torn || allowed.iter().any(|h| h.value == value))
    })
}
