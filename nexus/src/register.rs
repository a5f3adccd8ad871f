//! A volume's register, and the rules that whoever holds one goes by.
//!
//! A holder is a replica, a witness, or anything else that can keep a [`Register`] on stable storage and
//! change it by compare-and-swap: it reads what is held, asks [`consider`], stores what that says while
//! what is held is still the same, and answers then. One that can store nothing any more says so to all but a
//! read, with [`IoStatus::MediaError`]. The nexus knows nothing else of a holder.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{Epoch, IoStatus};

use crate::types::ChildReply;

/// A longer lease is not granted: nobody is made to wait for ever.
pub const MAX_LEASE_MS: u64 = 60_000;

/// What one voter holds of the volume's register. `accepted_epoch` and `seq` order configurations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Register {
    /// No configuration of an older epoch is accepted any more.
    pub promised_epoch: Epoch,
    /// The epoch of the accepted configuration; 0 where there is none yet.
    pub accepted_epoch: Epoch,
    /// Counts the configurations within an epoch.
    pub seq: u64,
    /// The accepted configuration, encoded; empty where there is none yet.
    pub config: Vec<u8>,
    /// Told with every answer and stored nowhere: which life of the replica's machine this is. A
    /// machine that lost power has another one, and its disks' volatile caches are empty.
    pub incarnation: u128,
    /// Told and stored likewise: the replica's size in blocks; 0 where it is not told.
    pub blocks: u64,
    /// Told likewise, where an epoch is promised: for how many milliseconds a lease lasts that was granted to
    /// an older one.
    pub lease_ms: u64,
}

/// What a nexus asks of a holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterOp {
    /// Tell what the register holds.
    Read,
    /// Promise to accept nothing older than this epoch, and bind the session to it. The epoch must be newer
    /// than the one that was promised; with `again`, it may be that one. What the holder has in hand for
    /// nexuses of earlier epochs ends before it answers; from then on it takes nothing of theirs.
    Promise {
        /// The epoch.
        epoch: Epoch,
        /// Whether the nexus has the epoch already: this holder may have promised it before, or have been
        /// away when a majority did.
        again: bool,
    },
    /// Store this register durably, unless a newer epoch was promised.
    Accept(Register),
    /// Promise nothing newer without telling for how long this lasts: a lease of so many milliseconds; 0: the
    /// nexus answers no reads any more. Refused where a newer epoch was promised.
    Renew {
        /// The epoch.
        epoch: Epoch,
        /// For how long.
        lease_ms: u64,
    },
    /// Grow to this size, unless a newer epoch was promised.
    Resize {
        /// The epoch.
        epoch: Epoch,
        /// The size in blocks.
        blocks: u64,
    },
}

/// What a holder does with an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Answers this, and changes nothing.
    Answer(ChildReply),
    /// Stores this durably, and answers what it holds then.
    Store(Register),
    /// Notes the lease, in memory alone, and answers an empty register. What it tells of leases after a
    /// restart is in [`Register::lease_ms`].
    Grant {
        /// To which epoch.
        epoch: Epoch,
        /// From now on.
        lease_ms: u64,
    },
    /// Grows to this many blocks, and answers what it holds then.
    Grow(u64),
}

/// What becomes of `op` at a holder of `held`.
#[must_use]
pub fn consider(held: Register, op: &RegisterOp) -> Verdict {
    let fenced = Verdict::Answer(Err(IoStatus::Fenced));
    match op {
        RegisterOp::Read => Verdict::Answer(Ok(held)),
        // A majority has promised an epoch that is taken up again, so it is its nexus's alone: a holder
        // that was away then promises it now.
        RegisterOp::Promise { epoch, again: true } if *epoch == held.promised_epoch => {
            Verdict::Answer(Ok(held))
        }
        RegisterOp::Promise { epoch, .. } if *epoch > held.promised_epoch => {
            let promised = Register { promised_epoch: *epoch, ..held };
            match on(Mutant::PromiseNotStored) {
                true => Verdict::Answer(Ok(promised)),
                false => Verdict::Store(promised),
            }
        }
        RegisterOp::Accept(new) => {
            let admitted = new.accepted_epoch >= held.promised_epoch;
            let newer = (new.accepted_epoch, new.seq) >= (held.accepted_epoch, held.seq);
            if !newer || !(admitted || on(Mutant::AcceptOldEpoch)) {
                return fenced;
            }
            // The promise never goes back, whatever is said of it.
            let promised_epoch = new.promised_epoch.max(new.accepted_epoch);
            Verdict::Store(Register { promised_epoch, ..new.clone() })
        }
        RegisterOp::Renew { epoch, .. } | RegisterOp::Resize { epoch, .. }
            if *epoch < held.promised_epoch =>
        {
            fenced
        }
        // A lease is of an epoch that was promised.
        RegisterOp::Renew { epoch, lease_ms }
            if *epoch > held.promised_epoch || *lease_ms > MAX_LEASE_MS =>
        {
            Verdict::Answer(Err(IoStatus::InvalidField))
        }
        RegisterOp::Renew { epoch, lease_ms } => {
            Verdict::Grant { epoch: *epoch, lease_ms: *lease_ms }
        }
        RegisterOp::Resize { blocks, .. } if *blocks <= held.blocks => Verdict::Answer(Ok(held)),
        RegisterOp::Resize { blocks, .. } => Verdict::Grow(*blocks),
        RegisterOp::Promise { .. } => fenced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> Register {
        Register {
            promised_epoch: Epoch(5),
            accepted_epoch: Epoch(4),
            seq: 7,
            blocks: 10,
            ..Register::default()
        }
    }

    fn accept(promised: u64, accepted: u64, seq: u64) -> Verdict {
        let new = Register {
            promised_epoch: Epoch(promised),
            accepted_epoch: Epoch(accepted),
            seq,
            ..Register::default()
        };
        consider(held(), &RegisterOp::Accept(new))
    }

    const FENCED: Verdict = Verdict::Answer(Err(IoStatus::Fenced));

    #[test]
    fn an_epoch_is_promised_once_but_to_whoever_has_it() {
        let promise =
            |epoch, again| consider(held(), &RegisterOp::Promise { epoch: Epoch(epoch), again });
        assert_eq!(promise(4, false), FENCED);
        assert_eq!(promise(4, true), FENCED);
        assert_eq!(promise(5, false), FENCED);
        assert_eq!(promise(5, true), Verdict::Answer(Ok(held())));
        let next = Register { promised_epoch: Epoch(6), ..held() };
        assert_eq!(promise(6, false), Verdict::Store(next.clone()));
        assert_eq!(promise(6, true), Verdict::Store(next));
    }

    #[test]
    fn nothing_older_than_the_promise_is_accepted_and_the_promise_never_goes_back() {
        assert_eq!(accept(5, 4, 8), FENCED);
        assert_eq!(accept(9, 4, 8), FENCED);
        let Verdict::Store(stored) = accept(0, 5, 1) else { panic!("an epoch that was promised") };
        assert_eq!((stored.promised_epoch, stored.accepted_epoch), (Epoch(5), Epoch(5)));
        let Verdict::Store(stored) = accept(0, 6, 1) else { panic!("a later epoch") };
        assert_eq!(stored.promised_epoch, Epoch(6));
        let stored = Register { accepted_epoch: Epoch(5), ..held() };
        let old = Register { seq: 6, promised_epoch: Epoch(5), ..stored.clone() };
        assert_eq!(consider(stored, &RegisterOp::Accept(old)), FENCED);
    }

    #[test]
    fn a_lease_and_a_size_are_the_current_epochs() {
        let renew = |epoch, lease_ms| {
            consider(held(), &RegisterOp::Renew { epoch: Epoch(epoch), lease_ms })
        };
        assert_eq!(renew(4, 100), FENCED);
        assert_eq!(renew(5, 100), Verdict::Grant { epoch: Epoch(5), lease_ms: 100 });
        let wrong = Verdict::Answer(Err(IoStatus::InvalidField));
        assert_eq!((renew(6, 100), renew(5, MAX_LEASE_MS + 1)), (wrong.clone(), wrong));
        let grow =
            |epoch, blocks| consider(held(), &RegisterOp::Resize { epoch: Epoch(epoch), blocks });
        assert_eq!(grow(4, 20), FENCED);
        assert_eq!(grow(5, 20), Verdict::Grow(20));
        assert_eq!(grow(5, 10), Verdict::Answer(Ok(held())));
    }
}
