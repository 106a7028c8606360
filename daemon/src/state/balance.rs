//! From one Service and its endpoints to the [`ServicePort`]s this node programs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnetwork::IpNetwork;

use super::cluster::Cluster;
use super::objects::{Endpoint, NamedPort, ObjectName, Pod, Service, ServicePortSpec, TargetPort};
use super::service_port::{
    Backend, Family, Frontend, FrontendKind, Place, Scope, ServicePort, ServicePortKey,
};

/// What of this node Services depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Its name.
    pub name: String,
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
            let backends = backends(cluster, service, port, family, view);
            for scope in [Scope::Cluster, Scope::Local] {
                let frontends: Vec<_> = frontends
                    .iter()
                    .copied()
                    .filter(|f| scope_of(service, f.kind) == scope)
                    .collect();
                if frontends.is_empty() {
                    continue;
                }
                let backends = match scope {
                    Scope::Cluster => backends.clone(),
                    Scope::Local => backends
                        .iter()
                        .copied()
                        .filter(|b| b.place == Place::ThisNode)
                        .collect(),
                };
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
                        frontends,
                        backends,
                        affinity: service.affinity,
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
    let mut all = on(&service.cluster_ips, port.port, FrontendKind::ClusterIp);
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

/// Ready endpoints; when there is none, those that still serve on their way out (requirement S9).
fn backends(
    cluster: &Cluster,
    service: &Service,
    port: &ServicePortSpec,
    family: Family,
    view: &NodeView,
) -> Vec<Backend> {
    let mut ready = BTreeSet::new();
    let mut fallback = BTreeSet::new();
    let mut add = |endpoint: &Endpoint, number: u16| {
        let place = view.place(endpoint.address, endpoint.node.as_deref());
        let backend = Backend {
            address: SocketAddr::new(endpoint.address, number),
            place,
        };
        if endpoint.ready && !endpoint.terminating {
            ready.insert(backend);
        } else if endpoint.serving && endpoint.terminating {
            fallback.insert(backend);
        }
    };
    let mut sliced = false;
    for slice in cluster.slices(&service.name) {
        sliced = true;
        let number = NamedPort::find(&slice.ports, &port.name, port.protocol);
        if let (true, Some(number)) = (slice.family == family, number) {
            slice.endpoints.iter().for_each(|endpoint| add(endpoint, number));
        }
    }
    // Outside Kubernetes there is no endpoint controller: the selector is followed here (DESIGN, section 8).
    if !sliced {
        for pod in cluster.selected(service) {
            let Some(number) = number_on(port, pod) else {
                continue;
            };
            for address in pod.addresses.iter().copied().filter(|a| Family::of(*a) == family) {
                let endpoint = Endpoint {
                    address,
                    ready: pod.ready && !pod.terminating,
                    serving: pod.ready,
                    terminating: pod.terminating,
                    node: pod.node.clone(),
                };
                add(&endpoint, number);
            }
        }
    }
    let chosen = if ready.is_empty() { fallback } else { ready };
    chosen.into_iter().collect()
}

fn number_on(port: &ServicePortSpec, pod: &Pod) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(wanted) => NamedPort::find(&pod.ports, wanted, port.protocol),
    }
}
