//! Who a process is: a name that stays the same over its restarts, and that no two processes have at once.
//!
//! A nexus that takes a volume up again after it was killed need not wait until its dead predecessor's lease
//! for reads is over, where it knows that it is dead. The lock on the state folder tells: the kernel lets
//! go of it when the process is gone, and not before, be it stopped or hung.

use std::fs::{File, OpenOptions, TryLockError};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use uuid::Uuid;

use crate::serve::patiently;

/// The name, for as long as the lock is held.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: Uuid,
    lock: File,
}

impl Node {
    /// Takes the state folder for this process.
    ///
    /// # Errors
    /// Where another process has it, or it cannot be written.
    pub(crate) fn claim(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the folder {}", dir.display()))?;
        let path = dir.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
        let held = |e: &TryLockError| matches!(e, TryLockError::WouldBlock);
        patiently(held, || lock.try_lock()).map_err(|e| match e {
            TryLockError::WouldBlock => anyhow!(
                "another process uses the state folder {}: end it, or give this one another `state_dir`",
                dir.display()
            ),
            TryLockError::Error(e) => anyhow!("cannot lock {}: {e}", path.display()),
        })?;
        let path = dir.join("node.id");
        let id = match std::fs::read_to_string(&path) {
            Ok(text) => Uuid::parse_str(text.trim()).with_context(|| {
                format!("{} holds no id; remove it, and a new one is made", path.display())
            })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let id = Uuid::new_v4();
                crate::state::replace(&path, format!("{id}\n").as_bytes())?;
                id
            }
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(Self { id, lock })
    }

    /// What tells the nexuses of this process, and of those before it, from all others; 0 where that is not
    /// sure. The name alone may be on two machines at once, where the folder or the whole machine was
    /// copied: so it is of this boot, too, and of this very lock.
    pub(crate) fn holder(&self, boot: u128) -> u128 {
        let Ok(lock) = self.lock.metadata() else { return 0 };
        let half = |salt: u8| {
            let mut hasher = DefaultHasher::new();
            (salt, boot, self.id.as_u128(), lock.dev(), lock.ino()).hash(&mut hasher);
            u128::from(hasher.finish())
        };
        half(1) << 64 | half(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_one_processes_and_keeps_its_name() {
        let dir = std::env::temp_dir().join(format!("cairn-node-{}", std::process::id()));
        let dir = dir.as_path();
        let first = Node::claim(dir).unwrap();
        let again = File::open(dir.join("lock")).unwrap();
        assert!(matches!(again.try_lock(), Err(TryLockError::WouldBlock)));
        let id = first.id;
        drop(first);
        let second = Node::claim(dir).unwrap();
        assert_eq!(second.id, id);
        let holder = second.holder(7);
        drop(second);
        assert_eq!(Node::claim(dir).unwrap().holder(7), holder, "the next process");
        assert_ne!(Node::claim(dir).unwrap().holder(8), holder, "another boot");
        let copy = dir.join("copy");
        std::fs::create_dir_all(&copy).unwrap();
        std::fs::copy(dir.join("node.id"), copy.join("node.id")).unwrap();
        assert_ne!(Node::claim(&copy).unwrap().holder(7), holder, "a copy of the folder");
        std::fs::write(dir.join("node.id"), "x").unwrap();
        assert!(format!("{:#}", Node::claim(dir).unwrap_err()).contains("holds no id"));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
