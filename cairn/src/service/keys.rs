//! Encrypted volumes: their keys at creation, at a start, at `unlock` and at `rotate-key`.

use cairn_api::v1;
use cairn_engine::block::VolumeId;
use cairn_engine::control::Command;
use cairn_engine::crypt::Kek;
use cairn_engine::{EncryptionSpec, VolumeReport};
use tonic::Status;

use super::{CHANGE_TIMEOUT, CREATE_POLL, Service};
use crate::keys::{self, KeySource, SavedEncryption};
use crate::state::SavedVolume;

/// What a call says of a key, where it says anything.
fn source_of(message: v1::KeySource) -> Result<KeySource, Status> {
    if message.file.is_empty() == message.command.is_empty() {
        return Err(Status::invalid_argument("name either a key file or a key command"));
    }
    Ok(KeySource {
        key_file: (!message.file.is_empty()).then_some(message.file),
        key_command: message.command,
        allow_open_file: message.allow_open_file,
        key_id: String::new(),
    })
}

/// Reads a key without blocking the runtime. The source then knows the key's id.
async fn read(mut source: KeySource) -> Result<(KeySource, Kek), Status> {
    let read = tokio::task::spawn_blocking(move || {
        let kek = source.read()?;
        source.key_id = kek.id().to_string();
        anyhow::Ok((source, kek))
    });
    read.await
        .map_err(|e| Status::internal(e.to_string()))?
        .map_err(|e| Status::failed_precondition(format!("{e:#}")))
}

/// What the engine is told of the volume's encryption, as a call needs it.
pub(super) async fn spec_of(volume: &SavedVolume) -> Result<Option<EncryptionSpec>, Status> {
    let volume = volume.clone();
    tokio::task::spawn_blocking(move || spec_now(&volume))
        .await
        .map_err(|e| Status::internal(e.to_string()))?
        .map_err(Status::failed_precondition)
}

/// The same, waiting for it.
pub(super) fn spec_now(volume: &SavedVolume) -> Result<Option<EncryptionSpec>, String> {
    let Some(saved) = &volume.encryption else { return Ok(None) };
    let id: VolumeId =
        volume.id.parse().map_err(|e: cairn_engine::block::ParseIdError| e.to_string())?;
    let spec = keys::spec(saved, id, !volume.created).map_err(|e| format!("{e:#}"))?;
    if !spec.missing.is_empty() {
        tracing::warn!(volume = %volume.name, "{}", spec.missing);
    }
    Ok(Some(spec))
}

/// The key that a new volume is to have; it must be there now.
pub(super) async fn for_new(
    message: Option<v1::KeySource>,
) -> Result<Option<SavedEncryption>, Status> {
    let Some(message) = message else { return Ok(None) };
    let (key, _) = read(source_of(message)?).await?;
    Ok(Some(SavedEncryption { key, next: None, cloned: None }))
}

impl Service {
    /// The volume as it is remembered, and how it is encrypted.
    fn encrypted(&self, name: &str) -> Result<(SavedVolume, SavedEncryption), Status> {
        let saved = self.state.lock().volumes.iter().find(|v| v.name == name).cloned();
        let saved = saved.ok_or_else(|| {
            Status::not_found(format!("there is no volume `{name}` in this process"))
        })?;
        let encryption = saved.encryption.clone().ok_or_else(|| {
            Status::failed_precondition(format!("volume `{name}` is not encrypted"))
        })?;
        Ok((saved, encryption))
    }

    fn remember_keys(&self, name: &str, encryption: &SavedEncryption) -> Result<(), Status> {
        self.change(|volumes| {
            for volume in volumes.iter_mut().filter(|v| v.name == name) {
                volume.encryption = Some(encryption.clone());
            }
        })
    }

    pub(super) async fn report(&self, name: &str) -> Result<Option<VolumeReport>, Status> {
        Ok(self.volume_reports().await?.into_iter().find(|v| v.name == name))
    }

    /// Serves a volume whose key could not be had before.
    pub(super) async fn unlock(
        &self,
        request: v1::UnlockVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let name = request.name;
        let (saved, mut encryption) = self.encrypted(&name)?;
        let given = match request.key {
            Some(message) => Some(read(source_of(message)?).await?.0),
            None => None,
        };
        let report = self.report(&name).await?;
        if let Some(report) = report.as_ref().filter(|r| r.serving) {
            // Nothing to unlock; but where the key comes from from now on may be another place.
            let current = key_id(report);
            if let Some(source) = given {
                if current.as_ref() != Some(&source.key_id) {
                    return Err(Status::failed_precondition(format!(
                        "volume `{name}` is served, and its key has id {}; the one given has id {}",
                        current.unwrap_or_default(),
                        source.key_id
                    )));
                }
                let cloned = encryption.cloned.clone();
                self.remember_keys(&name, &SavedEncryption { key: source, next: None, cloned })?;
            }
            return Ok(self.volume_message(report.clone()));
        }
        let mut attempt = saved.clone();
        if let Some(source) = given {
            // The others are tried besides: it may be the key of before or after a change.
            encryption.next = Some(source);
            attempt.encryption = Some(encryption);
        }
        let spec = self.spec_of(&attempt, spec_of(&attempt).await?).map_err(Status::internal)?;
        if report.is_some() {
            let name = name.clone();
            self.ask(|reply| Command::RemoveVolume { name, reply }).await?;
        }
        self.ask(|reply| Command::AddVolume { spec, reply }).await?;
        let report = match &saved.shared {
            // It is another's to serve perhaps.
            Some(_) => self.await_fit(&name).await?,
            None => self.await_serving(&name).await?,
        };
        if !saved.created {
            self.change(|volumes| {
                volumes.iter_mut().filter(|v| v.name == name).for_each(|v| v.created = true);
            })?;
        }
        self.settle(&attempt, &report)?;
        Ok(self.volume_message(report))
    }

    /// Wraps a volume's key with another one. No data is rewritten.
    pub(super) async fn rotate(
        &self,
        request: v1::RotateVolumeKeyRequest,
    ) -> Result<v1::Volume, Status> {
        let name = request.name;
        let (saved, before) = self.encrypted(&name)?;
        let message = request
            .key
            .ok_or_else(|| Status::invalid_argument("name the new key's file or command"))?;
        let (source, kek) = read(source_of(message)?).await?;
        let report = self.report(&name).await?.filter(|r| r.serving).ok_or_else(|| {
            Status::failed_precondition(format!(
                "volume `{name}` is not served; its key can be changed when it is"
            ))
        })?;
        let mut current = before.clone();
        if let Some(next) =
            before.next.clone().filter(|n| key_id(&report) == Some(n.key_id.clone()))
        {
            current.key = next;
        }
        // Both are remembered until it is known which one the volume has: a crash now leaves either.
        let next = Some(source.clone());
        let cloned = before.cloned.clone();
        let both = SavedEncryption { key: current.key, next, cloned: cloned.clone() };
        self.remember_keys(&name, &both)?;
        let nonce = keys::nonce().map_err(|e| Status::internal(format!("{e:#}")))?;
        let wanted = name.clone();
        let change = self.ask(|reply| Command::RotateKey { name: wanted, kek, nonce, reply });
        match tokio::time::timeout(CHANGE_TIMEOUT, change).await {
            Ok(Ok(())) => {}
            // Nothing was begun.
            Ok(Err(status)) if status.code() == tonic::Code::FailedPrecondition => {
                self.remember_keys(&name, &before)?;
                return Err(status);
            }
            Ok(Err(status)) => return Err(status),
            Err(_) => {
                return Err(Status::deadline_exceeded(format!(
                    "the new key of volume `{name}` is not stored by a majority of its replicas yet; \
                     keep both keys until `cairn volume status {name}` shows the new one"
                )));
            }
        }
        let report = self.report(&name).await?.ok_or_else(|| Status::aborted("it was removed"))?;
        let mut after = saved;
        after.encryption = Some(SavedEncryption { key: source, next: None, cloned });
        self.settle(&after, &report)?;
        Ok(self.volume_message(report))
    }

    /// Remembers as the volume's key the one that it is served with.
    fn settle(&self, volume: &SavedVolume, report: &VolumeReport) -> Result<(), Status> {
        let Some(SavedEncryption { key, next, cloned }) = &volume.encryption else {
            return Ok(());
        };
        let current = key_id(report);
        let found = [Some(key), next.as_ref()].into_iter().flatten();
        let Some(key) = found.into_iter().find(|s| Some(&s.key_id) == current.as_ref()) else {
            return Ok(());
        };
        let settled = SavedEncryption { key: key.clone(), next: None, cloned: cloned.clone() };
        self.remember_keys(&volume.name, &settled)
    }

    /// After a start: learns which of two keys each volume has whose key was being changed.
    pub(crate) async fn settle_keys(&self) {
        let changing = |v: &SavedVolume| v.encryption.as_ref().is_some_and(|e| e.next.is_some());
        let mut left: Vec<SavedVolume> = self.state.lock().volumes.clone();
        left.retain(changing);
        while !left.is_empty() {
            let Ok(reports) = self.volume_reports().await else { return };
            left.retain(|volume| {
                let report = reports.iter().find(|r| r.name == volume.name && r.serving);
                let settled = report.map(|report| self.settle(volume, report));
                if let Some(Err(error)) = &settled {
                    tracing::error!(volume = %volume.name, "{}", error.message());
                }
                let known = self.state.lock().volumes.iter().any(|v| v == volume);
                settled.is_none() && known
            });
            tokio::time::sleep(CREATE_POLL * 25).await;
        }
    }
}

fn key_id(report: &VolumeReport) -> Option<String> {
    report.encryption.as_ref().map(|e| e.key_id.to_string())
}
