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
use crate::netfilter::conntrack;
use crate::netfilter::wire::{Netfilter, Rules};
use crate::state::cluster::Cluster;

pub mod iptables;
pub mod nftables;

/// What the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce {
    /// What was asked for.
    pub wanted: Masquerade,
    /// How nf_tables shows it.
    shown: Rules,
}

/// How a pass over the rules ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// They were as they should be.
    Unchanged,
    /// They were made so.
    Changed,
    /// They had been, and somebody else had changed them.
    PutBack,
}

/// Brings the kernel to `wanted`, where `before` is what the last pass left.
///
/// # Errors
/// The kernel's answer, or iptables' where there is no nf_tables; what was in force is then still.
pub fn apply(wanted: Masquerade, before: Option<InForce>) -> anyhow::Result<(InForce, Outcome)> {
    let known = before.filter(|before| before.wanted == wanted);
    let found = match nftables::shown() {
        Err(error) if nftables::is_missing(&error) => None,
        found => Some(found?),
    };
    let (shown, changed) = match found {
        None => {
            let changed =
                iptables::apply(&wanted).context("through iptables, as the kernel has no nf_tables")?;
            (Rules::default(), changed)
        }
        Some(found) if known.as_ref().is_some_and(|known| known.shown == found) => (found, false),
        Some(_) => {
            nftables::apply(&wanted)?;
            (nftables::shown()?, true)
        }
    };
    let outcome = match (changed, known) {
        (false, _) => Outcome::Unchanged,
        (true, None) => Outcome::Changed,
        (true, Some(_)) => Outcome::PutBack,
    };
    if outcome == Outcome::PutBack {
        forget_unmasqueraded(&wanted);
    }
    Ok((InForce { wanted, shown }, outcome))
}

/// What began while the rules were gone leaves with the pod's own address until its entry in the connection table ends, and nobody
/// answers it.
fn forget_unmasqueraded(wanted: &Masquerade) {
    let forgotten = Netfilter::open().and_then(|netfilter| {
        conntrack::remove_unmasqueraded(&netfilter, |from, to| wanted.covers(from, to))
    });
    match forgotten {
        Ok(0) => {}
        Ok(removed) => tracing::info!(removed, "connections that left as their pods were forgotten"),
        // Without nfnetlink it cannot be done, and the entry ends by itself once its client gives up.
        Err(error) => tracing::debug!("looking for connections that left as their pods: {error:#}"),
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

impl Masquerade {
    /// Whether what goes from one address to the other leaves as the node.
    pub fn covers(&self, from: IpAddr, to: IpAddr) -> bool {
        let any = |networks: &[IpNetwork], address| networks.iter().any(|network| network.contains(address));
        any(&self.sources, from) && !any(&self.exempt_networks, to) && !self.exempt_addresses.contains(&to)
    }
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
