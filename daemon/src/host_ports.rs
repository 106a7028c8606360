//! The host ports that the plugin wrote down on this node, told to the owner task whenever they change.

use std::collections::BTreeMap;
use std::time::Duration;

use sluice_cni::host_ports::{HostPorts, Record};
use sluice_ipam::Attachment;
use tokio::sync::mpsc;

use crate::watch::FolderWatch;

/// How long a change is left to settle: pods often come and go together. Records come by rename, always whole.
const SETTLE: Duration = Duration::from_millis(2);

/// How soon a directory that could not be read is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What the directory says now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The pods with host ports.
    pub records: BTreeMap<Attachment, Record>,
    /// What is wrong with single records; those are not served.
    pub problems: Vec<String>,
}

/// Reads `host_ports` and sends what it says, or why it could not be read (what it said before then stands): once at
/// first, then whenever that changes, until the receiver is gone.
///
/// # Errors
/// The kernel has no notifications to give.
pub async fn run(
    host_ports: HostPorts,
    snapshots: mpsc::Sender<Result<Snapshot, String>>,
) -> anyhow::Result<()> {
    let mut watch = FolderWatch::new(host_ports.directory(), SETTLE)?;
    let mut told = None;
    loop {
        // Made here too, so that it can be watched before the first pod with a host port.
        let made = host_ports.make_directory();
        watch.begin();
        let snapshot = made.and_then(|()| read(&host_ports)).map_err(|error| {
            let directory = host_ports.directory().display();
            format!("reading {directory}: {error}; what it said before stands")
        });
        let failed = snapshot.is_err();
        if told.as_ref() != Some(&snapshot) {
            told = Some(snapshot.clone());
            if snapshots.send(snapshot).await.is_err() {
                return Ok(());
            }
        }
        if failed {
            tokio::time::sleep(RETRY).await;
        } else {
            watch.changed().await;
        }
    }
}

fn read(host_ports: &HostPorts) -> std::io::Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    for (attachment, record) in host_ports.list()? {
        match record {
            Ok(record) => {
                snapshot.records.insert(attachment, record);
            }
            Err(problem) => snapshot.problems.push(problem),
        }
    }
    Ok(snapshot)
}
