//! A cgroup of the bench's own, so that no program is attached to one with anybody else in it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sluice_daemon::mounts;

/// A cgroup for the programs to be attached to; nobody is in it.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Below the one this process is in.
    ///
    /// # Errors
    /// There is no cgroup v2 here, or none can be made.
    pub fn make() -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let name = format!("sluice-bench-{}", std::process::id());
        let path = mounts::cgroup2()?
            .join(own.context("this process is in no cgroup v2")?)
            .join(name);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("sluice-bench: removing {}: {error}", self.0.display());
        }
    }
}
