//! What a volume's nexus tells of: what its hosts see of it follows.

use cairn_block::{BlockSize, IoStatus};
use cairn_nexus::{ChildId, Event, VolumeState};
use cairn_nvmf::ana::AnaState;
use cairn_nvmf::target::{NamespaceConfig, SubsystemConfig};
use cairn_reactor::Driver;

use super::Shard;
use super::io::Export;
use super::pools::serial_of;
use super::volumes::{PendingChange, Route};

impl<D: Driver> Shard<D> {
    pub(super) fn volume_event(&mut self, at: u32, event: Event, now: u64) {
        let volume = &mut self.volumes[at];
        let name = &volume.spec.name;
        let child = |c: ChildId| volume.spec.children[usize::from(c.0)].id;
        match event {
            Event::State(state) => {
                let (word, detail) = (state.word(), state.detail());
                match state {
                    VolumeState::Online | VolumeState::Assembling(_) => {
                        tracing::info!(volume = %name, state = word, detail, "volume state");
                    }
                    _ => tracing::warn!(volume = %name, state = word, detail, "volume state"),
                }
                if let VolumeState::Refused(why) = &state {
                    volume.refusal = Some(why.clone());
                } else if state.is_serving() {
                    volume.refusal = None;
                }
                if matches!(state, VolumeState::Fenced | VolumeState::Refused(_)) {
                    let why = format!("the volume is {word}: {detail}");
                    volume.fail_change(&why);
                    self.forget_restore(at, &why);
                    self.forget_deletions(at, &why);
                    self.forget_reservations(at, IoStatus::PathError);
                    self.forget_sanitize(at, IoStatus::PathError);
                }
                self.export_if_due(at);
                if self.volumes[at].nexus.state().is_serving() {
                    self.load_reservations(at);
                    self.load_sanitize(at, now);
                }
                self.update_ana(at);
                self.tell_activation(at);
                self.stand_by_if_over(at, now);
            }
            Event::WritesLost(c) => tracing::error!(
                volume = %name,
                replica = %child(c),
                "the only replica in sync lost power, or its pool failed: writes that were not flushed may be lost; \
                 each host's next flush fails"
            ),
            Event::ChildFailing(c, reason) => {
                tracing::warn!(volume = %name, replica = %child(c), %reason, "replica failed");
            }
            Event::ChildOut(c, reason) => tracing::warn!(
                volume = %name, replica = %child(c), %reason,
                "replica is out of the in-sync set"
            ),
            Event::ChildOnline(c) => {
                tracing::info!(volume = %name, replica = %child(c), "replica is online");
                self.deletions_missed(at, now);
            }
            Event::Committed { epoch, seq } => {
                tracing::info!(volume = %name, %epoch, seq, "configuration stored");
                self.advance_deletions(at, now);
            }
            Event::Locked if !volume.removing() => self.volume_locked(at, now),
            Event::Locked => {}
            Event::Place { replica, witness, place } => {
                self.learn_place(at, (replica, witness), place, now);
            }
            Event::Restoring(snapshot) => self.restoring_changed(at, snapshot, now),
            Event::VoterAdded(c) => self.voter_added(at, c),
            Event::VoterRemoved(c) => self.voter_removed(at, c, now),
            Event::VotersUnchanged(c, why) => self.voters_unchanged(at, c, &why, now),
            Event::Forced { source, lineage } => tracing::warn!(
                volume = %name, replica = %source, lineage,
                "the volume is taken from one replica by force: acked writes that only others have are \
                 given up"
            ),
            Event::Resized(blocks) => self.volume_resized(at, blocks),
            Event::ResizeFailed(child, status) => self.resize_failed(at, child, status),
            Event::Reserved => self.reservations_stored(at, now),
            Event::Sanitize => self.sanitize_stored(at, now),
            Event::KeyChanged => {
                tracing::info!(volume = %name, "the volume's key is wrapped anew");
                let change = volume.change.take_if(|c| matches!(c, PendingChange::Key(_)));
                if let Some(PendingChange::Key(reply)) = change {
                    reply.send(Ok(()));
                }
            }
            Event::Found { lba, child: c, found } => tracing::warn!(
                volume = %name, replica = %child(c), lba = lba.0, outcome = found.word(),
                "a block did not verify, or differed"
            ),
            Event::ScrubFinished => tracing::info!(volume = %name, "scrub finished"),
            Event::Reconciling(extents) => tracing::info!(
                volume = %name, extents,
                "what was being written when the volume was last served is made alike"
            ),
            Event::Reconciled => tracing::info!(volume = %name, "the replicas are alike"),
            Event::RebuildStarted(c, why) => tracing::info!(
                volume = %name, replica = %child(c), %why, "rebuild started"
            ),
            Event::RebuildFinished(c, bytes) => tracing::info!(
                volume = %name, replica = %child(c), bytes, "rebuild finished: the replica is in sync"
            ),
            Event::RebuildAborted(c, why) => tracing::warn!(
                volume = %name, replica = %child(c), %why, "rebuild given up; it is tried again"
            ),
            Event::ChildOffline(c) => tracing::warn!(
                volume = %name, replica = %child(c),
                "the pool of the replica is offline: it stores nothing, and is not counted on"
            ),
            Event::ResetChild(c) => {
                if let Route::Remote { link } = volume.routes[usize::from(c.0)] {
                    self.fail_link(link, "the nexus gave the session up");
                }
            }
        }
    }

    pub(super) fn export_if_due(&mut self, at: u32) {
        let volume = &self.volumes[at];
        let nexus = &volume.nexus;
        let stands_by = matches!(nexus.state(), VolumeState::StandBy(_)) && nexus.blocks() > 0;
        let due = stands_by || nexus.state().is_serving() && nexus.restoring().is_none();
        if due && volume.export.is_none() && !volume.removing() && self.learn_block_size(at) {
            self.export_volume(at);
        }
    }

    /// The size of a volume as hosts count it.
    pub(super) fn host_blocks(&self, at: u32) -> u64 {
        let volume = &self.volumes[at];
        let bytes = BlockSize::B4096.bytes_of(volume.nexus.blocks());
        bytes >> volume.block_size.shift()
    }

    /// Lets hosts connect.
    fn export_volume(&mut self, at: u32) {
        let volume = &mut self.volumes[at];
        let serves = volume.nexus.state().is_serving();
        assert!(
            !serves || volume.key.is_some() != volume.nexus.encryption().is_empty(),
            "a volume is served as its configuration says"
        );
        // The keys that opened it are not needed any more, unless it may have to be opened again.
        if let Some(encryption) = volume.spec.encryption.as_mut()
            && volume.spec.sharing.is_none()
        {
            encryption.keks.clear();
        }
        let spec = &self.volumes[at].spec;
        let (name, id) = (spec.name.clone(), spec.id);
        let added = self.target.add_subsystem(SubsystemConfig {
            nqn: spec.nqn.clone(),
            serial: serial_of(id.0),
            cntlid_min: self.config.cntlid_min,
            cntlid_max: self.config.cntlid_max,
            allowed_hosts: spec.allowed_hosts.clone(),
            vendor_commands: false,
            discoverable: true,
            ana: Some(AnaState::Inaccessible),
        });
        let subsystem = match added {
            Ok(subsystem) => subsystem,
            Err(error) => {
                tracing::error!(volume = %name, %error, "the volume cannot be exported");
                return;
            }
        };
        let handle = self.export_handle(Export::Volume(at));
        let namespace = NamespaceConfig {
            nsid: 1,
            handle,
            blocks: self.host_blocks(at),
            block_size: self.volumes[at].block_size,
            id: id.0,
            volatile_write_cache: true,
            reservations: true,
        };
        if let Err(error) = self.target.add_namespace(subsystem, namespace) {
            tracing::error!(volume = %name, %error, "the volume cannot be exported");
        }
        self.volumes[at].export = Some((subsystem, handle));
        self.add_unit(at);
        self.update_ana(at);
        self.tell_paths(at);
    }
}
