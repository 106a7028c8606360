//! The pass over host ports: what the plugin wrote down becomes sets beside those of Services.

use std::collections::BTreeSet;

use super::Agent;
use crate::config::ProxyMode;
use crate::host_ports::Snapshot;
use crate::state::host_ports::{NAMESPACE, first_key, host_port_sets};
use crate::state::service_port::ServicePortKey;

impl Agent {
    /// Takes in what the plugin wrote down; where it could not be read, what is known stands.
    pub(super) fn take_host_ports(&mut self, snapshot: Result<Snapshot, String>) {
        match snapshot {
            Ok(Snapshot { records, problems }) => {
                self.found("host port records", problems);
                self.dirty.host_ports |= self.host_ports.as_ref() != Some(&records);
                self.host_ports = Some(records);
            }
            Err(problem) => self.found("host port records", vec![problem]),
        }
    }

    /// Folds all host ports into sets again, once those of Services are up to date; says which changed.
    pub(super) fn refold_host_ports(&mut self) -> BTreeSet<ServicePortKey> {
        let none = Default::default();
        let records = self.host_ports.as_ref().unwrap_or(&none);
        let found = host_port_sets(records, &self.view, &self.services);
        let mut problems = found.problems;
        if self.config.proxy.mode == ProxyMode::Off && !records.is_empty() {
            problems = vec![format!(
                "the host ports of {} pods are not served: proxy.mode is off",
                records.len()
            )];
        }
        let before: Vec<_> = self
            .services
            .range(first_key()..)
            .take_while(|(key, _)| key.namespace == NAMESPACE)
            .map(|(key, _)| key.clone())
            .collect();
        let mut changed = BTreeSet::new();
        for key in before {
            if !found.sets.contains_key(&key) {
                self.services.remove(&key);
                changed.insert(key);
            }
        }
        for (key, set) in found.sets {
            if self.services.get(&key) != Some(&set) {
                changed.insert(key.clone());
                self.services.insert(key, set);
            }
        }
        self.found("host ports", problems);
        changed
    }
}
