//! Checksum pages, and the blocks that they vouch for.

use cairn_block::ReplicaId;

use super::Inspection;
use crate::blocks::BlockSet;
use crate::disk::{BLOCK, BLOCK_LEN, BlockError, BlockSums, EXTENT, EXTENT_BLOCKS, block_crc};
use crate::extents::{extent_offset, sums_address};
use crate::survey::{Damaged, Fault, Known, Structure, Survey, read_blocks};
use crate::{Device, PoolError};

/// A copy of a checksum page that decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChecksumCopy {
    /// One more at each write of the page.
    pub sequence: u64,
    /// The journal block that allocated the extent for which it was written.
    pub birth: u64,
    /// Blocks that hold data.
    pub valid: u32,
    /// Blocks that were zeroed over a parent layer.
    pub zeroed: u32,
    /// Blocks that were being copied from the parent layer.
    pub incoming: u32,
}

/// A block that is not what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadBlock {
    /// Which of the extent's 256 blocks.
    pub block: u32,
    /// Its first byte on the device.
    pub offset: u64,
    /// The first block of the replica that lies in it, in blocks of the replica's size.
    pub lba: Option<u64>,
    /// The device does not read it.
    pub unreadable: bool,
}

/// What reading an extent showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockCheck {
    /// Blocks that verify.
    pub good: u32,
    /// Blocks that do not. Where the extent is dirty they may be newer than the page.
    pub bad: Vec<BadBlock>,
}

/// An extent's checksum pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChecksumInfo {
    /// The physical extent.
    pub extent: u32,
    /// Its first byte on the device.
    pub offset: u64,
    /// The layer that it belongs to.
    pub layer: u16,
    /// The replica that the layer is of, or was taken of.
    pub replica: Option<ReplicaId>,
    /// Which of the layer's extents.
    pub logical: u32,
    /// The page may be behind the data: a start would hash the extent anew.
    pub dirty: bool,
    /// Its layer is being deleted: its blocks are being zeroed, and nobody reads them.
    pub deleting: bool,
    /// When the extent was allocated: a page of another birth is of an earlier life.
    pub birth: u64,
    /// Where copy A lies, in blocks; B is next to it.
    pub block: u64,
    /// The two copies.
    pub copies: [Result<ChecksumCopy, Fault>; 2],
    /// Which copy counts; none where it does not decode.
    pub current: Option<u8>,
    /// What its blocks are like; only where that was asked for, and there is a page to go by.
    pub blocks: Option<BlockCheck>,
}

impl ChecksumInfo {
    /// Whether reads of the extent fail for want of a page.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        !self.dirty && self.current.is_none()
    }
}

fn count(bits: [u64; 4]) -> u32 {
    bits.iter().map(|word| word.count_ones()).sum()
}

/// The checksum pages of an extent as they were read.
pub(crate) struct Pages {
    pub(crate) copies: [Result<(BlockSums, u64, u64), Fault>; 2],
    pub(crate) current: Option<u8>,
}

impl Pages {
    pub(crate) fn read<D: Device>(
        dev: &mut D,
        survey: &Survey,
        extent: u32,
        known: &Known,
    ) -> Self {
        let address = sums_address(&survey.superblock.segments, extent);
        let blocks = read_blocks(dev, address, 2);
        let copies = [0u8, 1].map(|copy| {
            let block = blocks[usize::from(copy)].as_deref().ok_or(Fault::Unreadable)?;
            let birth = BlockSums::stored_birth(block);
            let at = address + u64::from(copy);
            let pool = survey.superblock.pool;
            let (sums, sequence) = BlockSums::decode(extent, birth, at, pool, block)?;
            if sequence & 1 != u64::from(copy) {
                return Err(BlockError::Field("sequence").into());
            }
            Ok((sums, sequence, birth))
        });
        let of_this_life = |copy: u8| match &copies[usize::from(copy)] {
            Ok((_, sequence, birth)) if *birth == known.entry.birth => Some((*sequence, copy)),
            _ => None,
        };
        let current = if known.entry.dirty {
            of_this_life(0).max(of_this_life(1))
        } else {
            of_this_life(u8::from(known.entry.copy))
        };
        Self { current: current.map(|(_, copy)| copy), copies }
    }

    /// The page that counts.
    pub(crate) fn sums(&self) -> Option<&BlockSums> {
        let copy = self.current?;
        self.copies[usize::from(copy)].as_ref().ok().map(|(sums, _, _)| sums)
    }
}

/// Reads an extent and compares its blocks with its page.
pub(crate) fn check_blocks<D: Device>(
    dev: &mut D,
    survey: &Survey,
    extent: u32,
    known: &Known,
    sums: &BlockSums,
) -> BlockCheck {
    let start = extent_offset(&survey.superblock.segments, extent);
    let total = usize::try_from(EXTENT_BLOCKS).expect("256");
    let mut bytes = vec![0; total * BLOCK_LEN];
    let whole = dev.read_at(start, &mut bytes).is_ok();
    let mut check = BlockCheck { good: 0, bad: Vec::new() };
    let valid = BlockSet(sums.valid);
    for (block, data) in (0u32..).zip(bytes.chunks_exact_mut(BLOCK_LEN)) {
        if !valid.contains(block) {
            continue;
        }
        let offset = start + u64::from(block) * BLOCK;
        let unreadable = !whole && dev.read_at(offset, data).is_err();
        if !unreadable && block_crc(offset / BLOCK, data) == sums.crc[block as usize] {
            check.good += 1;
        } else {
            let lba = survey.owner(known.entry.layer).map(|page| {
                let byte = u64::from(known.entry.logical) * EXTENT + u64::from(block) * BLOCK;
                byte >> page.block_size.shift()
            });
            check.bad.push(BadBlock { block, offset, lba, unreadable });
        }
    }
    check
}

/// The checksum pages of the allocated extents, or of `only` one; with `verify` each extent is read and
/// its blocks are compared. A page of a clean extent that does not decode is among what is damaged.
///
/// # Errors
/// [`PoolError`] where no superblock says where things are.
pub fn inspect_checksums<D: Device>(
    dev: &mut D,
    only: Option<u32>,
    verify: bool,
) -> Result<Inspection<Vec<ChecksumInfo>>, PoolError> {
    let survey = Survey::read(dev)?;
    let mut damaged = survey.damaged();
    let mut found = Vec::new();
    for (extent, known) in survey.allocated() {
        if only.is_some_and(|only| only != extent) {
            continue;
        }
        let pages = Pages::read(dev, &survey, extent, known);
        let block = sums_address(&survey.superblock.segments, extent);
        let deleting = survey.is_leaving(known.entry.layer);
        let blocks = match pages.sums() {
            Some(sums) if verify && !deleting => {
                Some(check_blocks(dev, &survey, extent, known, sums))
            }
            _ => None,
        };
        if !known.entry.dirty && pages.current.is_none() {
            let copy = u8::from(known.entry.copy);
            let earlier = Fault::Block(BlockError::Field("of an earlier life of the extent"));
            let why = pages.copies[usize::from(copy)].as_ref().err().copied().unwrap_or(earlier);
            let what = Structure::Checksums { extent, copy };
            damaged.push(Damaged { what, block: block + u64::from(copy), why });
        }
        found.push(ChecksumInfo {
            extent,
            offset: extent_offset(&survey.superblock.segments, extent),
            layer: known.entry.layer,
            replica: survey.owner(known.entry.layer).map(|page| page.replica),
            logical: known.entry.logical,
            dirty: known.entry.dirty,
            deleting,
            birth: known.entry.birth,
            block,
            current: pages.current,
            copies: pages.copies.map(|copy| {
                copy.map(|(sums, sequence, birth)| ChecksumCopy {
                    sequence,
                    birth,
                    valid: count(sums.valid),
                    zeroed: count(sums.zeroed),
                    incoming: count(sums.incoming),
                })
            }),
            blocks,
        });
    }
    Ok(Inspection { found, damaged })
}
