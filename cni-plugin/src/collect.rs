//! Collecting what dead containers left: allocations and devices of attachments that live no more.
//!
//! GC says who lives by the runtime's list; the daemon, since containerd never calls GC, by the network namespaces
//! that still exist. What is not Sluice's by name and alias is never touched.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::InfoKind;
use sluice_ipam::{Allocation, Attachment, Store};

use crate::error::{Code, Failure};
use crate::host_ports::HostPorts;
use crate::mac;
use crate::netlink::Netlink;
use crate::netns;
use crate::removals::Ask;
use crate::wiring::{self, Link, look_up, remove_with};
use crate::{requests, shaping};

/// An ADD may be at work on an allocation this young.
const YOUNG: Duration = Duration::from_secs(60);

/// What a collection did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// What was collected, a line each.
    pub done: Vec<String>,
    /// What could not be, a line each.
    pub errors: Vec<String>,
}

/// Removes the host ports and devices and frees the addresses of every allocation of which `live` says no; then does the same for
/// devices without an allocation of which `device_live` says no. Goes on after an error.
///
/// # Errors
/// The store cannot be listed or the kernel asked at all.
pub fn collect(
    store: Option<&Store>,
    host_ports: &HostPorts,
    live: &dyn Fn(&Allocation) -> bool,
    device_live: &dyn Fn(&Attachment) -> bool,
) -> Result<Collected, Failure> {
    let mut collected = Collected::default();
    let mut host = Netlink::open()?;
    let mut known = BTreeSet::new();
    if let Some(store) = store {
        for mended in store.repair()? {
            collected.done.push(mended.to_string());
        }
        for allocation in store.list()? {
            let attachment = &allocation.attachment;
            let device = mac::host_device(attachment);
            if live(&allocation) {
                known.extend([device, mac::rate_device(attachment)]);
                continue;
            }
            // In the order of DEL, and for its reasons.
            let removed = host_ports
                .remove(attachment)
                .and_then(|_| remove_with(&mut host, &device, &attachment.to_string()))
                .and_then(|removed| shaping::remove(&mut host, attachment).map(|_| removed));
            let freed = removed.and_then(|removed| Ok((removed, store.free(attachment)?)));
            match freed {
                Ok((removed, _)) => {
                    let with = if removed { " and its device" } else { "" };
                    collected
                        .done
                        .push(format!("{attachment}: freed {:?}{with}", allocation.addresses));
                }
                Err(failure) => {
                    known.extend([device, mac::rate_device(attachment)]);
                    collected.errors.push(format!("{attachment}: {failure}"));
                }
            }
        }
        match host_ports.remove_orphans(store) {
            Ok(orphans) => collected.done.extend(
                orphans
                    .iter()
                    .map(|attachment| format!("{attachment}: removed its host ports")),
            ),
            Err(failure) => collected.errors.push(failure.to_string()),
        }
    }
    let mut links = host.batch(&[requests::list_links(InfoKind::Veth)])?;
    links.extend(host.batch(&[requests::list_links(InfoKind::Ifb)])?);
    for answer in links {
        let RouteNetlinkMessage::NewLink(message) = answer else {
            continue;
        };
        let link = Link::read(&message);
        if known.contains(&link.name) {
            continue;
        }
        let Some(attachment) = link.serves() else {
            continue;
        };
        if !device_live(&attachment) {
            match remove_with(&mut host, &link.name, &link.alias) {
                Ok(_) => collected
                    .done
                    .push(format!("{attachment}: removed its device {}", link.name)),
                Err(failure) => collected.errors.push(format!("{attachment}: {failure}")),
            }
        }
    }
    Ok(collected)
}

/// Leads nobody to the dead any more and cuts them off. What is left of them to remove are these; what could not be done, a collection
/// meets again and says.
///
/// # Errors
/// The store cannot be listed or the kernel asked at all.
pub fn cut_off(
    store: &Store,
    host_ports: &HostPorts,
    live: &dyn Fn(&Allocation) -> bool,
) -> Result<Vec<Ask>, Failure> {
    let mut host = Netlink::open()?;
    let dead = store.list()?.into_iter().filter(|allocation| !live(allocation));
    let left = dead.filter_map(|Allocation { attachment, .. }| {
        // In the order of DEL, and for its reasons.
        host_ports.remove(&attachment).ok()?;
        wiring::cut_off(&mut host, &attachment).ok()
    });
    Ok(left.flatten().collect())
}

/// Collects the attachments whose network namespace is gone and whose device went with it, sparing the young. Says
/// what it collected, a line each. The daemon calls it every minute.
///
/// Both must be gone: a namespace whose path was removed but in which a process lives on keeps its device, and a
/// device removed by hand leaves a container whose DEL is still to come.
///
/// # Errors
/// Everything that failed, after all else was done.
pub fn collect_dead(ipam_directory: &Path, rest: Duration) -> Result<Vec<String>, Failure> {
    let Some(store) = Store::open_existing(ipam_directory, rest) else {
        return Ok(Vec::new());
    };
    let live = |allocation: &Allocation| {
        if allocation.age() < YOUNG || !netns::is_gone(&allocation.netns, allocation.netns_inode) {
            return true;
        }
        // When the kernel cannot be asked, nobody is dead.
        let device = mac::host_device(&allocation.attachment);
        let found = Netlink::open().and_then(|mut host| look_up(&mut host, &device));
        !matches!(found, Ok(None))
    };
    let host_ports = HostPorts::beside(ipam_directory);
    let collected = collect(Some(&store), &host_ports, &live, &|_| true)?;
    collected.into_result()
}

impl Collected {
    /// What was collected, or all that failed in one failure.
    ///
    /// # Errors
    /// Code 104 when anything failed.
    pub fn into_result(self) -> Result<Vec<String>, Failure> {
        if self.errors.is_empty() {
            return Ok(self.done);
        }
        let message = format!("{} of the dead could not be collected", self.errors.len());
        Err(Failure::new(Code::Incomplete, message).with_details(self.errors.join("; ")))
    }
}
