//! Persistent reservations of one logical unit (SPC-5, section 5.14).

use super::opcodes::Guard;
use super::sense::{Sense, Status};
use super::unit::Attention;
use crate::wire::{len32, put, u64_at};

/// Registrations of one logical unit at most.
const MAX_REGISTRATIONS: usize = 256;
/// Bytes of the parameter list of PERSISTENT RESERVE OUT.
const OUT_LEN: usize = 24;

/// An I_T nexus, as it is known across sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registrant {
    /// The initiator's name.
    pub initiator: String,
    /// Its session id: together they are the initiator port.
    pub isid: [u8; 6],
    /// The target portal group: the target port.
    pub port_group: u16,
}

impl Registrant {
    /// The TransportID of an iSCSI initiator port.
    fn transport_id(&self) -> Vec<u8> {
        let isid = crate::text::hex(&self.isid);
        let text = format!("{},i,{isid}", self.initiator);
        let mut out = vec![0x45, 0, 0, 0];
        out.extend_from_slice(text.as_bytes());
        // At least one NUL, up to a whole word.
        let len = (text.len() + 1).next_multiple_of(4).max(20);
        out.resize(4 + len, 0);
        put(&mut out, 2, &u16::try_from(len).unwrap_or(0).to_be_bytes());
        out
    }
}

/// A registered nexus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Its reservation key.
    pub key: u64,
    /// The nexus.
    pub nexus: Registrant,
}

/// A reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// TYPE.
    pub kind: u8,
    /// Who holds it; nothing where all registrants do.
    pub holder: Option<Registrant>,
}

/// The registrations of a logical unit and its reservation: a plain value, to be stored where it is
/// to live on after a loss of power (`aptpl`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reservations {
    /// PRGENERATION.
    pub generation: u32,
    /// APTPL: activate persist through power loss.
    pub aptpl: bool,
    /// In the order of registration.
    pub registrations: Vec<Registration>,
    /// What is reserved.
    pub reservation: Option<Reservation>,
}

/// What a change of the reservations does to others.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// Who is to be told of what.
    pub(crate) attentions: Vec<(Registrant, Attention)>,
    /// Whose commands are to be aborted.
    pub(crate) abort: Vec<Registrant>,
}

const WRITE_EXCLUSIVE: u8 = 1;
const EXCLUSIVE_ACCESS: u8 = 3;
const WRITE_EXCLUSIVE_REGISTRANTS: u8 = 5;
const EXCLUSIVE_ACCESS_REGISTRANTS: u8 = 6;
const WRITE_EXCLUSIVE_ALL: u8 = 7;
const EXCLUSIVE_ACCESS_ALL: u8 = 8;

fn is_type(kind: u8) -> bool {
    matches!(
        kind,
        WRITE_EXCLUSIVE
            | EXCLUSIVE_ACCESS
            | WRITE_EXCLUSIVE_REGISTRANTS
            | EXCLUSIVE_ACCESS_REGISTRANTS
            | WRITE_EXCLUSIVE_ALL
            | EXCLUSIVE_ACCESS_ALL
    )
}

/// Whether all registrants hold a reservation of this type.
fn is_of_all(kind: u8) -> bool {
    kind >= WRITE_EXCLUSIVE_ALL
}

/// Whether all registrants may do what they like under it.
fn serves_registrants(kind: u8) -> bool {
    kind >= WRITE_EXCLUSIVE_REGISTRANTS
}

impl Reservations {
    /// Whether anything is registered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.registrations.is_empty()
    }

    fn find(&self, nexus: &Registrant) -> Option<&Registration> {
        self.registrations.iter().find(|r| r.nexus == *nexus)
    }

    fn is_holder(&self, nexus: &Registrant) -> bool {
        match &self.reservation {
            Some(Reservation { holder: Some(holder), .. }) => holder == nexus,
            Some(Reservation { holder: None, .. }) => self.find(nexus).is_some(),
            None => false,
        }
    }

    /// Whether a command of a nexus meets a reservation that does not allow it.
    pub(crate) fn conflicts(&self, nexus: &Registrant, guard: Guard) -> bool {
        let Some(reservation) = &self.reservation else { return false };
        if guard == Guard::Free || self.is_holder(nexus) {
            return false;
        }
        if serves_registrants(reservation.kind) && self.find(nexus).is_some() {
            return false;
        }
        let others_read = matches!(
            reservation.kind,
            WRITE_EXCLUSIVE | WRITE_EXCLUSIVE_REGISTRANTS | WRITE_EXCLUSIVE_ALL
        );
        !(others_read && guard == Guard::Reads)
    }

    /// The parameter data of PERSISTENT RESERVE IN.
    pub(crate) fn report(&self, action: u8) -> Vec<u8> {
        const READ_KEYS: u8 = 0;
        const READ_RESERVATION: u8 = 1;
        const REPORT_CAPABILITIES: u8 = 2;
        if action == REPORT_CAPABILITIES {
            // PTPL_C; TMV with all six types; PTPL_A.
            return vec![0, 8, 0x01, 0x80 | u8::from(self.aptpl), 0xea, 0x01, 0, 0];
        }
        let mut out = vec![0; 8];
        put(&mut out, 0, &self.generation.to_be_bytes());
        match action {
            READ_KEYS => {
                for r in &self.registrations {
                    out.extend_from_slice(&r.key.to_be_bytes());
                }
            }
            READ_RESERVATION => {
                if let Some(reservation) = &self.reservation {
                    let holder = reservation.holder.as_ref().and_then(|h| self.find(h));
                    let mut d = [0; 16];
                    put(&mut d, 0, &holder.map_or(0, |r| r.key).to_be_bytes());
                    d[13] = reservation.kind;
                    out.extend_from_slice(&d);
                }
            }
            _ => {
                for r in &self.registrations {
                    let id = r.nexus.transport_id();
                    let mut d = [0; 24];
                    put(&mut d, 0, &r.key.to_be_bytes());
                    if self.is_holder(&r.nexus) {
                        d[12] = 1;
                        d[13] = self.reservation.as_ref().map_or(0, |r| r.kind);
                    }
                    put(&mut d, 18, &r.nexus.port_group.to_be_bytes());
                    put(&mut d, 20, &len32(id.len()).to_be_bytes());
                    out.extend_from_slice(&d);
                    out.extend_from_slice(&id);
                }
            }
        }
        let len = len32(out.len() - 8);
        put(&mut out, 4, &len.to_be_bytes());
        out
    }

    /// PERSISTENT RESERVE OUT: what it does to others, or how it ends.
    pub(crate) fn change(
        &mut self,
        nexus: &Registrant,
        action: u8,
        scope_type: u8,
        list: &[u8],
    ) -> Result<Effects, Status> {
        const REGISTER: u8 = 0;
        const RESERVE: u8 = 1;
        const RELEASE: u8 = 2;
        const CLEAR: u8 = 3;
        const PREEMPT: u8 = 4;
        const PREEMPT_AND_ABORT: u8 = 5;
        const REGISTER_AND_IGNORE: u8 = 6;
        const APTPL: u8 = 0x01;
        if list.len() != OUT_LEN {
            return Err(Sense::PARAMETER_LIST_LENGTH.into());
        }
        let (key, action_key) = (u64_at(list, 0), u64_at(list, 8));
        let (scope, kind) = (scope_type >> 4, scope_type & 0x0f);
        let registers = matches!(action, REGISTER | REGISTER_AND_IGNORE);
        // SPEC_I_PT and ALL_TG_PT are not offered.
        if registers && list[20] & !APTPL != 0 {
            return Err(Sense::invalid_parameter(20).into());
        }
        if registers {
            let registered = self.find(nexus).map(|r| r.key);
            if action == REGISTER && registered.unwrap_or(0) != key {
                return Err(Status::ReservationConflict);
            }
            let effects = self.register(nexus, registered.is_some(), action_key)?;
            self.aptpl = list[20] & APTPL != 0;
            return Ok(effects);
        }
        if self.find(nexus).is_none_or(|r| r.key != key) {
            return Err(Status::ReservationConflict);
        }
        if action != CLEAR && (scope != 0 || !is_type(kind)) {
            return Err(Sense::invalid_cdb(2, if scope != 0 { 7 } else { 3 }).into());
        }
        match action {
            RESERVE => self.reserve(nexus, kind),
            RELEASE => self.release(nexus, kind),
            CLEAR => {
                let mut effects = Effects::default();
                for r in self.registrations.drain(..).filter(|r| r.nexus != *nexus) {
                    effects.attentions.push((r.nexus, Attention::ReservationsPreempted));
                }
                self.reservation = None;
                self.generation = self.generation.wrapping_add(1);
                Ok(effects)
            }
            PREEMPT | PREEMPT_AND_ABORT => {
                self.preempt(nexus, action_key, kind, action == PREEMPT_AND_ABORT)
            }
            _ => Err(Sense::invalid_cdb(1, 4).into()),
        }
    }

    fn register(
        &mut self,
        nexus: &Registrant,
        registered: bool,
        key: u64,
    ) -> Result<Effects, Status> {
        let mut effects = Effects::default();
        match (registered, key) {
            // Nobody was there, and nobody is.
            (false, 0) => return Ok(effects),
            (false, _) if self.registrations.len() == MAX_REGISTRATIONS => {
                return Err(Sense::INSUFFICIENT_REGISTRATIONS.into());
            }
            (false, _) => {
                self.registrations.push(Registration { key, nexus: nexus.clone() });
            }
            (true, 0) => {
                let held = self.is_holder(nexus);
                self.registrations.retain(|r| r.nexus != *nexus);
                let of_all = self.reservation.as_ref().is_some_and(|r| r.holder.is_none());
                if held && (!of_all || self.registrations.is_empty()) {
                    self.end_reservation(nexus, &mut effects);
                }
            }
            (true, _) => {
                for r in self.registrations.iter_mut().filter(|r| r.nexus == *nexus) {
                    r.key = key;
                }
            }
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(effects)
    }

    fn reserve(&mut self, nexus: &Registrant, kind: u8) -> Result<Effects, Status> {
        match &self.reservation {
            Some(r) if !self.is_holder(nexus) || r.kind != kind => {
                return Err(Status::ReservationConflict);
            }
            Some(_) => {}
            None => {
                let holder = (!is_of_all(kind)).then(|| nexus.clone());
                self.reservation = Some(Reservation { kind, holder });
            }
        }
        Ok(Effects::default())
    }

    fn release(&mut self, nexus: &Registrant, kind: u8) -> Result<Effects, Status> {
        let mut effects = Effects::default();
        match &self.reservation {
            Some(r) if self.is_holder(nexus) => {
                if r.kind != kind {
                    return Err(Sense::INVALID_RELEASE.into());
                }
                self.end_reservation(nexus, &mut effects);
            }
            _ => {}
        }
        Ok(effects)
    }

    /// The reservation ends by the hand of `nexus`; other registrants that it served are told.
    fn end_reservation(&mut self, nexus: &Registrant, effects: &mut Effects) {
        if let Some(reservation) = self.reservation.take()
            && serves_registrants(reservation.kind)
        {
            for r in self.registrations.iter().filter(|r| r.nexus != *nexus) {
                effects.attentions.push((r.nexus.clone(), Attention::ReservationsReleased));
            }
        }
    }

    fn preempt(
        &mut self,
        nexus: &Registrant,
        key: u64,
        kind: u8,
        abort: bool,
    ) -> Result<Effects, Status> {
        let mut effects = Effects::default();
        let reservation = self.reservation.clone();
        let of_all = reservation.as_ref().is_some_and(|r| r.holder.is_none());
        let takes = match &reservation {
            None => false,
            Some(Reservation { holder: None, .. }) => key == 0,
            Some(Reservation { holder: Some(holder), .. }) => {
                self.find(holder).is_some_and(|r| r.key == key)
            }
        };
        if key == 0 && !of_all {
            return Err(Sense::invalid_parameter(8).into());
        }
        let goes = |r: &Registration| if key == 0 { r.nexus != *nexus } else { r.key == key };
        if key != 0 && !self.registrations.iter().any(goes) {
            return Err(Status::ReservationConflict);
        }
        let mut kept = Vec::with_capacity(self.registrations.len());
        for r in std::mem::take(&mut self.registrations) {
            if goes(&r) && r.nexus != *nexus {
                effects.attentions.push((r.nexus.clone(), Attention::RegistrationsPreempted));
                if abort {
                    effects.abort.push(r.nexus);
                }
            } else {
                kept.push(r);
            }
        }
        self.registrations = kept;
        if takes {
            if reservation.is_some_and(|r| r.kind != kind) {
                for r in self.registrations.iter().filter(|r| r.nexus != *nexus) {
                    effects.attentions.push((r.nexus.clone(), Attention::ReservationsReleased));
                }
            }
            let holder = (!is_of_all(kind)).then(|| nexus.clone());
            self.reservation = Some(Reservation { kind, holder });
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(effects)
    }
}

#[cfg(test)]
mod tests;
