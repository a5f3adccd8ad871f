//! Random work, cut off at random, opened again: nothing acknowledged is lost, nothing foreign is seen.

mod common;

use common::MIB;
use common::world::World;

/// How the run is cut off.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    Kill,
    Power,
    /// The one or the other: what survived a kill must survive the power cut after it.
    Either,
}

fn run(seed: u64, cut: Cut) {
    let len = if seed.is_multiple_of(3) { 8 * MIB } else { 24 * MIB };
    let mut world = World::new(len, seed.is_multiple_of(2), seed);
    world.sim.check = seed.is_multiple_of(8);
    for _ in 0..3 {
        let most = if world.sim.rng.chance(30) { 12 } else { 300 };
        let actions = world.sim.rng.below(most);
        for _ in 0..actions {
            world.act();
        }
        let power = cut == Cut::Power || (cut == Cut::Either && world.sim.rng.chance(50));
        world = world.crash(power);
    }
    world.settle();
    world.verify_all(false);
}

fn run_all(seeds: std::ops::Range<u64>, cut: Cut) {
    for seed in seeds {
        let result = std::panic::catch_unwind(|| run(seed, cut));
        // The panic itself was reported by the test's own hook.
        assert!(result.is_ok(), "seed {seed}, {cut:?}");
    }
}

#[test]
fn kill_loses_nothing_acknowledged() {
    run_all(0..500, Cut::Kill);
}

#[test]
fn power_cut_loses_nothing_flushed() {
    run_all(0..900, Cut::Power);
}

#[test]
fn a_power_cut_after_a_kill_loses_nothing_either() {
    run_all(2000..2600, Cut::Either);
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
