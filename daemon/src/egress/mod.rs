//! Pods to the outside: which packets leave with their node's address.
//!
//! Owns the nftables table `inet sluice-egress`, and nothing else. [`Masquerade`] is the pure part; [`nftables`] writes
//! it to the kernel in one transaction, so that there is no moment without a rule.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::config;
use crate::state::cluster::Cluster;

pub mod nftables;

/// What is masqueraded: packets from `sources`, except to `exempt_networks` and `exempt_addresses`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Masquerade {
    /// This node's pod CIDRs. Empty: nothing is masqueraded.
    pub sources: Vec<IpNetwork>,
    /// Networks that see the pod's own address: the pod networks and the operator's `nonMasqueradeCIDRs`.
    pub exempt_networks: Vec<IpNetwork>,
    /// Addresses that do: the nodes'.
    pub exempt_addresses: BTreeSet<IpAddr>,
}

/// What the configuration and the cluster ask for, for a node with the pod CIDRs `own`.
pub fn masquerade(config: &config::Config, cluster: &Cluster, own: &[IpNetwork]) -> Masquerade {
    if !config.egress.masquerade {
        return Masquerade::default();
    }
    let mut exempt_networks: Vec<_> = config
        .cluster_cidrs
        .iter()
        .chain(&config.egress.non_masquerade_cidrs)
        .copied()
        .collect();
    exempt_networks.sort_unstable();
    exempt_networks.dedup();
    Masquerade {
        sources: own.to_vec(),
        exempt_networks,
        exempt_addresses: cluster
            .nodes()
            .flat_map(|node| node.addresses.iter().copied())
            .collect(),
    }
}
