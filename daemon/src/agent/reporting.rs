//! The owner task's state as the report that `sluicectl` and the metrics show.

use std::path::Path;

use sluice_cni::names::IPAM_DIRECTORY;
use sluice_ipam::{DEFAULT_REST, Store, Usage};

use super::Agent;
use crate::admin::report::{self, Report};
use crate::network::paths::Path as NodePath;

impl Agent {
    /// Everything an operator may want to know, now.
    pub(super) fn report(&self) -> Report {
        Report {
            status: self.status(),
            nodes: self.node_reports(),
            services: self.service_reports(),
        }
    }

    fn status(&self) -> report::Status {
        let paths = self.outcome.iter().flat_map(|outcome| outcome.paths.values());
        let (direct, tunnelled) = paths.fold((0, 0), |(direct, tunnelled), path| match path {
            NodePath::Direct { .. } => (direct + 1, tunnelled),
            NodePath::Vxlan { .. } => (direct, tunnelled + 1),
        });
        let directory = self.config.datastore.manifests.directory.display();
        let (pools, unread) = self.pools();
        let problems = self.problems.values().flatten().cloned().chain(unread).collect();
        report::Status {
            node: self.config.node_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            awaiting: self.awaiting(),
            problems,
            datastore: report::Datastore {
                source: format!("manifests in {directory}"),
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
                service_ports: self.services.len() - self.service_failures.len().min(self.services.len()),
                frontends: self.services.values().map(|set| set.frontends.len()).sum(),
                backends: self.services.values().map(|set| set.backends.len()).sum(),
            },
            masquerade: self
                .masquerade
                .as_ref()
                .is_some_and(|masquerade| !masquerade.sources.is_empty()),
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

    fn service_reports(&self) -> Vec<report::Service> {
        self.services
            .iter()
            .map(|(key, set)| report::Service {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                port: key.port.clone(),
                protocol: key.protocol.to_string(),
                frontends: set
                    .frontends
                    .iter()
                    .map(|f| report::Frontend {
                        address: f.address,
                        kind: format!("{:?}", f.kind),
                    })
                    .collect(),
                backends: set.backends.iter().map(|backend| backend.address).collect(),
                affinity_seconds: set.affinity.map(|timeout| timeout.as_secs()).unwrap_or_default(),
                failure: self.service_failures.get(key).cloned().unwrap_or_default(),
            })
            .collect()
    }
}
