//! Where it is measured: two nodes with pods, and a host outside that knows the way to both.
//!
//! ```text
//!  outside ── 198.51.100.0/24 ── near node ── 192.0.2.0/24 ── far node
//!                                 │     │                        │
//!                              client  near                     far
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;
use sluice_daemon::network::Device;
use sluice_daemon::network::pods::PodDevice;

use super::translator::{self, Translator};
use crate::cgroup::Cgroup;
use crate::hosts::Host;
use crate::load::PORT;

/// The node that clients are on or come to.
pub const NEAR_NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The endpoint on that node.
pub const NEAR: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);
/// The endpoint on the other.
pub const FAR: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 2);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);

/// From where to where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From a pod to one on its node.
    PodToNear,
    /// From a pod to one on another node.
    PodToFar,
    /// From outside to a node that has the endpoint.
    OutsideToNear,
    /// From outside to a node whose neighbour has it.
    OutsideToFar,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::PodToNear,
        Self::PodToFar,
        Self::OutsideToNear,
        Self::OutsideToFar,
    ];

    /// What it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::PodToNear => "ClusterIP, same node",
            Self::PodToFar => "ClusterIP, other node",
            Self::OutsideToNear => "NodePort, endpoint there",
            Self::OutsideToFar => "NodePort, endpoint elsewhere",
        }
    }

    /// The endpoint at its end.
    pub fn endpoint(self) -> Endpoint {
        match self {
            Self::PodToNear | Self::OutsideToNear => Endpoint::Near,
            Self::PodToFar | Self::OutsideToFar => Endpoint::Far,
        }
    }
}

/// The endpoints that answer; each has a Service to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// On the client's node.
    Near,
    /// On the other.
    Far,
}

impl Endpoint {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Near, Self::Far];

    /// Its Service's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
        }
    }

    /// The pod's.
    pub fn address(self) -> Ipv4Addr {
        match self {
            Self::Near => NEAR,
            Self::Far => FAR,
        }
    }

    /// Its Service's.
    pub fn cluster_ip(self) -> Ipv4Addr {
        match self {
            Self::Near => Ipv4Addr::new(10, 96, 0, 100),
            Self::Far => Ipv4Addr::new(10, 96, 0, 101),
        }
    }

    /// Its Service's.
    pub fn node_port(self) -> u16 {
        match self {
            Self::Near => 30_080,
            Self::Far => 30_081,
        }
    }
}

/// A node, as the translators see it.
pub struct Node {
    /// Where it runs.
    pub host: Host,
    /// Its name in the cluster.
    pub name: &'static str,
    /// Its address.
    pub address: Ipv4Addr,
    /// The number of its pod network, `10.244.N.0/24`.
    pub number: u8,
    /// Where packets from other hosts come in.
    pub uplinks: Vec<Device>,
    /// Its pods.
    pub pods: Vec<PodDevice>,
}

/// The whole of it.
pub struct Stage {
    translator: Translator,
    client: Host,
    near: Host,
    far: Host,
    outside: Host,
    _nodes: [Node; 2],
    /// Those of the nodes' pods. Last: whoever is in them has ended by then.
    _cgroups: [Cgroup; 2],
}

impl Stage {
    /// Makes the hosts and has `translator` see to Services on both nodes.
    ///
    /// # Errors
    /// Not root, or what the kernel or a tool refused.
    pub fn make(translator: Translator) -> Result<Self> {
        // Made first, so that they are removed last: whoever is in them has ended by then.
        let cgroups = [Cgroup::threaded()?, Cgroup::threaded()?];
        let (near_node, far_node, outside) = (Host::new()?, Host::new()?, Host::new()?);
        near_node.join("uplink", &far_node, "uplink")?;
        near_node.join("outside", &outside, "eth0")?;
        let (client, a) = near_node.pod("sluicea", CLIENT.into())?;
        let (near, b) = near_node.pod("sluiceb", NEAR.into())?;
        let (far, c) = far_node.pod("sluicec", FAR.into())?;
        near_node.ip(&[
            "addr add 192.0.2.1/24 dev uplink".to_owned(),
            "addr add 198.51.100.1/24 dev outside".to_owned(),
            "route add 10.244.2.0/24 via 192.0.2.2".to_owned(),
        ])?;
        far_node.ip(&[
            "addr add 192.0.2.2/24 dev uplink".to_owned(),
            "route add 10.244.1.0/24 via 192.0.2.1".to_owned(),
            "route add 198.51.100.0/24 via 192.0.2.1".to_owned(),
        ])?;
        outside.ip(&[
            "addr add 198.51.100.2/24 dev eth0".to_owned(),
            "route add default via 198.51.100.1".to_owned(),
        ])?;
        let nodes = [
            Node {
                uplinks: vec![near_node.device("uplink")?, near_node.device("outside")?],
                host: near_node,
                name: "near-node",
                address: NEAR_NODE,
                number: 1,
                pods: vec![a, b],
            },
            Node {
                uplinks: vec![far_node.device("uplink")?],
                host: far_node,
                name: "far-node",
                address: Ipv4Addr::new(192, 0, 2, 2),
                number: 2,
                pods: vec![c],
            },
        ];
        cgroups[0].take(&client)?;
        cgroups[0].take(&near)?;
        cgroups[1].take(&far)?;
        for (node, cgroup) in nodes.iter().zip(&cgroups) {
            translator::dress(translator, node, cgroup.path())?;
        }
        Ok(Self {
            translator,
            client,
            near,
            far,
            outside,
            _nodes: nodes,
            _cgroups: cgroups,
        })
    }

    /// Who sees to Services here.
    pub fn translator(&self) -> Translator {
        self.translator
    }

    /// Who asks, who answers, where that one listens, and where the other asks.
    pub fn ends(&self, way: Way) -> (&Host, &Host, IpAddr, SocketAddr) {
        let endpoint = way.endpoint();
        let listens = IpAddr::V4(endpoint.address());
        let server = match endpoint {
            Endpoint::Near => &self.near,
            Endpoint::Far => &self.far,
        };
        let inside = matches!(way, Way::PodToNear | Way::PodToFar);
        let client = if inside { &self.client } else { &self.outside };
        let to = match self.translator {
            Translator::Nobody => SocketAddr::new(listens, PORT),
            _ if inside => SocketAddr::new(endpoint.cluster_ip().into(), 80),
            _ => SocketAddr::new(NEAR_NODE.into(), endpoint.node_port()),
        };
        (client, server, listens, to)
    }
}
