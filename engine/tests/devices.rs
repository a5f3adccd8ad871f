//! A pool's devices come and go in a shard on a real ring.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use cairn_engine::block::{BlockSize, PoolDeviceId, PoolId, ReplicaId, VolumeId};
use cairn_engine::control::Command;
use cairn_engine::device::PoolDevice;
use cairn_engine::reactor::{Attach, DriverConfig, MemRegion};
use cairn_engine::replica::{
    Device as _, DeviceOptions, FormatOptions, MultiPool, OpenOptions, Pool, ReplicaSpec,
};
use cairn_engine::{EngineHandle, PoolMember, PoolReport, ShardConfig};

const POOL: PoolId = PoolId(77);

fn memory() -> PoolDevice {
    PoolDevice(Attach::Memory(MemRegion::new(32 << 20).unwrap()))
}

fn options(id: u128) -> DeviceOptions {
    DeviceOptions { id: PoolDeviceId(id), device_is_zeroed: true, sector_size: 4096 }
}

fn member(device: PoolDevice, path: &str) -> PoolMember<Attach> {
    PoolMember { len: device.len(), device: device.0, path: path.to_owned() }
}

fn report(engine: &EngineHandle) -> PoolReport {
    engine.call(|reply| Command::ListPools { reply }).unwrap().remove(0)
}

#[test]
fn devices_come_and_go() {
    let driver = DriverConfig { arena_len: 16 << 20, ..DriverConfig::default() };
    let (engine, thread) = cairn_engine::start(&driver, &ShardConfig::default()).unwrap();
    let mut devices = vec![memory(), memory()];
    let format =
        FormatOptions { pool_id: POOL, device_is_zeroed: true, sector_size: 4096, force: false };
    MultiPool::format(&mut devices, &[options(1), options(2)], &format).unwrap();
    let set = MultiPool::open(&mut devices, &OpenOptions::default()).unwrap();
    assert_eq!(set.devices, [0, 1]);
    let pool = Box::new(set.pool);
    let devices = devices.into_iter().zip(["a", "b"]).map(|(d, path)| member(d, path)).collect();
    let name = "p".to_owned();
    engine.call(|reply| Command::AddPool { name, devices, pool, reply }).unwrap();
    let spec = ReplicaSpec {
        id: ReplicaId(5),
        volume: VolumeId(6),
        name: "r".to_owned(),
        blocks: 1024,
        block_size: BlockSize::B4096,
        thick: false,
        source: None,
    };
    engine.call(|reply| Command::CreateReplica { pool: "p".to_owned(), spec, reply }).unwrap();

    let mut device = memory();
    let slots = report(&engine).slots;
    MultiPool::format_device(&mut device, &options(3), POOL, slots, false).unwrap();
    let opened = Box::new(Pool::open(&mut device).unwrap());
    let device = member(device, "c");
    let pool = "p".to_owned();
    engine.call(|reply| Command::AddDevice { pool, device, opened, reply }).unwrap();
    assert_eq!(report(&engine).devices.len(), 3);

    // One that was made for another pool.
    let mut device = memory();
    MultiPool::format_device(&mut device, &options(4), PoolId(78), slots, false).unwrap();
    let opened = Box::new(Pool::open(&mut device).unwrap());
    let device = member(device, "d");
    let pool = "p".to_owned();
    let refused = engine.call(|reply| Command::AddDevice { pool, device, opened, reply });
    assert!(refused.unwrap_err().to_string().contains("was made for pool"));

    let remove = |id| {
        let (pool, device) = ("p".to_owned(), PoolDeviceId(id));
        engine.call(|reply| Command::RemoveDevice { pool, device, reply })
    };
    remove(1).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while report(&engine).devices.len() > 2 {
        assert!(Instant::now() < until, "{:?}", report(&engine).devices);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(remove(1).is_err());
    remove(2).unwrap();
    while report(&engine).devices.len() > 1 {
        assert!(Instant::now() < until, "{:?}", report(&engine).devices);
        std::thread::sleep(Duration::from_millis(10));
    }
    let last = report(&engine);
    assert_eq!((last.devices[0].path.as_str(), last.state.as_str()), ("c", "online"));
    assert!(remove(3).unwrap_err().to_string().contains("the last one"));
    let replicas = engine.call(|reply| Command::ListReplicas { reply }).unwrap();
    assert_eq!((replicas.len(), replicas[0].state.as_str()), (1, "live"));
    engine.call(|reply| Command::Shutdown { reply }).unwrap();
    thread.join().unwrap();
}
