//! Checkpoints and growth: what rewrites the table and the superblock. One at a time, beside the I/O.

use std::collections::VecDeque;

use cairn_block::{ByteOffset, IoStatus, Memory};

use crate::ControlError;
use crate::disk::{
    BLOCK, BLOCK_BYTES, Entry, MAX_EXTENTS, MAX_SEGMENTS, Membership, Segment, Superblock,
    TablePage,
};
use crate::extents::{Page, page_place};
use crate::flush::Waiter;
use crate::format::{FIRST_PAGE_SEQUENCE, digest_of, entries_of_page, plan_segment};
use crate::pool::{DiskOp, Done, Pool, PoolState, Purpose};

/// Table pages in flight together.
const MAX_PAGES: u32 = 16;
/// Bytes that a wipe zeroes at the start of the device: what `probe` looks at.
const WIPED: u64 = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Everything that journal blocks before `tail` say goes to the table.
    Checkpoint { number: u64, tail: u64 },
    /// A new segment, if there is room for one.
    Grow { tag: u64, segment: Option<Segment> },
    /// A new list of the pool's devices.
    Members { tag: u64 },
    /// The device is taken out of its pool: nothing that marks it as a pool is to be left.
    Wipe { tag: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    /// The superblocks are being zeroed.
    Wiping {
        in_flight: u8,
    },
    /// The new segment's table is being zeroed.
    Zeroing,
    /// Table pages are being written; `next` is the first not looked at.
    Pages {
        next: u32,
        in_flight: u32,
    },
    PagesFlush,
    /// The superblock's older copy needs memory, is being written, is being flushed.
    First,
    FirstWrite,
    FirstFlush,
    /// Then the other copy and the backup; which nothing waits for but the next superblock.
    Others {
        sent: u8,
        in_flight: u8,
    },
}

#[derive(Debug)]
pub(crate) struct Maintenance {
    stage: Stage,
    work: Work,
    /// The superblock to come.
    staged: Superblock,
    /// The sum over the table's pages as they were last written.
    pub(crate) digest: u64,
    started: u64,
    /// The last checkpoint that is durable.
    pub(crate) completed: u64,
    wanted: u64,
    /// Commands that wait for a checkpoint.
    commands: Vec<(u64, u64)>,
    grows: VecDeque<(u64, u64)>,
    memberships: VecDeque<(u64, Membership)>,
    wipe: Option<u64>,
    /// Nothing is left to work with.
    pub(crate) wiped: bool,
}

impl Maintenance {
    pub(crate) fn new(superblock: &Superblock, last: u64, digest: u64) -> Self {
        Self {
            stage: Stage::Idle,
            work: Work::Checkpoint { number: 0, tail: 0 },
            staged: superblock.clone(),
            digest,
            started: last,
            completed: last,
            wanted: last,
            commands: Vec::new(),
            grows: VecDeque::new(),
            memberships: VecDeque::new(),
            wipe: None,
            wiped: false,
        }
    }

    /// Asks for a checkpoint that begins after now. Returns its number.
    pub(crate) fn want(&mut self) -> u64 {
        self.wanted = self.started + 1;
        self.wanted
    }

    /// Commands that are not answered.
    pub(crate) fn commands(&self) -> usize {
        let growing = self.stage != Stage::Idle
            && !matches!(self.stage, Stage::Others { .. })
            && !matches!(self.work, Work::Checkpoint { .. });
        self.commands.len()
            + self.grows.len()
            + self.memberships.len()
            + usize::from(self.wipe.is_some())
            + usize::from(growing)
    }

    pub(crate) fn take_commands(&mut self) -> Vec<u64> {
        let mut tags: Vec<u64> = self.commands.drain(..).map(|(tag, _)| tag).collect();
        tags.extend(self.grows.drain(..).map(|(tag, _)| tag));
        tags.extend(self.memberships.drain(..).map(|(tag, _)| tag));
        tags.extend(self.wipe.take());
        if let (Work::Grow { tag, .. } | Work::Members { tag } | Work::Wipe { tag }, false) =
            (self.work, matches!(self.stage, Stage::Idle | Stage::Others { .. }))
        {
            tags.push(tag);
        }
        self.stage = Stage::Idle;
        tags
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.stage == Stage::Idle && self.wanted <= self.started
    }
}

impl Pool {
    /// Writes the checksums of every extent, and all that the journal holds to the table, so that the
    /// next open has nothing to make good: before a clean stop.
    pub fn checkpoint<M: Memory>(&mut self, tag: u64, mem: &mut M) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        self.wash_all(tag);
        self.pump(mem);
    }

    /// Everything has been washed: the table is next.
    pub(crate) fn begin_checkpoint(&mut self, tag: u64) {
        let number = self.maintenance.want();
        self.maintenance.commands.push((tag, number));
    }

    /// Uses a device that has become `device_len` bytes long.
    pub fn grow<M: Memory>(&mut self, tag: u64, device_len: u64, mem: &mut M) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        self.maintenance.grows.push_back((tag, device_len));
        self.pump(mem);
    }

    /// Stores a new list of the pool's devices in this one's superblock.
    pub(crate) fn set_membership<M: Memory>(
        &mut self,
        tag: u64,
        membership: Membership,
        mem: &mut M,
    ) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        self.maintenance.memberships.push_back((tag, membership));
        self.pump(mem);
    }

    /// Makes the device one that holds no pool. Nothing may be in flight; nothing can be done with it
    /// afterwards.
    pub(crate) fn wipe<M: Memory>(&mut self, tag: u64, mem: &mut M) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        self.maintenance.wipe = Some(tag);
        self.pump(mem);
    }

    pub(crate) fn pump_maintenance<M: Memory>(&mut self, mem: &mut M) {
        if self.maintenance.stage == Stage::Idle {
            self.start_maintenance();
        }
        match self.maintenance.stage {
            Stage::Pages { .. } => match self.maintenance.work {
                Work::Checkpoint { number, .. } => self.pump_pages(number, mem),
                Work::Grow { segment: Some(segment), .. } => self.pump_new_pages(&segment, mem),
                work => unreachable!("{work:?} writes no pages"),
            },
            Stage::First => self.pump_first(mem),
            Stage::Others { sent, in_flight } => self.pump_others(sent, in_flight, mem),
            _ => {}
        }
    }

    fn start_maintenance(&mut self) {
        while let Some((tag, len)) = self.maintenance.grows.pop_front() {
            match self.plan_grow(len) {
                Ok(segment) => return self.start_grow(tag, len, segment),
                Err(error) => self.refuse(tag, IoStatus::InvalidField, error),
            }
        }
        let m = &mut self.maintenance;
        if let Some((tag, membership)) = m.memberships.pop_front() {
            m.staged.clone_from(&self.superblock);
            m.staged.membership = membership;
            m.staged.sequence += 1;
            m.work = Work::Members { tag };
            m.stage = Stage::First;
            return;
        }
        if let Some(tag) = m.wipe.take() {
            m.work = Work::Wipe { tag };
            m.stage = Stage::Wiping { in_flight: 2 };
            for (offset, len) in [(0, WIPED), (self.superblock.backup() * BLOCK, BLOCK)] {
                let op = DiskOp::Zero { offset: ByteOffset(offset), len, punch: false };
                self.issue(op, Purpose::Maintain, None);
            }
            return;
        }
        let used = self.journal.head - self.superblock.journal_tail;
        if m.wanted <= m.started && used < self.superblock.journal_blocks / 2 {
            return;
        }
        m.started += 1;
        m.work = Work::Checkpoint { number: m.started, tail: self.journal.head };
        m.stage = Stage::Pages { next: 0, in_flight: 0 };
    }

    fn plan_grow(&self, len: u64) -> Result<Option<Segment>, ControlError> {
        let has = self.superblock.device_len;
        if len / BLOCK <= has / BLOCK {
            return Err(ControlError::NothingToGrow { has, asked: len });
        }
        let segments = &self.superblock.segments;
        let end = segments.last().map_or(0, Segment::end);
        let segment = plan_segment(end, len / BLOCK - 1);
        let extents = u64::from(self.extents.len()) + segment.map_or(0, |s| u64::from(s.extents));
        if segments.len() >= MAX_SEGMENTS || extents > MAX_EXTENTS {
            return Err(ControlError::GrowLimit(segments.len() - 1));
        }
        Ok(segment)
    }

    fn start_grow(&mut self, tag: u64, len: u64, segment: Option<Segment>) {
        self.maintenance.staged.clone_from(&self.superblock);
        self.maintenance.staged.device_len = len;
        self.maintenance.work = Work::Grow { tag, segment };
        let Some(segment) = segment else {
            self.maintenance.staged.sequence += 1;
            self.maintenance.stage = Stage::First;
            return;
        };
        self.maintenance.stage = Stage::Zeroing;
        let op = DiskOp::Zero {
            offset: ByteOffset(segment.table * BLOCK),
            len: 2 * u64::from(segment.pages()) * BLOCK,
            punch: false,
        };
        self.issue(op, Purpose::Maintain, None);
    }

    /// Writes dirty pages, each to its older copy.
    fn pump_pages<M: Memory>(&mut self, number: u64, mem: &mut M) {
        let Stage::Pages { mut next, mut in_flight } = self.maintenance.stage else { return };
        let count = u32::try_from(self.extents.pages.len()).expect("pages are fewer than extents");
        while next < count && in_flight < MAX_PAGES {
            let page = self.extents.pages[next as usize];
            if page.dirty {
                let Some(buf) = mem.alloc(BLOCK_BYTES) else {
                    self.short = true;
                    break;
                };
                let base = if page.checkpoint <= self.superblock.checkpoint {
                    page.sequence
                } else {
                    page.base
                };
                let written =
                    Page { sequence: page.sequence + 1, checkpoint: number, base, dirty: false };
                let place = page_place(&self.superblock.segments, next);
                let entries = entries_of_page(&place.segment, place.local);
                let head = TablePage {
                    sequence: written.sequence,
                    index: place.local,
                    entries,
                    checkpoint: number,
                    base,
                };
                let address = place.segment.page_address(place.local, written.sequence & 1);
                let table = &self.extents;
                head.encode(
                    address,
                    self.superblock.pool,
                    (place.first..place.first + entries).map(|e| table.entry(e)),
                    mem.bytes_mut(buf.slice()),
                );
                self.extents.pages[next as usize] = written;
                self.maintenance.digest = self
                    .maintenance
                    .digest
                    .wrapping_sub(digest_of(next, page.sequence))
                    .wrapping_add(digest_of(next, written.sequence));
                self.issue_page(address, buf);
                in_flight += 1;
            }
            next += 1;
        }
        self.maintenance.stage = Stage::Pages { next, in_flight };
        self.pages_written_if(next == count && in_flight == 0);
    }

    /// Writes the pages of a new segment, all of whose extents are free and not known to be zeroed.
    fn pump_new_pages<M: Memory>(&mut self, segment: &Segment, mem: &mut M) {
        let Stage::Pages { mut next, mut in_flight } = self.maintenance.stage else { return };
        while next < segment.pages() && in_flight < MAX_PAGES {
            let Some(buf) = mem.alloc(BLOCK_BYTES) else {
                self.short = true;
                break;
            };
            let head = TablePage {
                sequence: FIRST_PAGE_SEQUENCE,
                index: next,
                entries: entries_of_page(segment, next),
                checkpoint: 0,
                base: FIRST_PAGE_SEQUENCE,
            };
            let address = segment.page_address(next, 0);
            let entries = (0..head.entries).map(|_| Entry::free(false));
            head.encode(address, self.superblock.pool, entries, mem.bytes_mut(buf.slice()));
            self.issue_page(address, buf);
            in_flight += 1;
            next += 1;
        }
        self.maintenance.stage = Stage::Pages { next, in_flight };
        self.pages_written_if(next == segment.pages() && in_flight == 0);
    }

    fn issue_page(&mut self, address: u64, buf: cairn_block::Buf) {
        let offset = ByteOffset(address * BLOCK);
        let op = DiskOp::Write { offset, buf: buf.slice(), fua: false };
        self.issue(op, Purpose::Maintain, Some(buf));
    }

    fn pages_written_if(&mut self, all: bool) {
        if all {
            self.maintenance.stage = Stage::PagesFlush;
            self.flusher.next.push(Waiter::Maintain);
        }
    }

    fn write_superblock<M: Memory>(&mut self, copy: u64, mem: &mut M) -> bool {
        let Some(buf) = mem.alloc(BLOCK_BYTES) else {
            self.short = true;
            return false;
        };
        self.maintenance.staged.encode(copy, mem.bytes_mut(buf.slice()));
        self.issue_page(copy, buf);
        true
    }

    fn pump_first<M: Memory>(&mut self, mem: &mut M) {
        if self.write_superblock(1 - self.superblock_copy, mem) {
            self.maintenance.stage = Stage::FirstWrite;
        }
    }

    fn pump_others<M: Memory>(&mut self, mut sent: u8, mut in_flight: u8, mem: &mut M) {
        while sent < 2 {
            let copy = if sent == 0 { 1 - self.superblock_copy } else { self.superblock.backup() };
            if !self.write_superblock(copy, mem) {
                break;
            }
            sent += 1;
            in_flight += 1;
        }
        self.maintenance.stage = Stage::Others { sent, in_flight };
    }

    /// A write of the table or the superblock, or the zeroing, completed.
    pub(crate) fn maintain_written(&mut self) {
        let m = &mut self.maintenance;
        match &mut m.stage {
            Stage::Zeroing => m.stage = Stage::Pages { next: 0, in_flight: 0 },
            Stage::Wiping { in_flight } => {
                *in_flight -= 1;
                if *in_flight == 0 {
                    m.stage = Stage::PagesFlush;
                    self.flusher.next.push(Waiter::Maintain);
                }
            }
            Stage::Pages { in_flight, .. } => *in_flight -= 1,
            Stage::FirstWrite => {
                m.stage = Stage::FirstFlush;
                self.flusher.next.push(Waiter::Maintain);
            }
            Stage::Others { sent, in_flight } => {
                *in_flight -= 1;
                if *sent == 2 && *in_flight == 0 {
                    m.stage = Stage::Idle;
                }
            }
            stage => unreachable!("nothing was written in stage {stage:?}"),
        }
    }

    pub(crate) fn maintain_flushed(&mut self) {
        match self.maintenance.stage {
            Stage::PagesFlush if matches!(self.maintenance.work, Work::Wipe { .. }) => {
                let Work::Wipe { tag } = self.maintenance.work else { return };
                self.maintenance.stage = Stage::Idle;
                self.maintenance.wiped = true;
                self.done.push_back(Done { tag, status: IoStatus::Ok, error: None });
            }
            Stage::PagesFlush => self.stage_superblock(),
            Stage::FirstFlush => {
                self.superblock_copy = 1 - self.superblock_copy;
                self.superblock.clone_from(&self.maintenance.staged);
                self.maintenance.stage = Stage::Others { sent: 0, in_flight: 0 };
                match self.maintenance.work {
                    Work::Checkpoint { number, .. } => self.checkpoint_durable(number),
                    Work::Grow { tag, segment } => self.grown(tag, segment),
                    Work::Members { tag } => {
                        self.done.push_back(Done { tag, status: IoStatus::Ok, error: None });
                    }
                    Work::Wipe { .. } => unreachable!("a wipe writes no superblock"),
                }
            }
            stage => unreachable!("nothing was flushed in stage {stage:?}"),
        }
    }

    fn stage_superblock(&mut self) {
        let m = &mut self.maintenance;
        match m.work {
            Work::Checkpoint { number, tail } => {
                m.staged.clone_from(&self.superblock);
                m.staged.journal_tail = tail;
                m.staged.checkpoint = number;
                m.staged.table_digest = m.digest;
            }
            Work::Grow { segment: Some(segment), .. } => {
                let first = u32::try_from(self.extents.pages.len()).expect("counted in 31 bits");
                let added = (first..first + segment.pages())
                    .fold(0u64, |sum, page| sum.wrapping_add(digest_of(page, FIRST_PAGE_SEQUENCE)));
                m.staged.segments.push(segment);
                m.staged.table_digest = m.staged.table_digest.wrapping_add(added);
                m.digest = m.digest.wrapping_add(added);
            }
            Work::Grow { segment: None, .. } | Work::Members { .. } | Work::Wipe { .. } => {}
        }
        m.staged.sequence += 1;
        m.stage = Stage::First;
    }

    fn checkpoint_durable(&mut self, number: u64) {
        let m = &mut self.maintenance;
        m.completed = number;
        let done = &mut self.done;
        m.commands.retain(|&(tag, wanted)| {
            if wanted <= number {
                done.push_back(Done { tag, status: IoStatus::Ok, error: None });
            }
            wanted > number
        });
    }

    fn grown(&mut self, tag: u64, segment: Option<Segment>) {
        if let Some(segment) = segment {
            let first = self.extents.len();
            for _ in 0..segment.extents {
                self.extents.push(Entry::free(false));
            }
            for _ in 0..segment.pages() {
                self.extents.pages.push(Page {
                    sequence: FIRST_PAGE_SEQUENCE,
                    checkpoint: 0,
                    base: FIRST_PAGE_SEQUENCE,
                    dirty: false,
                });
            }
            self.extents.link_free(first);
        }
        self.done.push_back(Done { tag, status: IoStatus::Ok, error: None });
    }
}
