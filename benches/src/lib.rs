#![forbid(unsafe_code)]
//! Benches of the hot pieces. Run one with `cargo bench -p cairn-benches --bench NAME`:
//!
//! - `codec`: digests, and decoding and encoding of PDU headers;
//! - `fan_out`: a write through a nexus of three children, without I/O;
//! - `reactor`: the project's driver against tokio-uring on the same reads, writes and echoes.
//!
//! And measurements with a bar, which `cargo xtask measure NAME` runs; docs/performance.md tells of them.
