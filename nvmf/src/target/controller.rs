//! One controller: an association of a host with a subsystem.

use std::collections::VecDeque;

use cairn_block::reservation::Notice;

use super::queue::Binding;
use super::{ConnId, ControllerInfo, Deferred, MAX_AERS, SlotId, Status, SubsystemId};
use crate::features;
use crate::reservation::{Notification, encode_log, notice_code};

/// CC.EN.
const CC_EN: u32 = 1;
/// CC.SHN.
const CC_SHN: u32 = 3 << 14;
/// CSTS.RDY.
const CSTS_RDY: u32 = 1;
/// CSTS.SHST: shutdown processing complete.
const CSTS_SHST_COMPLETE: u32 = 2 << 2;
/// KAS as a number of milliseconds: timeouts are rounded up to it.
pub(super) const KEEP_ALIVE_GRANULARITY_MS: u32 = 1000;
/// Changed namespaces that are told one by one.
const MAX_CHANGED: usize = 1025;
/// Reservation notifications that are kept; that older ones are lost the log pages' count tells.
const MAX_NOTIFICATIONS: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Discovery,
    Nvm(SubsystemId),
}

#[derive(Debug)]
pub(super) struct Controller {
    pub(super) kind: Kind,
    pub(super) generation: u64,
    pub(super) cntlid: u16,
    pub(super) hostnqn: String,
    pub(super) hostid: u128,
    pub(super) kato_ms: u32,
    pub(super) last_seen_ms: u64,
    /// Of the engine: see [`super::Target::set_mark`].
    pub(super) mark: u64,
    pub(super) admin: Option<ConnId>,
    /// By QID - 1.
    pub(super) io_queues: Vec<Option<ConnId>>,
    cc: u32,
    csts: u32,
    aers: Vec<SlotId>,
    /// Asynchronous Event Configuration.
    pub(super) event_config: u32,
    /// Events that were told and whose log page was not read since.
    masked: u32,
    /// Events, as bits of the configuration, that wait for a request.
    pending: Vec<(u32, u32)>,
    /// Ascending.
    changed_namespaces: Vec<u32>,
    /// What of reservations was not told yet, and how much there ever was.
    notifications: VecDeque<Notification>,
    notified: u64,
    /// Reservation Notification Mask of each namespace that has one.
    notification_masks: Vec<(u32, u32)>,
}

/// What a write to CC began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CcChange {
    None,
    /// The I/O queues end.
    ResetOrShutdown,
}

impl Controller {
    pub(super) fn new(
        kind: Kind,
        generation: u64,
        cntlid: u16,
        admin: ConnId,
        now_ms: u64,
    ) -> Self {
        Self {
            kind,
            generation,
            cntlid,
            hostnqn: String::new(),
            hostid: 0,
            kato_ms: 0,
            last_seen_ms: now_ms,
            mark: 0,
            admin: Some(admin),
            io_queues: Vec::new(),
            cc: 0,
            csts: 0,
            aers: Vec::with_capacity(MAX_AERS),
            event_config: 0,
            masked: 0,
            pending: Vec::new(),
            changed_namespaces: Vec::new(),
            notifications: VecDeque::new(),
            notified: 0,
            notification_masks: Vec::new(),
        }
    }

    pub(super) fn info(&self) -> ControllerInfo {
        ControllerInfo {
            cntlid: self.cntlid,
            hostnqn: self.hostnqn.clone(),
            hostid: self.hostid,
            io_queues: u16::try_from(self.io_queues.iter().flatten().count()).unwrap_or(u16::MAX),
            kato_ms: self.kato_ms,
        }
    }

    pub(super) fn connections(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.admin.iter().chain(self.io_queues.iter().flatten()).copied()
    }

    /// Whether `conn` still is the queue that `binding` says.
    pub(super) fn owns(&self, conn: ConnId, binding: &Binding) -> bool {
        let queue = match binding.qid {
            0 => self.admin,
            qid => self.io_queues.get(usize::from(qid) - 1).copied().flatten(),
        };
        self.generation == binding.generation && queue == Some(conn)
    }

    pub(super) fn forget_io_queue(&mut self, conn: ConnId) {
        for queue in &mut self.io_queues {
            queue.take_if(|c| *c == conn);
        }
    }

    pub(super) fn deadline_ms(&self) -> Option<u64> {
        (self.kato_ms > 0).then(|| self.last_seen_ms.saturating_add(u64::from(self.kato_ms)))
    }

    pub(super) fn set_kato(&mut self, kato_ms: u32) {
        self.kato_ms =
            kato_ms.checked_next_multiple_of(KEEP_ALIVE_GRANULARITY_MS).unwrap_or(kato_ms);
    }

    pub(super) fn is_ready(&self) -> bool {
        self.csts & CSTS_RDY != 0
    }

    pub(super) fn cc(&self) -> u32 {
        self.cc
    }

    pub(super) fn csts(&self) -> u32 {
        self.csts
    }

    /// A Property Set of CC.
    pub(super) fn set_cc(&mut self, cc: u32) -> CcChange {
        let old = std::mem::replace(&mut self.cc, cc);
        let shuts_down = cc & CC_SHN != 0 && old & CC_SHN == 0;
        let resets = cc & CC_EN == 0 && old & CC_EN != 0;
        if cc & CC_EN != 0 && old & CC_EN == 0 {
            self.csts = CSTS_RDY;
        }
        if resets {
            self.csts &= !CSTS_RDY;
            self.event_config = 0;
            self.masked = 0;
            self.pending.clear();
            self.changed_namespaces.clear();
            self.notifications.clear();
            self.notified = 0;
            self.notification_masks.clear();
        }
        if shuts_down {
            self.csts |= CSTS_SHST_COMPLETE;
        } else if cc & CC_SHN == 0 {
            self.csts &= !CSTS_SHST_COMPLETE;
        }
        if shuts_down || resets { CcChange::ResetOrShutdown } else { CcChange::None }
    }

    /// Holds an Asynchronous Event Request, or says which event answers it at once.
    pub(super) fn hold(&mut self, slot: SlotId) -> Held {
        if self.aers.len() >= MAX_AERS {
            return Held::TooMany;
        }
        if self.pending.is_empty() {
            self.aers.push(slot);
            return Held::Waits;
        }
        let (bit, event) = self.pending.remove(0);
        self.masked |= bit;
        Held::Fires(event)
    }

    /// The requests that are held, which a reset ends.
    pub(super) fn take_held(&mut self) -> impl Iterator<Item = SlotId> + '_ {
        self.aers.drain(..)
    }

    /// Something happened that `bit` of the configuration asks for.
    pub(super) fn raise(&mut self, bit: u32, event: u32) -> Option<Deferred> {
        if (self.event_config | features::AEN_RESERVATION) & bit == 0
            || self.masked & bit != 0
            || self.pending.iter().any(|&(b, _)| b == bit)
        {
            return None;
        }
        let (Some(slot), Some(conn)) = (self.aers.pop(), self.admin) else {
            self.pending.push((bit, event));
            return None;
        };
        self.masked |= bit;
        Some(Deferred { conn, slot, status: Status::SUCCESS, result: u64::from(event) })
    }

    /// The host has read the log page that goes with `bit`.
    pub(super) fn unmask(&mut self, bit: u32) {
        self.masked &= !bit;
    }

    pub(super) fn note_changed_namespace(&mut self, nsid: u32) {
        if let Err(at) = self.changed_namespaces.binary_search(&nsid)
            && self.changed_namespaces.len() < MAX_CHANGED
        {
            self.changed_namespaces.insert(at, nsid);
        }
    }

    pub(super) fn changed_namespaces(&self) -> &[u32] {
        &self.changed_namespaces
    }

    pub(super) fn forget_changed_namespaces(&mut self) {
        self.changed_namespaces.clear();
        self.unmask(features::AEN_NAMESPACE_ATTRIBUTE);
    }

    pub(super) fn set_notification_mask(&mut self, nsid: u32, mask: u32) {
        self.notification_masks.retain(|&(of, _)| of != nsid);
        self.notification_masks.push((nsid, mask));
    }

    pub(super) fn notification_mask(&self, nsid: u32) -> u32 {
        self.notification_masks.iter().find(|&&(of, _)| of == nsid).map_or(0, |&(_, mask)| mask)
    }

    /// The host is to hear of a change of a namespace's reservations, unless it does not want to.
    pub(super) fn notify(&mut self, nsid: u32, notice: Notice) -> Option<Deferred> {
        if self.notification_mask(nsid) & 1 << notice_code(notice) != 0 {
            return None;
        }
        self.notified += 1;
        if self.notifications.len() == MAX_NOTIFICATIONS {
            self.notifications.pop_front();
        }
        self.notifications.push_back(Notification { count: self.notified, notice, nsid });
        self.raise(features::AEN_RESERVATION, features::EVENT_RESERVATION)
    }

    /// The Reservation Notification log page.
    pub(super) fn notification_log(&self) -> Vec<u8> {
        encode_log(self.notifications.front(), self.notifications.len().saturating_sub(1))
    }

    /// The host has read it. Once it has read them all it is told when there are more.
    pub(super) fn forget_notification(&mut self) {
        self.notifications.pop_front();
        if self.notifications.is_empty() {
            self.unmask(features::AEN_RESERVATION);
        }
    }
}

/// What became of an Asynchronous Event Request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    Waits,
    Fires(u32),
    TooMany,
}
