//! The pass over host ports: what the plugin wrote down becomes sets beside those of Services.

use std::collections::BTreeSet;

use super::Agent;
use crate::config::ProxyMode;
use crate::host_ports::Snapshot;
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
        let (changed, mut problems) = self.services.update_host_ports(records, &self.view);
        if self.config.proxy.mode == ProxyMode::Off && !records.is_empty() {
            problems = vec![format!(
                "the host ports of {} pods are not served: proxy.mode is off",
                records.len()
            )];
        }
        self.found("host ports", problems);
        changed
    }
}
