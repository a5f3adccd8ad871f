//! What a configuration says besides who is in sync: the volume's size, its wrapped key, the snapshot that
//! it is being taken back to, which snapshots were deleted, what hosts have reserved, and how far a sanitize is.
//!
//! All change by a commit like any other. A larger size is committed only once every replica that is
//! there has grown to it; one that is not there grows when it comes back, before it is used. So the
//! size in the configuration is never more than what a child that takes I/O has.

use cairn_block::{IoStatus, ReplicaId, SnapshotId};

use crate::children::{ChildState, FaultReason};
use crate::config::{MAX_DELETED, Place};
use crate::nexus::Nexus;
use crate::register::RegisterOp;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildReply, Event, VolumeState};

/// What the next configuration is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) blocks: u64,
    pub(crate) encryption: Vec<u8>,
    /// While these are not those that vote, a majority of each has to store what is committed.
    pub(crate) voters: ChildSet,
    pub(crate) restoring: Option<SnapshotId>,
    pub(crate) deleted: Vec<SnapshotId>,
    pub(crate) reservations: Vec<u8>,
    pub(crate) sanitize: Vec<u8>,
    pub(crate) undo: bool,
}

/// A size that replicas are growing to.
#[derive(Debug)]
pub(crate) struct Growing {
    blocks: u64,
    since_ms: u64,
    waiting: ChildSet,
    grown: ChildSet,
}

/// Why a configuration cannot be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Nothing can be stored now.
    #[error(
        "the volume does not serve with a majority of its replicas; see what `cairn volume status` \
         says of them and try again when they are back"
    )]
    NotServing,
    /// An earlier one has not ended.
    #[error("an earlier change of the volume is being stored; try again when it is")]
    Busy,
    /// The replicas go back one by one, and nothing else is done meanwhile.
    #[error("the volume is being taken back to snapshot {0}; try again when it is")]
    Restoring(SnapshotId),
    /// Its blocks are being overwritten or erased, or that failed, and hosts wait for the end of it.
    #[error(
        "the volume is being sanitized, or that failed; `cairn volume status` says which: try again when hosts can use it"
    )]
    Sanitizing,
    /// It would be smaller.
    #[error(
        "the volume has {has} blocks and cannot shrink to {asked}: to have a smaller one, make a new \
         volume and copy what is in use"
    )]
    Shrink {
        /// Its size in blocks.
        has: u64,
        /// The size that was asked for.
        asked: u64,
    },
    /// It has no key.
    #[error("the volume is not encrypted; only a new volume can be made so")]
    NotEncrypted,
    /// There are too many already.
    #[error("a volume has at most 8 replicas; remove one first")]
    TooMany,
    /// It votes already.
    #[error("replica {0} is a member of the volume already")]
    Member(ReplicaId),
    /// It does not vote.
    #[error("replica {0} is not a member of the volume")]
    NotMember(ReplicaId),
    /// Nobody else has the data.
    #[error(
        "replica {0} is the only one that holds every acked write; wait until another one does, and \
         remove it then"
    )]
    LastInSync(ReplicaId),
    /// Those that are left could decide nothing.
    #[error(
        "without replica {0} too few voters would be there to decide anything: of those that are \
         left, a majority must be reachable"
    )]
    NoMajority(ReplicaId),
}

impl Nexus {
    /// Bytes of the blocks that hosts see; 0 where that is not known.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.config.block_size
    }

    /// A child is reached there.
    pub fn set_place(&mut self, child: ChildId, place: Place) {
        self.child(child).place = place;
    }

    /// What the configuration says of encryption: opaque here, empty where the volume has none.
    #[must_use]
    pub fn encryption(&self) -> &[u8] {
        &self.encryption
    }

    // ---- the key

    /// Whether a configuration that says this of encryption may be served.
    pub(crate) fn admits(&self, section: &[u8]) -> bool {
        match &self.config.encryption {
            None => section.is_empty(),
            Some(_) => !section.is_empty() && section == self.admitted,
        }
    }

    /// Stops assembly before the configuration is taken up: whoever has keys is asked.
    pub(crate) fn lock(&mut self, section: &[u8]) {
        self.locked = section.to_vec();
        self.assembly_stop();
        self.set_state(VolumeState::Assembling("its key is being looked for".to_owned()));
        self.push_event(Event::Locked);
    }

    /// What the configuration that was found says of encryption, after [`Event::Locked`].
    #[must_use]
    pub fn locked(&self) -> &[u8] {
        &self.locked
    }

    /// The key in [`Nexus::locked`] is at hand: assembly goes on.
    pub fn unlock(&mut self, now_ms: u64) {
        if self.watches() {
            self.admitted = std::mem::take(&mut self.locked);
            self.watch_key(None);
        } else if self.assembly.is_some() {
            self.admitted = std::mem::take(&mut self.locked);
            self.set_state(VolumeState::Assembling("its key is at hand".to_owned()));
            self.assembly_restart();
            self.settle(now_ms);
        }
    }

    /// There is no key for [`Nexus::locked`]; `why` is for people.
    pub fn refuse_key(&mut self, why: &str) {
        if self.watches() {
            self.watch_key(Some(why));
        } else if self.assembly.is_some() {
            self.refuse(why);
        }
    }

    /// Stores another wrapping of the volume's key. [`Event::KeyChanged`] tells that it is stored.
    ///
    /// # Errors
    /// [`ChangeError`] where it cannot be now; then nothing was begun.
    pub fn set_encryption(&mut self, section: Vec<u8>, now_ms: u64) -> Result<(), ChangeError> {
        self.check_change()?;
        if self.encryption.is_empty() {
            return Err(ChangeError::NotEncrypted);
        }
        self.wanted.encryption = section;
        self.commit_wanted();
        self.settle(now_ms);
        Ok(())
    }

    pub(crate) fn check_change(&self) -> Result<(), ChangeError> {
        match self.restoring() {
            Some(id) => Err(ChangeError::Restoring(id)),
            None => self.check_current(),
        }
    }

    fn check_current(&self) -> Result<(), ChangeError> {
        let there = self.voters.has_majority_in(self.able());
        let online = self.in_sync.iter().any(|c| self.is_usable(c));
        if !self.state.is_serving() || !there || !online {
            return Err(ChangeError::NotServing);
        }
        let current = self.wanted.blocks == self.config.blocks
            && self.wanted.encryption == self.encryption
            && self.wanted.voters == self.voters
            && self.wanted.restoring == self.restoring
            && self.wanted.deleted == self.deleted
            && self.wanted.reservations == self.reservations
            && self.wanted.sanitize == self.sanitize
            && self.wanted.undo == self.undo
            && self.changing.is_none()
            && self.growing.is_none();
        if current { Ok(()) } else { Err(ChangeError::Busy) }
    }

    /// The same, of what is not changed while the volume is sanitized.
    fn check_unsanitized(&self) -> Result<(), ChangeError> {
        self.check_change()?;
        if self.sanitize.is_empty() { Ok(()) } else { Err(ChangeError::Sanitizing) }
    }

    /// Stores what is wanted, with the in-sync set as it is to be.
    pub(crate) fn commit_wanted(&mut self) {
        let target = self.staying();
        if !target.is_empty() {
            self.commit_target(target);
        }
    }

    // ---- going back to a snapshot

    /// The snapshot that the volume is being taken back to: replicas may differ, and no request of a host
    /// may be submitted.
    #[must_use]
    pub fn restoring(&self) -> Option<SnapshotId> {
        self.restoring.or(self.wanted.restoring)
    }

    /// The same, by the configuration that is known to be stored.
    #[must_use]
    pub fn stored_restoring(&self) -> Option<SnapshotId> {
        self.restoring.filter(|_| self.assembly.is_none())
    }

    /// Stores that the volume is being taken back to a snapshot, before any replica is asked to; or that
    /// all have been. [`Event::Restoring`] tells that it is stored; it comes after assembly too, where a
    /// nexus before this one did not finish.
    ///
    /// # Errors
    /// [`ChangeError`] where it cannot be now; then nothing was begun.
    pub fn set_restoring(
        &mut self,
        snapshot: Option<SnapshotId>,
        now_ms: u64,
    ) -> Result<(), ChangeError> {
        match snapshot {
            Some(_) => self.check_unsanitized()?,
            None => self.check_current()?,
        }
        self.wanted.restoring = snapshot;
        self.commit_wanted();
        self.settle(now_ms);
        Ok(())
    }

    // ---- deleted snapshots

    /// The deleted snapshots that a replica may still have, as it is stored.
    #[must_use]
    pub fn deleted(&self) -> &[SnapshotId] {
        &self.deleted
    }

    /// Stores which deleted snapshots a replica may still have: one more before any replica is asked to
    /// delete it, one less once all have. [`Event::Committed`] tells that it is stored.
    ///
    /// # Errors
    /// [`ChangeError`] where it cannot be now; then nothing was begun.
    ///
    /// # Panics
    /// With more than [`MAX_DELETED`](crate::MAX_DELETED).
    pub fn set_deleted(
        &mut self,
        deleted: Vec<SnapshotId>,
        now_ms: u64,
    ) -> Result<(), ChangeError> {
        assert!(deleted.len() <= MAX_DELETED, "so many do not fit");
        self.check_unsanitized()?;
        self.wanted.deleted = deleted;
        self.commit_wanted();
        self.settle(now_ms);
        Ok(())
    }

    // ---- reservations

    /// What hosts have reserved, as it is stored; empty where they never did.
    #[must_use]
    pub fn reservations(&self) -> &[u8] {
        &self.reservations
    }

    /// Stores what hosts have reserved. [`Event::Reserved`] tells that it is stored.
    ///
    /// # Errors
    /// [`ChangeError`] where it cannot be now; then nothing was begun.
    pub fn set_reservations(&mut self, table: Vec<u8>, now_ms: u64) -> Result<(), ChangeError> {
        self.check_change()?;
        self.wanted.reservations = table;
        self.commit_wanted();
        self.settle(now_ms);
        Ok(())
    }

    // ---- a sanitize

    /// The sanitize that is under way or failed, as it is stored; empty where there is none.
    #[must_use]
    pub fn sanitize(&self) -> &[u8] {
        &self.sanitize
    }

    /// Stores that the volume is being sanitized and how far that is, or that it is over. [`Event::Sanitize`] tells that
    /// it is stored.
    ///
    /// # Errors
    /// [`ChangeError`] where it cannot be now; then nothing was begun.
    ///
    /// # Panics
    /// Where deleted snapshots are noted ([`Nexus::deleted`]): there is no room for both, and a replica that is away would
    /// keep what they have.
    pub fn set_sanitize(&mut self, sanitize: Vec<u8>, now_ms: u64) -> Result<(), ChangeError> {
        assert!(sanitize.is_empty() || self.deleted.is_empty(), "a replica may have a snapshot");
        self.check_change()?;
        self.wanted.sanitize = sanitize;
        self.commit_wanted();
        self.settle(now_ms);
        Ok(())
    }

    /// Whether every member that holds data is in sync.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let mut data = self.voters.iter().filter(|&c| self.holds_data(c));
        self.wanted.voters == self.voters && data.all(|c| self.in_sync.has(c))
    }

    // ---- the size

    /// Grows the volume, its replicas first. [`Event::Resized`] tells that it is done,
    /// [`Event::ResizeFailed`] that a replica could not and all stays as it was.
    ///
    /// # Errors
    /// [`ChangeError`] where it cannot be now; then nothing was begun.
    pub fn resize(&mut self, blocks: u64, now_ms: u64) -> Result<(), ChangeError> {
        self.check_unsanitized()?;
        let has = self.config.blocks;
        if blocks < has {
            return Err(ChangeError::Shrink { has, asked: blocks });
        }
        if blocks == has {
            self.push_event(Event::Resized(blocks));
            return Ok(());
        }
        let (waiting, grown) = (ChildSet::EMPTY, ChildSet::EMPTY);
        self.growing = Some(Growing { blocks, since_ms: now_ms, waiting, grown });
        for child in self.connected().iter() {
            // One that is joining grows as it does so.
            if self.holds_data(child) && self.child(child).state != ChildState::Joining {
                self.ask_to_grow(child, blocks, false);
                let Some(growing) = self.growing.as_mut() else { return Ok(()) };
                growing.waiting = growing.waiting.with(child);
            }
        }
        self.settle(now_ms);
        Ok(())
    }

    fn ask_to_grow(&mut self, child: ChildId, blocks: u64, rejoins: bool) {
        self.round += 1;
        let (round, epoch) = (self.round, self.epoch);
        // One that waits for a smaller size to be taken up again waits for this one.
        let waits = self.child(child).growing.is_some_and(|(_, rejoins)| rejoins);
        self.child(child).growing = Some((round, rejoins || waits));
        self.ask(child, round, RegisterOp::Resize { epoch, blocks });
    }

    /// Has a child that is bound to the epoch grow, where it is too small: `held` is its size, 0 where it
    /// did not tell. Whether it has to; its session is taken up again once it has.
    pub(crate) fn grows_first(&mut self, child: ChildId, held: u64) -> bool {
        let growing = self.growing.as_ref().map_or(0, |g| g.blocks);
        let needed = self.config.blocks.max(self.wanted.blocks).max(growing);
        if held == 0 || held >= needed || !self.holds_data(child) {
            return false;
        }
        if self.child(child).grown_to >= needed {
            // It says that it has grown and has not: not again in this session.
            self.push_event(Event::ResetChild(child));
            return true;
        }
        self.ask_to_grow(child, needed, true);
        true
    }

    pub(crate) fn handle_grow_reply(&mut self, child: ChildId, reply: &ChildReply, now_ms: u64) {
        let rejoins = self.child(child).growing.take().is_some_and(|(_, rejoins)| rejoins);
        match reply {
            Ok(held) => {
                self.child(child).grown_to = held.blocks;
                if rejoins {
                    self.rejoin(child);
                }
            }
            Err(IoStatus::Fenced) => return self.fence(),
            Err(IoStatus::PathError) => {}
            Err(status) => {
                // It cannot be used so small. The last member is not given up.
                if self.child(child).state == ChildState::Joining {
                    self.fail_child(child, FaultReason::Failed(*status));
                    self.unpark();
                }
                self.resume_commit(child);
            }
        }
        self.grow_over(child, reply.as_ref().map(|_| ()).map_err(|e| *e));
        self.settle(now_ms);
    }

    /// A replica that does not answer, and is there all the same, ends the growth: it is in use, so it
    /// cannot be left behind.
    pub(crate) fn growth_timeout(&mut self, now_ms: u64) {
        let limit = self.config.child_deadline_ms;
        let late = self.growing.take_if(|g| now_ms >= g.since_ms + limit);
        if let Some(late) = late {
            let child = late.waiting.iter().next();
            self.push_event(Event::ResizeFailed(child, IoStatus::TimedOut));
        }
    }

    /// One replica less to wait for.
    pub(crate) fn grow_over(&mut self, child: ChildId, result: Result<(), IoStatus>) {
        let in_sync = self.in_sync.has(child);
        let Some(growing) = self.growing.as_mut().filter(|g| g.waiting.has(child)) else { return };
        growing.waiting = growing.waiting.without(ChildSet::of(child));
        match result {
            Ok(()) => growing.grown = growing.grown.with(child),
            // It grows when it is back.
            Err(IoStatus::PathError) => {}
            Err(status) if in_sync => {
                self.growing = None;
                return self.push_event(Event::ResizeFailed(Some(child), status));
            }
            Err(_) => {}
        }
        if !growing.waiting.is_empty() {
            return;
        }
        let (blocks, grown) = (growing.blocks, growing.grown);
        self.growing = None;
        if grown.and(self.in_sync).is_empty() {
            return self.push_event(Event::ResizeFailed(None, IoStatus::PathError));
        }
        self.wanted.blocks = blocks;
        self.commit_wanted();
    }

    /// A configuration that says this is stored by a majority.
    pub(crate) fn take_up(&mut self, stored: Wanted) {
        if stored.blocks != self.config.blocks {
            self.config.blocks = stored.blocks;
            self.push_event(Event::Resized(stored.blocks));
        }
        self.take_up_voters(stored.voters);
        if stored.restoring != self.restoring {
            self.restoring = stored.restoring;
            // Atomic writes wait for it to be over.
            self.mends.kick();
            self.push_event(Event::Restoring(stored.restoring));
        }
        self.deleted = stored.deleted;
        self.undo = stored.undo;
        if stored.reservations != self.reservations {
            self.reservations = stored.reservations;
            self.push_event(Event::Reserved);
        }
        if stored.sanitize != self.sanitize {
            self.sanitize = stored.sanitize;
            self.push_event(Event::Sanitize);
        }
        if stored.encryption != self.encryption {
            self.encryption = stored.encryption;
            self.push_event(Event::KeyChanged);
        }
    }
}
