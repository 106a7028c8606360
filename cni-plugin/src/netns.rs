//! Network namespaces: opening one by the path a runtime names, going there and coming back.
//!
//! Moves only the calling thread, and always brings it home.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, fstatfs};

use crate::error::{Code, Failure};

/// `NSFS_MAGIC` of `linux/magic.h`.
const NSFS: FsType = FsType(0x6e73_6673);

const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace, kept alive by being open.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
    /// Where the thread that opened it was.
    home: File,
}

impl Netns {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// Code 3 when nothing is there (the container is gone), 4 when something else is, or the host's own namespace.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let file = File::open(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Failure::new(
                Code::UnknownContainer,
                format!("CNI_NETNS {shown}: there is no such namespace"),
            ),
            _ => Failure::new(Code::Io, format!("CNI_NETNS {shown}: {error}")),
        })?;
        if !fstatfs(&file).is_ok_and(|filesystem| filesystem.filesystem_type() == NSFS) {
            let message = format!("CNI_NETNS {shown}: is not a network namespace");
            return Err(Failure::new(Code::Environment, message));
        }
        let home = File::open(OWN).map_err(|error| Failure::new(Code::Io, format!("{OWN}: {error}")))?;
        let inode = |file: &File| file.metadata().map(|metadata| metadata.ino()).ok();
        if inode(&home) == inode(&file) {
            let message = format!("CNI_NETNS {shown}: is the host's own network namespace");
            return Err(Failure::new(Code::Environment, message));
        }
        let path = path.to_path_buf();
        Ok(Self { file, path, home })
    }

    /// Moves the calling thread there until the answer is dropped, and then to where this was opened.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn enter(&self) -> Result<Inside<'_>, Failure> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|error| {
            let message = format!("CNI_NETNS {}: entering: {error}", self.path.display());
            Failure::new(Code::Kernel, message)
        })?;
        Ok(Inside { home: &self.home })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A stay in another namespace.
#[derive(Debug)]
pub struct Inside<'a> {
    home: &'a File,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // A thread left in the pod's namespace would do the host's work there: better none at all.
        if setns(self.home, CloneFlags::CLONE_NEWNET).is_err() {
            std::process::abort();
        }
    }
}

/// Whether the namespace recorded as `path` with `inode` (0: not known) is certainly no longer there.
pub fn is_gone(path: &str, inode: u64) -> bool {
    match File::open(path) {
        Err(error) => matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
        Ok(file) => {
            let namespace = fstatfs(&file).is_ok_and(|filesystem| filesystem.filesystem_type() == NSFS);
            let same = file
                .metadata()
                .is_ok_and(|metadata| inode == 0 || metadata.ino() == inode);
            !(namespace && same)
        }
    }
}
