//! What a logical unit says of itself: INQUIRY, vital product data, capacity, ports and LUNs.

use super::cdb::op;
use super::sense::Sense;
use super::unit::UnitConfig;
use crate::pdu::encode_lun;
use crate::wire::{len32, put, put_text};

/// What all logical units of a target have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// T10 VENDOR IDENTIFICATION, at most 8 bytes.
    pub vendor: String,
    /// PRODUCT IDENTIFICATION, at most 16 bytes.
    pub product: String,
    /// PRODUCT REVISION LEVEL, at most 4 bytes.
    pub revision: String,
}

/// Where a command came in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PortView<'a> {
    pub(crate) iqn: &'a str,
    /// The target portal group tag, which is also the relative target port.
    pub(crate) portal_group: u16,
    /// The target port group of that port.
    pub(crate) port_group: u16,
}

/// The most bytes that one command transfers, and others' limits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Of one request of the disk.
    pub(crate) max_data_len: u32,
    /// Of one command.
    pub(crate) max_transfer_len: u32,
}

/// Bytes that WRITE SAME writes at most.
const WRITE_SAME_LEN: u64 = 16 << 20;
/// Bytes that one range of UNMAP frees at most.
const UNMAP_LEN: u64 = 1 << 30;
/// Blocks of one range at most.
const UNMAP_BLOCKS: u32 = 1 << 20;
/// Ranges of one UNMAP at most.
pub(crate) const MAX_UNMAP_RANGES: u32 = 256;

/// LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT.
fn physical_exponent(unit: &UnitConfig) -> u8 {
    unit.physical_block_size.shift().saturating_sub(unit.block_size.shift())
}

impl Limits {
    /// OPTIMAL TRANSFER LENGTH, in blocks: what is one request of the disk.
    pub(crate) fn step(self, unit: &UnitConfig) -> u32 {
        self.max_data_len >> unit.block_size.shift()
    }

    /// MAXIMUM TRANSFER LENGTH, in blocks.
    pub(crate) fn transfer(self, unit: &UnitConfig) -> u32 {
        self.max_transfer_len >> unit.block_size.shift()
    }

    /// MAXIMUM COMPARE AND WRITE LENGTH: it brings its data twice.
    pub(crate) fn compare_and_write(self, unit: &UnitConfig) -> u8 {
        u8::try_from(self.step(unit) / 2).unwrap_or(u8::MAX)
    }

    /// MAXIMUM ATOMIC TRANSFER LENGTH, in blocks; 0 where there is no WRITE ATOMIC.
    pub(crate) fn atomic(self, unit: &UnitConfig) -> u32 {
        unit.atomic_blocks.min(self.step(unit))
    }

    pub(crate) fn write_same(self, unit: &UnitConfig) -> u64 {
        WRITE_SAME_LEN >> unit.block_size.shift()
    }

    /// MAXIMUM UNMAP LBA COUNT.
    pub(crate) fn unmap(self, unit: &UnitConfig) -> u32 {
        u32::try_from(UNMAP_LEN >> unit.block_size.shift()).unwrap_or(u32::MAX).min(UNMAP_BLOCKS)
    }
}

/// Bytes of standard INQUIRY data.
const STANDARD_LEN: usize = 96;
/// PERIPHERAL QUALIFIER and DEVICE TYPE where there is no logical unit.
const NO_UNIT: u8 = 0x7f;
/// Those of the REPORT LUNS well known logical unit.
const WELL_KNOWN: u8 = 0x1e;

/// What INQUIRY is asked of.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Subject {
    Unit { removable: bool },
    WellKnown,
    Nothing,
}

/// Standard INQUIRY data.
pub(crate) fn standard(subject: Subject, product: &Product) -> Vec<u8> {
    let mut b = vec![0; STANDARD_LEN];
    b[0] = match subject {
        Subject::Unit { .. } => 0,
        Subject::WellKnown => WELL_KNOWN,
        Subject::Nothing => NO_UNIT,
    };
    // RMB.
    if matches!(subject, Subject::Unit { removable: true }) {
        b[1] = 0x80;
    }
    // SPC-4; HISUP and format 2; TPGS: implicit; 3PC; MULTIP; CMDQUE.
    b[2] = 0x06;
    b[3] = 0x12;
    b[4] = STANDARD_LEN.to_le_bytes()[0] - 5;
    b[5] = 0x10 | 0x08;
    b[6] = 0x10;
    b[7] = 0x02;
    put_text(&mut b, 8, 8, &product.vendor);
    put_text(&mut b, 16, 16, &product.product);
    put_text(&mut b, 32, 4, &product.revision);
    // SAM-5, SPC-4, SBC-3, iSCSI.
    for (i, version) in [0x00a0_u16, 0x0460, 0x04c0, 0x0960].into_iter().enumerate() {
        put(&mut b, 58 + 2 * i, &version.to_be_bytes());
    }
    b
}

const SUPPORTED_PAGES: u8 = 0x00;
const SERIAL_NUMBER: u8 = 0x80;
const IDENTIFICATION: u8 = 0x83;
const EXTENDED: u8 = 0x86;
const THIRD_PARTY_COPY: u8 = 0x8f;
const BLOCK_LIMITS: u8 = 0xb0;
const CHARACTERISTICS: u8 = 0xb1;
const PROVISIONING: u8 = 0xb2;

/// A page of vital product data.
///
/// # Errors
/// INVALID FIELD IN CDB for a page that there is not.
pub(crate) fn vital(
    page: u8,
    unit: &UnitConfig,
    product: &Product,
    port: PortView<'_>,
    limits: Limits,
) -> Result<Vec<u8>, Sense> {
    let mut b = vec![0, page, 0, 0];
    match page {
        SUPPORTED_PAGES => b.extend_from_slice(&[
            SUPPORTED_PAGES,
            SERIAL_NUMBER,
            IDENTIFICATION,
            EXTENDED,
            THIRD_PARTY_COPY,
            BLOCK_LIMITS,
            CHARACTERISTICS,
            PROVISIONING,
        ]),
        SERIAL_NUMBER => b.extend_from_slice(serial(unit).as_bytes()),
        IDENTIFICATION => identification(&mut b, unit, product, port),
        EXTENDED => {
            b.resize(64, 0);
            // SIMPSUP, ORDSUP, HEADSUP; V_SUP.
            b[5] = 0x07;
            b[6] = u8::from(unit.volatile_write_cache);
        }
        THIRD_PARTY_COPY => third_party_copy(&mut b),
        BLOCK_LIMITS => block_limits(&mut b, unit, limits),
        CHARACTERISTICS => {
            b.resize(64, 0);
            // MEDIUM ROTATION RATE: does not rotate.
            b[5] = 1;
            // WABEREQ: what was erased reads as zeros, and need not be written first.
            b[7] = 0x40;
        }
        PROVISIONING => {
            // LBPU, LBPWS, LBPWS10; LBPRZ: what is not mapped reads as zeros; thin.
            b.extend_from_slice(&[0, 0x80 | 0x40 | 0x20 | 0x04, 2, 0]);
        }
        _ => return Err(Sense::invalid_cdb(2, 7)),
    }
    let len = u16::try_from(b.len() - 4).unwrap_or(0);
    put(&mut b, 2, &len.to_be_bytes());
    Ok(b)
}

/// The PRODUCT SERIAL NUMBER: the volume's id.
fn serial(unit: &UnitConfig) -> String {
    format!("{:032x}", unit.id)
}

/// The NAA designator, locally assigned: there is no company id of ours to begin one with.
pub(crate) fn naa(unit: &UnitConfig) -> [u8; 8] {
    let bytes = unit.id.to_be_bytes();
    let mut out = [0; 8];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = bytes[i] ^ bytes[i + 8];
    }
    out[0] = 0x30 | out[0] & 0x0f;
    out
}

fn designator(b: &mut Vec<u8>, code_set: u8, flags_type: u8, value: &[u8]) {
    b.extend_from_slice(&[code_set, flags_type, 0, value.len().to_le_bytes()[0]]);
    b.extend_from_slice(value);
}

/// An iSCSI name, with a NUL and filled up to whole words.
fn name_string(text: &str) -> Vec<u8> {
    let mut out = text.as_bytes().to_vec();
    out.resize((text.len() + 1).next_multiple_of(4), 0);
    out
}

/// The T10 vendor id based designator.
pub(crate) fn t10(unit: &UnitConfig, product: &Product) -> Vec<u8> {
    let mut out = vec![b' '; 8];
    put_text(&mut out, 0, 8, &product.vendor);
    out.extend_from_slice(serial(unit).as_bytes());
    out
}

fn identification(b: &mut Vec<u8>, unit: &UnitConfig, product: &Product, port: PortView<'_>) {
    const BINARY: u8 = 1;
    const ASCII: u8 = 2;
    const UTF8: u8 = 3;
    // PIV with iSCSI as the protocol; association with the port, with the device.
    const ISCSI: u8 = 0x50;
    const PORT: u8 = 0x80 | 0x10;
    const DEVICE: u8 = 0x80 | 0x20;
    designator(b, BINARY, 0x03, &naa(unit));
    designator(b, ASCII, 0x01, &t10(unit, product));
    // UUID.
    let mut uuid = vec![0x10, 0];
    uuid.extend_from_slice(&unit.id.to_be_bytes());
    designator(b, BINARY, 0x0a, &uuid);
    let [high, low] = port.portal_group.to_be_bytes();
    designator(b, ISCSI | BINARY, PORT | 0x04, &[0, 0, high, low]);
    let [high, low] = port.port_group.to_be_bytes();
    designator(b, ISCSI | BINARY, PORT | 0x05, &[0, 0, high, low]);
    let name = format!("{},t,0x{:04x}", port.iqn, port.portal_group);
    designator(b, ISCSI | UTF8, PORT | 0x08, &name_string(&name));
    designator(b, ISCSI | UTF8, DEVICE | 0x08, &name_string(port.iqn));
}

/// Target descriptors and segment descriptors of one EXTENDED COPY at most.
pub(crate) const MAX_COPY_TARGETS: u16 = 8;
/// Segments.
pub(crate) const MAX_COPY_SEGMENTS: u16 = 16;
/// Bytes of one segment at most.
pub(crate) const MAX_COPY_SEGMENT_LEN: u32 = 16 << 20;

/// The Third-party Copy page: only what SPC-5 asks for.
fn third_party_copy(b: &mut Vec<u8>) {
    // Supported Commands: EXTENDED COPY (LID1); COPY STATUS and OPERATING PARAMETERS of RECEIVE COPY
    // RESULTS.
    let commands: [&[u8]; 2] =
        [&[op::THIRD_PARTY_COPY_OUT, 1, 0x00], &[op::THIRD_PARTY_COPY_IN, 2, 0x00, 0x03]];
    let list: Vec<u8> = commands.concat();
    let mut d = vec![0, 1, 0, 0, list.len().to_le_bytes()[0]];
    d.extend_from_slice(&list);
    push_copy_descriptor(b, d);
    // Parameter Data.
    let mut d = vec![0; 32];
    put(&mut d, 0, &4_u16.to_be_bytes());
    put(&mut d, 8, &MAX_COPY_TARGETS.to_be_bytes());
    put(&mut d, 10, &MAX_COPY_SEGMENTS.to_be_bytes());
    put(&mut d, 12, &max_descriptor_list().to_be_bytes());
    push_copy_descriptor(b, d);
    // Supported Descriptors: block to block segments, identification descriptors.
    push_copy_descriptor(b, vec![0, 8, 0, 0, 2, 0x02, 0xe4]);
    // General Copy Operations.
    let mut d = vec![0; 36];
    put(&mut d, 0, &0x8001_u16.to_be_bytes());
    put(&mut d, 4, &1_u32.to_be_bytes());
    put(&mut d, 8, &1_u32.to_be_bytes());
    put(&mut d, 12, &MAX_COPY_SEGMENT_LEN.to_be_bytes());
    d[16] = 9;
    push_copy_descriptor(b, d);
}

/// Fills a descriptor up to whole words and sets its length.
fn push_copy_descriptor(b: &mut Vec<u8>, mut d: Vec<u8>) {
    d.resize(d.len().next_multiple_of(4), 0);
    let len = u16::try_from(d.len() - 4).unwrap_or(0);
    put(&mut d, 2, &len.to_be_bytes());
    b.extend_from_slice(&d);
}

/// Bytes of all descriptors of one EXTENDED COPY at most.
pub(crate) fn max_descriptor_list() -> u32 {
    u32::from(MAX_COPY_TARGETS) * 32 + u32::from(MAX_COPY_SEGMENTS) * 28
}

/// The parameter data of RECEIVE COPY RESULTS, OPERATING PARAMETERS.
pub(crate) fn copy_parameters() -> Vec<u8> {
    let mut b = vec![0; 46];
    put(&mut b, 0, &42_u32.to_be_bytes());
    // SNLID.
    b[4] = 1;
    put(&mut b, 8, &MAX_COPY_TARGETS.to_be_bytes());
    put(&mut b, 10, &MAX_COPY_SEGMENTS.to_be_bytes());
    put(&mut b, 12, &max_descriptor_list().to_be_bytes());
    put(&mut b, 16, &MAX_COPY_SEGMENT_LEN.to_be_bytes());
    put(&mut b, 34, &1_u16.to_be_bytes());
    b[36] = 1;
    b[37] = 9;
    b[43] = 2;
    b[44] = 0x02;
    b[45] = 0xe4;
    b
}

fn block_limits(b: &mut Vec<u8>, unit: &UnitConfig, limits: Limits) {
    b.resize(64, 0);
    let granularity = 1_u32 << physical_exponent(unit);
    // WSNZ: WRITE SAME has to say how many blocks.
    b[4] = 1;
    b[5] = limits.compare_and_write(unit);
    put(b, 6, &granularity.to_be_bytes()[2..]);
    put(b, 8, &limits.transfer(unit).to_be_bytes());
    put(b, 12, &limits.step(unit).to_be_bytes());
    put(b, 20, &limits.unmap(unit).to_be_bytes());
    put(b, 24, &MAX_UNMAP_RANGES.to_be_bytes());
    // A block by itself needs no saying. Said, it makes QEMU ask for the state of ranges that are no multiple of 4096
    // bytes, and end at its own assertion.
    if granularity > 1 {
        put(b, 28, &granularity.to_be_bytes());
        // UGAVALID, and an alignment of 0.
        put(b, 32, &0x8000_0000_u32.to_be_bytes());
    }
    put(b, 36, &limits.write_same(unit).to_be_bytes());
    if limits.atomic(unit) > 0 {
        // Wherever it begins, of however many blocks; what is asked to be whole in parts is not taken.
        put(b, 44, &limits.atomic(unit).to_be_bytes());
        put(b, 48, &1_u32.to_be_bytes());
        put(b, 52, &1_u32.to_be_bytes());
    }
}

/// The parameter data of READ CAPACITY (10).
pub(crate) fn capacity_10(unit: &UnitConfig) -> Vec<u8> {
    let last = unit.blocks.saturating_sub(1);
    let mut b = vec![0; 8];
    put(&mut b, 0, &u32::try_from(last).unwrap_or(u32::MAX).to_be_bytes());
    put(&mut b, 4, &unit.block_size.bytes().to_be_bytes());
    b
}

/// The parameter data of READ CAPACITY (16).
pub(crate) fn capacity_16(unit: &UnitConfig) -> Vec<u8> {
    let mut b = vec![0; 32];
    put(&mut b, 0, &unit.blocks.saturating_sub(1).to_be_bytes());
    put(&mut b, 8, &unit.block_size.bytes().to_be_bytes());
    b[13] = physical_exponent(unit);
    // LBPME, LBPRZ.
    b[14] = 0xc0;
    b
}

/// The parameter data of REPORT LUNS.
///
/// # Errors
/// INVALID FIELD IN CDB for a SELECT REPORT that means nothing here.
pub(crate) fn luns(select: u8, luns: impl Iterator<Item = u16>) -> Result<Vec<u8>, Sense> {
    const WELL_KNOWN_LUN: u64 = 0xc101 << 48;
    let mut b = vec![0; 8];
    let mut push = |lun: u64| b.extend_from_slice(&lun.to_be_bytes());
    match select {
        0 => luns.for_each(|lun| push(encode_lun(lun))),
        1 => push(WELL_KNOWN_LUN),
        2 => {
            push(WELL_KNOWN_LUN);
            luns.for_each(|lun| push(encode_lun(lun)));
        }
        _ => return Err(Sense::invalid_cdb(2, 7)),
    }
    let len = len32(b.len() - 8);
    put(&mut b, 0, &len.to_be_bytes());
    Ok(b)
}

#[cfg(test)]
mod tests {
    use cairn_block::BlockSize;

    use super::*;
    use crate::scsi::unit::UnitHandle;
    use crate::wire::{u16_at, u32_at, u64_at};

    fn unit() -> UnitConfig {
        UnitConfig {
            lun: 0,
            handle: UnitHandle(1),
            blocks: 1 << 33,
            block_size: BlockSize::B512,
            physical_block_size: BlockSize::B4096,
            id: 0x3f2c_1a60_5d1c_4b6e_9f0a_2b7f_6f1f_9a10,
            volatile_write_cache: true,
            read_only: false,
            removable: false,
            atomic_blocks: 8,
        }
    }

    fn product() -> Product {
        Product { vendor: "CAIRN".into(), product: "VOLUME".into(), revision: "1".into() }
    }

    const PORT: PortView<'_> =
        PortView { iqn: "iqn.2025-01.io.cairn:v", portal_group: 1, port_group: 7 };
    const LIMITS: Limits = Limits { max_data_len: 1 << 20, max_transfer_len: 16 << 20 };

    #[test]
    fn every_page_of_the_list_is_there_and_says_its_length() {
        let list = vital(0, &unit(), &product(), PORT, LIMITS).unwrap();
        assert!(list[4..].is_sorted());
        for page in &list[4..] {
            let b = vital(*page, &unit(), &product(), PORT, LIMITS).unwrap();
            assert_eq!((b[1], usize::from(u16_at(&b, 2))), (*page, b.len() - 4));
        }
        assert!(vital(0x84, &unit(), &product(), PORT, LIMITS).is_err());
        let b = standard(Subject::Unit { removable: false }, &product());
        assert_eq!(usize::from(b[4]), b.len() - 5);
    }

    #[test]
    fn write_same_has_to_say_how_many_blocks() {
        assert_eq!(vital(0xb0, &unit(), &product(), PORT, LIMITS).unwrap()[4], 1);
    }

    #[test]
    fn designators_fill_the_page() {
        let b = vital(0x83, &unit(), &product(), PORT, LIMITS).unwrap();
        let mut at = 4;
        let mut kinds = Vec::new();
        while at < b.len() {
            kinds.push((b[at + 1] >> 4 & 3, b[at + 1] & 0x0f));
            at += 4 + usize::from(b[at + 3]);
        }
        assert_eq!(at, b.len());
        assert_eq!(kinds, [(0, 3), (0, 1), (0, 10), (1, 4), (1, 5), (1, 8), (2, 8)]);
        assert_eq!(naa(&unit())[0] >> 4, 3);
    }

    /// QEMU 7.2 reads 32 KiB and more only after it has asked for the state of the 2 GiB that follow, less 512 bytes,
    /// where a granularity of 4 KiB to 16 MiB is told; of blocks of 4096 bytes that is no whole number, and QEMU ends.
    #[test]
    fn the_granularity_of_unmap_is_told_where_it_is_more_than_a_block() {
        let told = |block_size| {
            let unit = UnitConfig { block_size, ..unit() };
            let b = vital(0xb0, &unit, &product(), PORT, LIMITS).unwrap();
            (u32_at(&b, 28), u32_at(&b, 32))
        };
        assert_eq!(told(BlockSize::B512), (8, 0x8000_0000));
        assert_eq!(told(BlockSize::B4096), (0, 0));
    }

    #[test]
    fn capacity_is_the_last_block() {
        let b = capacity_16(&unit());
        assert_eq!((u64_at(&b, 0), u32_at(&b, 8), b[13]), ((1 << 33) - 1, 512, 3));
        assert_eq!(u32_at(&capacity_10(&unit()), 0), u32::MAX, "too large for ten bytes");
    }

    #[test]
    fn luns_are_listed_by_kind() {
        let b = luns(2, [0, 300].into_iter()).unwrap();
        assert_eq!((b.len(), u32_at(&b, 0)), (32, 24));
        assert_eq!((b[8], b[9]), (0xc1, 0x01));
        assert_eq!(u16_at(&b, 24), 0x412c);
        assert_eq!(luns(0, std::iter::once(3)).unwrap()[9], 3);
        assert!(luns(3, std::iter::empty()).is_err());
    }
}
