//! Hears from the kernel that a device, its queueing, an address, route or neighbour changed, by whomever.
//!
//! What changed is not looked at: the reconciler reads the kernel back and compares.

use anyhow::Context;
use futures_util::StreamExt;
use rtnetlink::MulticastGroup;
use tokio::sync::mpsc;

/// Sends into `wake` after changes, until the receiver is gone. Several changes may be one message.
///
/// # Errors
/// The kernel refuses the subscription.
pub fn start(wake: mpsc::Sender<()>) -> anyhow::Result<()> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Tc,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&groups)
        .context("subscribing to the kernel's network changes")?;
    tokio::spawn(connection);
    tokio::spawn(async move {
        while messages.next().await.is_some() {
            if let Err(mpsc::error::TrySendError::Closed(())) = wake.try_send(()) {
                return;
            }
        }
    });
    Ok(())
}
