//! Volumes' keys: taken from the configuration when it is found, used at the edge between hosts and the
//! nexus.

use cairn_block::{BlockSize, BufSlice, IoOp, LbaRange, Memory};
use cairn_crypt::{Envelope, Kek, VolumeKey};
use cairn_reactor::Driver;

use super::Shard;
use super::volumes::PendingChange;
use crate::control::{EncryptionReport, EncryptionSpec, EngineError, Reply, VolumeSpec};

/// The volume's blocks are of this size.
const BLOCK: BlockSize = BlockSize::B4096;

/// The key of a new volume, where there is one: its wrapping goes into the first configuration.
pub(super) fn new_key(spec: &VolumeSpec) -> Result<Option<Box<VolumeKey>>, EngineError> {
    let Some(encryption) = &spec.encryption else { return Ok(None) };
    let Some(envelope) = &encryption.new else { return Ok(None) };
    open(encryption, envelope, spec).map(Some).map_err(EngineError::Invalid)
}

/// Takes the key out of `envelope` with whichever key-encryption key it was wrapped with. What is wrong is
/// told to people.
fn open(
    encryption: &EncryptionSpec,
    envelope: &Envelope,
    spec: &VolumeSpec,
) -> Result<Box<VolumeKey>, String> {
    if envelope.owner != encryption.owner.unwrap_or(spec.id) {
        return Err(format!(
            "the key in the configuration was made for volume {}, not for this one",
            envelope.owner
        ));
    }
    let expected = envelope.key_id;
    let Some(kek) = encryption.keks.iter().find(|kek| kek.id() == expected) else {
        if encryption.keks.is_empty() {
            return Err(format!("{}; expected key id {expected}", encryption.missing));
        }
        let got: Vec<String> = encryption.keks.iter().map(|kek| kek.id().to_string()).collect();
        let more = if encryption.missing.is_empty() { "" } else { "; besides, " };
        return Err(format!(
            "the key does not unwrap the volume's key; expected key id {expected}, got {}{more}{}",
            got.join(" and "),
            encryption.missing
        ));
    };
    kek.unwrap(envelope).map(Box::new).map_err(|e| e.to_string())
}

impl<D: Driver> Shard<D> {
    /// The volume's configuration was found and waits for a key.
    pub(super) fn volume_locked(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let name = volume.spec.name.clone();
        let opened = match (&volume.spec.encryption, volume.nexus.locked()) {
            (None, _) => Err("the volume is encrypted and no key was given".to_owned()),
            (Some(encryption), []) if !encryption.missing.is_empty() => {
                Err(encryption.missing.clone())
            }
            (Some(_), []) => Err("the volume is to be encrypted, and the configuration on its \
                                  replicas says that it is not: check which replicas it names"
                .to_owned()),
            (Some(encryption), section) => Envelope::decode(section)
                .map_err(|e| e.to_string())
                .and_then(|envelope| open(encryption, &envelope, &volume.spec)),
        };
        match opened {
            Ok(key) => {
                volume.key = Some(key);
                volume.nexus.unlock(now);
            }
            Err(why) => {
                let how = format!("{why}; `cairn volume unlock {name}` tries again");
                volume.nexus.refuse_key(&how);
            }
        }
        self.touch_volume(at);
    }

    /// Wraps the volume's key anew and stores that. Answered once a majority has it.
    pub(super) fn rotate_key(
        &mut self,
        name: &str,
        kek: &Kek,
        nonce: [u8; 12],
        reply: Reply<()>,
        now: u64,
    ) {
        let Some(at) = self.find_volume(name) else {
            reply.send(Err(EngineError::NotFound { kind: "volume", name: name.to_owned() }));
            return;
        };
        let volume = &mut self.volumes[at];
        let Some(key) = &volume.key else {
            let why = format!("volume `{name}` is not encrypted, or its key is not at hand");
            reply.send(Err(EngineError::Invalid(why)));
            return;
        };
        let owner = volume.spec.encryption.as_ref().and_then(|e| e.owner).unwrap_or(volume.spec.id);
        let envelope = kek.wrap(key, owner, nonce);
        match volume.nexus.set_encryption(envelope.encode().to_vec(), now) {
            Ok(()) => volume.change = Some(PendingChange::Key(reply)),
            Err(error) => reply.send(Err(EngineError::Busy(error.to_string()))),
        }
        self.touch_volume(at);
    }

    /// Encrypts a host's write in place, before any child sees it. Tells whether there is a key: then what
    /// is read has to be decrypted.
    pub(super) fn seal(&mut self, volume: u32, op: IoOp, range: LbaRange, data: BufSlice) -> bool {
        let Some(key) = self.volumes.get(volume).and_then(|v| v.key.as_deref()) else {
            return false;
        };
        if let IoOp::Write { .. } = op {
            key.encrypt(range.start(), BLOCK, self.driver.memory().bytes_mut(data));
        }
        true
    }

    /// Decrypts what was read of an encrypted volume, in place, before the host gets it.
    pub(super) fn unseal(&mut self, volume: u32, range: LbaRange, data: BufSlice) {
        let key = self.volumes.get(volume).and_then(|v| v.key.as_deref());
        let key = key.expect("a volume keeps its key while its requests are in flight");
        key.decrypt(range.start(), BLOCK, self.driver.memory().bytes_mut(data));
    }
}

/// What a person may know of a volume's encryption.
pub(super) fn report(section: &[u8], locked: &[u8]) -> Option<EncryptionReport> {
    let section = if section.is_empty() { locked } else { section };
    let envelope = Envelope::decode(section).ok()?;
    Some(EncryptionReport { cipher: envelope.cipher.name(), key_id: envelope.key_id, envelope })
}
