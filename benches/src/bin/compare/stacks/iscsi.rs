//! Cairn over iSCSI: a volume of one replica, in memory and in a file.

use anyhow::{Context, Result};

use super::cairn::Node;
use super::iscsi_client::Unit;
use super::{Group, Place, Running, Stack};
use crate::load::{Load, Measured};

pub(crate) const MEMORY: Stack = Stack {
    name: "iscsi-memory",
    title: "cairn: a volume of 1 in memory",
    group: Group::Iscsi,
    programs: &[("taskset", "util-linux")],
    start: |place| start(place, "mem".to_owned()),
};

pub(crate) const FILE: Stack = Stack {
    name: "iscsi-file",
    title: "cairn: a volume of 1 in a file",
    group: Group::Iscsi,
    programs: &[("taskset", "util-linux")],
    start: |place| start(place, place.dir.join("pool").display().to_string()),
};

struct Iscsi {
    place: Place,
    node: Node,
    unit: Unit,
}

fn start(place: &Place, pool: String) -> Result<Box<dyn Running>> {
    let node = Node::start(place, "node", &[pool], true)?;
    node.local_volume("v", 1, place.size)?;
    let said = node.ask(&["volume", "export", "v", "--iscsi", "--initiator", "*"])?;
    let unit = &said["iscsi"];
    let text = |name: &str| unit[name].as_str().with_context(|| format!("no {name} in {said}"));
    let portal = unit["portals"][0].as_str().context("it is exported nowhere")?;
    // The portal group's tag comes after it.
    let peer = portal.split(',').next().unwrap_or(portal);
    let unit = Unit { peer: peer.parse()?, iqn: text("iqn")?.to_owned(), lun: 0 };
    unit.fill(place)?;
    Ok(Box::new(Iscsi { place: place.clone(), node, unit }))
}

impl Running for Iscsi {
    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        self.unit.load(&self.place, load, seconds)
    }

    fn servers(&self) -> Vec<u32> {
        vec![self.node.pid()]
    }
}
