//! Rules found in a few steps however many there are: chains that branch by the digits of an address or a port. Pure.
//!
//! iptables goes through a chain rule by rule. So what leads to Services is a tree: at each step sixteen rules at most, and at its ends a
//! handful of rules of their own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::chains::{Chains, Table};
use crate::state::service_port::Protocol;

/// As many entries stay together in one chain.
const TOGETHER: usize = 16;
/// As many digits are looked at.
const DIGITS: u8 = 4;

/// What the tree branches by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// The destination's last digits, the last of them first: neighbours in a network part at once.
    Address(IpAddr),
    /// Protocol and destination port, its first digit first: ports are matched as ranges.
    Port(Protocol, u16),
}

/// Rules that stay together, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where they are found.
    pub by: By,
    /// The rules.
    pub rules: Vec<String>,
}

/// One step: which digit has which value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Step {
    by: By,
    depth: u8,
}

impl Step {
    fn of(entry: &Entry, depth: u8) -> Self {
        let shift = match entry.by {
            By::Address(_) => depth * 4,
            By::Port(..) => (DIGITS - 1 - depth) * 4,
        };
        let by = match entry.by {
            By::Address(IpAddr::V4(address)) => {
                By::Address(Ipv4Addr::from_bits(address.to_bits() & 0xf << shift).into())
            }
            By::Address(IpAddr::V6(address)) => {
                By::Address(Ipv6Addr::from_bits(address.to_bits() & 0xf << shift).into())
            }
            By::Port(protocol, port) => By::Port(protocol, port & (0xffff << shift)),
        };
        Self { by, depth }
    }

    /// What a packet must have to take it, as `iptables-save` writes it.
    fn condition(self) -> String {
        let shift = self.depth * 4;
        match self.by {
            By::Address(IpAddr::V4(part)) => format!("-d {part}/{}", Ipv4Addr::from_bits(0xf << shift)),
            By::Address(IpAddr::V6(part)) => format!("-d {part}/{}", Ipv6Addr::from_bits(0xf << shift)),
            By::Port(protocol, first) => {
                let last = first | 0xffff_u16 >> (shift + 4).min(15) >> u8::from(shift + 4 > 15);
                let protocol = protocol.to_string().to_lowercase();
                let ports = if first == last {
                    first.to_string()
                } else {
                    format!("{first}:{last}")
                };
                format!("-p {protocol} -m {protocol} --dport {ports}")
            }
        }
    }

    /// What it adds to the name of the chain it leads to.
    fn letter(self) -> String {
        let digit = |bits: u128, shift: u8| (bits >> shift) & 0xf;
        match self.by {
            By::Address(IpAddr::V4(part)) => format!("{:x}", digit(part.to_bits().into(), self.depth * 4)),
            By::Address(IpAddr::V6(part)) => format!("{:x}", digit(part.to_bits(), self.depth * 4)),
            By::Port(protocol, first) => {
                let digit = digit(first.into(), (DIGITS - 1 - self.depth) * 4);
                if self.depth > 0 {
                    return format!("{digit:x}");
                }
                let protocol = match protocol {
                    Protocol::Tcp => 't',
                    Protocol::Udp => 'u',
                    Protocol::Sctp => 's',
                };
                format!("{protocol}{digit:x}")
            }
        }
    }
}

/// Puts `entries`, sorted as they are to be, into the chain `root` and as many below it as they need. Nothing at all: no chain.
pub fn grow(chains: &mut Chains, table: Table, root: &str, entries: &[Entry]) {
    if !entries.is_empty() {
        let entries: Vec<&Entry> = entries.iter().collect();
        branch(chains, table, root, String::new(), entries, 0);
    }
}

fn branch(chains: &mut Chains, table: Table, root: &str, place: String, entries: Vec<&Entry>, depth: u8) {
    let name = if place.is_empty() {
        root.to_owned()
    } else {
        format!("{root}-{place}")
    };
    if entries.len() <= TOGETHER || depth == DIGITS {
        let rules = entries.iter().flat_map(|entry| entry.rules.iter().cloned());
        chains.insert((table, name), rules.collect());
        return;
    }
    let mut ways: BTreeMap<Step, Vec<&Entry>> = BTreeMap::new();
    for entry in entries {
        ways.entry(Step::of(entry, depth)).or_default().push(entry);
    }
    // Where all of them have the same digit there is nothing to choose. The protocol is told by the first step alone.
    if ways.len() == 1
        && depth > 0
        && let Some((_, entries)) = ways.pop_first()
    {
        return branch(chains, table, root, place, entries, depth + 1);
    }
    let mut rules = Vec::new();
    for (step, entries) in ways {
        let place = place.clone() + &step.letter();
        rules.push(format!("{} -j {root}-{place}", step.condition()));
        branch(chains, table, root, place, entries, depth + 1);
    }
    chains.insert((table, name), rules);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(by: By) -> Entry {
        Entry {
            by,
            rules: vec![format!("{by:?}")],
        }
    }

    #[test]
    fn a_few_stay_together_and_many_are_found_in_few_steps() {
        let address = |number: u32| By::Address(Ipv4Addr::from_bits(0x0a60_0000 + number).into());
        let few: Vec<_> = (0..16).map(address).map(entry).collect();
        let mut chains = Chains::new();
        grow(&mut chains, Table::Nat, "ROOT", &few);
        assert_eq!(chains.len(), 1, "{chains:?}");
        let many: Vec<_> = (0..10_000).map(address).map(entry).collect();
        let mut chains = Chains::new();
        grow(&mut chains, Table::Nat, "ROOT", &many);
        assert!(chains.values().all(|rules| rules.len() <= 16));
        let rules = &chains[&(Table::Nat, "ROOT-52".to_owned())];
        assert_eq!(rules[1], "-d 0.0.1.0/0.0.15.0 -j ROOT-521");
        let leaf = &chains[&(Table::Nat, "ROOT-521".to_owned())];
        assert!(leaf.contains(&format!("{:?}", address(0x125))), "{leaf:?}");
    }

    #[test]
    fn ports_are_parted_by_protocol_and_in_ranges() {
        let ports = (30_000..30_100).map(|port| By::Port(Protocol::Tcp, port));
        let others = (30_000..30_100).map(|port| By::Port(Protocol::Udp, port));
        let entries: Vec<_> = ports.chain(others).map(entry).collect();
        let mut chains = Chains::new();
        grow(&mut chains, Table::Nat, "ROOT", &entries);
        let top = &chains[&(Table::Nat, "ROOT".to_owned())];
        assert_eq!(
            top[..],
            [
                "-p tcp -m tcp --dport 28672:32767 -j ROOT-t7",
                "-p udp -m udp --dport 28672:32767 -j ROOT-u7"
            ]
        );
        // The second digit is the same for all; the third tells them apart.
        let next = &chains[&(Table::Nat, "ROOT-t7".to_owned())];
        assert_eq!(next[0], "-p tcp -m tcp --dport 30000:30015 -j ROOT-t73");
        assert_eq!(next.len(), 7);
        let all: usize = chains.values().map(Vec::len).sum();
        assert_eq!(all, 200 + 2 + 2 * 7);
    }
}
