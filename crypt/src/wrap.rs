//! The wrapping of a volume's key under a key-encryption key (KEK).

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use cairn_block::VolumeId;
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::xts::{DATA_KEY_LEN, VolumeKey};

/// Bytes of a key-encryption key.
const KEK_LEN: usize = 32;
/// Version of an encoded [`Envelope`], and of what its tag covers.
const VERSION: u16 = 1;
/// Bytes of a nonce, and of a tag, of AES-GCM.
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;

/// Tells a key-encryption key from others and nothing of what it is: the first 16 bytes of
/// SHA-256("cairn kek id" || key).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 16]);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// What is given as a key is none. Nothing of it is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Of another length.
    #[error("a key is 32 bytes, or 64 hexadecimal digits; this has {0} bytes")]
    Length(usize),
    /// 64 characters, not all of them digits.
    #[error("a key of 64 characters is hexadecimal; this has others among them")]
    Digits,
}

/// A key-encryption key. Dropped, it is wiped from memory; printed, it says its id.
#[derive(Clone, ZeroizeOnDrop)]
pub struct Kek([u8; KEK_LEN]);

impl std::fmt::Debug for Kek {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kek({})", self.id())
    }
}

impl PartialEq for Kek {
    /// By id, which costs no secret time.
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for Kek {}

impl Kek {
    /// Reads what a key file holds or a key command prints: 32 bytes, or 64 hexadecimal digits with
    /// white space around them.
    ///
    /// # Errors
    /// [`KeyError`] where it is neither.
    pub fn parse(text: &[u8]) -> Result<Self, KeyError> {
        let mut key = [0; KEK_LEN];
        if text.len() == KEK_LEN {
            key.copy_from_slice(text);
        } else {
            let digits = text.trim_ascii();
            if digits.len() != 2 * KEK_LEN {
                return Err(KeyError::Length(text.len()));
            }
            for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
                let [high, low] = [pair[0], pair[1]].map(|d| char::from(d).to_digit(16));
                let (Some(high), Some(low)) = (high, low) else {
                    key.zeroize();
                    return Err(KeyError::Digits);
                };
                *byte = u8::try_from(high << 4 | low).expect("two digits are a byte");
            }
        }
        let kek = Self(key);
        key.zeroize();
        Ok(kek)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> KeyId {
        let digest = Sha256::new().chain_update(b"cairn kek id").chain_update(self.0).finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        KeyId(id)
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new_from_slice(&self.0).expect("the key is 32 bytes")
    }

    /// Wraps `key`, made for volume `owner`. `nonce` must be random: the same one with the same key and
    /// another volume would give the keys away.
    #[must_use]
    pub fn wrap(&self, key: &VolumeKey, owner: VolumeId, nonce: [u8; NONCE_LEN]) -> Envelope {
        let cipher = CipherId::Aes256Xts;
        let mut wrapped = *key.bytes();
        let tag = self
            .cipher()
            .encrypt_inout_detached(
                &Nonce::from(nonce),
                &covered(owner, cipher),
                InOutBuf::from(&mut wrapped[..]),
            )
            .expect("64 bytes are not too many");
        Envelope { cipher, key_id: self.id(), owner, nonce, wrapped, tag: tag.into() }
    }

    /// Takes the key out of `envelope`.
    ///
    /// # Errors
    /// [`UnwrapError`] where the envelope was made with another key, or is damaged.
    pub fn unwrap(&self, envelope: &Envelope) -> Result<VolumeKey, UnwrapError> {
        let (expected, found) = (envelope.key_id, self.id());
        if expected != found {
            return Err(UnwrapError::OtherKey { expected, found });
        }
        let mut key = Zeroizing::new(envelope.wrapped);
        self.cipher()
            .decrypt_inout_detached(
                &Nonce::from(envelope.nonce),
                &covered(envelope.owner, envelope.cipher),
                InOutBuf::from(&mut key[..]),
                &Tag::from(envelope.tag),
            )
            .map_err(|_| UnwrapError::Damaged)?;
        VolumeKey::new(*key).map_err(|_| UnwrapError::Damaged)
    }
}

/// What the tag of an envelope covers besides the key.
fn covered(owner: VolumeId, cipher: CipherId) -> Vec<u8> {
    let mut data = b"cairn volume key".to_vec();
    data.extend_from_slice(&owner.to_bytes());
    data.extend_from_slice(&cipher.number().to_le_bytes());
    data.extend_from_slice(&VERSION.to_le_bytes());
    data
}

/// How a volume's blocks are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CipherId {
    /// AES-256-XTS, the data unit a block, the tweak its number.
    Aes256Xts,
}

impl CipherId {
    const fn number(self) -> u16 {
        match self {
            Self::Aes256Xts => 1,
        }
    }

    /// Its name, for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes256Xts => "aes-256-xts",
        }
    }
}

/// Why a key does not open an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnwrapError {
    /// It was wrapped with another.
    #[error("the key does not unwrap the volume's key: expected key id {expected}, got {found}")]
    OtherKey {
        /// The id of the key that it was wrapped with.
        expected: KeyId,
        /// The id of the key that was tried.
        found: KeyId,
    },
    /// It is the right key, and what it opens was changed.
    #[error("the volume's wrapped key is damaged: it does not verify with the right key")]
    Damaged,
}

/// Why bytes are no envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Of another length.
    #[error("the wrapped key has {0} bytes, not {len}", len = Envelope::LEN)]
    Length(usize),
    /// A later format.
    #[error("the wrapped key has version {0}; this program knows version 1: upgrade it")]
    Version(u16),
    /// A cipher that this program has not.
    #[error(
        "the volume is encrypted with cipher number {0}, which this program does not know: upgrade it"
    )]
    Cipher(u16),
}

/// A volume's key, wrapped: what is stored with the volume's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// How the blocks are encrypted.
    pub cipher: CipherId,
    /// The id of the key that opens it.
    pub key_id: KeyId,
    /// The volume that the key was made for; a clone has the key of its origin.
    pub owner: VolumeId,
    nonce: [u8; NONCE_LEN],
    wrapped: [u8; DATA_KEY_LEN],
    tag: [u8; TAG_LEN],
}

impl Envelope {
    /// Bytes of an encoded envelope.
    pub const LEN: usize = 136;

    /// Its bytes, little-endian, identifiers in UUID order:
    ///
    /// ```text
    /// 0   version u16   2  cipher u16 (1: AES-256-XTS)   4  zero u32
    /// 8   id of the key-encryption key (16 bytes)
    /// 24  volume that the key was made for (16 bytes)
    /// 40  nonce (12 bytes)                               52 zero u32
    /// 56  the key, wrapped (64 bytes)
    /// 120 tag (16 bytes)
    /// ```
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0..2].copy_from_slice(&VERSION.to_le_bytes());
        out[2..4].copy_from_slice(&self.cipher.number().to_le_bytes());
        out[8..24].copy_from_slice(&self.key_id.0);
        out[24..40].copy_from_slice(&self.owner.to_bytes());
        out[40..52].copy_from_slice(&self.nonce);
        out[56..120].copy_from_slice(&self.wrapped);
        out[120..].copy_from_slice(&self.tag);
        out
    }

    /// The envelope that `bytes` hold.
    ///
    /// # Errors
    /// [`EnvelopeError`] where they are of a later version or no envelope.
    pub fn decode(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let [a, b, c, d, ..] = *bytes else { return Err(EnvelopeError::Length(bytes.len())) };
        let version = u16::from_le_bytes([a, b]);
        if version != VERSION {
            return Err(EnvelopeError::Version(version));
        }
        let Ok(bytes) = <&[u8; Self::LEN]>::try_from(bytes) else {
            return Err(EnvelopeError::Length(bytes.len()));
        };
        let cipher = match u16::from_le_bytes([c, d]) {
            1 => CipherId::Aes256Xts,
            other => return Err(EnvelopeError::Cipher(other)),
        };
        Ok(Self {
            cipher,
            key_id: KeyId(part(bytes, 8)),
            owner: VolumeId::from_bytes(part(bytes, 24)),
            nonce: part(bytes, 40),
            wrapped: part(bytes, 56),
            tag: part(bytes, 120),
        })
    }
}

fn part<const N: usize>(bytes: &[u8; Envelope::LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn hex(text: &str) -> Vec<u8> {
        let digit = |c: char| u8::try_from(c.to_digit(16).unwrap()).unwrap();
        let digits: Vec<u8> = text.chars().filter(|c| !c.is_whitespace()).map(digit).collect();
        digits.chunks(2).map(|p| p[0] << 4 | p[1]).collect()
    }

    pub(crate) fn bytes<const N: usize>(text: &str) -> [u8; N] {
        hex(text).try_into().unwrap()
    }

    fn volume_key() -> VolumeKey {
        let text = "2718281828459045235360287471352662497757247093699959574966967627\
                    3141592653589793238462643383279502884197169399375105820974944592";
        VolumeKey::new(bytes(text)).unwrap()
    }

    fn counting() -> Kek {
        let bytes: Vec<u8> = (0..32).collect();
        Kek::parse(&bytes).unwrap()
    }

    /// Made with OpenSSL: AES-256-GCM of the key above under 00 01 .. 1f with nonce 00 .. 0b.
    #[test]
    fn a_key_is_wrapped_as_openssl_does_it() {
        let nonce: Vec<u8> = (0..12).collect();
        let envelope =
            counting().wrap(&volume_key(), VolumeId(7), nonce.clone().try_into().unwrap());
        let encoded = envelope.encode();
        assert_eq!(encoded[..8], [1, 0, 1, 0, 0, 0, 0, 0]);
        assert_eq!(encoded[8..24], hex("a1e71b1ba6e332daf9baa97b55edd6d6"));
        assert_eq!(encoded[24..40], hex("00000000000000000000000000000007"));
        assert_eq!(encoded[40..52], nonce);
        let sealed = "601afe03eda0525eae12f7a3c5984d4be19ff063d40bcc15a13eb2cc7bff7695\
                      3051f7dafc99850b57201d89bb040fadecd1211a4c453aed6e92a8106c77b07c\
                      97e8024f2a45f86d1a5334e65935403e";
        assert_eq!(encoded[56..], hex(sealed));
        assert_eq!(envelope.key_id.to_string(), "a1e71b1ba6e332daf9baa97b55edd6d6");
        let opened = counting().unwrap(&Envelope::decode(&encoded).unwrap()).unwrap();
        assert_eq!(opened.bytes(), volume_key().bytes());
    }

    #[test]
    fn another_key_and_a_changed_envelope_open_nothing() {
        let envelope = counting().wrap(&volume_key(), VolumeId(7), [9; 12]);
        let other = Kek::parse(&[7; 32]).unwrap();
        let error = other.unwrap(&envelope).unwrap_err();
        assert_eq!(error, UnwrapError::OtherKey { expected: counting().id(), found: other.id() });
        let encoded = envelope.encode();
        // The owner, the nonce, the key and the tag are covered; zeros are ignored.
        for at in (24..52).chain(56..Envelope::LEN) {
            let mut bad = encoded;
            bad[at] ^= 1;
            let bad = Envelope::decode(&bad).unwrap();
            assert_eq!(counting().unwrap(&bad).err(), Some(UnwrapError::Damaged), "{at}");
        }
        let mut later = encoded;
        later[0] = 2;
        assert_eq!(Envelope::decode(&later), Err(EnvelopeError::Version(2)));
        let mut cipher = encoded;
        cipher[2] = 9;
        assert_eq!(Envelope::decode(&cipher), Err(EnvelopeError::Cipher(9)));
        for len in 0..Envelope::LEN {
            assert!(Envelope::decode(&encoded[..len]).is_err());
        }
    }

    #[test]
    fn keys_are_read_raw_and_in_digits_and_are_not_repeated() {
        let digits = "000102030405060708090a0b0c0d0e0f101112131415161718191A1B1C1D1E1F";
        for text in [digits.to_owned(), format!("{digits}\n"), format!("  {digits}\r\n")] {
            assert_eq!(Kek::parse(text.as_bytes()).unwrap(), counting());
        }
        assert_eq!(Kek::parse(&[1; 31]).unwrap_err(), KeyError::Length(31));
        assert_eq!(Kek::parse(b"").unwrap_err(), KeyError::Length(0));
        assert_eq!(Kek::parse(&[b'g'; 64]).unwrap_err(), KeyError::Digits);
        assert_eq!(format!("{:?}", counting()), "Kek(a1e71b1ba6e332daf9baa97b55edd6d6)");
        assert_eq!(format!("{:?}", volume_key()), "VolumeKey");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Kek::parse(&bytes);
            if let Ok(envelope) = Envelope::decode(&bytes) {
                let _ = counting().unwrap(&envelope);
            }
        }
    }
}
