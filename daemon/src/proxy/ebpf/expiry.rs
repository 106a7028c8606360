//! Regular upkeep of what the programs remember: connections and session affinity.
//!
//! The tables forget their oldest by themselves when they are full; this is what keeps them from filling with the dead.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use sluice_ebpf_types::{Connection, ConnectionKey, UDP, role, seen};

use super::connection_entries::{Removals, has_master};
use super::tables::Tables;

const SECOND: u64 = 1_000_000_000;
/// Idle times after which a connection is forgotten, nanoseconds.
const CLOSED: u64 = 10 * SECOND;
/// How long a stand-in's port is kept from others after the endpoint's last word, nanoseconds: the 60 s of its TIME-WAIT (TCP_TIMEWAIT_LEN of
/// include/net/tcp.h), and what its timer may be late.
const LINGERING: u64 = 65 * SECOND;
const TCP_UNSETTLED: u64 = 60 * SECOND;
const TCP_ESTABLISHED: u64 = 6 * 3600 * SECOND;
const UDP_UNREPLIED: u64 = 60 * SECOND;
const UDP_REPLIED: u64 = 180 * SECOND;

/// From this part of its capacity on, the connection table is made to have room again: the kernel, which begins to forget at
/// two thirds or so, asks only which entries were used of late, not what they are.
const TOO_FULL: (usize, usize) = (3, 5);
/// To this part.
const ROOMY: (usize, usize) = (1, 2);
/// An established TCP connection is not given up for others before it has been idle for this long, nanoseconds.
const HELD: u64 = 300 * SECOND;

/// What must be remembered from one run to the next.
#[derive(Default)]
pub(super) struct Expiry {
    /// Entries that stood alone at the last run. A connection's entries are made one after the other: alone twice is
    /// alone for good.
    alone: HashSet<ConnectionKey>,
    /// Connections given up before their time, so that others have room.
    given_up: u64,
}

impl Expiry {
    /// How many connections were given up before their time, so that others had room.
    pub fn given_up(&self) -> u64 {
        self.given_up
    }

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
                expired.push((key, value));
            }
        })?;
        for (key, value) in expired {
            // Its client may have come back since.
            if tables.affinity.get(&key)? == Some(value) {
                tables.affinity.remove(&key)?;
            }
        }
        Ok(())
    }

    fn expire_connections(&mut self, tables: &mut Tables, now: u64) -> Result<()> {
        let found = Found::read(tables, now)?;
        let mut removals = Removals::default();
        let removed = self.make_room(tables, found, now, &mut removals);
        // After an error too: what was removed until then may have been a new connection's.
        let finished = removals.finish(tables);
        removed.and(finished)
    }

    /// Removes what is over, then what is in others' way, then what is left of connections.
    fn make_room(
        &mut self,
        tables: &mut Tables,
        mut found: Found,
        now: u64,
        removals: &mut Removals,
    ) -> Result<()> {
        for (key, value) in &found.expired {
            let gone = removals.remove(tables, key, value, seen::lingers(value.seen))?;
            // What was entered during the walk may not have been counted.
            found.entries = found.entries.saturating_sub(gone);
        }
        // A connection may have lost some of its entries already: what counts is what is really gone.
        let mut excess = excess(found.entries, tables.connections.capacity());
        if excess > 0 {
            // Hardly ever somebody's connection: at worst the next one begins late.
            found.ports.sort_by_key(|(last_seen, _)| *last_seen);
            for (last_seen, key) in found.ports {
                // It may be another connection's by now.
                let port = tables.connections.get(&key)?;
                if port.is_some_and(|port| port.last_seen == last_seen) {
                    excess -= usize::from(tables.connections.remove(&key)?);
                }
                if excess == 0 {
                    break;
                }
            }
        }
        if excess > 0 {
            for (key, value) in dispensable(found.live, now) {
                let gone = removals.remove(tables, &key, &value, false)?;
                excess = excess.saturating_sub(gone);
                self.given_up += u64::from(gone > 0);
                if excess == 0 {
                    break;
                }
            }
        }
        for (key, value) in &found.alone {
            if self.alone.contains(key) {
                removals.remove_orphan(tables, key, value)?;
            }
        }
        self.alone = found.alone.into_keys().collect();
        Ok(())
    }
}

/// The connection table as it was read.
#[derive(Default)]
struct Found {
    /// How many entries it had.
    entries: usize,
    /// The `FORWARD` entries of connections that are over.
    expired: Vec<(ConnectionKey, Connection)>,
    /// And of all others.
    live: Vec<(ConnectionKey, Connection)>,
    /// Stand-ins' ports that rest, each with when it was last used.
    ports: Vec<(u64, ConnectionKey)>,
    /// Entries without their connection.
    alone: HashMap<ConnectionKey, Connection>,
}

impl Found {
    fn read(tables: &Tables, now: u64) -> Result<Self> {
        let mut found = Self::default();
        let mut failure = None;
        tables.connections.walk(|key, value| {
            found.entries += 1;
            if value.role == role::FORWARD {
                if now.saturating_sub(value.last_seen) >= limit(&key, &value) {
                    found.expired.push((key, value));
                } else {
                    found.live.push((key, value));
                }
            } else if lingers(&value, now) {
                // Its connection is over, or half so and as little worth by now.
                if now.saturating_sub(value.last_seen) >= CLOSED {
                    found.ports.push((value.last_seen, key));
                }
            } else {
                match has_master(tables, &key, &value) {
                    Ok(true) => {}
                    Ok(false) => {
                        found.alone.insert(key, value);
                    }
                    Err(error) => failure = Some(error),
                }
            }
        })?;
        failure.map_or(Ok(found), Err)
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

/// How many entries must go, of so many in a table of this capacity.
fn excess(entries: usize, capacity: usize) -> usize {
    if entries * TOO_FULL.1 <= capacity * TOO_FULL.0 {
        return 0;
    }
    entries - capacity * ROOMY.0 / ROOMY.1
}

/// The connections that may be given up, in the order to do so: first those that are over, then those nobody answered, then the
/// rest, of each sort the longest idle first. Given are the `FORWARD` entries.
fn dispensable(mut live: Vec<(ConnectionKey, Connection)>, now: u64) -> Vec<(ConnectionKey, Connection)> {
    live.retain(|(key, entry)| {
        limit(key, entry) != TCP_ESTABLISHED || now.saturating_sub(entry.last_seen) >= HELD
    });
    live.sort_by_key(|(key, entry)| (limit(key, entry), entry.last_seen));
    live
}

/// Whether this entry keeps a stand-in's port from others, though its connection may be gone.
fn lingers(entry: &Connection, now: u64) -> bool {
    entry.role == role::UNSOURCE
        && seen::lingers(entry.seen)
        && now.saturating_sub(entry.last_seen) < LINGERING
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

#[cfg(test)]
mod tests {
    use sluice_ebpf_types::TCP;

    use super::*;

    /// S23
    #[test]
    fn what_is_least_worth_goes_first_and_what_lives_is_kept() {
        let now = 10_000 * SECOND;
        let connection = |protocol, port: u16, seen, idle| {
            let key = ConnectionKey {
                protocol,
                source_port: port,
                ..ConnectionKey::default()
            };
            let entry = Connection {
                seen,
                last_seen: now - idle * SECOND,
                role: role::FORWARD,
                ..Connection::default()
            };
            (key, entry)
        };
        let live = vec![
            connection(TCP, 1, seen::REPLY, 1),
            connection(TCP, 2, seen::REPLY, 400),
            connection(TCP, 3, 0, 5),
            connection(TCP, 4, 0, 50),
            connection(UDP, 5, seen::REPLY, 100),
            connection(TCP, 6, seen::RESET, 1),
            connection(TCP, 7, seen::REPLY, 900),
        ];
        let gone = dispensable(live, now);
        let ports: Vec<u16> = gone.iter().map(|(key, _)| key.source_port).collect();
        assert_eq!(ports, [6, 4, 3, 5, 7, 2], "the first lives and is kept");
        assert_eq!(excess(60, 100), 0, "not too full yet");
        assert_eq!(excess(61, 100), 11);
    }

    /// S5 S23
    #[test]
    fn a_port_rests_after_its_endpoints_fin() {
        let entry = |role, seen| Connection {
            seen,
            role,
            ..Connection::default()
        };
        let closed = entry(role::UNSOURCE, seen::BACKEND_FIN);
        assert!(lingers(&closed, 64 * SECOND));
        assert!(!lingers(&closed, 65 * SECOND));
        assert!(
            !lingers(&entry(role::UNSOURCE, seen::BACKEND_FIN | seen::RESET), 1),
            "a reset ends TIME-WAIT"
        );
        assert!(!lingers(&entry(role::UNSOURCE, 0), 1), "it has not closed");
        let forward = entry(role::FORWARD, seen::BACKEND_FIN | seen::CLIENT_FIN);
        assert!(!lingers(&forward, 1), "it holds no port");
    }

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
