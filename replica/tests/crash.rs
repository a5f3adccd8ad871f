//! Random work, cut off at random, opened again: nothing acknowledged is lost, nothing foreign is seen.

mod common;

use common::{MIB, World};

fn run(seed: u64, power: bool) {
    let len = if seed.is_multiple_of(3) { 8 * MIB } else { 24 * MIB };
    let mut world = World::new(len, seed.is_multiple_of(2), seed);
    world.sim.check = seed.is_multiple_of(8);
    for _ in 0..3 {
        let actions = 1 + world.sim.rng.below(300);
        for _ in 0..actions {
            world.act();
        }
        world = world.crash(power);
    }
    world.settle();
    world.verify_all(false);
}

fn run_all(seeds: std::ops::Range<u64>, power: bool) {
    for seed in seeds {
        let result = std::panic::catch_unwind(|| run(seed, power));
        if let Err(panic) = result {
            eprintln!("seed {seed}, power {power}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn kill_loses_nothing_acknowledged() {
    run_all(0..600, false);
}

#[test]
fn power_cut_loses_nothing_flushed() {
    run_all(0..600, true);
}

#[test]
fn without_crashes_it_is_the_model() {
    for seed in 0..60 {
        let mut world = World::new(16 * MIB, seed % 2 == 0, seed);
        for _ in 0..1500 {
            world.act();
        }
        world.settle();
        world.verify_all(false);
    }
}
