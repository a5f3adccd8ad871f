#![forbid(unsafe_code)]
//! Whole clusters of production shards in one thread, on simulated disks, network and time.
//!
//! A [`World`] holds the virtual clock, the disks and the network. Each process has a [`SimDriver`],
//! and [`Cluster`] gives a process its turn when something has happened to it or its deadline is due.
//! Everything that is left to chance comes from one seed: the same seed gives the same run, event by
//! event. [`scenario::run`] draws a cluster, its hosts' work and its faults from a seed, and checks
//! with a [`History`] per volume that hosts saw nothing that a register per block would not show.

pub mod checks;
pub mod client;
pub mod cluster;
pub mod disk;
pub mod driver;
pub mod history;
pub mod initiator;
pub mod net;
pub mod rng;
pub mod scenario;
mod stream;
pub mod world;

pub use client::{Aim, Client, Orders, Workload};
pub use cluster::{Cluster, ClusterConfig, Roles, Tuning};
pub use disk::{DiskTrouble, SimDisk};
pub use driver::SimDriver;
pub use history::History;
pub use net::NetManners;
pub use rng::Rng;
pub use world::{DiskRef, Machine, NodeId, World};
