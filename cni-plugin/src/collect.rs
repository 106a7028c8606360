//! Collecting what dead containers left: allocations and devices of attachments that live no more.
//!
//! GC says who lives by the runtime's list; the daemon, since containerd never calls GC, by the network namespaces
//! that still exist. What is not Sluice's by name and alias is never touched.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use sluice_ipam::{Allocation, Attachment, Store};

use crate::error::{Code, Failure};
use crate::mac::{self, is_host_device};
use crate::netlink::Netlink;
use crate::netns;
use crate::requests;
use crate::wiring::{Link, look_up, remove_with};

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

/// Removes the device and frees the addresses of every allocation of which `live` says no; then does the same for
/// devices without an allocation of which `device_live` says no. Goes on after an error.
///
/// # Errors
/// The store cannot be listed or the kernel asked at all.
pub fn collect(
    store: Option<&Store>,
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
                known.insert(device);
                continue;
            }
            let removed = remove_with(&mut host, &device, &attachment.to_string());
            let freed = removed.and_then(|removed| Ok((removed, store.free(attachment)?)));
            match freed {
                Ok((removed, _)) => {
                    let with = if removed { " and its device" } else { "" };
                    collected
                        .done
                        .push(format!("{attachment}: freed {:?}{with}", allocation.addresses));
                }
                Err(failure) => {
                    known.insert(device);
                    collected.errors.push(format!("{attachment}: {failure}"));
                }
            }
        }
    }
    for answer in host.batch(&[requests::list_veths()])? {
        let RouteNetlinkMessage::NewLink(message) = answer else {
            continue;
        };
        let link = Link::read(&message);
        if !is_host_device(&link.name) || known.contains(&link.name) {
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
    let collected = collect(Some(&store), &live, &|_| true)?;
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
