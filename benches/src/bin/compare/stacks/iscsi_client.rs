//! One thread that is an iSCSI initiator on one connection, for every target alike: what is ready is read at once, and what
//! is asked for anew goes out at once. Source: RFC 7143; SBC-4.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cairn_iscsi::pdu::{BHS_LEN, Body, CmdSn, Header, LoginRequest, NO_TAG, encode_lun, lengths};
use clap::Args;
use hdrhistogram::Histogram;

use super::Place;
use super::loopback::read;
use crate::load::{Client, Load, Measured, tell};
use crate::procs::{pinned, run_json};

/// `iscsi-client`: asks.
#[derive(Debug, Args)]
pub(crate) struct IscsiClient {
    peer: SocketAddr,
    iqn: String,
    #[arg(long)]
    lun: u16,
    #[command(flatten)]
    load: Client,
    /// Write everything once, and nothing else.
    #[arg(long)]
    fill: bool,
}

/// Where a target is.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    pub(crate) peer: SocketAddr,
    pub(crate) iqn: String,
    pub(crate) lun: u16,
}

impl Unit {
    fn client(&self, place: &Place) -> std::process::Command {
        let mut command = pinned(&place.own, place.cores.map(|(_, client)| client));
        command.args(["iscsi-client", &self.peer.to_string(), &self.iqn]);
        command.args(["--lun", &self.lun.to_string()]);
        command
    }

    /// Writes all of it once.
    pub(crate) fn fill(&self, place: &Place) -> Result<()> {
        let mut command = self.client(place);
        FILL.tell(&mut command, 60.0, place.client_spin_us);
        command.arg("--fill");
        run_json(&mut command).map(|_| ())
    }

    pub(crate) fn load(&self, place: &Place, load: &Load, seconds: f64) -> Result<Measured> {
        let mut command = self.client(place);
        load.tell(&mut command, seconds, place.client_spin_us);
        Measured::told(&run_json(&mut command)?, load)
    }
}

/// Everything once.
const FILL: Load = Load {
    name: "fill",
    title: "fill",
    write: true,
    random: false,
    bs: 256 << 10,
    qd: 4,
    durable: false,
};

const NAME: &str = "iqn.2026-11.io.cairn:compare-client";
/// Operational stage, full feature phase.
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;
const GOOD: u8 = 0;
const CHECK_CONDITION: u8 = 2;
/// Bytes that come with a command at most, and in one PDU.
const IMMEDIATE: u32 = 256 << 10;

/// A PDU that came.
struct Came<'a> {
    header: Header,
    data: &'a [u8],
}

struct Initiator {
    stream: TcpStream,
    spin_us: u64,
    lun: u64,
    sn: CmdSn,
    max_cmd: u32,
    /// What the target takes in one PDU.
    segment: u32,
    first_burst: u32,
    out: Vec<u8>,
    buf: Vec<u8>,
    held: usize,
    parsed: usize,
}

impl Initiator {
    fn connect(options: &IscsiClient) -> Result<Self> {
        let stream = TcpStream::connect(options.peer)?;
        stream.set_nodelay(true)?;
        let mut initiator = Self {
            stream,
            spin_us: options.load.spin_us,
            lun: encode_lun(options.lun),
            sn: CmdSn { cmd: 1, exp_stat: 0 },
            max_cmd: 1,
            segment: 8192,
            first_burst: 65536,
            out: Vec::new(),
            buf: vec![0; 2 << 20],
            held: 0,
            parsed: 0,
        };
        initiator.login(&options.iqn)?;
        Ok(initiator)
    }

    fn put(&mut self, header: Header, data: &[u8]) {
        self.out.extend_from_slice(&header.encode());
        self.out.extend_from_slice(data);
        let padded = self.out.len().next_multiple_of(4);
        self.out.resize(padded, 0);
    }

    fn send(&mut self) -> Result<()> {
        self.stream.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// Reads what is there.
    fn receive(&mut self) -> Result<()> {
        self.buf.copy_within(self.parsed..self.held, 0);
        self.held -= self.parsed;
        self.parsed = 0;
        let got = read(&mut self.stream, &mut self.buf[self.held..], self.spin_us)?;
        if got == 0 {
            bail!("the target is gone");
        }
        self.held += got;
        Ok(())
    }

    /// The next PDU that is there whole.
    fn next(&mut self) -> Result<Option<Came<'_>>> {
        let bytes = &self.buf[self.parsed..self.held];
        let Some(bhs) = bytes.first_chunk::<BHS_LEN>() else { return Ok(None) };
        let (ahs, len) = lengths(bhs);
        let begin = BHS_LEN + ahs as usize;
        let end = begin + len as usize;
        let Some(data) = bytes.get(begin..end) else { return Ok(None) };
        if bytes.len() < end.next_multiple_of(4) {
            return Ok(None);
        }
        let header = Header::decode(bhs).map_err(|unknown| anyhow::anyhow!("{unknown}"))?;
        let (stat, max_cmd) = match header.body {
            Body::LoginResponse(r) => (Some(r.sn.stat), r.sn.max_cmd),
            Body::ScsiResponse { sn, .. } => (Some(sn.stat), sn.max_cmd),
            Body::DataIn { sn, status, .. } => (status.map(|_| sn.stat), sn.max_cmd),
            Body::NopIn { sn, .. } => ((header.itt != NO_TAG).then_some(sn.stat), sn.max_cmd),
            Body::R2t { sn, .. } => (None, sn.max_cmd),
            other => bail!("the target sent {other:?}"),
        };
        if let Some(stat) = stat {
            self.sn.exp_stat = stat.wrapping_add(1);
        }
        self.max_cmd = max_cmd;
        self.parsed += end.next_multiple_of(4);
        Ok(Some(Came { header, data }))
    }

    fn login(&mut self, iqn: &str) -> Result<()> {
        let keys = [
            ("InitiatorName", NAME),
            ("TargetName", iqn),
            ("SessionType", "Normal"),
            ("HeaderDigest", "None"),
            ("DataDigest", "None"),
            ("InitialR2T", "No"),
            ("ImmediateData", "Yes"),
            ("MaxRecvDataSegmentLength", "262144"),
            ("MaxBurstLength", "1048576"),
            ("FirstBurstLength", "262144"),
            ("MaxOutstandingR2T", "1"),
            ("MaxConnections", "1"),
            ("ErrorRecoveryLevel", "0"),
        ];
        let text: String = keys.iter().map(|(key, value)| format!("{key}={value}\0")).collect();
        let mut text = text.into_bytes();
        for _ in 0..8 {
            let request = LoginRequest {
                transit: true,
                csg: OPERATIONAL,
                nsg: FULL_FEATURE,
                isid: [0x80, 0, 0, 0, 0, 1],
                sn: self.sn,
                ..LoginRequest::default()
            };
            let len = u32::try_from(text.len())?;
            let header = Header::new(0, len, Body::Login(request));
            self.put(Header { immediate: true, ..header }, &text);
            self.send()?;
            text.clear();
            let (response, said) = loop {
                if let Some(Came { header, data }) = self.next()? {
                    let Body::LoginResponse(response) = header.body else { continue };
                    break (response, String::from_utf8_lossy(data).into_owned());
                }
                self.receive()?;
            };
            if response.status != (0, 0) {
                bail!("the login was refused: {:?}", response.status);
            }
            for (key, value) in said.split('\0').filter_map(|pair| pair.split_once('=')) {
                match key {
                    "MaxRecvDataSegmentLength" => self.segment = value.parse()?,
                    "FirstBurstLength" => self.first_burst = value.parse()?,
                    _ => {}
                }
            }
            if response.transit && response.nsg == FULL_FEATURE {
                return Ok(());
            }
        }
        bail!("the login does not end")
    }

    /// Puts a command, with as much of its data as may come along.
    fn command(&mut self, tag: u32, cdb: [u8; 16], edtl: u32, data: Option<&[u8]>) {
        let along = edtl.min(self.segment).min(self.first_burst).min(IMMEDIATE);
        let along = data.map_or(&[][..], |data| &data[..along as usize]);
        let body = Body::ScsiCommand {
            last: true,
            read: data.is_none() && edtl > 0,
            write: data.is_some(),
            attr: 1,
            edtl,
            sn: self.sn,
            cdb,
        };
        let len = u32::try_from(along.len()).expect("a part of a segment");
        self.sn.cmd = self.sn.cmd.wrapping_add(1);
        self.put(Header::new(tag, len, body).with_lun(self.lun), along);
    }

    /// Whether the window has room.
    fn may_ask(&self) -> bool {
        self.max_cmd.wrapping_sub(self.sn.cmd) < 1 << 31
    }

    /// The data that was asked for.
    fn data_out(&mut self, itt: u32, ttt: u32, mut at: u32, mut left: u32, data: &[u8]) {
        let mut data_sn = 0;
        while left > 0 {
            let len = left.min(self.segment);
            let exp_stat_sn = self.sn.exp_stat;
            let body = Body::DataOut { last: len == left, ttt, exp_stat_sn, data_sn, offset: at };
            let header = Header::new(itt, len, body).with_lun(self.lun);
            self.put(header, &data[at as usize..][..len as usize]);
            (at, left, data_sn) = (at + len, left - len, data_sn + 1);
        }
    }

    /// A command by itself; what it read.
    fn ask(&mut self, cdb: [u8; 16], edtl: u32) -> Result<Vec<u8>> {
        for _ in 0..8 {
            self.command(0, cdb, edtl, None);
            self.send()?;
            let mut got = Vec::new();
            let status = loop {
                let Some(Came { header, data }) = self.next()? else {
                    self.receive()?;
                    continue;
                };
                match header.body {
                    Body::DataIn { status, .. } => {
                        got.extend_from_slice(data);
                        if let Some(status) = status {
                            break status;
                        }
                    }
                    Body::ScsiResponse { status, .. } => break status,
                    _ => {}
                }
            };
            match status {
                GOOD => return Ok(got),
                // What has happened since the last session is told once.
                CHECK_CONDITION => {}
                other => bail!("a command ended with status {other:#04x}"),
            }
        }
        bail!("the unit has always something else to tell")
    }
}

fn cdb(opcode: u8, lba: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

const READ_16: u8 = 0x88;
const WRITE_16: u8 = 0x8a;
const SYNCHRONIZE_CACHE_16: u8 = 0x91;

/// Bytes of the unit, and of its blocks.
fn capacity(initiator: &mut Initiator) -> Result<(u64, u32)> {
    let mut cdb = [0; 16];
    // SERVICE ACTION IN (16), READ CAPACITY (16).
    (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
    let said = initiator.ask(cdb, 32)?;
    let last = said.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
    let block = said.get(8..12).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    let (last, block) = last.zip(block).context("no capacity")?;
    Ok(((last + 1) * u64::from(block), block))
}

/// What a request is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Data,
    Flush,
}

/// Prints what it measured as JSON.
pub(crate) fn client_main(options: &IscsiClient) -> Result<()> {
    let mut initiator = Initiator::connect(options)?;
    let (size, block) = capacity(&mut initiator)?;
    let load = &options.load;
    let mut pattern = load.pattern(size)?;
    let (units, blocks) = (pattern.units, load.bs / block);
    let data = vec![0xa7; load.bs as usize];
    let begun = Instant::now();
    let end = begun + load.time();
    let mut since = vec![begun; load.qd as usize];
    let mut stages = vec![Stage::Data; load.qd as usize];
    let mut latency = Histogram::<u64>::new_with_bounds(1, 100_000_000_000, 3)?;
    let (mut waiting, mut busy, mut asked) = ((0..load.qd).collect::<Vec<_>>(), load.qd, 0);
    while busy > 0 {
        while initiator.may_ask()
            && let Some(tag) = waiting.pop()
        {
            if stages[tag as usize] == Stage::Flush {
                initiator.command(tag, cdb(SYNCHRONIZE_CACHE_16, 0, 0), 0, None);
                continue;
            }
            asked += 1;
            let opcode = if load.write { WRITE_16 } else { READ_16 };
            let cdb = cdb(opcode, pattern.next() / u64::from(block), blocks);
            initiator.command(tag, cdb, load.bs, load.write.then_some(&data[..]));
        }
        initiator.send()?;
        initiator.receive()?;
        let now = Instant::now();
        while let Some(Came { header, .. }) = initiator.next()? {
            let tag = header.itt;
            let status = match header.body {
                Body::DataIn { status: Some(status), .. } | Body::ScsiResponse { status, .. } => {
                    status
                }
                Body::R2t { ttt, offset, len, .. } => {
                    initiator.data_out(tag, ttt, offset, len, &data);
                    continue;
                }
                Body::NopIn { ttt, .. } if ttt != NO_TAG => {
                    let sn = initiator.sn;
                    let header = Header::new(NO_TAG, 0, Body::NopOut { ttt, sn });
                    let lun = initiator.lun;
                    initiator.put(Header { immediate: true, ..header }.with_lun(lun), &[]);
                    continue;
                }
                _ => continue,
            };
            if status != GOOD {
                bail!("a command ended with status {status:#04x}");
            }
            let at = tag as usize;
            let over = if options.fill { asked >= units } else { now >= end };
            if load.durable && stages[at] == Stage::Data {
                stages[at] = Stage::Flush;
                waiting.push(tag);
                continue;
            }
            stages[at] = Stage::Data;
            latency.saturating_record(u64::try_from((now - since[at]).as_nanos())?);
            since[at] = now;
            if over {
                busy -= 1;
            } else {
                waiting.push(tag);
            }
        }
    }
    tell(&latency, begun.elapsed(), None);
    Ok(())
}
