//! The way from a connection to readiness, one command at a time.

use cairn_block::Memory;

use super::queue::{Data, Done, Owner};
use super::{
    ANSWER_TIMEOUT_MS, Link, MAX_BLOCKS, QueueIndex, Session, SessionError, SessionEvent,
    refused_unless_success,
};
use crate::features;
use crate::identify::{
    CNTRLTYPE_DISCOVERY, IDENTIFY_LEN, IdentifyController, IdentifyNamespace, active_namespaces,
    cns,
};
use crate::log::DISCOVERY_NQN;
use crate::sqe::{Sqe, opcode};
use crate::target::{
    CATTR_DISABLE_SQ_FLOW_CONTROL, CONNECT_DATA_LEN, PROPERTY_CAP, PROPERTY_CC, PROPERTY_CSTS,
};
use crate::wire::put;

/// CC: enabled, 64-byte SQ and 16-byte CQ entries, the NVM command set, 4 KiB pages.
const CC_ENABLED: u32 = 0x0046_0001;
/// How often CSTS is asked for while the controller becomes ready.
const READY_POLL_MS: u64 = 10;
/// A unit of CAP.TO.
const CAP_TO_MS: u64 = 500;

/// What the session waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Start,
    AdminConnect,
    Capabilities,
    Enable,
    ControllerReady,
    IdentifyController,
    ActiveNamespaces,
    IdentifyNamespace,
    NumberOfQueues,
    IoQueues,
    Ready,
    Failed,
}

impl Step {
    /// What is being waited for, to tell it.
    pub(super) const fn command(self) -> &'static str {
        match self {
            Self::Start | Self::AdminConnect => "Connect of the admin queue",
            Self::Capabilities => "Property Get of CAP",
            Self::Enable => "Property Set of CC",
            Self::ControllerReady => "Property Get of CSTS",
            Self::IdentifyController => "Identify Controller",
            Self::ActiveNamespaces => "Identify of the active namespaces",
            Self::IdentifyNamespace => "Identify Namespace",
            Self::NumberOfQueues => "Set Features of the number of queues",
            Self::IoQueues => "Connect of an I/O queue",
            Self::Ready | Self::Failed => "nothing",
        }
    }
}

impl Session {
    /// ICResp has come: the queue is named.
    pub(super) fn send_connect<M: Memory>(&mut self, q: QueueIndex, mem: &mut M) {
        let queue = &mut self.queues[usize::from(q.0)];
        let (kato, cntlid) =
            if q.0 == 0 { (self.config.kato_ms, u16::MAX) } else { (0, self.info.cntlid) };
        let sqe = Sqe::fabrics(opcode::CONNECT)
            .with_bytes(42, &q.0.to_le_bytes())
            .with_bytes(44, &queue.sqsize().to_le_bytes())
            .with_bytes(46, &[CATTR_DISABLE_SQ_FLOW_CONTROL])
            .with_cdw(12, kato);
        let mut data = [0; CONNECT_DATA_LEN];
        put(&mut data, 0, &self.config.hostid.to_be_bytes());
        put(&mut data, 16, &cntlid.to_le_bytes());
        put(&mut data, 256, self.config.subnqn.as_bytes());
        put(&mut data, 512, self.config.hostnqn.as_bytes());
        let sent = queue.submit(Owner::Setup, sqe, Data::Inline(&data), 0, mem);
        assert!(sent, "the first command of a queue found it full");
    }

    /// Sends the one command that `step` waits for.
    fn send_setup<M: Memory>(
        &mut self,
        step: Step,
        sqe: Sqe,
        data: Data<'_>,
        now_ms: u64,
        mem: &mut M,
    ) {
        self.step = step;
        self.deadline_ms = Some(now_ms.saturating_add(ANSWER_TIMEOUT_MS));
        let sent = self.queues[0].submit(Owner::Setup, sqe, data, 0, mem);
        assert!(sent, "the admin queue is full before the session is ready");
    }

    pub(super) fn ask_csts<M: Memory>(&mut self, now_ms: u64, mem: &mut M) {
        let sqe = property_get(PROPERTY_CSTS, false);
        self.send_setup(Step::ControllerReady, sqe, Data::None, now_ms, mem);
    }

    fn identify<M: Memory>(&mut self, step: Step, code: u8, nsid: u32, now_ms: u64, mem: &mut M) {
        let sqe = Sqe::new(opcode::IDENTIFY).with_nsid(nsid).with_cdw(10, u32::from(code));
        let window = self.scratch.slice();
        mem.bytes_mut(window).fill(0);
        self.send_setup(step, sqe, Data::In(window), now_ms, mem);
    }

    /// A command of the session's own has ended: what comes next.
    pub(super) fn handle_setup<M: Memory>(
        &mut self,
        q: QueueIndex,
        done: &Done,
        now_ms: u64,
        mem: &mut M,
    ) -> Result<(), SessionError> {
        refused_unless_success(self.step.command(), done)?;
        let is_discovery = self.config.subnqn == DISCOVERY_NQN;
        match self.step {
            Step::AdminConnect => {
                self.links[0] = Link::Up;
                let [a, b, ..] = done.result.to_le_bytes();
                self.info.cntlid = u16::from_le_bytes([a, b]);
                if done.result & 3 << 17 != 0 {
                    return Err(SessionError::Unusable { what: "it requires authentication" });
                }
                let sqe = property_get(PROPERTY_CAP, true);
                self.send_setup(Step::Capabilities, sqe, Data::None, now_ms, mem);
            }
            Step::Capabilities => {
                let [mqes0, mqes1, _, to, ..] = done.result.to_le_bytes();
                let mqes = u16::from_le_bytes([mqes0, mqes1]);
                self.queues[1..].iter_mut().for_each(|queue| queue.limit(mqes.max(1)));
                let wait = (u64::from(to) * CAP_TO_MS).max(ANSWER_TIMEOUT_MS);
                self.ready_by_ms = now_ms.saturating_add(wait);
                let sqe = Sqe::fabrics(opcode::PROPERTY_SET)
                    .with_cdw(11, PROPERTY_CC)
                    .with_cdw(12, CC_ENABLED);
                self.send_setup(Step::Enable, sqe, Data::None, now_ms, mem);
            }
            Step::Enable => self.ask_csts(now_ms, mem),
            Step::ControllerReady => self.handle_csts(done.result, now_ms, mem)?,
            Step::IdentifyController => {
                self.learn_controller(mem)?;
                if is_discovery {
                    self.become_ready();
                } else {
                    self.identify(Step::ActiveNamespaces, cns::ACTIVE_NAMESPACES, 0, now_ms, mem);
                }
            }
            Step::ActiveNamespaces => {
                let page = mem.bytes(self.scratch.slice());
                let nsid = active_namespaces(page).next().ok_or(SessionError::NoNamespace)?;
                self.info.nsid = nsid;
                self.identify(Step::IdentifyNamespace, cns::NAMESPACE, nsid, now_ms, mem);
            }
            Step::IdentifyNamespace => {
                self.learn_namespace(mem)?;
                let n = self.config.io_queues;
                if n == 0 {
                    self.become_ready();
                } else {
                    let sqe = Sqe::new(opcode::SET_FEATURES)
                        .with_cdw(10, u32::from(features::NUMBER_OF_QUEUES))
                        .with_cdw(11, features::number_of_queues(n));
                    self.send_setup(Step::NumberOfQueues, sqe, Data::None, now_ms, mem);
                }
            }
            Step::NumberOfQueues => {
                let [a, b, c, d, ..] = done.result.to_le_bytes();
                let granted = features::granted_queues(u32::from_le_bytes([a, b, c, d]));
                self.info.io_queues = granted.min(self.config.io_queues);
                self.step = Step::IoQueues;
                self.deadline_ms = Some(now_ms.saturating_add(ANSWER_TIMEOUT_MS));
                for q in 1..=self.info.io_queues {
                    self.events.push_back(SessionEvent::OpenQueue(QueueIndex(q)));
                }
            }
            Step::IoQueues => {
                self.links[usize::from(q.0)] = Link::Up;
                let n = usize::from(self.info.io_queues);
                if self.links[1..=n].iter().all(|&link| link == Link::Up) {
                    self.become_ready();
                }
            }
            Step::Start | Step::Ready | Step::Failed => {}
        }
        Ok(())
    }

    fn handle_csts<M: Memory>(
        &mut self,
        csts: u64,
        now_ms: u64,
        mem: &mut M,
    ) -> Result<(), SessionError> {
        if csts & 1 << 1 != 0 {
            return Err(SessionError::Unusable { what: "a fatal status (CSTS.CFS)" });
        }
        if csts & 1 != 0 {
            if self.config.kato_ms > 0 {
                self.plan_keep_alive(now_ms);
            }
            self.identify(Step::IdentifyController, cns::CONTROLLER, 0, now_ms, mem);
            return Ok(());
        }
        // No answer is due until CSTS is asked for again; only readiness itself is.
        self.deadline_ms = Some(self.ready_by_ms);
        self.poll_ready_ms = Some(now_ms.saturating_add(READY_POLL_MS));
        if now_ms >= self.ready_by_ms {
            return Err(SessionError::Overdue { command: self.step.command() });
        }
        Ok(())
    }

    fn learn_controller<M: Memory>(&mut self, mem: &mut M) -> Result<(), SessionError> {
        let what = "Identify Controller";
        let identity = IdentifyController::decode(&mem.bytes(self.scratch.slice())[..IDENTIFY_LEN])
            .ok_or(SessionError::Unusable { what })?;
        if identity.cntlid != self.info.cntlid {
            return Err(SessionError::Unusable { what: "another CNTLID than Connect's" });
        }
        let is_discovery = self.config.subnqn == DISCOVERY_NQN;
        if is_discovery != (identity.cntrltype == CNTRLTYPE_DISCOVERY) && identity.cntrltype != 0 {
            return Err(SessionError::Unusable { what: "another CNTRLTYPE than was asked for" });
        }
        if !is_discovery && identity.icdoff != 0 {
            return Err(SessionError::Unusable { what: "an in-capsule data offset (ICDOFF)" });
        }
        let capsule = identity.ioccsz.saturating_mul(16);
        self.in_capsule_len = capsule.saturating_sub(64);
        self.info.max_transfer = match identity.mdts {
            0 => u32::MAX,
            mdts => 4096u32.checked_shl(u32::from(mdts)).filter(|&n| n > 0).unwrap_or(u32::MAX),
        };
        self.info.volatile_write_cache = identity.vwc & 1 != 0;
        self.info.serial = identity.serial;
        self.info.model = identity.model;
        Ok(())
    }

    fn learn_namespace<M: Memory>(&mut self, mem: &mut M) -> Result<(), SessionError> {
        let namespace = IdentifyNamespace::decode(mem.bytes(self.scratch.slice()))
            .ok_or(SessionError::Unusable { what: "Identify Namespace" })?;
        let block_size = namespace
            .block_size
            .filter(|_| namespace.metadata_len == 0)
            .ok_or(SessionError::Unusable { what: "a block size other than 512 and 4096" })?;
        if namespace.blocks == 0 || namespace.blocks > u64::MAX >> block_size.shift() {
            return Err(SessionError::Unusable { what: "the capacity of its namespace" });
        }
        self.info.blocks = namespace.blocks;
        self.info.block_size = block_size;
        self.info.id = namespace.nguid;
        let addressable = u32::try_from(MAX_BLOCKS << block_size.shift()).unwrap_or(u32::MAX);
        self.info.max_transfer = self.info.max_transfer.min(addressable);
        Ok(())
    }

    fn become_ready(&mut self) {
        self.step = Step::Ready;
        self.deadline_ms = None;
        self.events.push_back(SessionEvent::Ready(self.info.clone()));
    }
}

fn property_get(offset: u32, wide: bool) -> Sqe {
    Sqe::fabrics(opcode::PROPERTY_GET).with_bytes(40, &[u8::from(wide)]).with_cdw(11, offset)
}
