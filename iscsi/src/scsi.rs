//! SCSI behind the transport: statuses and sense, command descriptor blocks, logical units.
//!
//! Sources: SAM-5, SPC-5, SBC-4.

pub(crate) mod block;
pub mod cdb;
pub(crate) mod copy;
pub(crate) mod inquiry;
pub(crate) mod medium;
pub(crate) mod mode;
pub(crate) mod opcodes;
pub mod ports;
pub(crate) mod reservation;
pub(crate) mod sanitize;
pub mod sense;
pub(crate) mod unit;

pub use self::block::{IoCommand, unmap_range};
pub use self::copy::CopySegment;
pub use self::inquiry::Product;
pub use self::reservation::ReserveIn;
pub use self::sanitize::{SanitizeCommand, SanitizeEnd, SanitizeState};
pub use self::unit::{MAX_LUN, UnitConfig, UnitHandle};
