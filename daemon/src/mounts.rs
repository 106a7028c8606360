//! Where the kernel's own file systems are mounted, found in `/proc/self/mountinfo` and never assumed: cgroup2 sits
//! elsewhere on hosts that still have version 1 beside it, and inside a container.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::mount::{MsFlags, mount};

/// Where pinned maps, programs and links lie; a bpffs is mounted there if none is.
pub const BPFFS: &str = "/sys/fs/bpf";

/// The top of the cgroup2 tree as far as this process sees it: programs attached there see the sockets of all pods
/// and of the host.
///
/// # Errors
/// No cgroup2 is mounted; the text says how to mount one.
pub fn cgroup2() -> anyhow::Result<PathBuf> {
    let table = mount_table()?;
    match highest_cgroup2(&table) {
        Some(path) => Ok(path),
        None => bail!(
            "no cgroup2 file system is mounted, and Services are translated by programs attached to its root; \
             run: mount -t cgroup2 none /sys/fs/cgroup/unified"
        ),
    }
}

/// Sees to a bpffs at [`BPFFS`].
///
/// # Errors
/// The kernel refuses the mount.
pub fn ensure_bpffs() -> anyhow::Result<()> {
    let there = mount_table()?
        .lines()
        .filter_map(Mount::parse)
        .any(|m| m.kind == "bpf" && m.point == Path::new(BPFFS));
    if there {
        return Ok(());
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(io::Error::from)
        .with_context(|| format!("mounting a bpf file system on {BPFFS}"))?;
    tracing::info!(path = BPFFS, "mounted a bpf file system");
    Ok(())
}

fn mount_table() -> anyhow::Result<String> {
    fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")
}

/// One line of mountinfo (proc_pid_mountinfo(5)).
struct Mount<'a> {
    /// The folder within the file system that is seen at the mount point.
    root: &'a str,
    point: PathBuf,
    kind: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ').skip(3);
        Some(Self {
            root: fields.next()?,
            point: PathBuf::from(unescape(fields.next()?)),
            kind: right.split(' ').next()?,
        })
    }
}

/// Undoes the octal escapes of blanks and backslashes.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// Inside a cgroup namespace, a host's folder mounted from outside shows a root of `/..` for each level it is above
/// the namespace's own: the highest is the host's.
fn highest_cgroup2(table: &str) -> Option<PathBuf> {
    table
        .lines()
        .filter_map(Mount::parse)
        .filter(|mount| mount.kind == "cgroup2")
        .filter(|mount| {
            mount
                .root
                .trim_end_matches('/')
                .split('/')
                .skip(1)
                .all(|part| part == "..")
        })
        .max_by_key(|mount| mount.root.matches("..").count())
        .map(|mount| mount.point)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_tree_is_preferred_and_a_mere_branch_is_not_taken() {
        let table = "\
30 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro
31 30 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
32 30 0:27 /user.slice /mnt/branch rw - cgroup2 cgroup2 rw
";
        assert_eq!(
            highest_cgroup2(table),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        let contained = format!("{table}40 24 0:27 /../.. /host/my\\040cgroup rw - cgroup2 cgroup2 rw\n");
        assert_eq!(
            highest_cgroup2(&contained),
            Some(PathBuf::from("/host/my cgroup"))
        );
        assert_eq!(
            highest_cgroup2("31 30 0:27 / /sys/fs/cgroup rw - cgroup cgroup rw,cpu\n"),
            None
        );
    }
}
