//! Removing a lab from whatever state it is in, and finding what a lab left behind.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};

use crate::options::check_name;
use crate::{cgroup, mounts, state};

/// Removes every trace of the lab called `name`; that there is none is fine. Says whether there was something.
///
/// # Errors
/// What could not be removed and why; running it again goes on where it stopped.
pub fn down(name: &str) -> Result<bool> {
    check_name("lab name", name)?;
    let folder = state::directory(name);
    // The cgroup, not the record, says what runs: a half-made lab has no record, a damaged one cannot be trusted.
    let group = cgroup::of_lab(name).ok();
    let existed = folder.exists() || group.as_ref().is_some_and(|group| group.exists());
    if let Some(group) = &group {
        cgroup::kill_and_remove(group)?;
        cgroup::remove_root_if_empty();
    }
    remove_folder(&folder)?;
    // Fails while another lab is up: as it should.
    let _ = fs::remove_dir(state::ROOT);
    Ok(existed)
}

/// Removes every lab there is.
///
/// # Errors
/// As [`down`].
pub fn down_all() -> Result<()> {
    let mut names = BTreeSet::new();
    let folders = fs::read_dir(state::ROOT).into_iter().flatten().flatten();
    names.extend(folders.map(|entry| entry.file_name()));
    if let Ok(root) = cgroup::all_labs() {
        let groups = cgroup::children(&root);
        names.extend(
            groups
                .iter()
                .filter_map(|group| group.file_name().map(OsString::from)),
        );
    }
    for name in names {
        down(&name.to_string_lossy())?;
    }
    Ok(())
}

/// Removes what a member that left had; its processes die.
pub(crate) fn remove_member(lab: &str, member: &str) -> Result<()> {
    cgroup::kill_and_remove(&cgroup::of_lab(lab)?.join(member))?;
    remove_folder(&state::directory(lab).join("hosts").join(member))
}

fn remove_folder(folder: &Path) -> Result<()> {
    for place in mounts::mounts_below(&folder.to_string_lossy())? {
        umount2(&place, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", place.display()))?;
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.with_context(|| format!("removing {}", folder.display())),
    }
}

/// Everything labs have left on the machine, one line each.
///
/// # Errors
/// The machine cannot be looked at.
pub fn leftovers() -> Result<Vec<String>> {
    let mut found = Vec::new();
    if let Ok(entries) = fs::read_dir(state::ROOT) {
        for entry in entries.flatten() {
            found.push(format!("folder {}", entry.path().display()));
        }
    }
    for place in mounts::mounts_below(state::ROOT)? {
        found.push(format!("mount {}", place.display()));
    }
    if let Ok(root) = cgroup::all_labs() {
        for group in cgroup::children(&root) {
            found.push(format!("cgroup {}", group.display()));
        }
    }
    found.extend(processes()?);
    // A daemon that escaped its node would have done these to the machine itself.
    for path in ["/sys/fs/bpf/sluice", "/run/sluice"] {
        if Path::new(path).exists() {
            found.push(format!("folder {path}"));
        }
    }
    for entry in fs::read_dir("/sys/class/net")
        .context("listing the machine's interfaces")?
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("sluice") || name.starts_with("slc") {
            found.push(format!("interface {name}"));
        }
    }
    Ok(found)
}

/// Processes that hold or serve a node, wherever they are by now.
fn processes() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")
        .context("listing the machine's processes")?
        .flatten()
    {
        let Ok(command) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let words: Vec<String> = command
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let is_lab = words
            .first()
            .is_some_and(|program| program.ends_with("sluice-lab"));
        let serves = words.get(1).is_some_and(|verb| {
            ["node-init", "node-pid1", "supervise", "udp-name", "exec"].contains(&verb.as_str())
        });
        if is_lab && serves {
            let number = entry.file_name().to_string_lossy().into_owned();
            found.push(format!("process {number}: sluice-lab {}", words[1]));
        }
    }
    Ok(found)
}

/// Fails with a list if labs have left something on the machine.
///
/// # Errors
/// Something was left.
pub fn check_leftovers() -> Result<()> {
    let found = leftovers()?;
    if !found.is_empty() {
        bail!("labs have left this behind:\n  {}", found.join("\n  "));
    }
    Ok(())
}
