//! What is wrong and what is waited for, as everybody is told who asks: the plugin, operators, and the log.

use sluice_cni::names::HOST_PORTS_DIRECTORY;

use super::{Agent, node_file};
use crate::config::ProxyMode;
use crate::state::node_health::NodeHealth;

impl Agent {
    /// Leaves for the plugin what it must know; `false` if that failed.
    pub(super) fn tell_plugin(&mut self) -> bool {
        let awaiting = self.awaiting();
        let health = NodeHealth {
            awaiting: Some(awaiting.clone()),
            impairments: self.impairments().into_iter().map(str::to_owned).collect(),
        };
        let impairments = health.impairments.join("; ");
        self.health.send_if_modified(|before| {
            let changed = *before != health;
            *before = health;
            changed
        });
        let problem = self
            .node_file
            .write(self.outcome.as_ref(), &self.routes, &awaiting, impairments);
        let problem = match &self.datastore_awaits {
            Some(reason) if self.outcome.is_none() => problem.or(node_file::hold_back(reason)),
            _ => problem,
        };
        let done = problem.is_none();
        self.found("node file", problem.into_iter().collect());
        done
    }

    /// Takes down what `finder` found wrong now, in place of what it found before; new findings are logged.
    pub(super) fn found(&mut self, finder: &'static str, list: Vec<String>) {
        let before = self.problems.remove(finder).unwrap_or_default();
        for problem in list.iter().filter(|problem| !before.contains(problem)) {
            tracing::warn!(finder, "{problem}");
        }
        for problem in before.iter().filter(|problem| !list.contains(problem)) {
            tracing::info!(finder, "no longer: {problem}");
        }
        if !list.is_empty() {
            self.problems.insert(finder, list);
        }
    }

    /// What pods that run already may suffer from.
    fn impairments(&self) -> Vec<&str> {
        // What is wrong with an object in the datastore is its author's trouble, not that of this node's pods.
        let of_the_node = [
            "network", "egress", "proxy", "pod MTU", "forward", "host", "probes",
        ];
        of_the_node
            .iter()
            .filter_map(|finder| self.problems.get(finder))
            .flatten()
            .map(String::as_str)
            .collect()
    }

    /// What is waited for before pods can be wired.
    pub(super) fn awaiting(&self) -> Vec<String> {
        let mut awaiting = Vec::new();
        let name = &self.config.node_name;
        if !self.loaded {
            awaiting.push("the datastore's first full list".to_owned());
        } else if self.host_ports.is_none() {
            awaiting.push(format!("the host ports in {HOST_PORTS_DIRECTORY} to be read"));
        } else if self.cluster.node(name).is_none() {
            awaiting.push(format!("a Node object called {name:?} in the datastore"));
        } else if self.routes.own.is_empty() {
            let own = format!("node {name} ");
            let refused = self
                .routes
                .refused
                .iter()
                .find(|refused| refused.starts_with(&own));
            awaiting.push(refused.map_or_else(
                || format!("a pod CIDR for node {name:?} (spec.podCIDRs of its Node object)"),
                |refused| format!("a pod CIDR that can be granted: {refused}"),
            ));
        } else if self.outcome.is_none() {
            awaiting.push("the network to be programmed".to_owned());
        }
        awaiting.extend(self.datastore_awaits.clone());
        if !self.synced && self.config.proxy.mode != ProxyMode::Off {
            awaiting.push("Services to be programmed".to_owned());
        }
        awaiting
    }
}
