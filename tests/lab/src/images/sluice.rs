//! Sluice's own image: its binaries, `nft`, both flavours of iptables, and the libraries that these need. No shell, no package manager.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use super::oci::{Entry, Image};

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

/// The image with the binaries in `folder`, as an archive.
///
/// # Errors
/// A binary or a tool is missing.
pub fn archive(folder: &Path) -> Result<Vec<u8>> {
    let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    let mut links: BTreeMap<String, String> = BTreeMap::new();
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let mut programs: Vec<PathBuf> = Vec::new();
    for name in OURS {
        let path = folder.join(name);
        files.insert(Path::new("/usr/local/bin").join(name), read(&path)?);
        programs.push(path);
    }
    for (tool, names) in TOOLS {
        files.insert(
            tool.into(),
            read(Path::new(tool)).context("packages nftables and iptables")?,
        );
        programs.push(tool.into());
        let (_, program) = tool.rsplit_once('/').unwrap_or(("", tool));
        for name in names {
            links.insert(format!("usr/sbin/{name}"), program.to_owned());
        }
    }
    for extension in extensions()? {
        files.insert(extension.clone(), read(&extension)?);
    }
    for library in libraries(&programs)? {
        files.insert(library.clone(), read(&library)?);
    }
    // Runtimes name a pod's network namespace in `/var/run` as well.
    links.insert("var/run".to_owned(), "/run".to_owned());

    let mut folders: BTreeSet<PathBuf> = ["/run", "/tmp", "/var", "/etc/sluice"].map(PathBuf::from).into();
    for path in files.keys() {
        folders.extend(path.parent().map(Path::to_path_buf));
    }
    let all: BTreeSet<PathBuf> = folders
        .iter()
        .flat_map(|folder| folder.ancestors())
        .filter(|folder| *folder != Path::new("/"))
        .map(Path::to_path_buf)
        .collect();
    let bare = |path: &Path| path.to_string_lossy().trim_start_matches('/').to_owned();
    let mut entries: Vec<Entry> = all
        .iter()
        .map(|folder| Entry::Folder(bare(folder) + "/"))
        .collect();
    entries.extend(
        files
            .into_iter()
            .map(|(path, content)| Entry::File(bare(&path), content)),
    );
    entries.extend(links.into_iter().map(|(path, target)| Entry::Link(path, target)));
    let image = Image {
        name: NAME.to_owned(),
        command: vec!["/usr/local/bin/sluiced".to_owned()],
        environment: vec!["PATH=/usr/local/bin:/usr/sbin:/usr/bin".to_owned()],
        entries,
    };
    Ok(image.archive())
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

/// The libraries that programs are linked with, the loader among them, at the paths where it looks for them.
fn libraries(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for program in programs {
        let output = Command::new("ldd").arg(program).output().context("running ldd")?;
        let listed = String::from_utf8_lossy(&output.stdout);
        for line in listed.lines() {
            if line.contains("not found") {
                bail!("{}: {}", program.display(), line.trim());
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            let path = match words[..] {
                [_, "=>", path, _] | [path, _] if path.starts_with('/') => path,
                _ => continue,
            };
            // What is a link on this machine is a file in the image, at the path where it is looked for.
            found.insert(PathBuf::from(path));
        }
    }
    if found.is_empty() {
        return Err(anyhow!("ldd names no libraries"));
    }
    Ok(found)
}
