//! Keeps one process running on a node, as a kubelet keeps the daemon's pod: when it dies it is started again.
//!
//! Runs inside the node. The process's number is in [`PID_FILE`], so that it can be killed by number; the supervisor's
//! own is beside it, so that it can be told to stop.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

/// The number, inside the node, of the supervised process.
pub const PID_FILE: &str = "/run/supervised.pid";
/// The number, inside the node, of the supervisor.
pub const SUPERVISOR_PID_FILE: &str = "/run/supervisor.pid";
/// How lines begin that say that the process ended.
pub const ENDED: &str = "lab:";
/// How long after its death the process is started again.
const PAUSE: Duration = Duration::from_millis(200);

/// Runs `command` again and again until killed.
///
/// # Errors
/// It cannot be started at all.
pub fn supervise(command: &[String]) -> Result<()> {
    let (program, arguments) = command.split_first().ok_or_else(|| anyhow!("no command given"))?;
    write_number(SUPERVISOR_PID_FILE, std::process::id())?;
    loop {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        write_number(PID_FILE, child.id())?;
        let status = child.wait().with_context(|| format!("waiting for {program}"))?;
        // Gone before the process can be taken for running, so that nobody kills a number that is free again.
        let _ = fs::remove_file(PID_FILE);
        eprintln!("{ENDED} {program} ended ({status}); it is started again in {PAUSE:?}");
        sleep(PAUSE);
    }
}

fn write_number(path: &str, number: u32) -> Result<()> {
    crate::state::write_by_rename(path.as_ref(), &number.to_string())
}
