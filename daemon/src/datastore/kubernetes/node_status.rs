//! Tells the cluster how this node does: by conditions of its Node object, and by Events for what an operator must know.
//!
//! | condition | true while |
//! |---|---|
//! | `NetworkUnavailable` | pods cannot be wired here |
//! | `SluiceDegraded` | something on the host or on the way to other nodes is in the way of pods |
//!
//! Written by server-side apply, so that what others write there stays theirs.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sluice_cni::stable_hash::stable_hash;
use tokio::sync::watch;

use super::Servers;
use super::servers::because;
use crate::state::node_health::NodeHealth;

/// Whose fields the conditions are, and who reports Events.
const MANAGER: &str = "sluice";

/// How often conditions are written though nothing changed, for the case that somebody else wrote them.
const REFRESH: Duration = Duration::from_secs(300);

/// How soon it is tried again, at first and at most.
const RETRY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// How many Events are made of one change at most.
const EVENTS: usize = 10;

/// The longest note of an Event, in bytes (events.k8s.io/v1).
const NOTE: usize = 1024;

/// Writes whenever the node's health changes, for as long as the sender of `health` lives.
pub async fn run(servers: Servers, node: String, mut health: watch::Receiver<NodeHealth>) {
    let mut told = Telling {
        // As a value: the code that knows a whole Node is larger than all the rest of this.
        nodes: Api::all_with(servers.client(), &ApiResource::erase::<Node>(&())),
        recorder: Recorder::new(
            servers.client(),
            Reporter {
                controller: MANAGER.to_owned(),
                instance: Some(node.clone()),
            },
        ),
        node,
        eventful: BTreeSet::new(),
    };
    // Not all nodes at the same time.
    let spread = Duration::from_millis(stable_hash(&[&told.node]) % 1000);
    let mut retry = RETRY[0];
    // Before it was true once, kubelet says so itself: there is no conflist.
    let mut was_ready = false;
    loop {
        let now = health.borrow_and_update().clone();
        let wait = match now.awaiting {
            Some(awaiting) if was_ready || awaiting.is_empty() => {
                match told.tell(&awaiting, &now.impairments).await {
                    Ok(()) => {
                        was_ready = true;
                        retry = RETRY[0];
                        REFRESH + spread * 60
                    }
                    Err(error) => {
                        let reason = because(&error);
                        let hint = if matches!(&error, kube::Error::Api(status) if status.code == 404) {
                            "; its kubelet makes that object: is it this node's name in the cluster (nodeName, NODE_NAME)?"
                        } else {
                            ""
                        };
                        tracing::warn!(
                            "writing the conditions and Events of node {}: {reason}{hint}",
                            told.node
                        );
                        retry = (retry * 2).min(RETRY[1]);
                        retry + spread
                    }
                }
            }
            _ => Duration::MAX,
        };
        let changed = tokio::time::timeout(wait, health.changed()).await;
        if matches!(changed, Ok(Err(_))) {
            return;
        }
    }
}

struct Telling {
    nodes: Api<DynamicObject>,
    recorder: Recorder,
    node: String,
    /// What there was an Event for and is not over.
    eventful: BTreeSet<String>,
}

impl Telling {
    async fn tell(&mut self, awaiting: &[String], impairments: &[String]) -> kube::Result<()> {
        let there = self.nodes.get_status(&self.node).await?;
        let network = if awaiting.is_empty() {
            (
                "False",
                "SluiceIsUp",
                "Sluice can wire pods on this node".to_owned(),
            )
        } else {
            let message = format!("Sluice waits for {}", awaiting.join("; "));
            ("True", "SluiceIsNotReady", message)
        };
        let degraded = if impairments.is_empty() {
            let message = "Sluice finds nothing in the way of pods on this node".to_owned();
            ("False", "NothingFound", message)
        } else {
            ("True", "SomethingFound", impairments.join("; "))
        };
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let condition = |kind: &str, (status, reason, message): (&str, &str, String)| {
            // The time of the last change is that of the status, not of the words.
            let since = since(&there.data, kind, status).unwrap_or(&now);
            json!({
                "type": kind, "status": status, "reason": reason, "message": message,
                "lastHeartbeatTime": now, "lastTransitionTime": since,
            })
        };
        let conditions = [
            condition("NetworkUnavailable", network),
            condition("SluiceDegraded", degraded),
        ];
        let patch = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node}, "status": {"conditions": conditions},
        });
        let parameters = PatchParams::apply(MANAGER).force();
        self.nodes
            .patch_status(&self.node, &parameters, &Patch::Apply(patch))
            .await?;
        self.report(&there, awaiting, impairments).await
    }

    /// Makes an Event of all that is new.
    async fn report(
        &mut self,
        node: &DynamicObject,
        awaiting: &[String],
        impairments: &[String],
    ) -> kube::Result<()> {
        let waits = awaiting.iter().map(|what| format!("Sluice waits for {what}"));
        let wrong: BTreeSet<String> = waits.chain(impairments.iter().cloned()).collect();
        self.eventful.retain(|known| wrong.contains(known));
        let reference = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(self.node.clone()),
            uid: node.uid(),
            ..ObjectReference::default()
        };
        let news: Vec<&String> = wrong.difference(&self.eventful).take(EVENTS).collect();
        for what in &news {
            let event = Event {
                type_: EventType::Warning,
                reason: "SluiceDegraded".to_owned(),
                note: Some(cut(what, NOTE).to_owned()),
                action: "Checking".to_owned(),
                secondary: None,
            };
            self.recorder.publish(&event, &reference).await?;
        }
        let news: Vec<String> = news.into_iter().cloned().collect();
        self.eventful.extend(news);
        Ok(())
    }
}

/// Since when a condition has its status, if it has it.
fn since<'a>(node: &'a Value, kind: &str, status: &str) -> Option<&'a String> {
    let conditions = node["status"]["conditions"].as_array()?;
    let same = |condition: &&Value| condition["type"] == kind && condition["status"] == status;
    match &conditions.iter().find(same)?["lastTransitionTime"] {
        Value::String(since) => Some(since),
        _ => None,
    }
}

/// The beginning of a text, at most `length` bytes of it.
fn cut(text: &str, length: usize) -> &str {
    &text[..text.floor_char_boundary(length)]
}
