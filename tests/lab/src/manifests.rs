//! The lab's folder of Kubernetes YAML, one file per object, as a `kubectl` for clusters without an API server.
//!
//! Files appear and change by rename.

use std::fs;
use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::objects::{Id, Item};
use crate::state;

/// Writes a file for each item and says what that did.
pub(crate) fn apply(lab: &str, items: &[Item]) -> Result<Vec<String>> {
    let mut done = Vec::new();
    for item in items {
        let path = path(lab, &item.id);
        let verb = match fs::read_to_string(&path) {
            Ok(old) if old == item.text => "unchanged",
            Ok(_) => "configured",
            Err(_) => "created",
        };
        state::write_by_rename(&path, &item.text)?;
        done.push(format!("{} {verb}", item.shown()));
    }
    Ok(done)
}

/// Removes an object's file; says whether it was there.
pub(crate) fn remove(lab: &str, id: &Id) -> Result<bool> {
    let path = path(lab, id);
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
    }
}

fn path(lab: &str, id: &Id) -> PathBuf {
    let (kind, name) = (id.kind.to_ascii_lowercase(), &id.name);
    // Cluster-wide kinds have no namespace.
    let file = if kind == "node" {
        format!("{kind}-{name}.yaml")
    } else {
        format!("{kind}-{}-{name}.yaml", id.namespace)
    };
    state::manifests(lab).join(file)
}
