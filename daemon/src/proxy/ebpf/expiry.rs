//! Regular upkeep of what the programs remember: connections and session affinity.
//!
//! The tables forget their oldest by themselves when they are full; this is what keeps them from filling with the dead.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use sluice_ebpf_types::{Connection, ConnectionKey, UDP, direction, role, seen};

use super::tables::Tables;

const SECOND: u64 = 1_000_000_000;
/// Idle times after which a connection is forgotten, nanoseconds.
const CLOSED: u64 = 10 * SECOND;
const TCP_UNSETTLED: u64 = 60 * SECOND;
const TCP_ESTABLISHED: u64 = 6 * 3600 * SECOND;
const UDP_UNREPLIED: u64 = 60 * SECOND;
const UDP_REPLIED: u64 = 180 * SECOND;

/// What must be remembered from one run to the next.
#[derive(Default)]
pub(super) struct Expiry {
    /// Entries that stood alone at the last run. A connection's entries are made one after the other: alone twice is
    /// alone for good.
    alone: HashSet<ConnectionKey>,
}

impl Expiry {
    /// Drops what has expired. `affinity`: time-out in seconds of each set that has session affinity, by id.
    ///
    /// # Errors
    /// The kernel's.
    pub fn run(&mut self, tables: &mut Tables, affinity: &HashMap<u32, u32>) -> Result<()> {
        let now = monotonic();
        self.expire_connections(tables, now)?;
        let mut expired = Vec::new();
        tables.affinity.walk(|key, value| {
            let limit = affinity
                .get(&key.service)
                .map_or(0, |seconds| u64::from(*seconds) * SECOND);
            if now.saturating_sub(value.last_used) >= limit {
                expired.push(key);
            }
        })?;
        for key in expired {
            tables.affinity.remove(&key)?;
        }
        Ok(())
    }

    fn expire_connections(&mut self, tables: &mut Tables, now: u64) -> Result<()> {
        let mut expired = Vec::new();
        let mut alone = HashSet::new();
        let mut failure = None;
        tables.connections.walk(|key, value| {
            if value.role == role::FORWARD {
                if now.saturating_sub(value.last_seen) >= limit(&key, &value) {
                    expired.push((key, value));
                }
            } else {
                match has_master(tables, &key, &value) {
                    Ok(true) => {}
                    Ok(false) => {
                        alone.insert(key);
                    }
                    Err(error) => failure = Some(error),
                }
            }
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        for (key, value) in expired {
            for part in parts(&key, &value) {
                tables.connections.remove(&part)?;
            }
        }
        for key in self.alone.intersection(&alone) {
            tables.connections.remove(key)?;
        }
        self.alone = alone;
        Ok(())
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`, what `bpf_ktime_get_ns` tells the programs.
pub(super) fn monotonic() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` outlives the call. This clock always exists, so it cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * SECOND + time.tv_nsec.cast_unsigned()
}

/// How long the connection of this `FORWARD` entry may be idle, nanoseconds.
fn limit(key: &ConnectionKey, entry: &Connection) -> u64 {
    let replied = entry.seen & seen::REPLY != 0;
    if key.protocol == UDP {
        return if replied { UDP_REPLIED } else { UDP_UNREPLIED };
    }
    if seen::closed(entry.seen) {
        CLOSED
    } else if !replied || entry.seen & (seen::CLIENT_FIN | seen::BACKEND_FIN) != 0 {
        TCP_UNSETTLED
    } else {
        TCP_ESTABLISHED
    }
}

/// The keys of all entries of the connection with this `FORWARD` entry, that one last.
fn parts(key: &ConnectionKey, forward: &Connection) -> Vec<ConnectionKey> {
    let undest = ConnectionKey {
        source: forward.address,
        source_port: forward.port,
        destination: key.source,
        destination_port: key.source_port,
        direction: direction::OUT,
        ..*key
    };
    let mut parts = vec![undest];
    if !forward.stand_in.is_unspecified() {
        parts.push(ConnectionKey {
            destination: forward.stand_in,
            destination_port: forward.stand_in_port,
            direction: direction::IN,
            ..undest
        });
        parts.push(ConnectionKey {
            destination: forward.address,
            destination_port: forward.port,
            direction: direction::OUT,
            ..*key
        });
    }
    parts.push(*key);
    parts
}

/// Whether the connection this entry is part of has its `FORWARD` entry, and that knows of this one.
fn has_master(tables: &Tables, key: &ConnectionKey, entry: &Connection) -> Result<bool> {
    // From each role to client and endpoint.
    let (client, backend) = match entry.role {
        role::SOURCE => (
            (key.source, key.source_port),
            (key.destination, key.destination_port),
        ),
        role::UNSOURCE => ((entry.address, entry.port), (key.source, key.source_port)),
        _ => (
            (key.destination, key.destination_port),
            (key.source, key.source_port),
        ),
    };
    let undest = ConnectionKey {
        source: backend.0,
        source_port: backend.1,
        destination: client.0,
        destination_port: client.1,
        direction: direction::OUT,
        ..*key
    };
    let Some(frontend) = tables.connections.get(&undest)? else {
        return Ok(false);
    };
    let forward = ConnectionKey {
        source: client.0,
        source_port: client.1,
        destination: frontend.address,
        destination_port: frontend.port,
        direction: direction::IN,
        ..*key
    };
    Ok(tables
        .connections
        .get(&forward)?
        .is_some_and(|value| parts(&forward, &value).contains(key)))
}

#[cfg(test)]
mod tests {
    use sluice_ebpf_types::TCP;

    use super::*;

    /// S13
    #[test]
    fn the_idle_limit_follows_the_state() {
        let tcp = ConnectionKey {
            protocol: TCP,
            ..ConnectionKey::default()
        };
        let udp = ConnectionKey {
            protocol: 17,
            ..ConnectionKey::default()
        };
        let entry = |seen| Connection {
            seen,
            role: role::FORWARD,
            ..Connection::default()
        };
        assert_eq!(limit(&tcp, &entry(0)), TCP_UNSETTLED);
        assert_eq!(limit(&tcp, &entry(seen::REPLY)), TCP_ESTABLISHED);
        assert_eq!(limit(&tcp, &entry(seen::REPLY | seen::CLIENT_FIN)), TCP_UNSETTLED);
        assert_eq!(
            limit(&tcp, &entry(seen::REPLY | seen::CLIENT_FIN | seen::BACKEND_FIN)),
            CLOSED
        );
        assert_eq!(limit(&tcp, &entry(seen::RESET)), CLOSED);
        assert_eq!(limit(&udp, &entry(0)), UDP_UNREPLIED);
        assert_eq!(limit(&udp, &entry(seen::REPLY)), UDP_REPLIED);
    }
}
