//! Where a volume's key-encryption key comes from. The key itself is never stored, logged or shown.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use cairn_engine::crypt::{DATA_KEY_LEN, Envelope, Kek, VolumeKey};
use cairn_engine::{EncryptionSpec, block::VolumeId};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// A key command must end within this time.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked at meanwhile.
const COMMAND_POLL: Duration = Duration::from_millis(10);
/// More than this is no key, and no more of a command's complaint is repeated.
const MOST: usize = 4096;

/// A file or a command that gives a key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeySource {
    /// 32 bytes, or 64 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key_file: Option<String>,
    /// A program and its arguments, which prints the key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) key_command: Vec<String>,
    /// The file may be readable by others than its owner.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) allow_open_file: bool,
    /// The id of the key that it gave when it was taken up.
    #[serde(default)]
    pub(crate) key_id: String,
}

/// How a volume's key is had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedEncryption {
    /// Where the key comes from.
    pub(crate) key: KeySource,
    /// Where the one comes from that it was to be changed to, while it is not known whether it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<KeySource>,
    /// The wrapped key of the volume that this one is a clone of, in hexadecimal digits: it is this one's
    /// key, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cloned: Option<String>,
}

impl SavedEncryption {
    /// The same for a clone.
    pub(crate) fn for_clone(&self, envelope: &Envelope) -> Self {
        let digits = envelope.encode().iter().map(|b| format!("{b:02x}")).collect();
        Self { cloned: Some(digits), ..self.clone() }
    }

    fn cloned(&self) -> Result<Option<Envelope>> {
        let Some(text) = &self.cloned else { return Ok(None) };
        let pairs = text.as_bytes().chunks(2).map(|pair| {
            let pair = std::str::from_utf8(pair).ok()?;
            u8::from_str_radix(pair, 16).ok()
        });
        let bytes: Option<Vec<u8>> = pairs.collect();
        let bytes = bytes.context("the clone's wrapped key in the state file is damaged")?;
        Ok(Some(Envelope::decode(&bytes)?))
    }
}

impl KeySource {
    /// Reads the key. This waits for a file or for a process.
    pub(crate) fn read(&self) -> Result<Kek> {
        let (text, what) = match (&self.key_file, self.key_command.split_first()) {
            (Some(path), None) => {
                let what = format!("the key file {path}");
                let read = read_file(path, self.allow_open_file, "--allow-open-key-file");
                (read.with_context(|| what.clone())?, what)
            }
            (None, Some((program, args))) => {
                let what = format!("the key command `{}`", self.key_command.join(" "));
                (run(program, args).with_context(|| what.clone())?, what)
            }
            _ => bail!("name either a key file or a key command"),
        };
        Kek::parse(&text).with_context(|| what)
    }
}

/// Reads a file with a secret, which others than its owner may read only where `allow_open` says so; `option` is how that
/// is said.
pub(crate) fn read_file(path: &str, allow_open: bool, option: &str) -> Result<Zeroizing<Vec<u8>>> {
    let mut file = File::options()
        .read(true)
        // A pipe that nobody writes to would hold the process up.
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)?;
    let mode = file.metadata()?.mode() & 0o777;
    if mode & 0o077 != 0 && !allow_open {
        bail!(
            "others than its owner may read it (mode {mode:03o}): `chmod 600` it, or say {option}"
        );
    }
    take(&mut file)
}

/// All that there is, up to a little more than a key can be.
fn take(from: &mut impl Read) -> Result<Zeroizing<Vec<u8>>> {
    // Never moved to a larger place, which would leave a copy behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST));
    from.take(MOST as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What a command prints.
fn run(program: &str, args: &[String]) -> Result<Zeroizing<Vec<u8>>> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot be started")?;
    let stdout = child.stdout.take().map(|mut out| std::thread::spawn(move || take(&mut out)));
    let stderr = child.stderr.take().map(|mut out| std::thread::spawn(move || take(&mut out)));
    let status = wait(&mut child)?;
    let read = |thread: Option<std::thread::JoinHandle<Result<Zeroizing<Vec<u8>>>>>| {
        let thread = thread.ok_or_else(|| anyhow!("its output was not piped"))?;
        thread.join().map_err(|_| anyhow!("its output cannot be read"))?
    };
    if !status.success() {
        let said = read(stderr)?;
        let said = String::from_utf8_lossy(&said);
        bail!("ended with {status}, saying: {}", said.trim());
    }
    read(stdout)
}

fn wait(child: &mut Child) -> Result<std::process::ExitStatus> {
    let until = Instant::now() + COMMAND_TIMEOUT;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            bail!("did not end within {} s and was killed", COMMAND_TIMEOUT.as_secs());
        }
        std::thread::sleep(COMMAND_POLL);
    }
}

/// What the engine is told of an encrypted volume: the keys that can be had, and why others cannot; for a new
/// volume its own key, made here.
pub(crate) fn spec(saved: &SavedEncryption, volume: VolumeId, new: bool) -> Result<EncryptionSpec> {
    let mut keks = Vec::new();
    let mut missing = Vec::new();
    for source in [Some(&saved.key), saved.next.as_ref()].into_iter().flatten() {
        match source.read() {
            Ok(kek) => keks.push(kek),
            Err(error) => missing.push(format!("the key cannot be had: {error:#}")),
        }
    }
    let cloned = saved.cloned()?;
    let owner = cloned.as_ref().map(|envelope| envelope.owner);
    let new = match (keks.first(), cloned) {
        (Some(_), Some(envelope)) if new => Some(Box::new(envelope)),
        (Some(kek), None) if new => Some(Box::new(make(kek, volume)?)),
        _ => None,
    };
    Ok(EncryptionSpec { keks, missing: missing.join("; "), new, owner })
}

/// A new volume's key, wrapped.
fn make(kek: &Kek, volume: VolumeId) -> Result<Envelope> {
    let mut bytes = Zeroizing::new([0; DATA_KEY_LEN]);
    getrandom::fill(bytes.as_mut()).map_err(|e| anyhow!("no random bytes are to be had: {e}"))?;
    Ok(kek.wrap(&VolumeKey::new(*bytes)?, volume, nonce()?))
}

/// Random bytes that go with one wrapping.
pub(crate) fn nonce() -> Result<[u8; 12]> {
    let mut bytes = [0; 12];
    getrandom::fill(&mut bytes).map_err(|e| anyhow!("no random bytes are to be had: {e}"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn command(script: &str) -> KeySource {
        let key_command = ["sh", "-c", script].map(str::to_owned).to_vec();
        KeySource { key_command, ..KeySource::default() }
    }

    #[test]
    fn a_key_file_must_be_its_owners_alone() {
        let path = std::env::temp_dir().join(format!("cairn-key-{}", std::process::id()));
        std::fs::write(&path, [7; 32]).unwrap();
        let key_file = Some(path.display().to_string());
        let source = KeySource { key_file, ..KeySource::default() };
        let set = |mode| std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        set(0o600);
        assert_eq!(source.read().unwrap(), Kek::parse(&[7; 32]).unwrap());
        set(0o640);
        let error = format!("{:#}", source.read().unwrap_err());
        assert!(error.contains("640") && error.contains("chmod 600"), "{error}");
        let told = KeySource { allow_open_file: true, ..source.clone() };
        assert!(told.read().is_ok());
        set(0o400);
        std::fs::remove_file(&path).unwrap();
        let error = format!("{:#}", source.read().unwrap_err());
        assert!(error.contains(&path.display().to_string()), "{error}");
    }

    #[test]
    fn a_key_command_prints_the_key_or_its_complaint_is_told() {
        let digits = "ab".repeat(32);
        let kek = command(&format!("echo {digits}")).read().unwrap();
        assert_eq!(kek, Kek::parse(digits.as_bytes()).unwrap());
        let error = format!("{:#}", command("echo no vault >&2; exit 3").read().unwrap_err());
        assert!(error.contains("no vault") && error.contains('3'), "{error}");
        // What it printed is not repeated: it may be most of a key.
        let error = format!("{:#}", command("printf sec; echo ret").read().unwrap_err());
        assert!(!error.contains("secret") && error.contains("7 bytes"), "{error}");
        assert!(KeySource::default().read().is_err());
    }

    #[test]
    fn each_new_volume_has_a_key_of_its_own() {
        let digits = "cd".repeat(32);
        let saved =
            SavedEncryption { key: command(&format!("echo {digits}")), next: None, cloned: None };
        let [a, b] = [(); 2].map(|()| spec(&saved, VolumeId(1), true).unwrap());
        assert_ne!(a.new, b.new);
        assert!(a.keks[0].unwrap(&a.new.unwrap()).is_ok());
        assert!(spec(&saved, VolumeId(1), false).unwrap().new.is_none());
    }
}
