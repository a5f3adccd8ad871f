//! The catalog: a page for each replica slot, with the replica's identity and its durable register.

use cairn_block::{BlockSize, Epoch, PoolId, ReplicaId, SnapshotId, VolumeId};

use super::superblock::MAX_EXTENTS;
use super::{
    BLOCK_LEN, BlockError, EXTENT, HEADER_LEN, Header, get_bytes, get_u16, get_u32, get_u64,
    put_u16, put_u32, put_u64, seal,
};

/// What a catalog page begins with.
pub const CATALOG_MAGIC: [u8; 8] = *b"CAIRNCAT";
/// Bytes of a replica's name, in UTF-8.
pub const NAME_MAX: usize = 64;
/// Bytes of a register's configuration.
pub const CONFIG_MAX: usize = 3584;
/// The flag of a replica whose whole size is reserved for it.
pub const FLAG_THICK: u16 = 1;
/// The flag of a slot that holds a snapshot, or held one until it was deleted.
pub const FLAG_SNAPSHOT: u16 = 2;
/// Bit of a page's flags: the replica is about to go back to a snapshot on every device of its pool.
pub const FLAG_REVERTING: u16 = 4;
/// Bit of a page's flags: it has done so here.
pub const FLAG_REVERTED: u16 = 8;
/// No layer, on the device.
const NO_LAYER: u16 = u16::MAX;
/// The largest replica: 256 TiB.
pub const MAX_REPLICA_BYTES: u64 = 1 << 48;

const LAYER_AT: usize = 120;
const NAME_AT: usize = 128;
const CREATED_AT: usize = 192;
const SNAPSHOT_AT: usize = 200;
const TARGET_AT: usize = 216;
const WHOLE_AT: usize = 232;
const CONFIG_AT: usize = 256;
const _: () = assert!(HEADER_LEN + 80 == NAME_AT);
const _: () = assert!(NAME_AT + NAME_MAX == CREATED_AT && SNAPSHOT_AT + 16 == TARGET_AT);
const _: () = assert!(TARGET_AT + 16 == WHOLE_AT && WHOLE_AT + 8 <= CONFIG_AT);
const _: () = assert!(CONFIG_AT + CONFIG_MAX <= BLOCK_LEN);
const _: () = assert!(MAX_REPLICA_BYTES / EXTENT <= MAX_EXTENTS);

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CatalogState {
    /// Nothing.
    #[default]
    Free,
    /// A replica.
    Live,
    /// A replica or snapshot whose extents are being given back. There is no way back from here.
    Deleting,
    /// A snapshot of a replica.
    Snapshot,
}

/// A decoded catalog page.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CatalogPage {
    /// Higher is newer.
    pub sequence: u64,
    /// What the slot holds.
    pub state: CatalogState,
    /// The replica; for a snapshot, the replica that it was taken of.
    pub replica: ReplicaId,
    /// The volume that it is a replica of.
    pub volume: VolumeId,
    /// At most [`NAME_MAX`] bytes.
    pub name: String,
    /// Size in blocks of `block_size`.
    pub blocks: u64,
    /// The size of its blocks.
    pub block_size: BlockSize,
    /// The layer that holds what was written to it.
    pub layer: u16,
    /// The layer that holds what was there before, if any.
    pub parent: Option<u16>,
    /// Bit 0: its whole size is reserved for it.
    pub flags: u16,
    /// When a snapshot was taken, in seconds since 1970, as its taker told.
    pub created: u64,
    /// The snapshot; for a replica, the snapshot that it is a clone of.
    pub snapshot: SnapshotId,
    /// The snapshot that it is about to go back to, where its flags say so.
    pub target: SnapshotId,
    /// Where what it does not map may be lost: what it has grown by since.
    pub whole: Whole,
    /// The register's promise.
    pub promised_epoch: Epoch,
    /// The epoch of the accepted configuration.
    pub accepted_epoch: Epoch,
    /// The sequence of the accepted configuration.
    pub register_seq: u64,
    /// The accepted configuration, at most [`CONFIG_MAX`] bytes, opaque.
    pub config: Vec<u8>,
}

/// What a replica has grown by after a device of its pool was lost is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Whole {
    /// Its logical extents from this one on.
    pub from: u32,
    /// How often the pool had gone on without a device by then, as
    /// [`Membership::losses`](super::Membership::losses) counts. It says nothing after one more time.
    pub losses: u32,
}

/// What a page that names a layer is, where a crash may have left two that name the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// A replica that lives: its page decides.
    Live,
    /// A replica that is being deleted, and whose snapshot, if one was being taken, never came to be.
    Deleting,
    /// A snapshot.
    Snapshot,
    /// A snapshot that is being deleted, or what a replica had before it went back to one.
    Leaving,
}

impl Claim {
    /// From the strongest to the weakest.
    pub const ORDER: [Self; 4] = [Self::Live, Self::Deleting, Self::Snapshot, Self::Leaving];

    /// Whether a page of which another has the layer is what a crash left of a snapshot that was being taken,
    /// or of a way back to one; of others it is damage.
    #[must_use]
    pub const fn may_be_void(self) -> bool {
        matches!(self, Self::Snapshot | Self::Leaving)
    }
}

impl CatalogPage {
    /// What claim it has to its layer; none where the slot is free.
    #[must_use]
    pub const fn claim(&self) -> Option<Claim> {
        match self.state {
            CatalogState::Free => None,
            CatalogState::Live => Some(Claim::Live),
            CatalogState::Snapshot => Some(Claim::Snapshot),
            CatalogState::Deleting if self.flags & FLAG_SNAPSHOT != 0 => Some(Claim::Leaving),
            CatalogState::Deleting => Some(Claim::Deleting),
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks << self.block_size.shift()
    }

    /// Encodes the page of `slot` as the copy that lies at `address`, in blocks.
    pub fn encode(&self, slot: u16, address: u64, pool: PoolId, block: &mut [u8]) {
        block.fill(0);
        Header { address, sequence: self.sequence, pool }.encode(CATALOG_MAGIC, block);
        assert!(self.name.len() <= NAME_MAX && self.config.len() <= CONFIG_MAX, "checked before");
        put_u16(block, 48, slot);
        block[50] = match self.state {
            CatalogState::Free => 0,
            CatalogState::Live => 1,
            CatalogState::Deleting => 2,
            CatalogState::Snapshot => 3,
        };
        block[51] = self.block_size.shift();
        put_u16(block, 52, u16::try_from(self.name.len()).expect("at most 64"));
        put_u16(block, 54, u16::try_from(self.config.len()).expect("at most CONFIG_MAX"));
        block[56..72].copy_from_slice(&self.replica.to_bytes());
        block[72..88].copy_from_slice(&self.volume.to_bytes());
        put_u64(block, 88, self.blocks);
        put_u64(block, 96, self.promised_epoch.0);
        put_u64(block, 104, self.accepted_epoch.0);
        put_u64(block, 112, self.register_seq);
        put_u16(block, LAYER_AT, self.layer);
        put_u16(block, LAYER_AT + 2, self.parent.unwrap_or(NO_LAYER));
        put_u16(block, LAYER_AT + 4, self.flags);
        put_u64(block, CREATED_AT, self.created);
        block[SNAPSHOT_AT..SNAPSHOT_AT + 16].copy_from_slice(&self.snapshot.to_bytes());
        block[TARGET_AT..TARGET_AT + 16].copy_from_slice(&self.target.to_bytes());
        put_u32(block, WHOLE_AT, self.whole.from);
        put_u32(block, WHOLE_AT + 4, self.whole.losses);
        block[NAME_AT..NAME_AT + self.name.len()].copy_from_slice(self.name.as_bytes());
        block[CONFIG_AT..CONFIG_AT + self.config.len()].copy_from_slice(&self.config);
        seal(block);
    }

    /// Decodes the page of `slot` that lies at `address`, in blocks.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn decode(slot: u16, address: u64, pool: PoolId, block: &[u8]) -> Result<Self, BlockError> {
        let header = Header::decode_for(CATALOG_MAGIC, address, pool, block)?;
        if get_u16(block, 48) != slot || header.sequence > u64::MAX / 2 {
            return Err(BlockError::Field("slot or sequence"));
        }
        let state = match block[50] {
            0 => CatalogState::Free,
            1 => CatalogState::Live,
            2 => CatalogState::Deleting,
            3 => CatalogState::Snapshot,
            _ => return Err(BlockError::Field("replica state")),
        };
        let block_size = match block[51] {
            9 => BlockSize::B512,
            12 => BlockSize::B4096,
            _ => return Err(BlockError::Field("replica block size")),
        };
        let (name_len, config_len) =
            (usize::from(get_u16(block, 52)), usize::from(get_u16(block, 54)));
        if name_len > NAME_MAX || config_len > CONFIG_MAX {
            return Err(BlockError::Field("length of the name or the configuration"));
        }
        let name = core::str::from_utf8(&block[NAME_AT..NAME_AT + name_len])
            .map_err(|_| BlockError::Field("replica name"))?;
        let blocks = get_u64(block, 88);
        if blocks > MAX_REPLICA_BYTES >> block_size.shift() {
            return Err(BlockError::Field("replica size"));
        }
        Ok(Self {
            sequence: header.sequence,
            state,
            replica: ReplicaId::from_bytes(get_bytes(block, 56)),
            volume: VolumeId::from_bytes(get_bytes(block, 72)),
            name: name.to_owned(),
            blocks,
            block_size,
            layer: get_u16(block, LAYER_AT),
            parent: Some(get_u16(block, LAYER_AT + 2)).filter(|&parent| parent != NO_LAYER),
            flags: get_u16(block, LAYER_AT + 4),
            created: get_u64(block, CREATED_AT),
            snapshot: SnapshotId::from_bytes(get_bytes(block, SNAPSHOT_AT)),
            target: SnapshotId::from_bytes(get_bytes(block, TARGET_AT)),
            whole: Whole { from: get_u32(block, WHOLE_AT), losses: get_u32(block, WHOLE_AT + 4) },
            promised_epoch: Epoch(get_u64(block, 96)),
            accepted_epoch: Epoch(get_u64(block, 104)),
            register_seq: get_u64(block, 112),
            config: block[CONFIG_AT..CONFIG_AT + config_len].to_vec(),
        })
    }
}
