//! Which free address is given next.
//!
//! Allocation goes round each CIDR from a cursor, so a freed address is met again last. Within a window after the
//! cursor one that was never used (or whose last use is long forgotten) goes before one whose rest is over, and of
//! those the one freed first goes first. The window bounds the work: a pool of 65,536 costs what one of 254 does.

use std::collections::HashSet;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::Attachment;
use crate::directory::inode_of;
use crate::error::{Error, PoolUse};
use crate::record::boot_time;
use crate::store::Store;

/// How many addresses are looked at before the best of them is taken.
const WINDOW: u128 = 64;

/// After so many in vain the pool is nearly full: from there on, reading the directory once beats asking for each.
const ONE_BY_ONE: u128 = 4 * WINDOW;

/// An address to give, and whose cursor it moves.
pub(crate) struct Choice {
    pub(crate) address: IpAddr,
    /// The CIDR it was found in by going round; nothing for one asked for by name.
    cidr: Option<IpNetwork>,
}

impl Store {
    /// One address per family of `cidrs`. Call it under the lock.
    pub(crate) fn choose(
        &self,
        attachment: &Attachment,
        cidrs: &[IpNetwork],
        requested: &[IpAddr],
    ) -> Result<Vec<Choice>, Error> {
        if cidrs.is_empty() {
            return Err(Error::NoPools);
        }
        for (position, address) in requested.iter().enumerate() {
            self.check_requested(attachment, cidrs, *address)?;
            let earlier = requested.iter().take(position);
            if let Some(first) = earlier
                .into_iter()
                .find(|first| first.is_ipv4() == address.is_ipv4())
            {
                return Err(Error::RequestedTwice {
                    first: *first,
                    second: *address,
                });
            }
        }
        let mut choices = Vec::new();
        for v4 in [true, false] {
            let family: Vec<IpNetwork> = cidrs
                .iter()
                .copied()
                .filter(|cidr| cidr.is_ipv4() == v4)
                .collect();
            if family.is_empty() {
                continue;
            }
            if let Some(address) = requested.iter().find(|address| address.is_ipv4() == v4) {
                choices.push(Choice {
                    address: *address,
                    cidr: None,
                });
                continue;
            }
            // A pool that looks full may hold what killed calls left: mend it and look once more.
            let found = match self.next_of(&family)? {
                None if !self.repair_locked()?.is_empty() => self.next_of(&family)?,
                found => found,
            };
            choices.push(match found {
                Some(choice) => choice,
                None => return Err(self.full(&family)?),
            });
        }
        Ok(choices)
    }

    /// Moves the cursor to where `choice` was found. Failing costs only the order of reuse.
    pub(crate) fn remember(&self, choice: &Choice) {
        if let Some(cidr) = choice.cidr {
            let new = self.root.join("new");
            let _ = fs::remove_file(&new);
            let _ =
                symlink(choice.address.to_string(), &new).and_then(|()| fs::rename(&new, self.cursor(cidr)));
        }
    }

    fn check_requested(
        &self,
        attachment: &Attachment,
        cidrs: &[IpNetwork],
        address: IpAddr,
    ) -> Result<(), Error> {
        if !cidrs.iter().any(|cidr| self.pool(*cidr).contains(address)) {
            if let Some(network) = self.reserved.iter().find(|network| network.contains(address)) {
                return Err(Error::Reserved {
                    address,
                    attachment: attachment.clone(),
                    network: *network,
                });
            }
            return Err(Error::OutsidePools {
                address,
                pools: cidrs.to_vec(),
            });
        }
        let Some(inode) = inode_of(&self.held(address))? else {
            return Ok(());
        };
        let holder = self
            .list()?
            .into_iter()
            .find(|other| other.addresses.contains(&address));
        if holder.is_none()
            && !self.repair_locked()?.is_empty()
            && inode_of(&self.held(address))? != Some(inode)
        {
            return Ok(());
        }
        Err(Error::Conflict {
            address,
            attachment: attachment.clone(),
            holder: holder.map_or_else(
                || "another pod".to_owned(),
                |holder| holder.attachment.to_string(),
            ),
        })
    }

    fn next_of(&self, family: &[IpNetwork]) -> Result<Option<Choice>, Error> {
        for cidr in family {
            if let Some(address) = self.next_in(*cidr)? {
                let cidr = Some(*cidr);
                return Ok(Some(Choice { address, cidr }));
            }
        }
        Ok(None)
    }

    fn next_in(&self, cidr: IpNetwork) -> Result<Option<IpAddr>, Error> {
        let pool = self.pool(cidr);
        let size = pool.size();
        let now = boot_time();
        let last = fs::read_link(self.cursor(cidr)).ok();
        let last: Option<IpAddr> = last.and_then(|target| target.to_str()?.parse().ok());
        let start = last
            .and_then(|address| pool.index_of(address))
            .map_or(0, |index| index + 1);
        let mut rested: Option<(Duration, IpAddr)> = None;
        let mut all_held: Option<HashSet<IpAddr>> = None;
        let mut step = 0;
        while step < size {
            if step % WINDOW == 0 && rested.is_some() {
                break;
            }
            if step == ONE_BY_ONE {
                all_held = Some(self.addresses("held")?.into_iter().collect());
            }
            // Neither sum can pass the end of the numbers: `start` is at most `size`, `step` below it.
            let address = pool.nth(match start.checked_sub(size - step) {
                Some(wrapped) => wrapped,
                None => start + step,
            });
            step += 1;
            let held = match &all_held {
                Some(all) => all.contains(&address),
                None => inode_of(&self.held(address))?.is_some(),
            };
            if held {
                continue;
            }
            match self.resting_until(address)? {
                None => return Ok(Some(address)),
                Some(until) if until > now => {}
                Some(until) => {
                    if rested.is_none_or(|(earliest, _)| until < earliest) {
                        rested = Some((until, address));
                    }
                }
            }
        }
        Ok(rested.map(|(_, address)| address))
    }

    fn full(&self, family: &[IpNetwork]) -> Result<Error, Error> {
        let mut pools = Vec::new();
        for cidr in family {
            let usage = self.usage(*cidr)?;
            pools.push(PoolUse {
                cidr: *cidr,
                size: self.pool(*cidr).size(),
                held: usage.held,
                resting: usage.resting,
            });
        }
        let now = boot_time();
        let mut free_in: Option<Duration> = None;
        for address in self.addresses("resting")? {
            let ours = family.iter().any(|cidr| self.pool(*cidr).contains(address));
            if ours && inode_of(&self.held(address))?.is_none() {
                let wait = self
                    .resting_until(address)?
                    .map(|until| until.saturating_sub(now));
                free_in = free_in.into_iter().chain(wait).min();
            }
        }
        Ok(Error::Full { pools, free_in })
    }

    fn cursor(&self, cidr: IpNetwork) -> PathBuf {
        let name = format!("{}_{}", cidr.network(), cidr.prefix());
        self.root.join("cursor").join(name)
    }
}
