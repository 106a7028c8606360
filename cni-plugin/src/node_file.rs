//! `/run/sluice/node.json`: what the plugin must know about its node, written by the daemon.
//!
//! The plugin works while the daemon is down, so this file is the only thing the two exchange. It is replaced by
//! rename, never changed in place: a reader sees the old one or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// The only layout version this build reads and writes.
pub const VERSION: u32 = 1;

/// The node, as far as wiring a pod needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeFile {
    /// Layout of this file, [`VERSION`].
    pub version: u32,
    /// The node's name in the cluster.
    pub node_name: String,
    /// The node's pod CIDRs, any number per family; a pod gets one address of each family present.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<IpNetwork>,
    /// Gateway of a pod's IPv4 default route.
    pub gateway_v4: Ipv4Addr,
    /// Gateway of a pod's IPv6 default route.
    pub gateway_v6: Ipv6Addr,
    /// MTU of pod interfaces in bytes: the uplink's, less the overlay's overhead.
    pub mtu: u32,
    /// Networks whose addresses pods never get; left out when there is none, so that a plugin from before there were
    /// any reads the file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reserved: Vec<IpNetwork>,
    /// Why no pod can be wired now, for STATUS (code 50); empty when one can.
    #[serde(default)]
    pub not_ready: String,
    /// Why pods already wired may suffer, for STATUS (code 51); empty when they do not.
    #[serde(default)]
    pub impaired: String,
}

/// Why the node file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeFileError {
    /// There is no file: the daemon has not run since boot.
    #[error("{path}: not there; sluiced writes it once it knows the node: is it running?")]
    Missing {
        /// The path tried.
        path: String,
    },
    /// The file could not be read.
    #[error("reading {path}: {source}")]
    Read {
        /// The path tried.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file is not what this build understands.
    #[error("{path}: {reason}; restart sluiced so that it writes the file anew")]
    Invalid {
        /// The path tried.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl NodeFile {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`NodeFileError`], naming the path and what to do.
    pub fn read(path: &Path) -> Result<Self, NodeFileError> {
        let shown = || path.display().to_string();
        let text = fs::read(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => NodeFileError::Missing { path: shown() },
            _ => NodeFileError::Read {
                path: shown(),
                source,
            },
        })?;
        let file: Self = serde_json::from_slice(&text).map_err(|error| NodeFileError::Invalid {
            path: shown(),
            reason: error.to_string(),
        })?;
        if file.version != VERSION {
            let reason = format!("layout version {}, this build wants {VERSION}", file.version);
            return Err(NodeFileError::Invalid {
                path: shown(),
                reason,
            });
        }
        Ok(file)
    }

    /// Writes the file to `path` through a temporary file in the same folder, synced and renamed.
    ///
    /// # Errors
    /// The kernel's answer to the step that failed; the old file is then still in place.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)?;
        let temporary = folder.join(format!(".node.json.{}", std::process::id()));
        let mut file = File::create(&temporary)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    }
}
