//! The store's directory: giving, freeing, listing, counting.
//!
//! Every change is made under the lock, in the order the crate's page gives, so that a call killed between any two
//! steps leaves what DEL, GC or [`Store::repair`] can finish. Which address to give is `pick`'s matter.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, UNIX_EPOCH};

use ipnetwork::IpNetwork;

use crate::error::io_error;
use crate::record::{self, boot_time};
use crate::{Allocation, Attachment, DEFAULT_REST, Error, Origin};

/// How long a call waits for others to be done. Each holds the lock for well under a millisecond.
const PATIENCE: Duration = Duration::from_secs(10);

/// Directories below the root; the last is made last, so its presence says all are there.
const DIRECTORIES: [&str; 4] = ["held", "resting", "cursor", "owners"];

/// The addresses of one node's pods.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) root: PathBuf,
    pub(crate) rest: Duration,
    patience: Duration,
}

/// How full a CIDR is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Addresses held.
    pub held: u128,
    /// Addresses freed whose rest is not over.
    pub resting: u128,
}

/// Addresses just given, which go back when this is dropped before [`Claim::keep`].
#[derive(Debug)]
#[must_use = "dropping a claim gives its addresses back"]
pub struct Claim<'a> {
    store: &'a Store,
    allocation: Allocation,
    inode: u64,
    kept: bool,
}

/// A file in `held/`.
pub(crate) struct Guard {
    pub(crate) inode: u64,
    /// Whether it has other names: its owner's, as a rule.
    pub(crate) others: bool,
}

/// The lock, released when dropped (or when its holder dies).
pub(crate) struct Lock(#[expect(dead_code, reason = "held open for its lock")] File);

impl Store {
    /// Opens the store at `root`, making what is missing of it, readable by root alone.
    ///
    /// # Errors
    /// The kernel's answer to making a directory.
    pub fn open(root: impl Into<PathBuf>, rest: Duration) -> Result<Self, Error> {
        let store = Self::at(root.into(), rest);
        if !store.root.join("owners").is_dir() {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700);
            for name in DIRECTORIES {
                let path = store.root.join(name);
                builder.create(&path).map_err(io_error("making", path))?;
            }
        }
        Ok(store)
    }

    /// Opens the store at `root` if there is one; makes nothing.
    pub fn open_existing(root: impl Into<PathBuf>, rest: Duration) -> Option<Self> {
        let store = Self::at(root.into(), rest);
        store.root.join("owners").is_dir().then_some(store)
    }

    fn at(root: PathBuf, rest: Duration) -> Self {
        Self {
            root,
            rest,
            patience: PATIENCE,
        }
    }

    /// Waits for other calls no longer than `patience` (10 s unless told).
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Gives `attachment` one address of each family among `cidrs`: the requested one where there is one, else the
    /// one that was free for longest as far as a bounded look can tell. All or nothing. `origin` is recorded
    /// for collectors.
    ///
    /// A requested address may still be resting: who asks for it by name means that very one.
    ///
    /// # Errors
    /// [`Error::AlreadyHeld`], [`Error::Full`], [`Error::Conflict`], [`Error::OutsidePools`],
    /// [`Error::RequestedTwice`], [`Error::NoPools`], [`Error::Busy`], [`Error::Io`]; nothing is changed then.
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

    /// Turns the guard of `address` into a rest.
    pub(crate) fn put_to_rest(&self, address: IpAddr) -> Result<(), Error> {
        let held = self.held(address);
        fs::rename(&held, self.resting(address)).map_err(io_error("resting", &held))?;
        // Between two names of one file `rename` does nothing and says it did: see that the guard goes.
        remove_if_there(&held)
    }

    /// What guards `address`, if anything does.
    pub(crate) fn guard(&self, address: IpAddr) -> Result<Option<Guard>, Error> {
        let path = self.held(address);
        match fs::symlink_metadata(&path) {
            Ok(metadata) => Ok(Some(Guard {
                inode: metadata.ino(),
                others: metadata.nlink() > 1,
            })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("looking at", path)(error)),
        }
    }

    /// Dates the file at `path` with the end of a rest that begins now; all its names share the date.
    pub(crate) fn rest_from_now(&self, path: &Path) -> Result<(), Error> {
        let until = UNIX_EPOCH + boot_time() + self.rest;
        let dated = File::open(path).and_then(|file| file.set_times(FileTimes::new().set_modified(until)));
        dated.map_err(io_error("dating", path))
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

    /// How many addresses of `cidr` are held and how many rest.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn usage(&self, cidr: IpNetwork) -> Result<Usage, Error> {
        let held = self
            .addresses("held")?
            .into_iter()
            .filter(|address| cidr.contains(*address))
            .count();
        let now = boot_time();
        let mut resting = 0;
        for address in self.addresses("resting")? {
            let waits =
                cidr.contains(address) && self.resting_until(address)?.is_some_and(|until| until > now);
            resting += u128::from(waits);
        }
        Ok(Usage {
            held: held as u128,
            resting,
        })
    }

    /// The owner's inode and allocation; a damaged text is replaced by what the links say.
    pub(crate) fn read(&self, attachment: &Attachment) -> Result<Option<(u64, Allocation)>, Error> {
        let owner = self.owner(attachment);
        match record::read(&owner, attachment) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("reading", owner)(error)),
            Ok((inode, Some(allocation))) => Ok(Some((inode, allocation))),
            Ok((inode, None)) => {
                let addresses = self.held_by()?.remove(&inode).unwrap_or_default();
                let mut allocation = record::starting_now(
                    attachment,
                    addresses,
                    Origin {
                        network: "",
                        netns: Path::new(""),
                    },
                );
                allocation.since = UNIX_EPOCH;
                allocation.since_boot = Duration::ZERO;
                Ok(Some((inode, allocation)))
            }
        }
    }

    /// Until when `address` rests, by the boot-time clock; nothing when it was never freed or is given again.
    pub(crate) fn resting_until(&self, address: IpAddr) -> Result<Option<Duration>, Error> {
        let path = self.resting(address);
        let modified = match fs::symlink_metadata(&path).and_then(|metadata| metadata.modified()) {
            Ok(modified) => modified,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("looking at", path)(error)),
        };
        let until = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        // No rest ends that far ahead: it was begun before the last boot, whose connections are gone.
        let furthest = boot_time() + self.rest.max(DEFAULT_REST);
        Ok(Some(if until > furthest { Duration::ZERO } else { until }))
    }

    /// All held addresses by the inode of their owner's file.
    pub(crate) fn held_by(&self) -> Result<BTreeMap<u64, Vec<IpAddr>>, Error> {
        let mut owners: BTreeMap<u64, Vec<IpAddr>> = BTreeMap::new();
        for address in self.addresses("held")? {
            if let Some(inode) = inode_of(&self.held(address))? {
                owners.entry(inode).or_default().push(address);
            }
        }
        Ok(owners)
    }

    /// The addresses that name the files of `directory`; other names are nobody's.
    pub(crate) fn addresses(&self, directory: &str) -> Result<Vec<IpAddr>, Error> {
        let names = self.names(directory)?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    pub(crate) fn names(&self, directory: &str) -> Result<Vec<String>, Error> {
        let path = self.root.join(directory);
        let entries = fs::read_dir(&path).map_err(io_error("listing", &path))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("listing", &path))?;
            names.extend(entry.file_name().into_string());
        }
        Ok(names)
    }

    pub(crate) fn owner(&self, attachment: &Attachment) -> PathBuf {
        self.root.join("owners").join(attachment.file_name())
    }

    pub(crate) fn held(&self, address: IpAddr) -> PathBuf {
        self.root.join("held").join(address.to_string())
    }

    pub(crate) fn resting(&self, address: IpAddr) -> PathBuf {
        self.root.join("resting").join(address.to_string())
    }

    pub(crate) fn lock(&self) -> Result<Lock, Error> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path);
        let file = file.map_err(io_error("opening", &path))?;
        let begun = Instant::now();
        let mut pause = Duration::from_micros(50);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock(file)),
                Err(TryLockError::Error(error)) => return Err(io_error("locking", path)(error)),
                Err(TryLockError::WouldBlock) if begun.elapsed() >= self.patience => {
                    let waited = self.patience;
                    return Err(Error::Busy { path, waited });
                }
                Err(TryLockError::WouldBlock) => {
                    sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(2));
                }
            }
        }
    }
}

impl Claim<'_> {
    /// What was given.
    pub fn allocation(&self) -> &Allocation {
        &self.allocation
    }

    /// Makes it final.
    ///
    /// # Errors
    /// [`Error::Overtaken`] when a DEL freed it meanwhile: whatever was built on it must go.
    pub fn keep(mut self) -> Result<Allocation, Error> {
        self.kept = true;
        if inode_of(&self.store.owner(&self.allocation.attachment))? == Some(self.inode) {
            return Ok(self.allocation.clone());
        }
        Err(Error::Overtaken {
            attachment: self.allocation.attachment.clone(),
        })
    }

    /// Takes everything back without a rest: nobody ever sent from these addresses.
    fn undo_locked(mut self) {
        self.kept = true;
        self.take_back();
    }

    fn take_back(&self) {
        let held = self
            .allocation
            .addresses
            .iter()
            .map(|address| self.store.held(*address));
        for path in held.chain([self.store.owner(&self.allocation.attachment)]) {
            // Only what is this claim's own; what cannot be removed now is left to DEL and GC, which find the owner.
            if matches!(inode_of(&path), Ok(Some(inode)) if inode == self.inode)
                && fs::remove_file(&path).is_err()
            {
                return;
            }
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Ok(_lock) = self.store.lock()
        {
            self.take_back();
        }
    }
}

/// The inode at `path`, if there is a file.
pub(crate) fn inode_of(path: &Path) -> Result<Option<u64>, Error> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("looking at", path)(error)),
    }
}

/// Removes the file at `path`; one already gone is fine.
pub(crate) fn remove_if_there(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error("removing", path)(error)),
        _ => Ok(()),
    }
}
