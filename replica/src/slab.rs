//! Slots that are reused, so that a warm pool allocates nothing.

/// Values addressed by a small index. Grows only past its largest population so far.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(crate) fn with_capacity(n: usize) -> Self {
        Self { slots: Vec::with_capacity(n), free: Vec::with_capacity(n) }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn insert(&mut self, value: T) -> u32 {
        if let Some(index) = self.free.pop() {
            self.slots[index as usize] = Some(value);
            return index;
        }
        let index = u32::try_from(self.slots.len()).expect("fewer than 2^32 operations in flight");
        self.slots.push(Some(value));
        index
    }

    /// Panics where nothing lives at `index`: an operation was completed twice.
    pub(crate) fn remove(&mut self, index: u32) -> T {
        let value = self.slots[index as usize].take().expect("the slot is in use");
        self.free.push(index);
        value
    }

    pub(crate) fn get(&self, index: u32) -> &T {
        self.slots[index as usize].as_ref().expect("the slot is in use")
    }

    pub(crate) fn get_mut(&mut self, index: u32) -> &mut T {
        self.slots[index as usize].as_mut().expect("the slot is in use")
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0u32..).zip(&self.slots).filter_map(|(i, slot)| slot.as_ref().map(|v| (i, v)))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        (0u32..).zip(&mut self.slots).filter_map(|(i, slot)| slot.as_mut().map(|v| (i, v)))
    }

    pub(crate) fn clear(&mut self) {
        self.slots.clear();
        self.free.clear();
    }
}
