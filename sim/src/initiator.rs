//! A host over iSCSI, one command at a time: with COMPARE AND WRITE it counts in a block that it shares with others, and
//! it reserves the volume for itself now and then.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;

use cairn_block::{Buf, Memory};
use cairn_engine::iscsi::pdu::{
    BHS_LEN, Body, CmdSn, Header, LoginRequest, LoginResponse, NO_TAG, encode_lun, lengths,
};
use cairn_engine::iscsi::text;
use cairn_engine::reactor::{Completion, Driver, Op, SocketId, Token};

use crate::checks::{Check, check};
use crate::disk::PAGE;
use crate::driver::SimDriver;
use crate::rng::Rng;
use crate::world::{MS, NodeId};

const SOCKET: Token = Token::new(0);
const CONNECT_TIMEOUT_MS: u32 = 500;
/// What is not answered within this time is asked of the next process.
const PATIENCE_NS: u64 = 8_000 * MS;
/// Security is not negotiated: the operational stage, and the full feature phase.
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;
const GOOD: u8 = 0;
const CHECK_CONDITION: u8 = 2;
/// Sense keys. What is not ready here may be served elsewhere.
const NOT_READY: u8 = 2;
const MISCOMPARE: u8 = 0xe;

/// What all initiators of a volume know of the number in its block.
#[derive(Debug, Default)]
pub struct Counter {
    /// What each step that was acked counted to.
    acked: BTreeSet<u64>,
    /// The most that any step may have counted to.
    begun: u64,
}

impl Counter {
    fn newest(&self) -> u64 {
        self.acked.last().copied().unwrap_or(0)
    }

    /// Steps that were acked.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.acked.len() as u64
    }

    fn step_acked(&mut self, to: u64) {
        check!(
            Check::CompareAndWrite,
            self.acked.insert(to),
            "two counted to {to}, each in one step"
        );
    }

    /// The block was read by who knew that it was counted to `least`.
    fn read(&self, block: &[u8], least: u64) -> u64 {
        let words = block.chunks_exact(8).map(|word| word.try_into().expect("eight bytes"));
        let mut words = words.map(u64::from_le_bytes);
        let count = words.next().unwrap_or(0);
        check!(
            Check::CompareAndWrite,
            block.len() == PAGE && words.all(|word| word == count),
            "a step was done in part, the first word says {count}"
        );
        check!(
            Check::CompareAndWrite,
            (least..=self.begun).contains(&count),
            "the block counts {count}; {least} was acked before, and {} is the most that was begun",
            self.begun
        );
        count
    }
}

/// Who has a volume for itself, and since when: its hosts' changes from then on are refused until it begins to give it up.
pub type Reserved = Rc<RefCell<Option<(NodeId, u64)>>>;

/// What an initiator works on.
#[derive(Debug, Clone)]
pub struct Unit {
    /// The portal of each process that may serve it.
    pub portals: Vec<SocketAddr>,
    /// The target's name.
    pub iqn: String,
    /// The block that it counts in.
    pub lba: u32,
    /// The number in it.
    pub counter: Rc<RefCell<Counter>>,
    /// Whose it is.
    pub reserved: Reserved,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle { retry_at: u64 },
    Connecting,
    LoggingIn,
    Ready,
    Closing,
}

/// A command, or what it is to be next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// What there is to be told is told.
    Wake,
    Read {
        least: u64,
    },
    Step {
        from: u64,
        sent_ns: u64,
    },
    Register,
    Reserve,
    Release,
}

/// An initiator of one unit.
#[derive(Debug)]
pub struct Initiator {
    driver: SimDriver,
    unit: Unit,
    path: usize,
    number: u8,
    rng: Rng,
    stage: Stage,
    socket: Option<SocketId>,
    /// What was received and is not whole, and what is to be sent.
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    sending: Option<Buf>,
    sn: CmdSn,
    itt: u32,
    asked: Option<Doing>,
    /// When what was asked is given up.
    deadline: u64,
    /// What came of a read so far.
    data: Vec<u8>,
    next: Doing,
    next_at: u64,
    /// Whether it may be registered or have a reservation, and until when it keeps that.
    may_hold: bool,
    keeps_until: u64,
    /// Whether it reserves the volume at times.
    reserves: bool,
    /// Steps to make.
    left: u64,
    /// The last look at the block is to be made, or was.
    verify: Option<bool>,
    completions: Vec<Completion>,
}

impl Initiator {
    /// One that makes so many steps. One initiator of a unit reserves it: what another clears at the same time is hard to
    /// judge.
    #[must_use]
    pub fn new(driver: SimDriver, unit: Unit, steps: u64, reserves: bool, rng: Rng) -> Self {
        let number = u8::try_from(driver.node().0 % 256).expect("a byte");
        Self {
            driver,
            unit,
            path: 0,
            number,
            rng,
            stage: Stage::Idle { retry_at: 0 },
            socket: None,
            inbox: Vec::new(),
            outbox: Vec::new(),
            sending: None,
            sn: CmdSn { cmd: 1, exp_stat: 0 },
            itt: 0,
            asked: None,
            deadline: u64::MAX,
            data: Vec::new(),
            next: Doing::Wake,
            next_at: 0,
            may_hold: false,
            keeps_until: 0,
            reserves,
            left: steps,
            verify: None,
            completions: Vec::new(),
        }
    }

    /// Which process this is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.driver.node()
    }

    /// Whether it has made its steps, and keeps nothing for itself.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.left == 0 && !self.may_hold && self.asked.is_none() && self.verify != Some(false)
    }

    /// From now on it looks at the block once more, and does nothing else.
    pub fn verify(&mut self) {
        (self.left, self.keeps_until, self.verify) = (0, 0, Some(false));
        self.next_at = self.driver.now_ns();
    }

    /// One turn: takes what came, acts, and tells the world when to come again.
    pub fn turn(&mut self) {
        let deadline = self.poll_deadline();
        let mut completions = std::mem::take(&mut self.completions);
        self.driver.poll(&mut completions, deadline);
        for completion in completions.drain(..) {
            self.handle(completion);
        }
        self.completions = completions;
        let now = self.driver.now_ns();
        match self.stage {
            Stage::Idle { retry_at } if now >= retry_at => self.open(),
            Stage::LoggingIn | Stage::Ready if now >= self.deadline => self.fail(),
            Stage::Ready if self.asked.is_none() && !self.is_done() && now >= self.next_at => {
                self.ask()
            }
            _ => {}
        }
        self.flush();
    }

    fn poll_deadline(&self) -> Option<u64> {
        match self.stage {
            Stage::Idle { retry_at } => Some(retry_at),
            Stage::Ready if self.asked.is_none() => (!self.is_done()).then_some(self.next_at),
            Stage::LoggingIn | Stage::Ready => Some(self.deadline),
            Stage::Connecting | Stage::Closing => None,
        }
    }

    // ---- the connection

    fn open(&mut self) {
        let peer = self.unit.portals[self.path];
        self.stage = Stage::Connecting;
        self.driver.submit(Op::Connect { peer, timeout_ms: CONNECT_TIMEOUT_MS }, SOCKET);
    }

    fn handle(&mut self, completion: Completion) {
        match completion {
            Completion::Connected { result: Ok(socket), .. } => {
                self.socket = Some(socket);
                self.driver.submit(Op::Receive { socket }, SOCKET);
                self.log_in();
            }
            Completion::Received { chunk, .. } => {
                self.inbox.extend_from_slice(self.driver.memory().bytes(chunk.slice));
                self.driver.release_chunk(chunk);
                while matches!(self.stage, Stage::LoggingIn | Stage::Ready) && self.take_pdu() {}
            }
            Completion::Sent { result, .. } => {
                if let Some(buf) = self.sending.take() {
                    self.driver.memory().release(buf);
                }
                if result.is_err() {
                    self.fail();
                }
            }
            Completion::Connected { result: Err(_), .. } | Completion::ReceiveEnded { .. } => {
                self.fail();
            }
            Completion::Closed { .. } => self.socket = None,
            Completion::Disk { .. } | Completion::Accepted { .. } | Completion::Woken => {
                unreachable!("a host has neither disk nor listener")
            }
        }
        if self.stage == Stage::Closing && self.socket.is_none() && self.sending.is_none() {
            let wait = (5 + self.rng.below(100)) * MS;
            self.stage = Stage::Idle { retry_at: self.driver.now_ns() + wait };
        }
    }

    /// Goes to the next process.
    fn fail(&mut self) {
        if matches!(self.stage, Stage::Idle { .. } | Stage::Closing) {
            return;
        }
        self.stage = Stage::Closing;
        self.path = (self.path + 1) % self.unit.portals.len();
        // What was asked may have been done: it is looked at anew.
        self.asked = None;
        self.inbox.clear();
        self.outbox.clear();
        if let Some(socket) = self.socket {
            self.driver.submit(Op::Close { socket }, SOCKET);
        }
    }

    fn log_in(&mut self) {
        self.stage = Stage::LoggingIn;
        self.deadline = self.driver.now_ns() + PATIENCE_NS;
        (self.sn, self.itt) = (CmdSn { cmd: 1, exp_stat: 0 }, 0);
        let name = format!("iqn.2026-11.io.cairn:host{}", self.number);
        let mut data = Vec::new();
        for (key, value) in [
            ("InitiatorName", name.as_str()),
            ("TargetName", &self.unit.iqn),
            ("InitialR2T", "Yes"),
            ("ImmediateData", "Yes"),
        ] {
            text::push(&mut data, key, value);
        }
        let request = LoginRequest {
            transit: true,
            csg: OPERATIONAL,
            nsg: FULL_FEATURE,
            isid: [0x40, 0, 0, 0, 0, self.number],
            cid: 1,
            sn: self.sn,
            ..LoginRequest::default()
        };
        self.put(Header::new(0, 0, Body::Login(request)), &data);
    }

    fn put(&mut self, header: Header, data: &[u8]) {
        let data_len = u32::try_from(data.len()).expect("a short PDU");
        self.outbox.extend_from_slice(&Header { data_len, ..header }.encode());
        self.outbox.extend_from_slice(data);
        self.outbox.resize(self.outbox.len().next_multiple_of(4), 0);
    }

    fn flush(&mut self) {
        let Some(socket) = self.socket.filter(|_| self.stage != Stage::Closing) else { return };
        if self.sending.is_some() || self.outbox.is_empty() {
            return;
        }
        let len = u32::try_from(self.outbox.len()).expect("few PDUs");
        let buf = self.driver.memory().alloc(len).expect("a host has memory");
        let window = buf.slice().sub(0, len);
        self.driver.memory().bytes_mut(window).copy_from_slice(&self.outbox);
        self.outbox.clear();
        self.sending = Some(buf);
        self.driver.submit(Op::Send { socket, windows: &[window] }, SOCKET);
    }

    /// Takes the next PDU, if it is there whole.
    fn take_pdu(&mut self) -> bool {
        let Some(bhs) = self.inbox.first_chunk::<BHS_LEN>() else { return false };
        let (ahs, len) = lengths(bhs);
        let begin = BHS_LEN + ahs as usize;
        let end = begin + len as usize;
        if self.inbox.len() < end.next_multiple_of(4) {
            return false;
        }
        let header = Header::decode(bhs).expect("a target sends what there is");
        let rest = self.inbox.split_off(end.next_multiple_of(4));
        let mut data = std::mem::replace(&mut self.inbox, rest);
        data.truncate(end);
        self.received(&header, &data[begin..]);
        true
    }

    fn received(&mut self, header: &Header, data: &[u8]) {
        if let Body::ScsiResponse { sn, .. }
        | Body::LoginResponse(LoginResponse { sn, .. })
        | Body::DataIn { sn, status: Some(_), .. } = header.body
        {
            self.sn.exp_stat = sn.stat.wrapping_add(1);
        }
        match header.body {
            Body::LoginResponse(LoginResponse { status: (0, 0), .. }) => {
                (self.stage, self.deadline) = (Stage::Ready, u64::MAX);
                // What was to be done is decided anew: another may have gone on since.
                self.next = Doing::Wake;
                self.next_at = self.driver.now_ns();
            }
            Body::DataIn { status, .. } => {
                self.data.extend_from_slice(data);
                if let Some(status) = status {
                    self.answered(status, 0);
                }
            }
            Body::ScsiResponse { status, .. } => {
                // The length of the sense data, and its key in the third byte of that.
                self.answered(status, data.get(4).map_or(0, |key| key & 0xf));
            }
            Body::NopIn { ttt, .. } if ttt != NO_TAG => {
                let body = Body::NopOut { ttt, sn: self.sn };
                let header = Header { immediate: true, ..Header::new(NO_TAG, 0, body) };
                self.put(header, &[]);
            }
            Body::NopIn { .. } | Body::Async { .. } => {}
            _ => self.fail(),
        }
    }

    // ---- the work

    fn key(&self) -> u64 {
        0xca1c_0000 | u64::from(self.number)
    }

    /// Asks for what is next.
    fn ask(&mut self) {
        let now = self.driver.now_ns();
        let mut cdb = [0; 16];
        let (mut out, mut room) = (Vec::new(), 0);
        match &mut self.next {
            Doing::Wake => {}
            Doing::Read { least } => {
                *least = self.unit.counter.borrow().newest();
                cdb[0] = 0x28;
                cdb[2..6].copy_from_slice(&self.unit.lba.to_be_bytes());
                cdb[8] = 1;
                room = PAGE;
                self.data.clear();
            }
            Doing::Step { from, sent_ns } => {
                *sent_ns = now;
                let mut counter = self.unit.counter.borrow_mut();
                counter.begun = counter.begun.max(*from + 1);
                cdb[0] = 0x89;
                // FUA: what is acked is counted whatever loses power.
                cdb[1] = 0x08;
                cdb[6..10].copy_from_slice(&self.unit.lba.to_be_bytes());
                cdb[13] = 1;
                out = from.to_le_bytes().repeat(PAGE / 8);
                out.extend((*from + 1).to_le_bytes().repeat(PAGE / 8));
            }
            action => {
                let (action, kind, key, service) = match action {
                    // REGISTER AND IGNORE EXISTING KEY.
                    Doing::Register => (6, 0, 0, self.key()),
                    // Write exclusive.
                    Doing::Reserve => (1, 1, self.key(), 0),
                    // CLEAR: the registrations go, too.
                    _ => (3, 0, self.key(), 0),
                };
                if action == 3 {
                    self.unit.reserved.borrow_mut().take();
                } else {
                    self.may_hold = true;
                }
                cdb[..3].copy_from_slice(&[0x5f, action, kind]);
                cdb[8] = 24;
                out = vec![0; 24];
                out[..8].copy_from_slice(&key.to_be_bytes());
                out[8..16].copy_from_slice(&u64::to_be_bytes(service));
            }
        }
        self.asked = Some(self.next);
        self.deadline = now + PATIENCE_NS;
        let sn = self.sn;
        self.sn.cmd = self.sn.cmd.wrapping_add(1);
        self.itt = (self.itt + 1) & 0xffff;
        let edtl = u32::try_from(out.len().max(room)).expect("two blocks at most");
        let (write, read) = (!out.is_empty(), room > 0);
        let body = Body::ScsiCommand { last: true, read, write, attr: 1, edtl, sn, cdb };
        self.put(Header::new(self.itt, 0, body).with_lun(encode_lun(0)), &out);
    }

    fn answered(&mut self, status: u8, key: u8) {
        let Some(doing) = self.asked.take() else { return };
        self.deadline = u64::MAX;
        if status == CHECK_CONDITION && key == NOT_READY {
            return self.fail();
        }
        let (now, node) = (self.driver.now_ns(), self.driver.node());
        let mut pause = self.rng.below(20 * MS);
        if status != GOOD {
            // Somebody else counted; or the unit has something to tell, or is not ready, or is another's.
            let again = status == CHECK_CONDITION && key == MISCOMPARE;
            self.next = if again { Doing::Read { least: 0 } } else { Doing::Wake };
            if matches!(doing, Doing::Release) {
                // Another may have cleared what it was to.
                self.next = Doing::Register;
            }
            self.next_at = now + pause;
            return;
        }
        match doing {
            Doing::Wake => {}
            Doing::Read { least } => {
                let count = self.unit.counter.borrow().read(&self.data, least);
                self.verify = self.verify.map(|_| true);
                if self.left > 0 {
                    self.next = Doing::Step { from: count, sent_ns: 0 };
                    self.next_at = now;
                    return;
                }
            }
            Doing::Step { from, sent_ns } => {
                self.unit.counter.borrow_mut().step_acked(from + 1);
                let other = self.unit.reserved.borrow().filter(|(holder, _)| *holder != node);
                check_reserved(other, sent_ns, format_args!("a step of node {}", node.0));
                self.left = self.left.saturating_sub(1);
            }
            Doing::Register => {
                self.next = if self.keeps_until > now { Doing::Reserve } else { Doing::Release };
                self.next_at = now;
                return;
            }
            Doing::Reserve => {
                *self.unit.reserved.borrow_mut() = Some((node, now));
                pause = 0;
            }
            Doing::Release => self.may_hold = false,
        }
        self.next_at = now + pause;
        let over = now >= self.keeps_until;
        self.next = if self.may_hold && over {
            Doing::Release
        } else if self.reserves && !self.may_hold && self.left > 0 && self.rng.chance(100) {
            self.keeps_until = now + self.rng.below(400 * MS);
            Doing::Register
        } else {
            Doing::Read { least: 0 }
        };
    }
}

/// Nobody but who has reserved a volume changes it: nothing that was sent since.
pub fn check_reserved(by: Option<(NodeId, u64)>, sent_ns: u64, what: std::fmt::Arguments<'_>) {
    let Some((holder, since)) = by else { return };
    check!(
        Check::Reservations,
        sent_ns <= since,
        "{what}, sent at {sent_ns} ns, is acked, and node {} has the volume to itself since {since} ns",
        holder.0
    );
}
