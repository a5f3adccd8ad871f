//! The configuration of `cairn serve`, in TOML.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use cairn_engine::MAX_SHARDS;
use cairn_engine::block::PoolDeviceId;
use cairn_engine::nexus::Pace;
use cairn_engine::replica::MAX_DEVICES;
use serde::{Deserialize, Serialize};

/// A process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Its name, in logs and towards replicas.
    pub(crate) name: String,
    /// Where it keeps which volumes it serves.
    pub(crate) state_dir: PathBuf,
    #[serde(default)]
    pub(crate) api: Api,
    #[serde(default)]
    pub(crate) nvmf: Nvmf,
    #[serde(default)]
    pub(crate) iscsi: Iscsi,
    #[serde(default)]
    pub(crate) engine: Engine,
    #[serde(default)]
    pub(crate) nexus: Nexus,
    #[serde(default)]
    pub(crate) metrics: Metrics,
    /// How many times its size may be promised of a pool to the replicas in it; 0: any.
    #[serde(default = "overcommit")]
    pub(crate) overcommit: u32,
    #[serde(default, rename = "pool", skip_serializing_if = "Vec::is_empty")]
    pub(crate) pools: Vec<Pool>,
    #[serde(default, rename = "standby", skip_serializing_if = "Vec::is_empty")]
    pub(crate) standbys: Vec<Standby>,
}

/// A volume that this process is to stand by for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Standby {
    /// Its name.
    pub(crate) volume: String,
    /// The API socket of the process that serves it: all else is asked there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<PathBuf>,
    /// Its id, where there is no such socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    /// Members of it as this process reaches them; one is enough, which tells of the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) replicas: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) witnesses: Vec<String>,
    /// It is taken over by itself once nobody serves it, but not before it was stood by for so long; 0: only when
    /// this process is told to.
    #[serde(default = "take_over_after")]
    pub(crate) take_over_after: Interval,
    /// Where hosts reach the other processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) elsewhere: Vec<SocketAddr>,
    /// Where initiators do: ADDRESS:PORT,GROUP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) iscsi_elsewhere: Vec<String>,
    /// The file of its key, where it is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key_file: Option<String>,
    /// Or a program and its arguments, which prints the key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) key_command: Vec<String>,
}

fn take_over_after() -> Interval {
    Interval(10)
}

impl Standby {
    fn check(&self) -> Result<()> {
        let name = &self.volume;
        if let Some(socket) = &self.from {
            let known =
                self.id.is_some() || !self.replicas.is_empty() || !self.witnesses.is_empty();
            if known {
                bail!(
                    "standby \"{name}\": from = ... tells its id and its replicas; leave those out"
                );
            }
            if !socket.is_absolute() {
                bail!("standby \"{name}\": from = \"{}\": a path from the root", socket.display());
            }
        } else {
            let Some(id) = &self.id else {
                bail!(
                    "standby \"{name}\": name the API socket of the process that serves it (from), or its id \
                     and one replica at least"
                );
            };
            if id.parse::<cairn_engine::block::VolumeId>().is_err() {
                bail!(
                    "standby \"{name}\": id = \"{id}\": a UUID, as `cairn volume status` shows it"
                );
            }
            if self.replicas.is_empty() {
                bail!("standby \"{name}\": replicas = []: one at least, which tells of the others");
            }
        }
        for uri in self.replicas.iter().chain(&self.witnesses) {
            if !uri.starts_with("nvme+tcp://") && !uri.starts_with("local:") {
                bail!(
                    "standby \"{name}\": \"{uri}\" names no replica; write nvme+tcp://HOST:PORT/NQN (from \
                     `cairn replica list`) or local:POOL/REPLICA-ID"
                );
            }
        }
        if self.key_file.is_some() && !self.key_command.is_empty() {
            bail!("standby \"{name}\": name either a key file or a key command");
        }
        Ok(())
    }
}

/// Thin, but not without bounds.
fn overcommit() -> u32 {
    20
}

/// Where the process is managed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Api {
    /// A unix socket; default: `api.sock` in the state folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) socket: Option<PathBuf>,
}

/// Where hosts and other processes' nexuses connect.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Nvmf {
    /// Addresses to listen on; port 0: one that is free.
    pub(crate) listen: Vec<SocketAddr>,
    /// The IP address that discovery tells hosts, where it is not the one listened on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advertise: Option<std::net::IpAddr>,
    /// First and last controller id that this process gives; processes that serve one subsystem
    /// must not overlap. Not given: 250 of them, which the process's state folder chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) controller_ids: Option<[u16; 2]>,
}

/// Where iSCSI initiators connect. Default: nowhere.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Iscsi {
    /// Addresses to listen on, of one portal group; port 0: one that is free.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) listen: Vec<SocketAddr>,
    /// The IP address that initiators are told, where it is not the one listened on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advertise: Option<std::net::IpAddr>,
    /// The group's tag; processes that share a volume must not have the same. Not given: one that the process's
    /// state folder chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) portal_group: Option<u16>,
    /// More portal groups.
    #[serde(rename = "group", skip_serializing_if = "Vec::is_empty")]
    pub(crate) groups: Vec<PortalGroup>,
    /// What initiators prove that ask which targets there are: a file as --chap-file of `cairn volume export` names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) discovery_chap_file: Option<String>,
    /// After how long a silence an initiator is asked whether it is there; after as long again it is given up.
    pub(crate) nop_interval: Interval,
}

impl Default for Iscsi {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            advertise: None,
            portal_group: None,
            groups: Vec::new(),
            discovery_chap_file: None,
            nop_interval: Interval(10),
        }
    }
}

/// Addresses that belong together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PortalGroup {
    /// Its tag.
    pub(crate) tag: u16,
    /// As in [`Iscsi`].
    pub(crate) listen: Vec<SocketAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) advertise: Option<std::net::IpAddr>,
}

impl Iscsi {
    /// The portal groups. `node` tells this process's state folder from others.
    pub(crate) fn portal_groups(&self, node: u128) -> Vec<PortalGroup> {
        let tags = u128::from(u16::MAX);
        let chosen = 1 + u16::try_from(node % tags).expect("fewer than 2^16");
        let first = (!self.listen.is_empty()).then(|| PortalGroup {
            tag: self.portal_group.unwrap_or(chosen),
            listen: self.listen.clone(),
            advertise: self.advertise,
        });
        first.into_iter().chain(self.groups.iter().cloned()).collect()
    }

    fn check(&self) -> Result<()> {
        if self.listen.is_empty() && (self.advertise.is_some() || self.portal_group.is_some()) {
            bail!("[iscsi]: advertise and portal_group go with listen");
        }
        let own = self.portal_group.into_iter();
        let tags: Vec<u16> = own.chain(self.groups.iter().map(|group| group.tag)).collect();
        for (i, &tag) in tags.iter().enumerate() {
            if tag == 0 || tags[..i].contains(&tag) {
                bail!("[iscsi]: portal group {tag}: each has a tag of its own, from 1 to 65535");
            }
        }
        for group in &self.groups {
            if group.listen.is_empty() {
                bail!("[iscsi]: portal group {} listens nowhere", group.tag);
            }
        }
        let at = self.groups.iter().map(|g| (&g.listen, g.advertise));
        for (listen, advertise) in at.chain([(&self.listen, self.advertise)]) {
            let any = listen.iter().find(|address| address.ip().is_unspecified());
            if let (Some(any), None) = (any, advertise) {
                bail!(
                    "[iscsi]: listen = \"{any}\" is every address; set `advertise` to the one that initiators are told"
                );
            }
            if advertise.is_some_and(|ip| ip.is_unspecified()) {
                bail!(
                    "[iscsi]: advertise is the address that initiators connect to, not every one"
                );
            }
        }
        Ok(())
    }
}

/// Controller ids of a process that was given none.
const CONTROLLER_IDS: u16 = 250;

impl Nvmf {
    /// First and last controller id. `node` tells this process's state folder from others.
    pub(crate) fn controller_ids(&self, node: u128) -> [u16; 2] {
        self.controller_ids.unwrap_or_else(|| {
            let ranges = u128::from(0xffef / CONTROLLER_IDS);
            let range = u16::try_from(node % ranges).expect("fewer ranges than ids");
            let first = range * CONTROLLER_IDS + 1;
            [first, first + CONTROLLER_IDS - 1]
        })
    }
}

impl Default for Nvmf {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 4420))],
            advertise: None,
            controller_ids: None,
        }
    }
}

/// The data engine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Engine {
    /// Memory for payload in flight.
    pub(crate) buffers: ByteSize,
    /// How long to look for work before sleeping, in microseconds; 0: never.
    pub(crate) spin_us: u64,
    /// Register descriptors and buffers with the kernel where its limits allow.
    pub(crate) registered: bool,
    /// Threads that serve, each with pools, volumes and buffers of its own.
    pub(crate) shards: u16,
}

impl Default for Engine {
    fn default() -> Self {
        Self { buffers: ByteSize::mib(64), spin_us: 20, registered: true, shards: 1 }
    }
}

/// Volumes served here.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Nexus {
    /// A replica that does not answer for so long is taken out.
    pub(crate) child_deadline_ms: u64,
    /// One that has answered fast lately is taken out earlier, but never before so long.
    pub(crate) child_deadline_min_ms: u64,
    /// Reads are answered for so long after a majority was asked whether nobody else serves. The same on all nodes.
    pub(crate) lease_ms: u64,
    /// How long assembly waits for the rest of the replicas once a majority is there.
    pub(crate) assembly_wait_ms: u64,
    /// Header digests towards replicas.
    pub(crate) header_digest: bool,
    /// Data digests towards replicas.
    pub(crate) data_digest: bool,
    /// What was written is settled so long after it was: a crash leaves the rest to be compared.
    pub(crate) settle_ms: u64,
    /// Whether replicas that missed writes get them by themselves once they are back.
    pub(crate) rebuild: bool,
    /// How much is copied to a replica in a second; 0: as much as goes.
    pub(crate) rebuild_rate: ByteSize,
    /// How much of a volume that is being sanitized is overwritten in a second; 0: as much as goes.
    pub(crate) sanitize_rate: ByteSize,
    /// How often each volume is scrubbed; 0: never.
    pub(crate) scrub_interval: Interval,
    /// How much of a volume is scrubbed in a second.
    pub(crate) scrub_rate: ByteSize,
    /// A replica that is out of sync and cannot be reached for so long is replaced by one in a spare pool; 0: never.
    pub(crate) replace_after: Interval,
    /// Pools that such replicas are made in.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) spares: Vec<Spare>,
}

/// A pool that replicas are made in when others are gone; written `local:POOL` or `unix:SOCKET:POOL`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Spare {
    /// The API socket of the process that has it; nothing: this one.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) pool: String,
}

impl TryFrom<String> for Spare {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || {
            format!("`{text}` is no spare; write \"local:POOL\" or \"unix:/PATH/api.sock:POOL\"")
        };
        let (socket, pool) = if let Some(pool) = text.strip_prefix("local:") {
            (None, pool)
        } else {
            let rest = text.strip_prefix("unix:").ok_or_else(wrong)?;
            let (socket, pool) = rest.rsplit_once(':').ok_or_else(wrong)?;
            (Some(PathBuf::from(socket)), pool)
        };
        let relative = socket.as_ref().is_some_and(|s| !s.is_absolute());
        if pool.is_empty() || pool.contains('/') || relative {
            return Err(wrong());
        }
        Ok(Self { socket, pool: pool.to_owned() })
    }
}

impl From<Spare> for String {
    fn from(spare: Spare) -> Self {
        spare.to_string()
    }
}

impl std::fmt::Display for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.socket {
            None => write!(f, "local:{}", self.pool),
            Some(socket) => write!(f, "unix:{}:{}", socket.display(), self.pool),
        }
    }
}

/// What the process counts, for Prometheus.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Metrics {
    /// Where it is told over HTTP; port 0: one that is free. Default: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) listen: Option<SocketAddr>,
}

impl Nexus {
    /// How often nexuses do what nobody asks for.
    pub(crate) fn pace(&self) -> Pace {
        Pace {
            settle_ms: self.settle_ms,
            rebuild: self.rebuild,
            rebuild_mib_s: mib_of(self.rebuild_rate),
            ..Pace::default()
        }
    }

    /// The rate of overwriting in MiB a second.
    pub(crate) fn sanitize_mib_s(&self) -> u32 {
        mib_of(self.sanitize_rate)
    }

    /// The rate in MiB a second, 1 at least.
    pub(crate) fn scrub_rate_mib_s(&self) -> u32 {
        u32::try_from(self.scrub_rate.as_u64() >> 20).unwrap_or(u32::MAX).max(1)
    }
}

/// In MiB; a part of one is one.
fn mib_of(rate: ByteSize) -> u32 {
    u32::try_from(rate.as_u64().div_ceil(1 << 20)).unwrap_or(u32::MAX)
}

/// A time span in seconds; written as a number and `d`, `h`, `m` or `s`, or as 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Interval(pub(crate) u64);

impl TryFrom<String> for Interval {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no time span; write \"7d\", \"12h\", \"30m\" or \"0\"");
        if text == "0" {
            return Ok(Self(0));
        }
        let unit = match text.chars().last() {
            Some('d') => 86_400,
            Some('h') => 3_600,
            Some('m') => 60,
            Some('s') => 1,
            _ => return Err(wrong()),
        };
        let number = text[..text.len() - 1].parse::<u32>().map_err(|_| wrong())?;
        Ok(Self(u64::from(number) * unit))
    }
}

impl From<Interval> for String {
    fn from(interval: Interval) -> Self {
        format!("{}s", interval.0)
    }
}

impl Default for Nexus {
    fn default() -> Self {
        Self {
            child_deadline_ms: 5_000,
            child_deadline_min_ms: 1_000,
            lease_ms: 3_000,
            assembly_wait_ms: 2_000,
            header_digest: false,
            data_digest: false,
            settle_ms: 5_000,
            rebuild: true,
            rebuild_rate: ByteSize(0),
            sanitize_rate: ByteSize(0),
            scrub_interval: Interval(7 * 86_400),
            scrub_rate: ByteSize::mib(64),
            replace_after: Interval(0),
            spares: Vec::new(),
        }
    }
}

/// How a pool's device is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Io {
    /// Past the page cache.
    #[default]
    Direct,
    /// Through the page cache.
    Buffered,
}

/// A pool to open at start.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pool {
    pub(crate) name: String,
    /// A file, a block device, or `mem:SIZE`; or a list of them, in any order.
    pub(crate) path: Paths,
    /// Ids of devices to open the pool without, for good.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "id_list")]
    pub(crate) without: Vec<PoolDeviceId>,
    /// Size of each file, where it is to be made or grown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size: Option<ByteSize>,
    /// Make the pool where there is none yet.
    #[serde(default)]
    pub(crate) create: bool,
    #[serde(default)]
    pub(crate) io: Io,
    /// Extents whose checksums are kept in memory, about 1.1 KiB each.
    #[serde(default = "cached_extents")]
    pub(crate) cached_extents: usize,
    /// Extents that may be dirty: what a crash makes the next start read and hash.
    #[serde(default = "dirty_extents")]
    pub(crate) dirty_extents: usize,
    /// The shard that serves it; default: one after the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) shard: Option<u16>,
    /// Neither hash nor verify blocks: to measure what that costs, in memory pools alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) disable_checksums_for_benchmark: bool,
}

/// Where a pool's devices are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Paths {
    /// Of one.
    One(String),
    /// Of several.
    Many(Vec<String>),
}

impl Paths {
    /// Each of them.
    pub(crate) fn all(&self) -> &[String] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }
}

impl std::fmt::Display for Paths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.all().join(", "))
    }
}

/// As it is written: a UUID.
mod id_list {
    use cairn_engine::block::PoolDeviceId;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(ids: &[PoolDeviceId], to: S) -> Result<S::Ok, S::Error> {
        ids.iter().map(ToString::to_string).collect::<Vec<_>>().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<PoolDeviceId>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}

fn cached_extents() -> usize {
    16_384
}

fn dirty_extents() -> usize {
    4_096
}

impl Pool {
    /// A pool with the usual settings.
    pub(crate) fn new(name: &str, path: String, size: Option<ByteSize>, create: bool) -> Self {
        Self {
            name: name.to_owned(),
            path: Paths::One(path),
            without: Vec::new(),
            size,
            create,
            io: Io::Direct,
            cached_extents: cached_extents(),
            dirty_extents: dirty_extents(),
            shard: None,
            disable_checksums_for_benchmark: false,
        }
    }
}

impl Config {
    /// Reads a file.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        let config: Self = toml::from_str(&text)
            .with_context(|| format!("in the configuration {}", path.display()))?;
        config.check().with_context(|| format!("in the configuration {}", path.display()))?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        // It is part of an NQN.
        if self.name.is_empty() || self.name.len() > 64 || !self.name.chars().all(plain) {
            bail!("name = \"{}\": use 1 to 64 letters, digits, '-', '_' and '.'", self.name);
        }
        self.iscsi.check()?;
        let [low, high] = self.nvmf.controller_ids.unwrap_or([1, 0xffef]);
        if low == 0 || low > high || high > 0xffef {
            bail!("controller_ids = [{low}, {high}]: two numbers from 1 to 65519, in order");
        }
        let buffers = self.engine.buffers.as_u64();
        if !(8 << 20..=2 << 30).contains(&buffers) {
            bail!("buffers = \"{}\": from 8 MiB to 2 GiB", self.engine.buffers);
        }
        let shards = self.engine.shards;
        if !(1..=MAX_SHARDS).contains(&shards) {
            bail!("shards = {shards}: from 1 to {MAX_SHARDS}");
        }
        if !(100..=60_000).contains(&self.nexus.lease_ms) {
            bail!("lease_ms = {}: from 100 to 60000", self.nexus.lease_ms);
        }
        if self.nexus.replace_after.0 > 0 && self.nexus.spares.is_empty() {
            bail!("replace_after is set, and there are no spares: name the pools that may be used");
        }
        for (i, standby) in self.standbys.iter().enumerate() {
            let name = &standby.volume;
            if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
                bail!("standby volume \"{name}\": use 1 to 64 letters, digits, '-', '_' and '.'");
            }
            if self.standbys[..i].iter().any(|other| other.volume == *name) {
                bail!("two standbys name volume \"{name}\"");
            }
            if standby.from.as_ref().is_some_and(|socket| *socket == self.socket()) {
                bail!("standby \"{name}\": from names this process's own socket");
            }
            standby.check()?;
        }
        for (i, pool) in self.pools.iter().enumerate() {
            if pool.name.is_empty() || !pool.name.chars().all(plain) {
                bail!("pool name \"{}\": use letters, digits, '-', '_' and '.'", pool.name);
            }
            let paths = pool.path.all();
            if paths.is_empty() || paths.len() > MAX_DEVICES {
                bail!("pool \"{}\": from 1 to {MAX_DEVICES} paths", pool.name);
            }
            let again =
                |at: usize, path: &String| !path.starts_with("mem:") && paths[..at].contains(path);
            if let Some((_, twice)) = paths.iter().enumerate().find(|(at, path)| again(*at, path)) {
                bail!("pool \"{}\" names {twice} twice", pool.name);
            }
            if let Some(shard) = pool.shard.filter(|&shard| shard >= shards) {
                bail!(
                    "pool \"{}\": shard = {shard}: there are {shards}, from 0 to {} ([engine] shards = ...)",
                    pool.name,
                    shards - 1
                );
            }
            let in_memory = paths.iter().all(|path| path.starts_with("mem:"));
            if pool.disable_checksums_for_benchmark && !in_memory {
                bail!(
                    "disable_checksums_for_benchmark is for mem: pools, not for \"{}\"",
                    pool.path
                );
            }
            if self.pools[..i].iter().any(|other| other.name == pool.name) {
                bail!("two pools are named \"{}\"", pool.name);
            }
        }
        Ok(())
    }

    /// Where the process is managed.
    pub(crate) fn socket(&self) -> PathBuf {
        self.api.socket.clone().unwrap_or_else(|| self.state_dir.join("api.sock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_is_enough_and_a_wrong_one_is_told_where() {
        let text = "name = \"r1\"\nstate_dir = \"/tmp/r1\"\n[[pool]]\nname = \"p\"\npath = \"mem:64MiB\"\n";
        let config: Config = toml::from_str(text).unwrap();
        config.check().unwrap();
        assert_eq!(config.nvmf.listen[0].to_string(), "127.0.0.1:4420");
        let again: Config = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.pools.len(), 1);

        let id = "3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10";
        let several = text.replace("\"mem:64MiB\"", "[\"a\", \"b\"]");
        let several = format!("{several}without = [\"{id}\"]\n");
        let several: Config = toml::from_str(&several).unwrap();
        several.check().unwrap();
        assert_eq!(several.pools[0].path.all(), ["a", "b"]);
        let again: Config = toml::from_str(&toml::to_string(&several).unwrap()).unwrap();
        assert_eq!(again.pools[0].without[0].to_string(), id);

        for (shards, pool, wrong) in [
            (0, 0, "shards = 0: from 1 to 64"),
            (65, 0, "shards = 65"),
            (2, 2, "shard = 2: there are 2, from 0 to 1"),
            (2, 1, ""),
            (64, 63, ""),
        ] {
            let text = format!("{text}shard = {pool}\n[engine]\nshards = {shards}\n");
            let checked = toml::from_str::<Config>(&text).unwrap().check();
            let said = checked.err().map_or_else(String::new, |error| error.to_string());
            assert!(said.contains(wrong), "{said}");
            assert_eq!(said.is_empty(), wrong.is_empty(), "{said}");
        }
        let typo = toml::from_str::<Config>(&text.replace("path", "pth")).unwrap_err();
        assert!(typo.to_string().contains("pth"), "{typo}");
        let seldom = format!("{text}[nexus]\nscrub_interval = \"30d\"\nscrub_rate = \"8MiB\"\n");
        let nexus = toml::from_str::<Config>(&seldom).unwrap().nexus;
        assert_eq!((nexus.scrub_interval, nexus.scrub_rate_mib_s()), (Interval(30 * 86_400), 8));
        let wrong = toml::from_str::<Config>(&seldom.replace("30d", "often")).unwrap_err();
        assert!(wrong.to_string().contains("often"), "{wrong}");

        let spare = format!(
            "{text}[nexus]\nreplace_after = \"10m\"\nspares = [\"local:p\", \"unix:/run/b/api.sock:q\"]\n"
        );
        let config: Config = toml::from_str(&spare).unwrap();
        config.check().unwrap();
        let again: Config = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.nexus.spares, config.nexus.spares);
        assert_eq!(again.nexus.spares[1].to_string(), "unix:/run/b/api.sock:q");
        for wrong in ["http://x:p", "unix:run/api.sock:p", "unix:/run/api.sock", "local:"] {
            let error = toml::from_str::<Config>(&spare.replace("local:p", wrong)).unwrap_err();
            assert!(error.to_string().contains("is no spare"), "{wrong}: {error}");
        }
        let none = toml::from_str::<Config>(&format!("{text}[nexus]\nreplace_after = \"1m\"\n"));
        assert!(none.unwrap().check().unwrap_err().to_string().contains("no spares"));

        let id = "3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10";
        let standby = format!("{text}[[standby]]\nvolume = \"db\"\nfrom = \"/run/a.sock\"\n");
        let config: Config = toml::from_str(&standby).unwrap();
        config.check().unwrap();
        assert_eq!(config.standbys[0].take_over_after, Interval(10));
        let again: Config = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.standbys, config.standbys);
        let named = format!(
            "{text}[[standby]]\nvolume = \"db\"\nid = \"{id}\"\nreplicas = [\"local:p/{id}\"]\n\
             take_over_after = \"0\"\nelsewhere = [\"192.0.2.11:4420\"]\nkey_file = \"/etc/key\"\n"
        );
        toml::from_str::<Config>(&named).unwrap().check().unwrap();
        for (from, to, says) in [
            ("\"/run/a.sock\"", "\"a.sock\"", "a path from the root"),
            ("\"/run/a.sock\"", "\"/tmp/r1/api.sock\"", "own socket"),
            ("from = \"/run/a.sock\"", "take_over_after = \"5s\"", "API socket"),
            ("from", "replicas = [\"local:p/x\"]\nfrom", "leave those out"),
            ("\"db\"", "\"d b\"", "letters"),
            ("from", "key_file = \"a\"\nkey_command = [\"b\"]\nfrom", "either a key file"),
        ] {
            let config = toml::from_str::<Config>(&standby.replace(from, to)).unwrap();
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        for (from, to, says) in [
            (format!("id = \"{id}\""), "id = \"x\"".to_owned(), "a UUID"),
            (format!("[\"local:p/{id}\"]"), "[]".to_owned(), "one at least"),
            (format!("local:p/{id}"), "192.0.2.1:4420".to_owned(), "names no replica"),
        ] {
            let config = toml::from_str::<Config>(&named.replace(&from, &to)).unwrap();
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }

        let twice = format!("{text}[[pool]]\nname = \"p\"\npath = \"x\"\n");
        let error = toml::from_str::<Config>(&twice).unwrap().check().unwrap_err();
        assert!(error.to_string().contains("two pools"), "{error}");
    }
}
