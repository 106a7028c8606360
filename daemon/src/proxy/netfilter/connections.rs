//! Connections through Services, as connection tracking knows them.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use crate::netfilter::conntrack::{self, Translated};
use crate::netfilter::wire::Netfilter;
use crate::proxy::{Connection, ConnectionState};
use crate::state::service_port::Protocol;

/// The translated connections to frontends that `serves` knows.
///
/// # Errors
/// The kernel's.
pub fn list(netfilter: &Netfilter, serves: impl Fn(SocketAddr, Protocol) -> bool) -> Result<Vec<Connection>> {
    let mut found = Vec::new();
    conntrack::each_translated(netfilter, |translated| {
        let Translated { original, reply, .. } = translated;
        if serves(original.destination, original.protocol) {
            found.push(Connection {
                protocol: original.protocol,
                client: original.source,
                frontend: original.destination,
                backend: reply.source,
                stand_in: (reply.destination != original.source).then_some(reply.destination),
                state: state(translated),
                // The table has what is left of a time-out, and not since when.
                idle: Duration::ZERO,
            });
        }
    })?;
    Ok(found)
}

fn state(of: Translated) -> ConnectionState {
    if of.original.protocol == Protocol::Udp {
        return if of.is_answered {
            ConnectionState::Answered
        } else {
            ConnectionState::Unanswered
        };
    }
    // `enum tcp_conntrack`.
    match of.tcp {
        Some(1 | 2 | 9) => ConnectionState::Opening,
        Some(4..=6) => ConnectionState::Closing,
        Some(7 | 8) => ConnectionState::Closed,
        _ if of.is_answered => ConnectionState::Established,
        _ => ConnectionState::Opening,
    }
}
