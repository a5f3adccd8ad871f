//! The NVM command set: from entries to block requests.

use cairn_block::{BlockSize, Lba, LbaRange, Memory, undo};

use super::reservations::RESERVATION_OPCODES;
use super::{Command, Io, IoCommand, NamespaceConfig, Outcome, Queue, Status, Target, refuse};
use crate::ana::AnaState;
use crate::identify::{PAGE_LEN, VSL};
use crate::sqe::{Sqe, opcode};
use crate::wire::{u32_at, u64_at};

/// I/O commands, and those of them that change data.
pub(super) const IO_OPCODES: [u8; 7] = [
    opcode::FLUSH,
    opcode::WRITE,
    opcode::READ,
    opcode::WRITE_ZEROES,
    opcode::DATASET_MANAGEMENT,
    opcode::VERIFY,
    opcode::WRITE_ATOMIC,
];
pub(super) const MUTATING_OPCODES: [u8; 4] =
    [opcode::WRITE, opcode::WRITE_ZEROES, opcode::DATASET_MANAGEMENT, opcode::WRITE_ATOMIC];

/// CDW12: Force Unit Access.
const FUA: u32 = 1 << 30;
/// CDW12 of Write Zeroes: Deallocate.
const DEAC: u32 = 1 << 25;
/// CDW11 of Dataset Management: Attribute - Deallocate.
const AD: u32 = 1 << 2;
/// Bytes of one Verify at most: a child has to answer it within its deadline, however slow its disk is.
const VERIFY_LIMIT: u32 = PAGE_LEN << VSL;
/// Bytes of one range of Dataset Management.
const DSM_RANGE_LEN: usize = 16;

/// Range `index` of a Dataset Management range list: its first LBA, and its blocks.
#[must_use]
pub fn dsm_range(bytes: &[u8], index: usize) -> Option<(u64, u32)> {
    let at = index.checked_mul(DSM_RANGE_LEN)?;
    let range = bytes.get(at..at.checked_add(DSM_RANGE_LEN)?)?;
    Some((u64_at(range, 8), u32_at(range, 4)))
}

/// The bytes of one range of Dataset Management.
#[must_use]
pub(crate) fn encode_dsm_range(lba: u64, blocks: u32) -> [u8; DSM_RANGE_LEN] {
    let mut out = [0; DSM_RANGE_LEN];
    crate::wire::put(&mut out, 4, &blocks.to_le_bytes());
    crate::wire::put(&mut out, 8, &lba.to_le_bytes());
    out
}

impl Target {
    /// A command of an I/O queue.
    pub(super) fn handle_io<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let opcode = cmd.sqe.opcode();
        let reserves = !IO_OPCODES.contains(&opcode);
        if reserves && !RESERVATION_OPCODES.contains(&opcode) {
            return refuse(queue, cmd, Status::INVALID_OPCODE.with_dnr(), mem);
        }
        let found = self.subsystem_of(index).and_then(|(_, s)| {
            let replica = s.config.vendor_commands;
            let refusal = s.config.ana.and_then(AnaState::refusal);
            Some((*s.namespace(cmd.sqe.nsid())?, replica, refusal))
        });
        let (namespace, replica) = match found {
            None => return refuse(queue, cmd, Status::INVALID_NAMESPACE.with_dnr(), mem),
            Some((_, _, Some(status))) => return refuse(queue, cmd, status, mem),
            Some((namespace, replica, None)) => (namespace, replica),
        };
        if replica && cmd.sqe.opcode() == opcode::WRITE_ATOMIC {
            // What makes it whole is the nexus.
            return refuse(queue, cmd, Status::INVALID_OPCODE.with_dnr(), mem);
        }
        if reserves {
            return self.handle_reservation(index, queue, cmd, &namespace, mem);
        }
        let slot = cmd.slot;
        match decode_io(&namespace, replica, queue, cmd, mem) {
            Ok(command) => Outcome::Io(Io { slot, namespace: namespace.handle, command }),
            Err((cmd, status)) => refuse(queue, cmd, status, mem),
        }
    }
}

/// The block request of a command, or the command and how it ends at once.
fn decode_io<M: Memory>(
    namespace: &NamespaceConfig,
    replica: bool,
    queue: &Queue,
    cmd: Command,
    mem: &M,
) -> Result<IoCommand, (Command, Status)> {
    let sqe = cmd.sqe;
    match sqe.opcode() {
        opcode::FLUSH => Ok(IoCommand::Flush),
        opcode::DATASET_MANAGEMENT => decode_dsm(namespace, cmd, mem),
        _ => {
            let range = match range_of(namespace, &sqe) {
                Ok(range) => range,
                Err(status) => match log_range_of(&sqe).filter(|_| replica) {
                    Some(range) => range,
                    None => return Err((cmd, status)),
                },
            };
            let fua = sqe.cdw(12) & FUA != 0;
            if sqe.opcode() == opcode::WRITE_ZEROES {
                let unmap = sqe.cdw(12) & DEAC != 0;
                return Ok(IoCommand::WriteZeroes { range, fua, unmap });
            }
            let len = byte_len(range, namespace.block_size);
            if sqe.opcode() == opcode::VERIFY {
                if len.is_none_or(|len| len > VERIFY_LIMIT) {
                    return Err((cmd, Status::INVALID_FIELD.with_dnr()));
                }
                return Ok(IoCommand::Verify { range });
            }
            if len != Some(queue.data_len(cmd.slot)) {
                return Err((cmd, Status::SGL_DATA_LENGTH_INVALID.with_dnr()));
            }
            match (sqe.opcode(), len, cmd.data) {
                (opcode::READ, Some(len), None) => Ok(IoCommand::Read { range, len }),
                (opcode::WRITE, Some(_), Some(data)) => {
                    Ok(IoCommand::Write { range, fua, data, atomic: false })
                }
                (opcode::WRITE_ATOMIC, Some(_), Some(data)) => {
                    Ok(IoCommand::Write { range, fua, data, atomic: true })
                }
                (_, _, data) => {
                    Err((Command { data, ..cmd }, Status::SGL_DATA_LENGTH_INVALID.with_dnr()))
                }
            }
        }
    }
}

/// The range in CDW10 to CDW12, within the namespace.
fn range_of(namespace: &NamespaceConfig, sqe: &Sqe) -> Result<LbaRange, Status> {
    let blocks = u64::from(sqe.cdw(12) & 0xffff) + 1;
    LbaRange::within(Lba(sqe.slba()), blocks, namespace.blocks)
        .map_err(|_| Status::LBA_OUT_OF_RANGE.with_dnr())
}

/// The same within a replica's undo log.
fn log_range_of(sqe: &Sqe) -> Option<LbaRange> {
    let range = LbaRange::new(Lba(sqe.slba()), u64::from(sqe.cdw(12) & 0xffff) + 1).ok()?;
    (undo::is_of_log(range) && range.end() <= undo::whole().end()).then_some(range)
}

fn byte_len(range: LbaRange, block_size: BlockSize) -> Option<u32> {
    u32::try_from(range.blocks() << block_size.shift()).ok()
}

fn decode_dsm<M: Memory>(
    namespace: &NamespaceConfig,
    cmd: Command,
    mem: &M,
) -> Result<IoCommand, (Command, Status)> {
    let count = u16::from(cmd.sqe.cdw(10).to_le_bytes()[0]) + 1;
    let Some(ranges) = &cmd.data else {
        return Err((cmd, Status::SGL_DATA_LENGTH_INVALID.with_dnr()));
    };
    let bytes = mem.bytes(ranges.slice());
    if bytes.len() < usize::from(count) * DSM_RANGE_LEN {
        return Err((cmd, Status::SGL_DATA_LENGTH_INVALID.with_dnr()));
    }
    for i in 0..usize::from(count) {
        let fits = dsm_range(bytes, i).is_some_and(|(lba, blocks)| {
            LbaRange::within(Lba(lba), u64::from(blocks), namespace.blocks).is_ok()
        });
        if !fits {
            return Err((cmd, Status::LBA_OUT_OF_RANGE.with_dnr()));
        }
    }
    if cmd.sqe.cdw(11) & AD == 0 {
        // The other attributes are hints.
        return Err((cmd, Status::SUCCESS));
    }
    match cmd.data {
        Some(ranges) => Ok(IoCommand::Discard { ranges, count }),
        None => Err((cmd, Status::SGL_DATA_LENGTH_INVALID.with_dnr())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_takes_addresses_of_its_undo_log_and_none_past_it() {
        let of = |slba: u64, nlb: u32| {
            log_range_of(&Sqe::new(opcode::WRITE).with_slba(slba).with_cdw(12, nlb | FUA))
        };
        assert_eq!(of(undo::FIRST, 0), Some(undo::head_of(0)));
        let last = undo::whole().end().0 - 1;
        assert_eq!(of(last, 0).map(LbaRange::end), Some(undo::whole().end()));
        assert_eq!((of(last, 1), of(undo::FIRST - 1, 1), of(u64::MAX, 0)), (None, None, None));
    }
}
