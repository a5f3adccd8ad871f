//! Mends and scrubs, against children with simulated contents.

use std::collections::BTreeSet;

use cairn_block::Memory;

use super::*;
use crate::mend::PIECE_BLOCKS;

/// Blocks that a simulated pool allocates together.
const UNIT: u64 = 8;

/// What a child holds: a byte for each block.
#[derive(Default)]
pub(super) struct Disk {
    pub(super) data: Vec<u8>,
    /// Blocks that cannot be read until they are written.
    pub(super) bad: BTreeSet<u64>,
    /// Writes fail.
    pub(super) dead: bool,
    /// Extents that were lost with a device of the pool: a part of one cannot be written.
    pub(super) lost: BTreeSet<usize>,
    /// Units with space, where there is no more of it.
    full: Option<BTreeSet<u64>>,
    /// What finds no room is written nonetheless, as far as the first block that did not.
    sly: bool,
}

/// A bench whose children do what they are asked.
pub(super) struct World {
    pub(super) b: Bench,
    pub(super) disks: Vec<Disk>,
    /// Each request's buffer, as the host gave it.
    bufs: Vec<(u64, Buf)>,
    rng: u64,
    /// Operations of children so far.
    served: usize,
}

impl World {
    pub(super) fn new(n: u8) -> Self {
        let disk = || Disk { data: vec![0; 1000], ..Disk::default() };
        let disks = (0..n).map(|_| disk()).collect();
        Self { b: Bench::online(n), disks, bufs: Vec::new(), rng: 7, served: 0 }
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.rng = self.rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.rng >> 33) % n
    }

    pub(super) fn submit(&mut self, tag: u64, op: IoOp, start: u64, blocks: u64, byte: u8) {
        let payload = matches!(op, IoOp::Read | IoOp::Write { .. });
        let len = if payload { u32::try_from(blocks).unwrap() * 4096 } else { 1 };
        let buf = self.b.mem.alloc(len).unwrap();
        self.b.mem.bytes_mut(buf.slice()).fill(byte);
        let range = LbaRange::new(Lba(start), blocks).unwrap();
        let slice = if payload { buf.slice() } else { BufSlice::EMPTY };
        self.bufs.push((tag, buf));
        self.b.nexus.submit(tag, IoRequest { op, range, buf: slice }, self.b.now);
        self.b.pump();
    }

    pub(super) fn write(&mut self, tag: u64, start: u64, blocks: u64, byte: u8) {
        self.submit(tag, IoOp::Write { fua: false }, start, blocks, byte);
    }

    /// Carries out the `i`th operation that children have in hand.
    pub(super) fn serve(&mut self, i: usize) {
        let io = self.b.io.remove(i).unwrap();
        self.served += 1;
        let ChildOp::Io(request) = io.op else { unreachable!("registers are answered") };
        let status = self.perform(usize::from(io.child.0), &request);
        if request.op == IoOp::Verify {
            let data = &self.disks[usize::from(io.child.0)].data;
            let range = request.range.start().0..request.range.end().0;
            let held = range.filter(|&lba| data[usize::try_from(lba).unwrap()] != 0).count();
            self.b.nexus.handle_verified(io.ticket, held as u64);
        }
        self.b.nexus.handle_io(io.child, io.ticket, status, self.b.now);
        self.b.pump();
    }

    fn perform(&mut self, child: usize, request: &IoRequest) -> IoStatus {
        self.b.extents[child].resize(16, 0);
        let disk = &mut self.disks[child];
        let marks = &mut self.b.extents[child];
        // What was given up is zeros.
        for at in disk.lost.extract_if(.., |at| marks[*at] & change::LOST == 0) {
            disk.data[at * 256..(at * 256 + 256).min(1000)].fill(0);
        }
        let blocks = request.range.start().0..request.range.end().0;
        let lost = |lba: u64| disk.lost.contains(&usize::try_from(lba / 256).unwrap());
        if blocks.clone().any(lost) && !matches!(request.op, IoOp::Flush | IoOp::Snapshot(_)) {
            return IoStatus::MediaError;
        }
        for (i, lba) in (0u32..).zip(blocks) {
            let at = usize::try_from(lba).unwrap();
            match request.op {
                IoOp::Read | IoOp::Verify if disk.bad.contains(&lba) => {
                    return IoStatus::MediaError;
                }
                IoOp::Read => {
                    let window = request.buf.sub(i * 4096, 4096);
                    self.b.mem.bytes_mut(window).fill(disk.data[at]);
                }
                IoOp::Write { .. } if disk.dead => return IoStatus::MediaError,
                IoOp::Write { .. } => {
                    let full =
                        disk.full.as_ref().is_some_and(|units| !units.contains(&(lba / UNIT)));
                    if !full || disk.sly {
                        disk.data[at] = self.b.mem.bytes(request.buf.sub(i * 4096, 1))[0];
                        disk.bad.remove(&lba);
                    }
                    if full {
                        return IoStatus::NoSpace;
                    }
                }
                IoOp::WriteZeroes { .. } | IoOp::Discard => disk.data[at] = 0,
                _ => {}
            }
            if request.op.is_mutation() {
                self.b.extents[child][at / 256] = change::OPEN | change::MAPPED;
            }
        }
        IoStatus::Ok
    }

    /// The nexus comes up anew on the same replicas.
    pub(super) fn restart(&mut self) {
        self.bufs.clear();
        let n = u8::try_from(self.disks.len()).unwrap();
        let extents = core::mem::take(&mut self.b.extents);
        let stamps = core::mem::take(&mut self.b.stamps);
        let b = core::mem::replace(&mut self.b, Bench::new(1, Purpose::Assemble, Vec::new()));
        let (rebuild, now) = (b.nexus.config.pace.rebuild, b.now);
        let mem = HeapMemory::new(32 << 20);
        self.b = Bench { extents, stamps, now, mem, ..b.restarted() };
        self.b.nexus.config.pace.rebuild = rebuild;
        (0..n).for_each(|i| self.b.connect(i));
    }

    /// Carries everything out, in any order.
    pub(super) fn run(&mut self) {
        while !self.b.io.is_empty() {
            let n = self.b.io.len() as u64;
            let i = usize::try_from(self.below(n)).unwrap();
            self.serve(i);
        }
    }

    /// What a read got: a byte for each block.
    pub(super) fn got(&self, tag: u64) -> Vec<u8> {
        let (_, buf) = self.bufs.iter().find(|(t, _)| *t == tag).unwrap();
        self.b.mem.bytes(buf.slice()).chunks(4096).map(|block| block[0]).collect()
    }

    pub(super) fn in_sync(&self) -> Vec<usize> {
        let status = self.b.nexus.status();
        (0..self.disks.len()).filter(|&i| status.children[i].in_sync).collect()
    }

    pub(super) fn assert_alike(&self) {
        let members = self.in_sync();
        for &i in &members {
            let (a, b) = (&self.disks[members[0]], &self.disks[i]);
            let is_bad = |at: usize| {
                let lba = at as u64;
                a.bad.contains(&lba) || b.bad.contains(&lba)
            };
            let differ = (0..1000).find(|&at| !is_bad(at) && a.data[at] != b.data[at]);
            assert_eq!(differ, None, "replicas {} and {i}", members[0]);
        }
    }

    /// Nothing is left over: no buffer, no lock, no place.
    pub(super) fn assert_idle(&mut self) {
        for (_, buf) in self.bufs.drain(..) {
            self.b.mem.release(buf);
        }
        assert_eq!(self.b.mem.in_use(), 0, "a mend kept its buffer");
        assert_eq!(self.b.nexus.in_flight(), 0);
        assert!(!self.b.nexus.ranges.has_active());
    }
}

fn rotten(n: u8, bad: &[(usize, u64)]) -> World {
    let mut w = World::new(n);
    w.write(1, 0, 200, 5);
    w.run();
    for &(child, lba) in bad {
        w.disks[child].bad.insert(lba);
    }
    w
}

#[test]
fn a_bad_block_is_read_elsewhere_and_written_anew() {
    let mut w = rotten(3, &[(0, 3), (1, 3)]);
    for tag in 10..13 {
        w.submit(tag, IoOp::Read, 3, 1, 0);
    }
    w.run();
    for tag in 10..13 {
        assert_eq!((w.b.status_of(tag), w.got(tag)), (Some(IoStatus::Ok), vec![5]));
    }
    assert!(w.disks.iter().all(|d| d.bad.is_empty()), "the copies are good again");
    assert_eq!(*w.b.nexus.state(), VolumeState::Online, "nobody is thrown out");
    let counters = w.b.nexus.mend_counters();
    assert_eq!((counters.healed, counters.unrecoverable), (2, 0));
    let healed = Event::Found { lba: Lba(3), child: ChildId(0), found: Found::Healed };
    assert!(w.b.events.contains(&healed));
    w.assert_idle();
}

#[test]
fn different_blocks_bad_on_different_replicas_make_a_right_read() {
    let mut w = rotten(3, &[(0, 3), (1, 4), (2, 5), (0, 100), (1, 100), (2, 101), (0, 101)]);
    w.submit(10, IoOp::Read, 0, 128, 0);
    w.run();
    assert_eq!((w.b.status_of(10), w.got(10)), (Some(IoStatus::Ok), vec![5; 128]));
    assert!(w.disks[0].bad.is_empty(), "the one that was asked");
    w.assert_idle();
}

#[test]
fn a_block_that_is_bad_everywhere_fails_its_read_and_no_other() {
    let mut w = rotten(3, &[(0, 3), (1, 3), (2, 3), (0, 9)]);
    w.submit(10, IoOp::Read, 0, 16, 0);
    w.submit(11, IoOp::Read, 4, 12, 0);
    w.run();
    assert_eq!(w.b.status_of(10), Some(IoStatus::MediaError));
    assert_eq!((w.b.status_of(11), w.got(11)), (Some(IoStatus::Ok), vec![5; 12]));
    assert!(!w.disks[0].bad.contains(&9), "the others are healed all the same");
    assert_eq!(w.b.nexus.mend_counters().unrecoverable, 1);
    assert_eq!(*w.b.nexus.state(), VolumeState::Online);
    // A write makes it good.
    w.write(12, 3, 1, 6);
    w.submit(13, IoOp::Read, 3, 1, 0);
    w.run();
    assert_eq!((w.b.status_of(13), w.got(13)), (Some(IoStatus::Ok), vec![6]));
    w.assert_idle();
}

#[test]
fn a_replica_that_cannot_be_rewritten_is_taken_out() {
    let mut w = rotten(3, &[(0, 3)]);
    w.disks[0].dead = true;
    w.submit(10, IoOp::Read, 3, 1, 0);
    w.run();
    assert_eq!((w.b.status_of(10), w.got(10)), (Some(IoStatus::Ok), vec![5]));
    assert_eq!(w.b.stored_in_sync(1), [false, true, true]);
    w.assert_idle();
}

#[test]
fn writes_wait_for_a_mend_and_mends_for_writes() {
    let mut w = rotten(3, &[(0, 3)]);
    w.submit(10, IoOp::Read, 3, 1, 0);
    w.serve(0);
    // The mend has the lock.
    let before = w.b.io.len();
    w.write(11, 0, 8, 9);
    assert_eq!(w.b.io.len(), before, "the write waits");
    w.run();
    assert_eq!((w.b.status_of(10), w.got(10)), (Some(IoStatus::Ok), vec![5]));
    assert_eq!(w.b.status_of(11), Some(IoStatus::Ok));
    assert!(w.disks.iter().all(|d| d.data[3] == 9), "the mend did not write over it");
    // The other way round: a read is failed while a write that came later is at work.
    w.disks[0].bad.insert(20);
    w.submit(12, IoOp::Read, 20, 1, 0);
    w.write(13, 20, 1, 8);
    w.serve(0);
    w.run();
    assert_eq!(w.b.status_of(12), Some(IoStatus::Ok));
    assert!(w.disks.iter().all(|d| d.data[20] == 8));
    w.assert_idle();
}

#[test]
fn a_mend_survives_the_loss_of_any_child_at_any_step() {
    for lost in 0..3u8 {
        for after in 0..12 {
            let mut w = rotten(3, &[(0, 3), (1, 7), (2, 100)]);
            w.submit(10, IoOp::Read, 0, 16, 0);
            w.submit(11, IoOp::Verify, 96, 16, 0);
            for _ in 0..after {
                if !w.b.io.is_empty() {
                    w.serve(0);
                }
            }
            w.b.disconnect(lost);
            w.run();
            w.b.connect(lost);
            w.run();
            w.b.pass(10);
            w.run();
            assert_eq!((w.b.status_of(10), w.got(10)), (Some(IoStatus::Ok), vec![5; 16]));
            assert!(w.b.status_of(11).is_some(), "child {lost} lost after {after}");
            w.assert_alike();
            w.assert_idle();
        }
    }
}

#[test]
fn a_mend_ends_where_the_nexus_is_fenced_or_closed() {
    for after in 0..8 {
        let mut w = rotten(3, &[(0, 3)]);
        w.disks[1].full = Some(BTreeSet::new());
        w.submit(10, IoOp::Read, 0, 16, 0);
        w.write(11, 300, 8, 1);
        w.submit(12, IoOp::Verify, 0, 16, 0);
        for _ in 0..after {
            w.serve(0);
        }
        w.b.nexus.close();
        w.b.pump();
        for tag in 10..13 {
            assert!(w.b.status_of(tag).is_some());
        }
        w.run();
        w.assert_idle();
    }
}

#[test]
fn a_child_that_hangs_in_a_mend_is_taken_out() {
    // At the rewrite, of a read; in a convergence, at any step.
    let mut w = rotten(3, &[(0, 3)]);
    w.submit(10, IoOp::Read, 3, 1, 0);
    while !matches!(&w.b.io[0].op, ChildOp::Io(r) if r.op == IoOp::Write { fua: false }) {
        w.serve(0);
    }
    w.b.pass(DEADLINE);
    w.b.disconnect(0);
    w.run();
    assert_eq!((w.b.status_of(10), w.got(10)), (Some(IoStatus::Ok), vec![5]));
    assert_eq!(w.b.stored_in_sync(1), [false, true, true]);
    w.assert_idle();
    for after in 0..6 {
        let mut w = World::new(3);
        w.disks[2].full = Some(BTreeSet::new());
        w.write(1, 0, 4, 1);
        for _ in 0..3 + after {
            if let Some(i) = w.b.io.iter().position(|io| io.child != ChildId(0)) {
                w.serve(i);
            }
        }
        let hung = w.b.pending(0);
        w.b.pass(DEADLINE);
        while let Some(i) = w.b.io.iter().position(|io| io.child != ChildId(0)) {
            w.serve(i);
        }
        if hung > 0 {
            assert!(w.b.status_of(1).is_some(), "{after}: the others go on without it");
        }
        w.run();
        w.assert_alike();
        w.assert_idle();
    }
}

#[test]
fn a_local_disk_that_hangs_in_a_mend_lets_the_host_ask_again_once() {
    for closed in [false, true] {
        let mut w = World::new(3);
        let mut cfg = config(3, Purpose::Create);
        cfg.children[0].local = true;
        w.b = Bench::new(3, Purpose::Create, vec![Register::default(); 3]);
        w.b.nexus = Nexus::new(cfg);
        (0..3).for_each(|i| w.b.connect(i));
        w.disks[0].bad.insert(3);
        w.submit(10, IoOp::Read, 3, 1, 0);
        while !matches!(&w.b.io[0].op, ChildOp::Io(r) if r.op == IoOp::Write { fua: false }) {
            w.serve(0);
        }
        if closed {
            w.b.nexus.close();
            w.b.pump();
        }
        for _ in 0..5 {
            w.b.pass(DEADLINE);
        }
        assert_eq!(w.b.status_of(10), Some(IoStatus::NotReady));
        assert!(w.b.released.is_empty(), "the disk may still read the buffer");
        w.run();
        assert_eq!((w.b.done.len(), w.b.released.as_slice()), (1, &[10][..]));
        w.assert_idle();
    }
}

#[test]
fn a_host_verifies_and_everything_is_good_afterwards() {
    let mut w = rotten(3, &[(0, 3), (1, 3), (1, 90), (2, 150)]);
    w.submit(10, IoOp::Verify, 0, 200, 0);
    w.run();
    assert_eq!(w.b.status_of(10), Some(IoStatus::Ok));
    assert!(w.disks.iter().all(|d| d.bad.is_empty()));
    assert_eq!(w.b.nexus.mend_counters().healed, 4);
    w.disks.iter_mut().for_each(|d| d.bad.extend([60]));
    w.submit(11, IoOp::Verify, 0, 200, 0);
    w.run();
    assert_eq!(w.b.status_of(11), Some(IoStatus::MediaError));
    w.assert_idle();
}

#[test]
fn memory_that_is_short_is_waited_for_and_the_reserve_is_enough() {
    let mut w = rotten(3, &[(0, 3)]);
    w.disks[1].full = Some(BTreeSet::new());
    let mut held = Vec::new();
    w.write(10, 300, 8, 1);
    w.submit(11, IoOp::Verify, 0, 16, 0);
    while let Some(buf) = w.b.mem.alloc(4096) {
        held.push(buf);
    }
    w.run();
    assert!(w.b.nexus.waits_for_memory());
    assert_eq!((w.b.status_of(10), w.b.status_of(11)), (None, None));
    // Other requests go on.
    w.b.submit(12, IoOp::Flush, 0, 0);
    w.run();
    assert_eq!(w.b.status_of(12), Some(IoStatus::Ok));
    // The reserve: a block of each child.
    for _ in 0..8 {
        w.b.mem.release(held.pop().unwrap());
    }
    w.b.reserve = w.b.mem.alloc(MEND_RESERVE);
    let reserve = w.b.reserve.is_some();
    w.b.pump();
    w.run();
    w.b.pump();
    w.run();
    assert_eq!(w.b.status_of(10), Some(IoStatus::NoSpace));
    assert_eq!(w.b.status_of(11), Some(IoStatus::Ok));
    assert!(reserve && w.b.reserve.is_some(), "it is given back");
    held.into_iter().chain(w.b.reserve.take()).for_each(|buf| w.b.mem.release(buf));
    w.assert_alike();
    w.assert_idle();
}

#[test]
fn a_full_pool_throws_nobody_out_and_leaves_the_replicas_alike() {
    // Child 1 has room for the middle of the range only.
    let mut w = rotten(3, &[]);
    w.disks[1].full = Some(BTreeSet::from([0, 1, 2, 3]));
    w.write(10, 20, 30, 9);
    w.run();
    assert_eq!(w.b.status_of(10), Some(IoStatus::NoSpace));
    assert_eq!(*w.b.nexus.state(), VolumeState::Online);
    w.assert_alike();
    assert_eq!(w.b.nexus.mend_counters().converged, 1);
    // Space comes back, and writes work again.
    w.disks[1].full = None;
    w.write(11, 20, 30, 9);
    w.run();
    assert_eq!(w.b.status_of(11), Some(IoStatus::Ok));
    assert!(w.disks.iter().all(|d| d.data[20..50].iter().all(|&b| b == 9)));
    w.assert_idle();
}

#[test]
fn pools_that_are_full_in_different_places_end_alike() {
    let mut w = World::new(3);
    w.disks[0].full = Some(BTreeSet::from([0]));
    w.disks[1].full = Some(BTreeSet::from([1]));
    w.disks[2].full = Some(BTreeSet::from([0, 2]));
    w.write(1, 0, 24, 7);
    w.run();
    assert_eq!(w.b.status_of(1), Some(IoStatus::NoSpace));
    assert_eq!(*w.b.nexus.state(), VolumeState::Online);
    w.assert_alike();
    w.assert_idle();
}

#[test]
fn a_write_that_one_could_not_and_one_had_no_room_for() {
    let mut w = World::new(3);
    w.disks[0].dead = true;
    w.disks[1].full = Some(BTreeSet::new());
    w.write(1, 0, 4, 7);
    w.run();
    assert_eq!(w.b.status_of(1), Some(IoStatus::NoSpace));
    assert_eq!(w.b.stored_in_sync(1), [false, true, true]);
    w.assert_alike();
    w.assert_idle();
}

/// Random work with rot, full pools and lost sessions: reads are right, and members end alike. (What a replica had no
/// room for was there all the same now and then: others were made like what it had been.)
#[test]
fn members_stay_alike_whatever_happens() {
    for seed in 0..400 {
        let mut w = World::new(3);
        w.rng = seed;
        let mut model = vec![BTreeSet::from([0u8]); 1000];
        let mut last = 0;
        for tag in 100..140 {
            match w.below(8) {
                0 => {
                    let (c, lba) = (w.below(2), w.below(120));
                    w.disks[usize::try_from(c).unwrap()].bad.insert(lba);
                }
                1 => {
                    let c = usize::try_from(w.below(3)).unwrap();
                    let held = (0..15).filter(|_| w.below(2) == 0).collect();
                    w.disks[c].full = if w.disks[c].full.is_none() { Some(held) } else { None };
                    w.disks[c].sly = tag % 3 == 0;
                }
                _ => {}
            }
            let (start, blocks) = (w.below(100), 1 + w.below(20));
            let range = usize::try_from(start).unwrap()..usize::try_from(start + blocks).unwrap();
            let byte = u8::try_from(tag).unwrap();
            let reads = w.below(2) == 0;
            if reads {
                w.submit(tag, IoOp::Read, start, blocks, 0);
            } else {
                w.write(tag, start, blocks, byte);
            }
            w.run();
            let status = w.b.status_of(tag).expect("answered");
            if reads {
                assert_eq!(status, IoStatus::Ok, "seed {seed}");
                for (at, byte) in range.zip(w.got(tag)) {
                    assert!(model[at].contains(&byte), "seed {seed} block {at}");
                    // It stays so.
                    model[at] = BTreeSet::from([byte]);
                }
            } else {
                last = tag;
                for at in range {
                    if status.is_ok() {
                        model[at].clear();
                    }
                    model[at].insert(byte);
                }
            }
            w.assert_alike();
            w.bufs.drain(..).for_each(|(_, buf)| w.b.mem.release(buf));
        }
        assert!(last > 0);
        assert_eq!(*w.b.nexus.state(), VolumeState::Online, "seed {seed}");
        w.assert_idle();
    }
}

// ---- scrub

fn scrubbed(w: &mut World, compare: bool) -> ScrubReport {
    let report = ScrubReport { compare, rate_mib_s: 1, ..ScrubReport::default() };
    w.b.nexus.start_scrub(report, w.b.now);
    for _ in 0..20_000 {
        w.b.pump();
        w.run();
        if w.b.nexus.scrub().unwrap().state == ScrubState::Finished {
            return w.b.nexus.scrub().unwrap().clone();
        }
        let next = w.b.nexus.poll_timeout(w.b.now).expect("it goes on");
        w.b.now = next;
        w.b.nexus.handle_timeout(next);
    }
    panic!("the scrub does not end: {:?}", w.b.nexus.scrub());
}

#[test]
fn a_scrub_finds_and_heals_everything_at_its_rate() {
    let mut w = rotten(3, &[(0, 3), (1, 3), (1, 90), (2, 150), (2, 151)]);
    w.disks.iter_mut().for_each(|d| d.bad.extend([60]));
    let start = w.b.now;
    let report = scrubbed(&mut w, false);
    assert_eq!((report.blocks, report.cursor), (1000, 1000));
    assert_eq!((report.bad, report.healed, report.unrecoverable), (8, 5, 1));
    assert!(report.findings.contains(&Finding {
        lba: Lba(151),
        child: ChildId(2),
        found: Found::Healed
    }));
    assert!(report.findings.iter().any(|f| f.lba == Lba(60) && f.found == Found::Unrecoverable));
    // 200 blocks at 1 MiB/s; the holes are free.
    assert!((750..900).contains(&(w.b.now - start)), "{} ms", w.b.now - start);
    assert!(w.b.events.contains(&Event::ScrubFinished));
    w.assert_idle();
}

#[test]
fn a_scrub_that_compares_mends_by_the_majority() {
    let mut w = rotten(3, &[(2, 9)]);
    w.disks[0].data[40] = 77;
    w.disks[2].data[700] = 78;
    let report = scrubbed(&mut w, true);
    assert_eq!((report.bad, report.healed, report.differing), (1, 1, 2));
    w.assert_alike();
    assert_eq!((w.disks[0].data[40], w.disks[2].data[700]), (5, 0));
    w.assert_idle();
    // Two replicas: the lower number is right.
    let mut w = rotten(2, &[]);
    w.disks[0].data[40] = 77;
    let report = scrubbed(&mut w, true);
    assert_eq!(report.differing, 1);
    assert_eq!(w.disks[1].data[40], 77);
}

#[test]
fn a_scrub_stops_is_taken_up_and_gives_way() {
    let mut w = rotten(3, &[(0, 3), (0, 800)]);
    w.b.nexus.start_scrub(ScrubReport { rate_mib_s: 1, ..ScrubReport::default() }, w.b.now);
    w.b.pump();
    w.run();
    w.b.nexus.stop_scrub();
    let report = w.b.nexus.scrub().unwrap().clone();
    assert_eq!((report.state, report.cursor, report.healed), (ScrubState::Stopped, 256, 1));
    w.b.pass(5000);
    assert!(w.b.io.is_empty(), "it is stopped");
    w.b.nexus.start_scrub(report, w.b.now);
    // Many requests are in flight: the scrub waits.
    for tag in 100..110 {
        w.b.nexus.submit(
            tag,
            IoRequest { op: IoOp::Flush, range: LbaRange::default(), buf: BufSlice::EMPTY },
            w.b.now,
        );
    }
    w.b.pump();
    assert_eq!(w.b.pending(0), 10);
    w.b.pass(500);
    assert_eq!(w.b.pending(0), 10);
    w.run();
    assert!(w.b.nexus.scrub().unwrap().cursor > 256);
    for _ in 0..200 {
        w.run();
        w.b.pass(50);
    }
    let report = w.b.nexus.scrub().unwrap();
    assert_eq!((report.state, report.healed, report.blocks), (ScrubState::Finished, 2, 1000));
    w.assert_idle();
}

#[test]
fn pieces_divide_parts() {
    assert_eq!(256 % PIECE_BLOCKS, 0);
}
