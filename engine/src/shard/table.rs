//! A table of things by number: a number is free again once its thing is removed.

use std::ops::{Index, IndexMut};

#[derive(Debug)]
pub(super) struct Table<T> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Table<T> {
    pub(super) fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }

    pub(super) fn insert(&mut self, value: T) -> u32 {
        if let Some(at) = self.free.pop() {
            self.slots[at as usize] = Some(value);
            return at;
        }
        self.slots.push(Some(value));
        u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 entries")
    }

    pub(super) fn remove(&mut self, at: u32) -> Option<T> {
        let value = self.slots.get_mut(at as usize)?.take()?;
        self.free.push(at);
        Some(value)
    }

    pub(super) fn get(&self, at: u32) -> Option<&T> {
        self.slots.get(at as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        self.slots.get_mut(at as usize)?.as_mut()
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0u32..).zip(&self.slots).filter_map(|(at, slot)| slot.as_ref().map(|v| (at, v)))
    }

    /// The first number in use from `from` on: goes through a table that is changed meanwhile, without
    /// memory for a list.
    pub(super) fn next_key(&self, from: u32) -> Option<u32> {
        let rest = self.slots.get(from as usize..)?;
        let found = (from..).zip(rest).find(|(_, slot)| slot.is_some());
        found.map(|(at, _)| at)
    }

    /// The numbers in use, so that the table can be changed while they are gone through.
    pub(super) fn keys(&self) -> Vec<u32> {
        self.iter().map(|(at, _)| at).collect()
    }
}

impl<T> Index<u32> for Table<T> {
    type Output = T;

    fn index(&self, at: u32) -> &T {
        self.get(at).expect("an entry that is in use")
    }
}

impl<T> IndexMut<u32> for Table<T> {
    fn index_mut(&mut self, at: u32) -> &mut T {
        self.get_mut(at).expect("an entry that is in use")
    }
}
