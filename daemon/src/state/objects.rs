//! The objects Sluice knows, checked and trimmed to what it uses. Every datastore yields these.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use compact_str::CompactString;
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::service_port::{Family, Protocol};
use super::topology::{Hints, TrafficDistribution};

/// Namespace and name; the namespace is empty for nodes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectName {
    /// Namespace, empty for what has none.
    pub namespace: CompactString,
    /// Name.
    pub name: CompactString,
}

impl ObjectName {
    /// The name of a namespaced object.
    pub fn new(namespace: impl Into<CompactString>, name: impl Into<CompactString>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => f.write_str(&self.name),
            namespace => write!(f, "{namespace}/{}", self.name),
        }
    }
}

/// Which sort of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the names are Kubernetes'")]
pub enum Kind {
    Node,
    Service,
    EndpointSlice,
    Pod,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Any object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are Kubernetes'")]
pub enum Object {
    Node(Node),
    Service(Service),
    EndpointSlice(EndpointSlice),
    Pod(Pod),
}

impl Object {
    /// What identifies it in its datastore.
    pub fn id(&self) -> (Kind, ObjectName) {
        match self {
            Self::Node(node) => (Kind::Node, ObjectName::new("", node.name.clone())),
            Self::Service(service) => (Kind::Service, service.name.clone()),
            Self::EndpointSlice(slice) => (Kind::EndpointSlice, slice.name.clone()),
            Self::Pod(pod) => (Kind::Pod, pod.name.clone()),
        }
    }
}

/// A machine of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// `status.addresses` of type InternalIP, in their order; the first of a family is where its tunnels end.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`, without host bits.
    pub pod_cidrs: Vec<IpNetwork>,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// `metadata.creationTimestamp`, in seconds since 1970.
    #[serde(default)]
    pub created: Option<i64>,
}

impl Node {
    /// Its first address of `family`.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|address| Family::of(*address) == family)
    }
}

/// A Service that may have a dataplane entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.creationTimestamp`, in seconds since 1970.
    pub created: Option<i64>,
    /// Whether the proxy serves it: not headless, not ExternalName, not another proxy's.
    pub served: bool,
    /// `spec.clusterIPs`.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` with `ipMode: VIP`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`, of both families; none written: everyone.
    pub source_ranges: Option<Vec<IpNetwork>>,
    /// `spec.ports`, at least one where served.
    pub ports: Vec<ServicePortSpec>,
    /// `spec.selector`; empty: endpoints are written by hand.
    pub selector: BTreeMap<String, String>,
    /// `sessionAffinity: ClientIP` with its time-out.
    pub affinity: Option<Duration>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `spec.trafficDistribution`.
    pub distribution: Option<TrafficDistribution>,
    /// `spec.healthCheckNodePort`, where outside traffic stays local.
    pub health_check_port: Option<u16>,
}

/// One of a Service's ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePortSpec {
    /// Its name; empty if unnamed.
    pub name: CompactString,
    /// Protocol.
    pub protocol: Protocol,
    /// Port of the Service's own addresses.
    pub port: u16,
    /// Port of the endpoints.
    pub target: TargetPort,
    /// `nodePort`.
    pub node_port: Option<u16>,
}

/// Where on an endpoint a Service port leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetPort {
    /// The same number on every endpoint.
    Number(u16),
    /// A container port's name, which may mean another number on each pod.
    Name(String),
}

/// A port of an endpoint or a container, to be found by name and protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedPort {
    /// Its name; empty if unnamed.
    pub name: CompactString,
    /// Protocol.
    pub protocol: Protocol,
    /// Where it listens.
    pub number: u16,
}

impl NamedPort {
    /// The number of the port called `name` under `protocol`.
    pub fn find(ports: &[Self], name: &str, protocol: Protocol) -> Option<u16> {
        ports
            .iter()
            .find(|port| port.name == name && port.protocol == protocol)
            .map(|port| port.number)
    }
}

/// Some of a Service's endpoints, of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSlice {
    /// Namespace and name of the slice.
    pub name: ObjectName,
    /// Name of the Service, in the same namespace.
    pub service: CompactString,
    /// `addressType`.
    pub family: Family,
    /// The same for all endpoints of the slice.
    pub ports: Vec<NamedPort>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// When the pod or Service changed for which the slice was written; for whoever hears of the slice, and not kept.
    #[serde(skip)]
    pub triggered: Option<Timestamp>,
}

/// One endpoint and its conditions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its address. A slice's `addresses` beyond the first are redundant by API contract.
    pub address: IpAddr,
    /// Takes new connections.
    pub ready: bool,
    /// Answers, ready or not.
    pub serving: bool,
    /// On its way out.
    pub terminating: bool,
    /// The node it runs on, if known.
    pub node: Option<CompactString>,
    /// For whom it is meant; most endpoints have none.
    pub hints: Option<Arc<Hints>>,
}

/// A pod, as far as Services and addresses need it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `spec.nodeName`.
    pub node: Option<String>,
    /// `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    /// The Ready condition.
    pub ready: bool,
    /// Whether it is being deleted.
    pub terminating: bool,
    /// Named container ports.
    pub ports: Vec<NamedPort>,
}
