#![forbid(unsafe_code)]
//! An iSCSI target without I/O: PDUs, login, sessions, and the SCSI behind them.
//!
//! Nothing here owns a socket, a clock or a disk. Whoever runs it feeds received bytes to a
//! [`connection::Connection`], sends what it has queued, and says what time it is. Payload stays in
//! the caller's [`cairn_block::Memory`] and is named by windows.
//!
//! Sources: RFC 7143; SAM-5, SPC-5 and SBC-4.

pub mod chap;
pub mod connection;
pub mod keys;
pub mod login;
#[cfg(test)]
mod loopback;
pub mod pdu;
mod rx;
pub mod scsi;
pub mod target;
pub mod text;
mod wire;

pub use rx::Digests;
