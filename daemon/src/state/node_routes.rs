//! Which pod CIDRs lie behind which node, and which claims are refused.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::cluster::Cluster;
use super::objects::Node;
use super::service_port::Family;
use crate::address::Cidrs;

/// The pod CIDRs of other nodes, each with the address of the node it lies behind, and what was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeRoutes {
    /// By pod CIDR.
    pub remote: BTreeMap<IpNetwork, RemoteNode>,
    /// This node's own pod CIDRs, as far as its claim stands.
    pub own: Vec<IpNetwork>,
    /// Refused claims, one sentence each.
    pub refused: Vec<String>,
}

/// Where a pod CIDR is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteNode {
    /// The node's name.
    pub name: String,
    /// Its address in the CIDR's family, else its first: tunnels and routes lead there.
    pub address: IpAddr,
}

/// Decides every claim in `cluster`, seen from the node called `own_name`.
///
/// A claim outside `cluster_cidrs` is refused. Of two that overlap, a node keeps what it holds in `held` (the claims
/// that stood before), so that a newcomer cannot take the traffic of the rightful holder; with no history the node that was
/// created first wins, and of those of one second the first name in order, which every node decides alike.
pub fn node_routes(
    cluster: &Cluster,
    own_name: &str,
    cluster_cidrs: &Cidrs,
    held: &BTreeMap<IpNetwork, String>,
) -> (NodeRoutes, BTreeMap<IpNetwork, String>) {
    let mut routes = NodeRoutes::default();
    let mut granted: BTreeMap<IpNetwork, String> = BTreeMap::new();
    let mut claims: Vec<(&Node, IpNetwork)> = cluster
        .nodes()
        .flat_map(|node| node.pod_cidrs.iter().map(move |cidr| (node, *cidr)))
        .collect();
    claims.sort_by_key(|(node, cidr)| {
        let newcomer = held.get(cidr) != Some(&node.name);
        (newcomer, node.created.unwrap_or(i64::MAX), &node.name, *cidr)
    });

    for (node, cidr) in claims {
        if !cluster_cidrs.contain(&cidr) {
            let all: Vec<_> = cluster_cidrs.iter().map(ToString::to_string).collect();
            routes.refused.push(format!(
                "node {} claims the pod CIDR {cidr}, which is outside clusterCIDRs ({}): its pods there get no traffic; correct clusterCIDRs, or what gives out pod CIDRs",
                node.name,
                all.join(", ")
            ));
            continue;
        }
        if let Some((other, holder)) = overlapping(&granted, &cidr) {
            routes.refused.push(format!(
                "node {} claims the pod CIDR {cidr}, which overlaps {other} of node {holder}; {holder} keeps it, and pods of {} are not \
                 reached: delete its Node object so that it gets another, and correct what gave it this one",
                node.name, node.name
            ));
            continue;
        }
        granted.insert(cidr, node.name.clone());
        if node.name == own_name {
            routes.own.push(cidr);
            continue;
        }
        let address = node
            .address(Family::of(cidr.ip()))
            .or_else(|| node.addresses.first().copied());
        match address {
            Some(address) => {
                routes.remote.insert(
                    cidr,
                    RemoteNode {
                        name: node.name.clone(),
                        address,
                    },
                );
            }
            None => routes.refused.push(format!(
                "node {} has the pod CIDR {cidr} but no InternalIP in status.addresses; it cannot be reached",
                node.name
            )),
        }
    }
    (routes, granted)
}

fn overlapping<'a>(
    granted: &'a BTreeMap<IpNetwork, String>,
    cidr: &IpNetwork,
) -> Option<(&'a IpNetwork, &'a String)> {
    // Granted claims do not overlap each other, so only the nearest neighbours in address order can overlap this one.
    let before = granted.range(..=*cidr).next_back();
    let after = granted.range(*cidr..).next();
    before
        .into_iter()
        .chain(after)
        .find(|(other, _)| other.contains(cidr.network()) || cidr.contains(other.network()))
}
