use cairn_block::{BlockSize, Epoch, PoolDeviceId, PoolId, ReplicaId, SnapshotId, VolumeId};
use proptest::prelude::*;

use super::*;

const POOL: PoolId = PoolId(0x3f2c_1a60_5d1c_4b6e_9f0a_2b7f_6f1f_9a10);

/// The head of a journal block, drawn by hand from `docs/format.md`.
#[test]
fn the_header_is_as_drawn() {
    let mut block = vec![0; BLOCK_LEN];
    let entry = Entry {
        state: EntryState::Allocated,
        layer: 0x102,
        logical: 0x304,
        stamp: 5,
        dirty: false,
        incoming: true,
        copy: true,
        open: true,
        birth: 6,
    };
    let records = [Record { extent: 0x607, entry }].into_iter();
    JournalBlock::encode(0x1122, 0x42, POOL, records, &mut block);
    assert_eq!(&block[..8], b"CAIRNJNL");
    assert_eq!(block[12..16], [1, 0, 0, 0]);
    assert_eq!(block[16..24], [0x42, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(block[24..32], [0x22, 0x11, 0, 0, 0, 0, 0, 0]);
    assert_eq!(block[32..36], [0x3f, 0x2c, 0x1a, 0x60]);
    assert_eq!(block[48..56], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(block[64..72], [7, 6, 0, 0, 4, 3, 0, 0]);
    assert_eq!(block[72..80], [2, 1, 3, 1, 14, 0, 0, 0]);
    assert_eq!(block[80..88], [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(block[88..96], [6, 0, 0, 0, 0, 0, 0, 0]);
    assert!(block[96..].iter().all(|&b| b == 0));
}

#[test]
fn a_block_elsewhere_or_of_another_pool_does_not_decode() {
    let mut block = vec![0; BLOCK_LEN];
    CatalogPage::default().encode(3, 40, POOL, &mut block);
    assert!(CatalogPage::decode(3, 40, POOL, &block).is_ok());
    assert_eq!(CatalogPage::decode(3, 41, POOL, &block), Err(BlockError::Address));
    assert_eq!(CatalogPage::decode(3, 40, PoolId(1), &block), Err(BlockError::Pool));
    assert!(matches!(CatalogPage::decode(4, 40, POOL, &block), Err(BlockError::Field(_))));
    assert_eq!(JournalBlock::decode(40, POOL, &block), Err(BlockError::Magic));
}

prop_compose! {
    fn page()(
        sequence in 0..u64::MAX / 2,
        state in prop::sample::select(vec![CatalogState::Free, CatalogState::Live, CatalogState::Deleting, CatalogState::Snapshot]),
        ids in any::<(u128, u128)>(),
        name in "[a-zé€]{0,16}",
        blocks in 0..=MAX_REPLICA_BYTES / BLOCK,
        register in any::<(u64, u64, u64)>(),
        config in prop::collection::vec(any::<u8>(), 0..=CONFIG_MAX),
    ) -> CatalogPage {
        CatalogPage {
            sequence,
            state,
            replica: ReplicaId(ids.0),
            volume: VolumeId(ids.1),
            name,
            blocks,
            block_size: BlockSize::B4096,
            promised_epoch: Epoch(register.0),
            accepted_epoch: Epoch(register.1),
            register_seq: register.2,
            config,
            layer: 7,
            parent: (ids.0 % 2 == 0).then_some(9),
            flags: 3,
            target: SnapshotId(ids.1),
            created: register.0 / 2,
            snapshot: SnapshotId(ids.1 / 3),
            whole: super::Whole { from: 11, losses: 12 },
        }
    }
}

proptest! {
    #[test]
    fn catalog_pages_round_trip(page in page(), slot: u16, address in 0u64..1 << 40, flip in 0..BLOCK_LEN * 8) {
        let mut block = vec![0; BLOCK_LEN];
        page.encode(slot, address, POOL, &mut block);
        prop_assert_eq!(CatalogPage::decode(slot, address, POOL, &block), Ok(page));
        block[flip / 8] ^= 1 << (flip % 8);
        prop_assert!(CatalogPage::decode(slot, address, POOL, &block).is_err());
    }

    #[test]
    fn records_and_entries_round_trip(
        raw in prop::collection::vec((any::<u32>(), 1u8..4, any::<u16>(), any::<u32>(), any::<u64>()), 0..=125),
        address in 0u64..1 << 40,
    ) {
        let records: Vec<Record> = raw
            .into_iter()
            .map(|(extent, state, slot, logical, stamp)| {
                let state = EntryState::from_byte(state).expect("a known state");
                Record { extent, entry: Entry {
                    state, layer: slot, logical, stamp, dirty: stamp % 2 == 1, incoming: stamp % 3 == 1,
                    copy: slot % 2 == 1, birth: stamp / 2, open: stamp % 5 == 1,
                } }
            })
            .collect();
        let mut block = vec![0; BLOCK_LEN];
        JournalBlock::encode(9, address, POOL, records.iter().copied(), &mut block);
        let head = JournalBlock::decode(address, POOL, &block).expect("it verifies");
        prop_assert_eq!((head.sequence, head.records), (9, records.len()));
        for (i, record) in records.iter().enumerate() {
            prop_assert_eq!(JournalBlock::record(&block, i), Ok(*record));
        }
        let entries = u32::try_from(records.len()).expect("at most 125");
        let page = TablePage { sequence: 4, index: 3, entries, checkpoint: 2, base: 3 };
        page.encode(address, POOL, records.iter().map(|r| r.entry), &mut block);
        prop_assert_eq!(TablePage::decode(3, entries, address, POOL, &block), Ok(page));
        for (i, record) in (0u32..).zip(&records) {
            prop_assert_eq!(TablePage::entry(&block, i), Ok(record.entry));
        }
    }
}

#[test]
fn the_list_of_devices_is_as_drawn() {
    let mut superblock = Superblock {
        pool: POOL,
        sequence: 7,
        compat: 0,
        incompat: INCOMPAT_CHECKSUMS,
        device_len: 8 << 20,
        sector_size: 512,
        slots: 16,
        catalog: 2,
        journal: 34,
        journal_blocks: 64,
        journal_tail: 1,
        checkpoint: 0,
        table_digest: 0,
        segments: vec![Segment { table: 98, data: 256, extents: 4 }],
        device: PoolDeviceId(0x0a0b << 112),
        membership: Membership::alone(PoolDeviceId(0x0a0b << 112), MemberState::Draining),
    };
    superblock.membership.generation = 0x0102;
    superblock.membership.set_lost(65, true);
    let mut block = vec![0; BLOCK_LEN];
    superblock.encode(1, &mut block);
    assert_eq!(block[1680..1683], [0x0a, 0x0b, 0]);
    assert_eq!(block[1696..1706], [2, 1, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(block[1712..1715], [0x0a, 0x0b, 0]);
    assert_eq!(block[1728], 2);
    assert!(block[1729..3248].iter().all(|&b| b == 0));
    assert_eq!(block[3248..3258], [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert!(block[3257..].iter().all(|&b| b == 0));
    assert_eq!(Superblock::decode(1, &block), Ok(superblock.clone()));
    // A device that its own list does not name.
    block[1680] = 9;
    reseal(&mut block);
    assert!(matches!(Superblock::decode(1, &block), Err(BlockError::Field(_))));
    // From before there was a list.
    block[1680..].fill(0);
    reseal(&mut block);
    let old = Superblock::decode(1, &block).expect("it decodes");
    assert_eq!(old.device.0, POOL.0);
    assert_eq!(old.membership, Membership::alone(old.device, MemberState::Live));
}

#[test]
fn a_full_list_of_devices_makes_room_for_new_ones() {
    let mut membership = Membership::default();
    for id in 0..64 {
        let state = if id == 3 { MemberState::Removed } else { MemberState::Live };
        membership.set(PoolDeviceId(id), state);
    }
    membership.set(PoolDeviceId(64), MemberState::Live);
    assert_eq!(membership.members.len(), MAX_MEMBERS);
    assert_eq!(membership.state_of(PoolDeviceId(3)), None);
    let before = membership.generation;
    membership.leave_behind();
    let mut behind = Membership { generation: before, ..Membership::default() };
    behind.advance();
    assert!(membership.generation > behind.generation + 1_000_000);
}
