//! DEL: unwires a pod. Needs neither its namespace nor the node file nor an intact store, and succeeds for what is
//! already gone.

use sluice_ipam::{Attachment, DEFAULT_REST, Store};

use crate::config::Config;
use crate::error::Failure;
use crate::mac::host_device;
use crate::netlink::Netlink;
use crate::{removals, shaping, wiring};

/// Unwires `attachment`.
///
/// # Errors
/// The kernel or the store refused: what is left, a repeated DEL or GC takes.
pub fn del(attachment: &Attachment, config: &Config) -> Result<(), Failure> {
    let host_ports = config.host_ports();
    // First what leads others here, so that nobody is sent to a pod that is half gone.
    host_ports.remove(attachment)?;
    // Then the devices: the addresses' rest begins when nothing can send from them any more.
    let left = wiring::cut_off(&mut Netlink::open()?, attachment)?;
    removals::ask(&config.removals_socket, &left);
    // Whatever the daemon answered: one in another network namespace would be wrong in good faith.
    remove_devices(attachment)?;
    if let Some(store) = Store::open_existing(&config.ipam_directory, DEFAULT_REST) {
        store.free(attachment)?;
        // An ADD of the same pod at this very moment either finds its claim gone and undoes itself, or was just past
        // looking: then what it made is here by now.
        host_ports.remove(attachment)?;
        remove_devices(attachment)?;
    }
    Ok(())
}

/// Removes the host's devices of `attachment`, as far as they are there.
///
/// # Errors
/// The kernel refused.
pub fn remove_devices(attachment: &Attachment) -> Result<(), Failure> {
    let mut host = Netlink::open()?;
    wiring::remove_with(&mut host, &host_device(attachment), &attachment.to_string())?;
    shaping::remove(&mut host, attachment)?;
    Ok(())
}
