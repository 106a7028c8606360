//! Which pod CIDR a node claims. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use sluice_cni::stable_hash::stable_hash;

/// Who holds which pod CIDR.
pub type Held = BTreeMap<IpNetwork, String>;

/// What a node shall claim of one address family.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    /// The pod CIDR.
    pub cidr: IpNetwork,
    /// Why it is not the one that was asked for.
    pub remark: Option<String>,
}

/// Chooses one of the networks of `length` in `pool` for the node called `node`: one that it is asked to have, else one that it had, else
/// a free one. Nodes begin to look at different places, so that many which come at once are seldom after the same, and one that comes
/// again most often finds what it had.
///
/// # Errors
/// None is free.
pub fn choose(
    pool: &IpNetwork,
    length: u8,
    node: &str,
    asked_for: &[IpNetwork],
    had: &[IpNetwork],
    held: &Held,
) -> Result<Choice, String> {
    let mut remark = None;
    let preferred = asked_for
        .iter()
        .map(|cidr| (cidr, true))
        .chain(had.iter().map(|cidr| (cidr, false)));
    for (cidr, is_asked_for) in preferred.filter(|(cidr, _)| cidr.is_ipv4() == pool.is_ipv4()) {
        let refusal = if !pool.contains(cidr.network()) || cidr.prefix() != length {
            format!("pod CIDRs are networks of length {length} in {pool}")
        } else {
            match held.get(cidr).filter(|holder| *holder != node) {
                Some(holder) => format!("node {holder} holds it"),
                None => return Ok(Choice { cidr: *cidr, remark }),
            }
        };
        if is_asked_for {
            remark.get_or_insert(format!(
                "its Node asks for the pod CIDR {cidr}, which it cannot have: {refusal}"
            ));
        }
    }
    let count = 1u128.checked_shl(u32::from(length - pool.prefix()));
    let start = u128::from(stable_hash(&[node]));
    // Among one more than are held, one is not held.
    for step in 0..=held.len() as u128 {
        let place = start + step;
        let Some(cidr) = nth(pool, length, count.map_or(place, |count| place % count)) else {
            break;
        };
        if held.get(&cidr).is_none_or(|holder| holder == node) {
            return Ok(Choice { cidr, remark });
        }
        if count == Some(step + 1) {
            break;
        }
    }
    Err(format!(
        "all pod CIDRs of length {length} in {pool} are held by other nodes; remove nodes that are no more \
         (sluicectl delete node NAME), or take a wider network into clusterCIDRs on all nodes"
    ))
}

fn nth(pool: &IpNetwork, length: u8, place: u128) -> Option<IpNetwork> {
    let address = match pool.network() {
        IpAddr::V4(base) => {
            let offset = u32::try_from(place).ok()?.checked_shl(32 - u32::from(length))?;
            IpAddr::V4((u32::from(base) | offset).into())
        }
        IpAddr::V6(base) => {
            let offset = place.checked_shl(128 - u32::from(length))?;
            IpAddr::V6((u128::from(base) | offset).into())
        }
    };
    IpNetwork::new(address, length).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    fn held(pairs: &[(&str, &str)]) -> Held {
        pairs
            .iter()
            .map(|(cidr, node)| (network(cidr), (*node).to_owned()))
            .collect()
    }

    /// D3
    #[test]
    fn every_node_gets_its_own_until_none_is_left() {
        for (pool, length) in [("10.244.0.0/20", 24), ("fd00:244::/60", 64)] {
            let mut taken = Held::new();
            for number in 0..16 {
                let node = format!("node{number}");
                let choice = choose(&network(pool), length, &node, &[], &[], &taken).unwrap();
                assert!(network(pool).contains(choice.cidr.network()));
                assert_eq!(taken.insert(choice.cidr, node), None, "{choice:?}");
            }
            let error = choose(&network(pool), length, "late", &[], &[], &taken).unwrap_err();
            assert!(error.contains("sluicectl delete node"), "{error}");
        }
        let whole = choose(&network("10.244.7.0/24"), 24, "n", &[], &[], &Held::new()).unwrap();
        assert_eq!(whole.cidr, network("10.244.7.0/24"));
    }

    /// D3
    #[test]
    fn what_a_node_had_and_what_it_is_told_comes_first() {
        let pool = network("10.244.0.0/16");
        let taken = held(&[("10.244.1.0/24", "n1"), ("10.244.2.0/24", "n2")]);
        let had = [network("10.244.2.0/24"), network("10.244.1.0/24")];
        let choose = |asked_for: &[&str]| {
            let asked_for: Vec<_> = asked_for.iter().map(|cidr| network(cidr)).collect();
            choose(&pool, 24, "n1", &asked_for, &had, &taken).unwrap()
        };
        let kept = choose(&[]);
        assert_eq!((kept.cidr, kept.remark), (network("10.244.1.0/24"), None));
        assert_eq!(choose(&["10.244.9.0/24"]).cidr, network("10.244.9.0/24"));
        for (wish, wanted) in [
            ("10.244.2.0/24", "node n2 holds it"),
            ("10.244.8.0/23", "networks of length 24"),
            ("192.0.2.0/24", "in 10.244.0.0/16"),
        ] {
            let choice = choose(&[wish]);
            assert_eq!(choice.cidr, network("10.244.1.0/24"));
            assert!(choice.remark.clone().unwrap().contains(wanted), "{choice:?}");
        }
        let v6 = choose(&["fd00::/64"]);
        assert_eq!(v6.remark, None, "the other family is another's business");
    }
}
