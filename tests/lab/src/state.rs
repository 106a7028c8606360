//! What a lab keeps on the machine: the folder `/run/sluice-lab/<lab>` and the record in it.
//!
//! A process is remembered with its start time: a number alone may be somebody else's by now.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::options::Options;
use crate::plan::Host;

/// Where all labs keep their state.
pub const ROOT: &str = "/run/sluice-lab";

/// A lab as it was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// What was asked for.
    pub options: Options,
    /// The folder the binaries came from.
    pub binaries: PathBuf,
    /// Whether everything that was asked for came up.
    pub complete: bool,
    /// Fabric, client and nodes, as far as they were made.
    pub members: Vec<Member>,
}

/// One namespace bundle and the process that holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Member {
    /// Name and addresses; the fabric has none.
    pub host: Host,
    /// The process that is number 1 inside.
    pub init: Process,
}

/// A process that cannot be mistaken for a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its start, in clock ticks since boot.
    pub start: u64,
}

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none.
    pub fn of(pid: i32) -> Result<Self> {
        let start = start_time(pid).with_context(|| format!("reading the start time of process {pid}"))?;
        Ok(Self { pid, start })
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_time(self.pid).is_ok_and(|start| start == self.start)
    }

    /// A path as the process sees it, reached from outside.
    #[must_use]
    pub fn root(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }
}

fn start_time(pid: i32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything: count from its end.
    let (_, after) = stat
        .rsplit_once(')')
        .ok_or_else(|| anyhow!("{stat:?} has no name in it"))?;
    let mut fields = after.split_whitespace();
    if fields.next() == Some("Z") {
        return Err(anyhow!("it has ended"));
    }
    let field = fields
        .nth(18)
        .ok_or_else(|| anyhow!("{stat:?} has no 22nd field"))?;
    Ok(field.parse()?)
}

/// The folder of the lab called `name`.
#[must_use]
pub fn directory(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// The folder of manifests that all nodes of the lab see as `/etc/sluice/manifests`.
#[must_use]
pub fn manifests(name: &str) -> PathBuf {
    directory(name).join("manifests")
}

/// The folder a member sees as `/var/log`.
#[must_use]
pub fn logs(name: &str, member: &str) -> PathBuf {
    directory(name).join("hosts").join(member).join("log")
}

impl Record {
    /// Reads the record of the lab called `name`.
    ///
    /// # Errors
    /// There is no such lab, or it was left half-made; says what to do.
    pub fn load(name: &str) -> Result<Self> {
        crate::options::check_name("lab name", name)?;
        let path = directory(name).join("lab.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(anyhow!(
                    "there is no lab called {name:?}; make it with: up --name {name}"
                ));
            }
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is not a lab's record; remove the lab with: down --name {name}",
                path.display()
            )
        })
    }

    /// Writes the record.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        write_by_rename(&directory(&self.options.name).join("lab.json"), &text)
    }

    /// The member called `name`, if it runs.
    ///
    /// # Errors
    /// There is none of that name, or its process is gone.
    pub fn member(&self, name: &str) -> Result<&Member> {
        let lab = &self.options.name;
        let member = self
            .members
            .iter()
            .find(|member| member.host.name == name)
            .ok_or_else(|| {
                let known: Vec<_> = self.members.iter().map(|m| m.host.name.as_str()).collect();
                anyhow!("lab {lab:?} has no host {name:?}; it has {}", known.join(", "))
            })?;
        if !member.init.is_alive() {
            return Err(anyhow!(
                "{name} of lab {lab:?} is dead (process {} is gone); remove the lab with: down --name {lab}",
                member.init.pid
            ));
        }
        Ok(member)
    }

    /// The nodes: neither fabric nor client.
    pub fn nodes(&self) -> impl Iterator<Item = &Member> {
        self.members
            .iter()
            .filter(|member| !member.host.pod_cidrs.is_empty())
    }
}

/// Writes a file so that readers see the old or the new content, never part of it.
///
/// # Errors
/// The file system's, with the path.
pub fn write_by_rename(path: &Path, text: &str) -> Result<()> {
    let name = path
        .file_name()
        .ok_or_else(|| anyhow!("{} has no file name", path.display()))?
        .to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
    fs::write(&temporary, text).with_context(|| format!("writing {}", temporary.display()))?;
    fs::rename(&temporary, path)
        .with_context(|| format!("renaming {} to {}", temporary.display(), path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_number_and_start() {
        let own = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.is_alive());
        let later = Process {
            start: own.start + 1,
            ..own
        };
        assert!(!later.is_alive(), "another process of the same number");
    }
}
