//! A number that the engine attaches to a controller: what all of its queues speak for.

use super::{Queue, Target};

impl Target {
    /// Attaches `mark` to the controller of a connected queue.
    pub fn set_mark(&mut self, queue: &Queue, mark: u64) {
        let Some(binding) = queue.binding else { return };
        let slot = self.controllers.get_mut(binding.controller as usize);
        if let Some(controller) = slot.and_then(Option::as_mut)
            && controller.generation == binding.generation
        {
            controller.mark = mark;
        }
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
