//! The connection table as people read it.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use sluice_ebpf_types::{Connection as Entry, ConnectionKey, TCP, UDP, role, seen};

use super::expiry::monotonic;
use super::tables::{self, Tables};
use super::wanted::socket_address;
use crate::proxy::{Connection, ConnectionState};
use crate::state::service_port::Protocol;

/// A connection that has said nothing for so long is taken for one that does not go on.
const SILENT: Duration = Duration::from_secs(300);

/// Every connection, by the one of its entries that holds its state.
///
/// # Errors
/// The kernel's.
pub(super) fn list(tables: &Tables) -> Result<Vec<Connection>> {
    let now = monotonic();
    let mut all = Vec::new();
    tables.connections.walk(|key, entry| {
        if entry.role == role::FORWARD {
            all.push(connection(&key, &entry, now));
        }
    })?;
    Ok(all)
}

/// Forgets datagrams' in the table pinned in `maps`: endpoints that go are not taken out of it any more, and a client that does not
/// learn of its endpoint's end would stay with it for ever. Says whether others go on.
///
/// # Errors
/// The kernel's, or the table is not there.
pub(super) fn let_go(maps: &Path) -> Result<bool> {
    let now = monotonic();
    let mut connections = tables::connections(maps)?;
    let (mut datagrams, mut others) = (Vec::new(), false);
    connections.walk(|key, entry| {
        if key.protocol == UDP {
            datagrams.push(key);
        } else if entry.role == role::FORWARD {
            let connection = connection(&key, &entry, now);
            others |= connection.state == ConnectionState::Established && connection.idle < SILENT;
        }
    })?;
    for key in datagrams {
        connections.remove(&key)?;
    }
    Ok(others)
}

fn connection(key: &ConnectionKey, entry: &Entry, now: u64) -> Connection {
    let stand_in =
        (!entry.stand_in.is_unspecified()).then(|| socket_address(entry.stand_in, entry.stand_in_port));
    Connection {
        protocol: match key.protocol {
            TCP => Protocol::Tcp,
            UDP => Protocol::Udp,
            _ => Protocol::Sctp,
        },
        client: socket_address(key.source, key.source_port),
        frontend: socket_address(key.destination, key.destination_port),
        backend: socket_address(entry.address, entry.port),
        stand_in,
        state: state(key.protocol, entry.seen),
        idle: Duration::from_nanos(now.saturating_sub(entry.last_seen)),
    }
}

/// `bits` are those of [`seen`].
fn state(protocol: u8, bits: u32) -> ConnectionState {
    let answered = bits & seen::REPLY != 0;
    if protocol == UDP {
        return if answered {
            ConnectionState::Answered
        } else {
            ConnectionState::Unanswered
        };
    }
    if seen::closed(bits) {
        ConnectionState::Closed
    } else if bits & (seen::CLIENT_FIN | seen::BACKEND_FIN) != 0 {
        ConnectionState::Closing
    } else if answered {
        ConnectionState::Established
    } else {
        ConnectionState::Opening
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_says_how_far_a_connection_is() {
        for (protocol, bits, wanted) in [
            (TCP, 0, "opening"),
            (TCP, seen::REPLY, "established"),
            (TCP, seen::REPLY | seen::BACKEND_FIN, "closing"),
            (TCP, seen::CLIENT_FIN | seen::BACKEND_FIN, "closed"),
            (TCP, seen::RESET, "closed"),
            (UDP, 0, "unanswered"),
            (UDP, seen::REPLY, "answered"),
        ] {
            assert_eq!(state(protocol, bits).to_string(), wanted);
        }
    }
}
