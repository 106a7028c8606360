//! Namespaces of the bench's own, so that nothing of the machine's is touched and all ends with the process.

use std::fs;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use sluice_cni::netlink::Netlink;
use sluice_cni::requests;

/// Moves the calling thread, and what it starts from now on, into a network and a mount namespace with an empty `/run`
/// and forwarding switched on.
///
/// # Errors
/// Not root, or what the kernel refused.
pub fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .context("making namespaces for the bench (run it as root)")?;
    let nothing = None::<&str>;
    mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        nothing,
    )
    .context("making mounts private")?;
    mount(
        Some("bench"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .context("mounting a tmpfs at /run")?;
    Netlink::open()?.batch(&[requests::set_up("lo")])?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")
        .context("switching forwarding on in the bench's namespace")
}
