//! Mending what killed calls, full disks and stray hands left in the store.
//!
//! Never frees what an intact owner's file holds: whether its container still lives is the collector's question.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::net::IpAddr;
use std::time::Duration;

use crate::directory::{Guard, inode_of, remove_if_there};
use crate::error::io_error;
use crate::record::{self, boot_time};
use crate::store::Store;
use crate::{Attachment, Error};

/// How long after its rest an address's last use is still remembered, for the order of reuse alone. Forgetting bounds
/// the directory in pools too large to ever go round.
const MEMORY: Duration = Duration::from_secs(600);

/// One thing mended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mended {
    /// An address was held by no owner: it rests now.
    Orphan {
        /// The address.
        address: IpAddr,
    },
    /// An owner's file was cut short or garbage: written anew from its links.
    Damaged {
        /// Whose file.
        attachment: Attachment,
        /// What its links say it holds.
        addresses: Vec<IpAddr>,
    },
    /// A damaged owner's file that held nothing: removed.
    Empty {
        /// Whose file.
        attachment: Attachment,
    },
    /// A DEL was cut short: its freeing is finished.
    Freed {
        /// Who was being deleted.
        attachment: Attachment,
    },
    /// An address lacked its owner's guard (an ADD was cut short, the store was copied): it has it now, until DEL or
    /// GC frees it.
    Guarded {
        /// The address.
        address: IpAddr,
        /// Who holds it.
        attachment: Attachment,
    },
}

impl fmt::Display for Mended {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Orphan { address } => write!(formatter, "{address} was held by nobody: it rests now"),
            Self::Damaged {
                attachment,
                addresses,
            } => {
                write!(
                    formatter,
                    "the file of {attachment} was damaged: written anew with {addresses:?}"
                )
            }
            Self::Empty { attachment } => {
                write!(
                    formatter,
                    "the file of {attachment} was damaged and held nothing: removed"
                )
            }
            Self::Freed { attachment } => write!(formatter, "a DEL of {attachment} was cut short: finished"),
            Self::Guarded { address, attachment } => {
                write!(
                    formatter,
                    "{address} of {attachment} lacked its guard: it has it now"
                )
            }
        }
    }
}

impl Store {
    /// Mends the store and says what it mended; a sound store is left as it is.
    ///
    /// # Errors
    /// [`Error::Busy`] or [`Error::Io`]; what was mended until then stays mended.
    pub fn repair(&self) -> Result<Vec<Mended>, Error> {
        let _lock = self.lock()?;
        self.repair_locked()
    }

    pub(crate) fn repair_locked(&self) -> Result<Vec<Mended>, Error> {
        let mut mended = Vec::new();
        let names = self.names("owners")?;
        let attachments: Vec<Attachment> = names
            .iter()
            .filter_map(|name| Attachment::from_file_name(name))
            .collect();
        let mut owners = BTreeSet::new();
        for attachment in &attachments {
            owners.extend(inode_of(&self.owner(attachment))?);
            self.repair_owner(attachment, &mut mended)?;
        }
        let mut orphans = false;
        for (inode, addresses) in self.held_by()? {
            if owners.contains(&inode) {
                continue;
            }
            for address in addresses {
                self.rest_from_now(&self.held(address))?;
                self.put_to_rest(address)?;
                mended.push(Mended::Orphan { address });
                orphans = true;
            }
        }
        if orphans {
            // One may have stood where the guard of somebody's address should.
            for attachment in &attachments {
                self.repair_owner(attachment, &mut mended)?;
            }
        }
        self.forget_old_rests()?;
        Ok(mended)
    }

    fn repair_owner(&self, attachment: &Attachment, mended: &mut Vec<Mended>) -> Result<(), Error> {
        let path = self.owner(attachment);
        let Some((inode, allocation)) = self.read(attachment)? else {
            return Ok(());
        };
        let damaged = matches!(record::read(&path, attachment), Ok((_, None)));
        if damaged && allocation.addresses.is_empty() {
            remove_if_there(&path)?;
            mended.push(Mended::Empty {
                attachment: attachment.clone(),
            });
            return Ok(());
        }
        if damaged {
            // In place: its links are what guards its addresses, and they name this very file.
            let file = OpenOptions::new().write(true).truncate(true).open(&path);
            file.and_then(|mut file| record::write(&mut file, &allocation))
                .map_err(io_error("writing", &path))?;
            mended.push(Mended::Damaged {
                attachment: attachment.clone(),
                addresses: allocation.addresses,
            });
            return Ok(());
        }
        for address in allocation.addresses {
            match self.guard(address)? {
                Some(Guard { inode: found, .. }) if found == inode => continue,
                Some(Guard { others: true, .. }) => continue,
                // The store was copied, or a file replaced: the guard is nobody's link, its owner is this one.
                Some(_) => {
                    self.guard_anew(attachment, address)?;
                    let attachment = attachment.clone();
                    mended.push(Mended::Guarded { address, attachment });
                    continue;
                }
                None => {}
            }
            if inode_of(&self.resting(address))? == Some(inode) {
                self.free_locked(attachment)?;
                mended.push(Mended::Freed {
                    attachment: attachment.clone(),
                });
                return Ok(());
            }
            let held = self.held(address);
            fs::hard_link(&path, &held).map_err(io_error("making", held))?;
            let attachment = attachment.clone();
            mended.push(Mended::Guarded { address, attachment });
        }
        Ok(())
    }

    /// Replaces the guard of `address` in one step: it is never without.
    fn guard_anew(&self, attachment: &Attachment, address: IpAddr) -> Result<(), Error> {
        let (new, held) = (self.root.join("new"), self.held(address));
        remove_if_there(&new)?;
        fs::hard_link(self.owner(attachment), &new).map_err(io_error("making", &new))?;
        fs::rename(&new, &held).map_err(io_error("making", held))
    }

    fn forget_old_rests(&self) -> Result<(), Error> {
        let now = boot_time();
        for address in self.addresses("resting")? {
            if self
                .resting_until(address)?
                .is_some_and(|until| until + MEMORY < now)
            {
                remove_if_there(&self.resting(address))?;
            }
        }
        Ok(())
    }
}
