//! Task management: what is aborted, and who is told.

use cairn_block::Memory;

use super::{Abort, NodeId, Outcome, Target};
use crate::connection::{Aborted, Connection, SlotId};
use crate::pdu::decode_lun;
use crate::scsi::unit::{Attention, UnitHandle};

const ABORT_TASK: u8 = 1;
const ABORT_TASK_SET: u8 = 2;
const CLEAR_TASK_SET: u8 = 4;
const LOGICAL_UNIT_RESET: u8 = 5;
const TARGET_WARM_RESET: u8 = 6;
const TARGET_COLD_RESET: u8 = 7;
const TASK_REASSIGN: u8 = 8;

const COMPLETE: u8 = 0;
const NO_SUCH_TASK: u8 = 1;
const NO_SUCH_LUN: u8 = 2;
const REASSIGNMENT_NOT_SUPPORTED: u8 = 4;
const NOT_SUPPORTED: u8 = 5;

impl Target {
    #[expect(clippy::too_many_arguments, reason = "a request has this many fields")]
    pub(super) fn handle_task_management<M: Memory>(
        &mut self,
        index: usize,
        conn: &mut Connection,
        slot: SlotId,
        function: u8,
        lun: u64,
        rtt: u32,
        mem: &mut M,
    ) -> Outcome {
        let node = self.sessions[index].as_ref().and_then(|s| s.node);
        let found = node.and_then(|node| {
            let number = decode_lun(lun)?;
            Some((node, number, self.node(node)?.unit(number)?.config.handle))
        });
        let during = match (function, found, node) {
            (ABORT_TASK, _, Some(_)) => match conn.abort_task(rtt, lun, mem) {
                Aborted::Nothing => Err(NO_SUCH_TASK),
                Aborted::Before => Ok(None),
                Aborted::During(unit) => Ok(unit.map(|unit| vec![unit])),
            },
            (ABORT_TASK_SET, Some((_, _, unit)), _) => {
                Ok(conn.abort_tasks(Some(lun), mem).then(|| vec![unit]))
            }
            (CLEAR_TASK_SET | LOGICAL_UNIT_RESET, Some((node, number, unit)), _) => {
                conn.abort_tasks(Some(lun), mem);
                self.abort_sessions(node, Some(index), Some(lun));
                // Whose commands were cleared is told by their status, TAS being set (SAM-5).
                if function == LOGICAL_UNIT_RESET {
                    self.reset_units(node, Some(number));
                    self.attend(node, Some(number), None, Attention::UnitReset);
                }
                Ok(Some(vec![unit]))
            }
            (TARGET_WARM_RESET | TARGET_COLD_RESET, _, Some(node)) => {
                Ok(Some(self.reset_node(node, index, function, conn, mem)))
            }
            (ABORT_TASK_SET | CLEAR_TASK_SET | LOGICAL_UNIT_RESET, None, _) => Err(NO_SUCH_LUN),
            (TASK_REASSIGN, _, _) => Err(REASSIGNMENT_NOT_SUPPORTED),
            _ => Err(NOT_SUPPORTED),
        };
        match during {
            Ok(Some(units)) if !units.is_empty() => return Outcome::Drain { slot, units },
            Ok(_) => conn.respond_task_management(slot, COMPLETE, mem),
            Err(response) => conn.respond_task_management(slot, response, mem),
        }
        Outcome::Done
    }

    /// Asks for the tasks of the sessions of a node, except one, to be aborted.
    pub(super) fn abort_sessions(&mut self, node: NodeId, except: Option<usize>, lun: Option<u64>) {
        for (i, session) in self.sessions.iter().enumerate() {
            if let Some(session) = session
                && session.node == Some(node)
                && except != Some(i)
            {
                self.aborts.push_back(Abort { conn: session.conn, lun });
            }
        }
    }

    /// Resets a unit of a node, or all: which.
    fn reset_units(&mut self, node: NodeId, lun: Option<u16>) -> Vec<UnitHandle> {
        let mut reset = Vec::new();
        if let Ok(node) = self.node_mut(node) {
            for unit in &mut node.units {
                if lun.is_none_or(|lun| lun == unit.config.lun) {
                    unit.reset();
                    reset.push(unit.config.handle);
                }
            }
        }
        for handle in &reset {
            if let Some(volume) = self.volumes.get_mut(handle) {
                volume.reserved_by = None;
            }
        }
        self.count_held();
        reset
    }

    fn reset_node<M: Memory>(
        &mut self,
        node: NodeId,
        index: usize,
        function: u8,
        conn: &mut Connection,
        mem: &mut M,
    ) -> Vec<UnitHandle> {
        conn.abort_tasks(None, mem);
        self.abort_sessions(node, Some(index), None);
        let units = self.reset_units(node, None);
        self.attend(node, None, None, Attention::TargetReset);
        if function == TARGET_COLD_RESET {
            // All sessions end; this one once it has its answer.
            for i in 0..self.sessions.len() {
                let other = self.sessions[i].as_ref().is_some_and(|s| s.node == Some(node));
                if other
                    && i != index
                    && let Some(conn) = self.end_session(i)
                {
                    self.closing.push_back(conn);
                }
            }
        }
        units
    }
}
