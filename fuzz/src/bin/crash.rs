//! The crash tester: random work on a pool over a disk that reorders and forgets, cut off by a kill
//! or a power cut, recovered, and held to the reference model. `cargo xtask crash` runs it.
//!
//! A state is one crash and what recovery made of it: after a kill any subset of the unfinished
//! operations took effect; after a power cut any subset of the unflushed writes, torn at 512 bytes.
//! Each seed goes through three crashes, one after the other, with up to 300 actions before each. Every other
//! one works on a pool of several devices, which come and leave beneath replicas, snapshots and clones.
//!
//! `--exhaustive N` runs every script of up to N operations on a tiny pool instead, and visits every
//! state that a crash at any point of it may leave; how subsets and tears are bounded is told in
//! `replica/tests/common/exhaustive.rs`.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "the harness is shared with the tests, where it is usual")]

// The harness of the replica's own tests: one model, one disk.
#[path = "../../../replica/tests/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../../../replica/tests/multi/world.rs"]
mod devices;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../../../replica/tests/multi/set.rs"]
mod set;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use common::MIB;
use common::exhaustive::{Plan, VARIANTS, Visits, visit};
use common::world::World;

/// Visits crash states of the pool and checks each against the model.
#[derive(Debug, Parser)]
struct Args {
    /// How many states to visit by chance; 10000 unless --exhaustive is given.
    #[arg(long)]
    states: Option<u64>,

    /// Visit every state of every script of up to so many operations.
    #[arg(long, value_name = "DEPTH")]
    exhaustive: Option<u32>,

    /// Replays one script of --exhaustive: its number and variant, as a violation tells them.
    #[arg(long, value_name = "SCRIPT,VARIANT", requires = "exhaustive")]
    script: Option<String>,

    /// The first seed; a failing one alone, with --states 1, replays it.
    #[arg(long, default_value_t = 1_000_000)]
    seed: u64,

    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: u64,

    /// Pools of one device, of several, or every other seed of the one and of the other.
    #[arg(long, value_enum, default_value = "both")]
    pools: Pools,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Pools {
    One,
    Several,
    Both,
}

impl Pools {
    fn of(self, seed: u64) -> Self {
        match self {
            Self::Both if seed.is_multiple_of(2) => Self::One,
            Self::Both => Self::Several,
            of => of,
        }
    }
}

/// Crashes in one seed.
const CRASHES: u64 = 3;

/// The same with several devices.
fn run_devices(seed: u64) -> u64 {
    let lens: &[u64] = match seed % 5 {
        0 => &[24 * MIB],
        1 => &[8 * MIB, 24 * MIB],
        2 => &[16 * MIB, 16 * MIB],
        3 => &[12 * MIB, 24 * MIB, 12 * MIB],
        _ => &[24 * MIB, 12 * MIB],
    };
    let mut world = devices::World::new(lens, seed);
    world.set.check = seed.is_multiple_of(8);
    world.deaths = seed % 7 == 3;
    world.layers = !seed.is_multiple_of(11);
    let mut actions_in_all = 0;
    for _ in 0..CRASHES {
        let most = if world.set.rng.chance(30) { 30 } else { 400 };
        let actions = world.set.rng.below(most);
        for _ in 0..actions {
            world.act();
        }
        if world.layers && world.set.rng.chance(30) {
            world.revert_some();
        }
        if world.set.rng.chance(50) {
            world.drain_some();
        }
        actions_in_all += actions;
        let power = world.set.rng.chance(50);
        world = world.crash(power);
    }
    world.settle();
    world.verify_all(false);
    actions_in_all
}

fn run(seed: u64) -> u64 {
    let len = if seed.is_multiple_of(3) { 8 * MIB } else { 24 * MIB };
    let mut world = World::new(len, seed.is_multiple_of(2), seed);
    world.sim.check = seed.is_multiple_of(8);
    let mut actions_in_all = 0;
    for _ in 0..CRASHES {
        let most = if world.sim.rng.chance(30) { 12 } else { 300 };
        let actions = world.sim.rng.below(most);
        for _ in 0..actions {
            world.act();
        }
        actions_in_all += actions;
        let power = match seed % 3 {
            0 => false,
            1 => true,
            _ => world.sim.rng.chance(50),
        };
        world = world.crash(power);
    }
    world.settle();
    world.verify_all(false);
    actions_in_all
}

/// Runs every script of `depth` steps; returns how many states were visited and were wrong.
fn scripts(depth: u32, args: &Args) -> (u64, u64) {
    let begun = Instant::now();
    let plans = Plan::count(depth) * VARIANTS;
    let (next, states, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= plans {
                return;
            }
            let (script, variant) = (i / VARIANTS, i % VARIANTS);
            let plan = Plan { script, depth, variant, seed: args.seed };
            let mut visits = Visits::default();
            let whole = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                visit(&plan, &mut visits);
            }));
            states.fetch_add(visits.states, Ordering::Relaxed);
            if whole.is_err() {
                failed.fetch_add(1, Ordering::Relaxed);
                eprintln!(
                    "violation: {}; replay: cargo xtask crash --exhaustive {depth} --seed {} --script {script},{variant}",
                    visits.at, args.seed
                );
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..args.threads.max(1) {
            scope.spawn(work);
        }
    });
    let (states, failed) = (states.into_inner(), failed.into_inner());
    println!(
        "{states} crash states of {plans} runs of scripts of {depth} operations visited in {:.0} s: {failed} violations",
        begun.elapsed().as_secs_f64()
    );
    (states, failed)
}

fn replay(depth: u32, which: &str, args: &Args) -> ExitCode {
    let parsed = which.split_once(',').and_then(|(s, v)| Some((s.parse().ok()?, v.parse().ok()?)));
    let Some((script, variant)) = parsed else {
        eprintln!("`{which}` is not a script and a variant, such as 17,3");
        return ExitCode::FAILURE;
    };
    let mut visits = Visits::default();
    visit(&Plan { script, depth, variant, seed: args.seed }, &mut visits);
    println!("{} crash states visited: no violation", visits.states);
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let (Some(depth), Some(which)) = (args.exhaustive, &args.script) {
        return replay(depth, which, &args);
    }
    let (mut states, mut failed) = (0, 0);
    for depth in 1..=args.exhaustive.unwrap_or(0) {
        let (visited, wrong) = scripts(depth, &args);
        states += visited;
        failed += wrong;
    }
    let by_chance = args.states.unwrap_or(if args.exhaustive.is_some() { 0 } else { 10_000 });
    if by_chance > 0 {
        let (visited, wrong) = random(by_chance, &args);
        states += visited;
        failed += wrong;
    }
    println!("{states} crash states in all: {failed} violations");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Seeds of pools of several devices that once went wrong: they come first.
const KEPT: [u64; 12] = [
    1_013_785, 1_017_743, 1_021_421, 1_022_419, 1_025_417, 5_009_081, 5_017_133, 5_019_247,
    5_031_665, 7_013_309, 9_024_231, 9_101_196,
];

/// Visits states by chance; returns how many, and how many seeds went wrong.
fn random(states: u64, args: &Args) -> (u64, u64) {
    let seeds = states.div_ceil(CRASHES);
    // One seed alone is looked into.
    let kept = if seeds > 1 && args.pools != Pools::One { KEPT.len() as u64 } else { 0 };
    let begun = Instant::now();
    let (next, actions, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..args.threads.max(1) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= seeds + kept {
                        return;
                    }
                    let old = KEPT.get(usize::try_from(i).unwrap_or(usize::MAX));
                    let old = old.copied().filter(|_| kept > 0);
                    let seed = old.unwrap_or_else(|| args.seed + i - kept);
                    let several = old.is_some() || args.pools.of(seed) == Pools::Several;
                    let run = if several { run_devices } else { run };
                    match std::panic::catch_unwind(|| run(seed)) {
                        Ok(n) => {
                            actions.fetch_add(n, Ordering::Relaxed);
                        }
                        Err(_) => {
                            failed.fetch_add(1, Ordering::Relaxed);
                            eprintln!(
                                "violation: seed {seed}; replay: cargo xtask crash --states 1 --seed {seed} --pools {}",
                                if several { "several" } else { "one" }
                            );
                        }
                    }
                    if i % 5_000 == 4_999 {
                        println!("{} states, {:.0} s", (i + 1) * CRASHES, begun.elapsed().as_secs_f64());
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    println!(
        "{} crash states visited after {} actions in {:.0} s: {failed} violations",
        seeds * CRASHES,
        actions.into_inner(),
        begun.elapsed().as_secs_f64()
    );
    (seeds * CRASHES, failed)
}
