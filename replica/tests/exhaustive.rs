//! Every script of one step, crashed at every point in every way; `cargo xtask crash --exhaustive N`
//! runs longer ones.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::exhaustive::{Plan, VARIANTS, Visits, visit};

#[test]
fn every_single_step_may_be_cut_off_anywhere() {
    let mut visits = Visits::default();
    for script in 0..Plan::count(1) {
        for variant in [0, VARIANTS / 2] {
            visit(&Plan { script, depth: 1, variant, seed: 4 }, &mut visits);
        }
    }
    assert!(visits.states > 1000, "{} states", visits.states);
}
