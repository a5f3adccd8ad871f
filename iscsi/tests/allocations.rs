//! Nothing is allocated on the heap for a read or a write once a session is warm.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use cairn_block::{BlockSize, Buf, BufSlice, HeapMemory, IoStatus, Memory};
use cairn_iscsi::connection::{Connection, ConnectionConfig};
use cairn_iscsi::pdu::{BHS_LEN, Body, CmdSn, Header, LoginRequest, lengths};
use cairn_iscsi::scsi::{IoCommand, UnitConfig, UnitHandle};
use cairn_iscsi::target::{ConnId, Initiators, NodeConfig, Outcome, Target, TargetConfig};
use cairn_iscsi::text;

const IQN: &str = "iqn.2025-01.io.cairn:volume";
const WARM: usize = 400;
const MEASURED: usize = 400;
/// Blocks of one write: half of its data goes along, half is asked for.
const BLOCKS: u8 = 64;
const LEN: u32 = BLOCKS as u32 * 512;

struct World {
    mem: HeapMemory,
    target: Target,
    conn: Connection,
    chunk: Buf,
    batch: Vec<BufSlice>,
    to_host: Vec<u8>,
    /// Allocations within the target.
    counted: u64,
}

impl World {
    fn new() -> Self {
        let mut mem = HeapMemory::new(8 << 20);
        let mut target = Target::new(TargetConfig::default()).unwrap();
        let node = target
            .add_node(NodeConfig {
                iqn: IQN.into(),
                initiators: Initiators::Any,
                portal_groups: vec![1],
                ..NodeConfig::default()
            })
            .unwrap();
        let unit = UnitConfig {
            lun: 0,
            handle: UnitHandle(0),
            blocks: 1 << 20,
            block_size: BlockSize::B512,
            physical_block_size: BlockSize::B4096,
            id: 1,
            volatile_write_cache: true,
            read_only: false,
            removable: false,
            atomic_blocks: 0,
        };
        target.add_unit(node, unit).unwrap();
        let conn = Connection::new(&ConnectionConfig::default(), 1, &[0; 32], &mut mem).unwrap();
        let chunk = mem.alloc(64 << 10).unwrap();
        let batch = Vec::with_capacity(16);
        let to_host = Vec::with_capacity(1 << 20);
        Self { mem, target, conn, chunk, batch, to_host, counted: 0 }
    }

    /// Delivers a PDU, and lets the target do all that follows.
    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header { data_len: u32::try_from(data.len()).unwrap(), ..header };
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let window = self.chunk.slice().sub(0, u32::try_from(bytes.len()).unwrap());
        self.mem.bytes_mut(window).copy_from_slice(&bytes);
        let counted = allocation_counter::measure(|| self.turn(window)).count_total;
        self.counted += counted;
    }

    fn turn(&mut self, window: BufSlice) {
        let Self { mem, target, conn, .. } = self;
        assert_eq!(conn.handle_recv(window, mem), window.len());
        while let Some(cmd) = conn.poll_command() {
            let io = match target.handle_command(ConnId(1), conn, cmd, mem) {
                Outcome::Io(io) => io,
                Outcome::Drain { slot, .. } => {
                    conn.complete(slot, IoStatus::Ok, mem);
                    continue;
                }
                _ => continue,
            };
            match io.command {
                IoCommand::Read { len, .. } => {
                    let data = mem.alloc(len).unwrap();
                    conn.complete_with_data(io.slot, data, mem);
                }
                IoCommand::Write { data, .. } => {
                    mem.release(data);
                    conn.complete(io.slot, IoStatus::Ok, mem);
                }
                _ => panic!("nobody asked for that"),
            }
        }
        while conn.wants_send() {
            conn.take_batch(&mut self.batch);
            for window in &self.batch {
                self.to_host.extend_from_slice(mem.bytes(*window));
            }
            conn.handle_sent(mem);
        }
    }

    /// The headers that came.
    fn receive(&mut self) -> Vec<Header> {
        let mut headers = Vec::new();
        let mut rest = self.to_host.as_slice();
        while let Some(bhs) = rest.first_chunk::<BHS_LEN>() {
            headers.push(Header::decode(bhs).unwrap());
            let (_, len) = lengths(bhs);
            rest = &rest[BHS_LEN + (len as usize).next_multiple_of(4)..];
        }
        assert!(rest.is_empty());
        self.to_host.clear();
        headers
    }

    fn command(&mut self, n: u32, code: u8, data: &[u8]) -> Vec<Header> {
        let mut cdb = [0; 16];
        (cdb[0], cdb[8]) = (code, BLOCKS);
        let write = !data.is_empty();
        let body = Body::ScsiCommand {
            last: true,
            read: !write,
            write,
            attr: 1,
            edtl: LEN,
            sn: CmdSn { cmd: n, exp_stat: 0 },
            cdb,
        };
        self.send(Header::new(n, 0, body), data);
        self.receive()
    }

    fn write(&mut self, n: u32) {
        let half = [1; LEN as usize / 2];
        let headers = self.command(n, 0x2a, &half);
        let Body::R2t { ttt, offset, len, .. } = headers[0].body else { panic!("{headers:?}") };
        assert_eq!((offset, len), (LEN / 2, LEN / 2));
        let body = Body::DataOut { last: true, ttt, exp_stat_sn: 0, data_sn: 0, offset };
        self.send(Header::new(n, 0, body), &half);
        let headers = self.receive();
        assert!(matches!(headers[0].body, Body::ScsiResponse { status: 0, .. }), "{headers:?}");
    }

    fn read(&mut self, n: u32) {
        let headers = self.command(n, 0x28, &[]);
        assert_eq!(headers.len(), 4, "in segments of 8 KiB");
        assert!(matches!(headers[3].body, Body::DataIn { status: Some(0), .. }));
    }
}

#[test]
fn reads_and_writes_allocate_nothing() {
    let mut world = World::new();
    let mut keys = Vec::new();
    text::push(&mut keys, "InitiatorName", "iqn.2025-01.io.cairn:host");
    text::push(&mut keys, "TargetName", IQN);
    let request = LoginRequest {
        transit: true,
        csg: 1,
        nsg: 3,
        sn: CmdSn { cmd: 1, exp_stat: 0 },
        ..LoginRequest::default()
    };
    world.send(Header::new(1, 0, Body::Login(request)), &keys);
    world.receive();
    // The attention of a new session.
    world.command(1, 0x28, &[]);
    let mut n = 2;
    for round in 0..WARM + MEASURED {
        if round == WARM {
            world.counted = 0;
        }
        world.write(n);
        world.read(n + 1);
        n += 2;
    }
    assert_eq!(world.counted, 0, "allocations in {MEASURED} reads and writes");
    world.target.handle_disconnect(ConnId(1));
    world.conn.close(&mut world.mem);
    world.mem.release(world.chunk);
    assert_eq!(world.mem.in_use(), 0);
}
