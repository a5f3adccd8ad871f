//! `cairn bench`: a load generator over the project's own NVMe/TCP initiator, with fio's words.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytesize::ByteSize;
use cairn_engine::block::{Buf, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use serde_json::json;

use crate::cli::{Global, Output, parse_size};
use crate::nvme::{Host, HostConfig, Target};
use crate::output::say;
use crate::pattern::{self, BLOCK, Stamp};

/// Options of `cairn bench`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    /// What to load: nvme+tcp://HOST:PORT/NQN.
    target: Target,

    /// The pattern.
    #[arg(long, value_enum, default_value_t = Rw::Randread)]
    rw: Rw,

    /// Bytes in each request: a multiple of 4096.
    #[arg(long, default_value = "4k", value_parser = parse_size)]
    bs: ByteSize,

    /// Requests in flight, each job.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=255))]
    qd: u16,

    /// Threads, each with a connection of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,

    /// Seconds to run.
    #[arg(long, default_value_t = 10.0)]
    time: f64,

    /// Seconds to run before measuring.
    #[arg(long, default_value_t = 1.0)]
    ramp: f64,

    /// Only so much of the volume, from its start.
    #[arg(long, value_parser = parse_size)]
    size: Option<ByteSize>,

    /// Percentage of reads in randrw.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,

    /// Requests a second at most, all jobs together; latency counts from when each was due. 0: connect, and ask
    /// for nothing. Default: the next one as soon as one is answered.
    #[arg(long, value_name = "IOPS")]
    rate: Option<f64>,

    /// Write everything once, in order, and end.
    #[arg(long, conflicts_with_all = ["verify", "rate", "fsync"])]
    fill: bool,

    /// Flush after every write, as part of its latency.
    #[arg(long)]
    fsync: bool,

    /// Write a pattern that names its block, and read back and check all that was written.
    #[arg(long)]
    verify: bool,

    /// Header digests on the connections.
    #[arg(long)]
    hdgst: bool,

    /// Data digests on the connections.
    #[arg(long)]
    ddgst: bool,

    /// A server process whose CPU time is counted; once for each.
    #[arg(long, value_name = "PID")]
    server_pid: Vec<i32>,

    /// Look for answers so long before sleeping, in microseconds.
    #[arg(long, default_value_t = 0)]
    spin_us: u64,

    /// Start of the pseudo-random sequence.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Print JSON; the same as --output json.
    #[arg(long)]
    json: bool,
}

/// What the requests are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rw {
    /// Reads in order.
    Read,
    /// Writes in order.
    Write,
    /// Reads anywhere.
    Randread,
    /// Writes anywhere.
    Randwrite,
    /// Both anywhere.
    Randrw,
}

/// What one direction came to.
struct Side {
    latency: Histogram<u64>,
    bytes: u64,
}

impl Side {
    fn new() -> Result<Self> {
        // 1 us to 100 s, three digits.
        Ok(Self { latency: Histogram::new_with_bounds(1, 100_000_000_000, 3)?, bytes: 0 })
    }

    fn record(&mut self, ns: u64, bytes: u64) {
        self.latency.saturating_record(ns.max(1));
        self.bytes += bytes;
    }

    fn add(&mut self, other: &Self) -> Result<()> {
        self.latency.add(&other.latency)?;
        self.bytes += other.bytes;
        Ok(())
    }
}

struct JobResult {
    read: Side,
    write: Side,
    verified: u64,
    /// What it took, where it was not said before.
    seconds: f64,
}

/// One request in flight.
struct Flight {
    buf: Buf,
    started_ns: u64,
    read: bool,
    block: u64,
    flushing: bool,
}

pub(crate) fn run(global: &Global, args: &BenchArgs) -> Result<ExitCode> {
    let bs = args.bs.as_u64();
    if bs == 0 || !bs.is_multiple_of(BLOCK as u64) || bs > 1 << 20 {
        bail!("--bs {}: a multiple of 4096 bytes, 1 MiB at most", args.bs);
    }
    let valid_time = |t: f64| t.is_finite() && (0.0..=86_400.0).contains(&t);
    if !valid_time(args.time) || !valid_time(args.ramp) || args.time == 0.0 {
        bail!("--time and --ramp are seconds, up to a day");
    }
    if args.rate.is_some_and(|rate| !rate.is_finite() || !(0.0..=1e8).contains(&rate)) {
        bail!("--rate is a number of requests a second, 0 or more");
    }
    let mut args = args.clone();
    if args.fill {
        if args.rw != Rw::Write || args.jobs != 1 {
            bail!("--fill goes with --rw write and one job");
        }
        args.ramp = 0.0;
    }
    let cpu_before = cpu_seconds(&args.server_pid)?;
    let threads: Vec<_> = (0..args.jobs)
        .map(|job| {
            let args = args.clone();
            std::thread::spawn(move || Job::new(&args, job)?.run())
        })
        .collect();
    let mut read = Side::new()?;
    let mut write = Side::new()?;
    let mut verified = 0;
    for thread in threads {
        let result = thread.join().map_err(|_| anyhow!("a job panicked"))??;
        read.add(&result.read)?;
        write.add(&result.write)?;
        verified += result.verified;
        if args.fill {
            args.time = result.seconds;
        }
    }
    let cpu = cpu_seconds(&args.server_pid)? - cpu_before;
    report(global, &args, &read, &write, verified, cpu)?;
    Ok(ExitCode::SUCCESS)
}

struct Job {
    args: BenchArgs,
    host: Host,
    /// The job's part of the volume, in blocks of 4096 bytes.
    first: u64,
    units: u64,
    unit_blocks: u64,
    next: u64,
    random: u64,
    seed: u64,
    /// How often each unit of the job's part was written, where it is verified.
    sequences: Vec<u32>,
}

impl Job {
    fn new(args: &BenchArgs, job: u16) -> Result<Self> {
        let config = HostConfig {
            header_digest: args.hdgst,
            data_digest: args.ddgst,
            spin_us: args.spin_us,
            arena_len: arena_len(args)?,
            ..HostConfig::default()
        };
        let host = Host::connect(&args.target, &config)?;
        let info = host.namespace();
        if info.block_size.bytes() as usize != BLOCK {
            bail!(
                "the namespace has blocks of {} bytes; bench needs 4096",
                info.block_size.bytes()
            );
        }
        let unit_blocks = args.bs.as_u64() / BLOCK as u64;
        let asked = args.size.map_or(info.blocks, |s| s.as_u64() / BLOCK as u64);
        let units_in_all = asked.min(info.blocks) / unit_blocks;
        // With --verify each job has a part to itself, so that it knows what each block holds.
        let (first, units) = if args.verify {
            let share = units_in_all / u64::from(args.jobs);
            (share * u64::from(job) * unit_blocks, share)
        } else {
            (0, units_in_all)
        };
        if units == 0 {
            bail!("the volume is too small for {} jobs of {}", args.jobs, args.bs);
        }
        let seed = args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(job);
        let tracked = if args.verify { usize::try_from(units)? } else { 0 };
        Ok(Self {
            args: args.clone(),
            host,
            first,
            units,
            unit_blocks,
            next: if args.verify { 0 } else { units / u64::from(args.jobs) * u64::from(job) },
            random: seed | 1,
            seed,
            sequences: vec![0; tracked],
        })
    }

    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn run(mut self) -> Result<JobResult> {
        let bs = u32::try_from(self.args.bs.as_u64())?;
        let qd = usize::from(self.args.qd);
        let mut result =
            JobResult { read: Side::new()?, write: Side::new()?, verified: 0, seconds: 0.0 };
        let mut flights: Vec<Option<Flight>> = Vec::new();
        let mut busy = std::collections::BTreeSet::new();
        let mut free: Vec<Buf> = Vec::new();
        for i in 0..qd {
            flights.push(None);
            let buf = self.host.alloc(bs)?;
            let bytes = self.host.memory().bytes_mut(buf.slice());
            // Not zeros, and not the same everywhere.
            for (j, block) in bytes.chunks_mut(BLOCK).enumerate() {
                let stamp = Stamp { seed: self.seed, lba: (i * 1024 + j) as u64, sequence: 1 };
                pattern::fill(block, stamp);
            }
            free.push(buf);
        }
        let start = self.host.now_ns();
        let measured = start + nanos(self.args.ramp);
        let end = if self.args.fill { u64::MAX } else { measured + nanos(self.args.time) };
        let mut left = if self.args.fill { self.units } else { u64::MAX };
        let mut pace = Pace::new(&self.args, start);
        let mut done = Vec::with_capacity(qd);
        let mut in_flight = 0;
        loop {
            let now = self.host.now_ns();
            while now < end && left > 0 && in_flight < qd && self.host.free_slots() > 0 {
                if !pace.is_due(now) {
                    break;
                }
                let Some(slot) = flights.iter().position(Option::is_none) else { break };
                let Some(buf) = free.pop() else { break };
                let (read, unit) = self.choose(&busy);
                let block = self.first + unit * self.unit_blocks;
                if self.args.verify {
                    busy.insert(unit);
                    if !read {
                        self.stamp(unit, &buf);
                    }
                }
                let op = if read { IoOp::Read } else { IoOp::Write { fua: false } };
                let range = LbaRange::new(Lba(block), self.unit_blocks)?;
                let request = IoRequest { op, range, buf: buf.slice() };
                self.host.submit(u32::try_from(slot)?, request)?;
                let started_ns = pace.begin(self.host.now_ns());
                left -= 1;
                flights[slot] = Some(Flight { buf, started_ns, read, block, flushing: false });
                in_flight += 1;
            }
            if in_flight == 0 && (now >= end || left == 0) {
                break;
            }
            done.clear();
            let until = if in_flight == 0 { end } else { now + PATIENCE_NS };
            let next = pace.next(now).filter(|_| left > 0 && in_flight < qd);
            self.host.poll(&mut done, Some(next.map_or(until, |next| next.min(until))))?;
            let now = self.host.now_ns();
            if done.is_empty() && now > end.saturating_add(PATIENCE_NS) {
                bail!("{in_flight} requests were not answered in 60 s");
            }
            for answer in &done {
                let slot = answer.tag as usize;
                let Some(mut flight) = flights.get_mut(slot).and_then(Option::take) else {
                    bail!("an answer to a request that was not made");
                };
                if answer.io_status != IoStatus::Ok {
                    let what = if flight.read { "read" } else { "write" };
                    bail!("the {what} at block {} failed: {}", flight.block, answer.status);
                }
                if self.args.fsync && !flight.read && !flight.flushing {
                    flight.flushing = true;
                    let request = IoRequest {
                        op: IoOp::Flush,
                        range: LbaRange::default(),
                        buf: cairn_engine::block::BufSlice::EMPTY,
                    };
                    self.host.submit(answer.tag, request)?;
                    flights[slot] = Some(flight);
                    continue;
                }
                if now >= measured && now <= end {
                    let side = if flight.read { &mut result.read } else { &mut result.write };
                    side.record(now - flight.started_ns, u64::from(bs));
                }
                if self.args.verify {
                    let unit = (flight.block - self.first) / self.unit_blocks;
                    busy.remove(&unit);
                    if flight.read {
                        result.verified += self.check(unit, &flight.buf)?;
                    }
                }
                free.push(flight.buf);
                in_flight -= 1;
            }
        }
        result.seconds = Duration::from_nanos(self.host.now_ns() - start).as_secs_f64();
        if self.args.verify {
            result.verified += self.read_back(&mut free)?;
        }
        Ok(result)
    }

    /// The next request: whether it reads, and which unit.
    fn choose(&mut self, busy: &std::collections::BTreeSet<u64>) -> (bool, u64) {
        let read = match self.args.rw {
            Rw::Read | Rw::Randread => true,
            Rw::Write | Rw::Randwrite => false,
            Rw::Randrw => self.draw() % 100 < u64::from(self.args.rwmixread),
        };
        loop {
            let unit = match self.args.rw {
                Rw::Read | Rw::Write => {
                    self.next = (self.next + 1) % self.units;
                    self.next
                }
                _ => self.draw() % self.units,
            };
            // A block that is verified has one request at a time.
            if !busy.contains(&unit) {
                return (read, unit);
            }
        }
    }

    fn stamp(&mut self, unit: u64, buf: &Buf) {
        let at = usize::try_from(unit).expect("as many as are tracked");
        self.sequences[at] += 1;
        let (seed, sequence) = (self.seed, u64::from(self.sequences[at]));
        let first = self.first + unit * self.unit_blocks;
        let bytes = self.host.memory().bytes_mut(buf.slice());
        for (lba, block) in (first..).zip(bytes.chunks_mut(BLOCK)) {
            pattern::fill(block, Stamp { seed, lba, sequence });
        }
    }

    /// Checks a unit that was written in this run. Returns the blocks checked.
    fn check(&mut self, unit: u64, buf: &Buf) -> Result<u64> {
        let at = usize::try_from(unit)?;
        let sequence = u64::from(self.sequences[at]);
        if sequence == 0 {
            return Ok(0);
        }
        let (seed, first) = (self.seed, self.first + unit * self.unit_blocks);
        let bytes = self.host.memory().bytes(buf.slice());
        for (lba, block) in (first..).zip(bytes.chunks(BLOCK)) {
            pattern::check(block, Stamp { seed, lba, sequence })?;
        }
        Ok(self.unit_blocks)
    }

    /// Reads every unit that was written, and checks it.
    fn read_back(&mut self, free: &mut Vec<Buf>) -> Result<u64> {
        let buf = free.pop().context("no buffer")?;
        let mut verified = 0;
        for unit in 0..self.units {
            if self.sequences[usize::try_from(unit)?] == 0 {
                continue;
            }
            let lba = self.first + unit * self.unit_blocks;
            self.host.request(IoOp::Read, lba, self.unit_blocks, buf.slice())?;
            verified += self.check(unit, &buf)?;
        }
        self.host.memory().release(buf);
        Ok(verified)
    }
}

/// An answer is waited for so long.
const PATIENCE_NS: u64 = 60_000_000_000;

/// When the next request is due.
struct Pace {
    due: u64,
    /// Between two; nothing: the next one as soon as there is room.
    every: Option<u64>,
}

impl Pace {
    fn new(args: &BenchArgs, start: u64) -> Self {
        let every = args.rate.map(|rate| nanos((f64::from(args.jobs) / rate).min(1e9)));
        // With nothing to ask for it is due after the end.
        let due = if args.rate == Some(0.0) { u64::MAX } else { start };
        Self { due, every }
    }

    fn is_due(&self, now: u64) -> bool {
        self.every.is_none() || now >= self.due
    }

    /// What is worth waking up for; a request that is overdue starts when another one ends.
    fn next(&self, now: u64) -> Option<u64> {
        self.every.and(Some(self.due)).filter(|due| *due > now)
    }

    /// When the request counts as begun: when it was due, although there may have been no room then.
    fn begin(&mut self, now: u64) -> u64 {
        let Some(every) = self.every else { return now };
        let due = self.due;
        self.due += every;
        due
    }
}

/// Memory for the requests in flight, and for what the session itself keeps.
fn arena_len(args: &BenchArgs) -> Result<u32> {
    let payload = args.bs.as_u64() * u64::from(args.qd);
    Ok(u32::try_from((payload + (8 << 20)).next_power_of_two())?)
}

fn nanos(seconds: f64) -> u64 {
    u64::try_from(Duration::from_secs_f64(seconds).as_nanos()).unwrap_or(u64::MAX)
}

/// CPU time of processes so far, user and system, in seconds. Source: proc(5), stat.
pub(crate) fn cpu_seconds(pids: &[i32]) -> Result<f64> {
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    let mut ticks = 0_u64;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let stat = std::fs::read_to_string(&path)
            .with_context(|| format!("there is no process {pid} ({path})"))?;
        // The name, in parentheses, may hold anything.
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        for field in [11, 12] {
            let text = fields.get(field).with_context(|| format!("{path} is too short"))?;
            ticks += text.parse::<u64>().with_context(|| format!("{path} is not as expected"))?;
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    Ok(ticks as f64 / hertz as f64)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn report(
    global: &Global,
    args: &BenchArgs,
    read: &Side,
    write: &Side,
    verified: u64,
    cpu: f64,
) -> Result<()> {
    let total = read.latency.len() + write.latency.len();
    // The servers' time covers the ramp as well: take that share off.
    let share = args.time / (args.time + args.ramp);
    let per_100k =
        (!args.server_pid.is_empty() && total > 0).then(|| cpu * share / total as f64 * 100_000.0);
    let side = |s: &Side| {
        let us = |ns: u64| ns as f64 / 1000.0;
        json!({
            "ios": s.latency.len(),
            "iops": s.latency.len() as f64 / args.time,
            "mib_per_s": s.bytes as f64 / args.time / f64::from(1 << 20),
            "latency_us": {
                "mean": s.latency.mean() / 1000.0,
                "p50": us(s.latency.value_at_quantile(0.5)),
                "p99": us(s.latency.value_at_quantile(0.99)),
                "p99.9": us(s.latency.value_at_quantile(0.999)),
                "max": us(s.latency.max()),
            },
        })
    };
    if args.json || global.output == Output::Json {
        let value = json!({
            "target": format!("nvme+tcp://{}/{}", args.target.peer, args.target.nqn),
            "rw": format!("{:?}", args.rw).to_lowercase(),
            "bs": args.bs.as_u64(), "qd": args.qd, "jobs": args.jobs, "time_s": args.time,
            "read": side(read), "write": side(write),
            "verified_blocks": verified,
            "server_cpu_s_per_100k": per_100k,
        });
        say!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    for (name, s) in [("read", read), ("write", write)] {
        if s.latency.is_empty() {
            continue;
        }
        let us = |q: f64| s.latency.value_at_quantile(q) as f64 / 1000.0;
        say!(
            "{name:5}  {:9.0} IOPS  {:8.1} MiB/s  mean {:.1} us  p50 {:.1}  p99 {:.1}  p99.9 {:.1}",
            s.latency.len() as f64 / args.time,
            s.bytes as f64 / args.time / f64::from(1 << 20),
            s.latency.mean() / 1000.0,
            us(0.5),
            us(0.99),
            us(0.999),
        );
    }
    if args.verify {
        say!("verified {verified} blocks, all as written");
    }
    if let Some(seconds) = per_100k {
        say!("servers  {seconds:.2} CPU-seconds per 100k I/Os");
    }
    Ok(())
}
