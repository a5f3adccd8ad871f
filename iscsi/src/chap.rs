//! CHAP (RFC 1994, as RFC 7143 section 12.1.3 uses it): who knows the secret, without sending it.

use md5::Md5;
use sha2::{Digest, Sha256};
use sha3::Sha3_256;

/// The longest challenge that is answered, in bytes.
pub const MAX_CHALLENGE_LEN: usize = 1024;
/// The longest response of any algorithm, in bytes.
pub const MAX_RESPONSE_LEN: usize = 32;
/// The shortest secret: 96 bits, as RFC 7143 asks.
pub const MIN_SECRET_LEN: usize = 12;

/// A hash that a response is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// MD5.
    Md5,
    /// SHA-256.
    Sha256,
    /// SHA3-256.
    Sha3,
}

impl Algorithm {
    /// The algorithm of a number of CHAP_A.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            5 => Some(Self::Md5),
            7 => Some(Self::Sha256),
            8 => Some(Self::Sha3),
            _ => None,
        }
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::Md5 => 5,
            Self::Sha256 => 7,
            Self::Sha3 => 8,
        }
    }

    /// The response to a challenge.
    #[must_use]
    pub fn respond(self, id: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
        fn hash<D: Digest>(id: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
            D::new()
                .chain_update([id])
                .chain_update(secret)
                .chain_update(challenge)
                .finalize()
                .to_vec()
        }
        match self {
            Self::Md5 => hash::<Md5>(id, secret, challenge),
            Self::Sha256 => hash::<Sha256>(id, secret, challenge),
            Self::Sha3 => hash::<Sha3_256>(id, secret, challenge),
        }
    }
}

/// Whether two responses are alike, in a time that tells nothing of where they differ.
#[must_use]
pub fn matches(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

/// A name and the secret that proves it.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// CHAP_N.
    pub name: String,
    /// The secret; at least [`MIN_SECRET_LEN`] bytes.
    pub secret: Vec<u8>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The secret stays out of logs.
        f.debug_struct("Credentials").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a login has to prove, and what the target proves in turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chap {
    /// The initiator's name and secret.
    pub initiator: Credentials,
    /// The target's, where the initiator may ask for them.
    pub target: Option<Credentials>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::hex;

    /// Computed apart with coreutils: `printf '\x01secretsecretsecret\x02\x03' | md5sum` and the like.
    #[test]
    fn responses_are_hashes_of_id_secret_and_challenge() {
        let of = |a: Algorithm| hex(&a.respond(1, b"secretsecretsecret", &[2, 3]));
        assert_eq!(of(Algorithm::Md5), "0xf11820f1f8f7c9b4f4332dc5f0a9c785");
        assert_eq!(
            of(Algorithm::Sha256),
            "0xbbd299046107c266fa7de0e120cfd79f876bd3f3b9c4c1d3695a7ce5133bb5de"
        );
        assert_eq!(
            of(Algorithm::Sha3),
            "0x44f7e2d85b7ba32e8f62ed2adaf155d599fb9c31947b35467d0e555a726c236a"
        );
    }

    #[test]
    fn only_equal_responses_match() {
        assert!(matches(b"abc", b"abc"));
        assert!(!matches(b"abc", b"abd") && !matches(b"abc", b"ab"));
    }
}
