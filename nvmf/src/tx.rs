//! What one connection has to send: headers by value, payload by reference.

use cairn_block::Memory;
pub use cairn_block::TxQueue;

use crate::pdu::Header;

/// Queues headers as this transport writes them.
pub(crate) trait PushHeader {
    /// Copies a header to the ring.
    fn push_header<M: Memory>(&mut self, header: &Header, mem: &mut M);
}

impl PushHeader for TxQueue {
    fn push_header<M: Memory>(&mut self, header: &Header, mem: &mut M) {
        self.push_bytes(header.encode().as_bytes(), mem);
    }
}
