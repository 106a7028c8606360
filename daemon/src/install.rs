//! Puts the plugin where runtimes look for it, and takes everything of Sluice's off a host.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use sluice_cni::names::{CONFLIST, PLUGIN, PLUGIN_FOLDER};

use crate::config::Config;
use crate::dataplane;
use crate::egress;
use crate::forward;
use crate::last_known;
use crate::network::Network;

/// Everything the daemon and the plugin keep for the length of a boot.
const RUN_FOLDER: &str = "/run/sluice";

/// Copies the plugin that lies beside this program into `folder`.
///
/// It is replaced by rename: a plugin that runs at the moment goes on running ("text file busy" cannot happen), and
/// one killed halfway leaves the old one whole.
///
/// # Errors
/// Which step failed, on which file.
pub fn install(folder: &Path) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program's own path")?;
    let source = own.with_file_name(PLUGIN);
    let target = folder.join(PLUGIN);
    let temporary = folder.join(format!(".{PLUGIN}.{}", std::process::id()));
    fs::create_dir_all(folder).with_context(|| format!("making the folder {}", folder.display()))?;
    let copied = copy(&source, &temporary).and_then(|()| fs::rename(&temporary, &target));
    if copied.is_err() {
        // A half-made copy is in nobody's way but takes room.
        let _ = fs::remove_file(&temporary);
    }
    copied.with_context(|| format!("copying the plugin {} to {}", source.display(), target.display()))?;
    Ok(target)
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    let file = File::open(to)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    file.sync_all()
}

/// Removes all that Sluice made on this host, in the order that stops new work first: the conflist, so that no pod
/// comes; then the dataplane, pods' interfaces and routes; last the files.
///
/// Carries on past what fails; returns what was done, and what could not be.
pub async fn cleanup() -> Cleanup {
    let mut cleanup = Cleanup::default();
    cleanup.note("the CNI network config", remove_file(Path::new(CONFLIST)));
    cleanup.note(
        "the CNI plugin",
        remove_file(&Path::new(PLUGIN_FOLDER).join(PLUGIN)),
    );
    for (what, removed) in dataplane::remove_all() {
        cleanup.note(what, removed);
    }
    cleanup.note("the nftables table of egress", egress::nftables::remove());
    cleanup.note("the iptables chains of egress", egress::iptables::remove());
    cleanup.note("the way through the host's FORWARD chain", forward::remove());
    match Network::open(Config::default().network) {
        Ok(network) => {
            cleanup.note(
                "pod interfaces",
                network.remove_pods().await.map(|count| count > 0),
            );
            cleanup.note("tunnels and routes", network.remove_all().await);
        }
        Err(error) => cleanup.note("pod interfaces, tunnels and routes", Err(error)),
    }
    cleanup.note("the files of this boot", remove_tree(Path::new(RUN_FOLDER)));
    cleanup.note("the state last known", remove_tree(Path::new(last_known::FOLDER)));
    cleanup
}

/// What a clean-up did.
#[derive(Debug, Default)]
pub struct Cleanup {
    /// What was there and is gone.
    pub removed: Vec<&'static str>,
    /// What could not be removed, and why.
    pub failed: Vec<String>,
}

impl Cleanup {
    fn note(&mut self, what: &'static str, result: anyhow::Result<bool>) {
        match result {
            Ok(true) => self.removed.push(what),
            Ok(false) => {}
            Err(error) => self.failed.push(format!("{what}: {error:#}")),
        }
    }
}

fn remove_file(path: &Path) -> anyhow::Result<bool> {
    gone(fs::remove_file(path)).with_context(|| format!("removing {}", path.display()))
}

fn remove_tree(path: &Path) -> anyhow::Result<bool> {
    gone(fs::remove_dir_all(path)).with_context(|| format!("removing {}", path.display()))
}

fn gone(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_no_failure() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!remove_file(&folder.path().join("absent")).unwrap());
        assert!(!remove_tree(&folder.path().join("absent")).unwrap());
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        assert!(remove_tree(&folder.path().join("a")).unwrap());
    }
}
