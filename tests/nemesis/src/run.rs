//! One run: the cluster of a seed, its hosts, and the plan carried out.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cairn_sim::Rng;
use nix::sys::signal::Signal;

use crate::api;
use crate::host::{Did, Host};
use crate::net::{Net, address};
use crate::nodes::Nodes;
use crate::operator;
use crate::plan::{self, Event, Fault, NODES, Shape};
use crate::shared::{Failure, Phase, Shared};
use crate::trace::Trace;
use crate::volume::Volume;

/// Size of each volume, in blocks.
const BLOCKS: u64 = 1024;
/// Hosts of each volume.
const HOSTS: usize = 2;
/// Members that lost power are waited for so long, until it is known what that means.
const POWER: Duration = Duration::from_secs(6);
/// Once nothing is wrong any more, all is served and read within this time.
const RECOVERY: Duration = Duration::from_secs(120);
/// Afterwards pools are looked at this often.
const LOOK: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(10);

/// What is to be run.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) cairn: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) seed: u64,
    pub(crate) run: Duration,
    pub(crate) mutant: Option<String>,
    pub(crate) loud: bool,
}

/// How a run went.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) failure: Option<Failure>,
    /// Everything by time, where it failed.
    pub(crate) trace: Option<PathBuf>,
    pub(crate) faults: BTreeMap<&'static str, u64>,
    /// Processes killed, and those of them whose disks lost what was not flushed.
    pub(crate) kills: u64,
    pub(crate) power: u64,
    pub(crate) did: Did,
    pub(crate) acked: u64,
    pub(crate) judged: u64,
    pub(crate) strict: u64,
    pub(crate) lots: u64,
    pub(crate) epochs: u64,
    pub(crate) snapshots: u64,
    pub(crate) replaced: u64,
    pub(crate) took: Duration,
    pub(crate) recovered: Duration,
    pub(crate) interrupted: bool,
}

/// What puts an end to a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Repair {
    Start(usize),
    Continue(usize),
    Heal(usize),
    Disk(usize, &'static [&'static str]),
}

struct Run {
    options: Options,
    shared: Arc<Shared>,
    nodes: Nodes,
    repairs: Vec<(Instant, Repair)>,
    faults: BTreeMap<&'static str, u64>,
    kills: u64,
    power: u64,
    stop: Arc<AtomicBool>,
}

pub(crate) fn run(options: &Options, stop: &Arc<AtomicBool>) -> Result<Report> {
    let shape = Shape::drawn(options.seed);
    let millis = u64::try_from(options.run.as_millis())?;
    let plan = plan::drawn(options.seed, &shape, millis);
    std::fs::create_dir_all(&options.dir)?;
    let trace = Trace::new(&options.dir, options.loud)?;
    trace.say("plan", &format!("seed {} {shape:?}", options.seed));
    let written: Vec<String> =
        plan.iter().map(|e| format!("{:>8} ms {}", e.at_ms, e.fault)).collect();
    std::fs::write(options.dir.join("plan"), written.join("\n") + "\n")?;
    if options.loud {
        println!("{}", written.join("\n"));
    }
    let blocks = usize::try_from(BLOCKS)?;
    let volumes = shape.volumes.iter().enumerate().map(|(number, of)| {
        Volume::new(number, &format!("v{}", number + 1), of.clone(), blocks, shape.tears)
    });
    let shared = Arc::new(Shared::new(volumes.collect(), BLOCKS, trace));
    let net = Net::up()?;
    let seed = (options.seed, &shape);
    let mutant = options.mutant.clone();
    let nodes = Nodes::new(&options.cairn, &options.dir, net, seed, mutant, Arc::clone(&shared))?;
    let mut run = Run {
        options: options.clone(),
        shared,
        nodes,
        repairs: Vec::new(),
        faults: BTreeMap::new(),
        kills: 0,
        power: 0,
        stop: Arc::clone(stop),
    };
    run.all(&shape, &plan)
}

impl Run {
    fn all(&mut self, shape: &Shape, plan: &[Event]) -> Result<Report> {
        for node in 0..NODES {
            self.nodes.start(node)?;
        }
        let places = api::set_up(&self.shared, &self.options.dir).context("making the volumes")?;
        *self.shared.places.lock() = places;
        let mut watchers = Vec::new();
        for node in 0..NODES {
            let shared = Arc::clone(&self.shared);
            let dir = self.options.dir.clone();
            watchers.push(guarded(&self.shared, None, move || {
                if let Err(error) = api::watch(&shared, &dir, node) {
                    shared.fail(
                        format!("[nemesis] n{} cannot be watched: {error:#}", node + 1),
                        None,
                    );
                }
            })?);
        }
        let hosts = self.start_hosts(shape)?;
        let began = Instant::now();
        self.carry_out(plan, began)?;
        let took = began.elapsed();
        let recovered = self.recover(hosts)?;
        self.shared.set_phase(Phase::End);
        for watcher in watchers {
            // What it died of is noted already.
            let _ended = watcher.join();
        }
        self.judge();
        self.report(took, recovered)
    }

    fn start_hosts(&self, shape: &Shape) -> Result<Vec<JoinHandle<()>>> {
        let mut rng = Rng::new(self.options.seed ^ 0x4057);
        let mut threads = Vec::new();
        for (at, of) in shape.volumes.iter().enumerate() {
            let nqn = format!("nqn.2026-11.io.cairn:{}", self.shared.volumes[at].lock().name);
            let sides = std::iter::once(of.home).chain(of.standbys.iter().copied());
            let paths: Vec<_> = sides.map(|node| (address(node), node)).collect();
            for number in 0..HOSTS {
                let (shared, nqn, paths) = (Arc::clone(&self.shared), nqn.clone(), paths.clone());
                let rng = rng.fork();
                threads.push(guarded(&self.shared, Some(at), move || {
                    match Host::new(Arc::clone(&shared), at, number, nqn, paths, rng) {
                        Ok(mut host) => host.run(),
                        Err(error) => shared.fail(format!("[nemesis] {error:#}"), None),
                    }
                })?);
            }
        }
        Ok(threads)
    }

    fn over(&self) -> bool {
        self.shared.phase() == Phase::End || self.stop.load(Ordering::Relaxed)
    }

    fn carry_out(&mut self, plan: &[Event], began: Instant) -> Result<()> {
        let mut next = plan.iter().peekable();
        while !self.over() && began.elapsed() < self.options.run {
            let now = u64::try_from(began.elapsed().as_millis())?;
            if let Some(event) = next.next_if(|event| event.at_ms <= now) {
                self.hurt(&event.fault)?;
                continue;
            }
            self.repair(false)?;
            self.look()?;
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    /// A process that nobody killed lives.
    fn look(&mut self) -> Result<()> {
        if let Some(what) = self.nodes.ended()? {
            self.shared.fail(format!("[alive] {what}; its log tells why"), None);
        }
        Ok(())
    }

    fn later(&mut self, ms: u64, what: Repair) {
        // A fault of the same kind takes the place of the one before it.
        if !matches!(what, Repair::Start(_)) {
            self.repairs.retain(|(_, before)| *before != what);
        }
        self.repairs.push((Instant::now() + Duration::from_millis(ms), what));
    }

    fn hurt(&mut self, fault: &Fault) -> Result<()> {
        self.shared.trace.say("fault", &fault.to_string());
        *self.faults.entry(fault.kind()).or_default() += 1;
        match fault {
            Fault::Kill { nodes, down_ms } => {
                let quiet = nodes.len() == 1 && self.repairs.is_empty();
                let (killed, volatile) = self.nodes.kill(nodes)?;
                self.kills += killed.len() as u64;
                self.power += volatile.len() as u64;
                for volume in &self.shared.volumes {
                    volume.lock().killed(&killed, &volatile, quiet);
                }
                self.shared.trace.say("kill", &format!("{killed:?}, power lost: {volatile:?}"));
                for &node in nodes {
                    self.repairs.retain(|(_, before)| {
                        *before != Repair::Start(node) && *before != Repair::Continue(node)
                    });
                    self.later(*down_ms, Repair::Start(node));
                }
            }
            Fault::Cache { nodes } => {
                for node in nodes {
                    self.nodes.cache(*node)?;
                }
            }
            Fault::Pause { node, aim, for_ms } => {
                let node = self.aimed(*node, *aim);
                self.nodes.signal(node, Signal::SIGSTOP)?;
                self.later(*for_ms, Repair::Continue(node));
            }
            Fault::Partition { node, aim, cut, for_ms } => {
                let node = self.aimed(*node, *aim);
                self.nodes.net().cut(node, Some(*cut))?;
                self.later(*for_ms, Repair::Heal(node));
            }
            Fault::SlowDisk { node, ms, for_ms } => {
                self.nodes.trouble(*node, "slow_ms", Some(ms.to_string()))?;
                self.later(*for_ms, Repair::Disk(*node, &["slow_ms"]));
            }
            Fault::DiskError { node, read, write, from, units, for_ms } => {
                let range = format!("{}..{}", from << 16, (from + units) << 16);
                for (on, key) in [(*read, "eio_read"), (*write, "eio_write")] {
                    self.nodes.trouble(*node, key, on.then(|| range.clone()))?;
                }
                self.later(*for_ms, Repair::Disk(*node, &["eio_read", "eio_write"]));
            }
            Fault::FullDisk { node, for_ms } => {
                self.nodes.trouble(*node, "full", Some("1".to_owned()))?;
                self.later(*for_ms, Repair::Disk(*node, &["full"]));
            }
            Fault::ClockJump { node, seconds } => {
                self.nodes.trouble(*node, "clock_s", Some(seconds.to_string()))?;
            }
            Fault::Snapshot { volume, number } => {
                let (dir, shared) = (self.options.dir.clone(), Arc::clone(&self.shared));
                let (volume, number) = (*volume, *number);
                guarded(&self.shared, Some(volume), move || {
                    if let Err(error) = operator::snapshot(&shared, &dir, volume, number) {
                        shared.trace.say("note", &format!("snapshot s{number}: {error:#}"));
                    }
                })?;
            }
            Fault::Replace { volume, node, now } => {
                let (dir, shared) = (self.options.dir.clone(), Arc::clone(&self.shared));
                let (what, now) = ((*volume, *node), *now);
                guarded(&self.shared, None, move || {
                    if let Err(error) = operator::replace(&shared, &dir, what, now) {
                        shared.trace.say("note", &format!("nothing is replaced: {error:#}"));
                    }
                })?;
            }
            Fault::TakeOver { volume, standby } => {
                let name = self.shared.volumes[*volume].lock().name.clone();
                let (dir, node, shared) =
                    (self.options.dir.clone(), *standby, Arc::clone(&self.shared));
                // It may take as long as a lease, or not be possible.
                std::thread::Builder::new().spawn(move || {
                    if let Err(error) = api::take_over(&dir, node, &name) {
                        shared.trace.say(
                            "note",
                            &format!("n{} does not take {name} over: {error:#}", node + 1),
                        );
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Whoever serves the volume that is aimed at; the node where that is not known.
    fn aimed(&self, node: usize, aim: Option<usize>) -> usize {
        let hit = aim.and_then(|volume| self.shared.volumes[volume].lock().server());
        let node = hit.unwrap_or(node);
        if hit.is_some() {
            self.shared.trace.say("fault", &format!("it hits n{}", node + 1));
        }
        node
    }

    /// Ends faults that are over; all of them at the end.
    fn repair(&mut self, all: bool) -> Result<()> {
        let now = Instant::now();
        let mut due = Vec::new();
        let mut kept = Vec::new();
        for (at, what) in std::mem::take(&mut self.repairs) {
            let back = match what {
                Repair::Start(node) => self.may_start(node),
                _ => true,
            };
            if (all || at <= now) && back { due.push(what) } else { kept.push((at, what)) }
        }
        self.repairs = kept;
        for what in due {
            self.shared.trace.say("repair", &format!("{what:?}"));
            match what {
                Repair::Start(node) => self.nodes.start(node)?,
                Repair::Continue(node) => self.nodes.signal(node, Signal::SIGCONT)?,
                Repair::Heal(node) => self.nodes.net().cut(node, None)?,
                Repair::Disk(node, keys) => {
                    for key in keys {
                        self.nodes.trouble(node, key, None)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether it is known what became of what a node had not flushed.
    fn may_start(&self, node: usize) -> bool {
        let mut may = true;
        for volume in &self.shared.volumes {
            let mut volume = volume.lock();
            if volume.holds_back(node) && volume.waits() > POWER {
                volume.give_up();
            }
            may &= !volume.holds_back(node);
        }
        may
    }

    /// Nothing is wrong any more: everything is served, and every block is read.
    fn recover(&mut self, hosts: Vec<JoinHandle<()>>) -> Result<Duration> {
        let began = Instant::now();
        if !self.over() {
            self.shared.trace.say("note", "no more faults");
            self.shared.set_phase(Phase::Verify);
        } else if self.shared.failure().is_none() {
            self.shared.set_phase(Phase::End);
        }
        let mut looked = Duration::ZERO;
        while self.shared.phase() == Phase::Verify && hosts.iter().any(|host| !host.is_finished()) {
            self.repair(true)?;
            if began.elapsed() > looked + LOOK {
                looked = began.elapsed();
                self.restart_failed_pools()?;
            }
            self.look()?;
            if began.elapsed() > RECOVERY {
                self.shared.fail(self.what_is_missing(), None);
            }
            if self.stop.load(Ordering::Relaxed) {
                self.shared.set_phase(Phase::End);
            }
            std::thread::sleep(TICK);
        }
        let took = began.elapsed();
        for host in hosts {
            // What it died of is noted already.
            let _ended = host.join();
        }
        Ok(took)
    }

    fn what_is_missing(&self) -> String {
        let unserved = self.shared.volumes.iter().filter_map(|volume| {
            let volume = volume.lock();
            (!volume.is_served(|of| self.shared.died(of))).then(|| volume.name.clone())
        });
        let unserved: Vec<_> = unserved.collect();
        format!(
            "[liveness] {} s after the last fault not every block could be read; not served: {unserved:?}",
            RECOVERY.as_secs()
        )
    }

    fn judge(&mut self) {
        if self.shared.failure().is_some() {
            return;
        }
        for (at, volume) in self.shared.volumes.iter().enumerate() {
            let judged = std::panic::catch_unwind(AssertUnwindSafe(|| {
                volume.lock().history.judge_all();
            }));
            if let Err(why) = judged {
                self.shared.fail(said(why.as_ref()), Some(at));
            }
        }
    }

    fn report(&self, took: Duration, recovered: Duration) -> Result<Report> {
        let failure = self.shared.failure();
        let sum = |of: &dyn Fn(&Volume) -> u64| -> u64 {
            self.shared.volumes.iter().map(|volume| of(&volume.lock())).sum()
        };
        let trace = match &failure {
            Some(failure) => {
                let block = block_of(&failure.what);
                let requests = match failure.volume {
                    Some(at) => self.shared.volumes[at].lock().requests.clone(),
                    None => Vec::new(),
                };
                Some(self.shared.trace.merge(&requests, block)?)
            }
            None => None,
        };
        Ok(Report {
            trace,
            failure,
            faults: self.faults.clone(),
            kills: self.kills,
            power: self.power,
            did: *self.shared.did.lock(),
            acked: sum(&|v| v.history.acked),
            judged: sum(&|v| v.history.judged),
            strict: sum(&|v| v.strict),
            lots: sum(&|v| v.lots),
            epochs: sum(&|v| v.epochs),
            snapshots: *self.shared.snapshots.lock(),
            replaced: *self.shared.replaced.lock(),
            took,
            recovered,
            interrupted: self.stop.load(Ordering::Relaxed),
        })
    }

    /// A pool that went offline is so until its process is started again, as an operator does.
    fn restart_failed_pools(&mut self) -> Result<()> {
        for node in 0..NODES {
            if api::has_failed_pool(&self.options.dir, node).unwrap_or(false) {
                self.shared
                    .trace
                    .say("repair", &format!("n{} is started again: its pool is offline", node + 1));
                let (killed, volatile) = self.nodes.kill(&[node])?;
                for volume in &self.shared.volumes {
                    volume.lock().killed(&killed, &volatile, false);
                }
                self.later(0, Repair::Start(node));
            }
        }
        Ok(())
    }
}

/// Which block a check is about.
fn block_of(what: &str) -> Option<u64> {
    let (_, rest) = what.split_once(" block ")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn said(why: &(dyn std::any::Any + Send)) -> String {
    let text = why.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| why.downcast_ref::<&str>().copied());
    text.unwrap_or("a thread panicked").to_owned()
}

/// A thread whose panic is the run's failure: checks that fail panic.
fn guarded(
    shared: &Arc<Shared>,
    volume: Option<usize>,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>> {
    let shared = Arc::clone(shared);
    let thread = std::thread::Builder::new().spawn(move || {
        if let Err(why) = std::panic::catch_unwind(AssertUnwindSafe(work)) {
            shared.fail(said(why.as_ref()), volume);
        }
    });
    thread.context("a thread")
}

/// A folder of its own for a run.
pub(crate) fn folder(parent: &Path, seed: u64, name: &str) -> PathBuf {
    parent.join(format!("nemesis-{}-{seed}{name}", std::process::id()))
}
