//! Which of a volume's blocks take space, as initiators ask (GET LBA STATUS).
//!
//! A replica in a pool of this process tells, where it is in sync and its nexus may use it: what it has nothing of reads as
//! zeros on all. Where there is none, everything counts as mapped, which is what a unit may say of what it does not know.

use cairn_block::{BlockSize, LbaRange};
use cairn_iscsi::connection::LbaExtent;
use cairn_nexus::change;
use cairn_nvmf::target::NamespaceHandle;
use cairn_reactor::Driver;
use cairn_replica::ReplicaSlot;

use super::Shard;
use super::io::{Asker, Export};
use super::volumes::{LocalRoute, Route};

/// Logical extents that are looked at for one answer: 4 GiB. Whoever wants to know more asks again.
const MOST: usize = 4096;

impl<D: Driver> Shard<D> {
    pub(super) fn answer_lba_status(
        &mut self,
        asker: Asker,
        namespace: NamespaceHandle,
        range: LbaRange,
        max_extents: u32,
    ) {
        let Asker::Iscsi { conn, generation, slot } = asker else { return };
        let extents = self.lba_extents(namespace, range, max_extents as usize);
        let host = self.initiators.hosts.get_mut(conn);
        if let Some(host) = host.filter(|host| host.generation == generation) {
            host.conn.complete_lba_status(slot, &extents, self.driver.memory());
            self.touch_initiator(conn);
        }
    }

    fn lba_extents(
        &self,
        namespace: NamespaceHandle,
        range: LbaRange,
        most: usize,
    ) -> Vec<LbaExtent> {
        let whole = LbaExtent { blocks: blocks_of(range.blocks()), mapped: true };
        let Some(Some(&Export::Volume(at))) =
            self.exports.get(namespace.0 as usize).map(Option::as_ref)
        else {
            return vec![whole];
        };
        let Some((pool, slot)) = self.local_member(at) else { return vec![whole] };
        let pool = &self.pools[usize::from(pool)].pool;
        let shift = self.volumes[at].block_size.shift();
        let size = u64::from(pool.usage().extent_bytes) >> shift;
        let Ok(first) = u32::try_from(range.start().0 / size) else { return vec![whole] };
        let mut map = [0; MOST];
        let told = pool.changes(slot, first, u64::MAX, &mut map).unwrap_or(0);
        let mut extents: Vec<LbaExtent> = Vec::new();
        let mut at = range.start().0;
        for (byte, logical) in map[..told].iter().zip(u64::from(first)..) {
            let end = ((logical + 1) * size).min(range.end().0);
            let mapped = byte & change::MAPPED != 0;
            let blocks = end.saturating_sub(at);
            let full = extents.len() == most;
            match extents.last_mut().filter(|last| last.mapped == mapped) {
                Some(last) => last.blocks = blocks_of(u64::from(last.blocks) + blocks),
                None if full => break,
                None => extents.push(LbaExtent { blocks: blocks_of(blocks), mapped }),
            }
            at = end;
            if at == range.end().0 {
                break;
            }
        }
        if extents.is_empty() { vec![whole] } else { extents }
    }

    /// A replica of this process that holds every acked write of a volume.
    fn local_member(&self, at: u32) -> Option<(u16, ReplicaSlot)> {
        let volume = &self.volumes[at];
        let status = volume.nexus.status();
        if !status.state.is_serving() {
            return None;
        }
        volume.routes.iter().zip(status.children).find_map(|(route, child)| match *route {
            Route::Local(LocalRoute { pool, slot, fenced: false, leaving: false, .. })
                if child.in_sync && !child.witness =>
            {
                Some((pool, slot))
            }
            _ => None,
        })
    }
}

fn blocks_of(blocks: u64) -> u32 {
    u32::try_from(blocks).unwrap_or(u32::MAX - u32::MAX % (BlockSize::B4096.bytes() / 512))
}
