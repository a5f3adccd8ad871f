//! A volume's configuration, which comes from replicas and so from disks and peers.

use cairn_block::{ReplicaId, VolumeId};
use cairn_crypt::{DATA_KEY_LEN, Envelope, Kek, VolumeKey};
use cairn_nexus::{Config, Member};

fn kek() -> Kek {
    Kek::parse(&[7; 32]).expect("a key has 32 bytes")
}

fn envelope() -> Envelope {
    let mut bytes = [1; DATA_KEY_LEN];
    bytes[0] = 2;
    let key = VolumeKey::new(bytes).expect("its halves differ");
    kek().wrap(&key, VolumeId(5), [9; 12])
}

/// A configuration with and without a key, and the key alone.
pub fn seeds() -> Vec<Vec<u8>> {
    let config = |encryption: Vec<u8>| Config {
        volume: VolumeId(5),
        blocks: 1 << 20,
        holder: 9,
        restoring: Some(cairn_block::SnapshotId(4)),
        deleted: vec![cairn_block::SnapshotId(6), cairn_block::SnapshotId(7)],
        block_size: 512,
        reservations: Vec::new(),
        sanitize: Vec::new(),
        undo: true,
        lineage: 1,
        generation: 7,
        encryption,
        members: (1..4)
            .map(|i| Member {
                replica: ReplicaId(i),
                in_sync: i != 2,
                since: 3,
                ..Member::default()
            })
            .collect(),
    };
    let envelope = envelope().encode().to_vec();
    vec![config(Vec::new()).encode(), config(envelope.clone()).encode(), envelope]
}

/// What decodes encodes to what decodes the same; a key opens only as it was wrapped.
pub fn config(data: &[u8]) {
    let mut section = data.to_vec();
    if let Ok(decoded) = Config::decode(data) {
        assert_eq!(Config::decode(&decoded.encode()).as_ref(), Ok(&decoded));
        section = decoded.encryption;
    }
    if let Ok(decoded) = Envelope::decode(&section) {
        assert_eq!(Envelope::decode(&decoded.encode()).as_ref(), Ok(&decoded));
        if kek().unwrap(&decoded).is_ok() {
            assert_eq!(decoded, envelope());
        }
    }
}
