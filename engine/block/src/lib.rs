#![forbid(unsafe_code)]
//! The vocabulary of block I/O that every Cairn crate shares: identifiers, addresses with checked
//! arithmetic, requests, statuses, and buffers as plain values.
//!
//! Nothing here decides anything or touches the kernel.

mod addr;
mod buddy;
mod ids;
mod io;
mod mem;
pub mod mutants;
mod received;
pub mod reservation;
pub mod sanitize;
mod tx;
pub mod undo;

pub use addr::{BlockSize, ByteOffset, Lba, LbaRange, RangeError};
pub use buddy::Buddy;
pub use ids::{Epoch, ParseIdError, PoolDeviceId, PoolId, ReplicaId, SnapshotId, VolumeId};
pub use io::{IoOp, IoRequest, IoStatus, SnapshotVerb};
pub use mem::{Buf, BufSlice, HeapMemory, Memory};
pub use received::Received;
pub use tx::TxQueue;
