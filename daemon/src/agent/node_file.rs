//! What the daemon leaves for the plugin and the runtime: `/run/sluice/node.json`, and the conflist once pods can be
//! wired.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use ipnetwork::IpNetwork;
use sluice_cni::names::{CONFLIST, GATEWAY_V4, GATEWAY_V6, NODE_FILE};
use sluice_cni::node_file::{NodeFile, VERSION};

use crate::config::{Config, ProxyMode};
use crate::network::Outcome;
use crate::state::node_routes::NodeRoutes;

/// Writes both files when their content changes.
pub struct Writer {
    node_name: String,
    reserved: Vec<IpNetwork>,
    /// Whether this daemon serves host ports; otherwise they are left to another plugin of the chain.
    host_ports: bool,
    written: Option<NodeFile>,
}

impl Writer {
    /// A writer for the node that `config` describes.
    pub fn new(config: &Config) -> Self {
        Self {
            node_name: config.node_name.clone(),
            reserved: config.ipam.reserved.clone(),
            host_ports: config.proxy.mode != ProxyMode::Off,
            written: None,
        }
    }

    /// Writes what changed; says what went wrong.
    pub fn write(
        &mut self,
        outcome: Option<&Outcome>,
        routes: &NodeRoutes,
        awaiting: &[String],
        impaired: String,
    ) -> Option<String> {
        // Before the first pass is through, an older daemon's file still tells the truth about the pods it wired.
        let outcome = outcome?;
        let file = NodeFile {
            version: VERSION,
            node_name: self.node_name.clone(),
            pod_cidrs: routes.own.clone(),
            gateway_v4: GATEWAY_V4,
            gateway_v6: GATEWAY_V6,
            mtu: outcome.pod_mtu,
            reserved: self.reserved.clone(),
            not_ready: awaiting.join("; "),
            impaired,
        };
        if self.written.as_ref() != Some(&file) || !Path::new(NODE_FILE).exists() {
            if let Err(error) = file.write(Path::new(NODE_FILE)) {
                return Some(format!(
                    "writing {NODE_FILE}: {error}; pods cannot be wired until that works"
                ));
            }
            self.written = Some(file);
        }
        if !awaiting.is_empty() {
            return None;
        }
        ensure_conflist(Path::new(CONFLIST), self.host_ports)
            .err()
            .map(|error| format!("writing {CONFLIST}: {error}"))
    }
}

/// Has the plugin wire no pods though an older daemon's file is all there is: it names pod CIDRs that may be another node's now.
/// Says what went wrong.
pub fn hold_back(reason: &str) -> Option<String> {
    let path = Path::new(NODE_FILE);
    // Where there is none, or none that is understood, no pods are wired either.
    let mut file = NodeFile::read(path).ok()?;
    if file.not_ready == reason {
        return None;
    }
    file.not_ready = reason.to_owned();
    file.write(path)
        .err()
        .map(|error| format!("writing {NODE_FILE}: {error}"))
}

/// Writes the conflist under a temporary name and renames it: a runtime's watcher sees a whole file appear.
fn ensure_conflist(path: &Path, host_ports: bool) -> io::Result<()> {
    let text = conflist(host_ports);
    if fs::read(path).is_ok_and(|there| there == text.as_bytes()) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let temporary = folder.join(".10-sluice.conflist.new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    tracing::info!(path = %path.display(), "pods can be wired: the CNI network config is in place");
    Ok(())
}

/// In `cniVersion` stands what every runtime understands: containerd 1.6 and 1.7 and podman 4 do not know 1.1.0 and would
/// take no pod with it. Those that do know it find it in `cniVersions`, which the older ones pass over, and choose it.
///
/// Pods' devices get their `clsact` whatever `proxy.mode` is: a change to eBPF then stops none of them.
fn conflist(host_ports: bool) -> String {
    let versions = ["1.0.0", "1.1.0"];
    let capabilities = serde_json::json!({
        "ips": true, "mac": true, "bandwidth": true, "portMappings": host_ports,
        // Under Kubernetes a pod's annotations are the only way to ask for an address.
        "io.kubernetes.cri.pod-annotations": true,
    });
    let plugin = serde_json::json!({ "type": "sluice", "clsact": true, "capabilities": capabilities });
    let list = serde_json::json!({
        "cniVersion": versions[0], "cniVersions": versions, "name": "sluice", "plugins": [plugin],
    });
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C14
    #[test]
    fn the_conflist_appears_whole_and_only_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("net.d/10-sluice.conflist");
        ensure_conflist(&path, true).unwrap();
        let first = fs::metadata(&path).unwrap();
        let list: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(list["plugins"][0]["type"], "sluice");
        assert_eq!(
            list["cniVersion"], "1.0.0",
            "what runtimes older than 1.1.0 understand"
        );
        assert_eq!(
            list["cniVersions"],
            serde_json::json!(["1.0.0", "1.1.0"]),
            "what the newer ones choose from"
        );
        ensure_conflist(&path, true).unwrap();
        assert_eq!(
            first.modified().unwrap(),
            fs::metadata(&path).unwrap().modified().unwrap()
        );
        assert_eq!(list["plugins"][0]["capabilities"]["portMappings"], true);
        assert_eq!(list["plugins"][0]["clsact"], true);
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }
}
