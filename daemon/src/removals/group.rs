//! Removes devices together: looks at each, puts those that are pods' into one group and has the group [depart](Departures).
//!
//! The kernel removes whatever is in a group. Its number is therefore chosen by chance when the daemon starts, and such that nothing is in it:
//! looking at all devices right before each removal would take longer than the removal on a node that is full.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};

use netlink_packet_route::RouteNetlinkMessage;
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

/// A device group (`IFLA_GROUP`) that only this daemon puts devices into.
#[derive(Debug)]
pub struct Group {
    number: u32,
    departures: Departures,
}

impl Group {
    /// Chooses a group that is empty in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel does not say what devices there are.
    pub fn choose() -> Result<Self, NetlinkError> {
        let taken = links(Netlink::open()?.batch(&[requests::list_all_links()])?);
        let number = loop {
            // Positive as the kernel counts them, and none of the small ones that people choose.
            let number = 1 << 30 | (RandomState::new().hash_one(()) as u32) >> 2;
            if taken.iter().all(|link| link.group != number) {
                break number;
            }
        };
        Ok(Self {
            number,
            departures: Departures::default(),
        })
    }

    /// Removes the devices asked for in the calling thread's network namespace: when it returns they are gone.
    ///
    /// # Errors
    /// The kernel refused something; any of them may be left.
    pub fn remove(&self, asks: &[Ask]) -> Result<Removed, NetlinkError> {
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
        let request = match doomed.as_slice() {
            [] => return Ok(removed),
            [one] => requests::remove_link(&one.name, Some(one.index)),
            many => {
                socket.batch(&self.mark(many))?;
                requests::remove_group(self.number)
            }
        };
        let devices: BTreeSet<u32> = doomed.iter().map(|ask| ask.index).collect();
        removed.devices = devices.len() as u64;
        removed.groups = 1;
        self.departures.remove(request, devices)?;
        Ok(removed)
    }

    /// What puts devices into the group.
    fn mark(&self, doomed: &[&Ask]) -> Vec<Request> {
        doomed
            .iter()
            .map(|ask| requests::set_group(&ask.name, ask.index, self.number))
            .collect()
    }
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
