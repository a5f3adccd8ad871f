//! How the API names replicas: by where they are.

use std::net::SocketAddr;

use cairn_engine::ChildAddress;
use cairn_engine::block::ReplicaId;
use cairn_engine::nvmf::target::MAX_NQN_LEN;

/// What a replica URI names.
pub(super) fn parse_replica_uri(uri: &str) -> Result<(ReplicaId, ChildAddress), String> {
    let wrong = || {
        format!(
            "`{uri}` names no replica; write nvme+tcp://HOST:PORT/NQN (from `cairn replica list`) or \
             local:POOL/REPLICA-ID"
        )
    };
    let id = |text: &str| text.parse::<ReplicaId>().map_err(|_| wrong());
    if let Some(rest) = uri.strip_prefix("local:") {
        let (pool, replica) = rest.split_once('/').ok_or_else(wrong)?;
        return Ok((id(replica)?, ChildAddress::Local { pool: pool.to_owned() }));
    }
    let rest = uri.strip_prefix("nvme+tcp://").ok_or_else(wrong)?;
    let (peer, nqn) = rest.split_once('/').ok_or_else(wrong)?;
    let (_, replica) = nqn.rsplit_once("replica:").ok_or_else(wrong)?;
    if !is_nqn(nqn) {
        return Err(wrong());
    }
    let peer = resolve(peer).ok_or_else(wrong)?;
    Ok((id(replica)?, ChildAddress::Remote { peer, nqn: nqn.to_owned() }))
}

/// Whether it can be said in a Connect: `nqn.` and at most 223 bytes.
fn is_nqn(text: &str) -> bool {
    text.starts_with("nqn.") && text.len() <= MAX_NQN_LEN && !text.contains('\0')
}

/// An address as it is written, or what its name resolves to now.
pub(crate) fn resolve(peer: &str) -> Option<SocketAddr> {
    use std::net::ToSocketAddrs as _;
    peer.parse().ok().or_else(|| peer.to_socket_addrs().ok()?.next())
}

pub(super) fn replica_uri(replica: ReplicaId, address: &ChildAddress) -> String {
    match address {
        ChildAddress::Local { pool } => format!("local:{pool}/{replica}"),
        ChildAddress::Remote { peer, nqn } => format!("nvme+tcp://{peer}/{nqn}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replica_uris_are_read_as_they_are_written() {
        let id = "3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10";
        for uri in [
            format!("nvme+tcp://127.0.0.1:4421/nqn.2026-11.io.cairn:replica:{id}"),
            format!("nvme+tcp://[::1]:4421/nqn.2026-11.io.cairn:replica:{id}"),
            format!("local:p1/{id}"),
        ] {
            let (replica, address) = parse_replica_uri(&uri).unwrap();
            assert_eq!(replica.to_string(), id);
            assert_eq!(replica_uri(replica, &address), uri);
        }
        // So long an NQN is a panic further down.
        let long = format!("nvme+tcp://127.0.0.1:1/nqn.{}:replica:{id}", "x".repeat(200));
        for uri in [&long, "", "local:p1", "nvme+tcp://127.0.0.1/x", "http://127.0.0.1:1/replica:1"]
        {
            assert!(parse_replica_uri(uri).is_err(), "{uri}");
        }
    }
}
