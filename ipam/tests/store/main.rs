//! The store as its users see it, on real directories: rules of giving, and what survives killing, damage and a full
//! disk.

#![allow(clippy::unwrap_used, reason = "a test that panics says what failed")]

mod crash;
mod giving;
mod model;

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ipnetwork::IpNetwork;
use sluice_ipam::{Attachment, Error, Origin, Store};

fn open(directory: &Path, rest: u64) -> Store {
    Store::open(directory.join("ipam"), Duration::from_secs(rest)).unwrap()
}

fn pod(id: impl ToString) -> Attachment {
    Attachment::new(&id.to_string(), "eth0").unwrap()
}

fn cidrs(texts: &[&str]) -> Vec<IpNetwork> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Allocates and keeps.
fn give(
    store: &Store,
    id: impl ToString,
    pools: &[IpNetwork],
    requested: &[IpAddr],
) -> Result<Vec<IpAddr>, Error> {
    let origin = Origin {
        network: "test",
        netns: Path::new("/proc/self/ns/net"),
    };
    let claim = store.allocate(&pod(id), pools, requested, origin)?;
    Ok(claim.keep()?.addresses)
}
