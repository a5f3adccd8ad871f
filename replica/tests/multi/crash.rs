//! Random work on several devices, cut off at random, opened again.

use crate::common::MIB;
use crate::set::Seen;
use crate::world::World;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    Kill,
    Power,
    Either,
}

fn run(seed: u64, cut: Cut, deaths: bool) -> Seen {
    let lens: &[u64] = match seed % 5 {
        0 => &[24 * MIB],
        1 => &[8 * MIB, 24 * MIB],
        2 => &[16 * MIB, 16 * MIB],
        3 => &[12 * MIB, 24 * MIB, 12 * MIB],
        _ => &[24 * MIB, 12 * MIB],
    };
    let mut world = World::new(lens, seed);
    world.set.check = seed.is_multiple_of(8);
    world.deaths = deaths;
    world.layers = !seed.is_multiple_of(3);
    for _ in 0..4 {
        let most = if world.set.rng.chance(30) { 30 } else { 500 };
        let actions = world.set.rng.below(most);
        for _ in 0..actions {
            world.act();
        }
        if world.layers && world.set.rng.chance(60) {
            world.revert_some();
        }
        if world.set.rng.chance(40) {
            world.drain_some();
        }
        let power = cut == Cut::Power || (cut == Cut::Either && world.set.rng.chance(50));
        world = world.crash(power);
    }
    world.settle();
    world.verify_all(false);
    world.seen()
}

fn run_all(seeds: std::ops::Range<u64>, cut: Cut, deaths: bool) -> Seen {
    let mut sum = Seen::default();
    for seed in seeds {
        let result = std::panic::catch_unwind(|| run(seed, cut, deaths));
        let Ok(seen) = result else { panic!("seed {seed}, {cut:?}, deaths {deaths}") };
        sum.add(&seen);
    }
    sum
}

/// The runs must meet what they are for.
fn met(seen: &Seen) {
    assert!(seen.adds > 50 && seen.drained > 20, "{seen:?}");
    assert!(seen.draining > 20 && seen.doubles > 0 && seen.removed > 0, "{seen:?}");
    assert!(seen.families > 0, "{seen:?}");
    assert!(seen.snapshots > 50 && seen.reverts > 20 && seen.resumed > 0, "{seen:?}");
}

#[test]
fn kill_loses_nothing_acknowledged() {
    met(&run_all(0..400, Cut::Kill, false));
}

#[test]
fn power_cut_loses_nothing_flushed() {
    met(&run_all(1000..1400, Cut::Power, false));
}

#[test]
fn a_power_cut_after_a_kill_loses_nothing_either() {
    met(&run_all(2000..2400, Cut::Either, false));
}

#[test]
fn a_device_that_dies_gives_errors_and_nothing_wrong() {
    let seen = run_all(3000..3500, Cut::Either, true);
    assert!(seen.failed > 50 && seen.lost_reads > 0, "{seen:?}");
    assert!(seen.good_reads > seen.lost_reads, "{seen:?}");
}
