//! Little-endian fields at fixed offsets. Callers pass slices whose length they have checked.

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let mut raw = [0; 2];
    raw.copy_from_slice(&bytes[at..at + 2]);
    u16::from_le_bytes(raw)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

/// Sixteen bytes in the order of a UUID: the first byte is the most significant.
pub(crate) fn u128_be_at(bytes: &[u8], at: usize) -> u128 {
    let mut raw = [0; 16];
    raw.copy_from_slice(&bytes[at..at + 16]);
    u128::from_be_bytes(raw)
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A text field of `len` bytes, cut to fit and filled up with `fill`.
pub(crate) fn put_text(bytes: &mut [u8], at: usize, len: usize, text: &str, fill: u8) {
    let field = &mut bytes[at..at + len];
    field.fill(fill);
    let n = text.len().min(len);
    field[..n].copy_from_slice(&text.as_bytes()[..n]);
}

/// A text field without the spaces and NULs that fill it up; nothing where it is not UTF-8.
pub(crate) fn text_at(bytes: &[u8], at: usize, len: usize) -> Option<&str> {
    let field = &bytes[at..at + len];
    let end = field.iter().position(|&b| b == 0).unwrap_or(len);
    core::str::from_utf8(&field[..end]).ok().map(|s| s.trim_end_matches(' '))
}

/// `len` as the width of a length field.
///
/// # Panics
/// Where it is over 4 GiB, which no buffer is.
pub(crate) fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("no buffer is over 4 GiB")
}
