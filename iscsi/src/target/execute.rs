//! SCSI commands: what the target answers itself, and what goes to the disk.

use cairn_block::reservation::{Change, Guard, Registrant};
use cairn_block::{Buf, Lba, LbaRange, Memory};

use super::session::Session;
use super::{Io, NodeId, Outcome, Target, Volume, release};
use crate::connection::{Connection, ScsiCommand, SlotId};
use crate::pdu::{decode_lun, encode_lun};
use crate::scsi::block::{self, Step};
use crate::scsi::cdb::{data_out_len, lba_and_blocks, op};
use crate::scsi::copy;
use crate::scsi::inquiry::{self, Limits, PortView, Subject};
use crate::scsi::medium::{self, Motion};
use crate::scsi::mode;
use crate::scsi::opcodes::{self, allocation_len};
use crate::scsi::ports;
use crate::scsi::reservation::{self, ReserveIn};
use crate::scsi::sanitize;
use crate::scsi::sense::{Sense, Status};
use crate::scsi::unit::{Attention, NexusId, Unit, UnitHandle};
use crate::scsi::{IoCommand, SanitizeCommand, SanitizeState};
use crate::wire::{u32_at, u64_at};

/// The eight bytes of the REPORT LUNS well known logical unit.
const WELL_KNOWN_LUN: u64 = 0xc101 << 48;

/// What a command comes to.
enum Ending {
    Status(Status),
    /// Data for the initiator; it is cut to the allocation length.
    Data(Vec<u8>),
    Io(IoCommand),
    /// The next step of a READ of so many bytes.
    Part(IoCommand, u32),
    /// What was written is made durable, and then the command comes back.
    Settle,
    Reserve(Change),
    Sanitize(SanitizeCommand),
    ReserveIn(ReserveIn),
    /// What became of the copy with this list identifier.
    CopyStatus(u8),
}

/// Where a command is carried out.
#[derive(Clone, Copy)]
struct Place {
    session: usize,
    node: NodeId,
    nexus: NexusId,
    lun: u16,
    limits: Limits,
}

impl Target {
    pub(super) fn handle_scsi<M: Memory>(
        &mut self,
        index: usize,
        conn: &mut Connection,
        slot: SlotId,
        scsi: &ScsiCommand,
        data: Option<Buf>,
        mem: &mut M,
    ) -> Outcome {
        self.refresh(index, conn);
        let Some((node, nexus)) =
            self.sessions[index].as_ref().and_then(|s| Some((s.node?, s.nexus())))
        else {
            release(data, mem);
            conn.respond(slot, Sense::LUN_NOT_SUPPORTED.into(), mem);
            return Outcome::Done;
        };
        let limits = conn.limits();
        let lun = decode_lun(scsi.lun);
        let place = Place { session: index, node, nexus, lun: lun.unwrap_or(u16::MAX), limits };
        let unit = lun.and_then(|lun| self.node(node)?.unit(lun));
        let Some(unit) = unit else {
            let ending = self.without_unit(place, scsi);
            return finish(conn, slot, scsi, None, ending, data, mem);
        };
        let handle = unit.config.handle;
        conn.set_ending(slot, unit.modes.descriptors, Status::Good);
        let mut data = data;
        let ending = match self.execute(place, scsi, &mut data, mem) {
            Ok(ending) => ending,
            Err(status) => Ending::Status(status),
        };
        let ending = match ending {
            Ending::Part(command, len) => {
                conn.set_read_len(slot, len);
                Ending::Io(command)
            }
            Ending::Settle => {
                conn.come_back_later(slot);
                Ending::Io(IoCommand::Flush)
            }
            ending => ending,
        };
        if let Ending::Io(IoCommand::Copy { segments, .. }) = &ending
            && let Some(list) = &data
        {
            let list = mem.bytes(list.slice())[0];
            conn.begin_copy(slot, list, segments.len(), self.reached(node, segments));
        }
        finish(conn, slot, scsi, Some(handle), ending, data, mem)
    }

    /// The logical units that a copy reads or writes.
    fn reached(&self, node: NodeId, segments: &[copy::CopySegment]) -> Vec<u64> {
        let units = self.node(node).map(|n| n.units.as_slice()).unwrap_or_default();
        let reaches =
            |u: &&Unit| segments.iter().any(|s| [s.from, s.to].contains(&u.config.handle));
        units.iter().filter(reaches).map(|u| encode_lun(u.config.lun)).collect()
    }

    /// A command for a logical unit that there is not, or for the well known one.
    fn without_unit(&self, place: Place, scsi: &ScsiCommand) -> Ending {
        let well_known = scsi.lun == WELL_KNOWN_LUN;
        let cdb = &scsi.cdb;
        let checked = if scsi.extended { Err(Sense::INVALID_OPCODE) } else { opcodes::check(cdb) };
        let result = match (cdb[0], checked) {
            (op::INQUIRY | op::REPORT_LUNS | op::REQUEST_SENSE, Err(sense)) => Err(sense),
            (op::INQUIRY, Ok(_)) if cdb[1] & 1 == 0 && cdb[2] == 0 => {
                let subject = if well_known { Subject::WellKnown } else { Subject::Nothing };
                Ok(inquiry::standard(subject, &self.config.product))
            }
            (op::INQUIRY, Ok(_)) => Err(Sense::invalid_cdb(2, 7)),
            (op::REPORT_LUNS, Ok(_)) => self.report_luns(place.node, cdb[2]),
            (op::REQUEST_SENSE, Ok(_)) => {
                let sense = if well_known { Sense::NONE } else { Sense::LUN_NOT_SUPPORTED };
                let (bytes, len) = sense.encode(cdb[1] & 1 != 0);
                Ok(bytes[..len].to_vec())
            }
            (op::TEST_UNIT_READY, Ok(_)) if well_known => return Ending::Status(Status::Good),
            _ if well_known => Err(Sense::INVALID_OPCODE),
            _ => Err(Sense::LUN_NOT_SUPPORTED),
        };
        match result {
            Ok(data) => Ending::Data(data),
            Err(sense) => Ending::Status(sense.into()),
        }
    }

    fn report_luns(&self, node: NodeId, select: u8) -> Result<Vec<u8>, Sense> {
        let units = self.node(node).map(|n| n.units.as_slice()).unwrap_or_default();
        inquiry::luns(select, units.iter().map(|u| u.config.lun))
    }

    /// A command for a logical unit that there is.
    fn execute<M: Memory>(
        &mut self,
        place: Place,
        scsi: &ScsiCommand,
        data: &mut Option<Buf>,
        mem: &M,
    ) -> Result<Ending, Status> {
        let cdb = &scsi.cdb;
        let passes = matches!(cdb[0], op::INQUIRY | op::REPORT_LUNS | op::REQUEST_SENSE);
        // What has happened since a command's first step is for the next command.
        let goes_on = scsi.done > 0 || scsi.flushed;
        if !passes
            && !goes_on
            && let Some(sense) = self.attention(place)
        {
            return Err(sense.into());
        }
        if scsi.extended {
            return Err(Sense::INVALID_OPCODE.into());
        }
        let row = opcodes::check(cdb)?;
        let (node, session) = self.at(place).ok_or(Sense::LUN_NOT_SUPPORTED)?;
        let unit = node.unit(place.lun).ok_or(Sense::LUN_NOT_SUPPORTED)?;
        let lacks_data = scsi.received > 0 && data.is_none();
        if scsi.wanted != data_out_len(cdb, unit.shift()) || lacks_data {
            // The unit is another than when the data was asked for, or the data is used up and the
            // command was given back: it has to come again.
            return Err(Status::Busy);
        }
        let (_, state) = node.access(session.portal_group);
        if let Some(sense) = state.refusal(row.access) {
            return Err(sense.into());
        }
        let volume = self.volume(unit)?;
        let sanitize = volume.sanitize;
        let anew =
            row.code == op::SANITIZE && matches!(sanitize, Some(SanitizeState::Failed { .. }));
        if let Some(state) = sanitize
            && !anew
            && !row.passes_sanitize()
        {
            return Err(state.sense().into());
        }
        let reserved = volume.reserved_by.is_some_and(|by| by != place.nexus);
        let releases = matches!(cdb[0], op::RELEASE_6 | op::RELEASE_10);
        let kept_out = reserved && !passes && !releases && row.access != opcodes::Access::Any
            || volume.reservations.conflicts(Some(&session.registrant), row.guard);
        let removable = unit.config.removable;
        let let_in = removable && medium::is_let_in(cdb);
        // The steps of a long transfer, too: what was reserved since is whoever reserved it's.
        if kept_out && !let_in {
            return Err(Status::ReservationConflict);
        }
        let absent = unit.medium.refusal();
        if let Some(sense) = absent
            && row.needs_medium()
        {
            return Err(sense.into());
        }
        match cdb[0] {
            op::PREVENT_ALLOW if removable => {
                self.unit_mut(place)?.medium.set_prevented(place.nexus, cdb);
                Ok(Ending::Status(Status::Good))
            }
            op::START_STOP_UNIT if removable => self.move_medium(place, scsi),
            op::TEST_UNIT_READY | op::PREVENT_ALLOW => Ok(Ending::Status(Status::Good)),
            op::START_STOP_UNIT => Ok(start_stop(cdb)),
            op::REQUEST_SENSE => {
                let state = sanitize.map(SanitizeState::sense).or(absent).unwrap_or(Sense::NONE);
                let sense = self.attention(place).unwrap_or(state);
                let (bytes, len) = sense.encode(cdb[1] & 1 != 0);
                Ok(Ending::Data(bytes[..len].to_vec()))
            }
            op::REPORT_LUNS => {
                let luns = self.report_luns(place.node, cdb[2])?;
                if let Some(session) = &mut self.sessions[place.session] {
                    for (_, attentions) in &mut session.attentions {
                        attentions.clear(Attention::LunsChanged);
                    }
                }
                Ok(Ending::Data(luns))
            }
            op::RESERVE_6 | op::RESERVE_10 | op::RELEASE_6 | op::RELEASE_10 => {
                self.reserve(place, releases)
            }
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => self.mode_select(place, scsi, data, mem),
            op::PERSISTENT_RESERVE_IN => Ok(Ending::ReserveIn(ReserveIn::of(cdb))),
            op::PERSISTENT_RESERVE_OUT => {
                let list = parameter_list(scsi, unit, data, mem)?;
                Ok(Ending::Reserve(reservation::change(&session.registrant, cdb, list)?))
            }
            op::SANITIZE => {
                let list = parameter_list(scsi, unit, data, mem)?;
                Ok(match sanitize::command(unit, sanitize, cdb, list)? {
                    Some(command) => Ending::Sanitize(command),
                    None => Ending::Status(Status::Good),
                })
            }
            op::THIRD_PARTY_COPY_OUT => {
                let list = parameter_list(scsi, unit, data, mem)?;
                let segments = copy::segments(list, &node.units, &self.config.product)?;
                for segment in &segments {
                    for handle in [segment.from, segment.to] {
                        let state = self.volumes.get(&handle).and_then(|v| v.sanitize);
                        if let Some(state) = state {
                            return Err(state.sense().into());
                        }
                    }
                    // What is reserved is so for copies by others too.
                    let reads = (segment.from, Guard::Reads);
                    let writes = (segment.to, Guard::Writes);
                    let protected =
                        |u: &Unit| u.config.handle == segment.to && u.is_write_protected();
                    if node.units.iter().any(protected) {
                        return Err(Sense::WRITE_PROTECTED.into());
                    }
                    let reached = [segment.from, segment.to];
                    let gone =
                        |u: &Unit| reached.contains(&u.config.handle).then(|| u.medium.refusal());
                    if let Some(sense) = node.units.iter().filter_map(gone).flatten().next() {
                        return Err(sense.into());
                    }
                    for (handle, guard) in [reads, writes] {
                        let volume = self.volumes.get(&handle);
                        if volume
                            .is_none_or(|v| v.is_kept_from(place.nexus, &session.registrant, guard))
                        {
                            return Err(Status::ReservationConflict);
                        }
                    }
                }
                let fua = !unit.modes.write_cache;
                Ok(match segments.is_empty() {
                    true => Ending::Status(Status::Good),
                    false => Ending::Io(IoCommand::Copy { segments, fua }),
                })
            }
            op::INQUIRY
            | op::MODE_SENSE_6
            | op::MODE_SENSE_10
            | op::READ_CAPACITY_10
            | op::READ_DEFECT_DATA_10
            | op::READ_DEFECT_DATA_12
            | op::SERVICE_ACTION_IN_16
            | op::MAINTENANCE_IN
            | op::THIRD_PARTY_COPY_IN => self.report(place, cdb, unit),
            _ => on_blocks(unit, scsi, data, place.limits, mem),
        }
    }

    fn at(&self, place: Place) -> Option<(&super::Node, &Session)> {
        Some((self.node(place.node)?, self.sessions[place.session].as_ref()?))
    }

    /// What is to be told before the next command.
    fn attention(&mut self, place: Place) -> Option<Sense> {
        let session = self.sessions[place.session].as_mut()?;
        session.attentions(place.lun)?.take()
    }

    /// Commands that only tell something.
    fn report(&self, place: Place, cdb: &[u8; 16], unit: &Unit) -> Result<Ending, Status> {
        let (node, session) = self.at(place).ok_or(Sense::LUN_NOT_SUPPORTED)?;
        let portal_group = session.portal_group;
        let action = cdb[1] & 0x1f;
        let data = match (cdb[0], action) {
            (op::INQUIRY, _) if cdb[1] & 1 != 0 => {
                let (port_group, _) = node.access(portal_group);
                let port = PortView { iqn: &node.config.iqn, portal_group, port_group };
                inquiry::vital(cdb[2], &unit.config, &self.config.product, port, place.limits)?
            }
            (op::INQUIRY, _) if cdb[2] != 0 => return Err(Sense::invalid_cdb(2, 7).into()),
            (op::INQUIRY, _) => {
                let removable = unit.config.removable;
                inquiry::standard(Subject::Unit { removable }, &self.config.product)
            }
            (op::MODE_SENSE_6 | op::MODE_SENSE_10, _) => mode::sense(cdb, unit)?,
            (op::READ_CAPACITY_10, _) => {
                // PMI off: there is nothing to begin at.
                if cdb[8] & 1 == 0 && u32_at(cdb, 2) != 0 {
                    return Err(Sense::invalid_cdb(2, 7).into());
                }
                inquiry::capacity_10(&unit.config)
            }
            // No list has anything in it: replicas mend blocks that rot. The lists and their format are as asked for.
            (op::READ_DEFECT_DATA_10, _) => vec![0, cdb[2], 0, 0],
            (op::READ_DEFECT_DATA_12, _) => vec![0, cdb[1], 0, 0, 0, 0, 0, 0],
            (op::SERVICE_ACTION_IN_16, 0x10) => {
                if cdb[14] & 1 == 0 && u64_at(cdb, 2) != 0 {
                    return Err(Sense::invalid_cdb(2, 7).into());
                }
                inquiry::capacity_16(&unit.config)
            }
            (op::SERVICE_ACTION_IN_16, _) => return lba_status(cdb, unit),
            (op::MAINTENANCE_IN, 0x0a) => ports::report(cdb, &node.port_groups())?,
            (op::MAINTENANCE_IN, 0x0c) => {
                opcodes::report(cdb, place.limits.atomic(&unit.config) > 0)?
            }
            (op::MAINTENANCE_IN, _) => opcodes::report_tmfs(cdb),
            (op::THIRD_PARTY_COPY_IN, 0) => return Ok(Ending::CopyStatus(cdb[2])),
            // RECEIVE COPY RESULTS, OPERATING PARAMETERS.
            _ => inquiry::copy_parameters(),
        };
        Ok(Ending::Data(data))
    }

    fn unit_mut(&mut self, place: Place) -> Result<&mut Unit, Status> {
        let node = self.node_mut(place.node).ok();
        node.and_then(|n| n.unit_mut(place.lun)).ok_or(Sense::LUN_NOT_SUPPORTED.into())
    }

    fn volume(&self, unit: &Unit) -> Result<&Volume, Status> {
        self.volumes.get(&unit.config.handle).ok_or(Sense::LUN_NOT_SUPPORTED.into())
    }

    /// RESERVE and RELEASE.
    fn reserve(&mut self, place: Place, releases: bool) -> Result<Ending, Status> {
        let handle = self.unit_mut(place)?.config.handle;
        let volume = self.volumes.get_mut(&handle).ok_or(Sense::LUN_NOT_SUPPORTED)?;
        if !volume.reservations.is_empty() {
            // Persistent reservations rule them out (SPC-5, section 5.14.3, with CRH off).
            return Err(Status::ReservationConflict);
        }
        if releases {
            volume.reserved_by.take_if(|by| *by == place.nexus);
        } else {
            volume.reserved_by = Some(place.nexus);
        }
        self.count_held();
        Ok(Ending::Status(Status::Good))
    }

    fn mode_select<M: Memory>(
        &mut self,
        place: Place,
        scsi: &ScsiCommand,
        data: &Option<Buf>,
        mem: &M,
    ) -> Result<Ending, Status> {
        let unit = self.unit_mut(place)?;
        let list = parameter_list(scsi, unit, data, mem)?;
        let modes = mode::select(&scsi.cdb, list, unit)?;
        if modes != unit.modes {
            unit.modes = modes;
            let lun = Some(place.lun);
            self.attend(place.node, lun, Some(place.session), Attention::ModeChanged);
        }
        Ok(Ending::Status(Status::Good))
    }

    /// START STOP UNIT of a unit whose medium can be taken out.
    fn move_medium(&mut self, place: Place, scsi: &ScsiCommand) -> Result<Ending, Status> {
        let motion = Motion::of(&scsi.cdb);
        let medium = &mut self.unit_mut(place)?.medium;
        medium.check(motion)?;
        if medium.flushes(motion) && !scsi.flushed {
            return Ok(Ending::Settle);
        }
        if medium.apply(motion) {
            let (lun, asker) = (Some(place.lun), Some(place.session));
            self.attend(place.node, lun, asker, Attention::MediumChanged);
        }
        Ok(Ending::Status(Status::Good))
    }
}

impl Volume {
    /// Whether another nexus has reserved it, so that a copy may not do this to it.
    fn is_kept_from(&self, nexus: NexusId, registrant: &Registrant, guard: Guard) -> bool {
        self.reserved_by.is_some_and(|by| by != nexus)
            || self.reservations.conflicts(Some(registrant), guard)
    }
}

/// The parameter list of a command, all of it.
fn parameter_list<'a, M: Memory>(
    scsi: &ScsiCommand,
    unit: &Unit,
    data: &Option<Buf>,
    mem: &'a M,
) -> Result<&'a [u8], Status> {
    let wanted = data_out_len(&scsi.cdb, unit.shift());
    if u64::from(scsi.received) < wanted {
        return Err(Sense::INVALID_INFORMATION_UNIT.into());
    }
    Ok(data.as_ref().map(|data| mem.bytes(data.slice())).unwrap_or_default())
}

/// START STOP UNIT of any other unit: a volume that others use does not stop, but what was written is made durable.
fn start_stop(cdb: &[u8; 16]) -> Ending {
    let (power_condition, start) = (cdb[4] >> 4, cdb[4] & 1 != 0);
    if power_condition == 0 && !start {
        return Ending::Io(IoCommand::Flush);
    }
    Ending::Status(Status::Good)
}

fn lba_status(cdb: &[u8; 16], unit: &Unit) -> Result<Ending, Status> {
    let (lba, blocks) = (u64_at(cdb, 2), unit.config.blocks);
    if lba >= blocks {
        return Err(Sense::LBA_OUT_OF_RANGE.into());
    }
    let range =
        LbaRange::within(Lba(lba), blocks - lba, blocks).map_err(|_| Sense::LBA_OUT_OF_RANGE)?;
    // One at least, though it may be cut.
    let room = allocation_len(cdb).saturating_sub(8) / 16;
    let max_extents = u32::try_from(room.clamp(1, 256)).unwrap_or(1);
    Ok(Ending::Io(IoCommand::LbaStatus { range, max_extents }))
}

fn on_blocks<M: Memory>(
    unit: &Unit,
    scsi: &ScsiCommand,
    data: &mut Option<Buf>,
    limits: Limits,
    mem: &M,
) -> Result<Ending, Status> {
    debug_assert!(lba_and_blocks(&scsi.cdb).is_some() || scsi.cdb[0] == op::UNMAP);
    if scsi.cdb[0] == op::UNMAP {
        parameter_list(scsi, unit, data, mem)?;
    }
    match block::decode(unit, &scsi.cdb, (scsi.edtl, scsi.done), data.take(), limits, mem) {
        Ok(Step::Io(command)) => Ok(Ending::Io(command)),
        Ok(Step::Part(command, len)) => Ok(Ending::Part(command, len)),
        Ok(Step::Zeroes { command, block }) => {
            *data = Some(block);
            Ok(Ending::Io(command))
        }
        Ok(Step::End(status)) => Ok(Ending::Status(status)),
        Err((back, status)) => {
            *data = back;
            Err(status)
        }
    }
}

/// Ends a command as it must, or hands it out. `data` is what of the initiator's is not used.
fn finish<M: Memory>(
    conn: &mut Connection,
    slot: SlotId,
    scsi: &ScsiCommand,
    unit: Option<UnitHandle>,
    ending: Ending,
    data: Option<Buf>,
    mem: &mut M,
) -> Outcome {
    release(data, mem);
    if let (
        Ending::Io(_) | Ending::Reserve(_) | Ending::ReserveIn(_) | Ending::Sanitize(_),
        Some(unit),
    ) = (&ending, unit)
    {
        conn.set_unit(slot, unit);
    }
    let ending = match ending {
        Ending::CopyStatus(list) => match conn.copy_status(list) {
            Some(data) => Ending::Data(data),
            None => Ending::Status(Sense::invalid_cdb(2, 7).into()),
        },
        ending => ending,
    };
    match (ending, unit) {
        (Ending::Io(command), Some(unit)) => return Outcome::Io(Io { slot, unit, command }),
        (Ending::Reserve(change), Some(unit)) => return Outcome::Reserve { slot, unit, change },
        (Ending::Sanitize(command), Some(unit)) => {
            return Outcome::Sanitize { slot, unit, command };
        }
        (Ending::ReserveIn(query), Some(unit)) => return Outcome::ReserveIn { slot, unit, query },
        (Ending::Status(status), _) => conn.respond(slot, status, mem),
        (Ending::Data(mut bytes), _) => {
            bytes.truncate(allocation_len(&scsi.cdb));
            conn.respond_with(slot, bytes, mem);
        }
        (
            Ending::Io(_)
            | Ending::Part(..)
            | Ending::Settle
            | Ending::Reserve(_)
            | Ending::ReserveIn(_)
            | Ending::Sanitize(_)
            | Ending::CopyStatus(_),
            _,
        ) => {
            conn.respond(slot, Sense::LUN_NOT_SUPPORTED.into(), mem);
        }
    }
    Outcome::Done
}
