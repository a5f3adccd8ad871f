//! The medium of a unit from which it can be taken out: START STOP UNIT and PREVENT ALLOW MEDIUM REMOVAL (SBC-3,
//! sections 5.15 and 5.25). Nothing moves: it says what initiators are told.

use super::cdb::op;
use super::sense::Sense;
use super::unit::NexusId;

const START: u8 = 0x01;
const LOEJ: u8 = 0x02;
const PREVENT: u8 = 0x03;
/// PREVENT of the medium; the other bit is obsolete, and was of a medium changer.
const PREVENT_MEDIUM: u8 = 0x01;

/// What a START STOP UNIT asks of the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Motion {
    Start,
    Stop,
    Load,
    Eject,
    /// Power conditions, which are all one here.
    Stay,
}

impl Motion {
    pub(crate) fn of(cdb: &[u8; 16]) -> Self {
        let flags = cdb[4];
        // Where there is a power condition, the other fields do not count.
        match (flags >> 4, flags & LOEJ != 0, flags & START != 0) {
            (0, false, false) => Self::Stop,
            (0, false, true) => Self::Start,
            (0, true, false) => Self::Eject,
            (0, true, true) => Self::Load,
            _ => Self::Stay,
        }
    }
}

/// Whether a command of another is carried out whatever is reserved (SBC-3, table 13): it lets a medium go, or starts it.
pub(crate) fn is_let_in(cdb: &[u8; 16]) -> bool {
    match cdb[0] {
        op::PREVENT_ALLOW => cdb[4] & PREVENT == 0,
        op::START_STOP_UNIT => matches!(Motion::of(cdb), Motion::Start | Motion::Load),
        _ => false,
    }
}

/// Where a unit's medium is, and who keeps it there. STOP without LOEJ stops nothing: others use the unit.
#[derive(Debug, Default)]
pub(crate) struct Medium {
    ejected: bool,
    /// Each once.
    preventing: Vec<NexusId>,
}

impl Medium {
    /// It is there, whatever it was before: whether it was out.
    pub(crate) fn restart(&mut self) -> bool {
        std::mem::take(&mut self.ejected)
    }

    /// Why commands that need the medium are not carried out.
    pub(crate) fn refusal(&self) -> Option<Sense> {
        self.ejected.then_some(Sense::MEDIUM_NOT_PRESENT)
    }

    pub(crate) fn is_ejected(&self) -> bool {
        self.ejected
    }

    /// PREVENT ALLOW MEDIUM REMOVAL of one I_T nexus.
    pub(crate) fn set_prevented(&mut self, nexus: NexusId, cdb: &[u8; 16]) {
        self.allow(nexus);
        if cdb[4] & PREVENT_MEDIUM != 0 {
            self.preventing.push(nexus);
        }
    }

    /// An I_T nexus prevents nothing any more.
    pub(crate) fn allow(&mut self, nexus: NexusId) {
        self.preventing.retain(|by| *by != nexus);
    }

    /// Nor does any other.
    pub(crate) fn allow_all(&mut self) {
        self.preventing.clear();
    }

    /// # Errors
    /// Why the medium does not go there.
    pub(crate) fn check(&self, motion: Motion) -> Result<(), Sense> {
        let prevented = !self.preventing.is_empty();
        match motion {
            Motion::Eject if prevented => Err(Sense::REMOVAL_PREVENTED),
            Motion::Load if prevented && self.is_ejected() => Err(Sense::REMOVAL_PREVENTED),
            Motion::Start if self.is_ejected() => Err(Sense::MEDIUM_NOT_PRESENT),
            _ => Ok(()),
        }
    }

    /// Whether what was written has to be durable first.
    pub(crate) fn flushes(&self, motion: Motion) -> bool {
        matches!(motion, Motion::Stop | Motion::Eject) && !self.is_ejected()
    }

    /// Moves it; whether it may be another now, for all that others know.
    pub(crate) fn apply(&mut self, motion: Motion) -> bool {
        match motion {
            Motion::Eject => self.ejected = true,
            Motion::Load => return std::mem::take(&mut self.ejected),
            Motion::Start | Motion::Stop | Motion::Stay => {}
        }
        false
    }
}
