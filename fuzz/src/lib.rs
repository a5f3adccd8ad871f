//! Fuzz targets for every decoder of a peer's or a disk's bytes, and a runner that needs nothing
//! but stable Rust: `cargo run -p cairn-fuzz`.
//!
//! A target is a function that must not panic, whatever bytes it gets. It may assert what it knows
//! of its subject, such as that any split of a stream gives the same result.
#![forbid(unsafe_code)]

pub mod config;
pub mod iscsi;
pub mod mutate;
pub mod nvmf;
pub mod pages;
pub mod replica;

/// Every target. A row is all that a new one needs.
const TARGETS: &[Target] = &[
    Target::new("nvmf-target-stream", nvmf::target_stream, || nvmf::seeds("target_stream")),
    Target::new("nvmf-initiator-stream", nvmf::initiator_stream, || {
        nvmf::seeds("initiator_stream")
    }),
    Target::new("nvmf-pdu-header", nvmf::pdu_header, || nvmf::seeds("pdu_header")),
    Target::new("nvmf-identify", nvmf::identify, || nvmf::seeds("identify")),
    Target::new("nvmf-discovery", nvmf::discovery, || nvmf::seeds("discovery")),
    Target::new("iscsi-target-stream", iscsi::target_stream, || iscsi::seeds("target_stream"))
        .with_words(&[b"InitiatorName=", b"AuthMethod=CHAP", b"CHAP_A=5", b"SendTargets=All"]),
    Target::new("iscsi-session", iscsi::session, || iscsi::seeds("session")),
    Target::new("iscsi-header", iscsi::header, || iscsi::seeds("header")),
    Target::new("reservations", iscsi::reservations, || iscsi::seeds("reservations")),
    Target::new("config", config::config, config::seeds),
    Target::new("vendor-pages", pages::pages, pages::seeds),
    Target::new("replica-open-damaged", replica::open_damaged, replica::seeds),
    Target::new("replica-superblock", replica::superblock, replica::seeds),
    Target::new("replica-journal", replica::journal, replica::seeds),
    Target::new("replica-catalog-page", replica::catalog_page, replica::seeds),
    Target::new("replica-table-page", replica::table_page, replica::seeds),
];

/// One decoder under test.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// By which the runner names it; also the start of the names of saved inputs.
    pub name: &'static str,
    /// Takes any bytes. A panic is a bug found.
    pub run: fn(&[u8]),
    /// Well-formed inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Byte strings that mean something to the decoder, such as magic numbers.
    pub words: &'static [&'static [u8]],
}

impl Target {
    /// A target without words of its own.
    pub const fn new(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Self {
        Self { name, run, seeds, words: &[] }
    }

    /// With byte strings for the mutator to put in.
    #[must_use]
    pub const fn with_words(mut self, words: &'static [&'static [u8]]) -> Self {
        self.words = words;
        self
    }
}

/// All targets, in a fixed order.
pub fn targets() -> &'static [Target] {
    TARGETS
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::targets;

    #[test]
    fn every_target_takes_its_own_seeds() {
        for target in targets() {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{} has no seeds", target.name);
            for seed in seeds {
                (target.run)(&seed);
            }
        }
    }

    #[test]
    fn names_are_unique() {
        let names: Vec<_> = targets().iter().map(|t| t.name).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }
}
