//! Many Services for a lab's API server, and changes of them at a given rate: what benches ask of it.

use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The namespace that all of them are in.
pub const NAMESPACE: &str = "load";

/// As many are made at once.
const AT_ONCE: usize = 64;

/// As many endpoints are in a slice as Kubernetes' controller puts there (`--max-endpoints-per-slice`).
const SLICE: u32 = 100;

/// How many Services, and how many endpoints each has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// How many Services.
    pub services: u32,
    /// How many endpoints each has.
    pub endpoints: u32,
}

impl Size {
    /// The ClusterIP of Service number `service`.
    #[must_use]
    pub fn cluster_ip(service: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + service)
    }

    /// An endpoint of Service number `service`.
    #[must_use]
    pub fn endpoint(self, service: u32, number: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + service * self.endpoints + number)
    }

    /// What the first endpoint of a Service is after change number `change`.
    #[must_use]
    pub fn newcomer(change: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 200, 0, 1)) + change)
    }

    /// The Service that change number `change` is of.
    #[must_use]
    pub fn changed(self, change: u32) -> u32 {
        // A prime, so that all have their turn.
        change.wrapping_mul(7_919) % self.services
    }

    fn slice(self, service: u32, first: u32, replaced: Option<Ipv4Addr>) -> Value {
        let end = (first + SLICE).min(self.endpoints);
        let endpoints: Vec<Value> = (first..end)
            .map(|number| {
                let own = self.endpoint(service, number);
                let address = replaced.filter(|_| number == first).unwrap_or(own);
                let conditions = json!({"ready": true, "serving": true, "terminating": false});
                json!({
                    "addresses": [address], "conditions": conditions, "nodeName": format!("node-{}", number % 100),
                    "targetRef": {
                        "kind": "Pod", "namespace": NAMESPACE, "name": format!("s{service}-7c5ddbdf54-{number:05}"),
                        "uid": "0b4a6f6e-6d0c-4a9e-9f0e-1f6c3f0a1b2c",
                    },
                })
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": slice_name(service, first), "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": format!("s{service}")},
            },
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints,
        })
    }

    fn service(service: u32) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("s{service}"), "namespace": NAMESPACE},
            "spec": {"clusterIP": Self::cluster_ip(service), "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        })
    }
}

fn slice_name(service: u32, first: u32) -> String {
    format!("s{service}-{first}")
}

/// Makes them all.
pub(crate) async fn fill(client: &Client, size: Size) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace = json!({"metadata": {"name": NAMESPACE}});
    namespaces
        .create(&PostParams::default(), &serde_json::from_value(namespace)?)
        .await?;
    let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
    let firsts: Vec<u32> = (0..size.endpoints).step_by(SLICE as usize).collect();
    stream::iter(0..size.services)
        .map(|number| {
            let (services, slices, firsts) = (&services, &slices, &firsts);
            async move {
                let service = serde_json::from_value(Size::service(number))?;
                services.create(&PostParams::default(), &service).await?;
                for first in firsts {
                    let slice = serde_json::from_value(size.slice(number, *first, None))?;
                    slices.create(&PostParams::default(), &slice).await?;
                }
                anyhow::Ok(())
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

/// One change and when it was made, in nanoseconds of the machine's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Just before the server was asked.
    pub asked: u64,
    /// When a client that does nothing else had heard of it.
    pub heard: u64,
}

/// Has one endpoint after another replaced, one every `pause`; `size` is what [`fill`] was given.
pub(crate) async fn change(
    client: &Client,
    size: Size,
    changes: Range<u32>,
    pause: Duration,
) -> Result<Vec<Change>> {
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
    let mut heard = vec![0; changes.len()];
    let config = watcher::Config::default().streaming_lists();
    let mut watched = std::pin::pin!(watcher(slices.clone(), config));
    while !matches!(
        watched.try_next().await?.context("the watch ended")?,
        watcher::Event::InitDone
    ) {}
    let ask = async {
        let mut turn = tokio::time::interval(pause);
        let mut asked = Vec::new();
        for change in changes.clone() {
            turn.tick().await;
            let service = size.changed(change);
            let patch = size.slice(service, 0, Some(Size::newcomer(change)));
            asked.push(now()?);
            let parameters = PatchParams::default();
            slices
                .patch(&slice_name(service, 0), &parameters, &Patch::Merge(patch))
                .await?;
        }
        anyhow::Ok(asked)
    };
    let listen = async {
        let mut missing = changes.len();
        while missing > 0 {
            let event = watched.try_next().await?.context("the watch ended")?;
            let watcher::Event::Apply(slice) = event else {
                continue;
            };
            let first = slice
                .endpoints
                .first()
                .and_then(|endpoint| endpoint.addresses.first());
            let address: Ipv4Addr = first.context("a slice without endpoints")?.parse()?;
            let change = u32::from(address).wrapping_sub(u32::from(Size::newcomer(changes.start)));
            if let Some(heard) = heard.get_mut(change as usize) {
                *heard = now()?;
                missing -= 1;
            }
        }
        anyhow::Ok(())
    };
    let (asked, ()) = tokio::try_join!(ask, listen)?;
    let changes = asked.into_iter().zip(heard);
    Ok(changes.map(|(asked, heard)| Change { asked, heard }).collect())
}

/// The machine's monotonic clock, in nanoseconds.
///
/// # Errors
/// The kernel's.
pub fn now() -> Result<u64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    Ok(u64::try_from(now.as_nanos())?)
}
