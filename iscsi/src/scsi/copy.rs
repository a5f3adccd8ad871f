//! EXTENDED COPY (LID1): blocks from one logical unit of the target to another.

use cairn_block::{Lba, LbaRange};

use super::inquiry::{
    MAX_COPY_SEGMENT_LEN, MAX_COPY_SEGMENTS, MAX_COPY_TARGETS, Product, max_descriptor_list, naa,
    t10,
};
use super::sense::{Sense, key};
use super::unit::{Unit, UnitHandle};
use crate::wire::{u16_at, u24_at, u32_at, u64_at};

/// One segment: so many blocks from here to there, of one block size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopySegment {
    /// The source.
    pub from: UnitHandle,
    /// Where it is read.
    pub from_range: LbaRange,
    /// The destination.
    pub to: UnitHandle,
    /// Where it is written; as long as the source.
    pub to_range: LbaRange,
}

const HEADER_LEN: usize = 16;
const TARGET_LEN: usize = 32;
const SEGMENT_LEN: usize = 28;
const IDENTIFICATION_TARGET: u8 = 0xe4;
const BLOCK_TO_BLOCK: u8 = 0x02;

const TOO_MANY_TARGETS: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x26, 0x06);
const UNSUPPORTED_TARGET: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x26, 0x07);
const TOO_MANY_SEGMENTS: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x26, 0x08);
const UNSUPPORTED_SEGMENT: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x26, 0x09);
const INLINE_DATA: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x26, 0x0b);
const NOT_REACHABLE: Sense = Sense::new(key::COPY_ABORTED, 0x0d, 0x02);
const ABORTED: Sense = Sense::new(key::COPY_ABORTED, 0, 0);

/// The segments of a parameter list.
///
/// # Errors
/// What makes no sense, names no unit, or reaches past its end.
pub(crate) fn segments(
    list: &[u8],
    units: &[Unit],
    product: &Product,
) -> Result<Vec<CopySegment>, Sense> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    if list.len() < HEADER_LEN {
        return Err(Sense::PARAMETER_LIST_LENGTH);
    }
    let (targets_len, segments_len) = (usize::from(u16_at(list, 2)), u32_at(list, 8) as usize);
    if targets_len + segments_len > max_descriptor_list() as usize
        || list.len() < HEADER_LEN + targets_len + segments_len
    {
        return Err(Sense::PARAMETER_LIST_LENGTH);
    }
    if targets_len % TARGET_LEN != 0 {
        return Err(Sense::invalid_parameter(2));
    }
    if targets_len / TARGET_LEN > usize::from(MAX_COPY_TARGETS) {
        return Err(TOO_MANY_TARGETS);
    }
    if segments_len / SEGMENT_LEN > usize::from(MAX_COPY_SEGMENTS) {
        return Err(TOO_MANY_SEGMENTS);
    }
    if u32_at(list, 12) != 0 {
        return Err(INLINE_DATA);
    }
    let (targets, rest) = list[HEADER_LEN..].split_at(targets_len);
    let mut named = Vec::new();
    for d in targets.chunks_exact(TARGET_LEN) {
        named.push(target(d, units, product)?);
    }
    let mut out = Vec::new();
    let mut at = 0;
    while at < segments_len {
        let d = &rest[at..segments_len];
        if d[0] != BLOCK_TO_BLOCK {
            return Err(UNSUPPORTED_SEGMENT);
        }
        if d.len() < SEGMENT_LEN || usize::from(u16_at(d, 2)) != SEGMENT_LEN - 4 {
            return Err(Sense::invalid_parameter(
                u16::try_from(HEADER_LEN + targets_len + at + 2).unwrap_or(0),
            ));
        }
        out.extend(segment(d, &named)?);
        at += SEGMENT_LEN;
    }
    Ok(out)
}

/// The logical unit that a target descriptor names.
fn target<'a>(d: &[u8], units: &'a [Unit], product: &Product) -> Result<&'a Unit, Sense> {
    if d[0] != IDENTIFICATION_TARGET {
        return Err(UNSUPPORTED_TARGET);
    }
    let designator = d[8..28].get(..usize::from(d[7])).ok_or(Sense::invalid_parameter(23))?;
    let kind = d[5] & 0x0f;
    let unit = units
        .iter()
        .find(|unit| match kind {
            0x03 => designator == naa(&unit.config),
            // The field has room for its first bytes only.
            0x01 => designator.len() > 8 && t10(&unit.config, product).starts_with(designator),
            0x0a => designator.get(2..) == Some(&unit.config.id.to_be_bytes()),
            _ => false,
        })
        .ok_or(NOT_REACHABLE)?;
    // Direct access, and the block length that the initiator believes in.
    if d[1] & 0x1f != 0 || u24_at(d, 29) != unit.config.block_size.bytes() {
        return Err(NOT_REACHABLE);
    }
    Ok(unit)
}

fn segment(d: &[u8], named: &[&Unit]) -> Result<Option<CopySegment>, Sense> {
    let unit = |at| named.get(usize::from(u16_at(d, at))).copied().ok_or(NOT_REACHABLE);
    let (from, to) = (unit(4)?, unit(6)?);
    let blocks = u64::from(u16_at(d, 10));
    let within = |unit: &Unit, at| {
        LbaRange::within(Lba(u64_at(d, at)), blocks, unit.config.blocks).map_err(|_| ABORTED)
    };
    let (from_range, to_range) = (within(from, 12)?, within(to, 20)?);
    if from.config.block_size != to.config.block_size
        || blocks << from.shift() > u64::from(MAX_COPY_SEGMENT_LEN)
    {
        return Err(ABORTED);
    }
    if to.is_write_protected() {
        return Err(Sense::WRITE_PROTECTED);
    }
    let (from, to) = (from.config.handle, to.config.handle);
    Ok((blocks > 0).then_some(CopySegment { from, from_range, to, to_range }))
}

#[cfg(test)]
mod tests {
    use cairn_block::BlockSize;

    use super::*;
    use crate::scsi::unit::UnitConfig;
    use crate::wire::{put, put_u24};

    fn unit(n: u16) -> Unit {
        Unit::new(UnitConfig {
            lun: n,
            handle: UnitHandle(u32::from(n)),
            blocks: 100,
            block_size: BlockSize::B4096,
            physical_block_size: BlockSize::B4096,
            id: 0x1000 + u128::from(n),
            volatile_write_cache: false,
            read_only: n == 9,
            removable: false,
            atomic_blocks: 0,
        })
    }

    fn product() -> Product {
        Product { vendor: "CAIRN".into(), product: "VOLUME".into(), revision: "1".into() }
    }

    fn list(from: u16, to: u16, lbas: (u64, u64), blocks: u16) -> Vec<u8> {
        let mut b = vec![0; 16];
        put(&mut b, 2, &64_u16.to_be_bytes());
        put(&mut b, 8, &28_u32.to_be_bytes());
        for n in [from, to] {
            let mut d = [0; 32];
            d[0] = 0xe4;
            (d[4], d[5], d[7]) = (1, 3, 8);
            put(&mut d, 8, &naa(&unit(n).config));
            put_u24(&mut d, 29, 4096);
            b.extend_from_slice(&d);
        }
        let mut d = [0; 28];
        (d[0], d[3], d[7]) = (2, 24, 1);
        put(&mut d, 10, &blocks.to_be_bytes());
        put(&mut d, 12, &lbas.0.to_be_bytes());
        put(&mut d, 20, &lbas.1.to_be_bytes());
        b.extend_from_slice(&d);
        b
    }

    fn parse(list: &[u8]) -> Result<Vec<CopySegment>, Sense> {
        segments(list, &[unit(0), unit(1), unit(9)], &product())
    }

    #[test]
    fn a_segment_names_two_units_and_two_ranges() {
        let got = parse(&list(0, 1, (5, 90), 10)).unwrap();
        let range = |lba| LbaRange::new(Lba(lba), 10).unwrap();
        assert_eq!(
            got,
            [CopySegment {
                from: UnitHandle(0),
                from_range: range(5),
                to: UnitHandle(1),
                to_range: range(90),
            }]
        );
        assert_eq!(parse(&list(0, 1, (0, 0), 0)), Ok(vec![]));
        assert_eq!(parse(&[]), Ok(vec![]));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert_eq!(parse(&list(0, 1, (5, 91), 10)), Err(ABORTED));
        assert_eq!(parse(&list(0, 7, (5, 9), 10)), Err(NOT_REACHABLE));
        assert_eq!(parse(&list(0, 9, (5, 9), 10)), Err(Sense::WRITE_PROTECTED));
        let whole = list(0, 1, (0, 0), 1);
        for len in 1..whole.len() {
            assert_eq!(parse(&whole[..len]), Err(Sense::PARAMETER_LIST_LENGTH), "{len}");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bent = whole.clone();
                bent[at] ^= 1 << bit;
                let _ = parse(&bent);
            }
        }
        let mut bent = whole.clone();
        bent[16] = 0xe5;
        assert_eq!(parse(&bent), Err(UNSUPPORTED_TARGET));
        let mut bent = whole;
        bent[80] = 0x03;
        assert_eq!(parse(&bent), Err(UNSUPPORTED_SEGMENT));
    }
}
