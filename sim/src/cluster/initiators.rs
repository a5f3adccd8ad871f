//! Hosts over iSCSI, and what they find.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;

use cairn_engine::{IscsiConfig, IscsiExport, IscsiPortal};

use super::{Cluster, NEXUS, Process, address};
use crate::driver::SimDriver;
use crate::initiator::{Counter, Initiator, Reserved, Unit};
use crate::world::Machine;

/// Where a node listens for initiators.
const PORT: u16 = 3260;

/// The portal group of a machine.
fn group(machine: Machine) -> u16 {
    u16::try_from(machine.0 + 1).expect("few machines")
}

pub(super) fn iscsi_config(machine: Machine) -> IscsiConfig {
    IscsiConfig { portal_groups: vec![group(machine)], ..IscsiConfig::default() }
}

/// Where a machine listens, and what it tells of that.
pub(super) fn portal(machine: Machine) -> (SocketAddr, IscsiPortal) {
    let address = SocketAddr::new(address(machine).ip(), PORT);
    (address, IscsiPortal { address, group: group(machine) })
}

fn iqn(volume: usize) -> String {
    format!("iqn.2026-11.io.cairn:volume{volume}")
}

impl Cluster {
    /// How a volume is exported.
    pub(super) fn export(&self, volume: usize) -> Option<Box<IscsiExport>> {
        let initiators = vec!["*".to_owned()];
        let export =
            || IscsiExport { iqn: iqn(volume), lun: 0, initiators, ..IscsiExport::default() };
        self.config.initiators.then(export).map(Box::new)
    }

    /// What the initiators of a volume work on: its last block.
    pub(super) fn unit(&self, volume: usize) -> Unit {
        let machines = [NEXUS, self.nexus_machine(1)];
        let machines = machines.into_iter().take(1 + usize::from(self.config.second));
        Unit {
            portals: machines.map(|machine| portal(machine).0).collect(),
            iqn: iqn(volume),
            lba: u32::try_from(self.config.blocks - 1).expect("a small volume"),
            counter: Rc::new(RefCell::new(Counter::default())),
            reserved: Reserved::default(),
        }
    }

    /// Adds a host of a volume over iSCSI, which makes so many steps.
    pub fn add_initiator(&mut self, volume: usize, steps: u64, reserves: bool) {
        let rng = self.world().rng.fork();
        let driver = SimDriver::new(&self.world, self.host_machine(), 1 << 20);
        let initiator = Initiator::new(driver, self.units[volume].clone(), steps, reserves, rng);
        let node = initiator.node();
        self.add(node, Process::Initiator(Box::new(initiator)));
        self.initiators.push(node);
        self.run(node);
    }

    /// Has every initiator look at its block.
    pub(super) fn verify_counters(&mut self) {
        for node in self.initiators.clone() {
            if let Process::Initiator(initiator) = &mut self.processes[node.0] {
                initiator.verify();
            }
            self.run(node);
        }
    }

    /// Steps that initiators got acked.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.units.iter().map(|unit| unit.counter.borrow().steps()).sum()
    }
}
