//! Sanitizing a volume: every block is overwritten, or unmapped, and nobody else uses the volume meanwhile.
//!
//! An initiator asks for it. Whatever was begun before ends, that the volume is being sanitized is stored in its
//! configuration, and only then the initiator may be answered and is the first block touched. Requests go through the
//! nexus like any host's; how far they are is stored once they are durable, so whoever serves the volume goes on from
//! there. It is over once every replica is in sync, which until then may have what was there before; or it failed, which
//! is stored too, and hosts use nothing of the volume until another one does not.

use cairn_block::sanitize::{Method, Sanitize};
use cairn_block::{IoOp, IoStatus, Lba, LbaRange, Memory};
use cairn_iscsi::connection::SlotId;
use cairn_iscsi::scsi::{SanitizeCommand, SanitizeEnd, SanitizeState, UnitHandle};
use cairn_nexus::ChangeError;
use cairn_nvmf::status::Status;
use cairn_reactor::Driver;

use super::Shard;
use super::io::{Asker, Export, HostIo};
use super::tasks::namespace_of;
use super::volumes::Volume;

/// The command that asked for one.
#[derive(Debug, Clone, Copy)]
struct Asking {
    conn: u32,
    generation: u32,
    slot: SlotId,
}

/// Bytes that are written at a time.
const PIECE: u32 = 256 << 10;
/// Bytes that are unmapped at a time.
const ERASE: u64 = 256 << 20;
/// How far it is is stored so often: the rest is done again where the volume is taken over.
const CHECKPOINT_MS: u64 = 10_000;
/// How long until what could not be done is tried again; and where there was no memory.
const RETRY_MS: u64 = 1_000;
const MEMORY_MS: u64 = 20;

/// What this process has to do with sanitizing a volume.
#[derive(Debug, Default)]
pub(super) struct Sanitizing {
    asked: Option<Asked>,
    /// Who hears of the end.
    waiter: Option<Asking>,
    run: Option<Run>,
}

/// One that is to begin, or a failed one that is to be over.
#[derive(Debug)]
struct Asked {
    /// Tells it from others.
    number: u64,
    by: Asking,
    /// What is to be done, and whether whoever asked waits for no more than its beginning. Nothing: EXIT FAILURE MODE.
    wants: Option<(Sanitize, bool)>,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Replicas are asked whether they share blocks with snapshots.
    Looking,
    /// Requests of hosts that came before end.
    Draining,
    /// It can be stored.
    Ready,
    Storing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Nothing is in hand.
    Next,
    /// So many blocks are being done.
    Piece(u64),
    Flush,
    Storing,
}

/// One that is under way.
#[derive(Debug)]
struct Run {
    state: Sanitize,
    /// How far it is for sure, whatever loses power; and how often what was not flushed had been lost then.
    durable: Sanitize,
    losses: u64,
    step: Step,
    /// How the request in hand ended.
    status: IoStatus,
    /// All that is done is durable.
    flushed: bool,
    /// When it was stored how far it is, and how far that was.
    stored_ms: u64,
    stored: u64,
    /// Nothing is done before this.
    due_ms: u64,
    began_ms: u64,
    written: u64,
}

impl Run {
    fn new(state: Sanitize, losses: u64, now: u64) -> Self {
        Self {
            stored: state.next,
            durable: state.clone(),
            losses,
            state,
            step: Step::Next,
            status: IoStatus::Ok,
            flushed: true,
            stored_ms: now,
            due_ms: 0,
            began_ms: now,
            written: 0,
        }
    }
}

impl Run {
    /// What was acked and not flushed may have been lost: that is done again, whatever came of the last request.
    fn goes_back(&mut self, losses: u64) -> bool {
        let lost = self.losses != losses;
        if lost {
            self.losses = losses;
            self.state.clone_from(&self.durable);
            self.flushed = true;
        }
        lost
    }
}

impl Volume {
    /// Whether it is being sanitized, or is about to be, or that failed.
    pub(super) fn is_sanitizing(&self) -> bool {
        let begins = |asked: &Asked| asked.wants.is_some();
        !self.nexus.sanitize().is_empty() || self.sanitizing.asked.as_ref().is_some_and(begins)
    }

    /// The one that is stored, or how far this process is with it.
    fn sanitize(&self) -> Option<Sanitize> {
        match (self.nexus.sanitize(), &self.sanitizing.run) {
            ([], _) => None,
            (_, Some(run)) => Some(run.state.clone()),
            (bytes, None) => Some(Sanitize::decode(bytes).expect("the nexus takes up no other")),
        }
    }

    /// What logical units are told.
    fn sanitize_state(&self) -> Option<SanitizeState> {
        let stored = self.sanitize().map(|one| match (one.failed, one.unrestricted) {
            (true, unrestricted) => SanitizeState::Failed { unrestricted },
            _ => SanitizeState::Running { progress: one.progress(self.sanitize_blocks()) },
        });
        match &self.sanitizing.asked {
            Some(Asked { wants: Some(_), .. }) => Some(SanitizeState::Running { progress: 0 }),
            _ => stored,
        }
    }

    /// Blocks of hosts.
    fn sanitize_blocks(&self) -> u64 {
        let shift = cairn_block::BlockSize::B4096.shift() - self.block_size.shift();
        self.nexus.blocks() << shift
    }

    /// What people are told; empty where there is nothing to tell.
    pub(super) fn sanitize_text(&self) -> String {
        let Some(one) = self.sanitize() else {
            let about = "about to be sanitized; hosts wait";
            return if self.is_sanitizing() { about.to_owned() } else { String::new() };
        };
        if one.failed {
            let exit = if one.unrestricted { " or EXIT FAILURE MODE" } else { "" };
            return format!(
                "a replica could not be sanitized, the log says why: hosts can use the volume again after another \
                 SANITIZE{exit}"
            );
        }
        let blocks = self.sanitize_blocks();
        let last = one.pass + 1 == one.passes();
        if last && one.next >= blocks && !self.nexus.is_whole() {
            return "sanitized but for replicas that are not in sync; hosts wait until all are, or those are removed"
                .to_owned();
        }
        let percent = (u32::from(one.progress(blocks)) * 100) >> 16;
        match one.method {
            Method::Erase => format!("being erased, {percent} %; hosts wait"),
            Method::Overwrite { passes, .. } => {
                let pass = one.pass + 1;
                format!(
                    "being overwritten, pass {pass} of {passes}, {percent} % of all; hosts wait"
                )
            }
        }
    }
}

impl<D: Driver> Shard<D> {
    /// An initiator asks for a volume to be sanitized.
    pub(super) fn sanitize_for_initiator(
        &mut self,
        (conn, slot): (u32, SlotId),
        unit: UnitHandle,
        command: SanitizeCommand,
        now: u64,
    ) {
        let by = Asking { conn, generation: self.initiators.hosts[conn].generation, slot };
        let not_ready = SanitizeEnd::NotStored(IoStatus::NotReady);
        let Some(&mut Export::Volume(at)) = self.export(namespace_of(unit)) else {
            return self.end_sanitize(by, not_ready);
        };
        let Some(volume) = self.volumes.get(at) else {
            return self.end_sanitize(by, not_ready);
        };
        let asked = volume.sanitizing.asked.is_some();
        if asked || !self.may_sanitize(at) || self.has_snapshot_work(at) {
            return self.end_sanitize(by, not_ready);
        }
        self.next_snapshot += 1;
        let number = self.next_snapshot;
        let (wants, stage) = match command {
            SanitizeCommand::Begin { sanitize, immediate } => {
                (Some((sanitize, immediate)), Stage::Looking)
            }
            SanitizeCommand::Exit => (None, Stage::Ready),
        };
        self.volumes[at].sanitizing.asked = Some(Asked { number, by, wants, stage });
        self.install_sanitize(at);
        match stage {
            Stage::Looking => self.look_for_shared(at, number),
            _ => self.advance_sanitize(at, now),
        }
    }

    /// Whether this process may go on with one.
    fn may_sanitize(&self, at: u32) -> bool {
        let volume = &self.volumes[at];
        let nexus = &volume.nexus;
        let ours = volume.hand_over.is_none() && !volume.removing() && self.stopping.is_none();
        let exported = volume.export.is_some();
        ours && exported && nexus.state().is_serving() && nexus.restoring().is_none()
    }

    fn asked_sanitize(&mut self, at: u32, number: u64, stage: Stage) -> Option<&mut Asked> {
        let volume = self.volumes.get_mut(at)?;
        volume.sanitizing.asked.as_mut().filter(|a| a.number == number && a.stage == stage)
    }

    /// Replicas have told whether they share blocks with snapshots; nothing: one could not be asked.
    pub(super) fn looked_for_shared(&mut self, at: u32, number: u64, shares: Option<bool>) {
        let Some(asked) = self.asked_sanitize(at, number, Stage::Looking) else { return };
        match shares {
            Some(false) => {
                asked.stage = Stage::Draining;
                self.drain_for_sanitize(at, number);
            }
            Some(true) => self.refuse_sanitize(at, SanitizeEnd::Shares),
            None => self.refuse_sanitize(at, SanitizeEnd::NotStored(IoStatus::NotReady)),
        }
    }

    /// Nothing that hosts asked before is in hand any more.
    pub(super) fn sanitize_drained(&mut self, at: u32, number: u64) {
        if let Some(asked) = self.asked_sanitize(at, number, Stage::Draining) {
            asked.stage = Stage::Ready;
            self.touch_volume(at);
        }
    }

    /// One does not begin.
    fn refuse_sanitize(&mut self, at: u32, end: SanitizeEnd) {
        if let Some(asked) = self.volumes[at].sanitizing.asked.take() {
            self.install_sanitize(at);
            self.end_sanitize(asked.by, end);
        }
    }

    fn end_sanitize(&mut self, by: Asking, end: SanitizeEnd) {
        let host = self.initiators.hosts.get_mut(by.conn);
        if let Some(host) = host.filter(|host| host.generation == by.generation) {
            host.conn.complete_sanitize(by.slot, end, self.driver.memory());
            self.touch_initiator(by.conn);
        }
    }

    /// Whoever waits for the end of one hears of it.
    fn end_waiting(&mut self, at: u32, end: SanitizeEnd) {
        if let Some(waiter) = self.volumes[at].sanitizing.waiter.take() {
            self.end_sanitize(waiter, end);
        }
    }

    /// Tasks were aborted: who waits for a sanitize may be among them. What has begun goes on.
    pub(super) fn end_aborted_sanitizes(&mut self) {
        for at in self.volumes.keys() {
            let sanitizing = &self.volumes[at].sanitizing;
            let end = SanitizeEnd::NotStored(IoStatus::Aborted);
            let asked = sanitizing.asked.as_ref().map(|asked| (asked.by, asked.stage));
            // One that is being stored is answered when it is, and soon.
            if asked.is_some_and(|(by, stage)| stage != Stage::Storing && self.is_over(by)) {
                self.refuse_sanitize(at, end);
            }
            if self.volumes[at].sanitizing.waiter.is_some_and(|by| self.is_over(by)) {
                self.end_waiting(at, end);
            }
        }
    }

    /// Whether nobody waits for a command any more.
    fn is_over(&self, by: Asking) -> bool {
        let host = self.initiators.hosts.get(by.conn);
        let host = host.filter(|host| host.generation == by.generation);
        host.is_none_or(|host| host.conn.is_aborted(by.slot))
    }

    /// Goes on with what can be done.
    pub(super) fn advance_sanitize(&mut self, at: u32, now: u64) {
        let sanitizing = &self.volumes[at].sanitizing;
        let ready = sanitizing.asked.as_ref().is_some_and(|asked| asked.stage == Stage::Ready);
        let runs = sanitizing.run.as_ref().is_some_and(|run| run.step == Step::Next);
        if !(ready || runs) || !self.may_sanitize(at) {
            return;
        }
        if ready {
            self.store_asked(at, now);
        } else {
            self.run_sanitize(at, now);
        }
    }

    fn store_asked(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let Some(asked) = &mut volume.sanitizing.asked else { return };
        let bytes = asked.wants.as_ref().map_or(Vec::new(), |(sanitize, _)| sanitize.encode());
        if !bytes.is_empty() && !volume.nexus.deleted().is_empty() {
            // A replica that was away has a snapshot still.
            return self.refuse_sanitize(at, SanitizeEnd::Shares);
        }
        if bytes == volume.nexus.sanitize() {
            return self.refuse_sanitize(at, SanitizeEnd::Good);
        }
        match volume.nexus.set_sanitize(bytes, now) {
            Ok(()) => asked.stage = Stage::Storing,
            // An earlier change of the volume is being stored.
            Err(ChangeError::Busy) => return,
            Err(_) => self.refuse_sanitize(at, SanitizeEnd::NotStored(IoStatus::NotReady)),
        }
        self.touch_volume(at);
    }

    /// How far it is, or that it begins or is over, is stored.
    pub(super) fn sanitize_stored(&mut self, at: u32, now: u64) {
        let name = self.volumes[at].spec.name.clone();
        let sanitizing = &mut self.volumes[at].sanitizing;
        if let Some(asked) = sanitizing.asked.take_if(|asked| asked.stage == Stage::Storing) {
            match asked.wants {
                Some((sanitize, immediate)) => {
                    // An earlier one that failed, which could not be stored.
                    sanitizing.run = None;
                    tracing::info!(volume = %name, passes = sanitize.passes(), "sanitize begins");
                    sanitizing.waiter = Some(asked.by);
                    if immediate {
                        self.end_waiting(at, SanitizeEnd::Good);
                    }
                }
                None => {
                    tracing::info!(volume = %name, "a sanitize that failed is over");
                    self.end_sanitize(asked.by, SanitizeEnd::Good);
                }
            }
            // It may have been aborted meanwhile.
            self.end_aborted_sanitizes();
        } else if let Some(run) = &mut sanitizing.run
            && run.step == Step::Storing
        {
            (run.step, run.stored_ms, run.stored) = (Step::Next, now, run.state.next);
        }
        self.load_sanitize(at, now);
    }

    /// The nexus serves, or has stored something: what is stored is what is done.
    pub(super) fn load_sanitize(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let stored = match volume.nexus.sanitize() {
            [] => None,
            bytes => Some(Sanitize::decode(bytes).expect("the nexus takes up no other")),
        };
        let end = match stored {
            None => Some(SanitizeEnd::Good),
            Some(Sanitize { failed: true, .. }) => Some(SanitizeEnd::Failed),
            Some(state) => {
                let losses = volume.nexus.losses();
                volume.sanitizing.run.get_or_insert_with(|| Run::new(state, losses, now));
                None
            }
        };
        if let Some(end) = end {
            if volume.sanitizing.run.take().is_some() {
                tracing::info!(volume = %volume.spec.name, ?end, "sanitize is over");
            }
            self.end_waiting(at, end);
        }
        self.install_sanitize(at);
        self.touch_volume(at);
    }

    /// Tells the units of a volume.
    pub(super) fn install_sanitize(&mut self, at: u32) {
        let volume = &self.volumes[at];
        if let Some((_, handle)) = volume.export {
            let state = volume.sanitize_state();
            self.initiators.target.set_sanitize(UnitHandle(handle.0), state);
        }
    }

    fn run_sanitize(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let blocks = volume.sanitize_blocks();
        let Some(run) = &mut volume.sanitizing.run else { return };
        if now < run.due_ms {
            let due = run.due_ms;
            return self.wants_timeout(Some(due));
        }
        let checkpoint = now >= run.stored_ms + CHECKPOINT_MS && run.state.next != run.stored;
        let stores = run.state.failed || run.state.next >= blocks || checkpoint;
        match (stores, run.flushed || run.state.failed) {
            (false, _) => self.sanitize_piece(at, now),
            (true, false) => {
                run.step = Step::Flush;
                self.begin_sanitize_io(at, IoOp::Flush, LbaRange::default(), None, now);
            }
            (true, true) => self.store_progress(at, now),
        }
    }

    /// Begins the next piece.
    fn sanitize_piece(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let (blocks, shift) = (volume.sanitize_blocks(), volume.block_size.shift());
        let block_len = volume.block_size.bytes() as usize;
        let Some(run) = &mut volume.sanitizing.run else { return };
        let left = blocks - run.state.next;
        let (op, piece, buf) = match run.state.method {
            Method::Erase => {
                let op = IoOp::WriteZeroes { fua: false, unmap: true };
                (op, left.min(ERASE >> shift), None)
            }
            Method::Overwrite { .. } => {
                let memory = self.driver.memory();
                let piece = left.min(u64::from(PIECE >> shift));
                let len = u32::try_from(piece << shift).expect("no more than a piece");
                let Some(buf) = memory.alloc(len) else {
                    run.due_ms = now + MEMORY_MS;
                    let due = run.due_ms;
                    return self.wants_timeout(Some(due));
                };
                let bytes = memory.bytes_mut(buf.slice());
                bytes.chunks_exact_mut(block_len).for_each(|block| run.state.fill(block));
                (IoOp::Write { fua: false }, piece, Some(buf))
            }
        };
        let range = LbaRange::new(Lba(run.state.next), piece).expect("within the volume");
        (run.step, run.flushed) = (Step::Piece(piece), false);
        self.begin_sanitize_io(at, op, range, buf, now);
        self.install_sanitize(at);
    }

    fn begin_sanitize_io(
        &mut self,
        at: u32,
        op: IoOp,
        range: LbaRange,
        buf: Option<cairn_block::Buf>,
        now: u64,
    ) {
        let volume = &self.volumes[at];
        let asker = Asker::Sanitize { volume: at, generation: volume.generation };
        let (_, namespace) = volume.export.expect("only what is exported is sanitized");
        let io = HostIo::new(asker, namespace, op, range);
        let io = match buf {
            Some(buf) => io.with_buf(buf),
            None => io,
        };
        self.begin_io(io, now);
    }

    fn sanitize_run(&mut self, at: u32, generation: u32) -> Option<&mut Run> {
        let volume = self.volumes.get_mut(at).filter(|v| v.generation == generation)?;
        volume.sanitizing.run.as_mut()
    }

    /// A request has ended; its buffer may still be in use.
    pub(super) fn sanitize_answered(&mut self, at: u32, generation: u32, status: IoStatus) {
        if let Some(run) = self.sanitize_run(at, generation) {
            run.status = status;
        }
    }

    /// A request is over.
    pub(super) fn sanitize_released(&mut self, at: u32, generation: u32) {
        let (now, mib_s) = (self.now_ms(), u64::from(self.config.sanitize_mib_s));
        let Some(volume) = self.volumes.get_mut(at).filter(|v| v.generation == generation) else {
            return;
        };
        let (name, shift) = (&volume.spec.name, volume.block_size.shift());
        let Some(run) = &mut volume.sanitizing.run else { return };
        let step = std::mem::replace(&mut run.step, Step::Next);
        if run.goes_back(volume.nexus.losses()) {
            tracing::warn!(volume = %name, block = run.state.next, "what is not flushed may be lost; it is sanitized again");
            return self.touch_volume(at);
        }
        match (run.status, step) {
            (IoStatus::Ok, Step::Piece(blocks)) => {
                run.state.next += blocks;
                if run.state.method != Method::Erase && mib_s > 0 {
                    run.written += blocks << shift;
                    run.due_ms = run.began_ms + run.written * 1_000 / (mib_s << 20);
                }
            }
            (IoStatus::Ok, _) => (run.flushed, run.durable) = (true, run.state.clone()),
            (
                status @ (IoStatus::MediaError
                | IoStatus::NoSpace
                | IoStatus::Internal
                | IoStatus::InvalidField
                | IoStatus::OutOfRange
                | IoStatus::Unsupported),
                _,
            ) => {
                let block = run.state.next;
                tracing::error!(volume = %name, ?status, block, "the volume cannot be sanitized");
                run.state.failed = true;
            }
            (status, _) => {
                tracing::warn!(volume = %name, ?status, "not sanitized yet; it is tried again");
                run.due_ms = now + RETRY_MS;
            }
        }
        self.touch_volume(at);
    }

    /// Stores how far it is, that it is over, or that it failed.
    fn store_progress(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let blocks = volume.sanitize_blocks();
        let whole = volume.nexus.is_whole();
        let Some(run) = &mut volume.sanitizing.run else { return };
        if run.goes_back(volume.nexus.losses()) {
            return self.touch_volume(at);
        }
        let done = run.state.next >= blocks && !run.state.failed;
        let mut next = run.state.clone();
        let bytes = if !done {
            next.encode()
        } else if next.pass + 1 < next.passes() {
            (next.pass, next.next) = (next.pass + 1, 0);
            next.encode()
        } else {
            Vec::new()
        };
        // A replica that is not in sync may have what was there before.
        let stored = if bytes.is_empty() && !whole {
            None
        } else {
            volume.nexus.set_sanitize(bytes, now).ok()
        };
        if stored.is_some() {
            run.durable.clone_from(&next);
            (run.state, run.step) = (next, Step::Storing);
            return self.touch_volume(at);
        }
        run.due_ms = now + if whole { MEMORY_MS } else { RETRY_MS };
        let due = run.due_ms;
        self.wants_timeout(Some(due));
    }

    /// The volume is not this process's any more: whoever serves it goes on.
    pub(super) fn forget_sanitize(&mut self, at: u32, status: IoStatus) {
        let Sanitizing { asked, waiter, run: _ } = std::mem::take(&mut self.volumes[at].sanitizing);
        for by in asked.map(|asked| asked.by).into_iter().chain(waiter) {
            self.end_sanitize(by, SanitizeEnd::NotStored(status));
        }
    }

    /// Whether a sanitize keeps somebody from a request: then it is told.
    pub(super) fn is_sanitized(&mut self, volume: u32, io: u32, now: u64) -> bool {
        let (asker, ..) = self.ios[io].wants();
        let volume = &self.volumes[volume];
        let stored = !volume.nexus.sanitize().is_empty();
        match asker {
            Asker::Nvme { conn, generation, slot } if volume.is_sanitizing() => {
                let status = match volume.sanitize_state() {
                    Some(SanitizeState::Failed { .. }) => Status::SANITIZE_FAILED,
                    _ => Status::SANITIZE_IN_PROGRESS,
                };
                self.refuse_host(io, (conn, generation, slot), status);
                true
            }
            // What was handed out before may end until it is stored.
            Asker::Iscsi { .. } | Asker::Job(_) if stored => {
                self.finish(io, IoStatus::NotReady, now);
                true
            }
            _ => false,
        }
    }
}
