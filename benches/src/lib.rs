#![forbid(unsafe_code)]
//! Benches of the hot pieces. Run one with `cargo bench -p cairn-benches --bench NAME`:
//!
//! - `codec`: digests, and decoding and encoding of PDU headers;
//! - `fan_out`: a write through a nexus of three children, without I/O;
//! - `lookup`: a pool that finds a request's extents, and what it emits for them;
//! - `turn`: whole shards on a driver in memory, in time and in heap allocations for each request;
//! - `reactor`: the project's driver against tokio-uring on the same reads, writes and echoes.
//!
//! Measurements with a bar, which `cargo xtask measure NAME` runs; Cairn beside others, `cargo xtask compare`; and
//! counted instructions, `cargo xtask gate`. docs/performance.md tells of them all.

pub mod cluster;
pub mod memory;
