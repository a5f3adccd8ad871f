//! A logical unit: what it is, and what its initiators have set.

use cairn_block::BlockSize;

use super::medium::Medium;
use super::sense::{Sense, key};

/// Names what backs a logical unit; whoever adds it chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitHandle(pub u32);

/// A logical unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitConfig {
    /// LUN, 0 to [`MAX_LUN`].
    pub lun: u16,
    /// What backs it.
    pub handle: UnitHandle,
    /// Capacity.
    pub blocks: u64,
    /// The size of a block.
    pub block_size: BlockSize,
    /// What it takes to write a part of: at least a block. Hosts align to it.
    pub physical_block_size: BlockSize,
    /// The volume's id: the serial number and the NAA designator come from it.
    pub id: u128,
    /// Whether writes need SYNCHRONIZE CACHE to be durable.
    pub volatile_write_cache: bool,
    /// Whether it takes no writes.
    pub read_only: bool,
    /// RMB: whether initiators may have its medium taken out, and put in again. What backs it does not notice.
    pub removable: bool,
    /// Blocks that are written whole or not at all, whatever happens: those of WRITE ATOMIC at most;
    /// 0 for none.
    pub atomic_blocks: u32,
}

/// The highest LUN.
pub const MAX_LUN: u16 = 255;

/// What is to be told to an initiator before its next command, by priority: the lowest bit first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Attention {
    PowerOn,
    TargetReset,
    UnitReset,
    ReservationsPreempted,
    ReservationsReleased,
    RegistrationsPreempted,
    MediumChanged,
    ModeChanged,
    CapacityChanged,
    AccessStateChanged,
    InquiryChanged,
    LunsChanged,
}

impl Attention {
    const ALL: [Self; 12] = [
        Self::PowerOn,
        Self::TargetReset,
        Self::UnitReset,
        Self::ReservationsPreempted,
        Self::ReservationsReleased,
        Self::RegistrationsPreempted,
        Self::MediumChanged,
        Self::ModeChanged,
        Self::CapacityChanged,
        Self::AccessStateChanged,
        Self::InquiryChanged,
        Self::LunsChanged,
    ];

    fn sense(self) -> Sense {
        let (asc, ascq) = match self {
            Self::PowerOn => (0x29, 0x00),
            Self::TargetReset => (0x29, 0x02),
            Self::UnitReset => (0x29, 0x03),
            Self::ReservationsPreempted => (0x2a, 0x03),
            Self::ReservationsReleased => (0x2a, 0x04),
            Self::RegistrationsPreempted => (0x2a, 0x05),
            Self::MediumChanged => (0x28, 0x00),
            Self::ModeChanged => (0x2a, 0x01),
            Self::CapacityChanged => (0x2a, 0x09),
            Self::AccessStateChanged => (0x2a, 0x06),
            Self::InquiryChanged => (0x3f, 0x03),
            Self::LunsChanged => (0x3f, 0x0e),
        };
        Sense::new(key::UNIT_ATTENTION, asc, ascq)
    }
}

/// The attentions that wait for one initiator at one logical unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Attentions(u16);

impl Attentions {
    pub(crate) fn raise(&mut self, attention: Attention) {
        self.0 |= 1 << attention as u8;
    }

    pub(crate) fn clear(&mut self, attention: Attention) {
        self.0 &= !(1 << attention as u8);
    }

    /// Tells of the first one.
    pub(crate) fn take(&mut self) -> Option<Sense> {
        let first = Attention::ALL.into_iter().find(|a| self.0 & 1 << *a as u8 != 0)?;
        self.clear(first);
        Some(first.sense())
    }
}

/// What MODE SELECT changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Modes {
    /// WCE: where it is off, writes are flushed before they end.
    pub(crate) write_cache: bool,
    /// SWP.
    pub(crate) write_protect: bool,
    /// D_SENSE.
    pub(crate) descriptors: bool,
}

/// Names an I_T nexus of one target: a session of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NexusId(pub(crate) u64);

#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) config: UnitConfig,
    pub(crate) modes: Modes,
    pub(crate) medium: Medium,
}

impl Unit {
    pub(crate) fn new(config: UnitConfig) -> Self {
        let modes = Self::default_modes(&config);
        Self { config, modes, medium: Medium::default() }
    }

    pub(crate) fn default_modes(config: &UnitConfig) -> Modes {
        Modes { write_cache: config.volatile_write_cache, write_protect: false, descriptors: false }
    }

    pub(crate) fn shift(&self) -> u8 {
        self.config.block_size.shift()
    }

    /// A reset of the logical unit: what does not survive it.
    pub(crate) fn reset(&mut self) {
        self.modes = Self::default_modes(&self.config);
        self.medium.allow_all();
    }

    pub(crate) fn is_write_protected(&self) -> bool {
        self.config.read_only || self.modes.write_protect
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attentions_come_one_by_one_and_once() {
        let mut a = Attentions::default();
        a.raise(Attention::CapacityChanged);
        a.raise(Attention::PowerOn);
        a.raise(Attention::PowerOn);
        assert_eq!(a.take(), Some(Sense::new(6, 0x29, 0)));
        assert_eq!(a.take(), Some(Sense::new(6, 0x2a, 9)));
        assert_eq!(a.take(), None);
        assert_eq!(Attention::ALL.map(|a| a as u8), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    }
}
