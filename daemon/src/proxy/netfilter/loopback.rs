//! Node ports on loopback, without `route_localnet` on any device that packets of others come by.
//!
//! A connection to 127.0.0.1 cannot be translated to a pod's address in one step: its replies would come in by a device on
//! which the kernel takes no packet for loopback. So it is led round a pair of devices of the table's own, with two link-local
//! addresses that nobody else uses: on its way out of the first it is `CLIENT` asking `SERVICE`; coming in by the second it
//! is a connection like those of pods, and `SERVICE` a frontend like others. Replies take the same way back, and only the
//! first of the pair lets packets for loopback in. IPv6 goes the same way, for the same rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::{fs, io};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use sluice_cni::mac::Mac;
use sluice_cni::netlink::Netlink;
use sluice_cni::requests::{self, End};

use crate::network::sysctl;
use crate::state::service_port::Family;

/// The device that connections to loopback leave by.
pub const NEAR: &str = "sluice-np0";
/// The one they come in by.
pub const FAR: &str = "sluice-np1";

/// As loopback's own.
const MTU: u32 = 65_535;

/// Who asks.
pub fn client(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(169, 254, 1, 2).into(),
        Family::V6 => Ipv6Addr::new(0xfd53, 0x6c75, 0x6963, 0x65, 0, 0, 0, 2).into(),
    }
}

/// What is asked.
pub fn service(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(169, 254, 1, 3).into(),
        Family::V6 => Ipv6Addr::new(0xfd53, 0x6c75, 0x6963, 0x65, 0, 0, 0, 3).into(),
    }
}

/// The address under which connections to `frontend` are balanced.
pub fn asked(frontend: SocketAddr) -> SocketAddr {
    if frontend.ip().is_loopback() {
        SocketAddr::new(service(Family::of(frontend.ip())), frontend.port())
    } else {
        frontend
    }
}

/// Makes the pair if it is not there; true if it was made.
///
/// # Errors
/// The kernel's.
pub fn ensure() -> Result<bool> {
    if if_nametoindex(NEAR).is_ok() && if_nametoindex(FAR).is_ok() {
        return Ok(false);
    }
    let mut netlink = Netlink::open()?;
    let here = fs::File::open("/proc/thread-self/ns/net").context("opening this network namespace")?;
    // Locally administered; nobody else is on that wire.
    let (near, far) = (
        Mac::from_bytes([2, 0x53, 0x4c, 0, 0, 1]),
        Mac::from_bytes([2, 0x53, 0x4c, 0, 0, 2]),
    );
    let ends = [(NEAR, near), (FAR, far)].map(|(name, mac)| End { name, mac });
    netlink.batch(&[requests::make_pair(&ends[0], &ends[1], here.as_fd(), MTU)])?;
    // What comes back to loopback comes in here, and its source is loopback's too.
    set(&format!("net/ipv4/conf/{NEAR}/route_localnet"), "1")?;
    set(&format!("net/ipv4/conf/{NEAR}/accept_local"), "1")?;
    for device in [NEAR, FAR] {
        set(&format!("net/ipv4/conf/{device}/rp_filter"), "0")?;
    }
    netlink.batch(&[requests::set_up(NEAR), requests::set_up(FAR)])?;
    let index = |name| if_nametoindex(name).with_context(|| format!("looking for {name}"));
    let (near_index, far_index) = (index(NEAR)?, index(FAR)?);
    for family in [Family::V4, Family::V6] {
        let made = netlink.batch(&[
            requests::add_neighbour(NEAR, near_index, service(family), far),
            requests::add_neighbour(FAR, far_index, client(family), near),
            requests::add_host_route(NEAR, near_index, service(family)),
            requests::add_host_route(FAR, far_index, client(family)),
        ]);
        match made {
            // A host without IPv6 has no node ports there.
            Err(error) if family == Family::V6 => tracing::debug!(%error, "no node ports on ::1"),
            result => _ = result?,
        }
    }
    // The kernel takes packets to ::1 by the device alone that has it in a route; this one comes behind loopback's own.
    if let Err(error) = netlink.batch(&[requests::add_local_route(
        NEAR,
        near_index,
        Ipv6Addr::LOCALHOST.into(),
    )]) {
        tracing::debug!(%error, "no node ports on ::1");
    }
    Ok(true)
}

/// Removes the pair; says whether it was there.
///
/// # Errors
/// The kernel's.
pub fn remove() -> Result<bool> {
    if if_nametoindex(NEAR).is_err() {
        return Ok(false);
    }
    Netlink::open()?.batch(&[requests::remove_link(NEAR, None)])?;
    Ok(true)
}

fn set(key: &str, value: &str) -> Result<()> {
    let path = sysctl::path(key);
    let written: io::Result<()> = fs::write(&path, value);
    written.with_context(|| format!("writing {value} to {}", path.display()))
}
