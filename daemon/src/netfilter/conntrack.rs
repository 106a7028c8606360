//! Connection tracking: what it holds, and taking away what is stale of it (ctnetlink,
//! include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;

use super::parts::Parts;
use super::wire::{Attributes, CONNTRACK, Netfilter, attribute};
use crate::state::service_port::{Family, Protocol};

/// `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 1;
const DELETE: u16 = 2;

/// `enum ctattr_type`.
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const ID: u16 = 12;
const STATUS_MASK: u16 = 26;
/// `enum ctattr_tuple`.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
/// `enum ctattr_l4proto`.
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
/// `CTA_PROTOINFO_TCP`, `CTA_PROTOINFO_TCP_STATE`.
const TCP: u16 = 1;
const TCP_STATE: u16 = 1;
/// `enum ip_conntrack_status`.
const SEEN_REPLY: u32 = 1 << 1;
const DESTINATION_NAT: u32 = 1 << 5;

/// Both ends as one direction's packets have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// Who sends.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
    /// How.
    pub protocol: Protocol,
}

/// A connection whose destination is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translated {
    /// What who began it sends.
    pub original: Tuple,
    /// What comes back.
    pub reply: Tuple,
    /// Whether anything did.
    pub is_answered: bool,
    /// TCP's state (`enum tcp_conntrack`).
    pub tcp: Option<u8>,
}

impl Tuple {
    fn parse(bytes: &[u8], family: Family) -> Option<Self> {
        let addresses = attribute(bytes, TUPLE_IP)?;
        let ports = attribute(bytes, TUPLE_PROTOCOL)?;
        let (source, destination) = match family {
            Family::V4 => (1, 2),
            Family::V6 => (3, 4),
        };
        let address = |kind| Parts(attribute(addresses, kind)?).address(family);
        // Attributes are not padded to four bytes by their length.
        let port = |kind| {
            Some(u16::from_be_bytes(
                attribute(ports, kind)?.get(..2)?.try_into().ok()?,
            ))
        };
        let number = *attribute(ports, PROTOCOL_NUMBER)?.first()?;
        Some(Self {
            source: SocketAddr::new(address(source)?, port(SOURCE_PORT)?),
            destination: SocketAddr::new(address(destination)?, port(DESTINATION_PORT)?),
            protocol: [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
                .into_iter()
                .find(|protocol| protocol.number() == number)?,
        })
    }
}

fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(
        attribute(bytes, kind)?.get(..4)?.try_into().ok()?,
    ))
}

fn each(
    netfilter: &Netfilter,
    wanted: &Attributes,
    mut visit: impl FnMut(Family, &[u8], Tuple, Tuple),
) -> Result<()> {
    for (number, family) in [
        (libc::AF_INET as u8, Family::V4),
        (libc::AF_INET6 as u8, Family::V6),
    ] {
        netfilter
            .dump(CONNTRACK, GET, number, wanted, |_, body| {
                let tuple = |kind| Tuple::parse(attribute(body, kind)?, family);
                if let (Some(original), Some(reply)) = (tuple(TUPLE_ORIGINAL), tuple(TUPLE_REPLY)) {
                    visit(family, body, original, reply);
                }
            })
            .context("reading the connection table")?;
    }
    Ok(())
}

/// Removes UDP's entries for those frontends whose packets go where `belongs` says they do not; how many those were.
///
/// # Errors
/// The kernel's.
pub fn remove_stale(
    netfilter: &Netfilter,
    frontends: &HashSet<SocketAddr>,
    belongs: impl Fn(SocketAddr, SocketAddr) -> bool,
) -> Result<usize> {
    remove(netfilter, &Attributes::default(), |_, original, reply| {
        let ours = original.protocol == Protocol::Udp && frontends.contains(&original.destination);
        ours && !belongs(original.destination, reply.source)
    })
}

/// Removes the entries of connections to those frontends that were not translated and that nobody has answered: the client tries
/// again, or another has its port by and by, and neither would be translated while the entry is there. How many those were.
///
/// # Errors
/// The kernel's.
pub fn remove_unanswered(
    netfilter: &Netfilter,
    frontends: &HashSet<(SocketAddr, Protocol)>,
) -> Result<usize> {
    remove(netfilter, &unanswered(), |status, original, reply| {
        status & SEEN_REPLY == 0
            && reply.source == original.destination
            && frontends.contains(&(original.destination, original.protocol))
    })
}

/// The same for connections with their client's own source that should not have it, as `leaves` says of where from and where to.
///
/// # Errors
/// The kernel's.
pub fn remove_unmasqueraded(netfilter: &Netfilter, leaves: impl Fn(IpAddr, IpAddr) -> bool) -> Result<usize> {
    remove(netfilter, &unanswered(), |status, original, reply| {
        status & SEEN_REPLY == 0
            && reply.destination == original.source
            && leaves(original.source.ip(), reply.source.ip())
    })
}

/// Asks for entries that nobody has answered; kernels before 5.18 give all.
fn unanswered() -> Attributes {
    let mut wanted = Attributes::default();
    wanted
        .put(STATUS, &0_u32.to_be_bytes())
        .put(STATUS_MASK, &SEEN_REPLY.to_be_bytes());
    wanted
}

/// Removes those of the `wanted` entries that are `stale` by their status and by what both directions' packets have.
fn remove(
    netfilter: &Netfilter,
    wanted: &Attributes,
    is_stale: impl Fn(u32, Tuple, Tuple) -> bool,
) -> Result<usize> {
    let mut stale = Vec::new();
    each(netfilter, wanted, |family, body, original, reply| {
        if is_stale(number(body, STATUS).unwrap_or_default(), original, reply) {
            let mut order = Attributes::default();
            if let Some(tuple) = attribute(body, TUPLE_ORIGINAL) {
                order.put(TUPLE_ORIGINAL | libc::NLA_F_NESTED as u16, tuple);
            }
            if let Some(id) = attribute(body, ID) {
                order.put(ID, id);
            }
            stale.push((family, order));
        }
    })?;
    let mut removed = 0;
    for (family, order) in stale {
        let number = match family {
            Family::V4 => libc::AF_INET,
            Family::V6 => libc::AF_INET6,
        };
        match netfilter.request(CONNTRACK, DELETE, number as u8, &order) {
            Ok(()) => removed += 1,
            // It ended by itself.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("removing a stale entry from the connection table"),
        }
    }
    Ok(removed)
}

/// Asks for entries whose destination is translated; kernels before 5.18 give all.
fn translated() -> Attributes {
    let mut wanted = Attributes::default();
    let bit = DESTINATION_NAT.to_be_bytes();
    wanted.put(STATUS, &bit).put(STATUS_MASK, &bit);
    wanted
}

/// Hands every connection whose destination is translated to `visit`.
///
/// # Errors
/// The kernel's.
pub fn each_translated(netfilter: &Netfilter, mut visit: impl FnMut(Translated)) -> Result<()> {
    each(netfilter, &translated(), |_, body, original, reply| {
        let status = number(body, STATUS).unwrap_or_default();
        if status & DESTINATION_NAT == 0 {
            return;
        }
        let tcp = attribute(body, PROTOCOL_INFO)
            .and_then(|info| attribute(info, TCP))
            .and_then(|tcp| attribute(tcp, TCP_STATE))
            .and_then(|state| state.first());
        visit(Translated {
            original,
            reply,
            is_answered: status & SEEN_REPLY != 0,
            tcp: tcp.copied(),
        });
    })
}

/// Whether there are translated connections with both ends in these networks.
///
/// # Errors
/// The kernel's.
pub fn any_within(netfilter: &Netfilter, networks: &[IpNetwork]) -> Result<bool> {
    let inside = |address: IpAddr| networks.iter().any(|network| network.contains(address));
    let mut any = false;
    each_translated(netfilter, |found| {
        any |= inside(found.original.source.ip()) && inside(found.reply.source.ip());
    })?;
    Ok(any)
}
