//! Persistent reservations as SCSI has them (SPC-5, section 5.14): what is asked, and what is told.

use cairn_block::reservation::{
    Action, Change, Notice, Refusal, Registrant, ReservationType, Reservations,
};

use super::opcodes::allocation_len;
use super::sense::{Sense, Status};
use super::unit::Attention;
use crate::wire::{len32, put, u64_at};

/// Bytes of the parameter list of PERSISTENT RESERVE OUT.
const OUT_LEN: usize = 24;

/// The TransportID of a registrant, and the relative identifier of its target port.
fn transport_id(registrant: &Registrant) -> (Vec<u8>, u16) {
    // Protocol iSCSI: with an initiator session id, or a name alone. There is no other protocol to
    // tell of a host of NVMe with: it has its name, and no port here.
    let (format, text, port) = match registrant {
        Registrant::Iscsi { initiator, isid, port_group } => {
            (0x45, format!("{initiator},i,{}", crate::text::hex(isid)), *port_group)
        }
        Registrant::Nvme { host_nqn, .. } => (0x05, host_nqn.clone(), 0),
    };
    let mut out = vec![format, 0, 0, 0];
    out.extend_from_slice(text.as_bytes());
    // At least one NUL, up to a whole word.
    let len = (text.len() + 1).next_multiple_of(4).max(20);
    out.resize(4 + len, 0);
    put(&mut out, 2, &u16::try_from(len).unwrap_or(0).to_be_bytes());
    (out, port)
}

/// PERSISTENT RESERVE IN: what an initiator wants to know of the reservations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReserveIn {
    action: u8,
    allocation_len: usize,
}

impl ReserveIn {
    /// Of a CDB that the table of operation codes lets through.
    pub(crate) fn of(cdb: &[u8; 16]) -> Self {
        Self { action: cdb[1] & 0x1f, allocation_len: allocation_len(cdb) }
    }

    /// The parameter data, cut to the allocation length.
    pub(crate) fn answer(self, table: &Reservations) -> Vec<u8> {
        let mut data = report(table, self.action);
        data.truncate(self.allocation_len);
        data
    }
}

/// The parameter data of PERSISTENT RESERVE IN.
fn report(table: &Reservations, action: u8) -> Vec<u8> {
    const READ_KEYS: u8 = 0;
    const READ_RESERVATION: u8 = 1;
    const REPORT_CAPABILITIES: u8 = 2;
    if action == REPORT_CAPABILITIES {
        // PTPL_C; TMV with all six types; PTPL_A.
        return vec![0, 8, 0x01, 0x80 | u8::from(table.aptpl()), 0xea, 0x01, 0, 0];
    }
    let kind = table.reserved().map_or(0, ReservationType::scsi_code);
    let mut out = vec![0; 8];
    put(&mut out, 0, &table.generation().to_be_bytes());
    match action {
        READ_KEYS => {
            for r in table.registrations() {
                out.extend_from_slice(&r.key.to_be_bytes());
            }
        }
        READ_RESERVATION if kind != 0 => {
            let mut d = [0; 16];
            put(&mut d, 0, &table.holder().map_or(0, |r| r.key).to_be_bytes());
            d[13] = kind;
            out.extend_from_slice(&d);
        }
        READ_RESERVATION => {}
        _ => {
            for r in table.registrations() {
                let (id, port) = transport_id(&r.registrant);
                let mut d = [0; 24];
                put(&mut d, 0, &r.key.to_be_bytes());
                if table.holds(r) {
                    (d[12], d[13]) = (1, kind);
                }
                put(&mut d, 18, &port.to_be_bytes());
                put(&mut d, 20, &len32(id.len()).to_be_bytes());
                out.extend_from_slice(&d);
                out.extend_from_slice(&id);
            }
        }
    }
    let len = len32(out.len() - 8);
    put(&mut out, 4, &len.to_be_bytes());
    out
}

/// What PERSISTENT RESERVE OUT asks to be changed, of a service action that the table of operation
/// codes lets through.
///
/// # Errors
/// What makes no sense, whatever is reserved.
pub(crate) fn change(
    registrant: &Registrant,
    cdb: &[u8; 16],
    list: &[u8],
) -> Result<Change, Sense> {
    const REGISTER: u8 = 0;
    const RESERVE: u8 = 1;
    const RELEASE: u8 = 2;
    const CLEAR: u8 = 3;
    const PREEMPT: u8 = 4;
    const PREEMPT_AND_ABORT: u8 = 5;
    const REGISTER_AND_IGNORE: u8 = 6;
    const APTPL: u8 = 0x01;
    if list.len() != OUT_LEN {
        return Err(Sense::PARAMETER_LIST_LENGTH);
    }
    let (key, action_key, flags) = (u64_at(list, 0), u64_at(list, 8), list[20]);
    let aptpl = Some(flags & APTPL != 0);
    let kind = || match (cdb[2] >> 4, ReservationType::from_scsi(cdb[2] & 0x0f)) {
        (0, Some(kind)) => Ok(kind),
        (0, None) => Err(Sense::invalid_cdb(2, 3)),
        _ => Err(Sense::invalid_cdb(2, 7)),
    };
    let action = match cdb[1] & 0x1f {
        // SPEC_I_PT and ALL_TG_PT are not offered.
        REGISTER | REGISTER_AND_IGNORE if flags & !APTPL != 0 => {
            return Err(Sense::invalid_parameter(20));
        }
        REGISTER => Action::Register { new_key: action_key, aptpl },
        REGISTER_AND_IGNORE => Action::RegisterAndIgnore { new_key: action_key, aptpl },
        RESERVE => Action::Reserve(kind()?),
        RELEASE => Action::Release(kind()?),
        CLEAR => Action::Clear,
        action @ (PREEMPT | PREEMPT_AND_ABORT) => {
            let abort = action == PREEMPT_AND_ABORT;
            Action::Preempt { victim: action_key, kind: kind()?, abort }
        }
        _ => return Err(Sense::invalid_cdb(1, 4)),
    };
    Ok(Change { registrant: registrant.clone(), key, action })
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Conflict => Self::ReservationConflict,
            Refusal::InvalidRelease => Sense::INVALID_RELEASE.into(),
            Refusal::InvalidKey => Sense::invalid_parameter(8).into(),
            Refusal::NoRoom => Sense::INSUFFICIENT_REGISTRATIONS.into(),
        }
    }
}

impl From<Notice> for Attention {
    fn from(notice: Notice) -> Self {
        match notice {
            Notice::ReservationsPreempted => Self::ReservationsPreempted,
            Notice::ReservationsReleased => Self::ReservationsReleased,
            Notice::RegistrationsPreempted => Self::RegistrationsPreempted,
        }
    }
}

#[cfg(test)]
mod tests;
