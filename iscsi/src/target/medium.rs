//! Media that can be taken out, as the target sees them: what changes them besides the commands of initiators.

use super::{NodeId, Target, TargetError};
use crate::scsi::ports::AccessState;
use crate::scsi::unit::{Attention, NexusId, UnitHandle};

impl Target {
    /// Changes whether the medium of a logical unit can be taken out, and tells the initiators. Where it cannot any more,
    /// it is there.
    ///
    /// # Errors
    /// An unknown node or unit.
    pub fn set_removable(
        &mut self,
        id: NodeId,
        lun: u16,
        removable: bool,
    ) -> Result<(), TargetError> {
        let node = self.node_mut(id)?;
        let unit = node.unit_mut(lun).ok_or(TargetError::UnknownLun { lun })?;
        if std::mem::replace(&mut unit.config.removable, removable) != removable {
            unit.medium.allow_all();
            let was_out = unit.medium.restart();
            self.attend(id, Some(lun), None, Attention::InquiryChanged);
            if was_out {
                self.attend(id, Some(lun), None, Attention::MediumChanged);
            }
        }
        Ok(())
    }

    /// Another serves the units of a node, and its media are there: so they are here, where that comes back.
    pub(super) fn restart_idle_media(&mut self, id: NodeId) -> Result<(), TargetError> {
        let node = self.node_mut(id)?;
        let idle = |port: &u16| {
            matches!(node.access(*port).1, AccessState::Standby | AccessState::Unavailable)
        };
        if !node.config.portal_groups.iter().all(idle) {
            return Ok(());
        }
        let mut loaded = Vec::new();
        for unit in &mut node.units {
            if unit.medium.restart() {
                loaded.push(unit.config.lun);
            }
        }
        for lun in loaded {
            self.attend(id, Some(lun), None, Attention::MediumChanged);
        }
        Ok(())
    }

    /// PREEMPT AND ABORT of I_T nexuses: nor do they keep the medium in (SBC-3, section 5.15).
    pub(super) fn allow_removal(&mut self, handle: UnitHandle, preempted: &[NexusId]) {
        let units = self.nodes.iter_mut().flatten().flat_map(|node| &mut node.units);
        for unit in units.filter(|unit| unit.config.handle == handle) {
            preempted.iter().for_each(|nexus| unit.medium.allow(*nexus));
        }
    }
}
