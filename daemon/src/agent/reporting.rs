//! The owner task's state, and what the kernel holds, as `sluicectl` and the metrics show it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use sluice_cni::names::IPAM_DIRECTORY;
use sluice_ipam::{DEFAULT_REST, Store, Usage};

use super::Agent;
use super::route_reports::route_reports;
use crate::admin::report;
use crate::admin::socket::Question;
use crate::network::paths::Path as NodePath;
use crate::proxy::Programmed;
use crate::state::service_port::{Protocol, ServicePort, ServicePortKey};

impl Agent {
    /// Answers an operator; whoever asked may be gone.
    pub(super) async fn answer(&self, question: Question) {
        let readable = |error: anyhow::Error| format!("{error:#}");
        match question {
            Question::Status(answer) => {
                let _ = answer.send(self.status());
            }
            Question::Nodes(answer) => {
                let _ = answer.send(self.node_reports());
            }
            Question::Routes(answer) => {
                let _ = answer.send(self.routes().await.map_err(readable));
            }
            Question::Services(answer) => {
                let _ = answer.send(self.service_reports().map_err(readable));
            }
            Question::Connections(answer) => {
                let _ = answer.send(self.connection_reports().map_err(readable));
            }
            Question::Config(answer) => {
                let _ = answer.send(self.config.clone());
            }
        }
    }

    fn status(&self) -> report::Status {
        let paths = self.outcome.iter().flat_map(|outcome| outcome.paths.values());
        let (direct, tunnelled) = paths.fold((0, 0), |(direct, tunnelled), path| match path {
            NodePath::Direct { .. } => (direct + 1, tunnelled),
            NodePath::Vxlan { .. } => (direct, tunnelled + 1),
        });
        let (pools, unread) = self.pools();
        let problems = self.problems.values().flatten().cloned().chain(unread).collect();
        let sets = self.services.sets();
        report::Status {
            node: self.config.node_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            awaiting: self.awaiting(),
            problems,
            datastore: report::Datastore {
                source: self.source.describe(),
                loaded: self.loaded,
                nodes: self.cluster.nodes().count(),
                services: self.cluster.services().count(),
                pods: self.cluster.pod_count(),
            },
            network: report::Network {
                backend: self.config.network.backend.to_string(),
                uplink: self
                    .outcome
                    .as_ref()
                    .map(|o| o.uplink.device.name.clone())
                    .unwrap_or_default(),
                pod_mtu: self.outcome.as_ref().map(|o| o.pod_mtu).unwrap_or_default(),
                pod_cidrs: self.routes.own.iter().map(ToString::to_string).collect(),
                direct,
                tunnelled,
            },
            proxy: report::Proxy {
                mode: match &self.proxy {
                    Some(proxy) if self.synced => proxy.name().to_owned(),
                    Some(_) => String::new(),
                    None => "off".to_owned(),
                },
                reason: self.proxy_reason.clone(),
                service_ports: sets.len() - self.service_failures.len().min(sets.len()),
                frontends: sets.values().map(|set| set.frontends.len()).sum(),
                backends: sets.values().map(|set| set.backends.len()).sum(),
                syncs: self.syncs,
            },
            masquerade: self
                .egress
                .as_ref()
                .is_some_and(|in_force| !in_force.wanted.sources.is_empty()),
            pools,
            drift_repaired: self.drift_repaired,
            removals: report::Removals {
                devices: self.removals.devices(),
                groups: self.removals.groups(),
            },
        }
    }

    /// The pools, and what of the address store could not be read: a pool that only looks empty must not be shown as one
    /// without a word.
    fn pools(&self) -> (Vec<report::Pool>, Vec<String>) {
        let reserved = &self.config.ipam.reserved;
        // Not there before the first pod: then nothing is held.
        let store = Store::open_existing(Path::new(IPAM_DIRECTORY), DEFAULT_REST)
            .map(|store| store.with_reserved(reserved));
        let (mut pools, mut problems) = (Vec::new(), Vec::new());
        for cidr in &self.routes.own {
            let usage = match store.as_ref().map(|store| store.usage(*cidr)) {
                None => Usage::default(),
                Some(Ok(usage)) => usage,
                Some(Err(error)) => {
                    problems.push(format!("how full {cidr} is cannot be told: {error}"));
                    continue;
                }
            };
            pools.push(report::Pool {
                cidr: cidr.to_string(),
                size: sluice_ipam::Pool::new(*cidr, reserved).size(),
                held: usage.held,
                resting: usage.resting,
            });
        }
        (pools, problems)
    }

    fn node_reports(&self) -> Vec<report::Node> {
        let path = |node: &crate::state::objects::Node| {
            if node.name == self.config.node_name {
                return "this node".to_owned();
            }
            let mut ways: Vec<&str> = node
                .pod_cidrs
                .iter()
                .map(
                    |cidr| match self.outcome.as_ref().and_then(|outcome| outcome.paths.get(cidr)) {
                        Some(NodePath::Direct { node: holder, .. }) if *holder == node.name => "direct",
                        Some(NodePath::Vxlan { node: holder, .. }) if *holder == node.name => "vxlan",
                        _ => "none, see status",
                    },
                )
                .collect();
            ways.dedup();
            ways.join(", ")
        };
        self.cluster
            .nodes()
            .map(|node| report::Node {
                name: node.name.clone(),
                addresses: node.addresses.clone(),
                pod_cidrs: node.pod_cidrs.iter().map(ToString::to_string).collect(),
                path: path(node),
            })
            .collect()
    }

    async fn routes(&self) -> anyhow::Result<Vec<report::Route>> {
        let outcome = self.outcome.as_ref();
        let outcome = outcome.context("the network is not programmed yet; see: sluicectl status")?;
        let held = self.network.observe(&outcome.tunnels).await?;
        let own = (self.config.node_name.as_str(), self.routes.own.as_slice());
        Ok(route_reports(own, outcome, &held))
    }

    fn service_reports(&self) -> anyhow::Result<Vec<report::Service>> {
        let programmed = match &self.proxy {
            Some(proxy) if self.synced => proxy.programmed()?,
            _ => HashMap::new(),
        };
        let none = Programmed::default();
        let one = |(key, set): (&ServicePortKey, &ServicePort)| {
            let kernel = programmed.get(key).unwrap_or(&none);
            let failure = match self.service_failures.get(key) {
                Some(failure) => failure.clone(),
                None => difference(set, kernel),
            };
            report::Service {
                namespace: key.namespace.to_string(),
                name: key.name.to_string(),
                port: key.port.to_string(),
                protocol: key.protocol.to_string(),
                frontends: set
                    .frontends
                    .iter()
                    .map(|f| report::Frontend {
                        address: f.address,
                        kind: format!("{:?}", f.kind),
                    })
                    .collect(),
                backends: kernel.backends.clone(),
                affinity_seconds: set.affinity.map(|timeout| timeout.as_secs()).unwrap_or_default(),
                failure,
            }
        };
        Ok(self.services.sets().iter().map(one).collect())
    }

    fn connection_reports(&self) -> anyhow::Result<Vec<report::Connection>> {
        let Some(proxy) = &self.proxy else {
            return Ok(Vec::new());
        };
        let names: HashMap<(SocketAddr, Protocol), &ServicePortKey> = self
            .services
            .sets()
            .iter()
            .flat_map(|(key, set)| {
                set.frontends
                    .iter()
                    .map(move |f| ((f.address, key.protocol), key))
            })
            .collect();
        let connections = proxy.connections()?.into_iter().map(|connection| {
            let service = names.get(&(connection.frontend, connection.protocol));
            report::Connection {
                service: service.map(ToString::to_string).unwrap_or_default(),
                protocol: connection.protocol.to_string(),
                client: connection.client,
                frontend: connection.frontend,
                backend: connection.backend,
                stand_in: connection.stand_in,
                state: connection.state.to_string(),
                idle_seconds: connection.idle.as_secs(),
            }
        });
        Ok(connections.collect())
    }
}

/// How the kernel differs from what is desired; empty if it does not.
fn difference(desired: &ServicePort, kernel: &Programmed) -> String {
    let missing: Vec<String> = desired
        .frontends
        .iter()
        .map(|frontend| frontend.address)
        .filter(|address| !kernel.frontends.contains(address))
        .map(|address| address.to_string())
        .collect();
    if !missing.is_empty() {
        return format!("the kernel has no entry for {}", missing.join(", "));
    }
    let mut wanted: Vec<SocketAddr> = desired.backends.iter().map(|backend| backend.address).collect();
    wanted.sort_unstable();
    if wanted == kernel.backends {
        return String::new();
    }
    format!(
        "the kernel has {} endpoints where {} are wanted, or others than those",
        kernel.backends.len(),
        wanted.len()
    )
}
