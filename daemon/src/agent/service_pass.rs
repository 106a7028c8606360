//! The pass over Services: touched ones are folded into balanced sets again, and what changed goes to the dataplane.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use super::{Agent, LEAVE, Marks, Others, UPKEEP};
use crate::dataplane;
use crate::network;
use crate::proxy::{Dirty, Surroundings};
use crate::state::balance::NodeView;
use crate::state::service_port::Family;

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
        let networks = &self.view.cluster_cidrs;
        let tracked = *self
            .tracked
            .get_or_insert_with(|| proxy.name() == "ebpf" && dataplane::tracks_within(networks));
        let surroundings = Surroundings {
            pods,
            // Past the host's stack the replies of what another dataplane began would not be translated back.
            fast_path: self.config.network.fast_path && !tracked,
            ping: self.config.proxy.ping_cluster_ips,
            ..surroundings(outcome, &self.routes.own, &self.view)
        };
        if !self.synced {
            dirty = Dirty::All;
        }
        let mut surroundings = Some(surroundings).filter(|now| self.surroundings.as_ref() != Some(now));
        if dirty != Dirty::All
            && let Some(now) = surroundings.take()
        {
            if let Err(error) = proxy.adjust(&now) {
                // What was dirty has been taken from the marks: the next sync looks at everything.
                self.synced = false;
                self.found("proxy", vec![format!("{error:#}")]);
                return false;
            }
            self.surroundings = Some(now);
        }
        if dirty == Dirty::Only(BTreeSet::new()) {
            self.figures.programmed(&std::mem::take(&mut self.triggers));
            return true;
        }
        let began = Instant::now();
        let result = match &surroundings {
            Some(now) => proxy.establish(now, self.services.sets()),
            None => proxy.sync(self.services.sets(), &dirty),
        };
        match result {
            Ok(report) => {
                if let Some(now) = surroundings {
                    self.surroundings = Some(now);
                }
                self.synced = true;
                self.syncs += 1;
                // Only now that this one serves.
                if self.others == Others::Unknown {
                    self.others = if dataplane::retire_others(proxy.name()) {
                        Others::Leaving(tokio::time::Instant::now() + LEAVE)
                    } else {
                        dataplane::remove_others(proxy.name());
                        Others::Gone
                    };
                }
                match &dirty {
                    Dirty::All => self.service_failures.clear(),
                    Dirty::Only(keys) => self.service_failures.retain(|key, _| !keys.contains(key)),
                }
                let took = began.elapsed();
                let triggers = std::mem::take(&mut self.triggers);
                self.figures.synced(dirty == Dirty::All, took);
                // Whose Services are among those that failed is not known.
                if report.failed.is_empty() {
                    self.figures.programmed(&triggers);
                }
                let microseconds = took.as_micros() as u64;
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

    /// How long further changes are waited for, so that they share a sync with what changed now.
    pub(super) fn gathers(&self) -> Option<Duration> {
        let waits = self.synced && !self.dirty.services.is_empty();
        self.proxy.as_ref().filter(|_| waits)?.gathers()
    }

    /// Folds touched Services into balanced sets again; says which sets that may have changed.
    fn refold_services(&mut self, marks: &Marks) -> Dirty {
        if marks.all_services || self.dirty.all_services {
            self.dirty.all_services = false;
            self.services.refold(&self.cluster, &self.view);
            self.tell_of_services();
            self.refold_host_ports();
            return Dirty::All;
        }
        let mut keys = marks.keys.clone();
        // What failed is tried again in every pass.
        keys.extend(self.service_failures.keys().cloned());
        let mut ports_moved = marks.host_ports;
        if !marks.services.is_empty() {
            let changed = self.services.update(&self.cluster, &self.view, &marks.services);
            self.tell_of_services();
            keys.extend(changed.keys);
            ports_moved |= changed.host_ports;
        }
        // A port that a Service took or gave up may be one of a host port's.
        if ports_moved {
            keys.extend(self.refold_host_ports());
        }
        Dirty::Only(keys)
    }

    /// Has the health checks answered as they now are, and says what is not served as it is written.
    fn tell_of_services(&mut self) {
        // Without a dataplane of ours somebody else answers for it.
        let wanted = match self.proxy {
            Some(_) => self.services.health_checks(&self.view),
            None => BTreeMap::new(),
        };
        self.health_listeners.send_if_modified(|known| {
            let changed = *known != wanted;
            *known = wanted;
            changed
        });
        let mut problems = self.services.problems(&self.cluster, &self.view);
        // Through an API server slices come by a watch of their own, before their Service and after it is gone.
        if !self.source.is_remote() {
            problems.extend(self.services.orphans());
        }
        self.found("services", problems);
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

    /// Takes what another dataplane left out of the kernel when its time has come.
    pub(super) fn part_with_others(&mut self) {
        let (Others::Leaving(until), Some(proxy)) = (self.others, &self.proxy) else {
            return;
        };
        let now = tokio::time::Instant::now();
        if now < until {
            return;
        }
        self.others = if dataplane::others_serve_on(proxy.name()) {
            Others::Leaving(now + UPKEEP)
        } else {
            dataplane::remove_others(proxy.name());
            Others::Gone
        };
    }

    pub(super) fn tend(&mut self) {
        if self.tracked == Some(true) && !dataplane::tracks_within(&self.view.cluster_cidrs) {
            self.tracked = Some(false);
            self.dirty.audit = true;
        }
        if let Some(proxy) = self.proxy.as_mut().filter(|_| self.synced) {
            let problem = proxy
                .tend()
                .err()
                .map(|error| format!("upkeep of the dataplane: {error:#}"));
            self.found("upkeep", problem.into_iter().collect());
        }
    }
}

fn surroundings(outcome: &network::Outcome, own: &[IpNetwork], view: &NodeView) -> Surroundings {
    let mut devices = vec![outcome.uplink.device.clone()];
    devices.extend(outcome.tunnels.values().cloned());
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
        own_networks: own.to_vec(),
        pod_networks: view.cluster_cidrs.clone(),
        ..Surroundings::default()
    }
}
