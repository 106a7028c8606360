//! The owner's file: who holds what, since when, for which network namespace.
//!
//! Reads and writes its text; where it lies and which links it has is the store's matter.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::Attachment;

/// What one attachment holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// Who holds it.
    pub attachment: Attachment,
    /// The addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
    /// The CNI network's name; empty when the file was damaged.
    pub network: String,
    /// Path of the network namespace it was made for; empty when the file was damaged.
    pub netns: String,
    /// Inode of that namespace, by which a path reused for another one is told; 0 when not known.
    pub netns_inode: u64,
    /// Since when, by the wall clock.
    pub since: SystemTime,
    /// Since when, by the boot-time clock, which nobody sets.
    pub since_boot: Duration,
}

impl Allocation {
    /// How long it has been held, whatever was done to the wall clock.
    pub fn age(&self) -> Duration {
        // Held since later than now: since before the last boot, on a store that outlived it.
        boot_time().checked_sub(self.since_boot).unwrap_or(Duration::MAX)
    }
}

/// What an allocation is made for: recorded for collectors, of no weight in choosing addresses.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// The CNI network's name: GC of one network leaves those of others alone.
    pub network: &'a str,
    /// The pod's network namespace.
    pub netns: &'a Path,
}

/// The file's text.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Text {
    container_id: String,
    ifname: String,
    addresses: Vec<IpAddr>,
    network: String,
    netns: String,
    netns_inode: u64,
    since: u64,
    since_boot: u64,
}

/// Time since boot, suspended time included: the clock by which addresses rest.
pub(crate) fn boot_time() -> Duration {
    // A kernel without this clock (before 2.6.39) runs no CNI runtime; time standing still only prolongs rests.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// A new allocation, held from now on.
pub(crate) fn starting_now(
    attachment: &Attachment,
    addresses: Vec<IpAddr>,
    origin: Origin<'_>,
) -> Allocation {
    let netns_inode = fs::metadata(origin.netns).map_or(0, |metadata| metadata.ino());
    Allocation {
        attachment: attachment.clone(),
        addresses,
        network: origin.network.to_owned(),
        netns: origin.netns.to_string_lossy().into_owned(),
        netns_inode,
        since: SystemTime::now(),
        since_boot: boot_time(),
    }
}

/// Writes the text of `allocation` into `file`, which must be empty.
pub(crate) fn write(file: &mut File, allocation: &Allocation) -> io::Result<()> {
    let text = Text {
        container_id: allocation.attachment.container_id().to_owned(),
        ifname: allocation.attachment.ifname().to_owned(),
        addresses: allocation.addresses.clone(),
        network: allocation.network.clone(),
        netns: allocation.netns.clone(),
        netns_inode: allocation.netns_inode,
        since: allocation
            .since
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        since_boot: allocation.since_boot.as_secs(),
    };
    let mut bytes = serde_json::to_vec(&text)?;
    bytes.push(b'\n');
    file.write_all(&bytes)
}

/// Reads an owner's file: its inode and what it says. A text that is cut short, garbage, or about another attachment
/// is no text; the file name alone says who it belonged to.
pub(crate) fn read(path: &Path, attachment: &Attachment) -> io::Result<(u64, Option<Allocation>)> {
    let inode = fs::symlink_metadata(path)?.ino();
    let bytes = fs::read(path)?;
    let Ok(text) = serde_json::from_slice::<Text>(&bytes) else {
        return Ok((inode, None));
    };
    if text.container_id != attachment.container_id() || text.ifname != attachment.ifname() {
        return Ok((inode, None));
    }
    let allocation = Allocation {
        attachment: attachment.clone(),
        addresses: text.addresses,
        network: text.network,
        netns: text.netns,
        netns_inode: text.netns_inode,
        since: UNIX_EPOCH
            .checked_add(Duration::from_secs(text.since))
            .unwrap_or(UNIX_EPOCH),
        since_boot: Duration::from_secs(text.since_boot),
    };
    Ok((inode, Some(allocation)))
}
