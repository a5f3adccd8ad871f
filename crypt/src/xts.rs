//! AES-256-XTS over the blocks of a volume.

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, consts::U16};
use aes::{Aes256Dec, Aes256Enc};
use cairn_block::{BlockSize, Lba};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes of a volume's key: one AES-256 key for the data, one for the tweaks.
pub const DATA_KEY_LEN: usize = 64;

/// Bytes of an AES block.
const UNIT: usize = 16;
/// AES blocks that are handed to the cipher at a time: enough for what its widest instructions do in
/// parallel, few enough to stay in the nearest cache with their tweaks.
const BATCH: usize = 64;

/// Tweaks that are computed side by side: each from the one so many before it, as one after the other they
/// would take longer than the cipher.
const LANES: usize = 8;

type AesBlock = Array<u8, U16>;

/// The halves of a key are the same: XTS would not be as strong as its proof says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the two halves of the data key are the same; make another key from a random source")]
pub struct WeakKey;

/// The key of one volume, ready for use. Dropped, it is wiped from memory.
#[derive(ZeroizeOnDrop)]
pub struct VolumeKey {
    /// As it is wrapped.
    bytes: [u8; DATA_KEY_LEN],
    encrypt: Aes256Enc,
    decrypt: Aes256Dec,
    tweak: Aes256Enc,
}

impl std::fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VolumeKey")
    }
}

impl VolumeKey {
    /// The key of these random bytes: the first half for the data, the second for the tweaks.
    ///
    /// # Errors
    /// [`WeakKey`] where the halves are the same.
    pub fn new(mut bytes: [u8; DATA_KEY_LEN]) -> Result<Self, WeakKey> {
        let taken = Zeroizing::new(bytes);
        bytes.zeroize();
        let (data, tweak) = taken.split_at(DATA_KEY_LEN / 2);
        if data == tweak {
            return Err(WeakKey);
        }
        let encrypt = Aes256Enc::new_from_slice(data).expect("half of the key is 32 bytes");
        let decrypt = Aes256Dec::new_from_slice(data).expect("half of the key is 32 bytes");
        let tweak = Aes256Enc::new_from_slice(tweak).expect("half of the key is 32 bytes");
        Ok(Self { bytes: *taken, encrypt, decrypt, tweak })
    }

    pub(crate) fn bytes(&self) -> &[u8; DATA_KEY_LEN] {
        &self.bytes
    }

    /// Encrypts the blocks in `data`, of which the first is `first` of the volume.
    ///
    /// # Panics
    /// Where `data` is not whole blocks.
    pub fn encrypt(&self, first: Lba, block_size: BlockSize, data: &mut [u8]) {
        for (lba, block) in blocks(first, block_size, data) {
            self.transform(lba, block, |batch| self.encrypt.encrypt_blocks(batch));
        }
    }

    /// Decrypts the blocks in `data`, of which the first is `first` of the volume.
    ///
    /// A block of zeros stays one: that is what a block that was never written, or was discarded, reads
    /// as, and no ciphertext of a written one.
    ///
    /// # Panics
    /// Where `data` is not whole blocks.
    pub fn decrypt(&self, first: Lba, block_size: BlockSize, data: &mut [u8]) {
        for (lba, block) in blocks(first, block_size, data) {
            if !is_hole(block) {
                self.transform(lba, block, |batch| self.decrypt.decrypt_blocks(batch));
            }
        }
    }

    /// XTS over one data unit: XOR with the tweaks, the cipher, XOR with the tweaks.
    #[inline]
    fn transform(&self, lba: u64, block: &mut [u8], cipher: impl Fn(&mut [AesBlock])) {
        let mut seed = AesBlock::from(u128::from(lba).to_le_bytes());
        self.tweak.encrypt_block(&mut seed);
        let mut lanes = lanes(u128::from_le_bytes(seed.into()));
        let (units, rest) = AesBlock::slice_as_chunks_mut(block);
        assert!(rest.is_empty(), "a block is whole AES blocks");
        for batch in units.chunks_mut(BATCH) {
            let tweaks = following(&mut lanes);
            mask(batch, &tweaks);
            cipher(batch);
            mask(batch, &tweaks);
        }
    }
}

/// The blocks of `data` and their numbers.
fn blocks(
    first: Lba,
    block_size: BlockSize,
    data: &mut [u8],
) -> impl Iterator<Item = (u64, &mut [u8])> {
    let len = usize::try_from(block_size.bytes()).expect("a block is small");
    assert!(data.len().is_multiple_of(len), "{} bytes are not whole blocks", data.len());
    (first.0..).zip(data.chunks_exact_mut(len))
}

/// Whether a block reads as zeros. Nearly always the first bytes tell.
fn is_hole(block: &[u8]) -> bool {
    block[..UNIT] == [0; UNIT] && block.iter().all(|&b| b == 0)
}

#[inline]
fn mask(batch: &mut [AesBlock], tweaks: &[u128; BATCH]) {
    for (unit, tweak) in batch.iter_mut().zip(tweaks) {
        let masked = u128::from_le_bytes((*unit).into()) ^ tweak;
        *unit = masked.to_le_bytes().into();
    }
}

/// The first tweaks of a block: each is the one before it times x.
fn lanes(first: u128) -> [u128; LANES] {
    let mut lanes = [first; LANES];
    for i in 1..LANES {
        lanes[i] = times_x(lanes[i - 1]);
    }
    lanes
}

/// The tweaks of one batch. `lanes` are the first of them, and then those after the batch.
#[inline]
fn following(lanes: &mut [u128; LANES]) -> [u128; BATCH] {
    let mut tweaks = [0; BATCH];
    for chunk in tweaks.chunks_exact_mut(LANES) {
        chunk.copy_from_slice(lanes);
        for lane in lanes.iter_mut() {
            *lane = times_x8(*lane);
        }
    }
    tweaks
}

/// The product with x^8.
#[inline]
fn times_x8(tweak: u128) -> u128 {
    let carry = tweak >> 120;
    (tweak << 8) ^ carry ^ (carry << 1) ^ (carry << 2) ^ (carry << 7)
}

/// The product with x in GF(2^128), of polynomial x^128 + x^7 + x^2 + x + 1; without a branch, which
/// would tell of the tweak by its time.
#[inline]
fn times_x(tweak: u128) -> u128 {
    let carry = tweak >> 127;
    (tweak << 1) ^ (carry * 0x87)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wrap::tests::{bytes, hex};

    /// IEEE Std 1619-2007, annex B, vectors 10 to 14 have this key.
    const KEY: &str = "2718281828459045235360287471352662497757247093699959574966967627\
                       3141592653589793238462643383279502884197169399375105820974944592";

    fn key() -> VolumeKey {
        VolumeKey::new(bytes(KEY)).unwrap()
    }

    fn counting(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i % 256).unwrap()).collect()
    }

    /// IEEE Std 1619-2007, annex B, vector 10: XTS-AES-256, a data unit of 512 bytes, number ff.
    #[test]
    fn ieee_1619_vector_10() {
        let expected = hex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b\
             5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd\
             5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0\
             c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca\
             2a3e7a7d7df7b10355165c8b9a6d0a7de8b062c4500dc4cd120c0f7418dae3d0\
             b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f\
             93ec05c52e0493ef31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec\
             583e9645e07b8d9670655ba5bbcfecc6dc3966380ad8fecb17b6ba02469a020a\
             84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1\
             505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae\
             9be69a2ffeceb1bec9de244fbe15992b11b77c040f12bd8f6a975a44a0f90c29\
             a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac\
             6e333b93eb4aff0479da9a410e4450e0dd7ae4c6e2910900575da401fc07059f\
             645e8b7e9bfdef33943054ff84011493c27b3429eaedb4ed5376441a77ed4385\
             1ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa\
             773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151");
        let mut data = counting(512);
        key().encrypt(Lba(0xff), BlockSize::B512, &mut data);
        assert_eq!(data, expected);
        key().decrypt(Lba(0xff), BlockSize::B512, &mut data);
        assert_eq!(data, counting(512));
    }

    /// The standard has no vector of 4096 bytes: these are OpenSSL's. Number, first and last AES block, and
    /// the SHA-256 of the ciphertext.
    #[test]
    fn blocks_of_4096_bytes_are_as_openssl_makes_them() {
        use sha2::{Digest as _, Sha256};
        let vectors = [
            (
                0x0,
                "3a060a8cad115a6f44572e3759e43c8f",
                "4f5a4bc7a592f69d0c3c5a80d42dece5",
                "75ed487aa0520c5d5f42d2f3f83290b29f874cedba0360d3b5325e9e78bc444e",
            ),
            (
                0x1,
                "cdd765f24ea1d4ecfc5af7233967ef61",
                "455a3de50a2d8faca2281042d3c8168d",
                "f421417f34d05929b07529a3f55a9aea3661a9d757bef681f8d4b8e28642f806",
            ),
            (
                0xffffffff,
                "bf53d2dade78e822a4d949a9bc6766b0",
                "a8f67c2d3582ee0a3aa6e54164c46b10",
                "e09eb482c8082f956ac517ea9e4cbb18c075ec915189498c13e407893275a7e1",
            ),
            (
                0x123456789abcdef,
                "5efb5c1c85b22336959d5b7420126588",
                "46179e520d2755cdecdebef2930f4d0d",
                "b016783c474eda27faaa95143e9d8dbd7c00856e60bd624e5ede3b6c49d374ca",
            ),
        ];
        for (lba, first, last, digest) in vectors {
            let mut data = counting(4096);
            key().encrypt(Lba(lba), BlockSize::B4096, &mut data);
            assert_eq!(data[..16], hex(first), "{lba}");
            assert_eq!(data[4080..], hex(last), "{lba}");
            assert_eq!(Sha256::digest(&data)[..], hex(digest), "{lba}");
        }
    }

    #[test]
    fn blocks_of_zeros_are_holes_and_stay_so() {
        let mut data = vec![0; 3 * 4096];
        data[4096..8192].fill(7);
        let plain = data.clone();
        key().encrypt(Lba(5), BlockSize::B4096, &mut data[4096..8192]);
        // One that is zero only at its start is none.
        let mut late = vec![0; 4096];
        late[4095] = 1;
        key().decrypt(Lba(1), BlockSize::B4096, &mut late);
        assert_ne!(late[..16], [0; 16]);
        key().decrypt(Lba(4), BlockSize::B4096, &mut data);
        assert_eq!(data, plain);
        // A block of zeros that a host writes is not stored as one.
        key().encrypt(Lba(4), BlockSize::B4096, &mut data[..4096]);
        assert!(!is_hole(&data[..4096]));
    }

    #[test]
    fn a_key_of_equal_halves_is_refused() {
        assert_eq!(VolumeKey::new([3; DATA_KEY_LEN]).err(), Some(WeakKey));
    }

    proptest! {
        #[test]
        fn what_was_encrypted_decrypts_however_it_is_cut(
            seed in any::<u64>(),
            first in any::<u32>(),
            blocks in 1_usize..9,
            cut in 0_usize..9,
            small in any::<bool>(),
        ) {
            let (size, len) = if small { (BlockSize::B512, 512) } else { (BlockSize::B4096, 4096) };
            let first = u64::from(first);
            let plain: Vec<u8> = (0..blocks * len)
                .map(|i| (seed.wrapping_mul(i as u64 + 1) >> 24).to_le_bytes()[0])
                .collect();
            let mut whole = plain.clone();
            key().encrypt(Lba(first), size, &mut whole);
            for (a, b) in plain.chunks(len).zip(whole.chunks(len)) {
                prop_assert_ne!(a, b);
            }
            // Each block stands for itself: a request split anywhere gives the same bytes.
            let cut = cut.min(blocks);
            let mut parts = plain.clone();
            let (head, tail) = parts.split_at_mut(cut * len);
            key().encrypt(Lba(first), size, head);
            key().encrypt(Lba(first + cut as u64), size, tail);
            prop_assert_eq!(&parts, &whole);
            key().decrypt(Lba(first), size, &mut whole);
            prop_assert_eq!(whole, plain);
        }
    }
}
