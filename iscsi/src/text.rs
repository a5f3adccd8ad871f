//! Text keys: `key=value` pairs, each ended by a NUL (RFC 7143, section 6).

/// The longest key name.
const MAX_KEY_LEN: usize = 63;
/// The most text that one negotiation or one request may bring.
pub const MAX_TEXT_LEN: usize = 16 << 10;
/// The most pairs in it.
const MAX_PAIRS: usize = 256;

/// Text that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the text is not `key=value` pairs")]
pub struct MalformedText;

/// The pairs of a text, in order.
///
/// # Errors
/// What is not UTF-8, has no `=`, or a name that no key has.
pub fn parse(text: &[u8]) -> Result<Vec<(&str, &str)>, MalformedText> {
    let text = std::str::from_utf8(text).map_err(|_| MalformedText)?;
    let mut pairs = Vec::new();
    for pair in text.split('\0').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or(MalformedText)?;
        let named = key.bytes().all(|b| b.is_ascii_alphanumeric() || b".-+@_/#".contains(&b));
        if key.is_empty() || key.len() > MAX_KEY_LEN || !named || pairs.len() == MAX_PAIRS {
            return Err(MalformedText);
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// Appends a pair.
pub fn push(text: &mut Vec<u8>, key: &str, value: &str) {
    text.extend_from_slice(key.as_bytes());
    text.push(b'=');
    text.extend_from_slice(value.as_bytes());
    text.push(0);
}

/// A number: decimal, or hexadecimal after `0x`.
#[must_use]
pub fn number(value: &str) -> Option<u32> {
    match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            u32::from_str_radix(hex, 16).ok()
        }
        None if value.bytes().all(|b| b.is_ascii_digit()) => value.parse().ok(),
        _ => None,
    }
}

/// A binary value of at most `max` bytes: hexadecimal after `0x`, base64 after `0b`.
#[must_use]
pub fn binary(value: &str, max: usize) -> Option<Vec<u8>> {
    let (prefix, digits) = (value.get(..2)?, value.get(2..)?);
    let bytes = match prefix {
        "0x" | "0X" => from_hex(digits)?,
        "0b" | "0B" => from_base64(digits)?,
        _ => return None,
    };
    (!bytes.is_empty() && bytes.len() <= max).then_some(bytes)
}

/// A binary value as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut out = String::with_capacity(2 + 2 * bytes.len());
    out.push_str("0x");
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    out
}

/// An odd number of digits lacks a leading zero.
fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut out = Vec::with_capacity(digits.len() / 2 + 1);
    let (first, rest) = digits.as_bytes().split_at(digits.len() % 2);
    for b in first {
        out.push(digit(*b)?);
    }
    for pair in rest.chunks_exact(2) {
        out.push(digit(pair[0])? << 4 | digit(pair[1])?);
    }
    Some(out)
}

fn from_base64(digits: &str) -> Option<Vec<u8>> {
    let stripped = digits.trim_end_matches('=');
    if digits.len() - stripped.len() > 2 || stripped.len() % 4 == 1 {
        return None;
    }
    let mut out = Vec::with_capacity(stripped.len() * 3 / 4);
    let (mut bits, mut have) = (0_u32, 0);
    for b in stripped.bytes() {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        have += 6;
        if have >= 8 {
            have -= 8;
            out.push((bits >> have).to_le_bytes()[0]);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pairs_come_in_order() {
        let text = b"InitiatorName=iqn.a:b\0SessionType=Normal\0\0X-a=b=c\0";
        let pairs = parse(text).unwrap();
        assert_eq!(
            pairs,
            [("InitiatorName", "iqn.a:b"), ("SessionType", "Normal"), ("X-a", "b=c")]
        );
        assert_eq!(parse(b"nothing\0"), Err(MalformedText));
        assert_eq!(parse(b"=x\0"), Err(MalformedText));
        assert_eq!(parse(&[0xff, b'=', 0]), Err(MalformedText));
    }

    #[test]
    fn numbers_have_two_forms() {
        assert_eq!(number("262144"), Some(262_144));
        assert_eq!(number("0x40000"), Some(262_144));
        assert_eq!(number("-1"), None);
        assert_eq!(number("99999999999"), None);
        assert_eq!(number("0x+1"), None);
    }

    #[test]
    fn binary_values_have_two_forms() {
        assert_eq!(binary("0x0aff", 8).unwrap(), [0x0a, 0xff]);
        assert_eq!(binary("0xaff", 8).unwrap(), [0x0a, 0xff]);
        assert_eq!(binary("0bAQID", 8).unwrap(), [1, 2, 3]);
        assert_eq!(binary("0bAQ==", 8).unwrap(), [1]);
        for bad in ["", "0x", "0b", "12", "0xzz", "0bA", "0bAQ===", "0b*AAA", "0é"] {
            assert_eq!(binary(bad, 8), None, "{bad}");
        }
        assert_eq!(binary("0x010203", 2), None, "too long");
    }

    proptest! {
        #[test]
        fn hexadecimal_comes_back(bytes in prop::collection::vec(any::<u8>(), 1..40)) {
            prop_assert_eq!(binary(&hex(&bytes), 64), Some(bytes));
        }

        #[test]
        fn no_text_panics(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
            let text = String::from_utf8_lossy(&text);
            let _ = (number(&text), binary(&text, 100));
        }
    }
}
