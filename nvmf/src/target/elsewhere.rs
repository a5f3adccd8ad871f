//! Subsystems that other targets of the same process have. One target, with the process's listeners, is told of them
//! all: it has the discovery log, and says which target a new connection is for.

use std::collections::VecDeque;

use super::{Port, Target};

/// Names another target of the process; whoever tells of its subsystems chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(pub u16);

/// What one target tells another of a subsystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listing {
    /// It is there, and so.
    Here {
        /// NQN.
        nqn: String,
        /// The host NQNs that may connect; nothing for any.
        allowed_hosts: Option<Vec<String>>,
        /// Whether the discovery log lists it.
        discoverable: bool,
        /// Where else hosts reach it, at other processes.
        elsewhere: Vec<Port>,
    },
    /// It is not there any more.
    Gone {
        /// NQN.
        nqn: String,
    },
}

impl Listing {
    /// The subsystem.
    #[must_use]
    pub fn nqn(&self) -> &str {
        match self {
            Self::Here { nqn, .. } | Self::Gone { nqn } => nqn,
        }
    }

    fn is_discoverable(&self) -> bool {
        matches!(self, Self::Here { discoverable: true, .. })
    }
}

#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    /// Subsystems of others, none of them [`Listing::Gone`].
    known: Vec<(Owner, Listing)>,
    /// Whether changes here are told to others, and those that were not told yet.
    announces: bool,
    untold: VecDeque<Listing>,
}

impl Target {
    /// Has changes of subsystems be told: see [`Target::poll_listing`].
    pub fn announce_subsystems(&mut self) {
        self.elsewhere.announces = true;
    }

    /// What the target that has the discovery log is to be told next.
    pub fn poll_listing(&mut self) -> Option<Listing> {
        self.elsewhere.untold.pop_front()
    }

    /// Another target of the process tells of a subsystem: connections to it are that one's, and the discovery log
    /// lists it.
    pub fn handle_listing(&mut self, owner: Owner, listing: Listing) {
        let known = &mut self.elsewhere.known;
        let at = known.iter().position(|(of, l)| *of == owner && l.nqn() == listing.nqn());
        let before = at.map(|at| known[at].1.clone());
        let listed =
            listing.is_discoverable() || before.as_ref().is_some_and(Listing::is_discoverable);
        let changed = before.as_ref() != Some(&listing);
        match (&listing, at) {
            (Listing::Gone { .. }, Some(at)) => {
                known.remove(at);
            }
            (Listing::Gone { .. }, None) => {}
            (Listing::Here { .. }, Some(at)) => known[at].1 = listing,
            (Listing::Here { .. }, None) => known.push((owner, listing)),
        }
        if changed && listed {
            self.discovery_changed();
        }
    }

    /// Whose subsystem it is, where it is none of this target's.
    pub(super) fn owner_of(&self, nqn: &str) -> Option<Owner> {
        let found = self.elsewhere.known.iter().find(|(_, listing)| listing.nqn() == nqn)?;
        self.subsystem_by_nqn(nqn).is_none().then_some(found.0)
    }

    /// Those of other targets that the discovery log lists for a host.
    pub(super) fn listed_elsewhere(&self, hostnqn: &str) -> impl Iterator<Item = (&str, &[Port])> {
        self.elsewhere.known.iter().filter_map(move |(_, listing)| match listing {
            Listing::Here { nqn, allowed_hosts, discoverable: true, elsewhere } => {
                let allowed =
                    allowed_hosts.as_ref().is_none_or(|all| all.iter().any(|h| h == hostnqn));
                allowed.then_some((nqn.as_str(), elsewhere.as_slice()))
            }
            _ => None,
        })
    }

    pub(super) fn announce(&mut self, id: super::SubsystemId) {
        if !self.elsewhere.announces {
            return;
        }
        let Some(subsystem) = self.subsystem(id) else { return };
        let listing = Listing::Here {
            nqn: subsystem.config.nqn.clone(),
            allowed_hosts: subsystem.config.allowed_hosts.clone(),
            discoverable: subsystem.config.discoverable,
            elsewhere: subsystem.elsewhere.clone(),
        };
        self.elsewhere.untold.push_back(listing);
    }

    pub(super) fn announce_removed(&mut self, nqn: &str) {
        if self.elsewhere.announces {
            self.elsewhere.untold.push_back(Listing::Gone { nqn: nqn.to_owned() });
        }
    }
}

#[cfg(test)]
mod tests;
