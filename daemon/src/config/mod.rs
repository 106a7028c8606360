//! The daemon's configuration: `/etc/sluice/config.yaml`, overridden by `SLUICE_*` variables.
//!
//! Here are its keys and their defaults; how it is read, and when refused, is in `load.rs`.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::address::{Cidrs, OptionalAddress, cidr_list, network_list};

pub use self::datastore::{Datastore, DatastoreKind, Etcd, Kubernetes, Manifests};
pub use self::load::ConfigError;

mod datastore;
mod load;

/// Where the configuration lies unless a flag says otherwise.
pub const DEFAULT_PATH: &str = "/etc/sluice/config.yaml";

/// The whole configuration; every key has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// This node's name in the cluster; empty: `$NODE_NAME`, else the hostname.
    pub node_name: String,
    /// Where desired state comes from.
    pub datastore: Datastore,
    /// The networks all pods are in, one per address family.
    #[serde(rename = "clusterCIDRs")]
    pub cluster_cidrs: Cidrs,
    /// The networks ClusterIPs are in, one per address family, none of them among the pods'. A Service outside of them is served all the same.
    #[serde(rename = "serviceCIDRs")]
    pub service_cidrs: Cidrs,
    /// Pods' addresses.
    pub ipam: Ipam,
    /// Node to node.
    pub network: Network,
    /// Services.
    pub proxy: Proxy,
    /// Pods to the outside.
    pub egress: Egress,
    /// Metrics and health.
    pub admin: Admin,
    /// The daemon's own log.
    pub log: Log,
}

/// Pods' addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Ipam {
    /// Networks or single addresses that pods never get; what lies outside this node's pod CIDRs does no harm.
    #[serde(deserialize_with = "network_list")]
    pub reserved: Vec<IpNetwork>,
}

/// Node to node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Network {
    /// How pod traffic reaches another node.
    pub backend: NetworkBackend,
    /// The uplink's name; empty: the device that holds the node's address.
    pub interface: String,
    /// MTU of pod interfaces in bytes; 0: the uplink's, less the overlay's overhead.
    pub mtu: u32,
    /// The overlay.
    pub vxlan: Vxlan,
    /// Whether packets from pod to pod go past the host's stack, with `proxy.mode: ebpf`.
    pub fast_path: bool,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            backend: NetworkBackend::default(),
            interface: String::new(),
            mtu: 0,
            vxlan: Vxlan::default(),
            fast_path: true,
        }
    }
}

/// How pod traffic reaches another node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NetworkBackend {
    /// `Direct` to nodes on the same link, `Vxlan` to the others.
    #[default]
    Auto,
    /// An overlay: works wherever UDP between nodes does.
    Vxlan,
    /// Plain routes: nodes share a link.
    Direct,
}

impl fmt::Display for NetworkBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Vxlan => "vxlan",
            Self::Direct => "direct",
        })
    }
}

/// The overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Vxlan {
    /// VXLAN network identifier, 24 bits; the same on all nodes.
    pub vni: u32,
    /// UDP port, the same on all nodes; 8472 is what flannel and Cilium use, IANA's is 4789.
    pub port: u16,
}

/// Services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Proxy {
    /// Which dataplane translates.
    pub mode: ProxyMode,
    /// The networks whose addresses on this node serve NodePorts; empty: the node's own addresses.
    #[serde(deserialize_with = "cidr_list")]
    pub node_port_addresses: Vec<IpNetwork>,
    /// Whether a ClusterIP answers pings of pods and nodes while it has an endpoint.
    #[serde(rename = "pingClusterIPs")]
    pub ping_cluster_ips: bool,
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            mode: ProxyMode::default(),
            node_port_addresses: Vec::new(),
            ping_cluster_ips: true,
        }
    }
}

/// Which dataplane translates Service addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProxyMode {
    /// The best one that works here.
    #[default]
    Auto,
    /// At the socket and at the device, in eBPF.
    Ebpf,
    /// By the kernel's connection tracking, in nftables.
    Nftables,
    /// By the kernel's connection tracking, in iptables.
    Iptables,
    /// None: something else on the node does Services.
    Off,
}

/// Pods to the outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Egress {
    /// Whether pods leave the cluster with their node's address.
    pub masquerade: bool,
    /// Destinations that see the pod's own address all the same.
    #[serde(rename = "nonMasqueradeCIDRs", deserialize_with = "cidr_list")]
    pub non_masquerade_cidrs: Vec<IpNetwork>,
}

/// Metrics and health.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Admin {
    /// Where `/metrics` is served.
    pub metrics: SocketAddr,
    /// Where `/healthz` and `/readyz` are served.
    pub health: SocketAddr,
    /// Where kube-proxy's `/healthz` is served in its place, under Kubernetes; empty: nowhere.
    pub kube_proxy_health: OptionalAddress,
    /// Where kube-proxy's `/proxyMode` is served in its place, under Kubernetes; empty: nowhere.
    pub kube_proxy_metrics: OptionalAddress,
}

/// The daemon's own log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Log {
    /// The least severity that is written.
    pub level: LogLevel,
    /// Lines for people or for machines.
    pub format: LogFormat,
}

/// Severity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the names are the meaning")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// Shape of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            datastore: Datastore::default(),
            cluster_cidrs: Cidrs::fixed([10, 244, 0, 0], 16),
            service_cidrs: Cidrs::fixed([10, 96, 0, 0], 12),
            ipam: Ipam::default(),
            network: Network::default(),
            proxy: Proxy::default(),
            egress: Egress::default(),
            admin: Admin::default(),
            log: Log::default(),
        }
    }
}

impl Default for Vxlan {
    fn default() -> Self {
        Self { vni: 1, port: 8472 }
    }
}

impl Default for Egress {
    fn default() -> Self {
        Self {
            masquerade: true,
            non_masquerade_cidrs: Vec::new(),
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            metrics: ([127, 0, 0, 1], 9095).into(),
            health: ([127, 0, 0, 1], 9096).into(),
            kube_proxy_health: OptionalAddress::of((Ipv6Addr::UNSPECIFIED, 10256).into()),
            kube_proxy_metrics: OptionalAddress::of(([127, 0, 0, 1], 10249).into()),
        }
    }
}
