//! Volumes as logical units of iSCSI targets.

use cairn_api::v1;
use cairn_engine::control::Command;
use cairn_engine::iscsi::chap::Chap;
use cairn_engine::{IscsiExport, IscsiPortal, IscsiReport};
use tonic::Status;

use super::Service;
use crate::chap;
use crate::state::{SavedIscsi, SavedVolume};

/// The target of a volume that nothing else is said of.
fn default_iqn(volume: &str) -> String {
    format!("iqn.2026-11.io.cairn:{}", volume.to_ascii_lowercase())
}

/// A portal as it is written: ADDRESS:PORT,GROUP.
pub(super) fn parse_portal(text: &str) -> Result<IscsiPortal, String> {
    let parsed = text.rsplit_once(',').and_then(|(address, group)| {
        Some(IscsiPortal { address: address.parse().ok()?, group: group.parse().ok()? })
    });
    parsed.ok_or_else(|| {
        format!("`{text}` is no portal; write ADDRESS:PORT,GROUP, such as 192.0.2.11:3260,1, as `cairn volume status` tells")
    })
}

pub(super) fn portal_text(portal: &IscsiPortal) -> String {
    format!("{},{}", portal.address, portal.group)
}

pub(super) fn saved_of(volume: &str, export: v1::IscsiExport) -> Result<SavedIscsi, Status> {
    let lun = u16::try_from(export.lun)
        .map_err(|_| Status::invalid_argument(format!("LUN {}: from 0 to 255", export.lun)))?;
    let iqn = if export.iqn.is_empty() { default_iqn(volume) } else { export.iqn };
    Ok(SavedIscsi {
        iqn: iqn.to_ascii_lowercase(),
        lun,
        initiators: export.initiators,
        chap_file: Some(export.chap_file).filter(|path| !path.is_empty()),
        allow_open_file: export.allow_open_file,
        read_only: export.read_only,
        removable: export.removable,
    })
}

impl SavedIscsi {
    fn chap(&self) -> anyhow::Result<Option<Chap>> {
        self.chap_file.as_ref().map(|path| chap::read(path, self.allow_open_file)).transpose()
    }

    fn export(&self, chap: Option<Chap>) -> IscsiExport {
        let Self { iqn, lun, initiators, read_only, removable, .. } = self.clone();
        IscsiExport { iqn, lun, initiators, chap, read_only, removable }
    }

    /// What the engine is told.
    fn checked(&self) -> Result<IscsiExport, Status> {
        let chap = self.chap().map_err(|e| Status::failed_precondition(format!("{e:#}")))?;
        Ok(self.export(chap))
    }

    /// What the engine is told at a start: without the secrets nobody may log in, and the volume is served all the same.
    pub(super) fn export_now(&self, volume: &str) -> IscsiExport {
        self.chap().map_or_else(
            |error| {
                tracing::error!(
                    %volume, target = %self.iqn,
                    "no initiator can log in: {error:#}; `cairn volume export {volume} --iscsi ...` says anew who may"
                );
                IscsiExport { initiators: Vec::new(), ..self.export(None) }
            },
            |chap| self.export(chap),
        )
    }
}

impl Service {
    /// Where initiators reach the process.
    pub(super) fn portals(&self) -> Vec<String> {
        self.iscsi_portals.iter().map(portal_text).collect()
    }

    pub(super) async fn export(
        &self,
        request: v1::ExportVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let name = request.name;
        let before = self.known_export(&name);
        self.known(&name).await?;
        let export = request.iscsi.ok_or_else(|| Status::invalid_argument("say how: iscsi"))?;
        let mut saved = saved_of(&name, export)?;
        let others = self.others_of(&name, &saved.iqn);
        let silent = saved.initiators.is_empty() && saved.chap_file.is_none();
        if let Some(other) = others.first().filter(|_| silent)
            && let Some(held) = &other.iscsi
        {
            saved.initiators.clone_from(&held.initiators);
            saved.chap_file.clone_from(&held.chap_file);
            saved.allow_open_file = held.allow_open_file;
        }
        let export = saved.checked()?;
        let of = name.clone();
        let engine = export.clone();
        self.ask(|reply| Command::ExportIscsi { name: of, export: Some(engine), reply }).await?;
        let kept = self.change(|volumes| {
            for volume in volumes.iter_mut() {
                if volume.name == name {
                    volume.iscsi = Some(saved.clone());
                } else if let Some(held) = volume.iscsi.as_mut().filter(|i| i.iqn == saved.iqn) {
                    held.initiators.clone_from(&saved.initiators);
                    held.chap_file.clone_from(&saved.chap_file);
                    held.allow_open_file = saved.allow_open_file;
                }
            }
        });
        self.undo_unless(kept, &name, before).await?;
        for other in others {
            let Some(held) = other.iscsi else { continue };
            let SavedIscsi { lun, read_only, removable, .. } = held;
            let export = IscsiExport { lun, read_only, removable, ..export.clone() };
            let name = other.name;
            self.ask(|reply| Command::ExportIscsi { name, export: Some(export), reply }).await?;
        }
        Ok(self.volume_message(self.known(&name).await?))
    }

    pub(super) async fn unexport(&self, name: String) -> Result<v1::Volume, Status> {
        let before = self.known_export(&name);
        let of = name.clone();
        self.ask(|reply| Command::ExportIscsi { name: of, export: None, reply }).await?;
        let kept = self.change_one(&name, |volume| volume.iscsi = None);
        self.undo_unless(kept, &name, before).await?;
        Ok(self.volume_message(self.known(&name).await?))
    }

    /// How a volume is exported by the state file.
    fn known_export(&self, name: &str) -> Option<SavedIscsi> {
        let state = self.state.lock();
        state.volumes.iter().find(|v| v.name == name).and_then(|v| v.iscsi.clone())
    }

    /// Where a change could not be kept for the next start, it is not made: the engine goes back to what was before.
    async fn undo_unless(
        &self,
        kept: Result<(), Status>,
        name: &str,
        before: Option<SavedIscsi>,
    ) -> Result<(), Status> {
        let Err(error) = kept else { return Ok(()) };
        let export = before.map(|saved| saved.export_now(name));
        let name = name.to_owned();
        self.ask(|reply| Command::ExportIscsi { name, export, reply }).await?;
        Err(error)
    }

    /// The other volumes of a target.
    fn others_of(&self, name: &str, iqn: &str) -> Vec<SavedVolume> {
        let state = self.state.lock();
        let of = |v: &&SavedVolume| {
            v.name != name && v.iscsi.as_ref().is_some_and(|iscsi| iscsi.iqn == iqn)
        };
        state.volumes.iter().filter(of).cloned().collect()
    }

    pub(super) fn unit_message(&self, volume: &str, report: IscsiReport) -> v1::IscsiUnit {
        let saved = self.saved(volume).ok().and_then(|volume| volume.iscsi).unwrap_or_default();
        let session = |session: cairn_engine::IscsiSession| v1::IscsiSession {
            initiator: session.initiator,
            isid: session.isid.iter().map(|byte| format!("{byte:02x}")).collect(),
            tsih: u32::from(session.tsih),
            portal_group: u32::from(session.portal_group),
            header_digest: session.header_digest,
            data_digest: session.data_digest,
        };
        v1::IscsiUnit {
            export: Some(v1::IscsiExport {
                iqn: report.iqn,
                lun: u32::from(report.lun),
                initiators: report.initiators,
                chap_file: saved.chap_file.unwrap_or_default(),
                allow_open_file: saved.allow_open_file,
                read_only: report.read_only,
                removable: report.removable,
            }),
            access_state: report.state.to_owned(),
            port_group: u32::from(report.port_group),
            portals: self.portals(),
            sessions: report.sessions.into_iter().map(session).collect(),
            chap: report.chap,
            mutual_chap: report.mutual_chap,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_initiators_may_do_is_kept_over_restarts() {
        for (read_only, removable) in [(false, true), (true, false)] {
            let asked = v1::IscsiExport { read_only, removable, ..v1::IscsiExport::default() };
            let stored = serde_json::to_string(&saved_of("db", asked).unwrap()).unwrap();
            let saved: SavedIscsi = serde_json::from_str(&stored).unwrap();
            let export = saved.checked().unwrap();
            assert_eq!((export.read_only, export.removable), (read_only, removable));
        }
    }
}
