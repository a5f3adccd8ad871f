//! A volume as hosts see it and as its processes tell of it; the history that judges the one, with what is known of
//! the other.
//!
//! What the model lets be lost is decided here, from what was done to the processes:
//!
//! - A request that lost its path stays open. It is closed, as done by now or never, once a nexus of a higher epoch
//!   than any before is seen to serve, and whoever had the request is dead, or another than this one and rid of the
//!   connection for longer than it keeps one.
//! - When power is lost, one of the writes since the last flush is left of each block: at once where the nexus dies
//!   with a member, or nobody can be sure that another member has everything; not at all where the nexus lives and
//!   takes the member out.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use cairn_sim::History;

use crate::plan::{NODES, VolumeShape};
use crate::trace::Io;

/// A connection that its host has given up is given up by the other side too within this time.
const KEPT: Duration = Duration::from_secs(6);
/// What a nexus says of itself is believed once it still says so after this time.
const CONFIRM: Duration = Duration::from_millis(500);
/// A nexus knows of a member that came back what it lost within this time.
const BACK: Duration = Duration::from_secs(3);
/// How old what is known of who serves may be.
const FRESH: Duration = Duration::from_millis(700);

/// A process from its start to its end: the node, and how many starts it has had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tenure {
    pub(crate) node: usize,
    pub(crate) life: u64,
}

/// What a process tells of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) state: String,
    pub(crate) detail: String,
    pub(crate) serving: bool,
    pub(crate) epoch: u64,
    /// The nodes whose replicas are in sync.
    pub(crate) in_sync: BTreeSet<usize>,
}

#[derive(Debug, Clone)]
struct Seen {
    of: Tenure,
    /// When it was asked.
    asked: Instant,
    view: View,
}

/// A write that lost its path.
#[derive(Debug, Clone, Copy)]
struct Lost {
    lba: u64,
    blocks: u64,
    invoked: u64,
    had: Tenure,
    at: Instant,
}

/// Members lost power.
#[derive(Debug, Clone)]
struct Power {
    nodes: BTreeSet<usize>,
    since: Instant,
    stage: Stage,
}

/// What is known of members that lost power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Whether others were in sync is not known: they stay away until it is.
    Held,
    /// Others were, and the nexus lives: they may come back at once, and nothing may be missing.
    Free,
    /// Something may be missing, and hosts were left the choice.
    Drawn,
}

/// A volume.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) shape: VolumeShape,
    pub(crate) history: History,
    pub(crate) requests: Vec<Io>,
    /// The beginnings of requests that are under way.
    pub(crate) under_way: BTreeSet<u64>,
    views: [Option<Seen>; NODES],
    highest: u64,
    served_by: Option<(Tenure, Instant)>,
    lost: Vec<Lost>,
    closing: Vec<Lost>,
    power: Option<Power>,
    /// Losses of power that left hosts a choice, and that did not.
    pub(crate) lots: u64,
    pub(crate) strict: u64,
    /// Changes of nexus.
    pub(crate) epochs: u64,
}

impl Volume {
    pub(crate) fn new(
        number: usize,
        name: &str,
        shape: VolumeShape,
        blocks: usize,
        tears: bool,
    ) -> Self {
        let mut history = History::new(number as u64 + 1, blocks);
        history.tears = tears;
        Self {
            name: name.to_owned(),
            id: uuid::Uuid::new_v4().to_string(),
            shape,
            history,
            requests: Vec::new(),
            under_way: BTreeSet::new(),
            views: [const { None }; NODES],
            highest: 0,
            served_by: None,
            lost: Vec::new(),
            closing: Vec::new(),
            power: None,
            lots: 0,
            strict: 0,
            epochs: 0,
        }
    }

    /// A write lost its path.
    pub(crate) fn lost_path(&mut self, lba: u64, blocks: u64, invoked: u64, had: Tenure) {
        self.lost.push(Lost { lba, blocks, invoked, had, at: Instant::now() });
    }

    /// Forgets what can never be asked for again.
    pub(crate) fn forget(&mut self) {
        let now = self.history.tick();
        let oldest = self.under_way.first().copied().unwrap_or(now);
        self.history.forget(oldest);
    }

    /// A process was asked at `asked`, and said this. `died` tells when a process ended, if it did.
    /// Returns whether it is something new.
    pub(crate) fn observed(
        &mut self,
        of: Tenure,
        asked: Instant,
        view: View,
        died: impl Fn(Tenure) -> Option<Instant>,
    ) -> bool {
        let new = self.views[of.node].as_ref().is_none_or(|seen| seen.view != view);
        let (serving, epoch) = (view.serving, view.epoch);
        self.views[of.node] = Some(Seen { of, asked, view });
        if !serving {
            return new;
        }
        if epoch > self.highest {
            self.epochs += 1;
            self.highest = epoch;
            self.served_by = Some((of, asked));
            let over = |lost: &Lost| {
                let dead = died(lost.had).is_some_and(|at| at < asked);
                dead || lost.had != of && lost.at + KEPT < asked
            };
            self.closing = self.lost.iter().filter(|lost| over(lost)).copied().collect();
            if self
                .power
                .as_ref()
                .is_some_and(|power| power.since < asked && power.stage == Stage::Drawn)
            {
                self.power = None;
            }
        } else if let Some((by, since)) = self.served_by
            && by == of
            && epoch == self.highest
            && asked > since + CONFIRM
        {
            for over in std::mem::take(&mut self.closing) {
                self.history.write_is_over(over.lba, over.blocks, over.invoked);
                self.lost.retain(|lost| lost.invoked != over.invoked);
            }
        }
        self.look_at_power();
        new
    }

    /// What the process says that serves, if that is known for certain.
    fn serving(&self) -> Option<&Seen> {
        let (by, _) = self.served_by?;
        let seen = self.views[by.node].as_ref()?;
        let now = seen.of == by && seen.view.serving && seen.view.epoch == self.highest;
        now.then_some(seen)
    }

    /// The node that serves it, as far as is known.
    pub(crate) fn server(&self) -> Option<usize> {
        self.serving().map(|seen| seen.of.node)
    }

    /// Whether it is served, as far as is known.
    pub(crate) fn is_served(&self, died: impl Fn(Tenure) -> Option<Instant>) -> bool {
        self.serving().is_some_and(|seen| {
            died(seen.of).is_none() && seen.asked.elapsed() < Duration::from_secs(2)
        })
    }

    /// These nodes were killed, and of `volatile` ones what the disk had not flushed is lost. `quiet` where nothing
    /// else was wrong.
    pub(crate) fn killed(&mut self, nodes: &[usize], volatile: &[usize], quiet: bool) {
        let members = &self.shape.data;
        let lost: BTreeSet<usize> =
            volatile.iter().copied().filter(|node| members.contains(node)).collect();
        let server = self.serving().filter(|seen| seen.asked.elapsed() < FRESH);
        let server = server.map(|seen| (seen.of.node, seen.view.in_sync.clone()));
        let nexus_died = server.as_ref().is_none_or(|(node, _)| nodes.contains(node));
        if lost.is_empty() {
            if nexus_died && self.power.take().is_some() {
                self.draw_lots(nexus_died);
            }
            return;
        }
        let since = Instant::now();
        let others = server.is_some_and(|(_, in_sync)| in_sync.difference(&lost).count() > 0);
        if nexus_died || !others || members.len() < 3 {
            self.draw_lots(nexus_died);
            // The next nexus that comes up may still find some of them.
            self.power = Some(Power { nodes: lost, since, stage: Stage::Drawn });
            return;
        }
        let mut nodes = lost;
        let mut stage = if quiet { Stage::Free } else { Stage::Held };
        if let Some(before) = self.power.take() {
            nodes.extend(before.nodes);
            stage = Stage::Held;
        }
        self.power = Some(Power { nodes, since, stage });
    }

    fn draw_lots(&mut self, nexus_died: bool) {
        self.lots += 1;
        if nexus_died {
            self.history.power_was_lost_with_the_nexus();
        } else {
            self.history.power_was_lost(true);
        }
    }

    /// Whoever serves has others than those that lost power: nothing is lost. Those were taken out, or were taken
    /// back as ones that had lost nothing.
    fn look_at_power(&mut self) {
        let (Some(power), Some(seen)) = (&self.power, self.serving()) else { return };
        let (in_sync, since) = (&seen.view.in_sync, seen.asked.checked_duration_since(power.since));
        let Some(since) = since.filter(|_| !in_sync.is_empty()) else { return };
        let left_out = in_sync.is_disjoint(&power.nodes);
        let taken_back = power.stage == Stage::Free && since > BACK;
        if in_sync.is_subset(&power.nodes) {
            self.give_up();
        } else if left_out || taken_back {
            self.strict += u64::from(power.stage != Stage::Drawn);
            self.power = None;
        }
    }

    /// Whether a node that lost power must stay away, for it is not known yet what that means.
    pub(crate) fn holds_back(&self, node: usize) -> bool {
        let waits = |power: &Power| power.stage == Stage::Held && power.nodes.contains(&node);
        self.power.as_ref().is_some_and(waits)
    }

    /// The members that lost power may be the only ones.
    pub(crate) fn give_up(&mut self) {
        if self.power.as_ref().is_some_and(|power| power.stage != Stage::Drawn) {
            self.draw_lots(false);
            if let Some(power) = &mut self.power {
                power.stage = Stage::Drawn;
            }
        }
    }

    /// How long members that lost power have been waited for.
    pub(crate) fn waits(&self) -> Duration {
        self.power.as_ref().map_or(Duration::ZERO, |power| power.since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N1: Tenure = Tenure { node: 0, life: 0 };
    const N2: Tenure = Tenure { node: 1, life: 0 };

    fn volume() -> Volume {
        let shape = VolumeShape {
            data: vec![0, 1, 2],
            witness: None,
            home: 0,
            standbys: vec![1],
            encrypted: false,
        };
        Volume::new(0, "v1", shape, 1, false)
    }

    fn serves(volume: &mut Volume, by: Tenure, at: Instant, epoch: u64, in_sync: &[usize]) {
        let in_sync = in_sync.iter().copied().collect();
        let (state, detail) = ("online".to_owned(), String::new());
        let view = View { state, detail, serving: true, epoch, in_sync };
        // Of the first node it is known that it died, once another is asked.
        volume.observed(by, at, view, |of| (by != N1 && of == N1).then(|| at - CONFIRM));
    }

    fn write(volume: &mut Volume) -> u64 {
        let value = volume.history.fresh_value();
        let at = volume.history.write_began((0, 1), value, (1, 1), false);
        volume.history.write_acked(0, 1, at);
        value
    }

    fn read(volume: &mut Volume, value: u64) {
        let mut page = [0; cairn_sim::disk::PAGE];
        volume.history.encode(0, value, &mut page);
        let invoked = volume.history.tick();
        volume.history.read_ended(0, &page, invoked);
    }

    #[test]
    fn a_member_that_lost_power_stays_away_until_the_nexus_has_left_it_out() {
        let mut volume = volume();
        serves(&mut volume, N1, Instant::now(), 1, &[0, 1, 2]);
        volume.killed(&[1], &[1], false);
        assert!(volume.holds_back(1) && !volume.holds_back(0));
        serves(&mut volume, N1, Instant::now(), 1, &[0, 1, 2]);
        assert!(volume.holds_back(1));
        serves(&mut volume, N1, Instant::now(), 1, &[0, 2]);
        assert!(!volume.holds_back(1));
        assert_eq!((volume.strict, volume.lots), (1, 0));
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn what_others_have_is_not_lost_with_one() {
        let mut volume = volume();
        let a = write(&mut volume);
        let _b = write(&mut volume);
        serves(&mut volume, N1, Instant::now(), 1, &[0, 1, 2]);
        volume.killed(&[1], &[1], true);
        assert!(!volume.holds_back(1), "nothing else is wrong");
        read(&mut volume, a);
    }

    #[test]
    fn a_nexus_that_dies_with_a_member_leaves_a_choice() {
        let mut volume = volume();
        let a = write(&mut volume);
        let _b = write(&mut volume);
        serves(&mut volume, N1, Instant::now(), 1, &[0, 1, 2]);
        volume.killed(&[0], &[0], true);
        assert_eq!(volume.lots, 1);
        read(&mut volume, a);
        read(&mut volume, a);
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn what_was_flushed_is_lost_by_nobody() {
        let mut volume = volume();
        let a = write(&mut volume);
        let _b = write(&mut volume);
        let flush = volume.history.tick();
        volume.history.flush_acked(1, flush);
        volume.killed(&[0, 1, 2], &[0, 1, 2], true);
        read(&mut volume, a);
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn a_write_of_a_dead_nexus_does_not_come_late() {
        let mut volume = volume();
        let start = Instant::now();
        serves(&mut volume, N1, start, 1, &[0, 1, 2]);
        let value = volume.history.fresh_value();
        let at = volume.history.write_began((0, 1), value, (1, 1), false);
        volume.lost_path(0, 1, at, N1);
        let later = start + Duration::from_secs(1);
        serves(&mut volume, N2, later, 2, &[0, 1, 2]);
        serves(&mut volume, N2, later + 2 * CONFIRM, 2, &[0, 1, 2]);
        let kept = write(&mut volume);
        read(&mut volume, kept);
        read(&mut volume, value);
    }

    #[test]
    fn one_of_a_nexus_that_may_live_comes_whenever_it_likes() {
        let mut volume = volume();
        let start = Instant::now();
        let value = volume.history.fresh_value();
        let at = volume.history.write_began((0, 1), value, (1, 1), false);
        volume.lost_path(0, 1, at, N2);
        serves(&mut volume, N2, start, 2, &[0, 1, 2]);
        serves(&mut volume, N2, start + 2 * CONFIRM, 2, &[0, 1, 2]);
        let kept = write(&mut volume);
        read(&mut volume, kept);
        read(&mut volume, value);
    }
}
