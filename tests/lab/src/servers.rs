//! Servers of others on the lab's hosts: found, started, signalled.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::state::Record;
use crate::{cgroup, state, up};

/// Where `./dev setup` puts what it builds and fetches for the lab.
pub(crate) fn cache() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    cache.or_else(home).map(|cache| cache.join("sluice"))
}

/// The program called `name` in the first of `folders` that has it.
///
/// # Errors
/// None has.
pub(crate) fn program(name: &str, folders: impl IntoIterator<Item = PathBuf>) -> Result<String> {
    let folders: Vec<PathBuf> = folders.into_iter().collect();
    folders
        .iter()
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
        .map(|program| program.display().to_string())
        .ok_or_else(|| anyhow!("no {name} in any of {folders:?}"))
}

/// Starts a server in the background, its log in `/var/log` of the host.
///
/// # Errors
/// It cannot be started.
pub(crate) fn launch(
    record: &Record,
    member: &str,
    name: &str,
    program: &str,
    arguments: &[String],
) -> Result<()> {
    let log = format!("/var/log/{name}.log");
    let command: Vec<&str> = std::iter::once(program)
        .chain(arguments.iter().map(String::as_str))
        .collect();
    up::must(record, member, &["--detach-to", &log], &command).map(drop)
}

/// Sends a signal to the server that has the argument `mark`, and after SIGKILL waits for its end.
///
/// # Errors
/// It does not run.
pub(crate) fn signal(record: &Record, member: &str, mark: &str, signal: Signal) -> Result<()> {
    let group = cgroup::of_lab(&record.options.name)?.join(member);
    let pid = cgroup::processes(&group).into_iter().find(|pid| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).any(|word| word == mark.as_bytes())
    });
    let pid = pid.ok_or_else(|| anyhow!("nothing with {mark} runs on {member}"))?;
    kill(Pid::from_raw(pid), signal).with_context(|| format!("signalling process {pid}"))?;
    // Its ports are free when its last thread is gone; only then it is reaped.
    while signal == Signal::SIGKILL && Path::new(&format!("/proc/{pid}")).exists() {
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The last lines of a server's log.
pub(crate) fn log_end(record: &Record, member: &str, name: &str, lines: usize) -> String {
    let path = state::logs(&record.options.name, member).join(format!("{name}.log"));
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
