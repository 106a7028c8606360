//! What a Service comes to on this node: sets of addresses to listen on, each with the backends behind them.
//!
//! One Service becomes one [`ServicePort`] per port, address family and [`Scope`]. This is all the proxy sees: it
//! knows nothing of EndpointSlices, selectors or traffic policies, they are folded in here.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use compact_str::CompactString;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

pub use crate::address::Family;

/// Transport protocol of a Service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// IPPROTO_TCP.
    Tcp,
    /// IPPROTO_UDP.
    Udp,
    /// IPPROTO_SCTP.
    Sctp,
}

impl Protocol {
    /// The IANA protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// Which of a Service's backends a [`ServicePort`] holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Those of the whole cluster.
    Cluster,
    /// Those on this node alone (`internalTrafficPolicy` or `externalTrafficPolicy: Local`).
    Local,
}

/// Identity of a [`ServicePort`], the same over its whole life and over restarts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortKey {
    /// Namespace of the Service.
    pub namespace: CompactString,
    /// Name of the Service.
    pub name: CompactString,
    /// Name of the port; empty where a Service has but one and does not name it.
    pub port: CompactString,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// Family of all its addresses.
    pub family: Family,
    /// Which backends it balances over.
    pub scope: Scope,
}

impl fmt::Display for ServicePortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        write!(f, "/{}", self.protocol)
    }
}

/// Why an address leads to a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.ports[].nodePort` on one address of this node.
    NodePort,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// `spec.containers[].ports[].hostPort` of a pod here, on one address of this node.
    HostPort,
}

/// An address and port that leads to a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// Where clients connect.
    pub address: SocketAddr,
    /// Why.
    pub kind: FrontendKind,
}

/// Where an endpoint is, seen from this node: decides which source address brings its replies back here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// Here: replies pass this node whatever their source, so the client's address is kept.
    ThisNode,
    /// A pod elsewhere: replies come back to this node's address in the pod network.
    PodNetwork,
    /// Anything else, a node or a host outside: replies come back to this node's own address.
    Outside,
}

/// An endpoint that takes new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Where connections go.
    pub address: SocketAddr,
    /// Where it runs.
    pub place: Place,
}

/// What becomes of connections to a set without backends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WhenEmpty {
    /// They are refused at once: nobody serves them.
    #[default]
    Refuse,
    /// They are dropped: the Service has endpoints, but none on this node, where it wants them.
    Drop,
}

/// One balanced set: every frontend leads to every backend, evenly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Sorted, without duplicates, all of the key's family.
    pub frontends: Vec<Frontend>,
    /// Sorted, without duplicates, all of the key's family.
    pub backends: Vec<Backend>,
    /// `sessionAffinity: ClientIP` with its time-out.
    pub affinity: Option<Duration>,
    /// What becomes of connections while there are no backends.
    pub when_empty: WhenEmpty,
    /// Who may connect to the frontends of kind [`FrontendKind::LoadBalancer`]; others' packets are dropped. All of the
    /// key's family, sorted; empty: nobody of this family, as it was written for the other. `None`: everyone.
    pub source_ranges: Option<Vec<IpNetwork>>,
}
