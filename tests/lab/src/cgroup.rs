//! The lab's subtree of the machine's cgroup v2 hierarchy: making, joining, killing, removing.
//!
//! A cgroup is also how everything a lab started is found again, with or without its record: nothing leaves its cgroup
//! by dying parents or double forks. Only folders below `sluice-lab` are ever touched.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// How often something is made again below a folder that others remove when they find it empty.
pub const TRIES: usize = 50;

/// The subtree's name.
const SUBTREE: &str = "sluice-lab";

/// Where cgroup v2 is mounted here: alone on modern hosts, beside the v1 controllers on others.
///
/// # Errors
/// It is not mounted.
pub fn mount_point() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    find_mount(&table).ok_or_else(|| {
        anyhow!("no cgroup v2 is mounted here; mount it with: mount -t cgroup2 none /sys/fs/cgroup")
    })
}

fn find_mount(table: &str) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let is_v2 = file_system.split(' ').next() == Some("cgroup2");
        let place = mount.split(' ').nth(4)?;
        is_v2.then(|| PathBuf::from(place))
    })
}

/// The cgroup of a lab.
///
/// # Errors
/// cgroup v2 is not mounted.
pub fn of_lab(lab: &str) -> Result<PathBuf> {
    Ok(all_labs()?.join(lab))
}

/// The cgroup above those of all labs.
///
/// # Errors
/// cgroup v2 is not mounted.
pub fn all_labs() -> Result<PathBuf> {
    Ok(mount_point()?.join(SUBTREE))
}

/// Moves the calling process into `group`, which is made if it is not there.
///
/// # Errors
/// The kernel's, with the cgroup.
pub fn join(group: &Path) -> Result<()> {
    // The last lab that goes takes the cgroup above all labs with it, perhaps just before this one's is made in it.
    let made = (0..TRIES).map(|_| fs::create_dir_all(group));
    let done = |made: &io::Result<()>| !matches!(made, Err(error) if error.kind() == io::ErrorKind::NotFound);
    made.into_iter()
        .find(done)
        .unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))
        .with_context(|| format!("making the cgroup {}", group.display()))?;
    fs::write(group.join("cgroup.procs"), "0")
        .with_context(|| format!("moving this process into the cgroup {}", group.display()))
}

/// Whether a process lives in `group` or below.
#[must_use]
pub fn is_populated(group: &Path) -> bool {
    fs::read_to_string(group.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

/// Kills all processes in `group` and below, waits until they are gone and removes the cgroups. Nothing there is fine.
///
/// # Errors
/// Something survives, or the kernel refuses; says what.
pub fn kill_and_remove(group: &Path) -> Result<()> {
    if !group.is_dir() {
        return Ok(());
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while is_populated(group) {
        // One write kills all of them at once, and none that the kernel does not count in.
        fs::write(group.join("cgroup.kill"), "1")
            .with_context(|| format!("killing the processes of the cgroup {}", group.display()))?;
        if Instant::now() > deadline {
            let left = processes(group);
            bail!("processes {left:?} of the cgroup {} do not die", group.display());
        }
        sleep(Duration::from_millis(5));
    }
    loop {
        match remove_tree(group) {
            // Just after the last process died the kernel may still call it busy.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                sleep(Duration::from_millis(5));
            }
            result => {
                return result.with_context(|| format!("removing the cgroup {}", group.display()));
            }
        }
    }
}

/// The processes in `group` and below.
#[must_use]
pub fn processes(group: &Path) -> Vec<i32> {
    let own = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<i32> = own.lines().filter_map(|line| line.parse().ok()).collect();
    for child in children(group) {
        found.extend(processes(&child));
    }
    found
}

/// The cgroups just below `group`.
#[must_use]
pub fn children(group: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_tree(group: &Path) -> io::Result<()> {
    for child in children(group) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes the cgroup above all labs if none is left in it.
pub fn remove_root_if_empty() {
    if let Ok(root) = all_labs() {
        // Fails while another lab is up: as it should.
        let _ = fs::remove_dir(root);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_v2_tree_is_found_beside_v1_controllers() {
        let hybrid = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_mount("22 27 0:21 / /proc rw - proc proc rw\n"), None);
    }
}
