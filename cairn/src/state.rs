//! Which volumes a process serves, and which pools it opens beyond those of its configuration: a file in its state folder, replaced whole and durably.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cairn_engine::block::BlockSize;
use serde::{Deserialize, Serialize};

use crate::keys::SavedEncryption;

/// Version of the file.
const VERSION: u32 = 1;

/// What the file holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct File {
    version: u32,
    volumes: Vec<SavedVolume>,
    #[serde(default)]
    pools: Vec<SavedPool>,
}

/// A pool that was made by a call, or whose devices a call changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedPool {
    pub(crate) name: String,
    /// Where its devices are. One that has left the pool since may be among them.
    pub(crate) paths: Vec<String>,
    #[serde(default)]
    pub(crate) buffered: bool,
    /// The shard that has it, where there are several: its volumes' other pools are there, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) shard: Option<u16>,
}

/// A start by force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedForce {
    /// From which replica.
    pub(crate) replica: String,
    /// Tells the lineage that it begins from others.
    pub(crate) random: u32,
}

/// A replica that is being replaced by another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedReplacement {
    /// The one that goes.
    pub(crate) old: String,
    /// The one that comes.
    pub(crate) new: String,
    /// Where that is; empty until it is made.
    pub(crate) uri: String,
    /// Whether the old one goes as soon as the new one is a member.
    #[serde(default)]
    pub(crate) now: bool,
    /// Where the new one is made, as the configuration names it; empty where somebody made it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) spare: String,
}

/// How a volume is shared with other processes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedSharing {
    /// It was another's to serve when that was known last.
    pub(crate) standby: bool,
    /// Takes over by itself.
    #[serde(default)]
    pub(crate) auto: bool,
    /// After so long.
    #[serde(default)]
    pub(crate) auto_after_ms: u64,
    /// Where hosts reach the others.
    #[serde(default)]
    pub(crate) elsewhere: Vec<String>,
    /// Where initiators do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) iscsi_elsewhere: Vec<String>,
}

/// A volume as a logical unit of an iSCSI target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedIscsi {
    /// The target's name.
    pub(crate) iqn: String,
    #[serde(default)]
    pub(crate) lun: u16,
    /// Names of the initiators that may log in.
    #[serde(default)]
    pub(crate) initiators: Vec<String>,
    /// Where the CHAP secrets are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) chap_file: Option<String>,
    /// That file may be readable by others than its owner.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) allow_open_file: bool,
    /// Initiators may not write.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) read_only: bool,
    /// Initiators may have its medium taken out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) removable: bool,
}

/// A volume to be served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedVolume {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    /// Bytes of the blocks that hosts see; 0: what the configuration on its replicas says, or 4096.
    #[serde(default)]
    pub(crate) block_size: u32,
    /// As in the API: `nvme+tcp://...` or `local:POOL/ID`. All that the configuration which its replicas
    /// store may name, and sometimes more: one that is added is here before it is a member, and one that
    /// is removed until it is none.
    pub(crate) replicas: Vec<String>,
    /// Likewise, those that hold no data.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) witnesses: Vec<String>,
    /// It is to be started by force, until it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) forced: Option<SavedForce>,
    /// A replica is being replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replacement: Option<SavedReplacement>,
    #[serde(default)]
    pub(crate) allowed_hosts: Vec<String>,
    #[serde(default)]
    pub(crate) child_deadline_ms: u64,
    /// Where its key comes from, where it is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) encryption: Option<SavedEncryption>,
    /// Other processes may serve it in this one's place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) shared: Option<SavedSharing>,
    /// Initiators reach it too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) iscsi: Option<SavedIscsi>,
    /// Whether its first configuration was stored on the replicas.
    pub(crate) created: bool,
}

impl SavedVolume {
    /// The blocks that hosts see, where that is known.
    pub(crate) fn block_size(&self) -> Result<Option<BlockSize>, String> {
        match self.block_size {
            0 if self.created => Ok(None),
            0 | 4096 => Ok(Some(BlockSize::B4096)),
            512 => Ok(Some(BlockSize::B512)),
            other => Err(format!("blocks of {other} bytes are not possible; 512 and 4096 are")),
        }
    }
}

/// The file and what it holds.
#[derive(Debug)]
pub(crate) struct State {
    path: PathBuf,
    pub(crate) volumes: Vec<SavedVolume>,
    pub(crate) pools: Vec<SavedPool>,
}

impl State {
    pub(crate) fn load(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the state folder {}", dir.display()))?;
        let path = dir.join("volumes.json");
        let (volumes, pools) = match std::fs::read(&path) {
            Ok(bytes) => {
                let file: File = serde_json::from_slice(&bytes)
                    .with_context(|| format!("{} is damaged", path.display()))?;
                if file.version != VERSION {
                    bail!(
                        "{} has version {}; this program knows {VERSION}: upgrade it",
                        path.display(),
                        file.version
                    );
                }
                (file.volumes, file.pools)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => (Vec::new(), Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(Self { path, volumes, pools })
    }

    /// Stores the list. A crash leaves the old list or the new one.
    pub(crate) fn save(&self) -> Result<()> {
        let file =
            File { version: VERSION, volumes: self.volumes.clone(), pools: self.pools.clone() };
        replace(&self.path, &serde_json::to_vec_pretty(&file)?)
    }
}

/// Replaces a file whole and durably. A crash leaves the old one or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(".new");
    let staged = PathBuf::from(staged);
    let store = || -> std::io::Result<()> {
        let mut out = std::fs::File::create(&staged)?;
        out.write_all(bytes)?;
        out.sync_all()?;
        std::fs::rename(&staged, path)?;
        std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    store().with_context(|| format!("cannot store {}", path.display()))
}
