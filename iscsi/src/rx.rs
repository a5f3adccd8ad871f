//! Reassembly of PDUs from a byte stream.

use cairn_block::{BufSlice, Memory};

use crate::pdu::{BHS_LEN, DIGEST_LEN, MAX_AHS_LEN, lengths};
use crate::wire::pad_len;

/// The digests in use (keys HeaderDigest and DataDigest).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digests {
    /// CRC-32C over each header.
    pub header: bool,
    /// CRC-32C over each data segment with its padding.
    pub data: bool,
}

/// Collects one header with its additional segments and its digest, however it was cut.
#[derive(Debug)]
pub(crate) struct HeaderReader {
    bytes: [u8; BHS_LEN + MAX_AHS_LEN + DIGEST_LEN as usize],
    have: usize,
}

/// The header digest does not match: nothing after it can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadHeaderDigest;

impl HeaderReader {
    pub(crate) fn new() -> Self {
        Self { bytes: [0; BHS_LEN + MAX_AHS_LEN + DIGEST_LEN as usize], have: 0 }
    }

    /// Takes bytes up to the end of the header: how many, and whether the header is whole.
    pub(crate) fn feed(
        &mut self,
        bytes: &[u8],
        digest: bool,
    ) -> (usize, Result<bool, BadHeaderDigest>) {
        let mut taken = 0;
        loop {
            let want = self.want(digest);
            let n = (want - self.have).min(bytes.len() - taken);
            self.bytes[self.have..self.have + n].copy_from_slice(&bytes[taken..taken + n]);
            self.have += n;
            taken += n;
            if self.have < want {
                return (taken, Ok(false));
            }
            if self.have == self.want(digest) {
                break;
            }
        }
        if digest {
            let (covered, digest) = self.bytes[..self.have].split_at(self.have - 4);
            if crc32c::crc32c(covered).to_le_bytes() != digest {
                return (taken, Err(BadHeaderDigest));
            }
        }
        (taken, Ok(true))
    }

    /// Bytes of the whole header, as far as that is known.
    fn want(&self, digest: bool) -> usize {
        if self.have < BHS_LEN {
            return BHS_LEN;
        }
        let digest_len = if digest { DIGEST_LEN as usize } else { 0 };
        BHS_LEN + usize::from(self.bytes[4]) * 4 + digest_len
    }

    /// The basic header segment.
    pub(crate) fn bhs(&self) -> [u8; BHS_LEN] {
        let mut bhs = [0; BHS_LEN];
        bhs.copy_from_slice(&self.bytes[..BHS_LEN]);
        bhs
    }

    /// The additional header segments of a whole header.
    pub(crate) fn ahs(&self) -> &[u8] {
        let (ahs_len, _) = lengths(&self.bhs());
        &self.bytes[BHS_LEN..BHS_LEN + ahs_len as usize]
    }

    /// Forgets the last byte, so that the whole header is met again when it is offered once more.
    pub(crate) fn unread(&mut self) {
        self.have -= 1;
    }

    /// Ready for the next header.
    pub(crate) fn reset(&mut self) {
        self.have = 0;
    }
}

/// The rest of a PDU: data, padding, data digest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Payload {
    /// Data bytes that have come.
    at: u32,
    /// Data bytes still to come.
    left: u32,
    pad: u32,
    crc: u32,
    digest: [u8; 4],
    /// Digest bytes still to come.
    digest_left: u8,
    has_digest: bool,
}

impl Payload {
    pub(crate) fn new(data_len: u32, digest: bool) -> Self {
        let has_digest = digest && data_len > 0;
        Self {
            at: 0,
            left: data_len,
            pad: pad_len(data_len),
            crc: 0,
            digest: [0; 4],
            digest_left: if has_digest { 4 } else { 0 },
            has_digest,
        }
    }

    /// Takes what of `chunk` belongs to the PDU: how many bytes. Data goes to `keep`, piece by
    /// piece, with its position within the PDU.
    pub(crate) fn feed<M: Memory>(
        &mut self,
        chunk: BufSlice,
        mem: &mut M,
        mut keep: impl FnMut(&mut M, u32, BufSlice),
    ) -> u32 {
        let n = self.left.min(chunk.len());
        let mut taken = n;
        if n > 0 {
            let source = chunk.sub(0, n);
            if self.has_digest {
                self.crc = crc32c::crc32c_append(self.crc, mem.bytes(source));
            }
            keep(mem, self.at, source);
            self.at += n;
            self.left -= n;
        }
        let pad = if self.left == 0 { self.pad.min(chunk.len() - taken) } else { 0 };
        if pad > 0 {
            if self.has_digest {
                self.crc = crc32c::crc32c_append(self.crc, mem.bytes(chunk.sub(taken, pad)));
            }
            self.pad -= pad;
            taken += pad;
        }
        while self.left == 0 && self.pad == 0 && self.digest_left > 0 && taken < chunk.len() {
            let at = 4 - usize::from(self.digest_left);
            self.digest[at] = mem.bytes(chunk.sub(taken, 1))[0];
            self.digest_left -= 1;
            taken += 1;
        }
        taken
    }

    /// Whether the PDU has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.left == 0 && self.pad == 0 && self.digest_left == 0
    }

    /// Whether the data digest, if there is one, matches.
    pub(crate) fn digest_matches(&self) -> bool {
        !self.has_digest || u32::from_le_bytes(self.digest) == self.crc
    }
}
