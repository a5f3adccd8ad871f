//! Volumes that several processes share, of which one serves each at a time.
//!
//! A process that comes up looks first: what it served before it serves again if nobody else does, and what it
//! stood by for it stands by for again.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use cairn_api::v1;
use cairn_engine::block::VolumeId;
use cairn_engine::control::Command;
use cairn_engine::nexus::Purpose;
use cairn_engine::{Sharing, VolumeReport};
use tonic::Status;

use super::iscsi::parse_portal;
use super::{CREATE_POLL, Service, check_name, iscsi, keys};
use crate::state::{SavedSharing, SavedVolume};

/// How long a process stands by at least before it takes a volume over by itself.
const AUTO_AFTER_MS: u64 = 10_000;
/// A lease of another process may have to be waited for, which is a minute at most.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(90);
/// What keeps a process from taking a volume over is found out within this time, where the replicas are there.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

impl SavedSharing {
    pub(super) fn message(&self) -> v1::Sharing {
        let Self { auto, auto_after_ms, elsewhere, iscsi_elsewhere, .. } = self.clone();
        v1::Sharing { auto, auto_after_ms, elsewhere, iscsi_elsewhere }
    }

    /// What the engine is told.
    pub(super) fn sharing(&self) -> Result<Sharing, String> {
        let address = |text: &String| {
            let wrong = format!("`{text}` is no address; write one such as 192.0.2.11:4420");
            text.parse::<SocketAddr>().map_err(|_| wrong)
        };
        let after_ms = if self.auto_after_ms == 0 { AUTO_AFTER_MS } else { self.auto_after_ms };
        Ok(Sharing {
            auto_after_ms: self.auto.then_some(after_ms),
            elsewhere: self.elsewhere.iter().map(address).collect::<Result<_, _>>()?,
            iscsi_elsewhere: self
                .iscsi_elsewhere
                .iter()
                .map(|text| parse_portal(text))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Why the nexus of a volume comes up that is there already.
    pub(super) fn purpose(&self, sharing: &Sharing) -> Purpose {
        let auto_after_ms = if self.standby { sharing.auto_after_ms } else { Some(0) };
        Purpose::StandBy { auto_after_ms }
    }
}

fn saved_of(message: Option<v1::Sharing>, standby: bool) -> Result<SavedSharing, Status> {
    let v1::Sharing { auto, auto_after_ms, elsewhere, iscsi_elsewhere } =
        message.unwrap_or_default();
    let saved = SavedSharing { standby, auto, auto_after_ms, elsewhere, iscsi_elsewhere };
    saved.sharing().map_err(Status::invalid_argument)?;
    Ok(saved)
}

impl Service {
    pub(super) async fn share(
        &self,
        request: v1::ShareVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let name = request.name;
        let report = self.known(&name).await?;
        let saved = saved_of(request.sharing, report.state == "standby")?;
        let sharing = saved.sharing().map_err(Status::internal)?;
        self.change_one(&name, |volume| volume.shared = Some(saved))?;
        let of = name.clone();
        self.ask(|reply| Command::ShareVolume { name: of, sharing, reply }).await?;
        Ok(self.volume_message(self.known(&name).await?))
    }

    /// Begins to stand by, where this process could serve the volume.
    pub(super) async fn stand_by(
        &self,
        request: v1::StandByVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let name = request.name.clone();
        self.begin_stand_by(request).await?;
        match self.await_fit(&name).await {
            Ok(report) => Ok(self.volume_message(report)),
            Err(status) => {
                let of = name.clone();
                self.ask(|reply| Command::RemoveVolume { name: of, reply }).await?;
                self.forget(&name)?;
                Err(status)
            }
        }
    }

    /// Begins to stand by.
    pub(super) async fn begin_stand_by(
        &self,
        request: v1::StandByVolumeRequest,
    ) -> Result<(), Status> {
        let name = request.name;
        check_name("volume", &name)?;
        if self.state.lock().volumes.iter().any(|v| v.name == name) {
            return Err(Status::already_exists(format!("volume `{name}` exists already")));
        }
        if request.replicas.is_empty() {
            return Err(Status::invalid_argument("name the volume's replicas"));
        }
        let id: VolumeId = request.id.parse().map_err(|_| {
            let id = &request.id;
            Status::invalid_argument(format!(
                "`{id}` is no volume's id; it is one of a volume that exists"
            ))
        })?;
        let saved = SavedVolume {
            id: id.to_string(),
            name: name.clone(),
            block_size: request.block_size,
            replicas: request.replicas,
            witnesses: request.witnesses,
            allowed_hosts: request.allowed_hosts,
            child_deadline_ms: request.child_deadline_ms,
            encryption: keys::for_new(request.encryption).await?,
            shared: Some(saved_of(request.sharing, true)?),
            iscsi: request.iscsi.map(|export| iscsi::saved_of(&name, export)).transpose()?,
            created: true,
            ..SavedVolume::default()
        };
        let spec = self.spec_of(&saved, keys::spec_of(&saved).await?);
        let spec = spec.map_err(Status::invalid_argument)?;
        self.remember(saved)?;
        let added = self.ask(|reply| Command::AddVolume { spec, reply }).await;
        if let Err(status) = added {
            self.forget(&name)?;
            return Err(status);
        }
        Ok(())
    }

    /// Waits until the volume's configuration is known, where its replicas are there, and fails where this process
    /// could not serve it.
    pub(super) async fn await_fit(&self, name: &str) -> Result<VolumeReport, Status> {
        let until = Instant::now() + LOOK_TIMEOUT;
        loop {
            let report = self.known(name).await?;
            // Its size is what the configuration says.
            if report.unfit.is_empty() && report.blocks > 0 || report.serving {
                return Ok(report);
            }
            if Instant::now() > until {
                return match report.unfit.as_str() {
                    "" => Ok(report),
                    why => Err(Status::failed_precondition(format!(
                        "volume `{name}` could not be taken over here: {why}"
                    ))),
                };
            }
            tokio::time::sleep(CREATE_POLL).await;
        }
    }

    pub(super) async fn take_over(&self, name: String) -> Result<v1::Volume, Status> {
        // Remembered first: a process that dies meanwhile serves the volume if nobody else does.
        let before = self.saved(&name)?.shared;
        self.note_role(&name, false)?;
        let taken = self.take_over_now(name.clone()).await;
        // Whoever waits no longer has not stopped it.
        if let Err(status) = &taken
            && status.code() != tonic::Code::DeadlineExceeded
            && before.is_some_and(|shared| shared.standby)
        {
            self.note_role(&name, true)?;
        }
        taken
    }

    async fn take_over_now(&self, name: String) -> Result<v1::Volume, Status> {
        let of = name.clone();
        let taken = self.ask(|reply| Command::TakeOver { name: of, reply });
        let Ok(taken) = tokio::time::timeout(TAKE_OVER_TIMEOUT, taken).await else {
            let report = self.known(&name).await?;
            return Err(Status::deadline_exceeded(format!(
                "volume `{name}` is {}: {}; it goes on being taken over",
                report.state, report.detail
            )));
        };
        taken?;
        Ok(self.volume_message(self.await_serving(&name).await?))
    }

    pub(super) async fn hand_over(&self, name: String) -> Result<v1::Volume, Status> {
        let of = name.clone();
        self.ask(|reply| Command::StandBy { name: of, reply }).await?;
        // A process that dies before this serves the volume again, if nobody else does by then.
        self.note_role(&name, true)?;
        Ok(self.volume_message(self.known(&name).await?))
    }

    fn note_role(&self, name: &str, standby: bool) -> Result<(), Status> {
        self.change_one(name, |volume| {
            if let Some(shared) = volume.shared.as_mut() {
                shared.standby = standby;
            }
        })
    }
}
