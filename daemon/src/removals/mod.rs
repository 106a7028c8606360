//! Removals of pods' devices, gathered: many asked for at about the same time cost the kernel's wait once.
//!
//! Owns the socket `removals.sock`, a thread and those that wait for the kernel, and a device group; what is said over the socket is
//! in [`sluice_cni::removals`]. [`callers`] gathers requests, [`group`] removes their devices. Never touches a device
//! that is not a pod's by name and alias, an address, or the daemon's state; never makes the owner task or the runtime
//! wait. Nothing is kept: a daemon killed at any moment leaves devices that whoever asked removes itself.

mod callers;
mod departures;
mod group;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::Context;
use nix::sys::socket::{Backlog, listen};

use crate::private_socket;
use callers::Callers;
use group::Group;

/// What has been removed since the daemon started.
#[derive(Debug, Default)]
pub struct Counts {
    devices: AtomicU64,
    groups: AtomicU64,
}

impl Counts {
    /// Devices removed.
    pub fn devices(&self) -> u64 {
        self.devices.load(Ordering::Relaxed)
    }

    /// Groups they were removed in; one removed alone counts as a group.
    pub fn groups(&self) -> u64 {
        self.groups.load(Ordering::Relaxed)
    }
}

/// Takes requests at `path`, on a thread of its own, until the process ends.
///
/// # Errors
/// The socket cannot be made, or another daemon listens on it.
pub fn serve(path: &Path) -> anyhow::Result<Arc<Counts>> {
    let listening = || format!("listening on {}", path.display());
    let listener = private_socket::bind(path).with_context(listening)?;
    // As many as the machine allows: a node's pods may all go at once.
    listen(&listener, Backlog::MAXCONN).with_context(listening)?;
    listener.set_nonblocking(true).with_context(listening)?;
    let group = Group::choose().context("choosing a group for devices that are removed together")?;
    let counts = Arc::new(Counts::default());
    let counted = Arc::clone(&counts);
    let removing = move || {
        let mut callers = Callers::new(listener);
        loop {
            remove(callers.gather(), &group, &counted);
        }
    };
    thread::Builder::new()
        .name("removals".to_owned())
        .spawn(removing)
        .context("starting the thread for removals")?;
    Ok(counts)
}

/// Removes what was asked for and tells who asked.
fn remove(asked: Vec<callers::Asked>, group: &Group, counts: &Counts) {
    let asks: Vec<_> = asked.iter().map(|asked| asked.ask.clone()).collect();
    match group.remove(&asks) {
        Ok(removed) => {
            counts.devices.fetch_add(removed.devices, Ordering::Relaxed);
            counts.groups.fetch_add(removed.groups, Ordering::Relaxed);
            for (asked, outcome) in asked.into_iter().zip(removed.outcomes) {
                asked.answer(outcome.as_ref().copied().map_err(String::as_str));
            }
        }
        Err(error) => {
            tracing::warn!(
                %error,
                devices = asks.len(),
                "removing pods' devices together; the plugin removes them one by one"
            );
            for asked in asked {
                asked.answer(Err(&error.to_string()));
            }
        }
    }
}
