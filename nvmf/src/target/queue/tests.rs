use cairn_block::{HeapMemory, Received};
use proptest::prelude::*;

use super::*;
use crate::pdu::COMMON_LEN;
use crate::sqe::Sgl;

/// A queue and the bytes that it has sent.
struct Rig {
    mem: HeapMemory,
    queue: Option<Queue>,
    chunk: Option<Buf>,
}

const CONFIG: QueueConfig = QueueConfig {
    max_data_len: 128 << 10,
    in_capsule_len: 8192,
    max_h2c_data: 16 << 10,
    max_slots: 8,
};

impl Rig {
    fn new(memory: u32) -> Self {
        let mut mem = HeapMemory::new(memory);
        let chunk = mem.alloc(64 << 10);
        let queue = Queue::new(&CONFIG, &mut mem);
        Self { mem, queue, chunk }
    }

    /// After ICReq and ICResp.
    fn agreed(digests: Digests) -> Self {
        let mut rig = Self::new(1 << 20);
        rig.feed(&icreq(digests));
        let sent = rig.sent();
        assert_eq!(sent[11], digests.to_wire());
        rig
    }

    fn queue(&mut self) -> &mut Queue {
        self.queue.as_mut().unwrap()
    }

    fn feed(&mut self, bytes: &[u8]) -> u32 {
        let mut taken = 0;
        for part in bytes.chunks(64 << 10) {
            let chunk = self.chunk.as_ref().unwrap().slice().sub(0, len32(part.len()));
            self.mem.bytes_mut(chunk).copy_from_slice(part);
            let n = self.queue.as_mut().unwrap().handle_recv(chunk, &mut self.mem);
            taken += n;
            if n < chunk.len() {
                break;
            }
        }
        taken
    }

    fn sent(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut batch = Vec::with_capacity(4);
        let tx = self.queue.as_mut().unwrap().tx();
        while tx.wants_send() {
            tx.take_batch(&mut batch);
            for window in &batch {
                out.extend_from_slice(self.mem.bytes(*window));
            }
            tx.handle_sent(&mut self.mem);
        }
        out
    }

    fn complete(&mut self, cmd: Command) {
        if let Some(data) = cmd.data {
            self.mem.release(data);
        }
        self.queue.as_mut().unwrap().complete(cmd.slot, Status::SUCCESS, 0, &mut self.mem);
    }

    fn close(mut self) {
        if let Some(queue) = self.queue.take() {
            queue.close(&mut self.mem);
        }
        if let Some(chunk) = self.chunk.take() {
            self.mem.release(chunk);
        }
        assert_eq!(self.mem.in_use(), 0, "a buffer has leaked");
    }
}

fn icreq(digests: Digests) -> Vec<u8> {
    let body = Body::IcReq { pfv: 0, hpda: 0, dgst: digests.to_wire(), maxr2t: 0 };
    Header::new(body, Digests::default(), 0, 0).encode().as_bytes().to_vec()
}

/// A write of `len` bytes by R2T.
fn write_by_r2t(cid: u16, len: u32, digests: Digests) -> Vec<u8> {
    let sgl = Sgl { address: 0, len, kind: SGL_TRANSPORT };
    let sqe = Sqe::new(opcode::WRITE).with_cid(cid).with_sgl(sgl);
    Header::new(Body::CapsuleCmd(sqe), digests, 0, 0).encode().as_bytes().to_vec()
}

fn write_in_capsule(cid: u16, data: &[u8], digests: Digests) -> Vec<u8> {
    let len = len32(data.len());
    let sgl = Sgl { address: 0, len, kind: SGL_IN_CAPSULE };
    let sqe = Sqe::new(opcode::WRITE).with_cid(cid).with_sgl(sgl);
    with_data(&Header::new(Body::CapsuleCmd(sqe), digests, len, 0), data, digests)
}

fn h2c_data(transfer: Transfer, last: bool, data: &[u8], digests: Digests) -> Vec<u8> {
    let header = Header::new(Body::H2cData(transfer), digests, len32(data.len()), 0);
    with_data(&header.with_flags(if last { FLAG_LAST } else { 0 }), data, digests)
}

fn with_data(header: &Header, data: &[u8], digests: Digests) -> Vec<u8> {
    let mut bytes = [header.encode().as_bytes(), data].concat();
    if digests.data && !data.is_empty() {
        bytes.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
    }
    bytes
}

/// What the connection ends with: FES and FEI of the TermReq that it sends last.
fn term_req(sent: &[u8]) -> Option<(u16, u32)> {
    let mut rest = sent;
    while rest.len() >= COMMON_LEN {
        let header = Header::decode(rest).unwrap();
        if let Body::TermReq { from_host: false, fes, fei } = header.body {
            assert_eq!(rest.len(), header.plen as usize, "a TermReq is the last PDU");
            return Some((fes, fei));
        }
        rest = &rest[header.plen as usize..];
    }
    None
}

/// Each row: what comes after ICReq and a write of 32 KiB whose R2T has TTAG 0, and how it is refused.
/// Data is not copied where all of it is in one receive buffer, whatever is in front of it and with its digest; where only
/// some of it is, or where memory keeps nothing, it is.
#[test]
fn data_stays_where_it_was_received() {
    for digests in [Digests::default(), Digests { header: true, data: true }] {
        let mut rig = Rig::agreed(digests);
        let chunk = rig.chunk.as_ref().unwrap().slice();
        let mut received = Received::new(chunk.offset(), chunk.len(), 2, 1);
        received.take(0);
        rig.mem.set_received(received);
        let data: Vec<u8> = (0..4096u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let mut bytes = write_in_capsule(1, &data, digests);
        bytes.extend(write_in_capsule(2, &data, digests));
        let third = write_in_capsule(3, &data, digests);
        let (head, tail) = third.split_at(1000);
        bytes.extend(head);
        assert_eq!(rig.feed(&bytes), len32(bytes.len()));
        let first = rig.queue().poll_command().unwrap();
        let second = rig.queue().poll_command().unwrap();
        assert!(rig.queue().poll_command().is_none());
        for command in [&first, &second] {
            let at = command.data.as_ref().unwrap().slice();
            assert!(at.offset() > chunk.offset() && at.offset() < chunk.offset() + chunk.len());
            assert!(rig.mem.bytes(at) == data);
        }
        let received = rig.mem.received().unwrap();
        received.give_back(0);
        assert_eq!(received.poll_free(), None);
        rig.complete(second);
        rig.complete(first);
        assert_eq!(rig.mem.received().unwrap().poll_free(), Some(0));
        rig.feed(tail);
        let third = rig.queue().poll_command().unwrap();
        let at = third.data.as_ref().unwrap().slice();
        assert!(at.offset() >= chunk.offset() + chunk.len() || at.offset() < chunk.offset());
        assert!(rig.mem.bytes(at) == data);
        rig.complete(third);
        rig.close();
    }
}

/// A digest that does not match is told of where the data was kept, too.
#[test]
fn damage_to_data_that_is_kept_is_noticed() {
    let digests = Digests { header: false, data: true };
    let mut rig = Rig::agreed(digests);
    let chunk = rig.chunk.as_ref().unwrap().slice();
    let mut received = Received::new(chunk.offset(), chunk.len(), 2, 1);
    received.take(0);
    rig.mem.set_received(received);
    let mut bytes = write_in_capsule(1, &[7; 4096], digests);
    bytes[2000] ^= 1;
    rig.feed(&bytes);
    assert!(rig.queue().poll_command().is_none());
    assert!(!rig.sent().is_empty());
    let received = rig.mem.received().unwrap();
    received.give_back(0);
    assert_eq!(received.poll_free(), Some(0), "nothing keeps it");
    rig.close();
}

#[test]
fn malformed_pdus_end_the_connection_with_their_reason() {
    let none = Digests::default();
    let transfer = Transfer { cccid: 1, ttag: 0, offset: 0, len: 16 << 10 };
    let data = vec![0; 16 << 10];
    let good = h2c_data(transfer, false, &data, none);
    let bent = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let h2c = |t: Transfer, len: usize| h2c_data(t, false, &vec![0; len], none);
    let body = |body| Header::new(body, none, 0, 0).encode().as_bytes().to_vec();
    let capsule = |len: u32| {
        let sqe = Sqe::new(opcode::WRITE);
        Header::new(Body::CapsuleCmd(sqe), none, len, 0).encode().as_bytes().to_vec()
    };
    let table: Vec<(&str, Vec<u8>, (u16, u32))> = vec![
        ("unknown type", bent(0, 0x42), (1, 0)),
        ("a controller's type", body(Body::R2t(transfer)), (1, 0)),
        ("a response", body(Body::CapsuleResp(Cqe([0; 16]))), (1, 0)),
        ("digest flag that was not agreed on", bent(1, 2), (1, 1)),
        ("HLEN", bent(2, 72), (1, 2)),
        ("PDO inside of the header", bent(3, 20), (1, 3)),
        ("PDO not aligned", bent(3, 25), (1, 3)),
        ("PLEN below HLEN", vec![6, 0, 24, 24, 8, 0, 0, 0], (1, 4)),
        ("PLEN and DATAL differ", h2c(Transfer { len: 4096, ..transfer }, 8192), (1, 4)),
        ("zero length", h2c(Transfer { len: 0, ..transfer }, 4), (1, 16)),
        ("CCCID", h2c(Transfer { cccid: 2, ..transfer }, 16 << 10), (1, 8)),
        ("TTAG that cannot be", h2c(Transfer { ttag: 8, ..transfer }, 16 << 10), (1, 10)),
        ("TTAG that waits for nothing", h2c(Transfer { ttag: 3, ..transfer }, 16 << 10), (2, 0)),
        ("DATAO ahead", h2c(Transfer { offset: 4, ..transfer }, 16 << 10), (4, 0)),
        ("DATAO far out", h2c(Transfer { offset: u32::MAX, ..transfer }, 16 << 10), (4, 0)),
        ("more than MAXH2CDATA", h2c(Transfer { len: 20 << 10, ..transfer }, 20 << 10), (5, 0)),
        ("LAST too early", bent(1, FLAG_LAST), (1, 1)),
        ("second ICReq", icreq(none), (2, 0)),
        ("too much in a capsule", capsule(8193), (5, 0)),
    ];
    for (what, bytes, expected) in table {
        let mut rig = Rig::agreed(none);
        rig.feed(&write_by_r2t(1, 32 << 10, none));
        let r2t = rig.sent();
        assert_eq!(
            Header::decode(&r2t).unwrap().body,
            Body::R2t(Transfer { len: 32 << 10, ..transfer })
        );
        let taken = rig.feed(&bytes);
        assert_eq!(taken, len32(bytes.len()), "{what}: all is swallowed");
        assert_eq!(term_req(&rig.sent()), Some(expected), "{what}");
        assert!(rig.queue().wants_close() && rig.queue().poll_command().is_none(), "{what}");
        rig.close();
    }
}

#[test]
fn what_comes_before_icreq_is_refused() {
    let none = Digests::default();
    let table: [(Vec<u8>, (u16, u32)); 5] = [
        (write_by_r2t(1, 512, none), (2, 0)),
        (h2c_data(Transfer { len: 4, ..Transfer::default() }, true, &[0; 4], none), (2, 0)),
        (
            {
                let mut b = icreq(none);
                b[8] = 1;
                b
            },
            (6, 8),
        ),
        (
            {
                let mut b = icreq(none);
                b[10] = 32;
                b
            },
            (6, 10),
        ),
        (
            {
                let mut b = icreq(none);
                b[11] = 4;
                b
            },
            (6, 11),
        ),
    ];
    for (bytes, expected) in table {
        let mut rig = Rig::new(1 << 20);
        rig.feed(&bytes);
        assert_eq!(term_req(&rig.sent()), Some(expected));
        rig.close();
    }
}

#[test]
fn a_host_may_end_the_connection() {
    let mut rig = Rig::agreed(Digests::default());
    let body = Body::TermReq { from_host: true, fes: 1, fei: 9 };
    rig.feed(Header::new(body, Digests::default(), 24, 0).encode().as_bytes());
    let reason = rig.queue().close_reason().unwrap();
    assert_eq!(reason, CloseReason::Terminated { fes: 1, fei: 9 });
    assert!(rig.sent().is_empty());
    rig.close();
}

#[test]
fn a_header_digest_that_does_not_match_is_fatal() {
    let digests = Digests { header: true, data: true };
    let mut rig = Rig::agreed(digests);
    let mut bytes = write_in_capsule(1, &[7; 512], digests);
    bytes[20] ^= 1;
    rig.feed(&bytes);
    assert_eq!(term_req(&rig.sent()), Some((3, 0)));
    assert!(rig.queue().poll_command().is_none());
    rig.close();
}

#[test]
fn hpda_places_the_data() {
    let mut rig = Rig::new(1 << 20);
    let body = Body::IcReq { pfv: 0, hpda: 31, dgst: 0, maxr2t: 0 };
    rig.feed(Header::new(body, Digests::default(), 0, 0).encode().as_bytes());
    rig.sent();
    let sgl = Sgl { address: 0, len: 512, kind: SGL_TRANSPORT };
    let read = Header::new(
        Body::CapsuleCmd(Sqe::new(opcode::READ).with_sgl(sgl)),
        Digests::default(),
        0,
        0,
    );
    rig.feed(read.encode().as_bytes());
    let cmd = rig.queue().poll_command().unwrap();
    let data = rig.mem.alloc(512).unwrap();
    rig.mem.bytes_mut(data.slice()).fill(0x44);
    let Rig { queue, mem, .. } = &mut rig;
    queue.as_mut().unwrap().complete_with_data(cmd.slot, data, mem);
    let sent = rig.sent();
    assert_eq!((sent[3], sent.len()), (128, 128 + 512 + 24));
    assert!(sent[128..640].iter().all(|&b| b == 0x44));
    rig.close();
}

/// Never more data than the host has room for.
#[test]
fn data_is_cut_to_the_sgl() {
    let mut rig = Rig::agreed(Digests::default());
    let sgl = Sgl { address: 0, len: 512, kind: SGL_TRANSPORT };
    let sqe = Sqe::new(opcode::READ).with_sgl(sgl);
    rig.feed(Header::new(Body::CapsuleCmd(sqe), Digests::default(), 0, 0).encode().as_bytes());
    let cmd = rig.queue().poll_command().unwrap();
    let data = rig.mem.alloc(4096).unwrap();
    let Rig { queue, mem, .. } = &mut rig;
    queue.as_mut().unwrap().complete_with_data(cmd.slot, data, mem);
    assert_eq!(rig.sent().len(), 24 + 512 + 24);
    rig.close();
}

/// Memory runs out: writes by R2T wait their turn, a capsule is taken by the spare buffer, and the
/// stream stalls only until that one is done.
#[test]
fn writes_wait_for_memory() {
    let none = Digests::default();
    let mut rig = Rig::agreed(none);
    let mut hoard: Vec<_> = std::iter::from_fn(|| rig.mem.alloc(64 << 10)).collect();
    hoard.extend(std::iter::from_fn(|| rig.mem.alloc(4096)));
    for cid in 0..3 {
        let bytes = write_by_r2t(cid, 16 << 10, none);
        assert_eq!(rig.feed(&bytes), len32(bytes.len()), "an R2T can wait");
    }
    assert!(rig.sent().is_empty() && rig.queue().is_waiting_for_memory());
    let first = write_in_capsule(8, &[3; 4096], none);
    assert_eq!(rig.feed(&first), len32(first.len()));
    let second = write_in_capsule(9, &[4; 4096], none);
    assert_eq!(rig.feed(&second), 71, "all but the last byte of the header");
    assert_eq!(rig.feed(&second[71..]), 0);

    let cmd = rig.queue().poll_command().unwrap();
    assert_eq!(cmd.sqe.cid(), 8);
    rig.complete(cmd);
    assert_eq!(rig.feed(&second[71..]), len32(second.len()) - 71);
    let cmd = rig.queue().poll_command().unwrap();
    assert_eq!((cmd.sqe.cid(), cmd.data.as_ref().map(Buf::len)), (9, Some(4096)));
    assert_eq!(rig.mem.bytes(cmd.data.as_ref().unwrap().slice()), [4; 4096]);
    rig.complete(cmd);
    rig.sent();

    for buf in hoard {
        rig.mem.release(buf);
    }
    let Rig { queue, mem, .. } = &mut rig;
    queue.as_mut().unwrap().retry(mem);
    let sent = rig.sent();
    let mut cids = Vec::new();
    for pdu in sent.chunks_exact(24) {
        let Body::R2t(r2t) = Header::decode(pdu).unwrap().body else { panic!("{pdu:?}") };
        rig.feed(&h2c_data(r2t, true, &[1; 16 << 10], none));
        let cmd = rig.queue().poll_command().unwrap();
        cids.push(cmd.sqe.cid());
        rig.complete(cmd);
    }
    assert_eq!(cids, [0, 1, 2]);
    assert!(!rig.queue().is_waiting_for_memory());
    rig.close();
}

/// All memory is held by a write whose data comes behind two capsules in the stream: without the spare
/// buffer nothing would ever move again.
#[test]
fn a_capsule_does_not_block_what_would_release_memory() {
    let none = Digests::default();
    let mut rig = Rig::agreed(none);
    rig.feed(&write_by_r2t(0, 16 << 10, none));
    let Body::R2t(r2t) = Header::decode(&rig.sent()).unwrap().body else { panic!("no R2T") };
    let mut hoard: Vec<_> = std::iter::from_fn(|| rig.mem.alloc(64 << 10)).collect();
    hoard.extend(std::iter::from_fn(|| rig.mem.alloc(4096)));
    let mut stream = write_in_capsule(1, &[3; 8192], none);
    stream.extend(write_in_capsule(2, &[4; 8192], none));
    stream.extend(h2c_data(r2t, true, &[1; 16 << 10], none));
    let mut at = 0;
    let mut cids = Vec::new();
    for _ in 0..4 {
        at += rig.feed(&stream[at..]) as usize;
        while let Some(cmd) = rig.queue().poll_command() {
            cids.push(cmd.sqe.cid());
            rig.complete(cmd);
        }
    }
    assert_eq!((at, cids), (stream.len(), vec![1, 2, 0]));
    for buf in hoard {
        rig.mem.release(buf);
    }
    rig.close();
}

#[test]
fn more_commands_than_slots_stall_the_stream() {
    let none = Digests::default();
    let mut rig = Rig::agreed(none);
    let flush = |cid| {
        let sqe = Sqe::new(opcode::FLUSH).with_cid(cid);
        Header::new(Body::CapsuleCmd(sqe), none, 0, 0).encode().as_bytes().to_vec()
    };
    let stream: Vec<u8> = (0..20).flat_map(flush).collect();
    let mut at = rig.feed(&stream) as usize;
    assert_eq!(at, 9 * 72 - 1);
    let mut cids = Vec::new();
    while let Some(cmd) = rig.queue().poll_command() {
        cids.push(cmd.sqe.cid());
        rig.complete(cmd);
        at += rig.feed(&stream[at..]) as usize;
        // The host reads, or the ring would stall the stream too.
        rig.sent();
    }
    assert_eq!((at, cids), (stream.len(), (0..20).collect()));
    rig.close();
}

/// A host that sends commands and never reads: the header ring holds what it has, and no more.
#[test]
fn a_host_that_does_not_read_stalls() {
    let none = Digests::default();
    let mut rig = Rig::agreed(none);
    let sqe = Sqe::new(opcode::FLUSH);
    let flush = Header::new(Body::CapsuleCmd(sqe), none, 0, 0).encode().as_bytes().to_vec();
    let mut done = 0;
    while rig.feed(&flush) == 72 {
        let cmd = rig.queue().poll_command().unwrap();
        rig.complete(cmd);
        done += 1;
        assert!(done < 1000, "the ring has no end");
    }
    assert_eq!(rig.sent().len(), done * 24);
    assert_eq!(rig.feed(&flush[71..]), 1);
    rig.close();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However a stream is cut, the same commands come out with the same data.
    #[test]
    fn any_split_gives_the_same_commands(
        header in any::<bool>(),
        data in any::<bool>(),
        cuts in prop::collection::vec(1usize..200, 1..60),
    ) {
        let digests = Digests { header, data };
        let mut stream = icreq(digests);
        for cid in 0..4u16 {
            let fill = cid.to_le_bytes()[0] + 1;
            stream.extend(write_in_capsule(cid, &vec![fill; 100 * usize::from(fill)], digests));
        }
        stream.extend(write_by_r2t(4, 1000, digests));
        let transfer = Transfer { cccid: 4, ttag: 4, offset: 0, len: 600 };
        stream.extend(h2c_data(transfer, false, &[9; 600], digests));
        let transfer = Transfer { offset: 600, len: 400, ..transfer };
        stream.extend(h2c_data(transfer, true, &[8; 400], digests));
        let run = |sizes: &mut dyn Iterator<Item = usize>| {
            let mut rig = Rig::new(1 << 20);
            let mut at = 0;
            while at < stream.len() {
                let n = sizes.next().unwrap().min(stream.len() - at);
                assert_eq!(rig.feed(&stream[at..at + n]) as usize, n);
                at += n;
            }
            let mut seen = Vec::new();
            while let Some(cmd) = rig.queue().poll_command() {
                let bytes = rig.mem.bytes(cmd.data.as_ref().unwrap().slice()).to_vec();
                seen.push((cmd.sqe.cid(), bytes));
                rig.complete(cmd);
            }
            assert_eq!(rig.queue().close_reason(), None);
            let sent = rig.sent();
            rig.close();
            (seen, sent)
        };
        let whole = run(&mut std::iter::repeat(usize::MAX));
        prop_assert_eq!(whole.0.len(), 5);
        prop_assert_eq!(run(&mut cuts.iter().copied().cycle()), whole);
    }

    #[test]
    fn no_bytes_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        agreed in any::<bool>(),
    ) {
        let mut rig = Rig::new(1 << 20);
        if agreed {
            rig.feed(&icreq(Digests::default()));
        }
        rig.feed(&bytes);
        while let Some(cmd) = rig.queue().poll_command() {
            rig.complete(cmd);
        }
        rig.close();
    }
}
