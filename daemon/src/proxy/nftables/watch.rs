//! Hears when somebody else takes the table, or a part of it, away, so that it is back within a moment.

use std::io;
use std::thread;

use anyhow::{Context, Result};
use tokio::sync::mpsc;

use super::skeleton::TABLE;
use crate::netfilter::wire::{Netfilter, attribute, string};

/// `NFT_MSG_DELTABLE`, `NFT_MSG_DELCHAIN`, `NFT_MSG_DELRULE`, `NFT_MSG_DELSET`.
const REMOVALS: [u16; 4] = [2, 5, 8, 11];
/// The table's name in all of these messages.
const NAME: u16 = 1;

/// Starts a thread that sends into `changed`, until its receiver is gone.
///
/// # Errors
/// The kernel does not tell, or there is no thread to be had.
pub fn start(changed: mpsc::Sender<()>) -> Result<()> {
    let mut netfilter = Netfilter::open()?;
    netfilter.subscribe()?;
    thread::Builder::new()
        .name("nftables-watch".to_owned())
        .spawn(move || {
            while !changed.is_closed() {
                let mut ours = false;
                let heard = netfilter.hear(|kind, body| {
                    ours |= REMOVALS.contains(&kind)
                        && attribute(body, NAME).map(string).as_deref() == Some(TABLE);
                });
                // Some of it was lost: anything may have happened.
                let lost = heard.is_err_and(|error: io::Error| error.raw_os_error() == Some(libc::ENOBUFS));
                if ours || lost {
                    // One that waits is as good as two.
                    let _ = changed.try_send(());
                }
            }
        })
        .context("starting the thread that watches the nftables table")?;
    Ok(())
}
