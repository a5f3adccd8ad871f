//! A number that the engine attaches to a controller: what all of its queues speak for.

use super::{Queue, Target};

impl Target {
    /// Attaches `mark` to the controller of a connected queue. It is the host's only one in this
    /// subsystem that has a mark from now on: what still comes on the connections of an earlier one
    /// is late.
    pub fn set_mark(&mut self, queue: &Queue, mark: u64) {
        let Some(binding) = queue.binding else { return };
        let at = binding.controller as usize;
        let bound = self.controllers.get(at).and_then(Option::as_ref);
        let Some(bound) = bound.filter(|c| c.generation == binding.generation) else { return };
        let (kind, hostid, hostnqn) = (bound.kind, bound.hostid, bound.hostnqn.clone());
        for (i, slot) in self.controllers.iter_mut().enumerate() {
            let Some(controller) = slot else { continue };
            if i == at {
                controller.mark = mark;
            } else if (controller.kind, controller.hostid) == (kind, hostid)
                && controller.hostnqn == hostnqn
            {
                controller.mark = 0;
            }
        }
    }

    /// The host of a connected queue.
    #[must_use]
    pub fn host_of(&self, queue: &Queue) -> Option<&str> {
        self.host_id_of(queue).map(|(_, nqn)| nqn)
    }

    /// The same, with its host identifier: reservations are kept by that.
    #[must_use]
    pub fn host_id_of(&self, queue: &Queue) -> Option<(u128, &str)> {
        let binding = queue.binding?;
        let bound = self.controllers.get(binding.controller as usize)?.as_ref()?;
        let current = bound.generation == binding.generation;
        current.then_some((bound.hostid, bound.hostnqn.as_str()))
    }

    /// The mark of the controller of a connected queue; 0 where none was attached.
    #[must_use]
    pub fn mark(&self, queue: &Queue) -> u64 {
        let controller = queue.binding.and_then(|binding| {
            let slot = self.controllers.get(binding.controller as usize)?.as_ref()?;
            (slot.generation == binding.generation).then_some(slot)
        });
        controller.map_or(0, |controller| controller.mark)
    }
}
