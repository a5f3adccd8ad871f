//! The data structures of Identify, each 4096 bytes.

use cairn_block::BlockSize;

use crate::wire::{put, put_text, text_at, u16_at, u32_at, u64_at, u128_be_at};

/// Bytes of every Identify data structure.
pub const IDENTIFY_LEN: usize = 4096;

/// Controller or Namespace Structure.
pub mod cns {
    /// Identify Namespace, NVM command set.
    pub const NAMESPACE: u8 = 0x00;
    /// Identify Controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active Namespace ID list.
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    /// Namespace Identification Descriptor list.
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    /// I/O Command Set specific Identify Namespace.
    pub const NAMESPACE_CSI: u8 = 0x05;
    /// I/O Command Set specific Identify Controller.
    pub const CONTROLLER_CSI: u8 = 0x06;
    /// I/O Command Set specific Active Namespace ID list.
    pub const ACTIVE_NAMESPACES_CSI: u8 = 0x07;
    /// I/O Command Set Independent Identify Namespace.
    pub const NAMESPACE_INDEPENDENT: u8 = 0x08;
    /// I/O Command Set combinations.
    pub const COMMAND_SETS: u8 = 0x1c;
}

/// CNTRLTYPE: a controller with namespaces.
pub const CNTRLTYPE_IO: u8 = 1;
/// CNTRLTYPE: a discovery controller.
pub const CNTRLTYPE_DISCOVERY: u8 = 2;

/// The fields of Identify Controller that Cairn states, or acts on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IdentifyController {
    /// SN, at most 20 bytes.
    pub serial: String,
    /// MN, at most 40 bytes.
    pub model: String,
    /// FR, at most 8 bytes.
    pub firmware: String,
    /// CMIC.
    pub cmic: u8,
    /// MDTS: a power of two of 4 KiB, 0 for no limit.
    pub mdts: u8,
    /// CNTLID.
    pub cntlid: u16,
    /// VER.
    pub version: u32,
    /// OAES.
    pub oaes: u32,
    /// CTRATT.
    pub ctratt: u32,
    /// CNTRLTYPE.
    pub cntrltype: u8,
    /// LPA.
    pub lpa: u8,
    /// AERL, 0's based.
    pub aerl: u8,
    /// ACL, 0's based.
    pub acl: u8,
    /// ELPE, 0's based.
    pub elpe: u8,
    /// KAS: 100 ms units.
    pub kas: u16,
    /// ANATT, in seconds.
    pub anatt: u8,
    /// ANACAP.
    pub anacap: u8,
    /// ANAGRPMAX.
    pub anagrpmax: u32,
    /// NANAGRPID.
    pub nanagrpid: u32,
    /// SQES.
    pub sqes: u8,
    /// CQES.
    pub cqes: u8,
    /// MAXCMD.
    pub maxcmd: u16,
    /// NN.
    pub nn: u32,
    /// ONCS.
    pub oncs: u16,
    /// VWC.
    pub vwc: u8,
    /// SGLS.
    pub sgls: u32,
    /// MNAN.
    pub mnan: u32,
    /// SUBNQN, at most 223 bytes.
    pub subnqn: String,
    /// IOCCSZ: 16-byte units.
    pub ioccsz: u32,
    /// IORCSZ: 16-byte units.
    pub iorcsz: u32,
    /// ICDOFF: 16-byte units.
    pub icdoff: u16,
    /// MSDBD.
    pub msdbd: u8,
    /// OFCS.
    pub ofcs: u16,
}

impl IdentifyController {
    /// Writes the structure over the first 4096 bytes of `out`.
    ///
    /// # Panics
    /// Where `out` is shorter.
    pub fn encode(&self, out: &mut [u8]) {
        let out = &mut out[..IDENTIFY_LEN];
        out.fill(0);
        put_text(out, 4, 20, &self.serial, b' ');
        put_text(out, 24, 40, &self.model, b' ');
        put_text(out, 64, 8, &self.firmware, b' ');
        out[76] = self.cmic;
        out[77] = self.mdts;
        put(out, 78, &self.cntlid.to_le_bytes());
        put(out, 80, &self.version.to_le_bytes());
        put(out, 92, &self.oaes.to_le_bytes());
        put(out, 96, &self.ctratt.to_le_bytes());
        out[111] = self.cntrltype;
        out[258] = self.acl;
        out[259] = self.aerl;
        // FRMW: slot 1, and it is read only.
        out[260] = 0x03;
        out[261] = self.lpa;
        out[262] = self.elpe;
        put(out, 320, &self.kas.to_le_bytes());
        out[342] = self.anatt;
        out[343] = self.anacap;
        put(out, 344, &self.anagrpmax.to_le_bytes());
        put(out, 348, &self.nanagrpid.to_le_bytes());
        out[512] = self.sqes;
        out[513] = self.cqes;
        put(out, 514, &self.maxcmd.to_le_bytes());
        put(out, 516, &self.nn.to_le_bytes());
        put(out, 520, &self.oncs.to_le_bytes());
        out[525] = self.vwc;
        put(out, 536, &self.sgls.to_le_bytes());
        put(out, 540, &self.mnan.to_le_bytes());
        put_text(out, 768, 256, &self.subnqn, 0);
        put(out, 1792, &self.ioccsz.to_le_bytes());
        put(out, 1796, &self.iorcsz.to_le_bytes());
        put(out, 1800, &self.icdoff.to_le_bytes());
        out[1803] = self.msdbd;
        put(out, 1804, &self.ofcs.to_le_bytes());
    }

    /// Reads the structure; nothing where it is short or a text is not UTF-8.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..IDENTIFY_LEN)?;
        Some(Self {
            serial: text_at(bytes, 4, 20)?.to_owned(),
            model: text_at(bytes, 24, 40)?.to_owned(),
            firmware: text_at(bytes, 64, 8)?.to_owned(),
            cmic: bytes[76],
            mdts: bytes[77],
            cntlid: u16_at(bytes, 78),
            version: u32_at(bytes, 80),
            oaes: u32_at(bytes, 92),
            ctratt: u32_at(bytes, 96),
            cntrltype: bytes[111],
            lpa: bytes[261],
            aerl: bytes[259],
            acl: bytes[258],
            elpe: bytes[262],
            kas: u16_at(bytes, 320),
            anatt: bytes[342],
            anacap: bytes[343],
            anagrpmax: u32_at(bytes, 344),
            nanagrpid: u32_at(bytes, 348),
            sqes: bytes[512],
            cqes: bytes[513],
            maxcmd: u16_at(bytes, 514),
            nn: u32_at(bytes, 516),
            oncs: u16_at(bytes, 520),
            vwc: bytes[525],
            sgls: u32_at(bytes, 536),
            mnan: u32_at(bytes, 540),
            subnqn: text_at(bytes, 768, 256)?.to_owned(),
            ioccsz: u32_at(bytes, 1792),
            iorcsz: u32_at(bytes, 1796),
            icdoff: u16_at(bytes, 1800),
            msdbd: bytes[1803],
            ofcs: u16_at(bytes, 1804),
        })
    }
}

/// VSL, Verify Size Limit: a power of two of [`PAGE_LEN`]. 1 MiB.
pub const VSL: u8 = 8;
/// CAP.MPSMIN: the unit of VSL, in bytes.
pub const PAGE_LEN: u32 = 4096;

/// Writes Identify Controller of the NVM command set over the first 4096 bytes of `out`: VSL; no other
/// limits but MDTS.
///
/// # Panics
/// Where `out` is shorter.
pub fn encode_nvm_controller(out: &mut [u8]) {
    let out = &mut out[..IDENTIFY_LEN];
    out.fill(0);
    out[0] = VSL;
}

/// The fields of Identify Namespace that vary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IdentifyNamespace {
    /// NSZE and NCAP, in blocks.
    pub blocks: u64,
    /// The size of a block; nothing for one that Cairn does not serve.
    pub block_size: Option<BlockSize>,
    /// Metadata bytes of a block.
    pub metadata_len: u16,
    /// ANAGRPID; 0 where ANA is not reported.
    pub ana_group: u32,
    /// RESCAP.
    pub rescap: u8,
    /// NGUID, its first byte the most significant.
    pub nguid: u128,
}

/// The unit that a write never tears, in bytes.
const ATOMIC_LEN: u32 = 4096;
/// What reads and writes had better not cross, in bytes.
const BOUNDARY_LEN: u32 = 1 << 20;
/// The write size that suits best, in bytes.
const OPTIMAL_WRITE_LEN: u32 = 128 << 10;

impl IdentifyNamespace {
    /// Writes the structure over the first 4096 bytes of `out`.
    ///
    /// # Panics
    /// Where `out` is shorter.
    pub fn encode(&self, out: &mut [u8]) {
        let out = &mut out[..IDENTIFY_LEN];
        out.fill(0);
        let block_size = self.block_size.unwrap_or_default();
        let blocks_of = |len: u32| u16::try_from(len >> block_size.shift()).unwrap_or(u16::MAX);
        let atomic = (blocks_of(ATOMIC_LEN) - 1).to_le_bytes();
        for at in [0, 8, 16] {
            put(out, at, &self.blocks.to_le_bytes());
        }
        // NSFEAT: the atomicity fields and the preferred granularities below are valid.
        out[24] = 1 << 1 | 1 << 4;
        // NMIC: other controllers may attach.
        out[30] = 1;
        out[31] = self.rescap;
        // DLFEAT: deallocated blocks read as zeros; Write Zeroes may deallocate.
        out[33] = 1 | 1 << 3;
        // NAWUN, NAWUPF, NACWU.
        for at in [34, 36, 38] {
            put(out, at, &atomic);
        }
        put(out, 46, &blocks_of(BOUNDARY_LEN).to_le_bytes());
        // NPWG, NPWA, NPDG, NPDA.
        for at in [64, 66, 68, 70] {
            put(out, at, &atomic);
        }
        put(out, 72, &(blocks_of(OPTIMAL_WRITE_LEN) - 1).to_le_bytes());
        put(out, 92, &self.ana_group.to_le_bytes());
        put(out, 104, &self.nguid.to_be_bytes());
        put(out, 128, &self.metadata_len.to_le_bytes());
        out[130] = block_size.shift();
    }

    /// Reads the structure, with the format that FLBAS names; nothing where it is short.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..IDENTIFY_LEN)?;
        let format = usize::from(bytes[26] & 0x0f | (bytes[26] & 0x60) >> 1);
        let lbaf = 128 + 4 * format;
        Some(Self {
            blocks: u64_at(bytes, 0),
            block_size: 1u32
                .checked_shl(u32::from(bytes[lbaf + 2]))
                .and_then(BlockSize::from_bytes),
            metadata_len: u16_at(bytes, lbaf),
            ana_group: u32_at(bytes, 92),
            rescap: bytes[31],
            nguid: u128_be_at(bytes, 104),
        })
    }
}

/// Writes an Active Namespace ID list: the ids above `after`, ascending, as many as fit.
pub fn encode_active_namespaces(nsids: impl Iterator<Item = u32>, after: u32, out: &mut [u8]) {
    let out = &mut out[..IDENTIFY_LEN];
    out.fill(0);
    for (entry, nsid) in out.chunks_exact_mut(4).zip(nsids.filter(|&nsid| nsid > after)) {
        entry.copy_from_slice(&nsid.to_le_bytes());
    }
}

/// The ids of an Active Namespace ID list.
pub fn active_namespaces(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|entry| u32_at(entry, 0)).take_while(|&nsid| nsid != 0)
}

/// Writes the Namespace Identification Descriptor list: NGUID, UUID and CSI.
pub fn encode_descriptors(id: u128, out: &mut [u8]) {
    let out = &mut out[..IDENTIFY_LEN];
    out.fill(0);
    let mut at = 0;
    for (nidt, value) in [(2, id.to_be_bytes()), (3, id.to_be_bytes())] {
        out[at] = nidt;
        out[at + 1] = 16;
        put(out, at + 4, &value);
        at += 20;
    }
    // CSI 0: the NVM command set.
    out[at] = 4;
    out[at + 1] = 1;
}

/// The UUID, or else the NGUID, of a Namespace Identification Descriptor list.
#[must_use]
pub fn descriptor_id(bytes: &[u8]) -> Option<u128> {
    let mut nguid = None;
    let mut at = 0;
    while let Some(&[nidt, nidl, ..]) = bytes.get(at..at + 4) {
        let value = bytes.get(at + 4..at + 4 + usize::from(nidl))?;
        match (nidt, nidl) {
            (_, 0) => break,
            (2, 16) => nguid = Some(u128_be_at(value, 0)),
            (3, 16) => return Some(u128_be_at(value, 0)),
            _ => {}
        }
        at += 4 + usize::from(nidl);
    }
    nguid
}

/// Writes the I/O Command Set Independent Identify Namespace structure.
pub fn encode_independent(volatile_write_cache: bool, ana_group: u32, rescap: u8, out: &mut [u8]) {
    let out = &mut out[..IDENTIFY_LEN];
    out.fill(0);
    // NSFEAT b5: no volatile write cache here, whatever the controller's VWC says.
    out[0] = if volatile_write_cache { 0 } else { 1 << 5 };
    out[1] = 1;
    out[2] = rescap;
    put(out, 4, &ana_group.to_le_bytes());
    // NSTAT: ready.
    out[14] = 1;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn controllers_survive_the_wire(
            serial in "[!-~]{1,20}",
            subnqn in "nqn\\.[a-z0-9.:-]{4,100}",
            numbers in any::<[u32; 8]>(),
            small in any::<[u8; 8]>(),
        ) {
            let made = IdentifyController {
                serial,
                model: "Cairn".into(),
                firmware: "0.1".into(),
                subnqn,
                cmic: small[0],
                mdts: small[1],
                cntlid: u16::from(small[2]),
                version: numbers[0],
                oaes: numbers[1],
                ctratt: numbers[2],
                cntrltype: small[3],
                lpa: small[4],
                aerl: small[5],
                acl: small[6],
                elpe: small[7],
                nn: numbers[3],
                sgls: numbers[4],
                mnan: numbers[5],
                ioccsz: numbers[6],
                nanagrpid: numbers[7],
                anacap: small[7],
                iorcsz: numbers[7],
                ..IdentifyController::default()
            };
            let mut bytes = [0xff; IDENTIFY_LEN];
            made.encode(&mut bytes);
            prop_assert_eq!(IdentifyController::decode(&bytes), Some(made));
        }

        #[test]
        fn namespaces_survive_the_wire(
            blocks in any::<u64>(),
            nguid in any::<u128>(),
            big in any::<bool>(),
            ana_group in any::<u32>(),
            rescap in any::<u8>(),
        ) {
            let block_size = Some(if big { BlockSize::B4096 } else { BlockSize::B512 });
            let made = IdentifyNamespace { blocks, block_size, metadata_len: 0, nguid, ana_group, rescap };
            let mut bytes = [0xff; IDENTIFY_LEN];
            made.encode(&mut bytes);
            prop_assert_eq!(IdentifyNamespace::decode(&bytes), Some(made));
            encode_descriptors(nguid, &mut bytes);
            prop_assert_eq!(descriptor_id(&bytes), Some(nguid));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 4000..4200)) {
            let _ = IdentifyController::decode(&bytes);
            let _ = IdentifyNamespace::decode(&bytes);
            let _ = descriptor_id(&bytes);
            let _ = active_namespaces(&bytes).count();
        }
    }

    /// Linux takes the smaller of NPWG and NAWUPF as the physical block size.
    #[test]
    fn a_512_byte_namespace_states_4_kib_atomicity() {
        let mut bytes = [0; IDENTIFY_LEN];
        let block_size = Some(BlockSize::B512);
        IdentifyNamespace { blocks: 1, block_size, ..IdentifyNamespace::default() }
            .encode(&mut bytes);
        assert_eq!((u16_at(&bytes, 36), u16_at(&bytes, 64), u16_at(&bytes, 46)), (7, 7, 2048));
        assert_eq!(bytes[33], 0x09);
    }

    #[test]
    fn lists_begin_after_the_id_given() {
        let mut bytes = [0; IDENTIFY_LEN];
        encode_active_namespaces([1, 4, 9].into_iter(), 1, &mut bytes);
        assert_eq!(active_namespaces(&bytes).collect::<Vec<_>>(), [4, 9]);
    }
}
