//! How a command ends: status, and sense data (SPC-5, section 4.4).

use cairn_block::IoStatus;

use crate::wire::put;

/// Sense keys.
pub mod key {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const NO_SENSE: u8 = 0x0;
    pub const NOT_READY: u8 = 0x2;
    pub const MEDIUM_ERROR: u8 = 0x3;
    pub const HARDWARE_ERROR: u8 = 0x4;
    pub const ILLEGAL_REQUEST: u8 = 0x5;
    pub const UNIT_ATTENTION: u8 = 0x6;
    pub const DATA_PROTECT: u8 = 0x7;
    pub const COPY_ABORTED: u8 = 0xa;
    pub const ABORTED_COMMAND: u8 = 0xb;
    pub const MISCOMPARE: u8 = 0xe;
}

/// The most bytes of sense data that are ever made.
pub const MAX_SENSE_LEN: usize = 32;

/// Where in a request the fault lies: the field pointer of ILLEGAL REQUEST.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldPointer {
    /// C/D: in the CDB; otherwise in the parameter data.
    pub in_cdb: bool,
    /// The byte.
    pub byte: u16,
    /// The most significant bit of the field, where that is known.
    pub bit: Option<u8>,
}

/// Sense data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
    /// Additional sense code qualifier.
    pub ascq: u8,
    /// INFORMATION, where it is valid.
    pub information: Option<u64>,
    /// Where the fault lies.
    pub field: Option<FieldPointer>,
    /// PROGRESS INDICATION: how much is done, in 65536ths.
    pub progress: Option<u16>,
}

impl Sense {
    /// Nothing to tell.
    pub const NONE: Self = Self::new(key::NO_SENSE, 0, 0);
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: Self =
        Self::new(key::ILLEGAL_REQUEST, 0x20, 0).with_field(true, 0, None);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(key::ILLEGAL_REQUEST, 0x21, 0);
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const LUN_NOT_SUPPORTED: Self = Self::new(key::ILLEGAL_REQUEST, 0x25, 0);
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LIST_LENGTH: Self = Self::new(key::ILLEGAL_REQUEST, 0x1a, 0);
    /// INVALID FIELD IN COMMAND INFORMATION UNIT: the transport's lengths and the CDB's disagree.
    pub const INVALID_INFORMATION_UNIT: Self = Self::new(key::ILLEGAL_REQUEST, 0x0e, 0x03);
    /// INVALID RELEASE OF PERSISTENT RESERVATION.
    pub const INVALID_RELEASE: Self = Self::new(key::ILLEGAL_REQUEST, 0x26, 0x04);
    /// INSUFFICIENT REGISTRATION RESOURCES.
    pub const INSUFFICIENT_REGISTRATIONS: Self = Self::new(key::ILLEGAL_REQUEST, 0x55, 0x04);
    /// COMMAND SEQUENCE ERROR: something else has to be done first.
    pub const COMMAND_SEQUENCE: Self = Self::new(key::ILLEGAL_REQUEST, 0x2c, 0);
    /// SANITIZE COMMAND FAILED.
    pub const SANITIZE_FAILED: Self = Self::new(key::MEDIUM_ERROR, 0x31, 0x03);
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const SAVING_NOT_SUPPORTED: Self = Self::new(key::ILLEGAL_REQUEST, 0x39, 0);
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: Self = Self::new(key::DATA_PROTECT, 0x27, 0);
    /// SPACE ALLOCATION FAILED WRITE PROTECT.
    pub const NO_SPACE: Self = Self::new(key::DATA_PROTECT, 0x27, 0x07);
    /// MEDIUM REMOVAL PREVENTED.
    pub const REMOVAL_PREVENTED: Self = Self::new(key::ILLEGAL_REQUEST, 0x53, 0x02);
    /// MEDIUM NOT PRESENT.
    pub const MEDIUM_NOT_PRESENT: Self = Self::new(key::NOT_READY, 0x3a, 0);
    /// Data came at the wrong place.
    pub const DATA_PHASE_ERROR: Self = Self::new(key::ABORTED_COMMAND, 0x4b, 0);
    /// UNEXPECTED UNSOLICITED DATA.
    pub const UNEXPECTED_UNSOLICITED: Self = Self::new(key::ABORTED_COMMAND, 0x0c, 0x0c);
    /// NOT ENOUGH UNSOLICITED DATA, and also too little solicited data.
    pub const NOT_ENOUGH_DATA: Self = Self::new(key::ABORTED_COMMAND, 0x0c, 0x0d);
    /// PROTOCOL SERVICE CRC ERROR.
    pub const CRC_ERROR: Self = Self::new(key::ABORTED_COMMAND, 0x47, 0x05);

    /// Sense data of a key and a code.
    #[must_use]
    pub const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq, information: None, field: None, progress: None }
    }

    /// INVALID FIELD IN CDB, with the byte and the field's most significant bit.
    #[must_use]
    pub const fn invalid_cdb(byte: u16, bit: u8) -> Self {
        Self::new(key::ILLEGAL_REQUEST, 0x24, 0).with_field(true, byte, Some(bit))
    }

    /// INVALID FIELD IN PARAMETER LIST, with the byte.
    #[must_use]
    pub const fn invalid_parameter(byte: u16) -> Self {
        Self::new(key::ILLEGAL_REQUEST, 0x26, 0).with_field(false, byte, None)
    }

    /// MISCOMPARE DURING VERIFY OPERATION at a byte of the data.
    #[must_use]
    pub const fn miscompare(offset: u64) -> Self {
        Self { information: Some(offset), ..Self::new(key::MISCOMPARE, 0x1d, 0) }
    }

    /// LOGICAL UNIT NOT READY, SANITIZE IN PROGRESS, with how much is done.
    #[must_use]
    pub const fn sanitizing(progress: u16) -> Self {
        Self { progress: Some(progress), ..Self::new(key::NOT_READY, 0x04, 0x1b) }
    }

    /// The same with a field pointer.
    #[must_use]
    pub const fn with_field(self, in_cdb: bool, byte: u16, bit: Option<u8>) -> Self {
        Self { field: Some(FieldPointer { in_cdb, byte, bit }), ..self }
    }

    /// The bytes of the sense data, in descriptor or in fixed format, and how many.
    #[must_use]
    pub fn encode(&self, descriptors: bool) -> ([u8; MAX_SENSE_LEN], usize) {
        let mut b = [0; MAX_SENSE_LEN];
        let field = self.field.map(|f| {
            let bit = f.bit.map_or(0, |bit| 0x08 | bit & 7);
            let [high, low] = f.byte.to_be_bytes();
            [0x80 | if f.in_cdb { 0x40 } else { 0 } | bit, high, low]
        });
        // Sense key specific: of ILLEGAL REQUEST the one, of NOT READY the other.
        let progress = self.progress.map(u16::to_be_bytes).map(|[high, low]| [0x80, high, low]);
        let specific = field.or(progress);
        if !descriptors {
            b[0] = 0x70;
            // INFORMATION is four bytes here: what does not fit is not told.
            if let Some(info) = self.information.and_then(|i| u32::try_from(i).ok()) {
                b[0] |= 0x80;
                put(&mut b, 3, &info.to_be_bytes());
            }
            b[2] = self.key;
            b[7] = 10;
            b[12] = self.asc;
            b[13] = self.ascq;
            if let Some(specific) = specific {
                put(&mut b, 15, &specific);
            }
            return (b, 18);
        }
        b[0] = 0x72;
        b[1] = self.key;
        b[2] = self.asc;
        b[3] = self.ascq;
        let mut at = 8;
        if let Some(info) = self.information {
            put(&mut b, at, &[0x00, 0x0a, 0x80]);
            put(&mut b, at + 4, &info.to_be_bytes());
            at += 12;
        }
        if let Some(specific) = specific {
            put(&mut b, at, &[0x02, 0x06]);
            put(&mut b, at + 4, &specific);
            at += 8;
        }
        b[7] = u8::try_from(at - 8).unwrap_or(0);
        (b, at)
    }
}

/// How a command ends (SAM-5, section 5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// GOOD.
    Good,
    /// CHECK CONDITION, with its sense data.
    Check(Sense),
    /// CONDITION MET.
    ConditionMet,
    /// BUSY.
    Busy,
    /// RESERVATION CONFLICT.
    ReservationConflict,
    /// TASK SET FULL.
    TaskSetFull,
    /// TASK ABORTED.
    TaskAborted,
}

impl Status {
    /// The status byte.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Good => 0x00,
            Self::Check(_) => 0x02,
            Self::ConditionMet => 0x04,
            Self::Busy => 0x08,
            Self::ReservationConflict => 0x18,
            Self::TaskSetFull => 0x28,
            Self::TaskAborted => 0x40,
        }
    }

    /// How a request of the disk shows to an initiator.
    #[must_use]
    pub const fn of(status: IoStatus) -> Self {
        let sense = match status {
            IoStatus::Ok => return Self::Good,
            // Try again, elsewhere perhaps.
            IoStatus::NotReady => Sense::new(key::NOT_READY, 0x04, 0x01),
            IoStatus::PathError | IoStatus::Fenced => {
                // Asymmetric access state transition: multipath tries another path, or later.
                Sense::new(key::NOT_READY, 0x04, 0x0a)
            }
            IoStatus::OutOfRange => Sense::LBA_OUT_OF_RANGE,
            IoStatus::InvalidField => Sense::new(key::ILLEGAL_REQUEST, 0x24, 0),
            IoStatus::Unsupported => Sense::INVALID_OPCODE,
            IoStatus::MediaError => Sense::new(key::MEDIUM_ERROR, 0x11, 0),
            IoStatus::NoSpace => Sense::NO_SPACE,
            IoStatus::TransferError => Sense::CRC_ERROR,
            IoStatus::TimedOut | IoStatus::Aborted => Sense::new(key::ABORTED_COMMAND, 0, 0x06),
            IoStatus::Internal => Sense::new(key::HARDWARE_ERROR, 0x44, 0),
        };
        Self::Check(sense)
    }
}

impl From<Sense> for Status {
    fn from(sense: Sense) -> Self {
        Self::Check(sense)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_sense_points_at_the_field() {
        let (bytes, len) = Sense::invalid_cdb(1, 4).encode(false);
        assert_eq!(bytes[..len], [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xcc, 0, 1]);
        let (bytes, _) = Sense::miscompare(0x1234).encode(false);
        assert_eq!(bytes[..7], [0xf0, 0, 0xe, 0, 0, 0x12, 0x34]);
    }

    #[test]
    fn progress_is_told_in_both_formats() {
        let sense = Sense::sanitizing(0x1234);
        let (bytes, len) = sense.encode(false);
        assert_eq!((bytes[2], bytes[12], bytes[13], len), (2, 0x04, 0x1b, 18));
        assert_eq!(bytes[15..18], [0x80, 0x12, 0x34]);
        let (bytes, len) = sense.encode(true);
        assert_eq!(
            bytes[..len],
            [0x72, 2, 0x04, 0x1b, 0, 0, 0, 8, 2, 6, 0, 0, 0x80, 0x12, 0x34, 0]
        );
    }

    #[test]
    fn descriptor_sense_has_room_for_more() {
        let (bytes, len) = Sense::miscompare(1 << 40).encode(true);
        assert_eq!(
            bytes[..len],
            [0x72, 0xe, 0x1d, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 1, 0, 0, 0, 0, 0]
        );
        let (bytes, _) = Sense::miscompare(1 << 40).encode(false);
        assert_eq!(bytes[0], 0x70, "an offset that does not fit is not told");
        let sense = Sense { information: Some(1), ..Sense::invalid_parameter(7) };
        let (bytes, len) = sense.encode(true);
        assert_eq!((len, bytes[7]), (28, 20));
        assert_eq!(bytes[20..28], [2, 6, 0, 0, 0x80, 0, 7, 0]);
    }
}
