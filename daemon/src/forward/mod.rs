//! The host's own firewall, where it drops what is forwarded: pods' packets are let through, and nothing else.
//!
//! Docker sets the policy of `FORWARD` to `DROP`, and distributions' firewalls end it with a `REJECT`. Owns the chain
//! [`CHAIN`] and the one rule that leads there, in each family and flavour of iptables that is in use. Never changes a
//! policy or another's rule, never makes a table that nobody uses, and comes after the operator's own rules wherever
//! it can, so that those win.
//!
//! [`chain`] is the pure part; [`crate::xtables`] runs iptables.

use anyhow::Context;
use ipnetwork::IpNetwork;

use crate::xtables::{self, Tool};

mod chain;

/// The chain that lets pods' packets through.
pub const CHAIN: &str = "SLUICE-FORWARD";

/// What a look at the firewall found and did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Which firewalls were made to let pods through.
    pub opened: Vec<&'static str>,
    /// What could not be done, one sentence each.
    pub problems: Vec<String>,
}

/// Sees to it that packets from and to `cluster_cidrs` are forwarded. Blocks while iptables runs.
pub fn ensure(cluster_cidrs: &[IpNetwork]) -> Outcome {
    let mut outcome = Outcome::default();
    for tool in xtables::in_use() {
        let cidrs: Vec<_> = cluster_cidrs
            .iter()
            .copied()
            .filter(|cidr| tool.carries(cidr))
            .collect();
        let opened = open(tool, &cidrs).context(
            "letting pods through the host's FORWARD chain; accept traffic from and to clusterCIDRs there",
        );
        match opened {
            Ok(true) => outcome.opened.push(tool.name()),
            Ok(false) => {}
            Err(error) => outcome.problems.push(format!("{error:#}")),
        }
    }
    outcome
}

fn open(tool: Tool, cidrs: &[IpNetwork]) -> anyhow::Result<bool> {
    let found = chain::Found::parse(&tool.list("filter", "FORWARD")?);
    if !found.is_in_the_way() || cidrs.is_empty() {
        return Ok(false);
    }
    let ours = if found.leads_to_ours {
        tool.list("filter", CHAIN)?
    } else {
        String::new()
    };
    match chain::script(&found, &ours, cidrs) {
        Some(script) => tool.restore(&script).map(|()| true),
        None => Ok(false),
    }
}

/// Takes the chain and the rule that leads there out of every firewall; says whether there was any.
///
/// # Errors
/// What iptables answered.
pub fn remove() -> anyhow::Result<bool> {
    let mut any = false;
    for tool in xtables::in_use() {
        if chain::Found::parse(&tool.list("filter", "FORWARD")?).leads_to_ours {
            tool.restore(&chain::removal())?;
            any = true;
        }
    }
    Ok(any)
}
