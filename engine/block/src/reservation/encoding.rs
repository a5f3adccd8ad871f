//! Reservations as bytes: what a volume's voters keep.
//!
//! ```text
//!      0        1        2        3        4        5        6        7
//!  +--------+--------+--------+--------+--------+--------+--------+--------+
//!  |version |APTPL   |type    |holder  |          generation               |
//!  +--------+--------+--------+--------+--------+--------+--------+--------+
//!  then for each registration:
//!  |                                  key                                  |
//!  +--------+--------+--------+--------+--------+--------+--------+--------+
//!  |of what |name len|  isid (6 bytes), port group  or  host id (16 bytes)  |
//!  +--------+--------+--------+--------+--------+--------+--------+--------+
//!  |  ..., name
//! ```
//!
//! Little-endian, but for the host id, whose bytes are in the order of a UUID. `type` is SCSI's code, 0
//! where nothing is reserved; `holder` the position of who holds it, 0xff for nobody and for everybody.

use super::{Registrant, Registration, ReservationType, Reservations};

/// The most bytes that a volume's reservations take.
pub const MAX_ENCODED: usize = 1920;

const VERSION: u8 = 1;
const HEADER_LEN: usize = 8;
/// Bytes of a registration before what says who it is of: the key, of what it is, the name's length.
const KEY_LEN: usize = 10;
const ISCSI: u8 = 0;
const ISCSI_LEN: usize = 8;
const NVME: u8 = 1;
const NVME_LEN: usize = 16;
/// The longest name of an initiator or of a host.
const MAX_NAME_LEN: usize = 223;
const NO_HOLDER: u8 = 0xff;

/// Bytes that are no reservations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A later program stored them.
    #[error(
        "the volume's reservations are of version {0}, which this program does not know: upgrade it"
    )]
    UnknownVersion(u8),
    /// They make no sense.
    #[error("the volume's reservations make no sense at byte {0}: they are damaged")]
    Damaged(usize),
}

/// Takes fields off the front.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn damaged(&self) -> DecodeError {
        DecodeError::Damaged(self.at)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..len));
        let taken = taken.ok_or(self.damaged())?;
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
}

fn encoded_len(registrant: &Registrant) -> usize {
    let id = match registrant {
        Registrant::Iscsi { .. } => ISCSI_LEN,
        Registrant::Nvme { .. } => NVME_LEN,
    };
    KEY_LEN + id + registrant.name().len()
}

impl Reservations {
    fn encoded_len(&self) -> usize {
        let registrations = self.registrations.iter().map(|r| encoded_len(&r.registrant));
        HEADER_LEN + registrations.sum::<usize>()
    }

    pub(super) fn has_room_for(&self, who: &Registrant) -> bool {
        who.name().len() <= MAX_NAME_LEN && self.encoded_len() + encoded_len(who) <= MAX_ENCODED
    }

    /// At most [`MAX_ENCODED`] bytes that [`Reservations::decode`] reads.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let narrow = |n: usize| u8::try_from(n).expect("what is registered fits");
        let mut out = Vec::with_capacity(self.encoded_len());
        let holder = self.registrations.iter().position(|r| r.holder);
        out.push(VERSION);
        out.push(u8::from(self.aptpl));
        out.push(self.reserved.map_or(0, ReservationType::scsi_code));
        out.push(holder.map_or(NO_HOLDER, narrow));
        out.extend_from_slice(&self.generation.to_le_bytes());
        for r in &self.registrations {
            let name = r.registrant.name();
            out.extend_from_slice(&r.key.to_le_bytes());
            match &r.registrant {
                Registrant::Iscsi { isid, port_group, .. } => {
                    out.extend_from_slice(&[ISCSI, narrow(name.len())]);
                    out.extend_from_slice(isid);
                    out.extend_from_slice(&port_group.to_le_bytes());
                }
                Registrant::Nvme { host_id, .. } => {
                    out.extend_from_slice(&[NVME, narrow(name.len())]);
                    out.extend_from_slice(&host_id.to_be_bytes());
                }
            }
            out.extend_from_slice(name.as_bytes());
        }
        out
    }

    /// Reads what [`Reservations::encode`] wrote.
    ///
    /// # Errors
    /// Bytes that it does not write.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader { bytes, at: 0 };
        let [version, aptpl, kind, holder] = reader.array()?;
        if version != VERSION {
            return Err(DecodeError::UnknownVersion(version));
        }
        if aptpl > 1 || bytes.len() > MAX_ENCODED {
            return Err(DecodeError::Damaged(1));
        }
        let reserved = ReservationType::from_scsi(kind);
        if kind != 0 && reserved.is_none() {
            return Err(DecodeError::Damaged(2));
        }
        let generation = u32::from_le_bytes(reader.array()?);
        let mut table = Self { generation, aptpl: aptpl == 1, registrations: Vec::new(), reserved };
        while reader.at < bytes.len() {
            let at = reader.at;
            let (key, registrant) = registration(&mut reader)?;
            if key == 0 || table.find(&registrant).is_some() {
                return Err(DecodeError::Damaged(at));
            }
            let holder = usize::from(holder) == table.registrations.len();
            table.registrations.push(Registration { key, registrant, holder });
        }
        // Who holds it is registered; where all do, it is one at least.
        let has_holder = table.holder().is_some();
        let right = match reserved {
            None => !has_holder,
            Some(kind) if kind.is_held_by_all() => !has_holder && !table.is_empty(),
            Some(_) => has_holder,
        };
        if !right || has_holder == (holder == NO_HOLDER) {
            return Err(DecodeError::Damaged(3));
        }
        Ok(table)
    }
}

fn registration(reader: &mut Reader<'_>) -> Result<(u64, Registrant), DecodeError> {
    let key = u64::from_le_bytes(reader.array()?);
    let [of, name_len] = reader.array()?;
    let name = |reader: &mut Reader<'_>| {
        let at = reader.at;
        let text = std::str::from_utf8(reader.take(usize::from(name_len))?);
        match text {
            Ok(text) if text.len() <= MAX_NAME_LEN => Ok(text.to_owned()),
            _ => Err(DecodeError::Damaged(at)),
        }
    };
    let registrant = match of {
        ISCSI => {
            let isid = reader.array()?;
            let port_group = u16::from_le_bytes(reader.array()?);
            Registrant::Iscsi { initiator: name(reader)?, isid, port_group }
        }
        NVME => {
            let host_id = u128::from_be_bytes(reader.array()?);
            Registrant::Nvme { host_nqn: name(reader)?, host_id }
        }
        _ => return Err(reader.damaged()),
    };
    Ok((key, registrant))
}
