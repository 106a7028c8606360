//! Masquerading through iptables, for kernels without nf_tables: the chain [`CHAIN`] of either family's table `nat`.

use std::fmt::Write as _;

use anyhow::Context;
use ipnetwork::IpNetwork;

use super::Masquerade;
use crate::address::Family;
use crate::xtables::{self, Tool};

/// Where the rules are; `POSTROUTING` leads there.
pub const CHAIN: &str = "SLUICE-EGRESS";

/// Brings both families to what `wanted` says; says whether anything was written.
///
/// # Errors
/// iptables is missing or refuses; a family that was not come to by then is as before.
pub fn apply(wanted: &Masquerade) -> anyhow::Result<bool> {
    let mut changed = false;
    for family in [Family::V4, Family::V6] {
        let rules = rules(wanted, family);
        let tables: Vec<(Tool, String)> = if rules.is_empty() {
            // No table is made to look whether it has anything, and a tool that cannot look has nothing.
            xtables::with_table("nat")
                .filter(|tool| tool.family() == family)
                .filter_map(|tool| Some((tool, tool.save("nat").ok()?)))
                .collect()
        } else {
            let tool = xtables::of_host(family, CHAIN).context("masquerading needs it (package iptables)")?;
            vec![(tool, tool.save("nat")?)]
        };
        for (tool, saved) in tables {
            if let Some(text) = script(&saved, &rules) {
                tool.restore(&text)?;
                changed = true;
            }
        }
    }
    Ok(changed)
}

/// Takes all of it out; says whether it was there.
///
/// # Errors
/// iptables'.
pub fn remove() -> anyhow::Result<bool> {
    apply(&Masquerade::default())
}

/// What is to be in the chain, as `iptables-save` writes it; nothing if pods have no addresses of the family.
fn rules(wanted: &Masquerade, family: Family) -> Vec<String> {
    let of_family = |network: &&IpNetwork| Family::of(network.ip()) == family;
    let named = |network: &IpNetwork| format!("{}/{}", network.network(), network.prefix());
    let sources: Vec<_> = wanted.sources.iter().filter(of_family).map(named).collect();
    if sources.is_empty() {
        return Vec::new();
    }
    let networks = wanted.exempt_networks.iter().filter(of_family).map(named);
    let addresses = wanted.exempt_addresses.iter().copied();
    let addresses = addresses
        .filter(|address| Family::of(*address) == family)
        .map(|address| IpNetwork::from(address).to_string());
    let exempt = networks.chain(addresses);
    exempt
        .map(|whom| format!("-A {CHAIN} -d {whom} -j RETURN"))
        // Ports at random: see the same in nftables.
        .chain(
            sources
                .iter()
                .map(|source| format!("-A {CHAIN} -s {source} -j MASQUERADE --random-fully")),
        )
        .collect()
}

/// The text for `iptables-restore --noflush` that brings the table from `saved`, as `iptables-save` writes it, to have `rules` in the
/// chain, or no chain if there are none; nothing where that is so.
fn script(saved: &str, rules: &[String]) -> Option<String> {
    let entrance = format!("-A POSTROUTING -j {CHAIN}");
    let declaration = format!(":{CHAIN} ");
    let (mut exists, mut enters, mut there) = (false, false, Vec::new());
    for line in saved.lines() {
        exists |= line.starts_with(&declaration);
        enters |= line == entrance;
        if line
            .strip_prefix("-A ")
            .is_some_and(|rule| rule.starts_with(CHAIN))
        {
            there.push(line);
        }
    }
    let as_wanted = if rules.is_empty() {
        !exists && !enters
    } else {
        exists && enters && there == rules
    };
    if as_wanted {
        return None;
    }
    // Naming the chain makes it, or empties it.
    let mut text = format!("*nat\n:{CHAIN} - [0:0]\n");
    for rule in rules {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{rule}");
    }
    if rules.is_empty() {
        if enters {
            let _ = writeln!(text, "-D POSTROUTING -j {CHAIN}");
        }
        let _ = writeln!(text, "-X {CHAIN}");
    } else if !enters {
        let _ = writeln!(text, "{entrance}");
    }
    text.push_str("COMMIT\n");
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn wanted() -> Masquerade {
        Masquerade {
            sources: vec!["10.244.1.0/24".parse().unwrap()],
            exempt_networks: vec!["10.244.0.0/16".parse().unwrap(), "fd10::/32".parse().unwrap()],
            exempt_addresses: [IpAddr::from([192, 0, 2, 1])].into(),
        }
    }

    #[test]
    fn only_what_differs_is_written() {
        let rules = rules(&wanted(), Family::V4);
        let whole = script(":POSTROUTING ACCEPT [0:0]\n", &rules).unwrap();
        assert_eq!(
            whole,
            "*nat\n:SLUICE-EGRESS - [0:0]\n\
             -A SLUICE-EGRESS -d 10.244.0.0/16 -j RETURN\n\
             -A SLUICE-EGRESS -d 192.0.2.1/32 -j RETURN\n\
             -A SLUICE-EGRESS -s 10.244.1.0/24 -j MASQUERADE --random-fully\n\
             -A POSTROUTING -j SLUICE-EGRESS\nCOMMIT\n"
        );
        assert_eq!(script(&whole, &rules), None);
        let without_entrance = whole.replace("-A POSTROUTING -j SLUICE-EGRESS\n", "");
        assert_eq!(script(&without_entrance, &rules).as_ref(), Some(&whole));
        let removal = script(&whole, &[]).unwrap();
        assert!(
            removal.ends_with("-D POSTROUTING -j SLUICE-EGRESS\n-X SLUICE-EGRESS\nCOMMIT\n"),
            "{removal}"
        );
        assert_eq!(script(":POSTROUTING ACCEPT [0:0]\n", &[]), None);
        assert!(
            super::rules(&wanted(), Family::V6).is_empty(),
            "pods have no addresses of IPv6"
        );
    }
}
