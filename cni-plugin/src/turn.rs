//! Waiting in line to make a pod's pair.
//!
//! Whoever wires a pod takes the kernel's one lock for all of network configuration (`rtnl`) a dozen times, for half of an ADD in all. Of
//! many who do so at the same time each gets on a little at a time, while others spin for the lock, and all end late. In line, each ends as soon
//! as it can, and those who wait cost nothing.
//!
//! It is for speed alone: who cannot wait, or has waited long, goes on all the same.

use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::alarm;

/// The file beside the address store whose lock is the turn. A call that dies gives it back thereby.
const FILE: &str = "turn";

/// How long a turn is waited for, in seconds. A node's 250 pods take a fifth of that; one who is stopped keeps others no longer.
const PATIENCE: u32 = 1;

/// A turn, until it is dropped; or none, for who goes on without.
#[derive(Debug)]
#[must_use = "a turn that is dropped is over"]
pub struct Turn(#[expect(dead_code, reason = "held for its lock")] Option<Flock<File>>);

impl Turn {
    /// Waits for a turn among those who use the address store at `ipam_directory`.
    pub fn wait(ipam_directory: &Path) -> Self {
        Self(take(&ipam_directory.with_file_name(FILE)))
    }
}

fn take(path: &Path) -> Option<Flock<File>> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600);
    let file = options.open(path).ok()?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(turn) => return Some(turn),
        Err((file, _)) => file,
    };
    // Without a handler the signal would end the process; with this one it ends the wait, and nothing else.
    let action = SigAction::new(SigHandler::Handler(come_again), SaFlags::empty(), SigSet::empty());
    // SAFETY: all that the handler calls is alarm(2), which is safe in one (signal-safety(7)).
    unsafe { sigaction(Signal::SIGALRM, &action) }.ok()?;
    // What the runtime blocks is blocked here too.
    SigSet::from_iter([Signal::SIGALRM]).thread_unblock().ok()?;
    alarm::set(PATIENCE);
    let turn = Flock::lock(file, FlockArg::LockExclusive).ok();
    alarm::cancel();
    turn
}

/// A signal that comes before the wait has begun does not end it: the next one does.
extern "C" fn come_again(_: c_int) {
    alarm::set(PATIENCE);
}
