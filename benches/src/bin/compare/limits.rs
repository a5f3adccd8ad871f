//! `compare limits`: what many volumes and hosts do to a process, and to each other.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::bars::Verdict;
use crate::hosts::{Hosts, Task, Took};
use crate::load::median;
use crate::procs::{fine_cpu_seconds, pinned, resident_mib, run_json};
use crate::stacks::Place;
use crate::stacks::cairn::{Node, measured};

/// Many volumes, many hosts, one that floods, and a load of 70 %.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Seconds of each run.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Volumes of one process.
    #[arg(long, default_value_t = 256)]
    volumes: usize,
    /// Hosts with load.
    #[arg(long, default_value_t = 64)]
    hosts: usize,
    /// Connections at most; each host has two.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Write the figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where files are made, and removed again.
    #[arg(long, default_value = "target/compare")]
    pub(crate) dir: PathBuf,
    /// Fail where a bar is missed.
    #[arg(long)]
    pub(crate) strict: bool,
}

/// Bytes of each volume.
const SIZE: u64 = 16 << 20;
/// Volumes of a cluster of several processes that is left alone.
const SILENT: usize = 64;
/// Seconds that pass before a process is taken to be idle, and that it is watched for.
const REST: f64 = 8.0;
const WATCHED: f64 = 10.0;

/// What requests may take beside the arena's 64 MiB, which is there from the start: their state, and what the allocator
/// keeps.
const MEMORY_MIB: f64 = 96.0;

struct Limits<'a> {
    options: &'a Options,
    place: &'a Place,
    figures: Vec<Verdict>,
}

/// Runs all; whether no bar was missed.
pub(crate) fn run(options: &Options, place: &Place) -> Result<bool> {
    let mut limits = Limits { options, place, figures: Vec::new() };
    limits.crowd()?;
    limits.silence()?;
    limits.at_seventy()?;
    println!("{:66} {:>12} {:>12}", "limit", "figure", "is to be");
    limits.figures.iter().for_each(|figure| println!("{figure}"));
    if let Some(file) = &options.json {
        let all: Vec<Value> = limits.figures.iter().map(Verdict::json).collect();
        std::fs::write(file, serde_json::to_string_pretty(&all)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(limits.figures.iter().all(|figure| figure.held))
}

/// Of all hosts together, and of the slowest of them.
fn sum(took: &[Took]) -> (f64, f64, f64) {
    let iops = took.iter().map(|t| t.iops).sum();
    let least = took.iter().map(|t| t.iops).fold(f64::INFINITY, f64::min);
    let most = took.iter().map(|t| t.iops).fold(0.0, f64::max);
    (iops, least, most)
}

/// So many hosts; fewer, where the process does not take them all. How many there are.
fn as_many(uris: &[String], most: usize) -> Result<(Hosts, usize)> {
    let mut count = most;
    loop {
        let some: Vec<String> = uris.iter().cycle().take(count).cloned().collect();
        match Hosts::connect(&some) {
            Ok(hosts) => return Ok((hosts, count)),
            Err(error) if count < 8 => return Err(error),
            Err(error) => eprintln!("{count} hosts: {error:#}"),
        }
        count -= count / 8;
    }
}

impl Limits<'_> {
    fn told(&mut self, what: impl Into<String>, figure: f64, unit: &'static str) {
        self.figures.push(Verdict::told(what, figure, unit));
    }

    /// Many volumes in one process: throughput, shares, memory, and one host that floods its volume.
    fn crowd(&mut self) -> Result<()> {
        let Options { volumes, hosts, connections, seconds, .. } = *self.options;
        let place = Place { size: volumes as u64 * SIZE, ..self.place.of("crowd")? };
        eprintln!("making {volumes} volumes in one process");
        let node = Node::start(&place, "node", &["mem".to_owned()], true)?;
        let mut uris = Vec::new();
        for i in 0..volumes {
            uris.push(node.local_volume(&format!("v{i}"), 1, SIZE)?);
        }
        let resident = || resident_mib(&[node.pid()]);
        let empty = resident();
        self.told(format!("resident memory with {volumes} empty volumes"), empty, " MiB");

        // One alone, and the same one beside one that floods.
        let mut two = Hosts::connect(&uris[..2.min(uris.len())])?;
        let quiet = Task { depth: 1, write: false };
        for (write, name) in [(false, "reads"), (true, "writes")] {
            let flood = Task { depth: 128, write };
            let (mut alone, mut beside, mut p99) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..3 {
                alone.push(two.run(&[quiet], seconds)?[0].mean_us);
                let took = two.run(&[quiet, flood], seconds)?;
                beside.push(took[0].mean_us);
                p99.push(took[0].p99_us);
            }
            let (alone, beside) = (median(&mut alone), median(&mut beside));
            self.told("a host at QD1 alone, mean", alone, " us");
            let what = format!("a host at QD1 beside {name} at QD128 of another volume, mean");
            self.told(what, beside, " us");
            self.told("the same, p99", median(&mut p99), " us");
        }
        drop(two);

        let some: Vec<String> = uris.iter().take(hosts).cloned().collect();
        let mut all = Hosts::connect(&some)?;
        for (write, name) in [(false, "randread"), (true, "randwrite")] {
            let (iops, least, most) =
                sum(&all.run(&vec![Task { depth: 4, write }; hosts], seconds)?);
            self.told(format!("{} hosts at QD4, 4K {name}, together", some.len()), iops, "");
            let what = format!("the same, the slowest host against the fastest, {name}");
            self.told(what, least / most, "x");
        }
        drop(all);

        let before = resident();
        let (mut all, count) = as_many(&uris, connections / 2)?;
        let what = format!("connections that it takes, of {connections}");
        #[expect(clippy::cast_precision_loss, reason = "few")]
        let (taken, asked) = (2.0 * count as f64, connections as f64);
        self.figures.push(Verdict::at_least(what, taken, asked, ""));
        let connections = 2 * count;
        let hosts = vec![Task::default(); count];
        let silent = resident();
        self.told(
            format!("resident memory that {connections} connections add"),
            silent - before,
            " MiB",
        );
        // Reads: what is written to a pool in memory stays there.
        let deep: Vec<Task> = hosts.iter().map(|t| Task { depth: 16, ..*t }).collect();
        let (iops, ..) = sum(&all.run(&deep, seconds)?);
        let what = format!("{connections} connections, 4K randread QD16 each, together");
        self.told(what, iops, "");
        let grown = resident() - silent;
        let what = format!("resident memory that {} requests in flight add", 16 * count);
        self.figures.push(Verdict::at_most(what, grown, MEMORY_MIB, " MiB"));
        let writes: Vec<Task> = hosts.iter().map(|_| Task { depth: 1, write: true }).collect();
        let (iops, least, most) = sum(&all.run(&writes, seconds)?);
        self.told(format!("{connections} connections, 4K randwrite QD1 each, together"), iops, "");
        self.told("the same, the slowest host against the fastest", least / most, "x");
        Ok(())
    }

    /// Volumes of three remote replicas each, a silent host on each, in four processes.
    fn silence(&mut self) -> Result<()> {
        let place = Place { size: SILENT as u64 * SIZE, cores: None, ..self.place.of("silence")? };
        eprintln!("making {SILENT} volumes in four processes");
        let mut replicas = Vec::new();
        for i in 0..3 {
            replicas.push(Node::start(&place, &format!("r{i}"), &["mem".to_owned()], false)?);
        }
        let nexus = Node::start(&place, "nexus", &[], false)?;
        let mut uris = Vec::new();
        for i in 0..SILENT {
            uris.push(nexus.remote_volume(&format!("v{i}"), &replicas, SIZE)?);
        }
        let mut hosts = Hosts::connect(&uris)?;
        hosts.run(&[], REST)?;
        let pids: Vec<u32> = replicas.iter().chain([&nexus]).map(Node::pid).collect();
        let before = fine_cpu_seconds(&pids);
        hosts.run(&[], WATCHED)?;
        let used = (fine_cpu_seconds(&pids) - before) / WATCHED * 100.0;
        let what =
            format!("{SILENT} volumes, {SILENT} silent hosts, 4 processes: idle CPU of a core");
        self.figures.push(Verdict::at_most(what, used, 0.5, " %"));
        self.told("the same, resident memory of all", resident_mib(&pids), " MiB");
        Ok(())
    }

    /// Latency where the load is 70 % of what goes.
    fn at_seventy(&mut self) -> Result<()> {
        let place = self.place.of("seventy")?;
        let place = Place { size: 256 << 20, ..place };
        let node = Node::start(&place, "node", &vec!["mem".to_owned(); 3], true)?;
        let uri = node.local_volume("v", 3, place.size)?;
        let bench = |args: &[&str]| -> Result<Value> {
            let mut command = pinned(&place.cairn, place.cores.map(|(_, client)| client));
            command.args(["bench", &uri, "--json", "--ramp", "0"]);
            run_json(command.args(args))
        };
        bench(&["--rw", "write", "--bs", "1m", "--qd", "8", "--fill"])?;
        let seconds = self.options.seconds.to_string();
        for (rw, side) in [("randread", "read"), ("randwrite", "write")] {
            let full = bench(&["--rw", rw, "--qd", "32", "--time", &seconds])?;
            let most = measured(&full[side]).iops;
            let rate = (most * 0.7).round().to_string();
            let loaded = bench(&["--rw", rw, "--qd", "128", "--rate", &rate, "--time", &seconds])?;
            let loaded = measured(&loaded[side]);
            self.told(format!("a volume of 3 in memory, {rw} QD32: IOPS"), most, "");
            let what =
                format!("the same at 70 % of that ({rate} IOPS), p99.9 from when it was due");
            self.told(what, loaded.p999_us.unwrap_or(0.0), " us");
            self.told("the same, mean", loaded.mean_us, " us");
        }
        Ok(())
    }
}
