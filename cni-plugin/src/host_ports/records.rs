//! The directory that says which pod has which host ports: one JSON file per attachment, named as in the address store.
//!
//! ```text
//! lock            flock, held while a file is written
//! new             a file being written, before it has its name
//! <id>@<ifname>   a pod's addresses and host ports
//! ```
//! A record is written when its pod's addresses are claimed and removed before they are freed: one without an
//! allocation is what a killed call left.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sluice_ipam::{Attachment, Lock, Store};

use super::Mapping;
use crate::error::{Code, Failure};

/// How long a call waits for others to be done. Each holds the lock for about a millisecond.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one attachment has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    /// The pod's addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
    /// Its host ports.
    pub mappings: Vec<Mapping>,
}

/// The host ports of one node's pods.
#[derive(Debug, Clone)]
pub struct HostPorts {
    root: PathBuf,
}

impl HostPorts {
    /// Those written down in the directory `root`, which need not be there.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Those that belong to the address store at `ipam_directory`: they are beside it.
    pub fn beside(ipam_directory: &Path) -> Self {
        Self::at(ipam_directory.with_file_name("hostports"))
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.root
    }

    /// Makes the directory, readable by root alone, unless it is there.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn make_directory(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.root)
    }

    /// Writes down that `attachment`, whose addresses are claimed in `store`, has these host ports.
    ///
    /// # Errors
    /// Code 103 with the holder when another attachment has one of them, 11 when the lock stays taken, 5 with the
    /// kernel's answer. Nothing is written then.
    pub fn record(&self, attachment: &Attachment, record: &Record, store: &Store) -> Result<(), Failure> {
        self.make_directory().map_err(failed("making", &self.root))?;
        let _lock = Lock::take(&self.root.join("lock"), PATIENCE)?;
        for (other, theirs) in self.list().map_err(failed("listing", &self.root))? {
            if other == *attachment {
                continue;
            }
            // What cannot be read is not served either.
            let theirs = theirs.map(|theirs| theirs.mappings).unwrap_or_default();
            let clash = record
                .mappings
                .iter()
                .find_map(|mine| Some((mine, theirs.iter().find(|mapping| mapping.overlaps(mine))?)));
            let Some((mine, theirs)) = clash else { continue };
            if store.get(&other)?.is_none() {
                self.remove(&other)?;
                continue;
            }
            let message = format!("host port {mine} was asked for by {attachment} but {other} has {theirs}");
            return Err(Failure::new(Code::Conflict, message));
        }
        let new = self.root.join("new");
        let written = write(&new, record).and_then(|()| fs::rename(&new, self.file(attachment)));
        written.map_err(|error| {
            // On a full disk the name may exist without its text.
            let _ = fs::remove_file(&new);
            failed("writing", &new)(error)
        })
    }

    /// Forgets the host ports of `attachment`; says whether there were any.
    ///
    /// # Errors
    /// Code 5 with the kernel's answer.
    pub fn remove(&self, attachment: &Attachment) -> Result<bool, Failure> {
        let file = self.file(attachment);
        match fs::remove_file(&file) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
            Err(error) => Err(failed("removing", &file)(error)),
        }
    }

    /// What `attachment` has; nothing when it has none or its file cannot be understood.
    ///
    /// # Errors
    /// Code 5 with the kernel's answer.
    pub fn get(&self, attachment: &Attachment) -> Result<Option<Record>, Failure> {
        let file = self.file(attachment);
        match fs::read(&file) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(failed("reading", &file)(error)),
        }
    }

    /// All that is written down, by attachment, with what is wrong about a file that cannot be understood. A directory
    /// that is not there holds nothing.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn list(&self) -> io::Result<Vec<(Attachment, Result<Record, String>)>> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut records = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let Some(attachment) = name.to_str().and_then(Attachment::from_file_name) else {
                continue;
            };
            let file = self.file(&attachment);
            let record = match fs::read(&file) {
                // Gone since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => Err(format!("reading {}: {error}", file.display())),
                Ok(text) => serde_json::from_slice(&text)
                    .map_err(|error| format!("{}: {error}; its host ports are not served", file.display())),
            };
            records.push((attachment, record));
        }
        records.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(records)
    }

    /// Removes the records of attachments that hold nothing in `store`; says whose they were.
    ///
    /// # Errors
    /// As [`HostPorts::record`]'s.
    pub fn remove_orphans(&self, store: &Store) -> Result<Vec<Attachment>, Failure> {
        let mut removed = Vec::new();
        let records = self.list().map_err(failed("listing", &self.root))?;
        if records.is_empty() {
            return Ok(removed);
        }
        // Whoever writes a record holds the lock and has its claim already: what has none now is nobody's.
        let _lock = Lock::take(&self.root.join("lock"), PATIENCE)?;
        for (attachment, _) in records {
            if store.get(&attachment)?.is_none() && self.remove(&attachment)? {
                removed.push(attachment);
            }
        }
        Ok(removed)
    }

    fn file(&self, attachment: &Attachment) -> PathBuf {
        self.root.join(attachment.file_name())
    }
}

fn write(path: &Path, record: &Record) -> io::Result<()> {
    let mut text = serde_json::to_vec(record)?;
    text.push(b'\n');
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(&text)?;
    file.sync_all()
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Failure {
    let path = path.to_owned();
    move |error| Failure::new(Code::Io, format!("{doing} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{HOST_PORTS_DIRECTORY, IPAM_DIRECTORY};

    /// S25
    #[test]
    fn plugin_and_daemon_mean_the_same_directory() {
        let beside = HostPorts::beside(Path::new(IPAM_DIRECTORY));
        assert_eq!(beside.directory(), Path::new(HOST_PORTS_DIRECTORY));
    }
}
