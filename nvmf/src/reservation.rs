//! Reservations as NVMe has them (NVMe Base, Reservations): what is asked, and what is told.
//!
//! Who is registered and what is reserved is [`Reservations`], one table of a volume for the hosts of all transports.

use cairn_block::Buf;
use cairn_block::reservation::{
    Action, Change, Notice, Refusal, Registrant, ReservationType, Reservations,
};

use crate::sqe::{Sqe, opcode};
use crate::status::Status;
use crate::wire::{put, u64_at};

/// RESCAP: all six types; persistence through a loss of power; IEKEY as since revision 1.3.
pub const CAPABILITIES: u8 = 0xff;
/// CNTLID of a host that may come by any controller.
const CNTLID_DYNAMIC: u16 = 0xffff;
/// Bytes of the Reservation Status Extended data structure before its registrants, and of each of these.
const RECORD_LEN: usize = 64;
/// Bytes of the Reservation Notification log page.
const LOG_LEN: usize = 64;

/// CDW11 of Reservation Report: Extended Data Structure.
const EDS: u32 = 1;
/// CDW10: Ignore Existing Key.
const IEKEY: u32 = 1 << 3;
const REGISTER: u32 = 0;
const UNREGISTER: u32 = 1;
const REPLACE: u32 = 2;
const ACQUIRE: u32 = 0;
const PREEMPT: u32 = 1;
const PREEMPT_AND_ABORT: u32 = 2;
const RELEASE: u32 = 0;
const CLEAR: u32 = 1;

/// What a host asks of the reservations of a namespace.
#[derive(Debug)]
pub enum Request {
    /// [`Reservations::apply`] the change, store what comes of it, and tell the hosts:
    /// [`Target::tell_reservations`](crate::target::Target::tell_reservations). Then, and where the effects abort
    /// anything once every request of the namespace that was handed out before has been completed, end the command;
    /// with [`refused`] where it is.
    Change(Change),
    /// Reservation Report: end the command with this buffer, filled by [`encode_report`].
    Report(Buf),
    /// Get Features, Reservation Persistence: end the command with [`Reservations::aptpl`] in DW0.
    Persistence,
}

/// How a command ends that would have changed the reservations.
#[must_use]
pub const fn refused(refusal: Refusal) -> Status {
    let status = match refusal {
        Refusal::Conflict => Status::RESERVATION_CONFLICT,
        Refusal::InvalidRelease | Refusal::InvalidKey => Status::INVALID_FIELD,
        // NVMe has no word for it.
        Refusal::NoRoom => Status::INTERNAL_ERROR,
    };
    status.with_dnr()
}

/// Bytes of the data of a command that changes the reservations.
const fn data_len(opcode: u8) -> usize {
    if opcode == opcode::RESERVATION_RELEASE { 8 } else { 16 }
}

/// What Reservation Register, Acquire or Release asks to be changed.
///
/// # Errors
/// What makes no sense, whatever is reserved.
pub(crate) fn change(registrant: Registrant, sqe: &Sqe, data: &[u8]) -> Result<Change, Status> {
    let invalid = Status::INVALID_FIELD.with_dnr();
    let code = sqe.opcode();
    let data = data.get(..data_len(code)).ok_or(Status::SGL_DATA_LENGTH_INVALID.with_dnr())?;
    let key = u64_at(data, 0);
    // NRKEY or PRKEY.
    let other = || u64_at(data, 8);
    let cdw10 = sqe.cdw(10);
    let ignore = cdw10 & IEKEY != 0;
    let [_, kind, ..] = cdw10.to_le_bytes();
    let kind = || ReservationType::from_nvme(kind).ok_or(invalid);
    let action = match (code, cdw10 & 7) {
        (opcode::RESERVATION_REGISTER, action) => {
            let aptpl = match cdw10 >> 30 {
                0 => None,
                2 => Some(false),
                3 => Some(true),
                _ => return Err(invalid),
            };
            match (action, other()) {
                (REGISTER | REPLACE, 0) => return Err(invalid),
                (REGISTER, new_key) => Action::Join { new_key, aptpl },
                (UNREGISTER, _) => Action::Replace { new_key: 0, aptpl, ignore },
                (REPLACE, new_key) => Action::Replace { new_key, aptpl, ignore },
                _ => return Err(invalid),
            }
        }
        _ if ignore => return Err(invalid),
        (opcode::RESERVATION_ACQUIRE, ACQUIRE) => Action::Reserve(kind()?),
        (opcode::RESERVATION_ACQUIRE, action @ (PREEMPT | PREEMPT_AND_ABORT)) => {
            let abort = action == PREEMPT_AND_ABORT;
            Action::Preempt { victim: other(), kind: kind()?, abort }
        }
        (opcode::RESERVATION_RELEASE, RELEASE) => Action::Release(kind()?),
        (opcode::RESERVATION_RELEASE, CLEAR) => Action::Clear,
        _ => return Err(invalid),
    };
    Ok(Change { registrant, key, action })
}

/// How many bytes a Reservation Report is to give.
///
/// # Errors
/// The data structure with host identifiers of 64 bits: those of fabrics have 128.
pub(crate) fn report_len(sqe: &Sqe) -> Result<u64, Status> {
    if sqe.cdw(11) & EDS == 0 {
        return Err(Status::HOST_ID_INCONSISTENT.with_dnr());
    }
    // NUMD, 0's based.
    Ok((u64::from(sqe.cdw(10)) + 1) * 4)
}

/// Writes the Reservation Status Extended data structure over `out`, as far as it goes. A registrant of another
/// transport has host identifier 0, which no host of NVMe can register with.
pub fn encode_report(table: &Reservations, out: &mut [u8]) {
    out.fill(0);
    let mut header = [0; RECORD_LEN];
    put(&mut header, 0, &table.generation().to_le_bytes());
    header[4] = table.reserved().map_or(0, ReservationType::nvme_code);
    let count = u16::try_from(table.registrations().len()).unwrap_or(u16::MAX);
    put(&mut header, 5, &count.to_le_bytes());
    header[9] = u8::from(table.aptpl());
    let registrants = table.registrations().iter().map(|r| {
        let mut record = [0; RECORD_LEN];
        put(&mut record, 0, &CNTLID_DYNAMIC.to_le_bytes());
        record[2] = u8::from(table.holds(r));
        put(&mut record, 8, &r.key.to_le_bytes());
        if let Registrant::Nvme { host_id, .. } = &r.registrant {
            put(&mut record, 16, &host_id.to_be_bytes());
        }
        record
    });
    let records = std::iter::once(header).chain(registrants);
    for (window, record) in out.chunks_mut(RECORD_LEN).zip(records) {
        window.copy_from_slice(&record[..window.len()]);
    }
}

/// Reservation Notification Log Page Type; also the bit of the Reservation Notification Mask.
pub(crate) const fn notice_code(notice: Notice) -> u8 {
    match notice {
        Notice::RegistrationsPreempted => 1,
        Notice::ReservationsReleased => 2,
        Notice::ReservationsPreempted => 3,
    }
}

/// The bits of the Reservation Notification Mask.
pub(crate) const NOTICES: u32 = 1 << 1 | 1 << 2 | 1 << 3;

/// What a host is told of a change that another made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Notification {
    /// Counts those of the controller.
    pub(crate) count: u64,
    pub(crate) notice: Notice,
    pub(crate) nsid: u32,
}

/// The Reservation Notification log page: the oldest notification, and how many more there are.
pub(crate) fn encode_log(first: Option<&Notification>, more: usize) -> Vec<u8> {
    let mut out = vec![0; LOG_LEN];
    if let Some(&Notification { count, notice, nsid }) = first {
        put(&mut out, 0, &count.to_le_bytes());
        out[8] = notice_code(notice);
        out[9] = u8::try_from(more).unwrap_or(u8::MAX);
        put(&mut out, 12, &nsid.to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests;
