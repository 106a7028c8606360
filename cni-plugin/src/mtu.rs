//! The MTU of pods that run already, when that of the node's network changes. Used by the daemon.
//!
//! The end on the host is set last: while it differs from what is wanted, the pod is not done, whoever was killed.

use std::path::Path;
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::InfoKind;
use sluice_ipam::{Attachment, Store};

use crate::error::{Code, Failure};
use crate::netlink::Netlink;
use crate::netns::Netns;
use crate::requests;
use crate::wiring::Link;

/// Gives both ends of every pod's pair whose end on the host has another the MTU `mtu`, in bytes. Moves the calling
/// thread into the pods' namespaces and back. Says how many pods were changed.
///
/// # Errors
/// Everything that failed, after all else was done.
pub fn follow(ipam_directory: &Path, rest: Duration, mtu: u32) -> Result<usize, Failure> {
    let Some(store) = Store::open_existing(ipam_directory, rest) else {
        return Ok(0);
    };
    let mut host = Netlink::open()?;
    let (mut changed, mut errors) = (0, Vec::new());
    for answer in host.batch(&[requests::list_links(InfoKind::Veth)])? {
        let RouteNetlinkMessage::NewLink(message) = answer else {
            continue;
        };
        let link = Link::read(&message);
        let Some(attachment) = link.serves().filter(|_| link.mtu != mtu) else {
            continue;
        };
        let done = set_in_pod(&store, &attachment, mtu)
            .and_then(|()| Ok(host.batch(&[requests::set_mtu(&link.name, mtu)])?));
        match done {
            Ok(_) => changed += 1,
            Err(failure) => errors.push(format!("{attachment}: {failure}")),
        }
    }
    if errors.is_empty() {
        return Ok(changed);
    }
    let message = format!("the MTU of {} pods could not be set to {mtu}", errors.len());
    Err(Failure::new(Code::Incomplete, message).with_details(errors.join("; ")))
}

fn set_in_pod(store: &Store, attachment: &Attachment, mtu: u32) -> Result<(), Failure> {
    // Without an allocation the device is a leftover that collection takes, or an ADD is at work on it.
    let Some(allocation) = store.get(attachment)? else {
        return Ok(());
    };
    let netns = Netns::open(Path::new(&allocation.netns))?;
    let _inside = netns.enter()?;
    Netlink::open()?.batch(&[requests::set_mtu(attachment.ifname(), mtu)])?;
    Ok(())
}
