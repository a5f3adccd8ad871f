//! Submission and completion queue entries.

use core::fmt;

use crate::status::Status;
use crate::wire::{put, u16_at, u32_at, u64_at};

/// Opcodes and FCTYPEs.
pub mod opcode {
    /// Admin: Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Admin: Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Admin: Abort.
    pub const ABORT: u8 = 0x08;
    /// Admin: Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Admin: Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Admin: Asynchronous Event Request.
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    /// Admin: Keep Alive.
    pub const KEEP_ALIVE: u8 = 0x18;
    /// Fabrics, on any queue; FCTYPE says which.
    pub const FABRICS: u8 = 0x7f;
    /// The first vendor specific admin opcode.
    pub const VENDOR_FIRST: u8 = 0xc0;

    /// NVM: Flush.
    pub const FLUSH: u8 = 0x00;
    /// NVM: Write.
    pub const WRITE: u8 = 0x01;
    /// NVM: Read.
    pub const READ: u8 = 0x02;
    /// NVM: Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// NVM: Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// NVM: Verify.
    pub const VERIFY: u8 = 0x0c;
    /// Vendor specific: a Write that is done whole or not at all, whatever happens.
    pub const WRITE_ATOMIC: u8 = 0x81;
    /// I/O: Reservation Register.
    pub const RESERVATION_REGISTER: u8 = 0x0d;
    /// I/O: Reservation Report.
    pub const RESERVATION_REPORT: u8 = 0x0e;
    /// I/O: Reservation Acquire.
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    /// I/O: Reservation Release.
    pub const RESERVATION_RELEASE: u8 = 0x15;

    /// FCTYPE: Property Set.
    pub const PROPERTY_SET: u8 = 0x00;
    /// FCTYPE: Connect.
    pub const CONNECT: u8 = 0x01;
    /// FCTYPE: Property Get.
    pub const PROPERTY_GET: u8 = 0x04;
    /// FCTYPE: Disconnect.
    pub const DISCONNECT: u8 = 0x08;
}

/// Which way a command's data goes: bits 1:0 of its opcode, or of its FCTYPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// 00b.
    None,
    /// 01b.
    HostToController,
    /// 10b.
    ControllerToHost,
    /// 11b, which no supported command is.
    Both,
}

/// SGL descriptor type and subtype of data that follows in the capsule, offset 0.
pub const SGL_IN_CAPSULE: u8 = 0x01;
/// SGL descriptor type and subtype of data that the transport moves: R2T or C2HData.
pub const SGL_TRANSPORT: u8 = 0x5a;

/// The one SGL descriptor of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sgl {
    /// Address, or the offset in the capsule.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Type in bits 7:4, subtype in 3:0.
    pub kind: u8,
}

/// A submission queue entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Sqe(pub [u8; 64]);

impl Sqe {
    /// An entry of this opcode, PSDT = SGL, all else 0.
    #[must_use]
    pub const fn new(opcode: u8) -> Self {
        let mut bytes = [0; 64];
        bytes[0] = opcode;
        bytes[1] = 0x40;
        Self(bytes)
    }

    /// A Fabrics command.
    #[must_use]
    pub const fn fabrics(fctype: u8) -> Self {
        let mut sqe = Self::new(opcode::FABRICS);
        sqe.0[4] = fctype;
        sqe
    }

    /// The entry in these bytes; nothing where they are not 64.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Opcode.
    #[must_use]
    pub const fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// FUSE: 0 for a command that stands alone.
    #[must_use]
    pub const fn fuse(&self) -> u8 {
        self.0[1] & 3
    }

    /// PSDT: 1 for SGLs with a contiguous metadata buffer, which fabrics demands.
    #[must_use]
    pub const fn psdt(&self) -> u8 {
        self.0[1] >> 6
    }

    /// Command Identifier.
    #[must_use]
    pub fn cid(&self) -> u16 {
        u16_at(&self.0, 2)
    }

    /// Namespace Identifier.
    #[must_use]
    pub fn nsid(&self) -> u32 {
        u32_at(&self.0, 4)
    }

    /// Fabrics Command Type; it lies where other commands have the NSID.
    #[must_use]
    pub const fn fctype(&self) -> u8 {
        self.0[4]
    }

    /// SGL1.
    #[must_use]
    pub fn sgl(&self) -> Sgl {
        Sgl { address: u64_at(&self.0, 24), len: u32_at(&self.0, 32), kind: self.0[39] }
    }

    /// Command dword `n`, 10 to 15.
    #[must_use]
    pub fn cdw(&self, n: usize) -> u32 {
        u32_at(&self.0, 4 * n)
    }

    /// Command dwords 10 and 11 as one: the starting LBA.
    #[must_use]
    pub fn slba(&self) -> u64 {
        u64_at(&self.0, 40)
    }

    /// Which way the data goes.
    #[must_use]
    pub const fn direction(&self) -> Direction {
        let code = if self.opcode() == opcode::FABRICS { self.fctype() } else { self.opcode() };
        match code & 3 {
            0 => Direction::None,
            1 => Direction::HostToController,
            2 => Direction::ControllerToHost,
            _ => Direction::Both,
        }
    }

    /// With this command identifier.
    #[must_use]
    pub fn with_cid(mut self, cid: u16) -> Self {
        put(&mut self.0, 2, &cid.to_le_bytes());
        self
    }

    /// With this namespace.
    #[must_use]
    pub fn with_nsid(mut self, nsid: u32) -> Self {
        put(&mut self.0, 4, &nsid.to_le_bytes());
        self
    }

    /// With this command dword.
    #[must_use]
    pub fn with_cdw(mut self, n: usize, value: u32) -> Self {
        put(&mut self.0, 4 * n, &value.to_le_bytes());
        self
    }

    /// With this starting LBA.
    #[must_use]
    pub fn with_slba(mut self, lba: u64) -> Self {
        put(&mut self.0, 40, &lba.to_le_bytes());
        self
    }

    /// With this SGL.
    #[must_use]
    pub fn with_sgl(mut self, sgl: Sgl) -> Self {
        put(&mut self.0, 24, &sgl.address.to_le_bytes());
        put(&mut self.0, 32, &sgl.len.to_le_bytes());
        self.0[39] = sgl.kind;
        self
    }

    /// With bytes at an offset that only this command defines.
    #[must_use]
    pub fn with_bytes(mut self, at: usize, value: &[u8]) -> Self {
        put(&mut self.0, at, value);
        self
    }

    /// The 16-bit field at `at`, for fields that only one command defines.
    #[must_use]
    pub fn u16_at(&self, at: usize) -> u16 {
        u16_at(&self.0, at)
    }
}

impl fmt::Debug for Sqe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sqe(opcode {:02X}h, cid {}, nsid {})", self.opcode(), self.cid(), self.nsid())
    }
}

/// A completion queue entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cqe(pub [u8; 16]);

impl Cqe {
    /// The completion of command `cid`. `result` is DW0 and DW1.
    #[must_use]
    pub fn new(cid: u16, status: Status, result: u64, sqhd: u16) -> Self {
        let mut bytes = [0; 16];
        put(&mut bytes, 0, &result.to_le_bytes());
        put(&mut bytes, 8, &sqhd.to_le_bytes());
        put(&mut bytes, 12, &cid.to_le_bytes());
        put(&mut bytes, 14, &status.to_wire().to_le_bytes());
        Self(bytes)
    }

    /// The entry in these bytes; nothing where they are not 16.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// DW0 and DW1.
    #[must_use]
    pub fn result(&self) -> u64 {
        u64_at(&self.0, 0)
    }

    /// Submission Queue Head Pointer.
    #[must_use]
    pub fn sqhd(&self) -> u16 {
        u16_at(&self.0, 8)
    }

    /// Command Identifier.
    #[must_use]
    pub fn cid(&self) -> u16 {
        u16_at(&self.0, 12)
    }

    /// Status.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_wire(u16_at(&self.0, 14))
    }
}

impl fmt::Debug for Cqe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cqe(cid {}, {}, result {:#x})", self.cid(), self.status(), self.result())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let sgl = Sgl { address: 0, len: 4096, kind: SGL_TRANSPORT };
        let sqe = Sqe::new(opcode::READ).with_cid(0x1234).with_nsid(1).with_slba(8).with_sgl(sgl);
        assert_eq!(sqe.0[..8], [0x02, 0x40, 0x34, 0x12, 1, 0, 0, 0]);
        assert_eq!(sqe.0[32..40], [0, 0x10, 0, 0, 0, 0, 0, 0x5a]);
        assert_eq!((sqe.slba(), sqe.cdw(10), sqe.sgl()), (8, 8, sgl));
        assert_eq!(sqe.direction(), Direction::ControllerToHost);
        assert_eq!(Sqe::fabrics(opcode::CONNECT).direction(), Direction::HostToController);
        assert_eq!(Sqe::fabrics(opcode::PROPERTY_GET).direction(), Direction::None);

        let cqe = Cqe::new(7, Status::INVALID_FIELD.with_dnr(), 0x0004_0002, 3);
        assert_eq!(cqe.0, [2, 0, 4, 0, 0, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0x04, 0x80]);
        assert_eq!((cqe.cid(), cqe.sqhd(), cqe.result()), (7, 3, 0x0004_0002));
        assert_eq!(cqe.status(), Status::INVALID_FIELD.with_dnr());
    }
}
