//! A request through the nexus' state machine: submit, three children, answer, release.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use cairn_block::{BufSlice, Epoch, IoOp, IoRequest, IoStatus, Lba, LbaRange, ReplicaId, VolumeId};
use cairn_nexus::{
    ChildId, ChildOp, ChildSpec, Nexus, NexusConfig, Place, Purpose, Register, RegisterOp,
};
use criterion::{Criterion, criterion_group, criterion_main};

/// A nexus of three children that promise and accept everything.
fn online() -> Nexus {
    let mut nexus = Nexus::new(NexusConfig {
        volume: VolumeId(1),
        blocks: 1 << 20,
        block_size: 0,
        encryption: None,
        children: (1..=3)
            .map(|i| ChildSpec {
                replica: ReplicaId(i),
                local: false,
                witness: false,
                place: Place::default(),
            })
            .collect(),
        purpose: Purpose::Create,
        child_deadline_ms: 5_000,
        child_deadline_min_ms: 1_000,
        lease_ms: u64::MAX / 2,
        shared: false,
        holder: 0,
        assembly_wait_ms: 0,
        pace: cairn_nexus::Pace::default(),
        max_requests: 256,
    });
    (0..3).for_each(|i| nexus.handle_child_up(ChildId(i), 0));
    while let Some(io) = nexus.poll_child() {
        let register = match io.op {
            ChildOp::Register(RegisterOp::Promise { epoch, .. }) => {
                Register { promised_epoch: epoch, ..Register::default() }
            }
            ChildOp::Register(RegisterOp::Accept(register)) => register,
            _ => Register { promised_epoch: Epoch(0), ..Register::default() },
        };
        nexus.handle_register(io.child, io.ticket, Ok(register), 0);
    }
    assert!(nexus.state().is_serving());
    nexus
}

fn one(nexus: &mut Nexus, op: IoOp, lba: u64) {
    let range = LbaRange::new(Lba(lba), 1).expect("a block of the volume");
    nexus.submit(7, IoRequest { op, range, buf: BufSlice::EMPTY }, 1);
    while let Some(io) = nexus.poll_child() {
        if io.ticket.is_register() {
            // A renewal of the lease, before the first read.
            nexus.handle_register(io.child, io.ticket, Ok(Register::default()), 1);
            continue;
        }
        nexus.handle_io(io.child, io.ticket, IoStatus::Ok, 1);
    }
    assert!(nexus.poll_done().is_some_and(|done| done.status.is_ok()));
    assert!(nexus.poll_release().is_some());
}

fn fan_out(c: &mut Criterion) {
    let mut nexus = online();
    let mut lba = 0;
    c.bench_function("write, 3 children", |b| {
        b.iter(|| {
            lba = (lba + 7) % (1 << 20);
            one(&mut nexus, IoOp::Write { fua: false }, lba);
        });
    });
    c.bench_function("read", |b| {
        b.iter(|| {
            lba = (lba + 7) % (1 << 20);
            one(&mut nexus, IoOp::Read, lba);
        });
    });
}

criterion_group!(benches, fan_out);
criterion_main!(benches);
