//! Chains of nftables that refuse what is forwarded, as `nft` lists them in JSON (libnftables-json(5)).

use std::process::Command;

use serde::Deserialize;

/// The host's chains that drop what is forwarded by policy, as `family table chain`; none where there is no `nft`.
///
/// The chain that iptables makes is left out: it is opened, not just reported (see [`crate::forward`]).
pub fn dropping_chains() -> Vec<String> {
    match Command::new("nft").args(["--json", "list", "chains"]).output() {
        Ok(answer) if answer.status.success() => parse(&answer.stdout),
        _ => Vec::new(),
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

fn parse(json: &[u8]) -> Vec<String> {
    let Ok(listing) = serde_json::from_slice::<Listing>(json) else {
        return Vec::new();
    };
    let of_iptables = |chain: &Chain| {
        ["ip", "ip6"].contains(&chain.family.as_str()) && chain.table == "filter" && chain.name == "FORWARD"
    };
    listing
        .nftables
        .into_iter()
        .filter_map(|entry| entry.chain)
        .filter(|chain| chain.hook == "forward" && chain.policy == "drop" && !of_iptables(chain))
        .map(|chain| format!("{} {} {}", chain.family, chain.table, chain.name))
        .collect()
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
        assert_eq!(parse(json), ["inet firewall fwd"]);
        assert_eq!(parse(b"not json"), [""; 0]);
    }
}
