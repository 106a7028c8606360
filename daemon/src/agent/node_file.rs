//! What the daemon leaves for the plugin and the runtime: `/run/sluice/node.json`, and the conflist once pods can be
//! wired.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use sluice_cni::names::{CONFLIST, GATEWAY_V4, GATEWAY_V6, NODE_FILE};
use sluice_cni::node_file::{NodeFile, VERSION};

use crate::network::Outcome;
use crate::state::node_routes::NodeRoutes;

/// Writes both files when their content changes.
pub struct Writer {
    node_name: String,
    written: Option<NodeFile>,
}

impl Writer {
    /// A writer for the node called `node_name`.
    pub fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.to_owned(),
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
        ensure_conflist(Path::new(CONFLIST))
            .err()
            .map(|error| format!("writing {CONFLIST}: {error}"))
    }
}

/// Writes the conflist under a temporary name and renames it: a runtime's watcher sees a whole file appear.
fn ensure_conflist(path: &Path) -> io::Result<()> {
    let text = conflist();
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

fn conflist() -> String {
    let plugin = serde_json::json!({ "type": "sluice", "capabilities": { "ips": true, "mac": true } });
    let list = serde_json::json!({ "cniVersion": "1.1.0", "name": "sluice", "plugins": [plugin] });
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
        ensure_conflist(&path).unwrap();
        let first = fs::metadata(&path).unwrap();
        let list: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            (&list["cniVersion"], &list["plugins"][0]["type"]),
            (&"1.1.0".into(), &"sluice".into())
        );
        ensure_conflist(&path).unwrap();
        assert_eq!(
            first.modified().unwrap(),
            fs::metadata(&path).unwrap().modified().unwrap()
        );
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }
}
