//! Encryption at rest of a volume's blocks, and the wrapping of the key that does it.
//!
//! Blocks are encrypted with AES-256-XTS (IEEE 1619): the data unit is the volume's block and the
//! tweak its number. The key is random, one for each volume, and is stored only wrapped, by AES-256-GCM
//! under a key-encryption key that an operator holds. Randomness and keys are arguments.

#![forbid(unsafe_code)]

mod wrap;
mod xts;

pub use wrap::{CipherId, Envelope, EnvelopeError, Kek, KeyError, KeyId, UnwrapError};
pub use xts::{DATA_KEY_LEN, VolumeKey, WeakKey};
