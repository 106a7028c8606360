//! The pass over Services: touched ones are folded into balanced sets again, and what changed goes to the dataplane.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use ipnetwork::IpNetwork;

use super::{Agent, Marks};
use crate::network;
use crate::proxy::{Dirty, Surroundings};
use crate::state::balance::{NodeView, service_ports};
use crate::state::health_checks::{health_check, listeners};
use crate::state::host_ports;
use crate::state::objects::ObjectName;
use crate::state::service_port::{Family, Protocol, Scope, ServicePort, ServicePortKey};

impl Agent {
    pub(super) fn apply_services(&mut self, marks: &Marks) -> bool {
        let mut dirty = self.refold_services(marks);
        let Some(outcome) = &self.outcome else {
            // The first outcome brings the first view of the node, and that marks every Service.
            return true;
        };
        let Some(proxy) = self.proxy.as_mut() else {
            self.synced = true;
            return true;
        };
        let now = tokio::time::Instant::now();
        let (pods, settles) = self.settling.settled(&outcome.pods, now);
        self.settles = settles;
        let surroundings = Surroundings {
            pods,
            fast_path: self.config.network.fast_path,
            ping: self.config.proxy.ping_cluster_ips,
            ..surroundings(outcome, &self.routes.own, &self.view)
        };
        if self.surroundings.as_ref() != Some(&surroundings) {
            if let Err(error) = proxy.adjust(&surroundings) {
                // What was dirty has been taken from the marks: the next sync looks at everything.
                self.synced = false;
                self.found("proxy", vec![format!("{error:#}")]);
                return false;
            }
            self.surroundings = Some(surroundings);
        }
        if !self.synced {
            dirty = Dirty::All;
        }
        if dirty == Dirty::Only(BTreeSet::new()) {
            return true;
        }
        let began = Instant::now();
        match proxy.sync(&self.services, &dirty) {
            Ok(report) => {
                self.synced = true;
                match &dirty {
                    Dirty::All => self.service_failures.clear(),
                    Dirty::Only(keys) => self.service_failures.retain(|key, _| !keys.contains(key)),
                }
                let microseconds = began.elapsed().as_micros() as u64;
                let (changed, removed, failed) = (report.changed, report.removed, report.failed.len());
                if dirty == Dirty::All {
                    tracing::info!(changed, removed, failed, microseconds, "all Services programmed");
                } else {
                    tracing::debug!(changed, removed, failed, microseconds, "Services programmed");
                }
                self.service_failures.extend(report.failed);
                let failed = self
                    .service_failures
                    .iter()
                    .map(|(key, why)| format!("Service {key}: {why}"));
                let list = failed.collect();
                self.found("proxy", list);
                true
            }
            Err(error) => {
                self.synced = false;
                self.found("proxy", vec![format!("{error:#}")]);
                false
            }
        }
    }

    /// Folds touched Services into balanced sets again; says which sets that may have changed.
    fn refold_services(&mut self, marks: &Marks) -> Dirty {
        if marks.all_services || self.dirty.all_services {
            self.dirty.all_services = false;
            let names: Vec<_> = self
                .cluster
                .services()
                .map(|service| service.name.clone())
                .collect();
            self.services = names
                .iter()
                .flat_map(|name| service_ports(&self.cluster, name, &self.view))
                .collect();
            self.health_checks.clear();
            for name in names {
                self.note_health_check(name);
            }
            self.tell_health_checks();
            self.refold_host_ports();
            return Dirty::All;
        }
        let mut keys = marks.keys.clone();
        // A set that lost an address to another may have it now that the other changed.
        keys.extend(self.service_failures.keys().cloned());
        let mut ports_moved = marks.host_ports;
        for name in &marks.services {
            self.note_health_check(name.clone());
            let before: Vec<_> = self
                .services
                .range(first_key(name)..)
                .take_while(|(key, _)| key.namespace == name.namespace && key.name == name.name)
                .map(|(key, _)| key.clone())
                .collect();
            let after = service_ports(&self.cluster, name, &self.view);
            for key in before {
                let (old, new) = (self.services.get(&key), after.get(&key));
                if new != old {
                    keys.insert(key.clone());
                }
                ports_moved |= moved(old, new);
                if !after.contains_key(&key) {
                    self.services.remove(&key);
                }
            }
            for (key, set) in after {
                if self.services.get(&key) != Some(&set) {
                    keys.insert(key.clone());
                    ports_moved |= moved(self.services.get(&key), Some(&set));
                    self.services.insert(key, set);
                }
            }
        }
        if !marks.services.is_empty() {
            self.tell_health_checks();
        }
        // A port that a Service took or gave up may be one of a host port's.
        if ports_moved {
            keys.extend(self.refold_host_ports());
        }
        Dirty::Only(keys)
    }

    /// Takes down what the Service's health check is to answer; few have one.
    fn note_health_check(&mut self, name: ObjectName) {
        match health_check(&self.cluster, &name, &self.view) {
            Some(check) => self.health_checks.insert(name, check),
            None => self.health_checks.remove(&name),
        };
    }

    /// Has the health checks answered as they now are.
    fn tell_health_checks(&mut self) {
        // Without a dataplane of ours somebody else answers for it.
        let none = BTreeMap::new();
        let checks = if self.proxy.is_some() {
            &self.health_checks
        } else {
            &none
        };
        let (wanted, problems) = listeners(checks, &self.view.node_port_addresses);
        self.health_listeners.send_if_modified(|known| {
            let changed = *known != wanted;
            *known = wanted;
            changed
        });
        self.found("health checks", problems);
    }

    /// Reads back what the kernel holds of Services; `false` if that failed.
    pub(super) fn audit_services(&mut self) -> bool {
        let Some(proxy) = self.proxy.as_mut().filter(|_| self.synced) else {
            return true;
        };
        let problem = match proxy.audit() {
            Ok(0) => None,
            Ok(entries) => {
                tracing::warn!(
                    entries,
                    "what the kernel holds of Services was changed by others and is put right"
                );
                self.drift_repaired += entries as u64;
                None
            }
            Err(error) => Some(format!(
                "reading back what the kernel holds of Services: {error:#}"
            )),
        };
        let done = problem.is_none();
        self.found("proxy audit", problem.into_iter().collect());
        done
    }

    pub(super) fn tend(&mut self) {
        if let Some(proxy) = self.proxy.as_mut().filter(|_| self.synced) {
            let problem = proxy
                .tend()
                .err()
                .map(|error| format!("upkeep of the dataplane: {error:#}"));
            self.found("upkeep", problem.into_iter().collect());
        }
    }
}

/// Whether a Service's addresses on the node changed, not only its endpoints.
fn moved(old: Option<&ServicePort>, new: Option<&ServicePort>) -> bool {
    let frontends = |set: Option<&ServicePort>| set.map(|set| set.frontends.clone()).unwrap_or_default();
    let (old, new) = (frontends(old), frontends(new));
    old != new && (host_ports::concerns(&old) || host_ports::concerns(&new))
}

fn first_key(name: &ObjectName) -> ServicePortKey {
    ServicePortKey {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        port: String::new(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        scope: Scope::Cluster,
    }
}

fn surroundings(outcome: &network::Outcome, own: &[IpNetwork], view: &NodeView) -> Surroundings {
    let mut devices = vec![outcome.uplink.device.clone()];
    devices.extend(outcome.tunnels.iter().cloned());
    let first = |addresses: Vec<IpAddr>| -> Vec<IpAddr> {
        [Family::V4, Family::V6]
            .into_iter()
            .filter_map(|family| {
                addresses
                    .iter()
                    .copied()
                    .find(|address| Family::of(*address) == family)
            })
            .collect()
    };
    Surroundings {
        devices,
        pod_network_addresses: first(own.iter().map(network::desired::node_pod_address).collect()),
        node_addresses: first(view.addresses.clone()),
        pod_networks: view.cluster_cidrs.clone(),
        ..Surroundings::default()
    }
}
