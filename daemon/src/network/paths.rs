//! How each remote pod CIDR is reached: pure, decided per remote node.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::Uplink;
use super::vtep::{self, Mac};
use crate::config::NetworkBackend;
use crate::state::node_routes::{NodeRoutes, RemoteNode};
use crate::state::objects::Node;
use crate::state::service_port::Family;

/// The way to a remote node's pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    /// A plain route through the node's address, which is on the uplink's link.
    Direct {
        /// The remote node.
        node: String,
        /// Its address.
        gateway: IpAddr,
    },
    /// Through the tunnel over the underlay of `remote`'s family.
    Vxlan {
        /// The remote node.
        node: String,
        /// Where its tunnel ends.
        remote: IpAddr,
        /// The MAC behind which its pods are.
        vtep: Mac,
    },
}

/// What was decided.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// By pod CIDR.
    pub paths: BTreeMap<IpNetwork, Path>,
    /// CIDRs that cannot be reached, one sentence each.
    pub problems: Vec<String>,
}

/// Decides the path to every remote pod CIDR.
pub fn decide(backend: NetworkBackend, uplink: &Uplink, own: &Node, routes: &NodeRoutes) -> Decision {
    let mut decision = Decision::default();
    for (cidr, remote) in &routes.remote {
        match path(backend, uplink, own, cidr, remote) {
            Ok(path) => {
                decision.paths.insert(*cidr, path);
            }
            Err(reason) => decision
                .problems
                .push(format!("pods of node {} ({cidr}): {reason}", remote.name)),
        }
    }
    decision
}

fn path(
    backend: NetworkBackend,
    uplink: &Uplink,
    own: &Node,
    cidr: &IpNetwork,
    remote: &RemoteNode,
) -> Result<Path, String> {
    let RemoteNode { name, address } = remote;
    let on_link = uplink.addresses.iter().any(|network| network.contains(*address));
    // The kernel routes IPv6 through an IPv6 gateway only, and IPv4 here likewise.
    let same_family = Family::of(cidr.ip()) == Family::of(*address);
    let direct = || Path::Direct {
        node: name.clone(),
        gateway: *address,
    };
    let vxlan = || match own.address(Family::of(*address)) {
        Some(_) => Ok(Path::Vxlan {
            node: name.clone(),
            remote: *address,
            vtep: vtep::mac(name),
        }),
        None => Err(format!(
            "it is at {address}, and this node has no address of that family to reach it from"
        )),
    };
    match backend {
        NetworkBackend::Auto if on_link && same_family => Ok(direct()),
        NetworkBackend::Auto | NetworkBackend::Vxlan => vxlan(),
        NetworkBackend::Direct if on_link && same_family => Ok(direct()),
        NetworkBackend::Direct => Err(format!(
            "network.backend is direct, but {address} is not a neighbour of that family on {}; use auto or vxlan",
            uplink.device.name
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Device;

    fn decided(backend: NetworkBackend, remote: &str) -> Decision {
        let uplink = Uplink {
            device: Device {
                index: 2,
                name: "eth0".to_owned(),
            },
            mtu: 1500,
            addresses: vec!["172.30.0.11/24".parse().unwrap()],
        };
        let own = Node {
            name: "a".to_owned(),
            addresses: vec!["172.30.0.11".parse().unwrap()],
            pod_cidrs: Vec::new(),
            zone: None,
            created: None,
        };
        let mut routes = NodeRoutes::default();
        let remote = RemoteNode {
            name: "b".to_owned(),
            address: remote.parse().unwrap(),
        };
        routes.remote.insert("10.244.2.0/24".parse().unwrap(), remote);
        decide(backend, &uplink, &own, &routes)
    }

    /// N2
    #[test]
    fn auto_is_direct_on_the_link_and_vxlan_beyond() {
        let near = decided(NetworkBackend::Auto, "172.30.0.12");
        assert!(
            matches!(near.paths.values().next(), Some(Path::Direct { .. })),
            "{near:?}"
        );
        let far = decided(NetworkBackend::Auto, "172.30.1.12");
        assert!(
            matches!(far.paths.values().next(), Some(Path::Vxlan { .. })),
            "{far:?}"
        );
    }

    /// N2
    #[test]
    fn direct_says_so_where_it_cannot() {
        let far = decided(NetworkBackend::Direct, "172.30.1.12");
        assert!(far.paths.is_empty());
        assert!(
            far.problems[0].contains("node b") && far.problems[0].contains("use auto or vxlan"),
            "{far:?}"
        );
    }

    #[test]
    fn a_node_of_another_family_is_named_not_routed() {
        let other = decided(NetworkBackend::Vxlan, "fd00::2");
        assert!(
            other.paths.is_empty() && other.problems[0].contains("fd00::2"),
            "{other:?}"
        );
    }
}
