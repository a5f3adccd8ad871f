//! A host of NVMe/TCP on plain sockets that sends what commands it likes, one or several at a time.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use cairn_engine::nvmf::pdu::{Body, Common, Digests, Header};
use cairn_engine::nvmf::sqe::{SGL_IN_CAPSULE, SGL_TRANSPORT, Sgl, Sqe, opcode};
use cairn_engine::nvmf::status::Status;

use super::{HOST, PATIENCE, volume_nqn};

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) cid: u16,
    pub(crate) status: Status,
    pub(crate) result: u64,
    pub(crate) data: Vec<u8>,
}

impl Ended {
    pub(crate) fn is_good(&self) -> bool {
        self.status.is_success()
    }

    pub(crate) fn is_conflict(&self) -> bool {
        self.status.is(Status::RESERVATION_CONFLICT)
    }
}

/// One queue pair.
struct Pair {
    stream: TcpStream,
    cid: u16,
}

/// A controller with its admin queue and one I/O queue.
pub(crate) struct NvmeHost {
    admin: Pair,
    io: Pair,
}

impl Pair {
    fn open(at: SocketAddr) -> Self {
        let stream = TcpStream::connect(at).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut pair = Self { stream, cid: 0 };
        pair.send(Body::IcReq { pfv: 0, hpda: 0, dgst: 0, maxr2t: 0 }, &[]);
        assert!(matches!(pair.receive().0.body, Body::IcResp { .. }));
        pair
    }

    fn send(&mut self, body: Body, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let header = Header::new(body, Digests::default(), len, 0);
        let bytes = [header.encode().as_bytes(), data].concat();
        self.stream.write_all(&bytes).unwrap();
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut bytes = vec![0; 8];
        self.stream.read_exact(&mut bytes).expect("the connection goes on");
        let plen = Common::decode(&bytes).unwrap().plen as usize;
        bytes.resize(plen, 0);
        self.stream.read_exact(&mut bytes[8..]).unwrap();
        let header = Header::decode(&bytes).unwrap();
        let data = bytes.split_off(usize::from(header.pdo).max(8).min(plen));
        (header, if header.pdo == 0 { Vec::new() } else { data })
    }

    /// Sends a command; its identifier.
    fn begin(&mut self, sqe: Sqe, out: &[u8], room: u32) -> u16 {
        self.cid += 1;
        let sgl = match (out.len(), room) {
            (0, len) => Sgl { address: 0, len, kind: SGL_TRANSPORT },
            (len, _) => Sgl { address: 0, len: len.try_into().unwrap(), kind: SGL_IN_CAPSULE },
        };
        self.send(Body::CapsuleCmd(sqe.with_cid(self.cid).with_sgl(sgl)), out);
        self.cid
    }

    /// The next command to end.
    fn finish(&mut self) -> Ended {
        let mut all = Vec::new();
        loop {
            let (header, data) = self.receive();
            match header.body {
                Body::C2hData(_) => all.extend(data),
                Body::CapsuleResp(cqe) => {
                    let (cid, status, result) = (cqe.cid(), cqe.status(), cqe.result());
                    return Ended { cid, status, result, data: all };
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn command(&mut self, sqe: Sqe, out: &[u8], room: u32) -> Ended {
        let cid = self.begin(sqe, out, room);
        let ended = self.finish();
        assert_eq!(ended.cid, cid, "{ended:?}");
        ended
    }

    fn connect(&mut self, nqn: &str, id: u128, qid: u16, cntlid: u16) -> u16 {
        let mut data = vec![0; 1024];
        data[..16].copy_from_slice(&id.to_be_bytes());
        data[16..18].copy_from_slice(&cntlid.to_le_bytes());
        data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
        data[512..512 + HOST.len()].copy_from_slice(HOST.as_bytes());
        let sqe = Sqe::fabrics(opcode::CONNECT)
            .with_bytes(42, &qid.to_le_bytes())
            .with_bytes(44, &[31, 0]);
        let ended = self.command(sqe, &data, 0);
        assert!(ended.is_good(), "{ended:?}");
        u16::try_from(ended.result).unwrap()
    }
}

impl NvmeHost {
    pub(crate) fn connect(at: SocketAddr, volume: &str, id: u128) -> Self {
        let nqn = volume_nqn(volume);
        let mut admin = Pair::open(at);
        let cntlid = admin.connect(&nqn, id, 0, u16::MAX);
        // CC: enabled.
        let enable = Sqe::fabrics(opcode::PROPERTY_SET)
            .with_cdw(11, 0x14)
            .with_bytes(48, &0x0046_0061_u64.to_le_bytes());
        assert!(admin.command(enable, &[], 0).is_good());
        let mut io = Pair::open(at);
        io.connect(&nqn, id, 1, cntlid);
        Self { admin, io }
    }

    pub(crate) fn admin(&mut self, sqe: Sqe, room: u32) -> Ended {
        self.admin.command(sqe.with_nsid(1), &[], room)
    }

    /// An Asynchronous Event Request, which ends later.
    pub(crate) fn await_event(&mut self) {
        self.admin.begin(Sqe::new(opcode::ASYNC_EVENT_REQUEST), &[], 0);
    }

    pub(crate) fn event(&mut self) -> u64 {
        self.admin.finish().result
    }

    // ---- I/O

    pub(crate) fn read(&mut self, lba: u64) -> Ended {
        self.io.command(Sqe::new(opcode::READ).with_nsid(1).with_slba(lba), &[], 4096)
    }

    pub(crate) fn write(&mut self, lba: u64, with: u8) -> Ended {
        self.begin_write(lba, with);
        self.finish()
    }

    /// A write whose data goes along.
    pub(crate) fn begin_write(&mut self, lba: u64, with: u8) -> u16 {
        let sqe = Sqe::new(opcode::WRITE).with_nsid(1).with_slba(lba);
        self.io.begin(sqe, &[with; 4096], 0)
    }

    /// A write whose data is asked for: answer with [`NvmeHost::send_data`].
    pub(crate) fn announce_write(&mut self, lba: u64) -> (u16, u16) {
        let sqe = Sqe::new(opcode::WRITE).with_nsid(1).with_slba(lba);
        let cid = self.io.begin(sqe, &[], 4096);
        match self.io.receive().0.body {
            Body::R2t(transfer) => (cid, transfer.ttag),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn send_data(&mut self, (cccid, ttag): (u16, u16), data: &[u8]) {
        use cairn_engine::nvmf::pdu::{FLAG_LAST, Transfer};
        let len = u32::try_from(data.len()).unwrap();
        let body = Body::H2cData(Transfer { cccid, ttag, offset: 0, len });
        let header = Header::new(body, Digests::default(), len, 0).with_flags(FLAG_LAST);
        let bytes = [header.encode().as_bytes(), data].concat();
        self.io.stream.write_all(&bytes).unwrap();
    }

    pub(crate) fn finish(&mut self) -> Ended {
        self.io.finish()
    }

    // ---- reservations

    /// Reservation Register, Acquire or Release, with CDW10 and the keys that it brings.
    pub(crate) fn reserve(&mut self, code: u8, cdw10: u32, keys: &[u64]) -> Ended {
        self.begin_reserve(code, cdw10, keys);
        self.finish()
    }

    pub(crate) fn begin_reserve(&mut self, code: u8, cdw10: u32, keys: &[u64]) -> u16 {
        let data: Vec<u8> = keys.iter().flat_map(|key| key.to_le_bytes()).collect();
        let sqe = Sqe::new(code).with_nsid(1).with_cdw(10, cdw10);
        self.io.begin(sqe, &data, 0)
    }

    pub(crate) fn begin_report(&mut self) {
        let sqe = Sqe::new(opcode::RESERVATION_REPORT).with_nsid(1);
        self.io.begin(sqe.with_cdw(10, 1023).with_cdw(11, 1), &[], 4096);
    }

    /// Whether nothing comes for so long on the I/O queue.
    pub(crate) fn is_silent(&self, wait: Duration) -> bool {
        self.io.stream.set_read_timeout(Some(wait)).unwrap();
        let silent = self.io.stream.peek(&mut [0]).is_err();
        self.io.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        silent
    }

    /// Reservation Report: the type, and each registrant's identifier, key, and whether it holds the reservation.
    pub(crate) fn report(&mut self) -> (u8, Vec<(u128, u64, bool)>) {
        self.begin_report();
        let ended = self.finish();
        assert!(ended.is_good(), "{ended:?}");
        let page = ended.data;
        let count = usize::from(u16::from_le_bytes([page[5], page[6]]));
        let records = page[64..].chunks(64).take(count).map(|r| {
            let id = u128::from_be_bytes(r[16..32].try_into().unwrap());
            (id, u64::from_le_bytes(r[8..16].try_into().unwrap()), r[2] == 1)
        });
        (page[4], records.collect())
    }
}
