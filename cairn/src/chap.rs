//! CHAP secrets: read from a file, never stored, logged or shown.

use anyhow::{Context as _, Result, bail};
use cairn_engine::iscsi::chap::{Chap, Credentials};

use crate::keys;

/// The longest secret that is taken.
const MAX_SECRET: usize = 255;

/// Reads a file: in its first line a name and a secret, which initiators have to prove; in its second, where there is
/// one, those of the target.
pub(crate) fn read(path: &str, allow_open_file: bool) -> Result<Chap> {
    let bytes = keys::read_file(path, allow_open_file, "--allow-open-chap-file");
    let bytes = bytes.with_context(|| format!("the CHAP file {path}"))?;
    parse(&bytes).with_context(|| format!("the CHAP file {path}"))
}

fn parse(bytes: &[u8]) -> Result<Chap> {
    let text = std::str::from_utf8(bytes).context("it is not UTF-8")?;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let (initiator, target) = match lines.as_slice() {
        [initiator] => (initiator, None),
        [initiator, target] => (initiator, Some(credentials(target)?)),
        lines => bail!("it has {} lines; write one, NAME SECRET, or two", lines.len()),
    };
    Ok(Chap { initiator: credentials(initiator)?, target })
}

fn credentials(line: &str) -> Result<Credentials> {
    let Some((name, secret)) = line.split_once(char::is_whitespace) else {
        bail!("a line is not NAME SECRET");
    };
    let secret = secret.trim_start();
    if secret.len() > MAX_SECRET {
        bail!("the secret of `{name}` has more than {MAX_SECRET} characters");
    }
    Ok(Credentials { name: name.to_owned(), secret: secret.as_bytes().to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_for_initiators_and_the_second_for_the_target() {
        let one = parse(b"alice  a secret of hers\n\n").unwrap();
        assert_eq!((one.initiator.name.as_str(), one.target), ("alice", None));
        assert_eq!(one.initiator.secret, b"a secret of hers");
        let two = parse(b"alice aaaaaaaaaaaaaa\nthe-target bbbbbbbbbbbbbb\n").unwrap();
        assert_eq!(two.target.unwrap().name, "the-target");
        for wrong in [&b""[..], b"alice", b"a b\nc d\ne f\n", b"\xff\xff x"] {
            assert!(parse(wrong).is_err());
        }
        let long = format!("alice {}", "x".repeat(MAX_SECRET + 1));
        assert!(parse(long.as_bytes()).unwrap_err().to_string().contains("255"));
    }
}
