//! The crash tester: random work on a pool over a disk that reorders and forgets, cut off by a kill
//! or a power cut, recovered, and held to the reference model. `cargo xtask crash` runs it.
//!
//! A state is one crash and what recovery made of it: after a kill any subset of the unfinished
//! operations took effect; after a power cut any subset of the unflushed writes, torn at 512 bytes.
//! Each seed goes through three crashes, one after the other, with up to 300 actions before each.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "the harness is shared with the tests, where it is usual")]

// The harness of the replica's own tests: one model, one disk.
#[path = "../../../replica/tests/common/mod.rs"]
mod common;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use common::MIB;
use common::world::World;

/// Visits crash states of the pool and checks each against the model.
#[derive(Debug, Parser)]
struct Args {
    /// How many states to visit.
    #[arg(long, default_value_t = 10_000)]
    states: u64,

    /// The first seed; a failing one alone, with --states 1, replays it.
    #[arg(long, default_value_t = 1_000_000)]
    seed: u64,

    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: u64,
}

/// Crashes in one seed.
const CRASHES: u64 = 3;

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

fn main() -> ExitCode {
    let args = Args::parse();
    let seeds = args.states.div_ceil(CRASHES);
    let begun = Instant::now();
    let (next, actions, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..args.threads.max(1) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= seeds {
                        return;
                    }
                    let seed = args.seed + i;
                    match std::panic::catch_unwind(|| run(seed)) {
                        Ok(n) => {
                            actions.fetch_add(n, Ordering::Relaxed);
                        }
                        Err(_) => {
                            failed.fetch_add(1, Ordering::Relaxed);
                            eprintln!(
                                "violation: seed {seed}; replay: cargo xtask crash --states 1 --seed {seed}"
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
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
