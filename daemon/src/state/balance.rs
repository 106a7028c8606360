//! From one Service and its endpoints to the [`ServicePort`]s this node programs.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use compact_str::CompactString;
use ipnetwork::IpNetwork;

use super::cluster::Cluster;
use super::objects::{Endpoint, NamedPort, ObjectName, Pod, Service, ServicePortSpec, TargetPort};
use super::service_port::{
    Backend, Family, Frontend, FrontendKind, Place, Scope, ServicePort, ServicePortKey, WhenEmpty,
};
use super::topology::{Hints, Nearness};

/// What of this node Services depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Its zone, if it says one.
    pub zone: Option<String>,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// The addresses that serve NodePorts, loopback aside.
    pub node_port_addresses: Vec<IpAddr>,
    /// Its pod CIDRs.
    pub pod_cidrs: Vec<IpNetwork>,
    /// The networks all pods are in.
    pub cluster_cidrs: Vec<IpNetwork>,
}

impl NodeView {
    fn place(&self, address: IpAddr, node: Option<&str>) -> Place {
        let inside = |cidrs: &[IpNetwork]| cidrs.iter().any(|cidr| cidr.contains(address));
        if node == Some(&self.name) || self.addresses.contains(&address) || inside(&self.pod_cidrs) {
            Place::ThisNode
        } else if inside(&self.cluster_cidrs) {
            Place::PodNetwork
        } else {
            Place::Outside
        }
    }
}

/// All balanced sets of the Service called `name` on the node `view`; none if it is gone or not for the proxy.
pub fn service_ports(
    cluster: &Cluster,
    name: &ObjectName,
    view: &NodeView,
) -> BTreeMap<ServicePortKey, ServicePort> {
    let mut sets = BTreeMap::new();
    let Some(service) = cluster.service(name).filter(|service| service.served) else {
        return sets;
    };
    for port in &service.ports {
        for family in [Family::V4, Family::V6] {
            let frontends = frontends(service, port, family, view);
            if frontends.is_empty() {
                continue;
            }
            let reaches_outside = frontends.iter().any(|f| f.kind != FrontendKind::ClusterIp);
            let candidates = Candidates::find(cluster, service, port, family, view);
            for scope in [Scope::Cluster, Scope::Local] {
                let frontends: Vec<_> = frontends
                    .iter()
                    .copied()
                    .filter(|f| scope_of(service, f.kind) == scope)
                    .collect();
                // What stays local from outside is served to the node and its pods by the whole cluster's endpoints.
                let beside_local = scope == Scope::Cluster && service.external_local && reaches_outside;
                if frontends.is_empty() && !beside_local {
                    continue;
                }
                let key = ServicePortKey {
                    namespace: name.namespace.clone(),
                    name: name.name.clone(),
                    port: port.name.clone(),
                    protocol: port.protocol,
                    family,
                    scope,
                };
                sets.insert(
                    key,
                    ServicePort {
                        backends: candidates.chosen(scope, view),
                        affinity: service.affinity,
                        when_empty: candidates.when_empty(scope, view),
                        source_ranges: source_ranges(service, &frontends, family),
                        frontends,
                    },
                );
            }
        }
    }
    sets
}

fn scope_of(service: &Service, kind: FrontendKind) -> Scope {
    let local = match kind {
        FrontendKind::ClusterIp => service.internal_local,
        FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancer => {
            service.external_local
        }
        // No Service's, and here alone anyway.
        FrontendKind::HostPort => false,
    };
    if local { Scope::Local } else { Scope::Cluster }
}

fn source_ranges(service: &Service, frontends: &[Frontend], family: Family) -> Option<Vec<IpNetwork>> {
    let ranges = service.source_ranges.as_ref()?;
    let of_family = |range: &&IpNetwork| Family::of(range.ip()) == family;
    let mut ranges: Vec<_> = ranges.iter().filter(of_family).copied().collect();
    ranges.sort_unstable();
    ranges.dedup();
    frontends
        .iter()
        .any(|frontend| frontend.kind == FrontendKind::LoadBalancer)
        .then_some(ranges)
}

fn frontends(service: &Service, port: &ServicePortSpec, family: Family, view: &NodeView) -> Vec<Frontend> {
    let loopback = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let on = |addresses: &[IpAddr], port: u16, kind| -> Vec<Frontend> {
        addresses
            .iter()
            .filter(|address| Family::of(**address) == family)
            .map(|address| Frontend {
                address: SocketAddr::new(*address, port),
                kind,
            })
            .collect()
    };
    let cluster_ips: Vec<_> = (service.cluster_ips.iter().copied())
        .filter(|address| place_taken(*address, view).is_none())
        .collect();
    let mut all = on(&cluster_ips, port.port, FrontendKind::ClusterIp);
    all.extend(on(&service.external_ips, port.port, FrontendKind::ExternalIp));
    all.extend(on(
        &service.load_balancer_ips,
        port.port,
        FrontendKind::LoadBalancer,
    ));
    if let Some(node_port) = port.node_port {
        all.extend(on(&view.node_port_addresses, node_port, FrontendKind::NodePort));
        all.extend(on(&[loopback], node_port, FrontendKind::NodePort));
    }
    all.sort_unstable();
    all.dedup_by_key(|frontend| frontend.address);
    all
}

/// Which ClusterIPs of `service` can be none, and why. External addresses may be a node's own: that is how they are
/// used where nobody routes them.
pub fn misplaced(service: &Service, view: &NodeView) -> Vec<String> {
    let all = service.cluster_ips.iter().filter(|_| service.served);
    all.filter_map(|address| {
        let place = place_taken(*address, view)?;
        Some(format!(
            "Service {}: spec.clusterIPs: {address} is not served: {place}",
            service.name
        ))
    })
    .collect()
}

/// Why `address` cannot be a ClusterIP.
fn place_taken(address: IpAddr, view: &NodeView) -> Option<String> {
    if view.addresses.contains(&address) {
        return Some(format!("it is node {}'s own address", view.name));
    }
    let network = view.cluster_cidrs.iter().find(|cidr| cidr.contains(address))?;
    Some(format!("it lies in the pods' network {network}"))
}

/// The addresses of a Service port's endpoints on this node that take new connections.
pub fn local_ready(
    cluster: &Cluster,
    service: &Service,
    port: &ServicePortSpec,
    family: Family,
    view: &NodeView,
) -> Vec<IpAddr> {
    let candidates = Candidates::find(cluster, service, port, family, view);
    let here = candidates.ready.into_iter().map(|(backend, _)| backend);
    here.filter(|backend| backend.place == Place::ThisNode)
        .map(|backend| backend.address.ip())
        .collect()
}

/// The endpoints behind one port of a Service in one family, by what they are good for.
/// Sorted, each once: lists, since one of thousands of endpoints is gathered anew at each change, and they come nearly sorted.
#[derive(Default)]
struct Candidates {
    /// Those that take new connections, each with its hints.
    ready: Vec<(Backend, Option<Arc<Hints>>)>,
    /// Those that still serve on their way out: better than none (requirement S9).
    leaving: Vec<Backend>,
}

impl Candidates {
    fn find(
        cluster: &Cluster,
        service: &Service,
        port: &ServicePortSpec,
        family: Family,
        view: &NodeView,
    ) -> Self {
        let mut found = Self::default();
        let mut sliced = false;
        for slice in cluster.slices(&service.name) {
            sliced = true;
            let number = NamedPort::find(&slice.ports, &port.name, port.protocol);
            if let (true, Some(number)) = (slice.family == family, number) {
                slice
                    .endpoints
                    .iter()
                    .for_each(|endpoint| found.add(endpoint, number, view));
            }
        }
        // Outside Kubernetes there is no endpoint controller: the selector is followed here (DESIGN, section 8).
        if !sliced {
            for pod in cluster.selected(service) {
                let Some(number) = number_on(port, pod) else {
                    continue;
                };
                let node = pod.node.as_deref();
                let zone = node.and_then(|name| cluster.node(name)?.zone.as_deref());
                let hints = service
                    .distribution
                    .map(|distribution| Arc::new(Hints::of(distribution, node, zone)));
                for address in pod.addresses.iter().copied().filter(|a| Family::of(*a) == family) {
                    let endpoint = Endpoint {
                        address,
                        ready: pod.ready && !pod.terminating,
                        serving: pod.ready,
                        terminating: pod.terminating,
                        node: pod.node.as_deref().map(CompactString::from),
                        hints: hints.clone(),
                    };
                    found.add(&endpoint, number, view);
                }
            }
        }
        found.ready.sort_by_key(|(backend, _)| *backend);
        // The last word on one that is in several slices counts.
        found.ready.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        found.leaving.sort();
        found.leaving.dedup();
        found
    }

    fn add(&mut self, endpoint: &Endpoint, number: u16, view: &NodeView) {
        let backend = Backend {
            address: SocketAddr::new(endpoint.address, number),
            place: view.place(endpoint.address, endpoint.node.as_deref()),
        };
        if endpoint.ready && !endpoint.terminating {
            self.ready.push((backend, endpoint.hints.clone()));
        } else if endpoint.serving && endpoint.terminating {
            self.leaving.push(backend);
        }
    }

    /// Where local ones are wanted and others exist, who balances in front is to try another node.
    fn when_empty(&self, scope: Scope, view: &NodeView) -> WhenEmpty {
        match scope {
            Scope::Local if !self.chosen(Scope::Cluster, view).is_empty() => WhenEmpty::Drop,
            _ => WhenEmpty::Refuse,
        }
    }

    /// Hints are advice for traffic that may go anywhere; what must stay on the node follows none.
    fn chosen(&self, scope: Scope, view: &NodeView) -> Vec<Backend> {
        let hints = self.ready.iter().map(|(_, hints)| hints.as_deref());
        let near = Nearness::of(hints, &view.name, view.zone.as_deref());
        let fits = |backend: &Backend, hints: Option<&Hints>| match scope {
            Scope::Cluster => near.admits(hints),
            Scope::Local => backend.place == Place::ThisNode,
        };
        let ready: Vec<_> = self
            .ready
            .iter()
            .filter(|(backend, hints)| fits(backend, hints.as_deref()))
            .map(|(backend, _)| *backend)
            .collect();
        if !ready.is_empty() {
            return ready;
        }
        let within = |backend: &&Backend| scope == Scope::Cluster || backend.place == Place::ThisNode;
        self.leaving.iter().filter(within).copied().collect()
    }
}

fn number_on(port: &ServicePortSpec, pod: &Pod) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(wanted) => NamedPort::find(&pod.ports, wanted, port.protocol),
    }
}
