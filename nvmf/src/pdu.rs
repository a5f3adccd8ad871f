//! The PDUs of the TCP transport: headers as values, and their bytes.
//!
//! Source: NVMe/TCP transport specification, PDU definitions. All fields are little-endian.

use core::fmt;

use crate::sqe::{Cqe, Sqe};
use crate::wire::{put, u16_at, u32_at};

/// Bytes of the common header.
pub const COMMON_LEN: usize = 8;
/// Bytes of the longest header, ICReq, and a header digest.
pub const MAX_HEADER_LEN: usize = 132;
/// Bytes before the data at most: a command capsule's header padded to 36 dwords.
const MAX_PDO: usize = 144;
/// Bytes of a header or data digest.
pub const DIGEST_LEN: u32 = 4;
/// What a TermReq may hold of the header that caused it.
pub const MAX_TERM_DATA: u32 = 128;

/// HDGSTF: a header digest follows the header.
pub const FLAG_HDGST: u8 = 1;
/// DDGSTF: a data digest follows the data.
pub const FLAG_DDGST: u8 = 2;
/// LAST_PDU: no more data PDUs of this transfer.
pub const FLAG_LAST: u8 = 4;
/// SUCCESS: this C2HData stands for the capsule response too.
pub const FLAG_SUCCESS: u8 = 8;

/// PDU-Type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PduType {
    /// Initialize connection request.
    IcReq = 0x00,
    /// Initialize connection response.
    IcResp = 0x01,
    /// Host to controller terminate connection request.
    H2cTermReq = 0x02,
    /// Controller to host terminate connection request.
    C2hTermReq = 0x03,
    /// Command capsule.
    CapsuleCmd = 0x04,
    /// Response capsule.
    CapsuleResp = 0x05,
    /// Host to controller data.
    H2cData = 0x06,
    /// Controller to host data.
    C2hData = 0x07,
    /// Ready to transfer.
    R2t = 0x09,
}

impl PduType {
    /// The type of this code.
    #[must_use]
    pub const fn from_u8(code: u8) -> Option<Self> {
        Some(match code {
            0x00 => Self::IcReq,
            0x01 => Self::IcResp,
            0x02 => Self::H2cTermReq,
            0x03 => Self::C2hTermReq,
            0x04 => Self::CapsuleCmd,
            0x05 => Self::CapsuleResp,
            0x06 => Self::H2cData,
            0x07 => Self::C2hData,
            0x09 => Self::R2t,
            _ => return None,
        })
    }

    /// HLEN: bytes of the header without its digest.
    #[must_use]
    pub const fn hlen(self) -> u8 {
        match self {
            Self::IcReq | Self::IcResp => 128,
            Self::CapsuleCmd => 72,
            _ => 24,
        }
    }

    const fn carries_digests(self) -> bool {
        !matches!(self, Self::IcReq | Self::IcResp | Self::H2cTermReq | Self::C2hTermReq)
    }

    const fn carries_data(self) -> bool {
        matches!(self, Self::CapsuleCmd | Self::H2cData | Self::C2hData)
    }
}

/// Fatal Error Status of a TermReq.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Fes {
    /// A field of the header is wrong; FEI is its offset.
    InvalidHeaderField = 1,
    /// A PDU that has no place here.
    PduSequence = 2,
    /// The header digest does not match.
    HeaderDigest = 3,
    /// Data outside of the transfer.
    OutOfRange = 4,
    /// More data than was agreed.
    LimitExceeded = 5,
    /// A parameter that this side does not support; FEI is its offset.
    Unsupported = 6,
}

/// How a peer broke the protocol, as a TermReq tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct Violation {
    /// Fatal Error Status.
    pub fes: Fes,
    /// Fatal Error Information: a byte offset in the header, for the two that have one.
    pub fei: u32,
}

impl Violation {
    pub(crate) const fn field(fei: u32) -> Self {
        Self { fes: Fes::InvalidHeaderField, fei }
    }

    pub(crate) const fn unsupported(fei: u32) -> Self {
        Self { fes: Fes::Unsupported, fei }
    }

    pub(crate) const fn of(fes: Fes) -> Self {
        Self { fes, fei: 0 }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fes {
            Fes::InvalidHeaderField => write!(f, "a PDU header is wrong at byte {}", self.fei),
            Fes::PduSequence => f.write_str("a PDU came out of sequence"),
            Fes::HeaderDigest => f.write_str("a header digest does not match"),
            Fes::OutOfRange => f.write_str("a data PDU lies outside of its transfer"),
            Fes::LimitExceeded => f.write_str("a data PDU is longer than was agreed"),
            Fes::Unsupported => write!(f, "the parameter at byte {} is not supported", self.fei),
        }
    }
}

/// Which digests a connection uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digests {
    /// Header digests.
    pub header: bool,
    /// Data digests.
    pub data: bool,
}

impl Digests {
    /// The DGST field of ICReq and ICResp.
    #[must_use]
    pub const fn to_wire(self) -> u8 {
        self.header as u8 | (self.data as u8) << 1
    }

    /// From the DGST field; nothing where a reserved bit is set.
    #[must_use]
    pub const fn from_wire(field: u8) -> Option<Self> {
        if field > 3 {
            return None;
        }
        Some(Self { header: field & 1 != 0, data: field & 2 != 0 })
    }
}

/// Which part of a command's data follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transfer {
    /// CCCID: the command.
    pub cccid: u16,
    /// TTAG, for H2CData and R2T.
    pub ttag: u16,
    /// DATAO or R2TO: bytes from the start of the command's data.
    pub offset: u32,
    /// DATAL or R2TL, in bytes.
    pub len: u32,
}

/// What a PDU says, by type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// ICReq.
    IcReq {
        /// PDU Format Version.
        pfv: u16,
        /// Host PDU Data Alignment: dwords, 0's based.
        hpda: u8,
        /// DGST.
        dgst: u8,
        /// R2Ts a command may have outstanding, 0's based.
        maxr2t: u32,
    },
    /// ICResp.
    IcResp {
        /// PDU Format Version.
        pfv: u16,
        /// Controller PDU Data Alignment: dwords, 0's based.
        cpda: u8,
        /// DGST.
        dgst: u8,
        /// The most data in one H2CData, in bytes.
        maxh2cdata: u32,
    },
    /// H2CTermReq or C2HTermReq.
    TermReq {
        /// Whether the host sent it.
        from_host: bool,
        /// Fatal Error Status; any value, for it is the peer's.
        fes: u16,
        /// Fatal Error Information.
        fei: u32,
    },
    /// CapsuleCmd.
    CapsuleCmd(Sqe),
    /// CapsuleResp.
    CapsuleResp(Cqe),
    /// H2CData.
    H2cData(Transfer),
    /// C2HData.
    C2hData(Transfer),
    /// R2T.
    R2t(Transfer),
}

impl Body {
    /// The PDU type that says this.
    #[must_use]
    pub const fn kind(&self) -> PduType {
        match self {
            Self::IcReq { .. } => PduType::IcReq,
            Self::IcResp { .. } => PduType::IcResp,
            Self::TermReq { from_host: true, .. } => PduType::H2cTermReq,
            Self::TermReq { from_host: false, .. } => PduType::C2hTermReq,
            Self::CapsuleCmd(_) => PduType::CapsuleCmd,
            Self::CapsuleResp(_) => PduType::CapsuleResp,
            Self::H2cData(_) => PduType::H2cData,
            Self::C2hData(_) => PduType::C2hData,
            Self::R2t(_) => PduType::R2t,
        }
    }
}

/// The common header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Common {
    /// PDU-Type.
    pub kind: PduType,
    /// FLAGS.
    pub flags: u8,
    /// PDO: where the data begins, or 0.
    pub pdo: u8,
    /// PLEN: bytes of the PDU with digests and data.
    pub plen: u32,
}

impl Common {
    /// Checks the first eight bytes of a PDU: type, HLEN, PLEN, PDO and flags agree.
    ///
    /// # Errors
    /// `InvalidHeaderField` with the offset of the field.
    ///
    /// # Panics
    /// Where there are fewer than eight bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Violation> {
        let kind = PduType::from_u8(bytes[0]).ok_or(Violation::field(0))?;
        let common = Self { kind, flags: bytes[1], pdo: bytes[3], plen: u32_at(bytes, 4) };
        if !kind.carries_digests() && common.flags & (FLAG_HDGST | FLAG_DDGST) != 0 {
            return Err(Violation::field(1));
        }
        if bytes[2] != kind.hlen() {
            return Err(Violation::field(2));
        }
        let header = common.header_len();
        let plen_is_right = match kind {
            PduType::IcReq | PduType::IcResp | PduType::CapsuleResp | PduType::R2t => {
                common.plen == header
            }
            PduType::H2cTermReq | PduType::C2hTermReq => {
                common.plen >= header && common.plen <= header + MAX_TERM_DATA
            }
            PduType::CapsuleCmd => common.plen >= header,
            PduType::H2cData | PduType::C2hData => common.plen > header,
        };
        if !plen_is_right {
            return Err(Violation::field(4));
        }
        if kind.carries_data() && common.plen > header {
            let pdo = u32::from(common.pdo);
            if pdo < header || !pdo.is_multiple_of(4) {
                return Err(Violation::field(3));
            }
            if common.plen <= pdo + common.data_digest_len() {
                return Err(Violation::field(4));
            }
        }
        Ok(common)
    }

    /// Bytes of the header with its digest.
    #[must_use]
    pub const fn header_len(&self) -> u32 {
        self.kind.hlen() as u32 + if self.flags & FLAG_HDGST != 0 { DIGEST_LEN } else { 0 }
    }

    const fn data_digest_len(&self) -> u32 {
        if self.flags & FLAG_DDGST != 0 { DIGEST_LEN } else { 0 }
    }

    /// Bytes between the header and the data.
    #[must_use]
    pub const fn pad_len(&self) -> u32 {
        if self.kind.carries_data() && self.plen > self.header_len() {
            self.pdo as u32 - self.header_len()
        } else {
            0
        }
    }

    /// Bytes of data, without padding and digests.
    #[must_use]
    pub const fn data_len(&self) -> u32 {
        let body = self.plen - self.header_len();
        if body == 0 {
            0
        } else if self.kind.carries_data() {
            self.plen - self.pdo as u32 - self.data_digest_len()
        } else {
            body
        }
    }

    /// Whether a data digest ends the PDU.
    #[must_use]
    pub const fn has_data_digest(&self) -> bool {
        self.flags & FLAG_DDGST != 0 && self.plen > self.header_len()
    }
}

/// A whole header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// FLAGS.
    pub flags: u8,
    /// PDO.
    pub pdo: u8,
    /// PLEN.
    pub plen: u32,
    /// The rest, by type.
    pub body: Body,
}

impl Header {
    /// The header of a PDU with `data_len` bytes of data that begin on a multiple of
    /// `(alignment + 1) * 4` bytes: the receiver's HPDA or CPDA.
    #[must_use]
    pub fn new(body: Body, digests: Digests, data_len: u32, alignment: u8) -> Self {
        let kind = body.kind();
        let mut flags = 0;
        if kind.carries_digests() && digests.header {
            flags |= FLAG_HDGST;
        }
        if kind.carries_data() && digests.data && data_len > 0 {
            flags |= FLAG_DDGST;
        }
        let mut common = Common { kind, flags, pdo: 0, plen: 0 };
        let header = common.header_len();
        if !kind.carries_data() || data_len == 0 {
            common.plen = header + data_len;
        } else {
            let pdo = header.next_multiple_of((u32::from(alignment) + 1) * 4);
            common.pdo = u8::try_from(pdo).expect("PDA is at most 31: 128 bytes");
            common.plen = pdo + data_len + common.data_digest_len();
        }
        Self { flags, pdo: common.pdo, plen: common.plen, body }
    }

    /// With these flags as well.
    #[must_use]
    pub const fn with_flags(mut self, flags: u8) -> Self {
        self.flags |= flags;
        self
    }

    /// The common header.
    #[must_use]
    pub const fn common(&self) -> Common {
        Common { kind: self.body.kind(), flags: self.flags, pdo: self.pdo, plen: self.plen }
    }

    /// Reads a header from the start of `bytes`; what follows it is not looked at.
    ///
    /// # Errors
    /// `InvalidHeaderField`. Too few bytes are a wrong PLEN.
    pub fn decode(bytes: &[u8]) -> Result<Self, Violation> {
        if bytes.len() < COMMON_LEN {
            return Err(Violation::field(4));
        }
        let Common { kind, flags, pdo, plen } = Common::decode(bytes)?;
        let Some(bytes) = bytes.get(..usize::from(kind.hlen())) else {
            return Err(Violation::field(4));
        };
        let transfer = || Transfer {
            cccid: u16_at(bytes, 8),
            ttag: u16_at(bytes, 10),
            offset: u32_at(bytes, 12),
            len: u32_at(bytes, 16),
        };
        let body = match kind {
            PduType::IcReq => Body::IcReq {
                pfv: u16_at(bytes, 8),
                hpda: bytes[10],
                dgst: bytes[11],
                maxr2t: u32_at(bytes, 12),
            },
            PduType::IcResp => Body::IcResp {
                pfv: u16_at(bytes, 8),
                cpda: bytes[10],
                dgst: bytes[11],
                maxh2cdata: u32_at(bytes, 12),
            },
            PduType::H2cTermReq | PduType::C2hTermReq => Body::TermReq {
                from_host: kind == PduType::H2cTermReq,
                fes: u16_at(bytes, 8),
                fei: u32_at(bytes, 10),
            },
            PduType::CapsuleCmd => {
                Body::CapsuleCmd(Sqe::decode(&bytes[8..72]).ok_or(Violation::field(2))?)
            }
            PduType::CapsuleResp => {
                Body::CapsuleResp(Cqe::decode(&bytes[8..24]).ok_or(Violation::field(2))?)
            }
            PduType::H2cData => Body::H2cData(transfer()),
            PduType::C2hData => Body::C2hData(transfer()),
            PduType::R2t => Body::R2t(transfer()),
        };
        Ok(Self { flags, pdo, plen, body })
    }

    /// The bytes before the data: the header, its digest, and the padding up to PDO.
    #[must_use]
    pub fn encode(&self) -> Encoded {
        let common = self.common();
        let mut bytes = [0; MAX_PDO];
        bytes[0] = common.kind as u8;
        bytes[1] = self.flags;
        bytes[2] = common.kind.hlen();
        bytes[3] = self.pdo;
        put(&mut bytes, 4, &self.plen.to_le_bytes());
        match self.body {
            Body::IcReq { pfv, hpda: pda, dgst, maxr2t: limit }
            | Body::IcResp { pfv, cpda: pda, dgst, maxh2cdata: limit } => {
                put(&mut bytes, 8, &pfv.to_le_bytes());
                bytes[10] = pda;
                bytes[11] = dgst;
                put(&mut bytes, 12, &limit.to_le_bytes());
            }
            Body::TermReq { fes, fei, .. } => {
                put(&mut bytes, 8, &fes.to_le_bytes());
                put(&mut bytes, 10, &fei.to_le_bytes());
            }
            Body::CapsuleCmd(sqe) => put(&mut bytes, 8, &sqe.0),
            Body::CapsuleResp(cqe) => put(&mut bytes, 8, &cqe.0),
            Body::H2cData(t) | Body::C2hData(t) | Body::R2t(t) => {
                put(&mut bytes, 8, &t.cccid.to_le_bytes());
                put(&mut bytes, 10, &t.ttag.to_le_bytes());
                put(&mut bytes, 12, &t.offset.to_le_bytes());
                put(&mut bytes, 16, &t.len.to_le_bytes());
            }
        }
        if self.flags & FLAG_HDGST != 0 {
            let hlen = usize::from(common.kind.hlen());
            let digest = crc32c::crc32c(&bytes[..hlen]);
            put(&mut bytes, hlen, &digest.to_le_bytes());
        }
        Encoded { bytes, len: (common.header_len() + common.pad_len()) as usize }
    }
}

/// A header's bytes.
#[derive(Debug, Clone, Copy)]
pub struct Encoded {
    bytes: [u8; MAX_PDO],
    len: usize,
}

impl Encoded {
    /// The bytes to send before the data.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests;
