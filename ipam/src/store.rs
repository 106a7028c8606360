//! The store's directory: giving, freeing, listing, counting.
//!
//! Every change is made under the lock, in the order the crate's page gives, so that a call killed between any two
//! steps leaves what DEL, GC or [`Store::repair`] can finish. Which address to give is `pick`'s matter.

use std::fs::{self, DirBuilder, OpenOptions};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};

use crate::directory::{Guard, remove_if_there};
use crate::error::io_error;
use crate::record::{self, boot_time};
use crate::{Allocation, Attachment, Claim, Error, Origin, Pool};

/// How long a call waits for others to be done. Each holds the lock for well under a millisecond.
const PATIENCE: Duration = Duration::from_secs(10);

/// Directories below the root, beside the one for owners: that is made last, so its presence says all are there.
const DIRECTORIES: [&str; 3] = ["held", "resting", "cursor"];
const OWNERS: &str = "owners";

/// The addresses of one node's pods.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) root: PathBuf,
    pub(crate) rest: Duration,
    pub(crate) patience: Duration,
    /// Networks whose addresses are never given.
    pub(crate) reserved: Vec<IpNetwork>,
}

/// How full a CIDR is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Addresses held.
    pub held: u128,
    /// Addresses freed whose rest is not over.
    pub resting: u128,
}

impl Store {
    /// Opens the store at `root`, making what is missing of it, readable by root alone.
    ///
    /// # Errors
    /// The kernel's answer to making a directory.
    pub fn open(root: impl Into<PathBuf>, rest: Duration) -> Result<Self, Error> {
        let store = Self::at(root.into(), rest);
        if !store.root.join(OWNERS).is_dir() {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700);
            let make = |name: &str| {
                let path = store.root.join(name);
                builder.create(&path).map_err(io_error("making", path))
            };
            DIRECTORIES.into_iter().try_for_each(make)?;
            // A store that is there must be one that can free on a full disk.
            drop(store.lock()?);
            make(OWNERS)?;
        }
        Ok(store)
    }

    /// Whether something could be given as far as the filesystem goes, changing nothing.
    ///
    /// # Errors
    /// [`Error::Io`]: it is read-only, or full.
    pub fn check_room(&self) -> Result<(), Error> {
        let refused = |errno: Errno| io_error("giving an address in", &self.root)(errno.into());
        access(&self.root, AccessFlags::W_OK).map_err(refused)?;
        let room = statvfs(&self.root).map_err(refused)?;
        // Without a limit the total is 0.
        let full = |total, free| total > 0 && free == 0;
        if full(room.files(), room.files_available()) || full(room.blocks(), room.blocks_available()) {
            return Err(refused(Errno::ENOSPC));
        }
        Ok(())
    }

    /// Opens the store at `root` if there is one; makes nothing.
    pub fn open_existing(root: impl Into<PathBuf>, rest: Duration) -> Option<Self> {
        let store = Self::at(root.into(), rest);
        store.root.join(OWNERS).is_dir().then_some(store)
    }

    fn at(root: PathBuf, rest: Duration) -> Self {
        Self {
            root,
            rest,
            patience: PATIENCE,
            reserved: Vec::new(),
        }
    }

    /// Waits for other calls no longer than `patience` (10 s unless told).
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Never gives an address of these networks. One that is held already stays so until it is freed.
    #[must_use]
    pub fn with_reserved(mut self, reserved: &[IpNetwork]) -> Self {
        self.reserved = reserved.to_vec();
        self
    }

    /// The addresses of `cidr` that this store gives.
    pub fn pool(&self, cidr: IpNetwork) -> Pool {
        Pool::new(cidr, &self.reserved)
    }

    /// Gives `attachment` one address of each family among `cidrs`: the requested one where there is one, else the
    /// one that was free for longest as far as a bounded look can tell. All or nothing. `origin` is recorded
    /// for collectors.
    ///
    /// A requested address may still be resting: who asks for it by name means that very one.
    ///
    /// # Errors
    /// [`Error::AlreadyHeld`], [`Error::Full`], [`Error::Conflict`], [`Error::OutsidePools`],
    /// [`Error::Reserved`], [`Error::RequestedTwice`], [`Error::NoPools`], [`Error::Busy`], [`Error::Io`]; nothing is changed then.
    pub fn allocate(
        &self,
        attachment: &Attachment,
        cidrs: &[IpNetwork],
        requested: &[IpAddr],
        origin: Origin<'_>,
    ) -> Result<Claim<'_>, Error> {
        let _lock = self.lock()?;
        let owner = self.owner(attachment);
        if let Some(allocation) = self.get(attachment)? {
            return Err(Error::AlreadyHeld {
                attachment: attachment.clone(),
                addresses: allocation.addresses,
            });
        }
        let choices = self.choose(attachment, cidrs, requested)?;
        let addresses = choices.iter().map(|choice| choice.address).collect();
        let allocation = record::starting_now(attachment, addresses, origin);

        let new = self.root.join("new");
        remove_if_there(&new)?;
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new);
        let written = written.and_then(|mut file| {
            record::write(&mut file, &allocation)?;
            Ok(file.metadata()?.ino())
        });
        let inode = written.map_err(|source| {
            // On a full disk the name may exist without its text.
            let _ = fs::remove_file(&new);
            io_error("writing", &new)(source)
        })?;
        let claim = Claim {
            store: self,
            allocation,
            inode,
            kept: false,
        };
        let linked = fs::hard_link(&new, &owner)
            .map_err(io_error("making", &owner))
            .and_then(|()| {
                for choice in &choices {
                    let held = self.held(choice.address);
                    fs::hard_link(&new, &held).map_err(io_error("making", held))?;
                }
                Ok(())
            });
        // A leftover is replaced by the next call.
        let _ = fs::remove_file(&new);
        if let Err(error) = linked {
            claim.undo_locked();
            return Err(error);
        }
        for choice in &choices {
            // Both only steer which address is given next; the guard is the link just made.
            let _ = fs::remove_file(self.resting(choice.address));
            self.remember(choice);
        }
        Ok(claim)
    }

    /// Frees what `attachment` holds; its addresses rest from now on. Says what it was, or that it held nothing.
    ///
    /// # Errors
    /// [`Error::Busy`] or [`Error::Io`]; a repeated call goes on where this one stopped.
    pub fn free(&self, attachment: &Attachment) -> Result<Option<Allocation>, Error> {
        let _lock = self.lock()?;
        self.free_locked(attachment)
    }

    pub(crate) fn free_locked(&self, attachment: &Attachment) -> Result<Option<Allocation>, Error> {
        let owner = self.owner(attachment);
        let Some((inode, allocation)) = self.read(attachment)? else {
            return Ok(None);
        };
        self.rest_from_now(&owner)?;
        for address in &allocation.addresses {
            match self.guard(*address)? {
                Some(guard) if guard.inode == inode => self.put_to_rest(*address)?,
                // A guard that is no owner's link: the store was copied, and the text alone says whose it is.
                Some(Guard { others: false, .. }) => {
                    self.rest_from_now(&self.held(*address))?;
                    self.put_to_rest(*address)?;
                }
                _ => {}
            }
        }
        remove_if_there(&owner)?;
        Ok(Some(allocation))
    }

    /// What `attachment` holds. A damaged owner's file is read by the links it has.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn get(&self, attachment: &Attachment) -> Result<Option<Allocation>, Error> {
        Ok(self.read(attachment)?.map(|(_, allocation)| allocation))
    }

    /// Everything that is held, by attachment.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self) -> Result<Vec<Allocation>, Error> {
        let mut allocations = Vec::new();
        for name in self.names("owners")? {
            if let Some(attachment) = Attachment::from_file_name(&name) {
                // Gone since it was listed: freed, so not held.
                allocations.extend(self.get(&attachment)?);
            }
        }
        allocations.sort_by(|a, b| a.attachment.cmp(&b.attachment));
        Ok(allocations)
    }

    /// How many of the addresses of `cidr` that this store gives are held and how many rest. A reserved one that is
    /// still held is no part of the pool's size, and so is not counted either.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn usage(&self, cidr: IpNetwork) -> Result<Usage, Error> {
        let pool = self.pool(cidr);
        let held = self
            .addresses("held")?
            .into_iter()
            .filter(|address| pool.contains(*address))
            .count();
        let now = boot_time();
        let mut resting = 0;
        for address in self.addresses("resting")? {
            let waits =
                pool.contains(address) && self.resting_until(address)?.is_some_and(|until| until > now);
            resting += u128::from(waits);
        }
        Ok(Usage {
            held: held as u128,
            resting,
        })
    }
}
