//! What this host remembers of itself: who it is, and until when its pod CIDRs are nobody else's.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::last_known;

/// Where it is kept.
const PATH: &str = "/var/lib/sluice/etcd.json";

/// What is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Tells this host from another that has its name.
    pub id: String,
    /// The pod CIDRs that were granted last.
    #[serde(rename = "podCIDRs", default)]
    pub pod_cidrs: Vec<IpNetwork>,
    /// Until when they cannot be granted to another.
    #[serde(default)]
    pub held_until: Timestamp,
}

impl Record {
    /// Reads it, or begins one where there is none.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub fn open() -> Result<Self> {
        Self::open_at(Path::new(PATH))
    }

    /// Keeps it.
    ///
    /// # Errors
    /// The disk's.
    pub fn save(&self) -> Result<()> {
        self.save_at(Path::new(PATH))
    }

    /// Whether another node can have been granted these by `now`.
    pub fn holds(&self, pod_cidrs: &[IpNetwork], now: Timestamp) -> bool {
        now < self.held_until && pod_cidrs.iter().all(|cidr| self.pod_cidrs.contains(cidr))
    }

    fn open_at(path: &Path) -> Result<Self> {
        let doing = || format!("reading {}", path.display());
        match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("{}; remove it if this host is to be a new one", doing())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let record = Self {
                    id: new_id().context("making an identity of this host")?,
                    pod_cidrs: Vec::new(),
                    held_until: Timestamp::UNIX_EPOCH,
                };
                record.save_at(path)?;
                Ok(record)
            }
            Err(error) => Err(error).with_context(doing),
        }
    }

    fn save_at(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec(self)?;
        last_known::write_whole(path, &text).with_context(|| format!("writing {}", path.display()))
    }
}

/// A number that the kernel draws (random(4), `/proc/sys/kernel/random/uuid`).
fn new_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/uuid")?
        .trim()
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D3
    #[test]
    fn a_host_is_itself_after_a_reboot_and_its_grant_ends_when_the_lease_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("etcd.json");
        let mut record = Record::open_at(&path).unwrap();
        assert_eq!(Record::open_at(&path).unwrap(), record);
        let cidr: IpNetwork = "10.244.1.0/24".parse().unwrap();
        let now = Timestamp::now();
        assert!(!record.holds(&[cidr], now));
        record.pod_cidrs = vec![cidr];
        record.held_until = now + jiff::SignedDuration::from_secs(60);
        record.save_at(&path).unwrap();
        let read = Record::open_at(&path).unwrap();
        assert!(read.holds(&[cidr], now));
        assert!(!read.holds(&[cidr], now + jiff::SignedDuration::from_secs(61)));
        assert!(!read.holds(&["10.244.2.0/24".parse().unwrap()], now));
        fs::write(&path, "{").unwrap();
        let error = format!("{:#}", Record::open_at(&path).unwrap_err());
        assert!(error.contains("remove it"), "{error}");
    }
}
