//! Volumes that the configuration file has this process stand by for.
//!
//! One that is named there and not known yet is asked for where it is served, again and again until somebody
//! answers; from then on the state file knows where its members are, and this process stands by for it whether
//! that other one lives or not.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use cairn_api::v1;
use cairn_engine::control::Command;
use parking_lot::Mutex;
use tonic::Status;

use super::Service;
use crate::client::{connect, said, share};
use crate::config::{Config, Standby};

/// How often what could not be done is tried again.
const PERIOD: Duration = Duration::from_secs(1);

/// What the configuration names, and how far that is.
#[derive(Debug)]
pub(crate) struct Standbys {
    wanted: Mutex<Vec<Wanted>>,
    /// Why a volume is not stood by for yet, as it was said last.
    problems: Mutex<HashMap<String, String>>,
}

#[derive(Debug, Clone)]
struct Wanted {
    standby: Standby,
    /// It is stood by for, or served, as the configuration says.
    set_up: bool,
    /// Whoever serves it knows of this process.
    announced: bool,
}

impl Standbys {
    pub(super) fn new(config: &Config) -> Self {
        let wanted = |standby: &Standby| Wanted {
            standby: standby.clone(),
            set_up: false,
            announced: standby.from.is_none(),
        };
        Self {
            wanted: Mutex::new(config.standbys.iter().map(wanted).collect()),
            problems: Mutex::default(),
        }
    }

    /// Somebody deleted the volume here: it is left alone until the next start.
    pub(super) fn leave_alone(&self, volume: &str) {
        self.wanted.lock().retain(|w| w.standby.volume != volume);
    }
}

impl Standby {
    fn sharing(&self) -> v1::Sharing {
        v1::Sharing {
            auto: self.take_over_after.0 > 0,
            auto_after_ms: self.take_over_after.0 * 1_000,
            elsewhere: self.elsewhere.iter().map(ToString::to_string).collect(),
            iscsi_elsewhere: self.iscsi_elsewhere.clone(),
        }
    }

    fn request(&self) -> v1::StandByVolumeRequest {
        let key = self.key_file.is_some() || !self.key_command.is_empty();
        v1::StandByVolumeRequest {
            name: self.volume.clone(),
            id: self.id.clone().unwrap_or_default(),
            replicas: self.replicas.clone(),
            witnesses: self.witnesses.clone(),
            encryption: key.then(|| v1::KeySource {
                file: self.key_file.clone().unwrap_or_default(),
                command: self.key_command.clone(),
                allow_open_file: false,
            }),
            sharing: Some(self.sharing()),
            ..v1::StandByVolumeRequest::default()
        }
    }
}

impl Service {
    /// Sets up what the configuration names, for as long as something is left to be done.
    pub(crate) async fn look_after_standbys(self: Arc<Self>) {
        loop {
            let left: Vec<Wanted> = {
                let wanted = self.standbys.wanted.lock();
                wanted.iter().filter(|w| !w.set_up || !w.announced).cloned().collect()
            };
            if left.is_empty() {
                return;
            }
            for mut wanted in left {
                let name = wanted.standby.volume.clone();
                if let Err(error) = self.set_up(&mut wanted).await {
                    self.standby_waits(&name, &format!("{error:#}"));
                }
                let mut all = self.standbys.wanted.lock();
                if let Some(known) = all.iter_mut().find(|w| w.standby.volume == name) {
                    (known.set_up, known.announced) = (wanted.set_up, wanted.announced);
                }
            }
            tokio::time::sleep(PERIOD).await;
        }
    }

    fn standby_waits(&self, volume: &str, why: &str) {
        let before = self.standbys.problems.lock().insert(volume.to_owned(), why.to_owned());
        if before.as_deref() != Some(why) {
            tracing::warn!(volume = %volume, why, "a standby of the configuration waits; it is tried again");
        }
    }

    async fn set_up(&self, wanted: &mut Wanted) -> Result<()> {
        let name = wanted.standby.volume.clone();
        let told = |status: Status| anyhow!("{}", said(&status));
        let known = self.state.lock().volumes.iter().find(|v| v.name == name).cloned();
        if let Some(saved) = &known
            && !wanted.set_up
        {
            // What it was told by a call, or by an older file: who else there is stays known.
            let mut sharing = wanted.standby.sharing();
            for address in saved.shared.iter().flat_map(|shared| &shared.elsewhere) {
                if !sharing.elsewhere.contains(address) {
                    sharing.elsewhere.push(address.clone());
                }
            }
            let request = v1::ShareVolumeRequest { name: name.clone(), sharing: Some(sharing) };
            self.share(request).await.map_err(told)?;
            wanted.set_up = true;
        }
        if known.is_some() && wanted.announced {
            return Ok(());
        }
        let mut request = wanted.standby.request();
        if let Some(socket) = &wanted.standby.from {
            let mut serving = connect(socket).await.with_context(|| match known {
                Some(_) => format!("it is not told of this process that stands by for `{name}`"),
                None => format!("where volume `{name}` is, is asked there"),
            })?;
            let own = self.ask(|reply| Command::ListReplicas { reply }).await.map_err(told)?;
            let here = share::Here {
                nvmf: self.addresses.iter().map(ToString::to_string).collect(),
                iscsi: self.portals(),
                replicas: own.into_iter().map(|r| self.replica_message(r)).collect(),
            };
            share::learn_from(&here, &mut serving, &mut request).await?;
            wanted.announced = true;
        }
        if known.is_none() {
            self.begin_stand_by(request).await.map_err(told)?;
            wanted.set_up = true;
        } else if let Some(sharing) = request.sharing {
            let request = v1::ShareVolumeRequest { name: name.clone(), sharing: Some(sharing) };
            self.share(request).await.map_err(told)?;
        }
        tracing::info!(volume = %name, "standing by as the configuration says");
        Ok(())
    }
}
