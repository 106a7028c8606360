//! Sluice's own image: its binaries, `nft`, both flavours of iptables, and the libraries that these need. No shell, no package manager.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::oci::Image;
use super::root::Root;

/// The image's name, as deploy/sluice.yaml has it.
pub const NAME: &str = "localhost/sluice:dev";

/// What is copied from the folder of binaries; the plugin lies beside the daemon, which installs it.
const OURS: [&str; 3] = ["sluice", "sluiced", "sluicectl"];

/// What the daemon runs: each program, and the names it is run by.
const TOOLS: [(&str, &[&str]); 3] = [
    ("/usr/sbin/nft", &[]),
    (
        "/usr/sbin/xtables-nft-multi",
        &[
            "iptables",
            "ip6tables",
            "iptables-nft",
            "ip6tables-nft",
            "iptables-nft-save",
            "ip6tables-nft-save",
            "iptables-nft-restore",
            "ip6tables-nft-restore",
        ],
    ),
    (
        "/usr/sbin/xtables-legacy-multi",
        &[
            "iptables-legacy",
            "ip6tables-legacy",
            "iptables-legacy-save",
            "ip6tables-legacy-save",
            "iptables-legacy-restore",
            "ip6tables-legacy-restore",
        ],
    ),
];

/// The image with the binaries in `folder`.
///
/// # Errors
/// A binary or a tool is missing.
pub fn image(folder: &Path) -> Result<Image> {
    let mut root = Root::default();
    for name in OURS {
        root.program(&folder.join(name), Path::new("/usr/local/bin").join(name))?;
    }
    for (tool, names) in TOOLS {
        root.program(Path::new(tool), tool)
            .context("packages nftables and iptables")?;
        let (_, program) = tool.rsplit_once('/').unwrap_or(("", tool));
        for name in names {
            root.link(Path::new("/usr/sbin").join(name), program);
        }
    }
    for extension in extensions()? {
        root.copy(&extension, &extension)?;
    }
    // Runtimes name a pod's network namespace in `/var/run` as well.
    root.link("/var/run", "/run");
    for folder in ["/run", "/tmp", "/etc/sluice"] {
        root.folder(folder);
    }
    Ok(Image {
        name: NAME.to_owned(),
        command: vec!["/usr/local/bin/sluiced".to_owned()],
        environment: vec!["PATH=/usr/local/bin:/usr/sbin:/usr/bin".to_owned()],
        entries: root.entries(),
    })
}

/// What iptables loads by itself when a rule names it.
fn extensions() -> Result<Vec<PathBuf>> {
    let output = Command::new("dpkg")
        .args(["-L", "iptables"])
        .output()
        .context("running dpkg")?;
    let listed = String::from_utf8_lossy(&output.stdout);
    let found: Vec<PathBuf> = listed
        .lines()
        .filter(|path| path.contains("/xtables/") && path.ends_with(".so"))
        .map(PathBuf::from)
        .collect();
    if found.is_empty() {
        bail!("the package iptables has no extensions here");
    }
    Ok(found)
}
