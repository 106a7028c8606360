//! GC: collects every attachment of this network that the runtime does not list.

use std::collections::BTreeSet;

use sluice_ipam::{Allocation, Attachment, DEFAULT_REST, Store};

use crate::collect::{collect, cut_off};
use crate::config::Config;
use crate::error::{Code, Failure};
use crate::removals;

/// Collects what is not listed.
///
/// # Errors
/// Code 7 without a list (an empty one is fine), 104 when something could not be collected.
pub fn gc(config: &Config) -> Result<(), Failure> {
    let Some(valid) = config.valid_attachments()? else {
        let message = "cni.dev/valid-attachments: is missing, so GC cannot tell the living from the dead";
        return Err(Failure::new(Code::Config, message));
    };
    let valid: BTreeSet<Attachment> = valid.into_iter().collect();
    let store = Store::open_existing(&config.ipam_directory, DEFAULT_REST);
    let host_ports = config.host_ports();
    let live = |allocation: &Allocation| {
        // The list speaks for one network. A damaged file no longer tells its own: the list then decides alone.
        let foreign = !allocation.network.is_empty() && allocation.network != config.name;
        foreign || valid.contains(&allocation.attachment)
    };
    if let Some(store) = &store {
        // Together, as far as the daemon helps: one by one each takes the kernel's wait.
        let left = cut_off(store, &host_ports, &live).unwrap_or_default();
        removals::ask(&config.removals_socket, &left);
    }
    let device_live = |attachment: &Attachment| valid.contains(attachment);
    let collected = collect(store.as_ref(), &host_ports, &live, &device_live)?;
    collected.into_result().map(|_| ())
}
