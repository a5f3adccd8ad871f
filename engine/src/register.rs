//! The volume's register on the wire: vendor-specific admin commands of a replica's subsystem.
//!
//! | opcode | name | data | command dwords |
//! |---|---|---|---|
//! | C2h | Register Read | register page to the host | |
//! | C6h | Register Promise | register page to the host | CDW10-11: epoch, newer than the one promised; bit 63 set: that one will do too |
//! | C9h | Register Accept | register page to the controller | |
//! | EDh | Register Renew | register page to the controller: its accepted epoch, and the lease; 0 gives it back | |
//! | CDh | Replica Resize | register page to the controller: its accepted epoch, and the size | |
//!
//! A refusal because of a newer promise completes with status Internal Path Related: Controller Pathing Error. A replica
//! whose pool is offline refuses all but Register Read with Unrecovered Read Error, which older ones never answer to Register
//! Renew; a nexus that does not know it takes it for no grant. The page, little-endian:
//!
//! ```text
//! 0  magic "CRNREG1\0"
//! 8  promised epoch        16 accepted epoch       24 sequence
//! 32 configuration length (u32), zero (u32)        40 incarnation of the machine, in answers (16 bytes)
//! 56 configuration
//! 4080 milliseconds of a lease: in Register Renew, and in answers to Register Promise, what is left of one
//!      that was granted to an older epoch
//! 4088 size of the replica in blocks: in answers, and in Replica Resize; 0: not told
//! ```

use cairn_block::Epoch;
use cairn_nexus::Register;

/// Reads the register.
pub const OPCODE_READ: u8 = 0xc2;
/// Promises an epoch and binds this controller to it.
pub const OPCODE_PROMISE: u8 = 0xc6;
/// Stores a configuration.
pub const OPCODE_ACCEPT: u8 = 0xc9;
/// Grows the replica, unless a newer epoch than the page's was promised.
pub const OPCODE_RESIZE: u8 = 0xcd;
/// Grants a lease to an epoch, unless a newer one was promised.
pub const OPCODE_RENEW: u8 = 0xed;
/// Set in CDW11 of a promise that takes up an epoch again.
pub const AGAIN: u32 = 1 << 31;
/// Bytes of a register page.
pub const PAGE: u32 = 4096;

// On the wire as on disk.
const _: () = assert!(cairn_nexus::MAX_CONFIG <= LEASE - HEADER);
const _: () = assert!(cairn_nexus::MAX_CONFIG <= cairn_replica::disk::CONFIG_MAX);

const MAGIC: [u8; 8] = *b"CRNREG1\0";
const HEADER: usize = 56;
/// Where a page says how large the replica is.
const BLOCKS: usize = PAGE as usize - 8;
/// Where it tells of a lease.
const LEASE: usize = BLOCKS - 8;

/// Writes `register` over the page `out`.
///
/// # Panics
/// Where the configuration does not fit; the nexus bounds it far below that.
pub fn encode(register: &Register, out: &mut [u8]) {
    out.fill(0);
    out[..8].copy_from_slice(&MAGIC);
    out[8..16].copy_from_slice(&register.promised_epoch.0.to_le_bytes());
    out[16..24].copy_from_slice(&register.accepted_epoch.0.to_le_bytes());
    out[24..32].copy_from_slice(&register.seq.to_le_bytes());
    let len = u32::try_from(register.config.len()).expect("a configuration is short");
    out[32..36].copy_from_slice(&len.to_le_bytes());
    out[40..56].copy_from_slice(&register.incarnation.to_le_bytes());
    assert!(HEADER + register.config.len() <= LEASE, "a configuration is short");
    out[HEADER..HEADER + register.config.len()].copy_from_slice(&register.config);
    out[LEASE..LEASE + 8].copy_from_slice(&register.lease_ms.to_le_bytes());
    out[BLOCKS..BLOCKS + 8].copy_from_slice(&register.blocks.to_le_bytes());
}

/// The register that a page holds, or nothing where it holds none.
#[must_use]
pub fn decode(page: &[u8]) -> Option<Register> {
    let header = page.first_chunk::<HEADER>()?;
    if header[..8] != MAGIC {
        return None;
    }
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let blocks = page.get(BLOCKS..)?.first_chunk::<8>()?;
    let lease = page.get(LEASE..)?.first_chunk::<8>()?;
    let mut incarnation = [0; 16];
    incarnation.copy_from_slice(&header[40..56]);
    let len = u32::from_le_bytes([header[32], header[33], header[34], header[35]]);
    let config = page.get(HEADER..HEADER.checked_add(usize::try_from(len).ok()?)?)?;
    Some(Register {
        promised_epoch: Epoch(word(8)),
        accepted_epoch: Epoch(word(16)),
        seq: word(24),
        config: config.to_vec(),
        incarnation: u128::from_le_bytes(incarnation),
        blocks: u64::from_le_bytes(*blocks),
        lease_ms: u64::from_le_bytes(*lease),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_survives_its_page() {
        let register = Register {
            promised_epoch: Epoch(9),
            accepted_epoch: Epoch(8),
            seq: 3,
            config: vec![1, 2, 3],
            incarnation: 77,
            blocks: 1 << 40,
            lease_ms: 2999,
        };
        let mut page = vec![0xff; PAGE as usize];
        encode(&register, &mut page);
        assert_eq!(decode(&page), Some(register));
        page[33] = 0xff;
        assert_eq!(decode(&page), None);
        assert_eq!(decode(&[]), None);
    }
}
