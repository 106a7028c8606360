//! The passes over what the node itself needs: its network and its egress.

use std::path::Path;

use sluice_cni::names::IPAM_DIRECTORY;
use tokio::task::JoinHandle;

use super::Agent;
use crate::egress::{self, InForce, Outcome};
use crate::host::watch::Report;
use crate::probe;
use crate::state::balance::NodeView;
use crate::state::node_routes::node_routes;
use crate::state::objects::Node;

/// The rules of egress on their way to the kernel.
pub(super) struct EgressTask {
    /// What is in force then, and what it took.
    applied: JoinHandle<anyhow::Result<(InForce, Outcome)>>,
}

impl Agent {
    /// `changed`: the datastore said something of nodes. `audit`: the kernel is to be read back.
    pub(super) async fn apply_network(&mut self, changed: bool, audit: bool) -> bool {
        let (routes, held) = node_routes(
            &self.cluster,
            &self.config.node_name,
            &self.config.cluster_cidrs,
            &self.held,
        );
        self.held = held;
        self.found("pod CIDRs", routes.refused.clone());
        self.routes = routes;
        let Some(own) = self.cluster.node(&self.config.node_name).cloned() else {
            self.found("network", Vec::new());
            return true;
        };
        let outcome = if audit {
            self.network.reconcile(&own, &self.routes).await
        } else {
            self.network.follow(&own, &self.routes).await
        };
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                self.found("network", vec![format!("{error:#}")]);
                return false;
            }
        };
        if outcome.changes > 0 {
            tracing::info!(changes = outcome.changes, drift = !changed, "network programmed");
            if !changed {
                self.drift_repaired += outcome.changes as u64;
            }
        }
        self.found("network", outcome.problems.clone());
        let view = self.view_of(&own);
        if view != self.view {
            self.view = view;
            self.dirty.all_services = true;
        }
        let targets = probe::targets(&outcome, &self.routes.own);
        self.probed.send_if_modified(|known| {
            let changed = *known != targets;
            *known = targets;
            changed
        });
        let done = outcome.failed == 0;
        self.outcome = Some(outcome);
        done
    }

    fn view_of(&self, own: &Node) -> NodeView {
        let wanted = &self.config.proxy.node_port_addresses;
        let serves =
            |address: &std::net::IpAddr| wanted.is_empty() || wanted.iter().any(|w| w.contains(*address));
        NodeView {
            name: own.name.clone(),
            zone: own.zone.clone(),
            addresses: own.addresses.clone(),
            node_port_addresses: own.addresses.iter().copied().filter(serves).collect(),
            pod_cidrs: self.routes.own.clone(),
            cluster_cidrs: self.config.cluster_cidrs.iter().copied().collect(),
        }
    }

    /// Begins to apply what leaves the cluster as the node: the kernel can take tens of milliseconds for a transaction, in which
    /// this thread has other things to do.
    pub(super) fn begin_egress(&self) -> EgressTask {
        let wanted = egress::masquerade(&self.config, &self.cluster, &self.routes.own);
        let before = self.egress.clone();
        EgressTask {
            applied: tokio::task::spawn_blocking(move || egress::apply(wanted, before)),
        }
    }

    /// Takes note of how that went; `false` if it failed.
    pub(super) async fn finish_egress(&mut self, task: EgressTask) -> bool {
        let applied = task.applied.await;
        match applied.unwrap_or_else(|error| Err(anyhow::anyhow!("the egress task ended: {error}"))) {
            Ok((in_force, outcome)) => {
                if outcome == Outcome::PutBack {
                    tracing::warn!("the rules of egress were changed by others and are put back");
                    self.drift_repaired += 1;
                }
                self.egress = Some(in_force);
                self.found("egress", Vec::new());
                true
            }
            Err(error) => {
                self.egress = None;
                self.found("egress", vec![format!("{error:#}")]);
                false
            }
        }
    }

    /// Gives running pods the MTU that the network has now.
    pub(super) async fn apply_pod_mtu(&mut self) -> bool {
        let Some(mtu) = self
            .outcome
            .as_ref()
            .filter(|outcome| outcome.pods_behind() > 0)
            .map(|o| o.pod_mtu)
        else {
            self.found("pod MTU", Vec::new());
            return true;
        };
        // It moves its thread into the pods' namespaces: not the one that everything else runs on.
        let followed = tokio::task::spawn_blocking(move || {
            sluice_cni::mtu::follow(Path::new(IPAM_DIRECTORY), sluice_ipam::DEFAULT_REST, mtu)
        });
        let problem = match followed.await {
            Ok(Ok(pods)) => {
                tracing::info!(pods, mtu, "running pods have the network's MTU");
                None
            }
            Ok(Err(failure)) => Some(failure.to_string()),
            Err(error) => Some(format!("setting the MTU of pods ended: {error}")),
        };
        let done = problem.is_none();
        self.found("pod MTU", problem.into_iter().collect());
        done
    }

    /// Takes in what a look at the host brought, and tells the plugin if that changes what it must know.
    pub(super) fn fold_host(&mut self, report: Report) {
        for name in report.forward.opened {
            tracing::info!(
                "the host's FORWARD chain ({name}) refuses what it does not know: pods are let through"
            );
        }
        self.found("forward", report.forward.problems);
        self.found("host", report.findings.obstacles(self.proxy.is_some()));
        self.tell_plugin();
    }
}
