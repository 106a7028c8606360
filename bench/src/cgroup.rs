//! Cgroups of the bench's own, so that no program is attached to one with anybody else in it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sluice_daemon::mounts;

use crate::hosts::Host;

/// A cgroup for programs to be attached to.
pub struct Cgroup {
    path: PathBuf,
}

/// How long threads that were told to end may take.
const PATIENCE: Duration = Duration::from_secs(5);

impl Cgroup {
    /// Below the one this process is in; nobody is in it.
    ///
    /// # Errors
    /// There is no cgroup v2 here, or none can be made.
    pub fn make() -> Result<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let own = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let above = mounts::cgroup2()?.join(own.context("this process is in no cgroup v2")?);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = above.join(format!("sluice-bench-{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path })
    }

    /// The same for single threads of this process, which are [taken](Self::take) into it.
    ///
    /// # Errors
    /// As [`make`](Self::make), or the cgroup above has others below it that hold whole processes
    /// (Documentation/admin-guide/cgroup-v2.rst, "Threads").
    pub fn threaded() -> Result<Self> {
        let cgroup = Self::make()?;
        let kind = cgroup.path.join("cgroup.type");
        fs::write(&kind, "threaded").with_context(|| format!("writing threaded to {}", kind.display()))?;
        Ok(cgroup)
    }

    /// Has sockets that `host` opens from now on belong to it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn take(&self, host: &Host) -> Result<()> {
        let threads = self.path.join("cgroup.threads");
        host.run(move || {
            let id = nix::unistd::gettid().to_string();
            fs::write(&threads, id).with_context(|| format!("writing a thread to {}", threads.display()))
        })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let began = Instant::now();
        // Threads in it end with their hosts, and soon after.
        while let Err(error) = fs::remove_dir(&self.path) {
            if error.kind() != ErrorKind::ResourceBusy || began.elapsed() > PATIENCE {
                eprintln!("sluice-bench: removing {}: {error}", self.path.display());
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}
