#![forbid(unsafe_code)]
//! The nexus: one volume's write fan-out, read routing and configuration, without I/O.
//!
//! A [`Nexus`] takes host requests ([`Nexus::submit`]) and events of its children (`handle_*`), and
//! gives child I/O ([`Nexus::poll_child`]), acknowledgements ([`Nexus::poll_done`]) and buffers that
//! are free again ([`Nexus::poll_release`]). It knows neither how a child is reached nor how it
//! stores; time is an argument, in milliseconds.
//!
//! What it holds to:
//! - a mutation is acked once every member of the *committed* in-sync set has completed it;
//! - a member that fails is taken out by a configuration that a majority of the voters has stored
//!   durably, before any write that it missed is acked;
//! - two mutations that overlap run one after the other, and a read that overlaps a mutation in
//!   flight waits for it, so that no later read goes back;
//! - a block that a member cannot read is read from another and written anew; a write that met a full
//!   pool is answered once the members are alike again;
//! - an atomic write is in place on all members, or on none, before anything that overlaps it is read: what it
//!   writes over is in the undo log of each until then;
//! - a read is answered under a lease that a majority of the voters has granted, and whoever takes the volume
//!   over serves nothing before that is over;
//! - a volume starts only from the highest configuration that a majority of the voters knows, and
//!   with at least one member of its in-sync set.

mod assembly;
mod atomic;
mod bits;
mod children;
mod commit;
mod config;
mod copy;
mod lease;
mod mend;
mod nexus;
mod patience;
mod ranges;
mod rebuild;
mod reconcile;
mod reconfigure;
mod register;
mod requests;
mod scrub;
mod settle;
mod slots;
mod standing;
mod types;
mod upkeep;
mod voters;

pub use children::{ChildState, FaultReason};
pub use config::{Config, ConfigError, MAX_CONFIG, MAX_DELETED, Member, PLACE, Place};
pub use mend::{MEND_RESERVE, MendCounters};
pub use nexus::Nexus;
pub use rebuild::{RebuildEnd, RebuildRecord, RebuildReport, RebuildStage};
pub use scrub::{Finding, Found, MAX_FINDINGS, ScrubReport, ScrubState};
pub use types::{
    ChildId, ChildIo, ChildOp, ChildReply, ChildSpec, ChildStatus, Done, Event, FOREIGN_TICKET,
    MAX_CHILDREN, NexusConfig, Pace, Purpose, Status, Ticket, VolumeState, change,
};

pub use reconfigure::ChangeError;
pub use register::{MAX_LEASE_MS, Register, RegisterOp, Verdict, consider};
pub use upkeep::EXTENT_BLOCKS;

#[cfg(test)]
mod tests;
