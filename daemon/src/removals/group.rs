//! Removes devices together: looks at each, puts those that are pods' into one group and has the group [depart](Departures).
//!
//! The kernel removes whatever is in a group, so it is looked at as a whole right before. What is in it and a pod's was
//! put there by a daemon that was killed before it got further: its removal was asked for too.

use std::collections::BTreeSet;

use netlink_packet_route::RouteNetlinkMessage;
use sluice_cni::names::REMOVAL_GROUP;
use sluice_cni::netlink::{Netlink, NetlinkError, Request};
use sluice_cni::removals::Ask;
use sluice_cni::requests;
use sluice_cni::wiring::Link;

use super::departures::Departures;

/// Most devices asked about in one batch: their answers, some 2 KB each, must fit the socket's buffer together.
const LOOKS: usize = 32;

/// What became of a heap of requests.
#[derive(Debug, Default)]
pub struct Removed {
    /// Per request, in order: gone, or why it was left alone.
    pub outcomes: Vec<Result<(), String>>,
    /// Devices removed.
    pub devices: u64,
    /// Removals of the kernel's they took.
    pub groups: u64,
}

/// Removes the devices asked for in the calling thread's network namespace: when it returns they are gone.
///
/// # Errors
/// The kernel refused something; any of them may be left.
pub fn remove(asks: &[Ask], departures: &Departures) -> Result<Removed, NetlinkError> {
    let mut socket = Netlink::open()?;
    let mut removed = Removed::default();
    let mut doomed = Vec::new();
    for some in asks.chunks(LOOKS) {
        let mut links = look(&mut socket, some)?;
        for ask in some {
            let link = links.iter().position(|link| link.index == ask.index);
            let outcome = judge(ask, link.map(|position| links.swap_remove(position)).as_ref());
            if outcome == Ok(true) {
                doomed.push(ask);
            }
            removed.outcomes.push(outcome.map(drop));
        }
    }
    removed.devices = doomed.len() as u64;
    let requests = match doomed.as_slice() {
        [] => return Ok(removed),
        [one] => vec![requests::remove_link(&one.name, Some(one.index))],
        many => {
            if let Some(stranger) = stranger(&mut socket)? {
                tracing::warn!(
                    device = stranger.name,
                    group = REMOVAL_GROUP,
                    "a device that is not Sluice's is in the group Sluice removes pods' devices by, so they are removed one by one, \
                     slowly; take it out of that group: ip link set dev NAME group 0"
                );
                one_by_one(many)
            } else {
                mark(&mut socket, many)?;
                vec![requests::remove_group(REMOVAL_GROUP)]
            }
        }
    };
    removed.groups = requests.len() as u64;
    let devices: BTreeSet<u32> = doomed.iter().map(|ask| ask.index).collect();
    departures.remove(requests, devices)?;
    Ok(removed)
}

/// The devices at the indices asked about, as far as there are any.
fn look(socket: &mut Netlink, asks: &[Ask]) -> Result<Vec<Link>, NetlinkError> {
    let looks: Vec<_> = asks
        .iter()
        .map(|ask| requests::get_link_at(ask.index, &ask.name))
        .collect();
    Ok(links(socket.batch(&looks)?))
}

fn links(answers: Vec<RouteNetlinkMessage>) -> Vec<Link> {
    let link = |answer| match answer {
        RouteNetlinkMessage::NewLink(message) => Some(Link::read(&message)),
        _ => None,
    };
    answers.into_iter().filter_map(link).collect()
}

/// Whether the device found is to be removed, is gone already, or why it is left alone.
fn judge(ask: &Ask, found: Option<&Link>) -> Result<bool, String> {
    match found {
        None => Ok(false),
        Some(link) if link.name == ask.name && link.serves().is_some() => Ok(true),
        Some(link) => Err(format!(
            "index {} is {} with alias {:?}, not a pod's {}",
            ask.index, link.name, link.alias, ask.name
        )),
    }
}

/// A device in the group that is no pod's.
fn stranger(socket: &mut Netlink) -> Result<Option<Link>, NetlinkError> {
    let all = links(socket.batch(&[requests::list_all_links()])?);
    Ok(all
        .into_iter()
        .find(|link| link.group == REMOVAL_GROUP && link.serves().is_none()))
}

/// Puts devices into the group.
fn mark(socket: &mut Netlink, doomed: &[&Ask]) -> Result<(), NetlinkError> {
    let marks: Vec<_> = doomed
        .iter()
        .map(|ask| requests::set_group(&ask.name, ask.index, REMOVAL_GROUP))
        .collect();
    socket.batch(&marks).map(drop)
}

fn one_by_one(doomed: &[&Ask]) -> Vec<Request> {
    let each = doomed.iter();
    each.map(|ask| requests::remove_link(&ask.name, Some(ask.index)))
        .collect()
}
