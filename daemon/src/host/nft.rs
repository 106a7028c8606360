//! Whose tables of nftables there are, and chains that refuse what is forwarded, as `nft` lists them in JSON
//! (libnftables-json(5)).

use std::collections::BTreeSet;
use std::process::Command;

use serde::Deserialize;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Tables that have chains, as `family table`.
    pub tables: BTreeSet<String>,
    /// Chains that drop what is forwarded by policy, as `family table chain`.
    ///
    /// The chain that iptables makes is left out: it is opened, not just reported (see [`crate::forward`]).
    pub dropping_chains: Vec<String>,
}

/// Asks the kernel; nothing is found where there is no `nft`.
pub fn look() -> Found {
    match Command::new("nft").args(["--json", "list", "chains"]).output() {
        Ok(answer) if answer.status.success() => parse(&answer.stdout),
        _ => Found::default(),
    }
}

#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    chain: Option<Chain>,
}

#[derive(Deserialize)]
struct Chain {
    family: String,
    table: String,
    name: String,
    #[serde(default)]
    hook: String,
    #[serde(default)]
    policy: String,
}

fn parse(json: &[u8]) -> Found {
    let Ok(listing) = serde_json::from_slice::<Listing>(json) else {
        return Found::default();
    };
    let of_iptables = |chain: &Chain| {
        ["ip", "ip6"].contains(&chain.family.as_str()) && chain.table == "filter" && chain.name == "FORWARD"
    };
    let mut found = Found::default();
    for chain in listing.nftables.into_iter().filter_map(|entry| entry.chain) {
        let table = format!("{} {}", chain.family, chain.table);
        if chain.hook == "forward" && chain.policy == "drop" && !of_iptables(&chain) {
            found.dropping_chains.push(format!("{table} {}", chain.name));
        }
        found.tables.insert(table);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// N12
    #[test]
    fn only_what_drops_forwarded_packets_counts_and_not_iptables_own_chain() {
        let json = br#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 2, "type": "filter",
                       "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "inet", "table": "firewall", "name": "fwd", "handle": 1, "type": "filter",
                       "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "inet", "table": "firewall", "name": "in", "handle": 2, "type": "filter",
                       "hook": "input", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "inet", "table": "firewall", "name": "plain", "handle": 3}}]}"#;
        let found = parse(json);
        assert_eq!(found.dropping_chains, ["inet firewall fwd"]);
        assert!(found.tables.iter().eq(["inet firewall", "ip filter"]));
        assert_eq!(parse(b"not json"), Found::default());
    }
}
