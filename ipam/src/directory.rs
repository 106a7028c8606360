//! The files of a store: where each lies, how it is read, locked, dated and moved.
//!
//! Decides nothing: which steps make up giving, freeing and mending, and in which order, is `store`'s and `repair`'s
//! matter.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, UNIX_EPOCH};

use crate::error::{Error, io_error};
use crate::record::{self, Allocation, Origin, boot_time};
use crate::store::Store;
use crate::{Attachment, DEFAULT_REST};

/// A file in `held/`.
pub(crate) struct Guard {
    pub(crate) inode: u64,
    /// Whether it has other names: its owner's, as a rule.
    pub(crate) others: bool,
}

/// A lock on a file, released when dropped (or when its holder dies).
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held open for its lock")] File);

impl Lock {
    /// Locks the file at `path`, which is made if it is not there, waiting for others no longer than `patience`.
    ///
    /// # Errors
    /// [`Error::Busy`] when others hold it for longer, [`Error::Io`].
    pub fn take(path: &Path, patience: Duration) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path);
        let file = file.map_err(io_error("opening", path))?;
        let begun = Instant::now();
        let mut pause = Duration::from_micros(50);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::Error(error)) => return Err(io_error("locking", path)(error)),
                Err(TryLockError::WouldBlock) if begun.elapsed() >= patience => {
                    return Err(Error::Busy {
                        path: path.to_owned(),
                        waited: patience,
                    });
                }
                Err(TryLockError::WouldBlock) => {
                    sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(2));
                }
            }
        }
    }
}

impl Store {
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
        Lock::take(&self.root.join("lock"), self.patience)
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
