//! UDP sockets that are connected already when a Service changes.
//!
//! A connected UDP socket sends wherever it was connected to, without asking again. One that talks to an endpoint its
//! Service has lost, or to a frontend from before it was one, is destroyed: its next call fails, and the client connects
//! anew. A thread of its own looks for them, the host's and every pod's, because many pods take a while, and Services
//! must not wait. It decides by the kernel's tables, which are in force before it is told.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use sluice_ebpf_types::{FrontendKey, MemberKey, PeerKey, UDP};

use super::namespaces::PodNamespaces;
use super::services::Upheaval;
use super::sock_diag::Connected;
use super::tables::SocketTables;

/// Between a change and the look at all sockets. A question that is on its way when its endpoint leaves is still answered; a client
/// whose endpoint is dead learns of it that much later. What changes meanwhile is seen to in one go.
const GRACE: Duration = Duration::from_millis(300);

/// The way to tell the thread, which ends when this is dropped.
pub(super) struct StaleSockets(Sender<Upheaval>);

impl StaleSockets {
    /// Starts the thread; it works on the tables pinned in `maps`.
    ///
    /// # Errors
    /// A table cannot be opened, or no thread started.
    pub fn start(maps: &Path, pods: PodNamespaces) -> Result<Self> {
        let tables = SocketTables::open(maps)?;
        let (sender, receiver) = channel();
        thread::Builder::new()
            .name("stale-sockets".to_owned())
            .spawn(move || run(&receiver, &tables, &pods))
            .context("starting the thread that looks for stale UDP sockets")?;
        Ok(Self(sender))
    }

    /// Has the sockets looked at that `upheaval` may have left talking to the wrong place.
    pub fn look(&self, upheaval: Upheaval) {
        // The thread ends only with this sender.
        let _ = self.0.send(upheaval);
    }
}

fn run(upheavals: &Receiver<Upheaval>, tables: &SocketTables, pods: &PodNamespaces) {
    while let Ok(mut upheaval) = upheavals.recv() {
        thread::sleep(GRACE);
        for more in upheavals.try_iter() {
            upheaval.new_udp_frontends.extend(more.new_udp_frontends);
        }
        pods.each(|| {
            // A kernel without sock_diag must not keep Services from being served.
            if let Err(error) = destroy_stale(tables, &upheaval.new_udp_frontends) {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot look for UDP sockets whose endpoint went"
                );
            }
        });
    }
}

/// Destroys those of the thread's namespace.
fn destroy_stale(tables: &SocketTables, new_frontends: &BTreeSet<FrontendKey>) -> Result<()> {
    for socket in Connected::all()? {
        if !is_stale(&socket, tables, new_frontends)? {
            continue;
        }
        match socket.destroy() {
            Ok(true) => {
                tracing::info!(peer = %socket.peer().to_ip(), "UDP socket closed: its endpoint went");
            }
            Ok(false) => {}
            // The client's own time-out must do.
            Err(error) => tracing::warn!(%error, "cannot close a UDP socket whose endpoint went"),
        }
    }
    Ok(())
}

fn is_stale(
    socket: &Connected,
    tables: &SocketTables,
    new_frontends: &BTreeSet<FrontendKey>,
) -> Result<bool> {
    let (address, port) = (socket.peer(), socket.peer_port());
    let peer = PeerKey {
        cookie: socket.cookie(),
        address,
        port,
        zero: [0; 3],
    };
    let frontend = |address, port| FrontendKey {
        address,
        port,
        protocol: UDP,
        zero: 0,
    };
    let Some(named) = tables.peers.get(&peer)? else {
        return Ok(new_frontends.contains(&frontend(address, port)));
    };
    let Some(leads) = tables.frontends.get(&frontend(named.address, named.port))? else {
        return Ok(true);
    };
    let member = MemberKey {
        address,
        service: leads.socket_service,
        port,
        zero: 0,
    };
    Ok(tables.members.get(&member)?.is_none())
}
