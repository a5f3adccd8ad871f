//! How a command ended, in the words of the specification.

use core::fmt;

use cairn_block::IoStatus;

/// The Status field of a completion: SC in bits 7:0, SCT in 10:8, CRD, M, and DNR in bit 14.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Status(pub u16);

const DNR: u16 = 1 << 14;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// The specification's name of the status, where it is one that Cairn knows.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 & 0x7ff {
                    $($value => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// 00/00.
    SUCCESS = 0x000, "Successful Completion";
    /// 00/01.
    INVALID_OPCODE = 0x001, "Invalid Command Opcode";
    /// 00/02.
    INVALID_FIELD = 0x002, "Invalid Field in Command";
    /// 00/04.
    DATA_TRANSFER_ERROR = 0x004, "Data Transfer Error";
    /// 00/06.
    INTERNAL_ERROR = 0x006, "Internal Error";
    /// 00/07.
    ABORT_REQUESTED = 0x007, "Command Abort Requested";
    /// 00/08.
    ABORTED_SQ_DELETION = 0x008, "Command Aborted due to SQ Deletion";
    /// 00/0B.
    INVALID_NAMESPACE = 0x00b, "Invalid Namespace or Format";
    /// 00/0C.
    COMMAND_SEQUENCE_ERROR = 0x00c, "Command Sequence Error";
    /// 00/0F.
    SGL_DATA_LENGTH_INVALID = 0x00f, "Data SGL Length Invalid";
    /// 00/11.
    SGL_DESCRIPTOR_TYPE_INVALID = 0x011, "SGL Descriptor Type Invalid";
    /// 00/16.
    SGL_OFFSET_INVALID = 0x016, "SGL Offset Invalid";
    /// 00/1C.
    SANITIZE_FAILED = 0x01c, "Sanitize Failed";
    /// 00/1D.
    SANITIZE_IN_PROGRESS = 0x01d, "Sanitize In Progress";
    /// 00/18.
    HOST_ID_INCONSISTENT = 0x018, "Host Identifier Inconsistent Format";
    /// 00/1B.
    PREEMPTED_AND_ABORTED = 0x01b, "Command Aborted due to Preempt and Abort";
    /// 00/21.
    COMMAND_INTERRUPTED = 0x021, "Command Interrupted";
    /// 00/22.
    TRANSIENT_TRANSPORT_ERROR = 0x022, "Transient Transport Error";
    /// 00/80.
    LBA_OUT_OF_RANGE = 0x080, "LBA Out of Range";
    /// 00/81.
    CAPACITY_EXCEEDED = 0x081, "Capacity Exceeded";
    /// 00/82.
    NAMESPACE_NOT_READY = 0x082, "Namespace Not Ready";
    /// 00/83.
    RESERVATION_CONFLICT = 0x083, "Reservation Conflict";
    /// 01/05.
    AER_LIMIT_EXCEEDED = 0x105, "Asynchronous Event Request Limit Exceeded";
    /// 01/09.
    INVALID_LOG_PAGE = 0x109, "Invalid Log Page";
    /// 01/0D.
    FEATURE_NOT_SAVEABLE = 0x10d, "Feature Identifier Not Saveable";
    /// 01/0E.
    FEATURE_NOT_CHANGEABLE = 0x10e, "Feature Not Changeable";
    /// 01/80, of Connect.
    CONNECT_INCOMPATIBLE_FORMAT = 0x180, "Connect Incompatible Format";
    /// 01/81, of Connect.
    CONNECT_CONTROLLER_BUSY = 0x181, "Connect Controller Busy";
    /// 01/82, of Connect: DW0 says which parameter.
    CONNECT_INVALID_PARAMETERS = 0x182, "Connect Invalid Parameters";
    /// 01/84, of Connect.
    CONNECT_INVALID_HOST = 0x184, "Connect Invalid Host";
    /// 01/91, of Connect.
    AUTHENTICATION_REQUIRED = 0x191, "Authentication Required";
    /// 02/80.
    WRITE_FAULT = 0x280, "Write Fault";
    /// 02/81.
    UNRECOVERED_READ_ERROR = 0x281, "Unrecovered Read Error";
    /// 03/00.
    INTERNAL_PATH_ERROR = 0x300, "Internal Path Error";
    /// 03/01.
    ANA_PERSISTENT_LOSS = 0x301, "Asymmetric Access Persistent Loss";
    /// 03/02.
    ANA_INACCESSIBLE = 0x302, "Asymmetric Access Inaccessible";
    /// 03/03.
    ANA_TRANSITION = 0x303, "Asymmetric Access Transition";
    /// 03/60.
    CONTROLLER_PATHING_ERROR = 0x360, "Controller Pathing Error";
}

impl Status {
    /// The status in a completion's 16-bit field, which holds the phase tag in bit 0.
    #[must_use]
    pub const fn from_wire(field: u16) -> Self {
        Self(field >> 1)
    }

    /// The 16-bit field of a completion. The phase tag is 0: fabrics has none.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        self.0 << 1
    }

    /// Status Code.
    #[must_use]
    pub const fn sc(self) -> u8 {
        self.0.to_le_bytes()[0]
    }

    /// Status Code Type.
    #[must_use]
    pub const fn sct(self) -> u8 {
        self.0.to_le_bytes()[1] & 7
    }

    /// Do Not Retry.
    #[must_use]
    pub const fn dnr(self) -> bool {
        self.0 & DNR != 0
    }

    /// This status with Do Not Retry set.
    #[must_use]
    pub const fn with_dnr(self) -> Self {
        Self(self.0 | DNR)
    }

    /// Whether SCT and SC are both 0.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// Whether SCT and SC are those of `other`, whatever DNR says.
    #[must_use]
    pub const fn is(self, other: Self) -> bool {
        self.0 & 0x7ff == other.0 & 0x7ff
    }

    /// What the status means to a block request.
    #[must_use]
    pub const fn io_status(self) -> IoStatus {
        match Self(self.0 & 0x7ff) {
            Self::SUCCESS => IoStatus::Ok,
            Self::LBA_OUT_OF_RANGE => IoStatus::OutOfRange,
            Self::INVALID_FIELD
            | Self::SGL_DATA_LENGTH_INVALID
            | Self::SGL_DESCRIPTOR_TYPE_INVALID
            | Self::SGL_OFFSET_INVALID => IoStatus::InvalidField,
            Self::INVALID_OPCODE => IoStatus::Unsupported,
            Self::CAPACITY_EXCEEDED => IoStatus::NoSpace,
            Self::CONTROLLER_PATHING_ERROR => IoStatus::Fenced,
            Self::COMMAND_INTERRUPTED => IoStatus::TimedOut,
            Self::NAMESPACE_NOT_READY | Self::INVALID_NAMESPACE => IoStatus::NotReady,
            Self::TRANSIENT_TRANSPORT_ERROR | Self::DATA_TRANSFER_ERROR => IoStatus::TransferError,
            Self::ABORT_REQUESTED | Self::ABORTED_SQ_DELETION | Self::PREEMPTED_AND_ABORTED => {
                IoStatus::Aborted
            }
            other => match other.sct() {
                2 => IoStatus::MediaError,
                3 => IoStatus::PathError,
                _ => IoStatus::Internal,
            },
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name().unwrap_or("Unknown Status");
        write!(f, "{name} ({:02X}/{:02X}h", self.sct(), self.sc())?;
        if self.dnr() {
            f.write_str(", DNR")?;
        }
        f.write_str(")")
    }
}

/// The completion status of a block request that ended as `io`; [`Status::io_status`] undoes it.
///
/// What another path or a later try may cure carries no DNR, so that a host retries instead of
/// giving an error to its user. A medium error is Unrecovered Read Error: hosts treat Write Fault
/// alike.
#[must_use]
pub const fn status_of(io: IoStatus) -> Status {
    match io {
        IoStatus::Ok => Status::SUCCESS,
        IoStatus::OutOfRange => Status::LBA_OUT_OF_RANGE.with_dnr(),
        IoStatus::InvalidField => Status::INVALID_FIELD.with_dnr(),
        IoStatus::Unsupported => Status::INVALID_OPCODE.with_dnr(),
        IoStatus::MediaError => Status::UNRECOVERED_READ_ERROR.with_dnr(),
        IoStatus::NoSpace => Status::CAPACITY_EXCEEDED.with_dnr(),
        IoStatus::Fenced => Status::CONTROLLER_PATHING_ERROR,
        IoStatus::PathError => Status::INTERNAL_PATH_ERROR,
        IoStatus::TimedOut => Status::COMMAND_INTERRUPTED,
        IoStatus::NotReady => Status::NAMESPACE_NOT_READY,
        IoStatus::TransferError => Status::TRANSIENT_TRANSPORT_ERROR,
        IoStatus::Aborted => Status::ABORT_REQUESTED,
        IoStatus::Internal => Status::INTERNAL_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_io_status_survives_the_wire() {
        for io in [
            IoStatus::Ok,
            IoStatus::OutOfRange,
            IoStatus::InvalidField,
            IoStatus::Unsupported,
            IoStatus::MediaError,
            IoStatus::NoSpace,
            IoStatus::Fenced,
            IoStatus::PathError,
            IoStatus::TimedOut,
            IoStatus::NotReady,
            IoStatus::TransferError,
            IoStatus::Aborted,
            IoStatus::Internal,
        ] {
            let status = Status::from_wire(status_of(io).to_wire());
            assert_eq!(status.io_status(), io, "{status}");
        }
        for io in [IoStatus::PathError, IoStatus::NotReady, IoStatus::Fenced] {
            assert!(!status_of(io).dnr());
        }
    }

    #[test]
    fn a_status_reads_as_the_specification_writes_it() {
        let status = Status::LBA_OUT_OF_RANGE.with_dnr();
        assert_eq!(status.to_string(), "LBA Out of Range (00/80h, DNR)");
        assert_eq!(Status(0x7ff).to_string(), "Unknown Status (07/FFh)");
        assert_eq!((status.sct(), status.sc()), (0, 0x80));
        assert!(status.is(Status::LBA_OUT_OF_RANGE) && !status.is_success());
    }
}
