//! Leases: what is under one is gone when it is not renewed in time.

use std::time::Duration;

use anyhow::Result;
use etcd_client::{Client, Error};

use super::members::answer;

/// The lease `there` if it is of so many seconds and not over, a new one else.
///
/// # Errors
/// etcd cannot be asked.
pub async fn lease(client: &Client, there: i64, seconds: u32) -> Result<i64> {
    let wanted = i64::from(seconds);
    if there != 0 {
        let doing = "asking for a lease of this node's";
        let known = answer(doing, client.lease_client().time_to_live(there, None)).await?;
        if known.granted_ttl() == wanted && keep_alive(client, there).await?.is_some() {
            return Ok(there);
        }
    }
    let granted = answer("asking for a lease", client.lease_client().grant(wanted, None)).await?;
    Ok(granted.id())
}

/// How long the lease lasts from now on; none if it is over.
///
/// # Errors
/// etcd cannot be asked.
pub async fn keep_alive(client: &Client, lease: i64) -> Result<Option<Duration>> {
    let mut leases = client.lease_client();
    let asked = async {
        match leases.keep_alive(lease).await {
            // That the first answer says so was seen to by the library.
            Ok(_) => Ok(true),
            Err(Error::LeaseKeepAliveError(_)) => Ok(false),
            Err(error) => Err(error),
        }
    };
    if !answer("renewing a lease of this node's", asked).await? {
        return Ok(None);
    }
    let doing = "asking how long a lease of this node's lasts";
    let known = answer(doing, client.lease_client().time_to_live(lease, None)).await?;
    Ok(u64::try_from(known.ttl())
        .ok()
        .filter(|ttl| *ttl > 0)
        .map(Duration::from_secs))
}
