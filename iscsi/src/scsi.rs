//! SCSI behind the transport: statuses and sense, command descriptor blocks, logical units.
//!
//! Sources: SAM-5, SPC-5, SBC-4.

pub mod cdb;
pub mod sense;
