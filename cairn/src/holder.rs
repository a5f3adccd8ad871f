//! What tells this process, and those before it on the same node, from all others.
//!
//! A nexus may answer reads for as long as its lease lasts, so whoever takes its volume over waits. A process
//! that finds its own node's word on the volume need not, where it is sure that the process before it is
//! dead: it holds the lock on a file of the state directory, which the kernel gives away only once every
//! thread of the one before is gone. The word is made of what that file holds, of which file it is, and
//! of this boot, so a copy of the directory elsewhere, or a copy of the machine that boots, says another.

use std::fs::{File, OpenOptions, TryLockError};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::serve::patiently;

/// The word, and the lock that makes it true.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) id: u128,
    _lock: Option<File>,
}

/// Takes the lock. Where that is not possible the word is 0, which nobody believes.
pub(crate) fn take(state_dir: &Path, boot: Option<u128>) -> Holder {
    let path = state_dir.join("holder");
    match (boot, lock(&path)) {
        (Some(boot), Ok((file, id))) => Holder { id: word(boot, &id), _lock: Some(file) },
        (None, Ok(_)) => Holder { id: 0, _lock: None },
        (_, Err(error)) => {
            tracing::warn!(
                path = %path.display(), %error,
                "the state directory cannot be locked: after a crash of this process its volumes are \
                 served again some seconds later than they could be"
            );
            Holder { id: 0, _lock: None }
        }
    }
}

/// Locks the file, and tells what identifies it.
fn lock(path: &Path) -> std::io::Result<(File, impl std::hash::Hash)> {
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(true).create(true).truncate(false).open(path)?;
    let taken = |e: &TryLockError| matches!(e, TryLockError::WouldBlock);
    patiently(taken, || file.try_lock())?;
    let mut text = String::new();
    let held = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
    let id: uuid::Uuid = match held {
        Some(id) => id,
        None => {
            let id = uuid::Uuid::new_v4();
            file.rewind()?;
            file.set_len(0)?;
            writeln!(file, "{id}")?;
            file.sync_all()?;
            id
        }
    };
    let meta = file.metadata()?;
    Ok((file, (id.as_u128(), meta.dev(), meta.ino())))
}

/// Never 0.
fn word(boot: u128, file: &impl std::hash::Hash) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, boot).hash(&mut hasher);
        file.hash(&mut hasher);
        u128::from(hasher.finish())
    };
    (half(1) << 64 | half(2)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_is_the_same_for_the_next_process_and_for_no_other() {
        let dir = std::env::temp_dir().join(format!("cairn-holder-{}", std::process::id()));
        let other = dir.join("other");
        std::fs::create_dir_all(&other).unwrap();
        let first = take(&dir, Some(7));
        assert_ne!(first.id, 0);
        let id = first.id;
        drop(first);
        assert_eq!(take(&dir, Some(7)).id, id);
        assert_ne!(take(&dir, Some(8)).id, id, "another boot");
        std::fs::copy(dir.join("holder"), other.join("holder")).unwrap();
        assert_ne!(take(&other, Some(7)).id, id, "another file");
        assert_eq!(take(&dir, None).id, 0);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
