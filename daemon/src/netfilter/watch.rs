//! Sees when somebody else takes a table of ours, or a part of it, away, so that it is back within a moment.
//!
//! By asking, and not by the kernel's notifications: as long as anybody on the machine listens to those, in whatever network
//! namespace (net/netlink/af_netlink.c, `netlink_has_listeners`), the kernel writes one for every element that anybody changes, a page each:
//! for 50,000 Services it took 12 s instead of 1.5, and 3.8 GB for a moment. What is asked here is one number, which every change to
//! nf_tables counts on, and only if it has moved the few rules of these tables.

use std::io;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::mpsc;

use super::wire::{Netfilter, Rules};

/// How often it is asked.
const PERIOD: Duration = Duration::from_millis(200);

/// Who is to be told of changes to the rules of which table, be they the owner's own; where there are none, of every change to any table.
#[derive(Debug)]
pub struct Watched {
    /// The table's name, of the family `inet`.
    pub table: &'static str,
    /// Where it is told.
    pub changed: mpsc::Sender<()>,
}

/// Starts a thread that watches all of `tables`, until nobody listens any more.
///
/// # Errors
/// The kernel has no nf_tables, or there is no thread to be had.
pub fn start(tables: Vec<Watched>) -> Result<()> {
    let netfilter = Netfilter::open()?;
    let mut generation = netfilter
        .generation()
        .context("asking how often nf_tables were changed")?;
    let mut seen = tables
        .into_iter()
        .map(|watched| Ok((netfilter.rules(watched.table)?, watched)))
        .collect::<io::Result<Vec<(Rules, Watched)>>>()
        .context("listing rules of nf_tables")?;
    thread::Builder::new()
        .name("netfilter-watch".to_owned())
        .spawn(move || {
            while !seen.iter().all(|(_, watched)| watched.changed.is_closed()) {
                thread::sleep(PERIOD);
                // What cannot be read now can be the next time.
                _ = look(&netfilter, &mut generation, &mut seen);
            }
        })
        .context("starting the thread that watches tables of nf_tables")?;
    Ok(())
}

fn look(netfilter: &Netfilter, generation: &mut u32, seen: &mut [(Rules, Watched)]) -> io::Result<()> {
    let now = netfilter.generation()?;
    if now == *generation {
        return Ok(());
    }
    for (rules, watched) in seen {
        let found = netfilter.rules(watched.table)?;
        // None looks like none did the last time, though there were some in between.
        if *rules != found || found.is_empty() {
            *rules = found;
            // One that waits is as good as two.
            let _ = watched.changed.try_send(());
        }
    }
    // Last, so that what failed half-way is looked at again; what changed meanwhile has moved it on.
    *generation = now;
    Ok(())
}
