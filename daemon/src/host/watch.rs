//! Looks at the host from time to time, beside everything else: it starts processes, and nobody waits for what it finds.

use std::time::Duration;

use ipnetwork::IpNetwork;
use tokio::sync::mpsc;

use super::{Findings, look};
use crate::forward;

/// How often the host is looked at.
const PERIOD: Duration = Duration::from_secs(15);

/// What one look brought.
#[derive(Debug)]
pub struct Report {
    /// What was done to let pods through the host's own firewall.
    pub forward: forward::Outcome,
    /// What else was found.
    pub findings: Findings,
}

/// Lets packets from and to `cluster_cidrs` through the host's firewall and looks for what gets in the way, now and
/// every while; sends what came of it into `reports` until the receiver is gone.
pub async fn run(cluster_cidrs: Vec<IpNetwork>, reports: mpsc::Sender<Report>) {
    let mut turn = tokio::time::interval(PERIOD);
    loop {
        turn.tick().await;
        let cidrs = cluster_cidrs.clone();
        let looked = tokio::task::spawn_blocking(move || Report {
            forward: forward::ensure(&cidrs),
            findings: look(),
        });
        match looked.await {
            Ok(report) => {
                if reports.send(report).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::error!("the look at the host ended: {error}"),
        }
    }
}
