#![forbid(unsafe_code)]
//! NVMe over Fabrics on TCP, without I/O: codecs, the target and the initiator.
//!
//! Nothing here owns a socket, a clock or a disk. Whoever runs it feeds received bytes to
//! [`target::Queue`] or [`initiator::Session`], sends what their [`tx::TxQueue`]s hold, and says what
//! time it is. Payload stays in the caller's [`cairn_block::Memory`] and is named by windows.
//!
//! Sources: NVM Express Base, NVMe/TCP Transport and NVM Command Set specifications.

pub mod ana;
pub mod features;
pub mod identify;
pub mod initiator;
pub mod log;
#[cfg(test)]
mod loopback;
pub mod pdu;
pub mod reservation;
mod rx;
pub mod sqe;
pub mod status;
pub mod target;
pub mod tx;
mod wire;
