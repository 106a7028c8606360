//! The network namespaces whose sockets the programs serve: the host's own, and those of its pods.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use sluice_cni::netns::Netns;

/// Says where the namespaces of this node's pods are, now; one that is gone by the time it is opened is no trouble.
#[derive(Clone)]
pub struct PodNamespaces(Arc<dyn Fn() -> Vec<PathBuf> + Send + Sync>);

impl PodNamespaces {
    /// Asks `list` each time.
    pub fn new(list: impl Fn() -> Vec<PathBuf> + Send + Sync + 'static) -> Self {
        Self(Arc::new(list))
    }

    /// None: only the host's own sockets are looked after.
    #[must_use]
    pub fn none() -> Self {
        Self::new(Vec::new)
    }

    /// Runs `act` in the thread's own namespace, and in that of each pod in turn.
    pub(super) fn each(&self, mut act: impl FnMut()) {
        act();
        for path in (self.0)() {
            let acted = Netns::open(&path).and_then(|namespace| {
                let _inside = namespace.enter()?;
                act();
                Ok(())
            });
            if let Err(error) = acted {
                // Pods go at any time.
                tracing::debug!(%error, "a pod's namespace cannot be entered");
            }
        }
    }
}

/// The cookie of the network namespace this thread is in (`SO_NETNS_COOKIE`, Linux 5.14).
pub(super) fn cookie() -> Result<u64> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("opening a socket to ask for the network namespace's cookie")?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("asking for the network namespace's cookie");
    }
    Ok(cookie)
}
