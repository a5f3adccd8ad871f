//! How much may be promised of a pool, and the warnings before it is full.

use cairn_reactor::Driver;
use cairn_replica::{ReplicaSpec, Usage};

use super::Shard;
use crate::control::EngineError;

/// Percent of a pool in use at which a line is logged: once each, and again after it was less.
const LEVELS: [u64; 4] = [80, 90, 95, 100];

/// How many of the levels are reached.
fn level(usage: &Usage) -> usize {
    let used = usage.extents_total - usage.extents_free.min(usage.extents_total);
    let percent = (used + usage.extents_reserved) * 100 / usage.extents_total.max(1);
    LEVELS.iter().filter(|&&at| percent >= at).count()
}

/// What is to be said of how full a pool is; empty while there is room.
pub(super) fn warning(usage: &Usage) -> String {
    match level(usage) {
        0 => String::new(),
        n => format!("at least {} % in use", LEVELS[n - 1]),
    }
}

impl<D: Driver> Shard<D> {
    /// Refuses what would promise more of a pool than its setting allows.
    pub(super) fn check_promise(&self, at: usize, spec: &ReplicaSpec) -> Result<(), EngineError> {
        let usage = self.pools[at].pool.usage();
        let extents = spec.block_size.bytes_of(spec.blocks).div_ceil(usage.extent_bytes.into());
        self.check_extents(at, extents)
    }

    pub(super) fn check_extents(&self, at: usize, extents: u64) -> Result<(), EngineError> {
        let times = u64::from(self.config.overcommit);
        let local = &self.pools[at];
        let usage = local.pool.usage();
        let allowed = usage.extents_total.saturating_mul(times);
        let promised = usage.extents_provisioned.saturating_add(extents);
        if times > 0 && promised > allowed {
            return Err(EngineError::Invalid(format!(
                "pool `{}` has {} MiB, of which {} MiB are promised to replicas; {extents} MiB more \
                 would pass {times} times its size: grow it, use another, or set a larger \
                 `overcommit`",
                local.name, usage.extents_total, usage.extents_provisioned,
            )));
        }
        Ok(())
    }

    /// Logs that a pool becomes full, or is not any more.
    pub(super) fn watch_space(&mut self, at: usize) {
        if self.pool_levels.len() <= at {
            self.pool_levels.resize(at + 1, 0);
        }
        let local = &self.pools[at];
        let usage = local.pool.usage();
        let (before, now) = (self.pool_levels[at], level(&usage));
        if now > before {
            tracing::warn!(
                pool = %local.name, percent = LEVELS[now - 1], free_mib = usage.extents_free,
                reserved_mib = usage.extents_reserved,
                "the pool is getting full: writes to new places will fail when it is; trim, delete \
                 replicas or snapshots, or grow it"
            );
        } else if now < before {
            tracing::info!(pool = %local.name, free_mib = usage.extents_free, "the pool has room again");
        }
        self.pool_levels[at] = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_told_by_what_is_left() {
        let usage = |free, reserved| Usage {
            extents_total: 1000,
            extents_free: free,
            extents_allocated: 1000 - free,
            extents_reserved: reserved,
            extents_provisioned: 0,
            extent_bytes: 1 << 20,
        };
        assert_eq!(warning(&usage(201, 0)), "");
        assert_eq!(warning(&usage(200, 0)), "at least 80 % in use");
        assert_eq!(warning(&usage(900, 850)), "at least 95 % in use");
        assert_eq!(warning(&usage(0, 0)), "at least 100 % in use");
    }
}
