//! All balanced sets this node is to program, each address in one of them. Pure.
//!
//! Services are folded one by one, as they change. An address that several claim goes to the one that [`super::claims`]
//! says; the others keep what nobody else claims, and when it is given up they are folded again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use compact_str::CompactString;
use sluice_cni::host_ports::Record;
use sluice_ipam::Attachment;

use super::balance::{NodeView, misplaced, service_ports};
use super::claims::{Claim, Claimant, Claims};
use super::cluster::Cluster;
use super::health_checks::{HealthCheck, health_check};
use super::host_ports::{self, host_port_sets};
use super::objects::ObjectName;
use super::service_port::{Family, Frontend, FrontendKind, Protocol, Scope, ServicePort, ServicePortKey};

/// Sets by their keys.
pub type Sets = BTreeMap<ServicePortKey, ServicePort>;

/// What a fold changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The sets.
    pub keys: BTreeSet<ServicePortKey>,
    /// Whether addresses changed hands that host ports may want.
    pub host_ports: bool,
}

/// The sets of all Services and host ports.
#[derive(Debug, Default)]
pub struct Services {
    sets: Sets,
    claims: Claims,
    /// What sets were to have and others have.
    lost: BTreeMap<ServicePortKey, Vec<Frontend>>,
    health_checks: BTreeMap<ObjectName, HealthCheck>,
    /// What of a Service can be nowhere.
    misfits: BTreeMap<ObjectName, Vec<String>>,
    /// Slices without a Service, by its name.
    orphans: BTreeMap<ObjectName, Vec<String>>,
}

impl Services {
    /// The sets, each address in one of them.
    pub fn sets(&self) -> &Sets {
        &self.sets
    }

    /// The health checks that are to be answered, by the address that is asked.
    pub fn health_checks(&self, view: &NodeView) -> BTreeMap<SocketAddr, HealthCheck> {
        let mut wanted = BTreeMap::new();
        for check in self.health_checks.values() {
            for (address, claim) in asked(check, view) {
                if self.claims.holder(claim) == Some(&check.service) {
                    wanted.insert(address, check.clone());
                }
            }
        }
        wanted
    }

    /// Folds all Services again, as when the node's own addresses changed. Host ports are left as they are.
    pub fn refold(&mut self, cluster: &Cluster, view: &NodeView) {
        let host_ports = self.take_host_ports();
        *self = Self::default();
        let all = cluster
            .services()
            .map(|service| service.name.clone())
            .chain(cluster.owners_of_slices().cloned())
            .collect();
        self.update(cluster, view, &all);
        self.sets.extend(host_ports);
    }

    /// Folds the Services called `names` again, and those whom that gives or takes an address.
    pub fn update(&mut self, cluster: &Cluster, view: &NodeView, names: &BTreeSet<ObjectName>) -> Changed {
        let mut changed = Changed::default();
        let mut queue = names.clone();
        while let Some(name) = queue.pop_first() {
            self.note_misfits(cluster, view, &name);
            let folded = service_ports(cluster, &name, view);
            let check = health_check(cluster, &name, view);
            let affected = self.claim(cluster, view, &name, &folded, check.as_ref());
            queue.extend(affected.into_iter().map(|claimant| claimant.name.clone()));
            match check {
                Some(check) => self.health_checks.insert(name.clone(), check),
                None => self.health_checks.remove(&name),
            };
            self.hand_out(&name, folded, &mut changed);
        }
        changed
    }

    /// Folds the host ports of this node's pods again, which have what no Service claims; says which sets that changed, and
    /// what is not served.
    pub fn update_host_ports(
        &mut self,
        records: &BTreeMap<Attachment, Record>,
        view: &NodeView,
    ) -> (BTreeSet<ServicePortKey>, Vec<String>) {
        let found = host_port_sets(records, view, &self.claims);
        let before = self.take_host_ports();
        let mut changed: BTreeSet<_> = before
            .keys()
            .filter(|key| !found.sets.contains_key(key))
            .cloned()
            .collect();
        for (key, set) in found.sets {
            if before.get(&key) != Some(&set) {
                changed.insert(key.clone());
            }
            self.sets.insert(key, set);
        }
        (changed, found.problems)
    }

    /// What is not served as it is written, and why.
    pub fn problems(&self, cluster: &Cluster, view: &NodeView) -> Vec<String> {
        let mut problems: Vec<String> = self.misfits.values().flatten().cloned().collect();
        let mut contested = BTreeSet::new();
        for (key, frontends) in &self.lost {
            let name = ObjectName::new(key.namespace.clone(), key.name.clone());
            for frontend in frontends {
                let claim = Claim::new(frontend.address, key.protocol);
                contested.insert(self.loss(cluster, &name, &Written(frontend, key.protocol), claim));
            }
        }
        for check in self.health_checks.values() {
            let field = format!("spec.healthCheckNodePort {}", check.port);
            for (_, claim) in asked(check, view) {
                if self.claims.holder(claim) != Some(&check.service) {
                    contested.insert(self.loss(cluster, &check.service, &field, claim));
                }
            }
        }
        problems.extend(contested);
        problems
    }

    /// The slices that name a Service which is not there.
    pub fn orphans(&self) -> impl Iterator<Item = String> {
        self.orphans.values().flatten().cloned()
    }

    fn take_host_ports(&mut self) -> Sets {
        let keys: Vec<_> = self
            .sets
            .range(host_ports::first_key()..)
            .map(|(key, _)| key)
            .take_while(|key| key.namespace == host_ports::NAMESPACE)
            .cloned()
            .collect();
        keys.into_iter()
            .filter_map(|key| self.sets.remove_entry(&key))
            .collect()
    }

    /// That the Service called `name` does not have what it claims as `field`.
    fn loss(&self, cluster: &Cluster, name: &ObjectName, field: &dyn fmt::Display, claim: Claim) -> String {
        match self.claims.claimant(claim) {
            Some(holder) if holder.name != *name => format!(
                "Service {name}: {field} is not served: it belongs to Service {}, {}; give one of them another",
                holder.name,
                holder.reason(cluster.service(name)),
            ),
            _ => format!("Service {name}: {field} is written twice; the first port by name has it"),
        }
    }

    fn note_misfits(&mut self, cluster: &Cluster, view: &NodeView, name: &ObjectName) {
        let service = cluster.service(name);
        let misplaced = service.map(|service| misplaced(service, view));
        note(&mut self.misfits, name, misplaced.unwrap_or_default());
        let slices = cluster.slices(name).filter(|_| service.is_none());
        let orphans = slices.map(|slice| {
            let label = "metadata.labels[kubernetes.io/service-name]";
            format!(
                "EndpointSlice {}: {label}: there is no Service {name}",
                slice.name
            )
        });
        note(&mut self.orphans, name, orphans.collect());
    }

    /// Brings the claims of the Service called `name` up to date; says whose addresses changed by that.
    fn claim(
        &mut self,
        cluster: &Cluster,
        view: &NodeView,
        name: &ObjectName,
        folded: &Sets,
        check: Option<&HealthCheck>,
    ) -> Vec<Arc<Claimant>> {
        let claims_of = |sets: &mut dyn Iterator<Item = (&ServicePortKey, &[Frontend])>,
                         check: Option<&HealthCheck>| {
            let mut claims = BTreeSet::new();
            for (key, frontends) in sets {
                claims.extend(frontends.iter().map(|f| Claim::new(f.address, key.protocol)));
            }
            claims.extend(
                check
                    .into_iter()
                    .flat_map(|check| asked(check, view))
                    .map(|(_, claim)| claim),
            );
            claims
        };
        let mut held = keys_of(&self.sets, name)
            .map(|(key, set)| (key, set.frontends.as_slice()))
            .chain(keys_of(&self.lost, name).map(|(key, lost)| (key, lost.as_slice())));
        let before = claims_of(&mut held, self.health_checks.get(name));
        drop(held);
        let after = claims_of(
            &mut folded.iter().map(|(key, set)| (key, set.frontends.as_slice())),
            check,
        );
        let claimant = cluster
            .service(name)
            .map(|service| Arc::new(Claimant::new(service)));
        let mut affected = Vec::new();
        // One that was made anew under its old name is another: it claims from the start.
        let same = |claims: &Claims, claim| match (claims.claimant(claim), &claimant) {
            (Some(holder), Some(claimant)) if holder.name == *name => holder == claimant.as_ref(),
            _ => true,
        };
        for claim in &before {
            if !after.contains(claim) || !same(&self.claims, *claim) {
                affected.extend(self.claims.give_up(*claim, name));
            }
        }
        if let Some(claimant) = &claimant {
            for claim in after {
                affected.extend(self.claims.make(claim, claimant));
            }
        }
        affected
    }

    /// Puts `folded` in the place of what the Service called `name` had, less what others have.
    fn hand_out(&mut self, name: &ObjectName, folded: Sets, changed: &mut Changed) {
        let gone: Vec<_> = keys_of(&self.sets, name)
            .map(|(key, _)| key)
            .filter(|key| !folded.contains_key(key))
            .cloned()
            .collect();
        for key in gone {
            let former = self.sets.remove(&key);
            changed.host_ports |= former.is_some_and(|set| host_ports::concerns(&set.frontends));
            changed.keys.insert(key);
        }
        let stale: Vec<_> = keys_of(&self.lost, name).map(|(key, _)| key.clone()).collect();
        for key in stale {
            self.lost.remove(&key);
        }
        let mut own = BTreeSet::new();
        for (key, mut set) in folded {
            let mut lost = Vec::new();
            set.frontends.retain(|frontend| {
                let claim = Claim::new(frontend.address, key.protocol);
                let has = self.claims.holder(claim) == Some(name) && own.insert(claim);
                if !has {
                    lost.push(*frontend);
                }
                has
            });
            if !lost.is_empty() {
                self.lost.insert(key.clone(), lost);
            }
            let former = self.sets.get(&key);
            if former == Some(&set) {
                continue;
            }
            let frontends = |set: &ServicePort| host_ports::concerns(&set.frontends);
            let moved = former.is_none_or(|former| former.frontends != set.frontends);
            changed.host_ports |= moved && (frontends(&set) || former.is_some_and(frontends));
            changed.keys.insert(key.clone());
            self.sets.insert(key, set);
        }
    }
}

/// Has `found` stand for the Service called `name`; nothing found is nothing to keep.
fn note(notes: &mut BTreeMap<ObjectName, Vec<String>>, name: &ObjectName, found: Vec<String>) {
    if found.is_empty() {
        notes.remove(name);
    } else {
        notes.insert(name.clone(), found);
    }
}

/// A frontend as the Service's author wrote it.
struct Written<'a>(&'a Frontend, Protocol);

impl fmt::Display for Written<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Frontend { address, kind }, protocol) = self;
        match kind {
            FrontendKind::NodePort => write!(f, "nodePort {}/{protocol}", address.port()),
            FrontendKind::ClusterIp => write!(f, "spec.clusterIPs {address}/{protocol}"),
            FrontendKind::ExternalIp => write!(f, "spec.externalIPs {address}/{protocol}"),
            FrontendKind::LoadBalancer => write!(f, "status.loadBalancer.ingress {address}/{protocol}"),
            FrontendKind::HostPort => write!(f, "hostPort {address}/{protocol}"),
        }
    }
}

/// Where a health check is asked, and what it claims by that.
fn asked(check: &HealthCheck, view: &NodeView) -> impl Iterator<Item = (SocketAddr, Claim)> {
    let port = check.port;
    view.node_port_addresses.iter().map(move |address| {
        let address = SocketAddr::new(*address, port);
        (address, Claim::new(address, Protocol::Tcp))
    })
}

/// What `map` has for the Service called `name`.
fn keys_of<'a, T>(
    map: &'a BTreeMap<ServicePortKey, T>,
    name: &'a ObjectName,
) -> impl Iterator<Item = (&'a ServicePortKey, &'a T)> {
    let first = ServicePortKey {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        port: CompactString::default(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        scope: Scope::Cluster,
    };
    map.range(first..)
        .take_while(|(key, _)| key.namespace == name.namespace && key.name == name.name)
}

#[cfg(test)]
mod tests;
