//! Persistent reservations of one volume: who is registered, and what is reserved, whatever transport
//! its hosts come by. A plain value: a change gives a new state and what it does to others.
//!
//! Sources: SPC-5, section 5.14; NVMe Base, Reservations.

mod encoding;

pub use self::encoding::{DecodeError, MAX_ENCODED};

/// A host, as it is known across its sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registrant {
    /// An I_T nexus of iSCSI.
    Iscsi {
        /// The initiator's name.
        initiator: String,
        /// Its session id: together they are the initiator port.
        isid: [u8; 6],
        /// The target portal group: the target port.
        port_group: u16,
    },
    /// A host of NVMe, all of its controllers.
    Nvme {
        /// The host identifier: this alone says who it is.
        host_id: u128,
        /// Its name, for people.
        host_nqn: String,
    },
}

impl Registrant {
    /// Whether both are the same host.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Nvme { host_id: a, .. }, Self::Nvme { host_id: b, .. }) => a == b,
            _ => self == other,
        }
    }

    /// The initiator's name or the host's NQN.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Iscsi { initiator: name, .. } | Self::Nvme { host_nqn: name, .. } => name,
        }
    }
}

/// What a reservation allows to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReservationType {
    /// Only the holder writes.
    WriteExclusive,
    /// Only the holder reads and writes.
    ExclusiveAccess,
    /// Only registrants write.
    WriteExclusiveRegistrantsOnly,
    /// Only registrants read and write.
    ExclusiveAccessRegistrantsOnly,
    /// Only registrants write; all of them hold the reservation.
    WriteExclusiveAllRegistrants,
    /// Only registrants read and write; all of them hold the reservation.
    ExclusiveAccessAllRegistrants,
}

impl ReservationType {
    /// All of them, ascending by code.
    pub const ALL: [Self; 6] = [
        Self::WriteExclusive,
        Self::ExclusiveAccess,
        Self::WriteExclusiveRegistrantsOnly,
        Self::ExclusiveAccessRegistrantsOnly,
        Self::WriteExclusiveAllRegistrants,
        Self::ExclusiveAccessAllRegistrants,
    ];

    /// TYPE of PERSISTENT RESERVE OUT.
    #[must_use]
    pub const fn scsi_code(self) -> u8 {
        match self {
            Self::WriteExclusive => 1,
            Self::ExclusiveAccess => 3,
            Self::WriteExclusiveRegistrantsOnly => 5,
            Self::ExclusiveAccessRegistrantsOnly => 6,
            Self::WriteExclusiveAllRegistrants => 7,
            Self::ExclusiveAccessAllRegistrants => 8,
        }
    }

    /// RTYPE of Reservation Acquire.
    #[must_use]
    pub const fn nvme_code(self) -> u8 {
        match self {
            Self::WriteExclusive => 1,
            Self::ExclusiveAccess => 2,
            Self::WriteExclusiveRegistrantsOnly => 3,
            Self::ExclusiveAccessRegistrantsOnly => 4,
            Self::WriteExclusiveAllRegistrants => 5,
            Self::ExclusiveAccessAllRegistrants => 6,
        }
    }

    /// The type that SCSI calls so.
    #[must_use]
    pub fn from_scsi(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.scsi_code() == code)
    }

    /// The type that NVMe calls so.
    #[must_use]
    pub fn from_nvme(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.nvme_code() == code)
    }

    /// Whether all registrants hold it.
    #[must_use]
    pub const fn is_held_by_all(self) -> bool {
        matches!(self, Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants)
    }

    /// Whether registrants may do what they like under it.
    #[must_use]
    pub const fn serves_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    /// Whether everybody may read under it.
    const fn lets_others_read(self) -> bool {
        matches!(
            self,
            Self::WriteExclusive
                | Self::WriteExclusiveRegistrantsOnly
                | Self::WriteExclusiveAllRegistrants
        )
    }
}

/// What a command does to a volume, as a reservation of another looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// Nothing that a reservation keeps anybody from.
    Free,
    /// It reads.
    Reads,
    /// It writes, or changes what others see.
    Writes,
}

/// A registered host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Its reservation key; never 0.
    pub key: u64,
    /// The host.
    pub registrant: Registrant,
    /// It holds the reservation, and no other does.
    holder: bool,
}

/// What a host asks to be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The host.
    pub registrant: Registrant,
    /// The key that it says it is registered with: RESERVATION KEY, CRKEY.
    pub key: u64,
    /// What to do.
    pub action: Action,
}

/// What to do to the reservations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Register the host, give it another key, or end its registration. Its key has to be right: 0
    /// where it is not registered.
    Register {
        /// The new key: SERVICE ACTION RESERVATION KEY, NRKEY; 0 ends the registration.
        new_key: u64,
        /// APTPL or CPTPL; nothing leaves it as it is.
        aptpl: Option<bool>,
    },
    /// The same, whatever its key is now.
    RegisterAndIgnore {
        /// As of `Register`.
        new_key: u64,
        /// As of `Register`.
        aptpl: Option<bool>,
    },
    /// Register the host, as NVMe has it: its key is not looked at, and one that it has already stays.
    Join {
        /// NRKEY; never 0.
        new_key: u64,
        /// As of `Register`.
        aptpl: Option<bool>,
    },
    /// Give a registered host another key, or end its registration, as NVMe has it.
    Replace {
        /// NRKEY; 0 ends the registration.
        new_key: u64,
        /// As of `Register`.
        aptpl: Option<bool>,
        /// IEKEY: whatever its key is now; one that is not registered gets the new key.
        ignore: bool,
    },
    /// Keep the reservations after a loss of power, or not. Nobody has to be registered.
    Persist(bool),
    /// Reserve the volume.
    Reserve(ReservationType),
    /// End the host's reservation of this type.
    Release(ReservationType),
    /// End all registrations and the reservation.
    Clear,
    /// End the registrations of a key, and take the reservation where they held it.
    Preempt {
        /// Whose: SERVICE ACTION RESERVATION KEY, PRKEY. 0 stands for all others where all hold the
        /// reservation.
        victim: u64,
        /// What the volume is reserved as then.
        kind: ReservationType,
        /// Abort the commands of those whose registrations end.
        abort: bool,
    },
}

/// Why the reservations were not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The key is not the host's, or another holds the reservation.
    #[error("the key is not the host's, or another host holds the reservation")]
    Conflict,
    /// A release names another type than the reservation's.
    #[error("the reservation is of another type than the one to release")]
    InvalidRelease,
    /// Key 0 names nobody.
    #[error("key 0 names nobody to preempt, for not all registrants hold the reservation")]
    InvalidKey,
    /// A registration does not fit.
    #[error("the volume has no room for another registration; end one that is not used any more")]
    NoRoom,
}

/// What a host is told of a change that another made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// RESERVATIONS PREEMPTED: everything was cleared.
    ReservationsPreempted,
    /// RESERVATIONS RELEASED: a reservation that served it has ended.
    ReservationsReleased,
    /// REGISTRATIONS PREEMPTED: it is not registered any more.
    RegistrationsPreempted,
}

/// What a change does to others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effects {
    /// Who is to be told what.
    pub notices: Vec<(Registrant, Notice)>,
    /// Whose commands are to be aborted.
    pub abort: Vec<Registrant>,
}

/// The registrations of a volume and its reservation.
///
/// It always fits [`MAX_ENCODED`] bytes: a registration that would not is refused.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reservations {
    generation: u32,
    aptpl: bool,
    /// In the order of registration.
    registrations: Vec<Registration>,
    reserved: Option<ReservationType>,
}

impl Reservations {
    /// Whether nobody is registered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.registrations.is_empty()
    }

    /// PRGENERATION, GEN: how often registrations have changed.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// APTPL, PTPLS: whether a host asked for it to live on after a loss of power.
    #[must_use]
    pub fn aptpl(&self) -> bool {
        self.aptpl
    }

    /// Who is registered, in that order.
    #[must_use]
    pub fn registrations(&self) -> &[Registration] {
        &self.registrations
    }

    /// What the volume is reserved as.
    #[must_use]
    pub fn reserved(&self) -> Option<ReservationType> {
        self.reserved
    }

    /// Whether a registration holds the reservation, alone or with all others.
    #[must_use]
    pub fn holds(&self, registration: &Registration) -> bool {
        registration.holder || self.reserved.is_some_and(ReservationType::is_held_by_all)
    }

    /// The registration that holds the reservation alone.
    #[must_use]
    pub fn holder(&self) -> Option<&Registration> {
        self.registrations.iter().find(|r| r.holder)
    }

    /// A host's registration.
    #[must_use]
    pub fn find(&self, who: &Registrant) -> Option<&Registration> {
        self.registrations.iter().find(|r| r.registrant.is(who))
    }

    /// Whether a command of a host, or of somebody who is none, meets a reservation that does not
    /// allow it. It allocates nothing.
    #[must_use]
    pub fn conflicts(&self, who: Option<&Registrant>, guard: Guard) -> bool {
        let Some(kind) = self.reserved else { return false };
        if guard == Guard::Free || guard == Guard::Reads && kind.lets_others_read() {
            return false;
        }
        let registration = who.and_then(|who| self.find(who));
        !registration.is_some_and(|r| r.holder || kind.serves_registrants())
    }

    /// Changes the reservations: what that does to others.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub fn apply(&mut self, change: &Change) -> Result<Effects, Refusal> {
        let Change { registrant: who, key, action } = change;
        let registered = self.find(who).map(|r| r.key);
        let known = registered == Some(*key);
        match *action {
            Action::Register { .. } if registered.unwrap_or(0) != *key => Err(Refusal::Conflict),
            Action::Join { new_key, .. } if registered.unwrap_or(new_key) != new_key => {
                Err(Refusal::Conflict)
            }
            Action::Replace { ignore: false, .. } if !known => Err(Refusal::Conflict),
            Action::Replace { new_key: 0, .. } if registered.is_none() => Err(Refusal::Conflict),
            Action::Register { new_key, aptpl }
            | Action::RegisterAndIgnore { new_key, aptpl }
            | Action::Join { new_key, aptpl }
            | Action::Replace { new_key, aptpl, .. } => {
                self.register(who, registered.is_some(), new_key, aptpl)
            }
            Action::Persist(aptpl) => {
                self.aptpl = aptpl;
                Ok(Effects::default())
            }
            _ if !known => Err(Refusal::Conflict),
            Action::Reserve(kind) => self.reserve(who, kind),
            Action::Release(kind) => self.release(who, kind),
            Action::Clear => Ok(self.clear(who)),
            Action::Preempt { victim, kind, abort } => self.preempt(who, victim, kind, abort),
        }
    }

    fn is_holder(&self, who: &Registrant) -> bool {
        self.find(who).is_some_and(|r| self.holds(r))
    }

    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    fn register(
        &mut self,
        who: &Registrant,
        registered: bool,
        key: u64,
        aptpl: Option<bool>,
    ) -> Result<Effects, Refusal> {
        let mut effects = Effects::default();
        match (registered, key) {
            // Nobody was there, and nobody is.
            (false, 0) => return Ok(effects),
            (false, _) if !self.has_room_for(who) => return Err(Refusal::NoRoom),
            (false, _) => {
                let registrant = who.clone();
                self.registrations.push(Registration { key, registrant, holder: false });
            }
            (true, 0) => {
                let held = self.is_holder(who);
                self.registrations.retain(|r| !r.registrant.is(who));
                let by_others = self.reserved.is_some_and(ReservationType::is_held_by_all)
                    && !self.registrations.is_empty();
                if held && !by_others {
                    self.end_reservation(who, &mut effects);
                }
            }
            (true, _) => {
                for r in self.registrations.iter_mut().filter(|r| r.registrant.is(who)) {
                    r.key = key;
                }
            }
        }
        self.aptpl = aptpl.unwrap_or(self.aptpl);
        self.changed();
        Ok(effects)
    }

    fn reserve(&mut self, who: &Registrant, kind: ReservationType) -> Result<Effects, Refusal> {
        match self.reserved {
            None => self.hold(who, kind),
            Some(now) if now == kind && self.is_holder(who) => {}
            Some(_) => return Err(Refusal::Conflict),
        }
        Ok(Effects::default())
    }

    fn hold(&mut self, who: &Registrant, kind: ReservationType) {
        self.reserved = Some(kind);
        for r in &mut self.registrations {
            r.holder = !kind.is_held_by_all() && r.registrant.is(who);
        }
    }

    fn release(&mut self, who: &Registrant, kind: ReservationType) -> Result<Effects, Refusal> {
        let mut effects = Effects::default();
        match self.reserved {
            Some(now) if self.is_holder(who) => {
                if now != kind {
                    return Err(Refusal::InvalidRelease);
                }
                self.end_reservation(who, &mut effects);
            }
            // Not its own: nothing happens.
            _ => {}
        }
        Ok(effects)
    }

    fn clear(&mut self, who: &Registrant) -> Effects {
        let mut effects = Effects::default();
        for r in self.registrations.drain(..).filter(|r| !r.registrant.is(who)) {
            effects.notices.push((r.registrant, Notice::ReservationsPreempted));
        }
        self.reserved = None;
        self.changed();
        effects
    }

    /// The reservation ends by the hand of `who`; other registrants that it served are told.
    fn end_reservation(&mut self, who: &Registrant, effects: &mut Effects) {
        let served = self.reserved.take().is_some_and(ReservationType::serves_registrants);
        for r in &mut self.registrations {
            r.holder = false;
        }
        if served {
            self.tell_others(who, Notice::ReservationsReleased, effects);
        }
    }

    fn tell_others(&self, who: &Registrant, notice: Notice, effects: &mut Effects) {
        for r in self.registrations.iter().filter(|r| !r.registrant.is(who)) {
            effects.notices.push((r.registrant.clone(), notice));
        }
    }

    fn preempt(
        &mut self,
        who: &Registrant,
        victim: u64,
        kind: ReservationType,
        abort: bool,
    ) -> Result<Effects, Refusal> {
        let of_all = self.reserved.is_some_and(ReservationType::is_held_by_all);
        if victim == 0 && !of_all {
            return Err(Refusal::InvalidKey);
        }
        let is_meant = |r: &Registration| victim == 0 || r.key == victim;
        if !self.registrations.iter().any(is_meant) {
            return Err(Refusal::Conflict);
        }
        let takes = if of_all { victim == 0 } else { self.holder().is_some_and(is_meant) };
        let mut effects = Effects::default();
        self.registrations.retain(|r| {
            let goes = is_meant(r) && !r.registrant.is(who);
            if goes {
                effects.notices.push((r.registrant.clone(), Notice::RegistrationsPreempted));
                if abort {
                    effects.abort.push(r.registrant.clone());
                }
            }
            !goes
        });
        if takes {
            if self.reserved != Some(kind) {
                self.tell_others(who, Notice::ReservationsReleased, &mut effects);
            }
            self.hold(who, kind);
        }
        self.changed();
        Ok(effects)
    }
}

#[cfg(test)]
mod tests;
