//! An iSCSI initiator, on a plain socket: one command at a time.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use cairn_engine::iscsi::pdu::{
    BHS_LEN, Body, CmdSn, Header, LoginRequest, LoginResponse, encode_lun, lengths,
};
use cairn_engine::iscsi::text;

use super::PATIENCE;

/// The operational stage of a login, and the full feature phase.
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;

/// How a command ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u8,
    /// Sense key, ASC and ASCQ.
    pub(crate) sense: (u8, u8, u8),
    pub(crate) data: Vec<u8>,
}

impl Answer {
    pub(crate) fn is_good(&self) -> bool {
        self.status == 0
    }

    pub(crate) fn is_conflict(&self) -> bool {
        self.status == 0x18
    }
}

pub(crate) struct Initiator {
    stream: TcpStream,
    cmd_sn: u32,
    exp_stat_sn: u32,
    itt: u32,
    /// What is to be sent at once.
    corked: Option<Vec<u8>>,
    /// Where its commands go.
    pub(crate) lun: u16,
}

impl Initiator {
    /// Logs in; nothing where the connection ended before that was answered, or how it was refused.
    pub(crate) fn login(at: SocketAddr, name: &str, iqn: &str) -> Result<Self, Option<(u8, u8)>> {
        Self::login_in(at, name, iqn, usize::MAX)
    }

    /// The same, with what is sent in pieces so long.
    pub(crate) fn login_in(
        at: SocketAddr,
        name: &str,
        iqn: &str,
        piece: usize,
    ) -> Result<Self, Option<(u8, u8)>> {
        let keys = [("InitiatorName", name), ("TargetName", iqn)];
        Self::open(at, name, &keys, piece)
    }

    /// The targets that discovery tells of, and where.
    pub(crate) fn discover(at: SocketAddr, name: &str) -> Vec<(String, String)> {
        let keys = [("InitiatorName", name), ("SessionType", "Discovery")];
        let mut session = Self::open(at, name, &keys, usize::MAX).unwrap();
        let mut out = Vec::new();
        text::push(&mut out, "SendTargets", "All");
        let (itt, sn) = session.next_sn();
        let body = Body::Text { last: true, more: false, ttt: u32::MAX, sn };
        session.send(Header::new(itt, 0, body), &out);
        let (_, data) = session.receive().unwrap();
        let mut targets = Vec::new();
        for (key, value) in text::parse(&data).unwrap() {
            match key {
                "TargetName" => targets.push((value.to_owned(), String::new())),
                _ => targets.last_mut().unwrap().1 = value.to_owned(),
            }
        }
        targets
    }

    fn open(
        at: SocketAddr,
        name: &str,
        keys: &[(&str, &str)],
        piece: usize,
    ) -> Result<Self, Option<(u8, u8)>> {
        let stream = TcpStream::connect(at).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut session = Self { stream, cmd_sn: 1, exp_stat_sn: 0, itt: 0, corked: None, lun: 0 };
        let mut out = Vec::new();
        for (key, value) in keys {
            text::push(&mut out, key, value);
        }
        for (key, value) in [("InitialR2T", "Yes"), ("ImmediateData", "Yes")] {
            text::push(&mut out, key, value);
        }
        let last = *name.as_bytes().last().unwrap();
        let request = LoginRequest {
            transit: true,
            more: false,
            csg: OPERATIONAL,
            nsg: FULL_FEATURE,
            version_max: 0,
            version_min: 0,
            isid: [0x40, 0, 0, 0, 0, last],
            tsih: 0,
            cid: 1,
            sn: CmdSn { cmd: 1, exp_stat: 0 },
        };
        let bytes = encode(Header::new(0, 0, Body::Login(request)), &out);
        for part in bytes.chunks(piece.min(bytes.len())) {
            session.stream.write_all(part).map_err(|_| None)?;
            if piece < bytes.len() {
                std::thread::sleep(Duration::from_micros(300));
            }
        }
        let (header, _) = session.receive().ok_or(None)?;
        let Body::LoginResponse(LoginResponse { status, .. }) = header.body else {
            panic!("{header:?}");
        };
        if status == (0, 0) { Ok(session) } else { Err(Some(status)) }
    }

    /// Logged in, and told all that was to be told first.
    pub(crate) fn ready(at: SocketAddr, name: &str, iqn: &str) -> Self {
        let mut session = Self::login(at, name, iqn).unwrap();
        // A few attentions at most.
        let told = (0..8).any(|_| session.command(&[0; 6], &[], 0).is_good());
        assert!(told, "the unit is ready");
        session
    }

    fn next_sn(&mut self) -> (u32, CmdSn) {
        let sn = CmdSn { cmd: self.cmd_sn, exp_stat: self.exp_stat_sn };
        self.cmd_sn += 1;
        self.itt += 1;
        (self.itt, sn)
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let bytes = encode(header, data);
        match &mut self.corked {
            Some(corked) => corked.extend(bytes),
            None => self.stream.write_all(&bytes).unwrap(),
        }
    }

    /// What is sent from now on goes out at once, with [`Initiator::uncork`].
    pub(crate) fn cork(&mut self) {
        self.corked = Some(Vec::new());
    }

    pub(crate) fn uncork(&mut self) {
        let corked = self.corked.take().unwrap_or_default();
        self.stream.write_all(&corked).unwrap();
    }

    /// The next PDU; nothing where the connection has ended.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut bhs = [0; BHS_LEN];
        self.stream.read_exact(&mut bhs).ok()?;
        let (ahs, len) = lengths(&bhs);
        assert_eq!(ahs, 0);
        let mut data = vec![0; len.next_multiple_of(4) as usize];
        self.stream.read_exact(&mut data).ok()?;
        data.truncate(len as usize);
        let header = Header::decode(&bhs).unwrap();
        if let Body::ScsiResponse { sn, .. }
        | Body::LoginResponse(LoginResponse { sn, .. })
        | Body::TextResponse { sn, .. }
        | Body::TaskManagementResponse { sn, .. }
        | Body::DataIn { sn, status: Some(_), .. } = header.body
        {
            self.exp_stat_sn = sn.stat.wrapping_add(1);
        }
        Some((header, data))
    }

    /// A command, and its end. At most 64 KiB go along with it.
    pub(crate) fn command(&mut self, cdb: &[u8], out: &[u8], room: usize) -> Answer {
        self.begin(cdb, out, room);
        self.finish()
    }

    /// Sends a command: its tag.
    pub(crate) fn begin(&mut self, cdb: &[u8], out: &[u8], room: usize) -> u32 {
        let (itt, sn) = self.next_sn();
        let mut full = [0; 16];
        full[..cdb.len()].copy_from_slice(cdb);
        let edtl = u32::try_from(out.len().max(room)).unwrap();
        let (write, read) = (!out.is_empty(), room > 0);
        let body = Body::ScsiCommand { last: true, read, write, attr: 1, edtl, sn, cdb: full };
        self.send(Header::new(itt, 0, body).with_lun(encode_lun(self.lun)), out);
        itt
    }

    /// Sends a write without its data, of so many blocks of 4096 bytes. Whether it is asked for: there is a buffer.
    /// One that would wait for that is aborted.
    pub(crate) fn announce_write(&mut self, blocks: u16) -> bool {
        let (itt, sn) = self.next_sn();
        let mut cdb = [0; 16];
        cdb[..10].copy_from_slice(&ten(0x2a, 0, blocks));
        let edtl = u32::from(blocks) * 4096;
        let body =
            Body::ScsiCommand { last: true, read: false, write: true, attr: 1, edtl, sn, cdb };
        self.send(Header::new(itt, 0, body).with_lun(encode_lun(self.lun)), &[]);
        if self.is_silent(Duration::from_millis(100)) {
            self.begin_abort(itt);
            assert_eq!(self.finish_abort(), 0, "function complete");
            return false;
        }
        let (header, _) = self.receive().expect("the session goes on");
        assert!(matches!(header.body, Body::R2t { .. }), "{header:?}");
        true
    }

    /// Sends ABORT TASK.
    pub(crate) fn begin_abort(&mut self, rtt: u32) {
        let (itt, sn) = self.next_sn();
        let ref_cmd_sn = sn.cmd - 1;
        let body = Body::TaskManagement { function: 1, rtt, sn, ref_cmd_sn };
        self.send(Header::new(itt, 0, body).with_lun(encode_lun(self.lun)), &[]);
    }

    /// The response to a task management function.
    pub(crate) fn finish_abort(&mut self) -> u8 {
        match self.receive().expect("the session goes on").0.body {
            Body::TaskManagementResponse { response, .. } => response,
            other => panic!("{other:?}"),
        }
    }

    /// Whether nothing comes for so long.
    pub(crate) fn is_silent(&self, wait: Duration) -> bool {
        self.stream.set_read_timeout(Some(wait)).unwrap();
        let silent = self.stream.peek(&mut [0]).is_err();
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        silent
    }

    pub(crate) fn finish(&mut self) -> Answer {
        let mut answer = Answer::default();
        loop {
            let (header, data) = self.receive().expect("the session goes on");
            match header.body {
                Body::DataIn { status, .. } => {
                    answer.data.extend(data);
                    if let Some(status) = status {
                        return Answer { status, ..answer };
                    }
                }
                Body::ScsiResponse { status, .. } => {
                    answer.status = status;
                    if let [_, _, sense @ ..] = data.as_slice() {
                        answer.sense = (sense[2] & 0xf, sense[12], sense[13]);
                    }
                    return answer;
                }
                // Asks whether somebody is there.
                Body::NopIn { .. } => {}
                _ => panic!("{header:?}"),
            }
        }
    }

    // ---- commands

    pub(crate) fn read(&mut self, lba: u32, blocks: u16, block: usize) -> Answer {
        self.command(&ten(0x28, lba, blocks), &[], usize::from(blocks) * block)
    }

    pub(crate) fn write(&mut self, lba: u32, data: &[u8], block: usize) -> Answer {
        let blocks = u16::try_from(data.len() / block).unwrap();
        self.command(&ten(0x2a, lba, blocks), data, 0)
    }

    pub(crate) fn compare_and_write(&mut self, lba: u32, old: &[u8], new: &[u8]) -> Answer {
        let mut cdb = [0; 16];
        cdb[0] = 0x89;
        cdb[6..10].copy_from_slice(&lba.to_be_bytes());
        cdb[13] = 1;
        self.command(&cdb, &[old, new].concat(), 0)
    }

    /// PERSISTENT RESERVE OUT.
    pub(crate) fn reserve_out(&mut self, action: u8, kind: u8, key: u64, service: u64) -> Answer {
        self.begin_reserve_out(action, kind, key, service);
        self.finish()
    }

    pub(crate) fn begin_reserve_out(&mut self, action: u8, kind: u8, key: u64, to: u64) -> u32 {
        let mut list = [0; 24];
        list[..8].copy_from_slice(&key.to_be_bytes());
        list[8..16].copy_from_slice(&to.to_be_bytes());
        self.begin(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list, 0)
    }

    /// LOGICAL UNIT RESET of LUN 0: the response.
    pub(crate) fn reset_unit(&mut self) -> u8 {
        let (itt, sn) = self.next_sn();
        let body = Body::TaskManagement { function: 5, rtt: u32::MAX, ref_cmd_sn: 0, sn };
        self.send(Header::new(itt, 0, body).with_lun(encode_lun(0)), &[]);
        loop {
            let (header, _) = self.receive().expect("the session goes on");
            if let Body::TaskManagementResponse { response, .. } = header.body {
                return response;
            }
        }
    }

    /// The keys that are registered.
    pub(crate) fn keys(&mut self) -> Vec<u64> {
        let answer = self.command(&[0x5e, 0, 0, 0, 0, 0, 0, 1, 0, 0], &[], 256);
        assert!(answer.is_good(), "{answer:?}");
        let keys = answer.data[8..].chunks_exact(8);
        keys.map(|key| u64::from_be_bytes(key.try_into().unwrap())).collect()
    }
}

fn ten(code: u8, lba: u32, blocks: u16) -> [u8; 10] {
    let mut cdb = [0; 10];
    cdb[0] = code;
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb[7..9].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

fn encode(header: Header, data: &[u8]) -> Vec<u8> {
    let header = Header { data_len: u32::try_from(data.len()).unwrap(), ..header };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
