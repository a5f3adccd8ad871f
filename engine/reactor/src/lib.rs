//! The one place where Cairn meets the kernel: the [`Driver`] seam, its io_uring implementation, the
//! arena that payload lives in, and devices opened for direct I/O.
//!
//! This is the only crate of the workspace that holds `unsafe` code.

pub mod arena;
pub mod device;
pub mod seam;
pub mod spin;
pub mod uring;

pub use arena::Arena;
pub use device::{BlockFile, IoMode, MemRegion, OpenError};
pub use seam::{
    Chunk, Completion, DeviceId, DiskFault, Driver, EndReason, ListenerId, Op, SocketFault,
    SocketId, Token,
};
pub use uring::{Attach, DriverConfig, DriverError, Features, UringDriver, Waker};
