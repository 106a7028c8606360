//! The process that holds a node: makes its namespaces, furnishes them, then reaps orphans until it is killed.
//!
//! Two stages, because a PID namespace only takes in children: the first makes the namespaces and starts the second,
//! which is number 1 inside. When that one dies the kernel kills all that runs in the node, and with the last process go
//! mounts, interfaces and BPF pins. It starts nothing itself.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};
use serde::{Deserialize, Serialize};

use crate::{cgroup, mounts, state};

/// What the process is to make, handed from `up` as JSON in an argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// The lab's name.
    pub lab: String,
    /// The member's name, which becomes the host name.
    pub member: String,
    /// The lab's folder for this member.
    pub directory: PathBuf,
    /// The folder with Sluice's binaries.
    pub binaries: PathBuf,
    /// Lines for `/etc/hosts`.
    pub hosts: String,
    /// Whether this is a node, with manifests and room for a CNI plugin.
    pub is_node: bool,
}

/// What the second stage says when the node is furnished.
const READY: &str = "ready";

/// Starts a member and gives its number 1 process.
///
/// # Errors
/// What the stages reported.
pub fn start(spec: &Spec) -> Result<state::Process> {
    let binary = spec.binaries.join("sluice-lab");
    let output = Command::new(&binary)
        .args(["node-init", &serde_json::to_string(spec)?])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", binary.display()))?;
    if !output.status.success() {
        bail!(
            "making the namespaces of {}: {}",
            spec.member,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let pid = String::from_utf8_lossy(&output.stdout);
    let pid = pid
        .trim()
        .parse()
        .with_context(|| format!("{pid:?} is not a process number"))?;
    state::Process::of(pid)
}

/// The first stage, outside: prints the number of the second one and ends.
///
/// # Errors
/// The kernel's, or what the second stage reported.
pub fn first_stage(spec_json: &str) -> Result<()> {
    let spec: Spec = serde_json::from_str(spec_json).context("reading the member's spec")?;
    cgroup::join(&cgroup::of_lab(&spec.lab)?.join(&spec.member))?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWPID;
    unshare(namespaces).context("unsharing namespaces (the lab needs root and a kernel with all of them)")?;
    let log_path = spec.directory.join("init.log");
    let log = File::create(&log_path).with_context(|| format!("creating {}", log_path.display()))?;
    let binary = std::env::current_exe().context("finding this binary")?;
    let mut child = Command::new(binary)
        .args(["node-pid1", spec_json])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("starting process 1 of the node")?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| anyhow!("no pipe to process 1"))?;
    let mut line = String::new();
    BufReader::new(stdout)
        .read_line(&mut line)
        .context("waiting for process 1 of the node")?;
    if line.trim() != READY {
        // It ended, or is about to: collect it and pass on what it said.
        let _ = child.wait();
        let said = std::fs::read_to_string(&log_path).unwrap_or_default();
        bail!("{}", said.trim());
    }
    println!("{}", child.id());
    Ok(())
}

/// The second stage, process 1 inside: furnishes the node, says so and reaps until killed.
///
/// # Errors
/// The kernel's, while furnishing; after that it does not return.
pub fn second_stage(spec_json: &str) -> Result<()> {
    let spec: Spec = serde_json::from_str(spec_json).context("reading the member's spec")?;
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block().context("blocking SIGCHLD")?;
    setsid().context("leaving the terminal")?;
    mounts::furnish(&spec)?;
    println!("{READY}");
    std::io::stdout()
        .flush()
        .context("telling that the node is furnished")?;
    loop {
        children.wait().context("waiting for SIGCHLD")?;
        reap()?;
    }
}

fn reap() -> Result<()> {
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("reaping orphans"),
        }
    }
}
