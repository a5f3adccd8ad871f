//! Settling over several devices: each has its own extents' marks, and a round is over when all have ended it.

use cairn_block::{IoStatus, Memory};

use super::{MultiPool, SETTLE};
use crate::change;
use crate::pool::{Pool, ReplicaSlot};
use crate::settle::RoundEnd;

/// The end of a round under way.
#[derive(Debug)]
pub(super) struct Settling {
    id: u32,
    tag: u64,
    /// Devices that have not answered.
    waiting: u32,
    status: IoStatus,
}

impl MultiPool {
    /// Begins a round of settling: see [`Pool::settle_begin`].
    ///
    /// # Errors
    /// As there.
    pub fn settle_begin(&mut self, slot: ReplicaSlot, round: u64) -> Result<(), IoStatus> {
        let mut begun = Err(IoStatus::MediaError);
        for member in self.members.iter_mut().flatten().filter(|m| m.is_serving()) {
            member.pool.settle_begin(slot, round)?;
            begun = Ok(());
        }
        begun
    }

    /// Ends a round of settling: see [`Pool::settle_end`].
    pub fn settle_end<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        end: RoundEnd,
        mem: &mut M,
    ) {
        if let Some(at) = self.direct {
            self.direct_io += 1;
            self.member_mut(at).pool.settle_end(tag, slot, end, mem);
            return;
        }
        let members: Vec<usize> = self.serving().map(|(at, _)| at).collect();
        if members.is_empty() {
            return self.answer(tag, IoStatus::MediaError);
        }
        self.next_settling = self.next_settling.wrapping_add(1);
        let id = self.next_settling;
        let waiting = u32::try_from(members.len()).expect("at most 64 devices");
        self.settlings.push(Settling { id, tag, waiting, status: IoStatus::Ok });
        for at in members {
            let pool: &mut Pool = &mut self.member_mut(at).pool;
            pool.settle_end(SETTLE | u64::from(id), slot, end, mem);
        }
        self.settle(mem);
    }

    pub(super) fn settle_answered(&mut self, id: u32, status: IoStatus) {
        let Some(at) = self.settlings.iter().position(|of| of.id == id) else { return };
        let settling = &mut self.settlings[at];
        settling.waiting -= 1;
        if !status.is_ok() {
            settling.status = status;
        }
        if settling.waiting == 0 {
            let Settling { tag, status, .. } = self.settlings.swap_remove(at);
            self.answer(tag, status);
        }
    }

    /// Tells what was written and not settled: see [`Pool::changes`]. What was, or may have been, on a device
    /// that is gone counts as there and open, and as lost.
    #[must_use]
    pub fn changes(
        &self,
        slot: ReplicaSlot,
        first: u32,
        since: u64,
        out: &mut [u8],
    ) -> Option<usize> {
        if let Some(at) = self.direct {
            return self.member(at).pool.changes(slot, first, since, out);
        }
        out.fill(0);
        let mut len = None;
        for (_, member) in self.serving() {
            let told = member.pool.add_changes(slot, first, since, out)?;
            len = Some(len.map_or(told, |len: usize| len.min(told)));
        }
        let len = len?;
        let lost = self.lost.is_lost(slot.0);
        let failed = || self.present().filter(|m| !m.is_online());
        if lost || failed().next().is_some() {
            for (byte, logical) in out[..len].iter_mut().zip(first..) {
                let there = *byte & change::MAPPED != 0;
                let gone = !there && failed().any(|m| m.maps(slot.0, logical));
                let gone = gone || lost && *byte == 0 && self.may_be_lost(slot.0, logical);
                *byte |= if gone { change::MAPPED | change::OPEN | change::LOST } else { 0 };
            }
        }
        out[len..].fill(0);
        Some(len)
    }

    /// Extents that are open: written, and not settled since.
    #[must_use]
    pub fn open_extents(&self) -> u64 {
        self.present().map(|m| m.pool.open_extents()).sum()
    }
}
