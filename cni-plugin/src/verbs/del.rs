//! DEL: unwires a pod. Needs neither its namespace nor the node file nor an intact store, and succeeds for what is
//! already gone.

use sluice_ipam::{Attachment, DEFAULT_REST, Store};

use crate::config::Config;
use crate::error::Failure;
use crate::wiring;

/// Unwires `attachment`.
///
/// # Errors
/// The kernel or the store refused: what is left, a repeated DEL or GC takes.
pub fn del(attachment: &Attachment, config: &Config) -> Result<(), Failure> {
    // First the device: the addresses' rest begins when nothing can send from them any more.
    wiring::retire(attachment, &config.removals_socket)?;
    if let Some(store) = Store::open_existing(&config.ipam_directory, DEFAULT_REST) {
        store.free(attachment)?;
        // An ADD of the same pod at this very moment either finds its claim gone and undoes itself, or was just past
        // looking: then its device is here by now.
        remove_device(attachment)?;
    }
    Ok(())
}

/// Removes the host's device of `attachment`, if it is there.
///
/// # Errors
/// The kernel refused.
pub fn remove_device(attachment: &Attachment) -> Result<(), Failure> {
    wiring::remove(attachment).map(|_| ())
}
