//! What the daemon tells about itself and its node. Field names are the API of `sluicectl -o json`.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The node as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The daemon's version.
    pub version: String,
    /// Seconds since the daemon started.
    pub uptime_seconds: u64,
    /// What is waited for before pods can be wired; empty: the node is ready.
    pub awaiting: Vec<String>,
    /// What is wrong, one sentence each, with what to do.
    pub problems: Vec<String>,
    /// Where desired state comes from.
    pub datastore: Datastore,
    /// Node to node.
    pub network: Network,
    /// Services.
    pub proxy: Proxy,
    /// Whether pods leave the cluster with their node's address.
    pub masquerade: bool,
    /// Address pools.
    pub pools: Vec<Pool>,
    /// Kernel objects that were not as they had been left, and were put right.
    pub drift_repaired: u64,
    /// Pods' devices removed since the daemon started.
    #[serde(default)]
    pub removals: Removals,
}

/// Removals of pods' devices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Removals {
    /// Devices removed.
    pub devices: u64,
    /// Groups they were removed in: each cost the kernel's wait once.
    pub groups: u64,
}

/// Where desired state comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Datastore {
    /// Which kind, and where.
    pub source: String,
    /// Whether the first full list is in.
    pub loaded: bool,
    /// Objects known.
    pub nodes: usize,
    /// Objects known.
    pub services: usize,
    /// Objects known.
    pub pods: usize,
}

/// Node to node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// `network.backend`.
    pub backend: String,
    /// The uplink's name.
    pub uplink: String,
    /// MTU of pod interfaces in bytes.
    pub pod_mtu: u32,
    /// This node's pod CIDRs.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
    /// Remote pod CIDRs reached by a plain route.
    pub direct: usize,
    /// Remote pod CIDRs reached through the tunnel.
    pub tunnelled: usize,
}

/// Services.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Proxy {
    /// The dataplane at work; empty before the first sync.
    pub mode: String,
    /// Why it is this one.
    #[serde(default)]
    pub reason: String,
    /// Service ports programmed.
    pub service_ports: usize,
    /// Frontends programmed.
    pub frontends: usize,
    /// Backends programmed.
    pub backends: usize,
    /// How often something of them was programmed since the daemon started.
    #[serde(default)]
    pub syncs: u64,
}

/// One pool of pod addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pool {
    /// Its network.
    pub cidr: String,
    /// Addresses that can be given.
    pub size: u128,
    /// Addresses held by pods.
    pub held: u128,
    /// Addresses that rest after use.
    pub resting: u128,
}

/// A node and the way to its pods.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its pod CIDRs.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
    /// How its pods are reached from here: `this node`, `direct`, `vxlan` or why not.
    pub path: String,
}

/// The way to the pods of one CIDR.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// The pod CIDR.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: String,
    /// The node its pods are on.
    pub node: String,
    /// `this node`, `direct` or `vxlan`.
    pub path: String,
    /// The next hop; none on this node.
    pub via: Option<IpAddr>,
    /// The device towards it; empty on this node.
    pub device: String,
    /// Where the tunnel ends: the other node's address; none without a tunnel.
    pub tunnel_end: Option<IpAddr>,
    /// How the kernel now differs from that; empty if it has it all.
    pub failure: String,
}

/// One balanced set of a Service, as the kernel has it now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the port, empty if unnamed.
    pub port: String,
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// Where clients connect, and why that leads here.
    pub frontends: Vec<Frontend>,
    /// Where connections go.
    pub backends: Vec<SocketAddr>,
    /// Seconds a client sticks to its endpoint; 0: not at all.
    pub affinity_seconds: u64,
    /// Why it is not programmed, or how the kernel differs from what it was told; empty if all is well.
    pub failure: String,
}

/// A connection through a Service whose packets are translated on their way: from outside, or from a socket that could
/// not be translated itself. What is translated at the socket needs no such entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// The Service port, `NAMESPACE/NAME[:PORT]/PROTOCOL`; empty if no Service leads there any more.
    pub service: String,
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// Who connected.
    pub client: SocketAddr,
    /// Where to.
    pub frontend: SocketAddr,
    /// Which endpoint it was given.
    pub backend: SocketAddr,
    /// The address and port of this node's that the endpoint sees; none where it sees the client's own.
    pub stand_in: Option<SocketAddr>,
    /// How far it is: `opening`, `established`, `closing`, `closed`; of datagrams `unanswered`, `answered`.
    pub state: String,
    /// Seconds since its last packet.
    pub idle_seconds: u64,
}

/// An address that leads to a Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// Address and port.
    pub address: SocketAddr,
    /// `ClusterIp`, `NodePort`, `ExternalIp` or `LoadBalancer`.
    pub kind: String,
}
