//! Big-endian fields at fixed offsets. Callers pass slices whose length they have checked.

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let mut raw = [0; 2];
    raw.copy_from_slice(&bytes[at..at + 2]);
    u16::from_be_bytes(raw)
}

/// Three bytes.
pub(crate) fn u24_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([0, bytes[at], bytes[at + 1], bytes[at + 2]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(raw)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(raw)
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The low three bytes of `value`.
pub(crate) fn put_u24(bytes: &mut [u8], at: usize, value: u32) {
    put(bytes, at, &value.to_be_bytes()[1..]);
}

/// A text field of `len` bytes, cut to fit and filled up with spaces.
pub(crate) fn put_text(bytes: &mut [u8], at: usize, len: usize, text: &str) {
    let field = &mut bytes[at..at + len];
    field.fill(b' ');
    let n = text.len().min(len);
    field[..n].copy_from_slice(&text.as_bytes()[..n]);
}

/// `len` as the width of a length field.
///
/// # Panics
/// Where it is over 4 GiB, which no buffer is.
pub(crate) fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("no buffer is over 4 GiB")
}

/// The bytes that fill `len` up to whole words.
pub(crate) const fn pad_len(len: u32) -> u32 {
    len.wrapping_neg() & 3
}

/// Serial number arithmetic (RFC 1982): whether `a` comes before `b`.
pub(crate) const fn serial_lt(a: u32, b: u32) -> bool {
    a != b && b.wrapping_sub(a) < 1 << 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_wrap() {
        assert!(serial_lt(1, 2) && !serial_lt(2, 1) && !serial_lt(2, 2));
        assert!(serial_lt(u32::MAX, 0) && !serial_lt(0, u32::MAX));
    }

    #[test]
    fn padding_fills_words() {
        assert_eq!([0, 1, 2, 3, 4, 5].map(pad_len), [0, 3, 2, 1, 0, 3]);
    }
}
