//! Running a command inside a node (or one of its pods), in the foreground or left behind.
//!
//! The calling process moves itself: into the cgroup first, then into the namespaces, the mounts last. That takes a
//! process with one thread, so libraries go through the `sluice-lab` binary. It does not come back out.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

use crate::cgroup;
use crate::options::check_name;
use crate::state::{Member, Record};

/// What programs in a node find in `PATH`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where to run something.
#[derive(Debug, Clone)]
pub struct Place {
    /// The lab's name.
    pub lab: String,
    /// A node, or the client.
    pub member: String,
    /// One of the node's pods.
    pub pod: Option<String>,
    /// Leave it running, its output in this file (a path inside the node).
    pub detach_to: Option<PathBuf>,
}

/// Runs `command` there and gives its exit code, 128 and the signal if it was killed.
///
/// # Errors
/// There is no such place, or the command cannot be started.
pub fn run(place: &Place, command: &[String]) -> Result<i32> {
    let (program, arguments) = command.split_first().ok_or_else(|| anyhow!("no command given"))?;
    let record = Record::load(&place.lab)?;
    let member = record.member(&place.member)?;
    let working_directory = std::env::current_dir().ok();
    let mut group = cgroup::of_lab(&place.lab)?.join(&place.member);
    if let Some(pod) = &place.pod {
        check_name("pod name", pod)?;
        group = group.join("pods").join(pod);
    }
    cgroup::join(&group)?;
    enter(member)?;
    if let Some(pod) = &place.pod {
        let path = Path::new("/run/netns").join(pod);
        let netns = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        setns(&netns, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering the pod {pod}"))?;
    }
    // Relative paths on the command line go on meaning the same where the folder exists in the node.
    if let Some(directory) = working_directory.filter(|directory| directory.is_dir()) {
        std::env::set_current_dir(directory).context("keeping the working directory")?;
    }
    let mut inside = Command::new(program);
    inside.args(arguments).env("PATH", PATH);
    for (name, _) in std::env::vars_os() {
        // The caller's would override the node's own configuration.
        if name.to_string_lossy().starts_with("SLUICE_") {
            inside.env_remove(name);
        }
    }
    match &place.detach_to {
        Some(log) => detach(inside, log),
        None => foreground(inside),
    }
    .with_context(|| format!("running {program:?} on {}", place.member))
}

fn enter(member: &Member) -> Result<()> {
    let open = |kind: &str| {
        let path = format!("/proc/{}/ns/{kind}", member.init.pid);
        File::open(&path).with_context(|| format!("opening {path}"))
    };
    // All are opened before the first is entered: afterwards /proc is another one.
    let namespaces = [
        (open("cgroup")?, CloneFlags::CLONE_NEWCGROUP),
        (open("uts")?, CloneFlags::CLONE_NEWUTS),
        (open("ipc")?, CloneFlags::CLONE_NEWIPC),
        (open("net")?, CloneFlags::CLONE_NEWNET),
        (open("pid")?, CloneFlags::CLONE_NEWPID),
        (open("mnt")?, CloneFlags::CLONE_NEWNS),
    ];
    for (file, kind) in namespaces {
        setns(&file, kind).with_context(|| format!("entering {} ({kind:?})", member.host.name))?;
    }
    Ok(())
}

fn foreground(mut command: Command) -> Result<i32> {
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            // Whoever kills the caller means the command: without this it would go on unseen inside the node.
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(Into::into)
        });
    }
    let status = command.status()?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

fn detach(mut command: Command, log: &Path) -> Result<i32> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let output = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("opening {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into));
    }
    let mut child = command.spawn()?;
    if let Some(status) = child.try_wait()? {
        bail!("it ended at once: {status}");
    }
    Ok(0)
}
