//! Tells the cluster whether pods can be wired on this node: the condition `NetworkUnavailable` of its Node object.
//!
//! Written by server-side apply, so that what others write there stays theirs.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;

use super::Servers;
use super::servers::because;

/// Which condition.
const TYPE: &str = "NetworkUnavailable";

/// Whose field it is.
const MANAGER: &str = "sluice";

/// How often it is written though nothing changed, for the case that somebody else wrote it.
const REFRESH: Duration = Duration::from_secs(300);

/// How soon it is tried again, at first and at most.
const RETRY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// What is waited for before pods can be wired; nothing is known before the first pass.
pub type Awaiting = Option<Vec<String>>;

/// Writes it whenever it changes, for as long as the sender of `awaiting` lives.
pub async fn run(servers: Servers, node: String, mut awaiting: watch::Receiver<Awaiting>) {
    // As a value: the code that knows a whole Node is larger than all the rest of this.
    let nodes = Api::all_with(servers.client(), &ApiResource::erase::<Node>(&()));
    let mut retry = RETRY[0];
    // Before it was true once, kubelet says so itself: there is no conflist.
    let mut was_ready = false;
    loop {
        let now = awaiting.borrow_and_update().clone();
        let wait = match now {
            Some(awaiting) if was_ready || awaiting.is_empty() => match write(&nodes, &node, &awaiting).await
            {
                Ok(()) => {
                    was_ready = true;
                    retry = RETRY[0];
                    REFRESH
                }
                Err(error) => {
                    let reason = because(&error);
                    tracing::warn!("writing the condition {TYPE} of node {node}: {reason}");
                    retry = (retry * 2).min(RETRY[1]);
                    retry
                }
            },
            _ => Duration::MAX,
        };
        let changed = tokio::time::timeout(wait, awaiting.changed()).await;
        if matches!(changed, Ok(Err(_))) {
            return;
        }
    }
}

async fn write(nodes: &Api<DynamicObject>, name: &str, awaiting: &[String]) -> kube::Result<()> {
    let (status, reason, message) = if awaiting.is_empty() {
        (
            "False",
            "SluiceIsUp",
            "Sluice can wire pods on this node".to_owned(),
        )
    } else {
        let message = format!("Sluice waits for {}", awaiting.join("; "));
        ("True", "SluiceIsNotReady", message)
    };
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let there = nodes.get_status(name).await?;
    // The time of the last change is that of the status, not of the words.
    let since = there.data["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == TYPE && condition["status"] == status)
        .and_then(|condition| condition["lastTransitionTime"].as_str())
        .unwrap_or(&now);
    let condition = json!({
        "type": TYPE, "status": status, "reason": reason, "message": message,
        "lastHeartbeatTime": now, "lastTransitionTime": since,
    });
    let patch = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"conditions": [condition]},
    });
    let parameters = PatchParams::apply(MANAGER).force();
    nodes
        .patch_status(name, &parameters, &Patch::Apply(patch))
        .await
        .map(|_| ())
}
