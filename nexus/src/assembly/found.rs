//! What the registers say that were heard, and who is missing, in words.

use cairn_block::{Epoch, ReplicaId};

use crate::children::ChildState;
use crate::config::Config;
use crate::nexus::Nexus;
use crate::register::Register;
use crate::slots::ChildSet;
use crate::types::{ChildId, Event, VolumeState};

/// A configuration of this volume that a child holds.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) child: ChildId,
    pub(crate) config: Config,
    accepted_epoch: Epoch,
    seq: u64,
}

impl Found {
    /// Orders configurations. A forced start goes before whatever was stored without it.
    fn rank(&self) -> (u64, Epoch, u64) {
        (self.config.lineage >> 32, self.accepted_epoch, self.seq)
    }
}

impl Nexus {
    fn registers(&self) -> impl Iterator<Item = (ChildId, &Register)> {
        let registers = self.assembly.iter().flat_map(|a| &a.registers);
        (0u8..).zip(registers).filter_map(|(i, r)| r.as_ref().map(|r| (ChildId(i), r)))
    }

    pub(super) fn heard(&self) -> ChildSet {
        self.registers().fold(ChildSet::EMPTY, |set, (child, _)| set.with(child))
    }

    /// All children that were not removed.
    pub(super) fn everybody(&self) -> ChildSet {
        let all = (0u8..).zip(&self.children).filter(|(_, c)| c.state != ChildState::Removed);
        all.fold(ChildSet::EMPTY, |set, (i, _)| set.with(ChildId(i)))
    }

    /// The configurations of this volume that were heard.
    pub(super) fn configs(&self) -> Vec<Found> {
        let found = self.registers().filter_map(|(child, r)| {
            let config = Config::decode(&r.config).ok()?;
            let (accepted_epoch, seq) = (r.accepted_epoch, r.seq);
            (config.volume == self.config.volume).then_some(Found {
                child,
                config,
                accepted_epoch,
                seq,
            })
        });
        found.collect()
    }

    /// The highest of them.
    pub(super) fn highest(&self) -> Option<Found> {
        self.configs().into_iter().max_by_key(Found::rank)
    }

    /// The voters that a configuration names: those that are children, and those that are not.
    pub(super) fn voters_of(&self, config: &Config) -> (ChildSet, Vec<ReplicaId>) {
        let (mut known, mut unknown) = (ChildSet::EMPTY, Vec::new());
        for member in &config.members {
            match self.child_of(member.replica) {
                Some(child) => known = known.with(child),
                None => unknown.push(member.replica),
            }
        }
        (known, unknown)
    }

    /// Children that hold a configuration of an older lineage than this, or none of this volume and one of
    /// another.
    pub(super) fn of_older_lineage(&self, lineage: u64) -> ChildSet {
        let old = |f: &Found| f.config.lineage >> 32 < lineage >> 32;
        let found = self.configs().into_iter().filter(old);
        found.fold(ChildSet::EMPTY, |set, f| set.with(f.child))
    }

    /// Children that hold no configuration although one was stored before this, or that have promised
    /// nothing although they were asked to before the first: a voter has stored a configuration since it
    /// is one, so what this one stored is gone. Its word cannot be counted on.
    pub(super) fn blank(&self, config: &Config) -> ChildSet {
        let never = |r: &Register| config.generation > 1 || r.promised_epoch == Epoch(0);
        let blank = |r: &Register| r.config.is_empty() && never(r);
        let found = self.registers().filter(|(_, r)| blank(r));
        found.fold(ChildSet::EMPTY, |set, (child, _)| set.with(child))
    }

    /// Children that hold a configuration of another volume.
    pub(super) fn foreign(&self) -> ChildSet {
        let other =
            |r: &Register| Config::decode(&r.config).is_ok_and(|c| c.volume != self.config.volume);
        let found = self.registers().filter(|(_, r)| other(r));
        found.fold(ChildSet::EMPTY, |set, (child, _)| set.with(child))
    }

    pub(super) fn has_foreign(&self) -> bool {
        self.registers().any(|(_, r)| !r.config.is_empty())
    }

    /// A configuration that this program cannot read, in words.
    pub(super) fn first_unreadable(&self) -> Option<String> {
        self.registers().filter(|(_, r)| !r.config.is_empty()).find_map(|(child, r)| {
            let error = Config::decode(&r.config).err()?;
            let replica = self.children[usize::from(child.0)].replica;
            Some(format!("the configuration that replica {replica} stores cannot be read: {error}"))
        })
    }

    /// Two forced starts that did not know of each other, in words.
    pub(super) fn two_lineages(&self) -> Option<String> {
        let found = self.configs();
        let highest = found.iter().max_by_key(|f| f.rank())?;
        let same = |f: &&Found| f.config.lineage >> 32 == highest.config.lineage >> 32;
        let other =
            found.iter().filter(same).find(|f| f.config.lineage != highest.config.lineage)?;
        let name = |f: &Found| self.children[usize::from(f.child.0)].replica;
        Some(format!(
            "the volume was started by force twice, and neither knew of the other: replica {} and \
             replica {} hold different data; decide which to keep, and start it by force from that one",
            name(highest),
            name(other)
        ))
    }

    /// A replica that cannot hold a new volume, in words.
    pub(super) fn first_too_small(&self) -> Option<String> {
        let small = |r: &Register| r.blocks > 0 && r.blocks < self.config.blocks;
        let mut data = self.registers().map(|(child, r)| (&self.children[usize::from(child.0)], r));
        data.find(|(c, r)| !c.witness && small(r)).map(|(c, r)| {
            format!(
                "replica {} is too small: it has {} blocks, the volume {}; make a larger replica",
                c.replica, r.blocks, self.config.blocks
            )
        })
    }

    /// Why there is no configuration, in words.
    pub(super) fn why_nothing(&self) -> String {
        let other = self.registers().find_map(|(child, r)| {
            let config = Config::decode(&r.config).ok()?;
            Some((self.children[usize::from(child.0)].replica, config.volume))
        });
        match other {
            Some((replica, volume)) => format!(
                "replica {replica} belongs to volume {volume}; check the replicas that are named for \
                 volume {}",
                self.config.volume
            ),
            None => {
                "no replica holds a configuration; the volume was never created on them".to_owned()
            }
        }
    }

    pub(super) fn names(&self, children: ChildSet, join: &str) -> String {
        let names = children.iter().map(|c| self.children[usize::from(c.0)].replica.to_string());
        names.collect::<Vec<_>>().join(join)
    }

    /// Whether the volume is to have blocks of another size here, in words.
    pub(super) fn other_block_size(&self, config: &Config) -> Option<String> {
        let (ours, told) = (self.config.block_size, config.block_size);
        (ours != told && ours != 0 && told != 0).then(|| {
            format!(
                "the volume has blocks of {told} bytes, and is to have blocks of {ours} here; name no \
                 block size, or {told}"
            )
        })
    }

    /// Tells where the configuration says that its members are: those that are no children, and those that are
    /// elsewhere and do not come up.
    pub(super) fn tell_places(&mut self, config: &Config) {
        for member in config.members.iter().filter(|m| m.place.is_told()) {
            let child = self.child_of(member.replica);
            let known = child.is_some_and(|child| {
                let c = &self.children[usize::from(child.0)];
                c.connected || c.place == member.place
            });
            if !known {
                let (replica, witness, place) = (member.replica, member.witness, member.place);
                self.push_event(Event::Place { replica, witness, place });
            }
        }
    }

    /// Whether all that a configuration names are children; says so where they are not.
    pub(super) fn knows_all(&mut self, config: &Config) -> bool {
        self.tell_places(config);
        let (_, unknown) = self.voters_of(config);
        let Some(first) = unknown.first() else { return true };
        let text = format!(
            "the volume has a replica {first} that is not among those named for it here: add it to \
             them, with where it is"
        );
        self.set_state(VolumeState::Assembling(text));
        false
    }

    /// Says which voters are needed to decide, and which of them are here.
    pub(super) fn tell_who_decides(&mut self) {
        let Some(found) = self.highest() else { return self.tell_what_is_missing() };
        let (known, unknown) = self.voters_of(&found.config);
        let here = known.and(self.heard()).without(self.blank(&found.config));
        let voters = known.len() + unknown.len();
        let mut missing = Vec::new();
        if !known.without(here).is_empty() {
            missing.push(format!("missing: replica {}", self.names(known.without(here), ", ")));
        }
        // They may well be there: nobody has told this nexus where.
        if !unknown.is_empty() {
            let names: Vec<String> = unknown.iter().map(ToString::to_string).collect();
            missing.push(format!(
                "not among those named for it here: replica {}; add them to those, with where they are",
                names.join(", ")
            ));
        }
        let is_here = match here.len() {
            0 => "none is here".to_owned(),
            _ => format!("only {} is here", self.names(here, ", ")),
        };
        self.set_state(VolumeState::Assembling(format!(
            "{} of {voters} voters are needed to decide, and {is_here}; {}",
            voters / 2 + 1,
            missing.join("; ")
        )));
    }
}
