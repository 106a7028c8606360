//! Who holds which pod address, straight from the address store: it needs no daemon.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use sluice_ipam::{DEFAULT_REST, Store};

/// One pod interface's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Held {
    /// One per address family.
    pub addresses: Vec<IpAddr>,
    /// The container, as the runtime called it.
    pub container_id: String,
    /// The interface in its sandbox.
    pub ifname: String,
    /// Path of the sandbox's network namespace.
    pub netns: String,
    /// For how long, in seconds.
    pub held_for_seconds: u64,
}

/// Everything the store at `directory` holds, oldest first; nothing if there is no store yet.
pub fn read(directory: &Path) -> anyhow::Result<Vec<Held>> {
    let Some(store) = Store::open_existing(directory, DEFAULT_REST) else {
        return Ok(Vec::new());
    };
    let mut list = store
        .list()
        .with_context(|| format!("reading the address store {}", directory.display()))?;
    list.sort_by_key(|allocation| allocation.since_boot);
    Ok(list
        .into_iter()
        .map(|allocation| Held {
            container_id: allocation.attachment.container_id().to_owned(),
            ifname: allocation.attachment.ifname().to_owned(),
            netns: allocation.netns.clone(),
            held_for_seconds: allocation.age().as_secs(),
            addresses: allocation.addresses,
        })
        .collect())
}
