//! Command descriptor blocks: operation codes, lengths, and how much data each brings.

use crate::wire::{u16_at, u24_at, u32_at, u64_at};

/// Operation codes.
pub mod op {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SELECT_6: u8 = 0x15;
    pub const RESERVE_6: u8 = 0x16;
    pub const RELEASE_6: u8 = 0x17;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const WRITE_VERIFY_10: u8 = 0x2e;
    pub const VERIFY_10: u8 = 0x2f;
    pub const PRE_FETCH_10: u8 = 0x34;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const READ_DEFECT_DATA_10: u8 = 0x37;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const SANITIZE: u8 = 0x48;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const RESERVE_10: u8 = 0x56;
    pub const RELEASE_10: u8 = 0x57;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const PERSISTENT_RESERVE_IN: u8 = 0x5e;
    pub const PERSISTENT_RESERVE_OUT: u8 = 0x5f;
    pub const THIRD_PARTY_COPY_OUT: u8 = 0x83;
    pub const THIRD_PARTY_COPY_IN: u8 = 0x84;
    pub const READ_16: u8 = 0x88;
    pub const COMPARE_AND_WRITE: u8 = 0x89;
    pub const WRITE_16: u8 = 0x8a;
    pub const ORWRITE_16: u8 = 0x8b;
    pub const WRITE_VERIFY_16: u8 = 0x8e;
    pub const VERIFY_16: u8 = 0x8f;
    pub const PRE_FETCH_16: u8 = 0x90;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const WRITE_ATOMIC_16: u8 = 0x9c;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const MAINTENANCE_IN: u8 = 0xa3;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const WRITE_VERIFY_12: u8 = 0xae;
    pub const VERIFY_12: u8 = 0xaf;
    pub const READ_DEFECT_DATA_12: u8 = 0xb7;
}

/// Bytes of a CDB, by the group of its operation code.
#[must_use]
pub const fn cdb_len(opcode: u8) -> usize {
    match opcode >> 5 {
        0 => 6,
        1 | 2 => 10,
        4 => 16,
        5 => 12,
        _ => 16,
    }
}

/// The CONTROL byte of a CDB.
#[must_use]
pub fn control(cdb: &[u8; 16]) -> u8 {
    cdb[cdb_len(cdb[0]) - 1]
}

/// The first block and the number of blocks of a command on a range of blocks.
#[must_use]
pub fn lba_and_blocks(cdb: &[u8; 16]) -> Option<(u64, u64)> {
    Some(match cdb[0] {
        op::READ_6 | op::WRITE_6 => {
            // Zero stands for 256.
            let blocks = if cdb[4] == 0 { 256 } else { u64::from(cdb[4]) };
            (u64::from(u24_at(cdb, 1) & 0x1f_ffff), blocks)
        }
        op::READ_10
        | op::WRITE_10
        | op::WRITE_VERIFY_10
        | op::VERIFY_10
        | op::PRE_FETCH_10
        | op::SYNCHRONIZE_CACHE_10
        | op::WRITE_SAME_10 => (u64::from(u32_at(cdb, 2)), u64::from(u16_at(cdb, 7))),
        op::READ_12 | op::WRITE_12 | op::WRITE_VERIFY_12 | op::VERIFY_12 => {
            (u64::from(u32_at(cdb, 2)), u64::from(u32_at(cdb, 6)))
        }
        op::READ_16
        | op::WRITE_16
        | op::ORWRITE_16
        | op::WRITE_VERIFY_16
        | op::VERIFY_16
        | op::PRE_FETCH_16
        | op::SYNCHRONIZE_CACHE_16
        | op::WRITE_SAME_16 => (u64_at(cdb, 2), u64::from(u32_at(cdb, 10))),
        op::WRITE_ATOMIC_16 => (u64_at(cdb, 2), u64::from(u16_at(cdb, 12))),
        op::COMPARE_AND_WRITE => (u64_at(cdb, 2), u64::from(cdb[13])),
        _ => return None,
    })
}

/// Whether a command brings the blocks of its range: one that writes them, or sets bits of them.
pub(crate) const fn brings_blocks(code: u8) -> bool {
    matches!(
        code,
        op::WRITE_6
            | op::WRITE_10
            | op::WRITE_12
            | op::WRITE_16
            | op::WRITE_ATOMIC_16
            | op::ORWRITE_16
            | op::WRITE_VERIFY_10
            | op::WRITE_VERIFY_12
            | op::WRITE_VERIFY_16
    )
}

/// Whether a command on more blocks than one request of the disk takes is carried out as several.
pub(crate) const fn comes_in_steps(code: u8) -> bool {
    let reads = matches!(code, op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16);
    reads || brings_blocks(code) && !matches!(code, op::WRITE_ATOMIC_16 | op::ORWRITE_16)
}

/// Bytes of data that a command wants from the initiator; 0 for commands that want none, and for
/// those that nobody knows. `shift` is the base-2 logarithm of the block size.
#[must_use]
pub fn data_out_len(cdb: &[u8; 16], shift: u8) -> u64 {
    let blocks = lba_and_blocks(cdb).map_or(0, |(_, blocks)| blocks);
    match cdb[0] {
        code if brings_blocks(code) => blocks << shift,
        op::COMPARE_AND_WRITE => (blocks * 2) << shift,
        op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => match cdb[1] >> 1 & 3 {
            1 => blocks << shift,
            3 if blocks > 0 => 1 << shift,
            _ => 0,
        },
        op::WRITE_SAME_10 => 1 << shift,
        // NDOB: there is no block.
        op::WRITE_SAME_16 if cdb[1] & 1 == 0 => 1 << shift,
        op::MODE_SELECT_6 => u64::from(cdb[4]),
        op::UNMAP | op::MODE_SELECT_10 | op::SANITIZE => u64::from(u16_at(cdb, 7)),
        op::RESERVE_10 | op::RELEASE_10 => u64::from(u16_at(cdb, 7)),
        op::PERSISTENT_RESERVE_OUT => u64::from(u32_at(cdb, 5)),
        op::THIRD_PARTY_COPY_OUT => u64::from(u32_at(cdb, 10)),
        _ => 0,
    }
}

/// A CDB that begins so, and goes on with zeros.
#[cfg(test)]
pub(crate) fn cdb(bytes: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out[..bytes.len()].copy_from_slice(bytes);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_byte_commands_have_256_blocks_for_none() {
        assert_eq!(lba_and_blocks(&cdb(&[0x08, 0x1f, 1, 2, 0, 0])), Some((0x1f_0102, 256)));
        assert_eq!(lba_and_blocks(&cdb(&[0x28, 0, 0, 0, 1, 0, 0, 0, 0, 0])), Some((256, 0)));
    }

    #[test]
    fn data_is_as_much_as_the_cdb_says() {
        assert_eq!(data_out_len(&cdb(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 8]), 9), 4096);
        let mut caw = cdb(&[0x89]);
        caw[13] = 1;
        assert_eq!(data_out_len(&caw, 12), 8192);
        assert_eq!(data_out_len(&cdb(&[0x2f, 0x02, 0, 0, 0, 0, 0, 0, 2]), 9), 1024);
        assert_eq!(data_out_len(&cdb(&[0x2f, 0x06, 0, 0, 0, 0, 0, 0, 2]), 9), 512);
        assert_eq!(data_out_len(&cdb(&[0x2f, 0x00, 0, 0, 0, 0, 0, 0, 2]), 9), 0);
        assert_eq!(data_out_len(&cdb(&[0x12, 0, 0, 0, 255]), 9), 0);
        let mut huge = cdb(&[0x8a]);
        huge[10..14].fill(0xff);
        assert_eq!(data_out_len(&huge, 12), 0xffff_ffff << 12);
    }
}
