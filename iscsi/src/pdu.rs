//! The basic header segment of every PDU (RFC 7143, section 11), both ways.

use std::fmt;

use crate::wire::{put, put_u24, u16_at, u24_at, u32_at, u64_at};

/// Bytes of a basic header segment.
pub const BHS_LEN: usize = 48;
/// The most bytes of additional header segments.
pub const MAX_AHS_LEN: usize = 255 * 4;
/// A task tag that names nothing.
pub const NO_TAG: u32 = 0xffff_ffff;
/// Bytes of one digest.
pub const DIGEST_LEN: u32 = 4;

/// The six bits of an opcode.
pub mod opcode {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const NOP_OUT: u8 = 0x00;
    pub const SCSI_COMMAND: u8 = 0x01;
    pub const TASK_MANAGEMENT: u8 = 0x02;
    pub const LOGIN: u8 = 0x03;
    pub const TEXT: u8 = 0x04;
    pub const DATA_OUT: u8 = 0x05;
    pub const LOGOUT: u8 = 0x06;
    pub const SNACK: u8 = 0x10;
    pub const NOP_IN: u8 = 0x20;
    pub const SCSI_RESPONSE: u8 = 0x21;
    pub const TASK_MANAGEMENT_RESPONSE: u8 = 0x22;
    pub const LOGIN_RESPONSE: u8 = 0x23;
    pub const TEXT_RESPONSE: u8 = 0x24;
    pub const DATA_IN: u8 = 0x25;
    pub const LOGOUT_RESPONSE: u8 = 0x26;
    pub const R2T: u8 = 0x31;
    pub const ASYNC: u8 = 0x32;
    pub const REJECT: u8 = 0x3f;
}

/// Why a PDU is rejected (section 11.17.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RejectReason {
    /// The data digest does not match.
    DataDigestError = 0x02,
    /// SNACK needs an error recovery level above 0.
    SnackReject = 0x03,
    /// The peer broke the protocol.
    ProtocolError = 0x04,
    /// The opcode is not supported.
    CommandNotSupported = 0x05,
    /// Too many immediate commands, or no room for this one.
    ImmediateCommandReject = 0x06,
    /// The tag is in use.
    TaskInProgress = 0x07,
    /// A field makes no sense.
    InvalidPduField = 0x09,
}

/// The sequence numbers that a target's PDUs carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sn {
    /// StatSN.
    pub stat: u32,
    /// ExpCmdSN.
    pub exp_cmd: u32,
    /// MaxCmdSN.
    pub max_cmd: u32,
}

/// The sequence numbers that an initiator's requests carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CmdSn {
    /// CmdSN.
    pub cmd: u32,
    /// ExpStatSN.
    pub exp_stat: u32,
}

/// How much less or more there was to transfer than the initiator expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Residual {
    /// Exactly that.
    #[default]
    None,
    /// The target had less: the bytes that were not transferred.
    Underflow(u32),
    /// The target had more: the bytes that there was no room for.
    Overflow(u32),
}

impl Residual {
    /// What is left over where `actual` bytes meet an expected length of `expected`.
    #[must_use]
    pub fn of(actual: u64, expected: u32) -> Self {
        let expected = u64::from(expected);
        let width = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        match actual.cmp(&expected) {
            std::cmp::Ordering::Less => Self::Underflow(width(expected - actual)),
            std::cmp::Ordering::Equal => Self::None,
            std::cmp::Ordering::Greater => Self::Overflow(width(actual - expected)),
        }
    }

    fn bits(self) -> (u8, u32) {
        match self {
            Self::None => (0, 0),
            Self::Underflow(n) => (0x02, n),
            Self::Overflow(n) => (0x04, n),
        }
    }

    fn from_bits(flags: u8, count: u32) -> Self {
        match flags & 0x06 {
            0x02 => Self::Underflow(count),
            0x04 => Self::Overflow(count),
            _ => Self::None,
        }
    }
}

/// What is particular to each PDU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the specification's, by its names")]
pub enum Body {
    NopOut {
        ttt: u32,
        sn: CmdSn,
    },
    ScsiCommand {
        last: bool,
        read: bool,
        write: bool,
        attr: u8,
        edtl: u32,
        sn: CmdSn,
        cdb: [u8; 16],
    },
    TaskManagement {
        function: u8,
        rtt: u32,
        sn: CmdSn,
        ref_cmd_sn: u32,
    },
    Login(LoginRequest),
    Text {
        last: bool,
        more: bool,
        ttt: u32,
        sn: CmdSn,
    },
    DataOut {
        last: bool,
        ttt: u32,
        exp_stat_sn: u32,
        data_sn: u32,
        offset: u32,
    },
    Logout {
        reason: u8,
        cid: u16,
        sn: CmdSn,
    },
    Snack,
    NopIn {
        ttt: u32,
        sn: Sn,
    },
    ScsiResponse {
        response: u8,
        status: u8,
        sn: Sn,
        exp_data_sn: u32,
        residual: Residual,
    },
    TaskManagementResponse {
        response: u8,
        sn: Sn,
    },
    LoginResponse(LoginResponse),
    TextResponse {
        last: bool,
        more: bool,
        ttt: u32,
        sn: Sn,
    },
    DataIn {
        last: bool,
        status: Option<u8>,
        ttt: u32,
        sn: Sn,
        data_sn: u32,
        offset: u32,
        residual: Residual,
    },
    LogoutResponse {
        response: u8,
        sn: Sn,
        time2wait: u16,
        time2retain: u16,
    },
    R2t {
        ttt: u32,
        sn: Sn,
        r2t_sn: u32,
        offset: u32,
        len: u32,
    },
    Async {
        event: u8,
        vcode: u8,
        sn: Sn,
        parameters: [u16; 3],
    },
    Reject {
        reason: u8,
        sn: Sn,
    },
}

/// A Login Request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoginRequest {
    /// T: go on to `nsg`.
    pub transit: bool,
    /// C: the text goes on in the next PDU.
    pub more: bool,
    /// Current stage.
    pub csg: u8,
    /// Next stage, with T.
    pub nsg: u8,
    /// Version-max.
    pub version_max: u8,
    /// Version-min.
    pub version_min: u8,
    /// Initiator session id.
    pub isid: [u8; 6],
    /// Target session identifying handle; 0 for a new session.
    pub tsih: u16,
    /// Connection id.
    pub cid: u16,
    /// CmdSN and ExpStatSN.
    pub sn: CmdSn,
}

/// A Login Response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoginResponse {
    /// T: go on to `nsg`.
    pub transit: bool,
    /// C: the text goes on in the next PDU.
    pub more: bool,
    /// Current stage.
    pub csg: u8,
    /// Next stage, with T.
    pub nsg: u8,
    /// Initiator session id.
    pub isid: [u8; 6],
    /// Target session identifying handle.
    pub tsih: u16,
    /// StatSN, ExpCmdSN, MaxCmdSN.
    pub sn: Sn,
    /// Status-Class and Status-Detail.
    pub status: (u8, u8),
}

/// A header: what all PDUs have in common, and the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// I: immediate delivery.
    pub immediate: bool,
    /// Bytes of additional header segments.
    pub ahs_len: u32,
    /// Bytes of the data segment, without padding.
    pub data_len: u32,
    /// The logical unit's eight bytes, where the PDU has them.
    pub lun: u64,
    /// Initiator task tag.
    pub itt: u32,
    /// The rest.
    pub body: Body,
}

/// What is wrong with a header that cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownOpcode(pub u8);

impl fmt::Display for UnknownOpcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "opcode {:02x}h is none of iSCSI's", self.0)
    }
}

/// Bytes of additional header segments and of data, which follow any header, known or not.
#[must_use]
pub fn lengths(bhs: &[u8; BHS_LEN]) -> (u32, u32) {
    (u32::from(bhs[4]) * 4, u24_at(bhs, 5))
}

impl Header {
    /// A header without additional segments and with `data_len` bytes of data.
    #[must_use]
    pub fn new(itt: u32, data_len: u32, body: Body) -> Self {
        Self { immediate: false, ahs_len: 0, data_len, lun: 0, itt, body }
    }

    /// The same header with a logical unit.
    #[must_use]
    pub fn with_lun(self, lun: u64) -> Self {
        Self { lun, ..self }
    }

    /// Decodes 48 bytes.
    ///
    /// # Errors
    /// An opcode that nobody knows.
    pub fn decode(b: &[u8; BHS_LEN]) -> Result<Self, UnknownOpcode> {
        let cmd_sn = CmdSn { cmd: u32_at(b, 24), exp_stat: u32_at(b, 28) };
        let sn = Sn { stat: u32_at(b, 24), exp_cmd: u32_at(b, 28), max_cmd: u32_at(b, 32) };
        let ttt = u32_at(b, 20);
        let flags = b[1];
        let last = flags & 0x80 != 0;
        let more = flags & 0x40 != 0;
        let mut isid = [0; 6];
        isid.copy_from_slice(&b[8..14]);
        let body = match b[0] & 0x3f {
            opcode::NOP_OUT => Body::NopOut { ttt, sn: cmd_sn },
            opcode::SCSI_COMMAND => {
                let mut cdb = [0; 16];
                cdb.copy_from_slice(&b[32..48]);
                let (read, write) = (flags & 0x40 != 0, flags & 0x20 != 0);
                Body::ScsiCommand { last, read, write, attr: flags & 7, edtl: ttt, sn: cmd_sn, cdb }
            }
            opcode::TASK_MANAGEMENT => Body::TaskManagement {
                function: flags & 0x7f,
                rtt: ttt,
                sn: cmd_sn,
                ref_cmd_sn: u32_at(b, 32),
            },
            opcode::LOGIN => Body::Login(LoginRequest {
                transit: last,
                more,
                csg: flags >> 2 & 3,
                nsg: flags & 3,
                version_max: b[2],
                version_min: b[3],
                isid,
                tsih: u16_at(b, 14),
                cid: u16_at(b, 20),
                sn: cmd_sn,
            }),
            opcode::TEXT => Body::Text { last, more, ttt, sn: cmd_sn },
            opcode::DATA_OUT => Body::DataOut {
                last,
                ttt,
                exp_stat_sn: u32_at(b, 28),
                data_sn: u32_at(b, 36),
                offset: u32_at(b, 40),
            },
            opcode::LOGOUT => Body::Logout { reason: flags & 0x7f, cid: u16_at(b, 20), sn: cmd_sn },
            opcode::SNACK => Body::Snack,
            opcode::NOP_IN => Body::NopIn { ttt, sn },
            opcode::SCSI_RESPONSE => Body::ScsiResponse {
                response: b[2],
                status: b[3],
                sn,
                exp_data_sn: u32_at(b, 36),
                residual: Residual::from_bits(flags, u32_at(b, 44)),
            },
            opcode::TASK_MANAGEMENT_RESPONSE => Body::TaskManagementResponse { response: b[2], sn },
            opcode::LOGIN_RESPONSE => Body::LoginResponse(LoginResponse {
                transit: last,
                more,
                csg: flags >> 2 & 3,
                nsg: flags & 3,
                isid,
                tsih: u16_at(b, 14),
                sn,
                status: (b[36], b[37]),
            }),
            opcode::TEXT_RESPONSE => Body::TextResponse { last, more, ttt, sn },
            opcode::DATA_IN => Body::DataIn {
                last,
                status: (flags & 1 != 0).then_some(b[3]),
                ttt,
                sn,
                data_sn: u32_at(b, 36),
                offset: u32_at(b, 40),
                residual: Residual::from_bits(flags, u32_at(b, 44)),
            },
            opcode::LOGOUT_RESPONSE => Body::LogoutResponse {
                response: b[2],
                sn,
                time2wait: u16_at(b, 40),
                time2retain: u16_at(b, 42),
            },
            opcode::R2T => Body::R2t {
                ttt,
                sn,
                r2t_sn: u32_at(b, 36),
                offset: u32_at(b, 40),
                len: u32_at(b, 44),
            },
            opcode::ASYNC => Body::Async {
                event: b[36],
                vcode: b[37],
                sn,
                parameters: [u16_at(b, 38), u16_at(b, 40), u16_at(b, 42)],
            },
            opcode::REJECT => Body::Reject { reason: b[2], sn },
            other => return Err(UnknownOpcode(other)),
        };
        let (ahs_len, data_len) = lengths(b);
        let has_lun = matches!(
            body,
            Body::NopOut { .. }
                | Body::ScsiCommand { .. }
                | Body::TaskManagement { .. }
                | Body::Text { .. }
                | Body::DataOut { .. }
                | Body::NopIn { .. }
                | Body::TextResponse { .. }
                | Body::DataIn { .. }
                | Body::R2t { .. }
                | Body::Async { .. }
        );
        Ok(Self {
            immediate: b[0] & 0x40 != 0,
            ahs_len,
            data_len,
            lun: if has_lun { u64_at(b, 8) } else { 0 },
            itt: u32_at(b, 16),
            body,
        })
    }

    /// The 48 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; BHS_LEN] {
        let mut b = [0; BHS_LEN];
        put(&mut b, 8, &self.lun.to_be_bytes());
        put(&mut b, 16, &self.itt.to_be_bytes());
        let (op, flags) = self.encode_body(&mut b);
        b[0] = op | if self.immediate { 0x40 } else { 0 };
        b[1] = flags;
        b[4] = (self.ahs_len / 4).to_le_bytes()[0];
        put_u24(&mut b, 5, self.data_len);
        b
    }

    /// The opcode and the flags; the other fields are put into `b`.
    fn encode_body(&self, b: &mut [u8; BHS_LEN]) -> (u8, u8) {
        const F: u8 = 0x80;
        let bit = |on: bool, mask: u8| if on { mask } else { 0 };
        let mut word = |at: usize, value: u32| put(b, at, &value.to_be_bytes());
        match self.body {
            Body::NopOut { ttt, sn } => {
                word(20, ttt);
                put_cmd_sn(b, sn);
                (opcode::NOP_OUT, F)
            }
            Body::ScsiCommand { last, read, write, attr, edtl, sn, cdb } => {
                word(20, edtl);
                put_cmd_sn(b, sn);
                put(b, 32, &cdb);
                (opcode::SCSI_COMMAND, bit(last, F) | bit(read, 0x40) | bit(write, 0x20) | attr)
            }
            Body::TaskManagement { function, rtt, sn, ref_cmd_sn } => {
                word(20, rtt);
                word(32, ref_cmd_sn);
                put_cmd_sn(b, sn);
                (opcode::TASK_MANAGEMENT, F | function)
            }
            Body::Login(l) => {
                b[2] = l.version_max;
                b[3] = l.version_min;
                put(b, 8, &l.isid);
                put(b, 14, &l.tsih.to_be_bytes());
                put(b, 20, &l.cid.to_be_bytes());
                put_cmd_sn(b, l.sn);
                (opcode::LOGIN, bit(l.transit, F) | bit(l.more, 0x40) | l.csg << 2 | l.nsg)
            }
            Body::Text { last, more, ttt, sn } => {
                word(20, ttt);
                put_cmd_sn(b, sn);
                (opcode::TEXT, bit(last, F) | bit(more, 0x40))
            }
            Body::DataOut { last, ttt, exp_stat_sn, data_sn, offset } => {
                word(20, ttt);
                word(28, exp_stat_sn);
                word(36, data_sn);
                word(40, offset);
                (opcode::DATA_OUT, bit(last, F))
            }
            Body::Logout { reason, cid, sn } => {
                put(b, 20, &cid.to_be_bytes());
                put_cmd_sn(b, sn);
                (opcode::LOGOUT, F | reason)
            }
            Body::Snack => (opcode::SNACK, F),
            Body::NopIn { ttt, sn } => {
                word(20, ttt);
                put_sn(b, sn);
                (opcode::NOP_IN, F)
            }
            Body::ScsiResponse { response, status, sn, exp_data_sn, residual } => {
                let (flags, count) = residual.bits();
                word(36, exp_data_sn);
                word(44, count);
                b[2] = response;
                b[3] = status;
                put_sn(b, sn);
                (opcode::SCSI_RESPONSE, F | flags)
            }
            Body::TaskManagementResponse { response, sn } => {
                b[2] = response;
                put_sn(b, sn);
                (opcode::TASK_MANAGEMENT_RESPONSE, F)
            }
            Body::LoginResponse(l) => {
                put(b, 8, &l.isid);
                put(b, 14, &l.tsih.to_be_bytes());
                put_sn(b, l.sn);
                b[36] = l.status.0;
                b[37] = l.status.1;
                (opcode::LOGIN_RESPONSE, bit(l.transit, F) | bit(l.more, 0x40) | l.csg << 2 | l.nsg)
            }
            Body::TextResponse { last, more, ttt, sn } => {
                word(20, ttt);
                put_sn(b, sn);
                (opcode::TEXT_RESPONSE, bit(last, F) | bit(more, 0x40))
            }
            Body::DataIn { last, status, ttt, sn, data_sn, offset, residual } => {
                let (flags, count) = residual.bits();
                word(20, ttt);
                word(36, data_sn);
                word(40, offset);
                word(44, count);
                b[3] = status.unwrap_or(0);
                put_sn(b, sn);
                (opcode::DATA_IN, bit(last, F) | flags | bit(status.is_some(), 1))
            }
            Body::LogoutResponse { response, sn, time2wait, time2retain } => {
                b[2] = response;
                put_sn(b, sn);
                put(b, 40, &time2wait.to_be_bytes());
                put(b, 42, &time2retain.to_be_bytes());
                (opcode::LOGOUT_RESPONSE, F)
            }
            Body::R2t { ttt, sn, r2t_sn, offset, len } => {
                word(20, ttt);
                word(36, r2t_sn);
                word(40, offset);
                word(44, len);
                put_sn(b, sn);
                (opcode::R2T, F)
            }
            Body::Async { event, vcode, sn, parameters } => {
                b[36] = event;
                b[37] = vcode;
                for (i, p) in parameters.iter().enumerate() {
                    put(b, 38 + 2 * i, &p.to_be_bytes());
                }
                put_sn(b, sn);
                (opcode::ASYNC, F)
            }
            Body::Reject { reason, sn } => {
                b[2] = reason;
                put_sn(b, sn);
                (opcode::REJECT, F)
            }
        }
    }
}

fn put_cmd_sn(b: &mut [u8; BHS_LEN], sn: CmdSn) {
    put(b, 24, &sn.cmd.to_be_bytes());
    put(b, 28, &sn.exp_stat.to_be_bytes());
}

fn put_sn(b: &mut [u8; BHS_LEN], sn: Sn) {
    put(b, 24, &sn.stat.to_be_bytes());
    put(b, 28, &sn.exp_cmd.to_be_bytes());
    put(b, 32, &sn.max_cmd.to_be_bytes());
}

/// The eight bytes of a single-level logical unit number: peripheral addressing below 256, flat
/// space above.
#[must_use]
pub fn encode_lun(lun: u16) -> u64 {
    if lun < 256 { u64::from(lun) << 48 } else { u64::from(0x4000 | lun & 0x3fff) << 48 }
}

/// The number in a logical unit's eight bytes, where it is a single-level one.
#[must_use]
pub fn decode_lun(raw: u64) -> Option<u16> {
    let [a, b, rest @ ..] = raw.to_be_bytes();
    if rest != [0; 6] {
        return None;
    }
    match a >> 6 {
        0 if a == 0 => Some(u16::from(b)),
        1 => Some(u16::from_be_bytes([a & 0x3f, b])),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
