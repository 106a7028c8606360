//! Pods to the outside: which packets leave with their node's address.
//!
//! Owns the nftables table `inet sluice-egress` or, where the kernel has no nf_tables, the chain `SLUICE-EGRESS` of iptables, and
//! nothing else. [`Masquerade`] is the pure part; [`nftables`] and [`iptables`] write it to the kernel in one transaction, so
//! that there is no moment without a rule.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Context;
use ipnetwork::IpNetwork;

use crate::config;
use crate::state::cluster::Cluster;

pub mod iptables;
pub mod nftables;

/// Brings the kernel to `wanted`; says whether anything was written. With `known` the kernel had it already, and only whether
/// it has it still is looked at.
///
/// # Errors
/// The kernel's answer, or iptables' where there is no nf_tables; what was in force is then still.
pub fn apply(wanted: &Masquerade, known: bool) -> anyhow::Result<bool> {
    match nftables::present() {
        Err(error) if nftables::is_missing(&error) => {
            iptables::apply(wanted).context("through iptables, as the kernel has no nf_tables")
        }
        Err(error) => Err(error),
        Ok(present) if known && present != wanted.sources.is_empty() => Ok(false),
        Ok(_) => nftables::apply(wanted).map(|()| true),
    }
}

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
