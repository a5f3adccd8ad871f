//! The devices of pools: found, made, opened together, and handed to the engine.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use cairn_engine::block::{PoolDeviceId, PoolId};
use cairn_engine::control::Command;
use cairn_engine::device::PoolDevice;
use cairn_engine::reactor::{Attach, BlockFile, IoMode, MemRegion, OpenError};
use cairn_engine::replica::{
    Device as _, DeviceOptions, FormatOptions, MultiPool, OpenOptions, Pool, PoolError, Probe,
};
use cairn_engine::{EngineHandle, PoolMember};

use crate::config::{self, Config, Io, Paths};
use crate::serve::patiently;
use crate::state::{SavedPool, State};

/// Opens the pools of the configuration, with the devices that were added since, and those that calls
/// made.
pub(crate) fn open_all(engine: &EngineHandle, config: &Config, state: &State) -> Result<()> {
    for pool in &config.pools {
        let saved = state.pools.iter().find(|saved| saved.name == pool.name);
        let extra = saved.map_or(&[][..], |saved| &saved.paths);
        open(engine, pool, extra).with_context(|| format!("pool `{}`", pool.name))?;
    }
    for saved in &state.pools {
        if config.pools.iter().any(|pool| pool.name == saved.name) {
            continue;
        }
        let mut pool = config::Pool::new(&saved.name, String::new(), None, false);
        pool.path = Paths::Many(Vec::new());
        pool.io = if saved.buffered { Io::Buffered } else { Io::Direct };
        pool.shard = saved.shard.filter(|&shard| shard < engine.shards());
        // Nobody can be asked, and the other pools are served all the same.
        if let Err(error) = open(engine, &pool, &saved.paths) {
            tracing::error!(pool = %saved.name, "the pool is not opened: {error:#}");
        }
    }
    Ok(())
}

/// A device that was attached, and what it holds.
struct Found {
    path: String,
    device: PoolDevice,
    /// It is known to read as zeros.
    fresh: bool,
    probe: Probe,
    /// It is not the configuration that names it.
    extra: bool,
}

impl Found {
    fn sector_size(&self) -> u32 {
        match &self.device.0 {
            Attach::File(file) => file.sector_size(),
            Attach::Memory(_) => 4096,
        }
    }

    fn options(&self) -> DeviceOptions {
        DeviceOptions {
            id: PoolDeviceId(uuid::Uuid::new_v4().as_u128()),
            device_is_zeroed: self.fresh,
            sector_size: self.sector_size(),
        }
    }

    fn id(&self) -> Option<PoolDeviceId> {
        match &self.probe {
            Probe::Pool { device, .. } => Some(*device),
            _ => None,
        }
    }

    fn member(self) -> PoolMember<Attach> {
        let len = self.device.len();
        PoolMember { device: self.device.0, len, path: self.path }
    }
}

fn open(engine: &EngineHandle, pool: &config::Pool, extra: &[String]) -> Result<()> {
    let mut found = Vec::new();
    let mut absent = Vec::new();
    for path in pool.path.all() {
        if is_absent(path) {
            absent.push(path.clone());
        } else {
            found.push(find(pool, path, false).with_context(|| path.clone())?);
        }
    }
    for path in extra.iter().filter(|path| !pool.path.all().contains(path)) {
        match find(pool, path, false) {
            Ok(device) => found.push(Found { extra: true, ..device }),
            Err(error) => tracing::warn!(pool = %pool.name, %path, "{error:#}"),
        }
    }
    // A pool that exists, or that calls have changed, is never made anew: what is missing of it is not
    // to be replaced by something empty.
    let exists = !extra.is_empty() || found.iter().any(|d| matches!(d.probe, Probe::Pool { .. }));
    if !exists {
        for path in absent.drain(..) {
            found.push(find(pool, &path, false).with_context(|| path.clone())?);
        }
    }
    add(engine, pool, found, pool.create && !exists, false).with_context(|| {
        let absent: String = absent.iter().map(|path| format!("; {path} does not exist")).collect();
        let extra = extra.iter().filter(|path| !pool.path.all().contains(path));
        let extra: String = extra.map(|path| format!(", {path}")).collect();
        format!("at {}{extra}{absent}", pool.path)
    })
}

/// Makes a pool, or opens the one that is there, for a call.
pub(crate) fn create(engine: &EngineHandle, pool: &config::Pool, force: bool) -> Result<()> {
    let mut found = Vec::new();
    for path in pool.path.all() {
        found.push(find(pool, path, force).with_context(|| path.clone())?);
    }
    let holds = |wanted: fn(&Probe) -> bool| found.iter().find(|d| wanted(&d.probe));
    if let (Some(pool), Some(blank), false) = (
        holds(|probe| matches!(probe, Probe::Pool { .. })),
        holds(|probe| *probe == Probe::Blank),
        force,
    ) {
        bail!(
            "{} holds {}, and {} is blank: open the pool without it, then add it with `cairn pool \
             add-device`",
            pool.path,
            pool.probe,
            blank.path
        );
    }
    add(engine, pool, found, true, force)
}

fn is_absent(path: &str) -> bool {
    !path.starts_with("mem:") && !Path::new(path).exists()
}

/// Attaches one device, making its file first where that is allowed.
fn find(pool: &config::Pool, path: &str, force: bool) -> Result<Found> {
    let busy = |e: &anyhow::Error| matches!(e.downcast_ref(), Some(OpenError::Busy { .. }));
    let (device, fresh) = patiently(busy, || attach(pool, path, force))?;
    let mut device = PoolDevice(device);
    let probe = Pool::probe(&mut device)?;
    Ok(Found { path: path.to_owned(), device, fresh, probe, extra: false })
}

/// Opens or makes what a pool lies on. Tells whether it is known to read as zeros.
fn attach(pool: &config::Pool, path: &str, force: bool) -> Result<(Attach, bool)> {
    if let Some(size) = path.strip_prefix("mem:") {
        let size = crate::cli::parse_size(size).map_err(|e| anyhow!(e))?;
        let len = usize::try_from(size.as_u64())?;
        return Ok((Attach::Memory(MemRegion::new(len)?), true));
    }
    let path = Path::new(path);
    let mut fresh = false;
    if !path.exists() {
        let Some(size) = pool.size.filter(|_| pool.create || force) else {
            bail!("the file does not exist; to make it, give `size` and `create = true`");
        };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .with_context(|| format!("cannot make the folder {}", parent.display()))?;
        }
        BlockFile::create(path, size.as_u64())?;
        fresh = true;
    }
    let mode = match pool.io {
        Io::Direct => IoMode::Direct,
        Io::Buffered => IoMode::Buffered,
    };
    let mut file = BlockFile::open(path, mode)?;
    if let Some(size) = pool.size
        && !file.is_block()
        && size.as_u64() > file.len()
    {
        file.grow(size.as_u64()).with_context(|| format!("cannot grow the file to {size}"))?;
    }
    Ok((Attach::File(file), fresh))
}

fn add(
    engine: &EngineHandle,
    spec: &config::Pool,
    mut found: Vec<Found>,
    create: bool,
    force: bool,
) -> Result<()> {
    found.retain(|device| {
        let keep = !device.extra || matches!(device.probe, Probe::Pool { .. });
        if !keep {
            tracing::warn!(
                pool = %spec.name, path = %device.path, holds = %device.probe,
                "the device is no part of the pool any more"
            );
        }
        keep
    });
    if found.is_empty() {
        bail!("none of its devices is there");
    }
    if let Some(foreign) = found.iter().find(|d| d.probe == Probe::Foreign && !force) {
        bail!(
            "{} holds data that is not a Cairn pool; nothing was changed. `cairn pool create --force` \
             would overwrite it",
            foreign.path
        );
    }
    if force || found.iter().all(|device| device.probe == Probe::Blank) {
        if !create && spec.create {
            bail!(
                "none of the devices that are there holds any of the pool, and it existed before"
            );
        }
        if !create {
            bail!("there is no pool on it; to make one, set `create = true`");
        }
        format(spec, &mut found, force)?;
    }
    let (devices, mut pool) = open_set(spec, found)?;
    pool.set_checksum_limits(spec.cached_extents, spec.dirty_extents);
    if spec.disable_checksums_for_benchmark {
        tracing::warn!(pool = %spec.name, "blocks are neither hashed nor verified");
        pool.disable_checksums_for_benchmark();
    }
    let usage = pool.usage();
    tracing::info!(
        pool = %spec.name, id = %pool.id(), devices = devices.len(),
        extents = usage.extents_total, free = usage.extents_free, dirty = pool.dirty_extents(),
        "pool opened"
    );
    let name = spec.name.clone();
    let pool = Box::new(pool);
    if let Some(shard) = spec.shard {
        engine.place_pool(&name, shard)?;
    }
    engine.call(|reply| Command::AddPool { name, devices, pool, reply })?;
    Ok(())
}

fn format(spec: &config::Pool, found: &mut [Found], force: bool) -> Result<()> {
    let options = FormatOptions {
        pool_id: PoolId(uuid::Uuid::new_v4().as_u128()),
        device_is_zeroed: false,
        sector_size: 4096,
        force,
    };
    for device in found.iter().filter(|device| device.probe != Probe::Blank) {
        tracing::warn!(pool = %spec.name, path = %device.path, lost = %device.probe, "overwriting");
    }
    let ids: Vec<DeviceOptions> = found.iter().map(Found::options).collect();
    let mut devices: Vec<&mut PoolDevice> = found.iter_mut().map(|d| &mut d.device).collect();
    if let Err((at, error)) = MultiPool::format(&mut devices, &ids, &options) {
        return Err(error).with_context(|| found[at].path.clone());
    }
    tracing::info!(pool = %spec.name, id = %options.pool_id, devices = ids.len(), "pool made");
    for (device, of) in found.iter_mut().zip(ids) {
        device.probe = Pool::probe(&mut device.device)?;
        debug_assert_eq!(device.id(), Some(of.id));
    }
    Ok(())
}

/// Opens what is there together.
fn open_set(
    spec: &config::Pool,
    mut found: Vec<Found>,
) -> Result<(Vec<PoolMember<Attach>>, MultiPool)> {
    let options = OpenOptions { without: spec.without.clone() };
    let set = loop {
        let mut devices: Vec<&mut PoolDevice> = found.iter_mut().map(|d| &mut d.device).collect();
        match MultiPool::open(&mut devices, &options) {
            Ok(set) => break set,
            // It left after it was last written down where the devices are.
            Err(PoolError::MemberRemoved { device, .. })
                if found.iter().any(|d| d.extra && d.id() == Some(device)) =>
            {
                tracing::warn!(pool = %spec.name, %device, "the device was removed from the pool");
                found.retain(|d| d.id() != Some(device));
            }
            Err(error) => {
                let listed: Vec<String> = found
                    .iter()
                    .map(|d| match d.id() {
                        Some(id) => format!("{} is device {id}", d.path),
                        None => format!("{} holds {}", d.path, d.probe),
                    })
                    .collect();
                let listed = listed.join(", ");
                return Err(if found.len() > 1 {
                    anyhow::Error::new(error).context(listed)
                } else {
                    error.into()
                });
            }
        }
    };
    for aside in &set.set_aside {
        let path = &found[aside.index].path;
        tracing::warn!(pool = %spec.name, %path, why = %aside.why, "the device is not used");
    }
    let mut found: Vec<Option<Found>> = found.into_iter().map(Some).collect();
    let members = set
        .devices
        .iter()
        .map(|&at| found[at].take().expect("each device has one number").member())
        .collect();
    Ok((members, set.pool))
}

/// Makes a device that a pool of this id takes, and opens it by itself.
pub(crate) fn make_device(
    pool: &config::Pool,
    id: PoolId,
    slots: u16,
    force: bool,
) -> Result<(PoolMember<Attach>, Box<Pool>)> {
    let path = pool.path.all().first().context("a path")?;
    let mut found = find(pool, path, force)?;
    if found.probe != Probe::Blank {
        if !force {
            bail!("it holds {}; to destroy that, use --force", found.probe);
        }
        tracing::warn!(%path, lost = %found.probe, "overwriting");
    }
    let options = found.options();
    MultiPool::format_device(&mut found.device, &options, id, slots, force)?;
    let opened = Box::new(Pool::open(&mut found.device)?);
    Ok((found.member(), opened))
}

/// What is written down of a pool.
pub(crate) fn saved(name: &str, paths: Vec<String>, buffered: bool) -> SavedPool {
    SavedPool { name: name.to_owned(), paths, buffered, shard: None }
}
