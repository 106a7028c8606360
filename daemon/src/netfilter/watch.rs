//! Hears when somebody else takes a table of ours, or a part of it, away, so that it is back within a moment.

use std::io;
use std::thread;

use anyhow::{Context, Result};
use tokio::sync::mpsc;

use super::wire::{Netfilter, attribute, string};

/// `NFT_MSG_DELTABLE`, `NFT_MSG_DELCHAIN`, `NFT_MSG_DELRULE`, `NFT_MSG_DELSET`.
const REMOVALS: [u16; 4] = [2, 5, 8, 11];
/// The table's name in all of these messages.
const NAME: u16 = 1;

/// Who is to hear of which table; what its owner takes away itself is heard too.
#[derive(Debug)]
pub struct Watched {
    /// The table's name.
    pub table: &'static str,
    /// Where it is told.
    pub changed: mpsc::Sender<()>,
}

/// Starts a thread that tells of all of `tables`, until nobody listens any more.
///
/// # Errors
/// The kernel does not tell, or there is no thread to be had.
pub fn start(tables: Vec<Watched>) -> Result<()> {
    let mut netfilter = Netfilter::open()?;
    netfilter.subscribe()?;
    thread::Builder::new()
        .name("netfilter-watch".to_owned())
        .spawn(move || {
            while !tables.iter().all(|watched| watched.changed.is_closed()) {
                let mut names = Vec::new();
                let heard = netfilter.hear(|kind, body| {
                    if REMOVALS.contains(&kind) {
                        names.extend(attribute(body, NAME).map(string));
                    }
                });
                // Some of it was lost: anything may have happened.
                let lost = heard.is_err_and(|error: io::Error| error.raw_os_error() == Some(libc::ENOBUFS));
                for watched in &tables {
                    if lost || names.iter().any(|name| name == watched.table) {
                        // One that waits is as good as two.
                        let _ = watched.changed.try_send(());
                    }
                }
            }
        })
        .context("starting the thread that watches tables of nf_tables")?;
    Ok(())
}
