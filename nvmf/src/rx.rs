//! Reassembly of PDUs from a byte stream, for both ends.

use cairn_block::{BufSlice, Memory};

use crate::pdu::{COMMON_LEN, Common, Digests, Fes, Header, MAX_HEADER_LEN, Violation};
use crate::wire::{len32, u32_at};

/// Collects one header, however it was cut.
#[derive(Debug)]
pub(crate) struct HeaderReader {
    bytes: [u8; MAX_HEADER_LEN],
    have: usize,
    /// Once the common header is in: it says how long the whole one is.
    common: Option<Common>,
}

impl HeaderReader {
    pub(crate) fn new() -> Self {
        Self { bytes: [0; MAX_HEADER_LEN], have: 0, common: None }
    }

    /// Takes bytes up to the end of the header: how many, and the header once it is whole.
    pub(crate) fn feed(
        &mut self,
        bytes: &[u8],
        digests: Digests,
    ) -> (u32, Result<Option<Header>, Violation>) {
        let mut taken = 0;
        loop {
            let want = self.common.map_or(COMMON_LEN, |c| c.header_len() as usize);
            let n = (want - self.have).min(bytes.len() - taken);
            self.bytes[self.have..self.have + n].copy_from_slice(&bytes[taken..taken + n]);
            self.have += n;
            taken += n;
            if self.have < want {
                return (len32(taken), Ok(None));
            }
            if let Some(common) = self.common {
                return (len32(taken), self.finish(&common).map(Some));
            }
            match Common::decode(&self.bytes).and_then(|c| check_flags(c, digests)) {
                Ok(common) => self.common = Some(common),
                Err(violation) => return (len32(taken), Err(violation)),
            }
        }
    }

    fn finish(&self, common: &Common) -> Result<Header, Violation> {
        let hlen = usize::from(common.kind.hlen());
        if common.header_len() as usize > hlen
            && crc32c::crc32c(&self.bytes[..hlen]) != u32_at(&self.bytes, hlen)
        {
            return Err(Violation::of(Fes::HeaderDigest));
        }
        Header::decode(&self.bytes)
    }

    /// Forgets the last byte, so that the whole header is met again when it is offered once more.
    pub(crate) fn unread(&mut self) {
        self.have -= 1;
    }

    /// Ready for the next header.
    pub(crate) fn reset(&mut self) {
        self.have = 0;
        self.common = None;
    }

    /// The bytes of the header so far, for a TermReq.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.have]
    }
}

/// The digests that were agreed on are there, and no others.
fn check_flags(common: Common, digests: Digests) -> Result<Common, Violation> {
    use crate::pdu::{FLAG_DDGST, FLAG_HDGST, PduType};
    if matches!(
        common.kind,
        PduType::IcReq | PduType::IcResp | PduType::H2cTermReq | PduType::C2hTermReq
    ) {
        return Ok(common);
    }
    let header = common.flags & FLAG_HDGST != 0;
    let data = common.flags & FLAG_DDGST != 0;
    let has_data = common.plen > common.header_len();
    if header != digests.header || (has_data && data != digests.data) {
        return Err(Violation::field(1));
    }
    Ok(common)
}

/// The rest of a PDU: padding, data, data digest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Payload {
    pad: u32,
    data: u32,
    /// Data bytes still to come.
    left: u32,
    crc: u32,
    digest: [u8; 4],
    /// Digest bytes still to come.
    digest_left: u8,
    has_digest: bool,
}

impl Payload {
    pub(crate) fn new(common: &Common) -> Self {
        let has_digest = common.has_data_digest();
        Self {
            pad: common.pad_len(),
            data: common.data_len(),
            left: common.data_len(),
            crc: 0,
            digest: [0; 4],
            digest_left: if has_digest { 4 } else { 0 },
            has_digest,
        }
    }

    /// Where all of the data lies in `chunk`, which begins with what follows the header; nothing where some of it is yet
    /// to come.
    pub(crate) fn whole_data(&self, chunk: BufSlice) -> Option<BufSlice> {
        let here = chunk.len() >= self.pad + self.data;
        here.then(|| chunk.sub(self.pad, self.data))
    }

    /// Takes what of `chunk` belongs to the PDU: how many bytes. The data goes to `destination`,
    /// which is as long as the PDU's data, and may be where the data lies; without one it is dropped.
    pub(crate) fn feed<M: Memory>(
        &mut self,
        chunk: BufSlice,
        destination: Option<BufSlice>,
        mem: &mut M,
    ) -> u32 {
        let pad = self.pad.min(chunk.len());
        self.pad -= pad;
        let mut taken = pad;

        let n = self.left.min(chunk.len() - taken);
        if n > 0 {
            let source = chunk.sub(taken, n);
            if let Some(destination) = destination {
                if self.has_digest {
                    self.crc = crc32c::crc32c_append(self.crc, mem.bytes(source));
                }
                let destination = destination.sub(self.data - self.left, n);
                if destination != source {
                    mem.copy(source, destination);
                }
            }
            self.left -= n;
            taken += n;
        }

        while self.left == 0 && self.digest_left > 0 && taken < chunk.len() {
            let at = 4 - usize::from(self.digest_left);
            self.digest[at] = mem.bytes(chunk.sub(taken, 1))[0];
            self.digest_left -= 1;
            taken += 1;
        }
        taken
    }

    /// Whether the PDU has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.pad == 0 && self.left == 0 && self.digest_left == 0
    }

    /// Whether the data digest, if there is one, matches. Only for data that had a destination.
    pub(crate) fn digest_matches(&self) -> bool {
        !self.has_digest || u32::from_le_bytes(self.digest) == self.crc
    }
}
