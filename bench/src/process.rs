//! What a process on a node of the lab takes, as the kernel counts it.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use sluice_lab::{Lab, wait_until};

/// How long a process may take to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process, as the machine numbers it.
#[derive(Debug, Clone, Copy)]
pub struct Process(i32);

impl Process {
    /// The one on `node` whose program is called `name`, which may just be being started.
    ///
    /// # Errors
    /// It does not run.
    pub fn find(lab: &Lab, node: &str, name: &str) -> Result<Self> {
        let is_it = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|found| found.trim() == name)
        };
        let mut found = None;
        wait_until(&format!("{name} runs on {node}"), PATIENCE, || {
            found = lab.node(node).processes().into_iter().find(is_it);
            Ok(found.is_some())
        })?;
        found.map(Self).context("it ran a moment ago")
    }

    /// A line of its memory, `VmRSS:` or `VmHWM:`, in kilobytes.
    ///
    /// # Errors
    /// It ended.
    pub fn memory(self, line: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let found = status.lines().find_map(|text| text.strip_prefix(line));
        let kilobytes = found.and_then(|text| text.trim().strip_suffix(" kB"));
        Ok(kilobytes
            .with_context(|| format!("no {line} of process {}", self.0))?
            .parse()?)
    }

    /// The processor's time that it has used, in hundredths of a second (proc(5), `utime` and `stime`).
    ///
    /// # Errors
    /// It ended.
    pub fn ticks(self) -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        let (_, fields) = stat.rsplit_once(')').context("a stat without a name")?;
        let mut fields = fields.split_whitespace().skip(11);
        let mut next = || -> Result<u64> { Ok(fields.next().context("a short stat")?.parse()?) };
        Ok(next()? + next()?)
    }

    /// What the kernel holds of the BPF maps that it has open, in kilobytes (kernel/bpf/syscall.c, `bpf_map_show_fdinfo`).
    ///
    /// # Errors
    /// It ended.
    pub fn maps(self) -> Result<u64> {
        let mut maps = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", self.0))? {
            // One that was closed meanwhile is none.
            let info = fs::read_to_string(entry?.path()).unwrap_or_default();
            let line = |name: &str| -> Option<u64> {
                let found = info.lines().find_map(|line| line.strip_prefix(name));
                found?.trim().parse().ok()
            };
            // The same map may be open more than once.
            if let (Some(map), Some(bytes)) = (line("map_id:"), line("memlock:")) {
                maps.insert(map, bytes);
            }
        }
        Ok(maps.values().sum::<u64>() / 1024)
    }
}
