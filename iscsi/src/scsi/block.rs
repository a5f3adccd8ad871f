//! Commands on blocks: from CDBs to requests of the disk.

use cairn_block::{Buf, Lba, LbaRange, Memory};

use super::cdb::{brings_blocks, comes_in_steps, data_out_len, lba_and_blocks, op};
use super::copy::CopySegment;
use super::inquiry::{Limits, MAX_UNMAP_RANGES};
use super::sense::{Sense, Status};
use super::unit::Unit;
use crate::wire::{u16_at, u32_at, u64_at};

/// What an initiator asks of a logical unit's disk. Ranges lie within it.
#[derive(Debug)]
pub enum IoCommand {
    /// Read: complete with `len` bytes of data.
    Read {
        /// Where.
        range: LbaRange,
        /// The range in bytes.
        len: u32,
    },
    /// Write.
    Write {
        /// Where.
        range: LbaRange,
        /// The range's bytes.
        data: Buf,
        /// Force unit access: durable before it is completed.
        fua: bool,
        /// Check afterwards that it can be read.
        verify: bool,
        /// WRITE ATOMIC: whole or not at all.
        atomic: bool,
    },
    /// SYNCHRONIZE CACHE: all that was written before is made durable.
    Flush,
    /// Check that the range can be read; no data is transferred.
    Verify {
        /// Where.
        range: LbaRange,
    },
    /// Compare: complete with success where the range holds the data, or as a miscompare.
    Compare {
        /// Where.
        range: LbaRange,
        /// The range's bytes; one block of them where `repeated`.
        data: Buf,
        /// Every block is compared with the one.
        repeated: bool,
    },
    /// COMPARE AND WRITE: in one step that nothing comes between.
    CompareAndWrite {
        /// Where.
        range: LbaRange,
        /// The range's bytes to compare with, then those to write.
        data: Buf,
        /// Force unit access.
        fua: bool,
    },
    /// ORWRITE: sets the bits of the data; in one step that nothing comes between.
    OrWrite {
        /// Where.
        range: LbaRange,
        /// The range's bytes.
        data: Buf,
        /// Force unit access.
        fua: bool,
    },
    /// WRITE SAME: the block everywhere in the range.
    WriteSame {
        /// Where.
        range: LbaRange,
        /// One block.
        data: Buf,
        /// Force unit access.
        fua: bool,
    },
    /// Zeros everywhere in the range.
    WriteZeroes {
        /// Where.
        range: LbaRange,
        /// Force unit access.
        fua: bool,
        /// The range may be deallocated.
        unmap: bool,
    },
    /// UNMAP.
    Unmap {
        /// The parameter list; read it with [`unmap_range`].
        ranges: Buf,
        /// How many ranges.
        count: u16,
        /// Force unit access.
        fua: bool,
    },
    /// GET LBA STATUS: complete with [`crate::connection::Connection::complete_lba_status`].
    LbaStatus {
        /// From the block that was asked for to the end.
        range: LbaRange,
        /// Extents that there is room for.
        max_extents: u32,
    },
    /// EXTENDED COPY: the segments one after the other. A failure ends it.
    Copy {
        /// The segments.
        segments: Vec<CopySegment>,
        /// Force unit access.
        fua: bool,
    },
}

/// What a command on blocks comes to.
#[derive(Debug)]
pub(crate) enum Step {
    Io(IoCommand),
    /// The next step of a READ of so many bytes.
    Part(IoCommand, u32),
    /// A request that does without the data that came: it is released.
    Zeroes {
        command: IoCommand,
        block: Buf,
    },
    /// There is nothing to do.
    End(Status),
}

/// A command that ends at once, and its data.
pub(crate) type Refused = (Option<Buf>, Status);

const FUA: u8 = 0x08;

/// The range of a command.
fn range_of(unit: &Unit, cdb: &[u8; 16]) -> Result<LbaRange, Status> {
    let (lba, blocks) = lba_and_blocks(cdb).unwrap_or_default();
    LbaRange::within(Lba(lba), blocks, unit.config.blocks)
        .map_err(|_| Sense::LBA_OUT_OF_RANGE.into())
}

/// Where a CDB says how many blocks.
fn blocks_field(cdb: &[u8; 16]) -> u16 {
    match cdb[0] {
        op::READ_6 | op::WRITE_6 => 4,
        op::READ_12 | op::WRITE_12 | op::WRITE_VERIFY_12 | op::VERIFY_12 => 6,
        op::WRITE_ATOMIC_16 => 12,
        op::COMPARE_AND_WRITE => 13,
        code if code >> 5 == 4 => 10,
        _ => 7,
    }
}

fn is_write(code: u8) -> bool {
    let others = [op::WRITE_SAME_10, op::WRITE_SAME_16, op::COMPARE_AND_WRITE, op::UNMAP];
    brings_blocks(code) || others.contains(&code)
}

/// The request of a command on blocks.
pub(crate) fn decode<M: Memory>(
    unit: &Unit,
    cdb: &[u8; 16],
    (edtl, done): (u32, u32),
    data: Option<Buf>,
    limits: Limits,
    mem: &M,
) -> Result<Step, Refused> {
    if is_write(cdb[0]) && unit.is_write_protected() {
        return Err((data, Sense::WRITE_PROTECTED.into()));
    }
    if cdb[0] == op::UNMAP {
        return unmap(unit, data, limits, mem);
    }
    let range = match check(unit, cdb, limits) {
        Ok(range) => range,
        Err(status) => return Err((data, status)),
    };
    let code = cdb[0];
    let strict = matches!(code, op::WRITE_SAME_10 | op::WRITE_SAME_16 | op::COMPARE_AND_WRITE);
    if strict && data_out_len(cdb, unit.shift()) != u64::from(edtl) {
        // A host that sends another amount than the command takes means something else by it.
        return Err((data, Sense::invalid_cdb(blocks_field(cdb), 7).into()));
    }
    let none = range.is_empty();
    let fua = cdb[1] & FUA != 0 || !unit.modes.write_cache;
    let io = |command| Ok(Step::Io(command));
    match code {
        op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => io(IoCommand::Flush),
        op::PRE_FETCH_10 | op::PRE_FETCH_16 => Ok(Step::End(Status::ConditionMet)),
        _ if none => Err((data, Status::Good)),
        op::WRITE_SAME_10 | op::WRITE_SAME_16 => write_same(unit, cdb, range, data, mem),
        op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => {
            let len = u32::try_from(range.blocks() << unit.shift()).unwrap_or(0);
            if len > limits.max_data_len {
                return Ok(read_step(unit, range, done, limits));
            }
            io(IoCommand::Read { range, len })
        }
        _ if done > 0 => verify_or_write(unit, cdb, skip(unit, range, done), data, edtl, fua),
        _ => verify_or_write(unit, cdb, range, data, edtl, fua),
    }
}

/// What of a range is left after so many bytes.
fn skip(unit: &Unit, range: LbaRange, done: u32) -> LbaRange {
    let blocks = u64::from(done >> unit.shift()).min(range.blocks());
    let start = Lba(range.start().0 + blocks);
    LbaRange::new(start, range.blocks() - blocks).unwrap_or_default()
}

/// The next step of a READ that is longer than one.
fn read_step(unit: &Unit, range: LbaRange, done: u32, limits: Limits) -> Step {
    let left = skip(unit, range, done);
    let blocks = left.blocks().min(u64::from(limits.step(&unit.config)));
    let step = LbaRange::new(left.start(), blocks).unwrap_or_default();
    let bytes = |range: LbaRange| u32::try_from(range.blocks() << unit.shift()).unwrap_or(0);
    Step::Part(IoCommand::Read { range: step, len: bytes(step) }, bytes(range))
}

fn verify_or_write(
    unit: &Unit,
    cdb: &[u8; 16],
    range: LbaRange,
    data: Option<Buf>,
    edtl: u32,
    fua: bool,
) -> Result<Step, Refused> {
    let bytchk = cdb[1] >> 1 & 3;
    let wanted = data_out_len(cdb, unit.shift());
    let is_verify = matches!(cdb[0], op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16);
    if is_verify && bytchk == 0 {
        return match data {
            None => Ok(Step::Io(IoCommand::Verify { range })),
            Some(_) => Err((data, Sense::INVALID_INFORMATION_UNIT.into())),
        };
    }
    let (range, data) = match data {
        Some(data) if u64::from(data.len()) == wanted => (range, data),
        data if may_be_short(cdb[0]) => shorten(unit, range, data, edtl)?,
        data => return Err((data, Sense::INVALID_INFORMATION_UNIT.into())),
    };
    let plain = |verify, atomic, fua, data| IoCommand::Write { range, data, fua, verify, atomic };
    Ok(Step::Io(match cdb[0] {
        op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => {
            IoCommand::Compare { range, data, repeated: bytchk == 3 }
        }
        op::COMPARE_AND_WRITE => IoCommand::CompareAndWrite { range, data, fua },
        op::ORWRITE_16 => IoCommand::OrWrite { range, data, fua },
        // What is verified is what is on the medium.
        op::WRITE_VERIFY_10 | op::WRITE_VERIFY_12 | op::WRITE_VERIFY_16 => {
            plain(true, false, true, data)
        }
        op::WRITE_ATOMIC_16 => plain(false, true, fua, data),
        _ => plain(false, false, fua, data),
    }))
}

fn may_be_short(code: u8) -> bool {
    brings_blocks(code) && !matches!(code, op::WRITE_ATOMIC_16 | op::ORWRITE_16)
}

/// A write for which the initiator sends less than its range takes: what it sends is written, where
/// that is whole blocks, and the residual tells the rest.
fn shorten(
    unit: &Unit,
    range: LbaRange,
    data: Option<Buf>,
    edtl: u32,
) -> Result<(LbaRange, Buf), Refused> {
    let Some(data) = data else {
        let nothing = if edtl == 0 { Status::Good } else { Sense::INVALID_INFORMATION_UNIT.into() };
        return Err((None, nothing));
    };
    let blocks = u64::from(data.len() >> unit.shift());
    let whole = blocks << unit.shift() == u64::from(data.len()) && blocks <= range.blocks();
    match LbaRange::new(range.start(), blocks) {
        Ok(range) if whole => Ok((range, data)),
        _ => Err((Some(data), Sense::INVALID_INFORMATION_UNIT.into())),
    }
}

/// The fields that commands on a range have in common.
fn check(unit: &Unit, cdb: &[u8; 16], limits: Limits) -> Result<LbaRange, Status> {
    let code = cdb[0];
    let field = blocks_field(cdb);
    let bytchk = cdb[1] >> 1 & 3;
    match code {
        op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 if bytchk == 2 => {
            return Err(Sense::invalid_cdb(1, 2).into());
        }
        op::WRITE_VERIFY_10 | op::WRITE_VERIFY_12 | op::WRITE_VERIFY_16 if bytchk > 1 => {
            return Err(Sense::invalid_cdb(1, 2).into());
        }
        op::WRITE_ATOMIC_16 if unit.config.atomic_blocks == 0 => {
            return Err(Sense::INVALID_OPCODE.into());
        }
        _ => {}
    }
    let range = range_of(unit, cdb)?;
    let most = match code {
        op::SYNCHRONIZE_CACHE_10
        | op::SYNCHRONIZE_CACHE_16
        | op::PRE_FETCH_10
        | op::PRE_FETCH_16 => u64::MAX,
        op::WRITE_SAME_10 | op::WRITE_SAME_16 => {
            // WSNZ.
            if range.is_empty() {
                return Err(Sense::invalid_cdb(field, 7).into());
            }
            limits.write_same(&unit.config)
        }
        op::COMPARE_AND_WRITE => u64::from(limits.compare_and_write(&unit.config)),
        op::WRITE_ATOMIC_16 => u64::from(limits.atomic(&unit.config)),
        code if comes_in_steps(code) => u64::from(limits.transfer(&unit.config)),
        _ => u64::from(limits.step(&unit.config)),
    };
    if range.blocks() > most {
        return Err(Sense::invalid_cdb(field, 7).into());
    }
    Ok(range)
}

fn write_same<M: Memory>(
    unit: &Unit,
    cdb: &[u8; 16],
    range: LbaRange,
    data: Option<Buf>,
    mem: &M,
) -> Result<Step, Refused> {
    const UNMAP: u8 = 0x08;
    const NDOB: u8 = 0x01;
    let unmap = cdb[1] & UNMAP != 0;
    let fua = !unit.modes.write_cache;
    let no_data = cdb[0] == op::WRITE_SAME_16 && cdb[1] & NDOB != 0;
    let zeroes = IoCommand::WriteZeroes { range, fua, unmap };
    let data = match data {
        None if no_data => return Ok(Step::Io(zeroes)),
        Some(data) if data.len() == unit.config.block_size.bytes() => data,
        data => return Err((data, Sense::INVALID_INFORMATION_UNIT.into())),
    };
    if mem.bytes(data.slice()).iter().all(|b| *b == 0) {
        return Ok(Step::Zeroes { command: zeroes, block: data });
    }
    // What is unmapped reads as zeros: anything else has to be written.
    Ok(Step::Io(IoCommand::WriteSame { range, data, fua }))
}

/// Bytes before the ranges of UNMAP, and of one range.
const UNMAP_HEADER_LEN: usize = 8;
const UNMAP_RANGE_LEN: usize = 16;

/// Range `index` of the parameter list of UNMAP: its first block, and how many.
#[must_use]
pub fn unmap_range(list: &[u8], index: usize) -> Option<(u64, u32)> {
    let at = index.checked_mul(UNMAP_RANGE_LEN)?.checked_add(UNMAP_HEADER_LEN)?;
    let range = list.get(at..at.checked_add(UNMAP_RANGE_LEN)?)?;
    Some((u64_at(range, 0), u32_at(range, 8)))
}

fn unmap<M: Memory>(
    unit: &Unit,
    data: Option<Buf>,
    limits: Limits,
    mem: &M,
) -> Result<Step, Refused> {
    let Some(ranges) = data else { return Ok(Step::End(Status::Good)) };
    match unmap_count(unit, mem.bytes(ranges.slice()), limits) {
        Ok(0) => Err((Some(ranges), Status::Good)),
        Ok(count) => Ok(Step::Io(IoCommand::Unmap { ranges, count, fua: !unit.modes.write_cache })),
        Err(sense) => Err((Some(ranges), sense.into())),
    }
}

fn unmap_count(unit: &Unit, list: &[u8], limits: Limits) -> Result<u16, Sense> {
    if list.len() < UNMAP_HEADER_LEN {
        return Err(Sense::PARAMETER_LIST_LENGTH);
    }
    let room = list.len() - UNMAP_HEADER_LEN;
    let descriptors = usize::from(u16_at(list, 2));
    if descriptors > room {
        return Err(Sense::PARAMETER_LIST_LENGTH);
    }
    let count = descriptors / UNMAP_RANGE_LEN;
    if crate::wire::len32(count) > MAX_UNMAP_RANGES {
        return Err(Sense::invalid_parameter(2));
    }
    for i in 0..count {
        let (lba, blocks) = unmap_range(list, i).unwrap_or_default();
        LbaRange::within(Lba(lba), u64::from(blocks), unit.config.blocks)
            .map_err(|_| Sense::LBA_OUT_OF_RANGE)?;
        if blocks > limits.unmap(&unit.config) {
            let at = UNMAP_HEADER_LEN + i * UNMAP_RANGE_LEN + 8;
            return Err(Sense::invalid_parameter(u16::try_from(at).unwrap_or(0)));
        }
    }
    Ok(u16::try_from(count).unwrap_or(0))
}
