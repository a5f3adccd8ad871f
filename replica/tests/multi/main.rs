//! Pools of several devices: a model of them beside random work that is cut off at random; and each
//! case by itself of devices that come, go, die, and return.
#![allow(clippy::unwrap_used, reason = "tests")]

mod cases;
#[path = "../common/mod.rs"]
mod common;
mod crash;
mod layers;
mod lost;
mod set;
mod undo;
mod world;
