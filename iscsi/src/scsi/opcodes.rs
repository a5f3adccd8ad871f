//! The commands that are supported, in one table: what of their CDBs is looked at, who may send them
//! past a reservation, and in which access states. REPORT SUPPORTED OPERATION CODES tells it.

use cairn_block::reservation::Guard;

use super::cdb::{cdb_len, op};
use super::sense::Sense;
use crate::wire::{put, u16_at, u32_at};

/// In which asymmetric access states a command is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Only where the logical unit is active.
    Active,
    /// In standby too.
    Standby,
    /// Always.
    Any,
}

/// One command.
#[derive(Debug)]
pub(crate) struct Opcode {
    pub(crate) code: u8,
    pub(crate) action: Option<u16>,
    /// CDB usage data: the bits that are looked at.
    pub(crate) usage: [u8; 16],
    /// What a reservation of another does to it (SPC-5, table 68; SBC-4, table 14).
    pub(crate) guard: Guard,
    pub(crate) access: Access,
}

impl Opcode {
    /// Whether it is carried out while the unit is being sanitized, too (SBC-4, section 4.11.2).
    pub(crate) fn passes_sanitize(&self) -> bool {
        let reports = self.code == op::MAINTENANCE_IN;
        reports || matches!(self.code, op::INQUIRY | op::REPORT_LUNS | op::REQUEST_SENSE)
    }

    /// Whether it is of no use without the medium.
    pub(crate) fn needs_medium(&self) -> bool {
        !matches!(
            self.code,
            op::REQUEST_SENSE
                | op::INQUIRY
                | op::REPORT_LUNS
                | op::START_STOP_UNIT
                | op::PREVENT_ALLOW
                | op::MODE_SENSE_6
                | op::MODE_SENSE_10
                | op::MODE_SELECT_6
                | op::MODE_SELECT_10
                | op::RESERVE_6
                | op::RESERVE_10
                | op::RELEASE_6
                | op::RELEASE_10
                | op::PERSISTENT_RESERVE_IN
                | op::PERSISTENT_RESERVE_OUT
                | op::MAINTENANCE_IN
                | op::THIRD_PARTY_COPY_IN
        )
    }
}

/// DPO and FUA, and nothing else of byte 1.
const RW_FLAGS: u8 = 0x18;
/// The bits of GROUP NUMBER, which is taken and not used.
const GROUP: u8 = 0x3f;

const fn row(code: u8, guard: Guard, access: Access, fields: &[u8]) -> Opcode {
    let mut usage = [0; 16];
    usage[0] = code;
    let mut i = 0;
    while i < fields.len() {
        usage[i + 1] = fields[i];
        i += 1;
    }
    Opcode { code, action: None, usage, guard, access }
}

const fn sa(code: u8, action: u8, guard: Guard, access: Access, fields: &[u8]) -> Opcode {
    let mut row = row(code, guard, access, fields);
    row.action = Some(action as u16);
    row.usage[1] |= action;
    row
}

use Access::{Active, Any, Standby};
use Guard::{Free, Reads, Writes};

const F: u8 = 0xff;

/// Ascending by code and action.
pub(crate) static OPCODES: &[Opcode] = &[
    row(op::TEST_UNIT_READY, Free, Active, &[]),
    row(op::REQUEST_SENSE, Free, Any, &[1, 0, 0, F]),
    row(op::READ_6, Reads, Active, &[0x1f, F, F, F]),
    row(op::WRITE_6, Writes, Active, &[0x1f, F, F, F]),
    row(op::INQUIRY, Free, Any, &[1, F, F, F]),
    row(op::MODE_SELECT_6, Writes, Standby, &[0x11, 0, 0, F]),
    row(op::RESERVE_6, Free, Active, &[]),
    row(op::RELEASE_6, Free, Active, &[]),
    row(op::MODE_SENSE_6, Reads, Standby, &[0x08, F, F, F]),
    row(op::START_STOP_UNIT, Writes, Active, &[1, 0, 0x0f, 0xf7]),
    row(op::PREVENT_ALLOW, Reads, Active, &[0, 0, 0, 3]),
    row(op::READ_CAPACITY_10, Free, Standby, &[0, F, F, F, F, 0, 0, 1]),
    row(op::READ_10, Reads, Active, &[RW_FLAGS, F, F, F, F, GROUP, F, F]),
    row(op::WRITE_10, Writes, Active, &[RW_FLAGS, F, F, F, F, GROUP, F, F]),
    row(op::WRITE_VERIFY_10, Writes, Active, &[0x16, F, F, F, F, GROUP, F, F]),
    row(op::VERIFY_10, Reads, Active, &[0x16, F, F, F, F, GROUP, F, F]),
    row(op::PRE_FETCH_10, Reads, Active, &[0x02, F, F, F, F, GROUP, F, F]),
    row(op::SYNCHRONIZE_CACHE_10, Writes, Active, &[0x06, F, F, F, F, GROUP, F, F]),
    row(op::READ_DEFECT_DATA_10, Reads, Active, &[0, 0x1f, 0, 0, 0, 0, F, F]),
    row(op::WRITE_SAME_10, Writes, Active, &[0x08, F, F, F, F, GROUP, F, F]),
    row(op::UNMAP, Writes, Active, &[0, 0, 0, 0, 0, GROUP, F, F]),
    // OVERWRITE, BLOCK ERASE, EXIT FAILURE MODE.
    sa(op::SANITIZE, 0x01, Writes, Active, &[0xa0, 0, 0, 0, 0, 0, F, F]),
    sa(op::SANITIZE, 0x02, Writes, Active, &[0xa0, 0, 0, 0, 0, 0, F, F]),
    sa(op::SANITIZE, 0x1f, Writes, Active, &[0xa0, 0, 0, 0, 0, 0, F, F]),
    row(op::MODE_SELECT_10, Writes, Standby, &[0x11, 0, 0, 0, 0, 0, F, F]),
    row(op::RESERVE_10, Free, Active, &[0, 0, 0, 0, 0, 0, F, F]),
    row(op::RELEASE_10, Free, Active, &[0, 0, 0, 0, 0, 0, F, F]),
    row(op::MODE_SENSE_10, Reads, Standby, &[0x18, F, F, 0, 0, 0, F, F]),
    // Where the volume stands by, what is reserved is neither known nor changed.
    sa(op::PERSISTENT_RESERVE_IN, 0, Free, Active, &[0, 0, 0, 0, 0, 0, F, F]),
    sa(op::PERSISTENT_RESERVE_IN, 1, Free, Active, &[0, 0, 0, 0, 0, 0, F, F]),
    sa(op::PERSISTENT_RESERVE_IN, 2, Free, Active, &[0, 0, 0, 0, 0, 0, F, F]),
    sa(op::PERSISTENT_RESERVE_IN, 3, Free, Active, &[0, 0, 0, 0, 0, 0, F, F]),
    sa(op::PERSISTENT_RESERVE_OUT, 0, Free, Active, &[0, F, 0, 0, F, F, F, F]),
    sa(op::PERSISTENT_RESERVE_OUT, 1, Free, Active, &[0, F, 0, 0, F, F, F, F]),
    sa(op::PERSISTENT_RESERVE_OUT, 2, Free, Active, &[0, F, 0, 0, F, F, F, F]),
    sa(op::PERSISTENT_RESERVE_OUT, 3, Free, Active, &[0, F, 0, 0, F, F, F, F]),
    sa(op::PERSISTENT_RESERVE_OUT, 4, Free, Active, &[0, F, 0, 0, F, F, F, F]),
    sa(op::PERSISTENT_RESERVE_OUT, 5, Free, Active, &[0, F, 0, 0, F, F, F, F]),
    sa(op::PERSISTENT_RESERVE_OUT, 6, Free, Active, &[0, F, 0, 0, F, F, F, F]),
    // EXTENDED COPY (LID1).
    sa(op::THIRD_PARTY_COPY_OUT, 0, Writes, Active, &[0, 0, 0, 0, 0, 0, 0, 0, 0, F, F, F, F]),
    // RECEIVE COPY RESULTS: COPY STATUS (LID1), OPERATING PARAMETERS.
    sa(op::THIRD_PARTY_COPY_IN, 0, Reads, Active, &[0, F, 0, 0, 0, 0, 0, 0, 0, F, F, F, F]),
    sa(op::THIRD_PARTY_COPY_IN, 3, Reads, Active, &[0, F, 0, 0, 0, 0, 0, 0, 0, F, F, F, F]),
    row(op::READ_16, Reads, Active, &[RW_FLAGS, F, F, F, F, F, F, F, F, F, F, F, F, GROUP]),
    row(
        op::COMPARE_AND_WRITE,
        Writes,
        Active,
        &[RW_FLAGS, F, F, F, F, F, F, F, F, 0, 0, 0, F, GROUP],
    ),
    row(op::WRITE_16, Writes, Active, &[RW_FLAGS, F, F, F, F, F, F, F, F, F, F, F, F, GROUP]),
    row(op::ORWRITE_16, Writes, Active, &[RW_FLAGS, F, F, F, F, F, F, F, F, F, F, F, F, GROUP]),
    row(op::WRITE_VERIFY_16, Writes, Active, &[0x16, F, F, F, F, F, F, F, F, F, F, F, F, GROUP]),
    row(op::VERIFY_16, Reads, Active, &[0x16, F, F, F, F, F, F, F, F, F, F, F, F, GROUP]),
    row(op::PRE_FETCH_16, Reads, Active, &[0x02, F, F, F, F, F, F, F, F, F, F, F, F, GROUP]),
    row(
        op::SYNCHRONIZE_CACHE_16,
        Writes,
        Active,
        &[0x06, F, F, F, F, F, F, F, F, F, F, F, F, GROUP],
    ),
    row(op::WRITE_SAME_16, Writes, Active, &[0x09, F, F, F, F, F, F, F, F, F, F, F, F, GROUP]),
    row(
        op::WRITE_ATOMIC_16,
        Writes,
        Active,
        &[RW_FLAGS, F, F, F, F, F, F, F, F, 0, 0, F, F, GROUP],
    ),
    // READ CAPACITY (16), GET LBA STATUS.
    sa(op::SERVICE_ACTION_IN_16, 0x10, Free, Standby, &[0, F, F, F, F, F, F, F, F, F, F, F, F, 1]),
    sa(op::SERVICE_ACTION_IN_16, 0x12, Reads, Active, &[0, F, F, F, F, F, F, F, F, F, F, F, F]),
    row(op::REPORT_LUNS, Free, Any, &[0, F, 0, 0, 0, F, F, F, F]),
    // REPORT TARGET PORT GROUPS, REPORT SUPPORTED OPERATION CODES and TASK MANAGEMENT FUNCTIONS.
    sa(op::MAINTENANCE_IN, 0x0a, Free, Any, &[0xe0, 0, 0, 0, 0, F, F, F, F]),
    sa(op::MAINTENANCE_IN, 0x0c, Free, Standby, &[0, 0x87, F, F, F, F, F, F, F]),
    sa(op::MAINTENANCE_IN, 0x0d, Free, Standby, &[0, 0x80, 0, 0, 0, F, F, F, F]),
    row(op::READ_12, Reads, Active, &[RW_FLAGS, F, F, F, F, F, F, F, F, GROUP]),
    row(op::WRITE_12, Writes, Active, &[RW_FLAGS, F, F, F, F, F, F, F, F, GROUP]),
    row(op::WRITE_VERIFY_12, Writes, Active, &[0x16, F, F, F, F, F, F, F, F, GROUP]),
    row(op::VERIFY_12, Reads, Active, &[0x16, F, F, F, F, F, F, F, F, GROUP]),
    row(op::READ_DEFECT_DATA_12, Reads, Active, &[0x1f, F, F, F, F, F, F, F, F]),
];

/// The command of a CDB.
///
/// # Errors
/// INVALID COMMAND OPERATION CODE, and INVALID FIELD IN CDB for what its CDB may not hold.
pub(crate) fn check(cdb: &[u8; 16]) -> Result<&'static Opcode, Sense> {
    let first = OPCODES.partition_point(|o| o.code < cdb[0]);
    let of_code = &OPCODES[first..];
    let found = of_code.iter().take_while(|o| o.code == cdb[0]);
    let mut known = false;
    let mut row = None;
    for o in found {
        known = true;
        if o.action.is_none_or(|action| action == u16::from(cdb[1] & 0x1f)) {
            row = Some(o);
            break;
        }
    }
    let Some(row) = row else {
        return Err(if known { Sense::invalid_cdb(1, 4) } else { Sense::INVALID_OPCODE });
    };
    for (i, (byte, usage)) in (0_u16..).zip(cdb[..cdb_len(cdb[0])].iter().zip(&row.usage)) {
        let wrong = byte & !usage;
        if i > 0 && wrong != 0 {
            let bit = u8::try_from(7 - wrong.leading_zeros()).unwrap_or(7);
            return Err(Sense::invalid_cdb(i, bit));
        }
    }
    Ok(row)
}

/// What a command may take, in seconds: nothing is promised below this.
const NOMINAL_TIMEOUT_S: u32 = 1;
/// When an initiator may give it up.
const RECOMMENDED_TIMEOUT_S: u32 = 60;
/// CDBs have a CONTROL byte whose bits none is used of.
const TIMEOUTS_LEN: u16 = 12;

/// The parameter data of REPORT SUPPORTED OPERATION CODES, of a unit that has WRITE ATOMIC or not.
///
/// # Errors
/// INVALID FIELD IN CDB.
pub(crate) fn report(cdb: &[u8; 16], atomic: bool) -> Result<Vec<u8>, Sense> {
    let rctd = cdb[2] & 0x80 != 0;
    let (code, action) = (cdb[3], u16_at(cdb, 4));
    let all = || OPCODES.iter().filter(|o| atomic || o.code != op::WRITE_ATOMIC_16);
    let rows = || all().filter(|o| o.code == code);
    let has_actions = rows().any(|o| o.action.is_some());
    let one = match cdb[2] & 7 {
        0 => {
            let mut out = vec![0; 4];
            for o in all() {
                let mut d = [0; 8];
                d[0] = o.code;
                put(&mut d, 2, &o.action.unwrap_or(0).to_be_bytes());
                d[5] = u8::from(o.action.is_some()) | if rctd { 2 } else { 0 };
                d[7] = cdb_len(o.code).to_le_bytes()[0];
                out.extend_from_slice(&d);
                if rctd {
                    out.extend_from_slice(&timeouts());
                }
            }
            let len = crate::wire::len32(out.len() - 4);
            put(&mut out, 0, &len.to_be_bytes());
            return Ok(out);
        }
        1 if has_actions => return Err(Sense::invalid_cdb(2, 2)),
        1 => rows().next(),
        2 if !has_actions && rows().next().is_some() => return Err(Sense::invalid_cdb(2, 2)),
        2 => rows().find(|o| o.action == Some(action)),
        3 => rows().find(|o| o.action.unwrap_or(0) == action),
        _ => return Err(Sense::invalid_cdb(2, 2)),
    };
    let mut out = vec![0; 4];
    match one {
        Some(o) => {
            let len = cdb_len(o.code);
            out[1] = 3 | if rctd { 0x80 } else { 0 };
            out[3] = len.to_le_bytes()[0];
            out.extend_from_slice(&o.usage[..len]);
            if rctd {
                out.extend_from_slice(&timeouts());
            }
        }
        None => out[1] = 1,
    }
    Ok(out)
}

/// A command timeouts descriptor.
fn timeouts() -> [u8; TIMEOUTS_LEN as usize] {
    let mut d = [0; TIMEOUTS_LEN as usize];
    put(&mut d, 0, &(TIMEOUTS_LEN - 2).to_be_bytes());
    put(&mut d, 4, &NOMINAL_TIMEOUT_S.to_be_bytes());
    put(&mut d, 8, &RECOMMENDED_TIMEOUT_S.to_be_bytes());
    d
}

/// The parameter data of REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS.
pub(crate) fn report_tmfs(cdb: &[u8; 16]) -> Vec<u8> {
    let extended = cdb[2] & 0x80 != 0;
    let mut out = vec![0; if extended { 16 } else { 4 }];
    // ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET.
    out[0] = 0x80 | 0x40 | 0x10 | 0x08;
    if extended {
        out[3] = 0x0c;
    }
    out
}

/// The allocation length of a command whose data the target makes.
pub(crate) fn allocation_len(cdb: &[u8; 16]) -> usize {
    (match cdb[0] {
        op::INQUIRY => u32::from(u16_at(cdb, 3)),
        op::REQUEST_SENSE | op::MODE_SENSE_6 => u32::from(cdb[4]),
        op::MODE_SENSE_10 | op::PERSISTENT_RESERVE_IN | op::READ_DEFECT_DATA_10 => {
            u32::from(u16_at(cdb, 7))
        }
        op::REPORT_LUNS | op::MAINTENANCE_IN | op::READ_DEFECT_DATA_12 => u32_at(cdb, 6),
        op::SERVICE_ACTION_IN_16 | op::THIRD_PARTY_COPY_IN => u32_at(cdb, 10),
        _ => u32::MAX,
    }) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::cdb::cdb;

    #[test]
    fn the_table_is_in_order() {
        let keys: Vec<_> = OPCODES.iter().map(|o| (o.code, o.action)).collect();
        assert!(keys.is_sorted() && keys.windows(2).all(|w| w[0] != w[1]));
    }

    #[test]
    fn what_a_cdb_may_not_hold_is_pointed_at() {
        assert!(check(&cdb(&[0x28, 0x18, 0, 0, 0, 0, 0, 0, 1, 0])).is_ok());
        let err = |bytes: &[u8]| check(&cdb(bytes)).unwrap_err();
        assert_eq!(err(&[0x28, 0x20]), Sense::invalid_cdb(1, 5), "RDPROTECT");
        assert_eq!(err(&[0x00, 0, 0, 0, 0, 0x04]), Sense::invalid_cdb(5, 2), "NACA");
        assert_eq!(err(&[0x5e, 0x04]), Sense::invalid_cdb(1, 4), "a service action");
        assert_eq!(err(&[0x48, 0x03]), Sense::invalid_cdb(1, 4), "CRYPTOGRAPHIC ERASE");
        assert_eq!(err(&[0x48, 0x41]), Sense::invalid_cdb(1, 6), "ZNR");
        assert_eq!(err(&[0x04]), Sense::INVALID_OPCODE, "FORMAT UNIT");
        assert_eq!(err(&[0xff]), Sense::INVALID_OPCODE);
    }

    #[test]
    fn one_command_is_told_with_its_usage_and_timeouts() {
        let report = |bytes: &[u8]| report(&cdb(bytes), true);
        let one = report(&[0xa3, 0x0c, 0x81, 0x28, 0, 0, 0, 0, 1, 0]).unwrap();
        assert_eq!(one[..6], [0, 0x83, 0, 10, 0x28, 0x18]);
        assert_eq!(one.len(), 4 + 10 + 12);
        assert_eq!(one[14..16], [0, 10]);
        let none = report(&[0xa3, 0x0c, 0x01, 0x04]).unwrap();
        assert_eq!(none, [0, 1, 0, 0]);
        let wrong = report(&[0xa3, 0x0c, 0x01, 0x5e]);
        assert_eq!(wrong, Err(Sense::invalid_cdb(2, 2)), "it has service actions");
        let all = report(&[0xa3, 0x0c, 0x80]).unwrap();
        assert_eq!(all.len(), 4 + OPCODES.len() * 20);
        assert_eq!(u32_at(&all, 0) as usize, OPCODES.len() * 20);
    }

    #[test]
    fn what_a_unit_does_not_do_is_not_told() {
        let one = cdb(&[0xa3, 0x0c, 0x01, op::WRITE_ATOMIC_16]);
        assert_eq!(report(&one, true).unwrap()[1], 3);
        assert_eq!(report(&one, false).unwrap(), [0, 1, 0, 0]);
        let all = report(&cdb(&[0xa3, 0x0c]), false).unwrap();
        assert_eq!(all.len(), 4 + (OPCODES.len() - 1) * 8);
    }
}
