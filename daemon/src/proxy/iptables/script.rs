//! What a table has of ours, read from `iptables-save`, and the text for `iptables-restore --noflush` that makes it what is wanted:
//! only the chains that differ. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::chains::{Chains, ENTRANCES, PREFIX, Table};
use super::drawing::{Extent, ROOTS};
use super::part::Root;
use crate::{egress, forward};

/// What a host's tables have: enough to tell what differs, and no more to keep.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// A digest of each chain's rules.
    chains: BTreeMap<(Table, String), u64>,
    /// The entrances that are there, by their place in [`ENTRANCES`].
    entrances: BTreeSet<usize>,
}

impl Known {
    /// What there is once `wanted` stands.
    pub fn of(wanted: &Chains) -> Self {
        Self {
            chains: wanted
                .iter()
                .map(|(chain, rules)| (chain.clone(), digest(rules)))
                .collect(),
            entrances: (0..ENTRANCES.len()).collect(),
        }
    }

    /// Takes in what `iptables-save` writes of a table.
    pub fn add(&mut self, table: Table, saved: &str) {
        for (number, (of, chain, rule)) in ENTRANCES.iter().enumerate() {
            let line = format!("-A {chain} {rule}");
            if *of == table && saved.lines().any(|found| found == line) {
                self.entrances.insert(number);
            }
        }
        for (chain, rules) in read(table, saved) {
            self.chains.insert(chain, digest(&rules));
        }
    }

    /// The trees that there are.
    pub fn trees(&self) -> BTreeSet<Root> {
        let there = |(table, root): &Root| self.chains.contains_key(&(*table, (*root).to_owned()));
        ROOTS.into_iter().filter(there).collect()
    }

    /// What is known of these chains, and the entrances.
    pub fn within(&self, extent: &Extent) -> Self {
        let named = extent
            .named
            .iter()
            .filter_map(|chain| self.chains.get_key_value(chain));
        let of_trees = extent.trees.iter().flat_map(|root| self.tree(*root));
        Self {
            chains: named
                .chain(of_trees)
                .map(|(chain, digest)| (chain.clone(), *digest))
                .collect(),
            entrances: self.entrances.clone(),
        }
    }

    /// Takes down that these chains are as `wanted` now, and the entrances are there.
    pub fn put(&mut self, extent: &Extent, wanted: &Chains) {
        for chain in self.within(extent).chains.keys() {
            self.chains.remove(chain);
        }
        let wanted = Self::of(wanted);
        self.chains.extend(wanted.chains);
        self.entrances = wanted.entrances;
    }

    /// The chains of a tree: its top, and those that are called by it and a place in it.
    fn tree(&self, (table, root): Root) -> impl Iterator<Item = (&(Table, String), &u64)> {
        self.chains
            .range((table, root.to_owned())..)
            .take_while(move |((of, name), _)| *of == table && name.starts_with(root))
    }

    /// Whether there is anything of ours.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.entrances.is_empty()
    }

    /// How many chains and entrances differ in the two.
    pub fn differences(&self, other: &Self) -> usize {
        let differs = |(chain, digest): (&(Table, String), &u64)| other.chains.get(chain) != Some(digest);
        let here = self.chains.iter().filter(|entry| differs(*entry)).count();
        let there = other
            .chains
            .keys()
            .filter(|chain| !self.chains.contains_key(chain));
        here + there.count() + self.entrances.symmetric_difference(&other.entrances).count()
    }
}

/// Our chains in what `iptables-save` writes of a table.
pub fn read(table: Table, saved: &str) -> Chains {
    let others = [forward::CHAIN, egress::iptables::CHAIN];
    let ours = |name: &str| name.starts_with(PREFIX) && !others.contains(&name);
    let mut chains = Chains::new();
    for line in saved.lines() {
        if let Some(declared) = line.strip_prefix(':') {
            let name = declared.split(' ').next().unwrap_or_default();
            if ours(name) {
                chains.entry((table, name.to_owned())).or_default();
            }
        } else if let Some((name, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' '))
            && ours(name)
        {
            chains
                .entry((table, name.to_owned()))
                .or_default()
                .push(rule.to_owned());
        }
    }
    chains
}

/// The text that brings the tables from `known` to `wanted`; nothing where there is nothing to do.
pub fn change(known: &Known, wanted: &Chains) -> Option<String> {
    let mut text = String::new();
    for table in Table::ALL {
        let of_table = |(of, _): &&(Table, String)| *of == table;
        let changed: Vec<_> = wanted
            .iter()
            .filter(|(chain, _)| of_table(chain))
            .filter(|(chain, rules)| known.chains.get(*chain) != Some(&digest(rules)))
            .map(|((_, name), rules)| (name, rules))
            .collect();
        let gone: Vec<_> = known
            .chains
            .keys()
            .filter(of_table)
            .filter(|chain| !wanted.contains_key(*chain))
            .map(|(_, name)| name)
            .collect();
        let entrances: Vec<_> = ENTRANCES
            .iter()
            .enumerate()
            .filter(|(number, (of, _, _))| *of == table && !known.entrances.contains(number))
            .map(|(_, (_, chain, rule))| format!("-I {chain} {rule}"))
            .collect();
        if changed.is_empty() && gone.is_empty() && entrances.is_empty() {
            continue;
        }
        let _ = writeln!(text, "*{}", table.name());
        // Naming a chain makes it, or empties it.
        for name in changed.iter().map(|(name, _)| name).chain(&gone) {
            let _ = writeln!(text, ":{name} - [0:0]");
        }
        for (name, rules) in changed {
            for rule in rules {
                let _ = writeln!(text, "-A {name} {rule}");
            }
        }
        for entrance in entrances {
            let _ = writeln!(text, "{entrance}");
        }
        for name in gone {
            let _ = writeln!(text, "-X {name}");
        }
        text += "COMMIT\n";
    }
    (!text.is_empty()).then_some(text)
}

/// The text that takes away all there is.
pub fn removal(known: &Known) -> String {
    let mut text = String::new();
    for table in Table::ALL {
        let names: Vec<_> = known
            .chains
            .keys()
            .filter(|(of, _)| *of == table)
            .map(|(_, name)| name)
            .collect();
        let _ = writeln!(text, "*{}", table.name());
        for name in &names {
            let _ = writeln!(text, ":{name} - [0:0]");
        }
        for number in &known.entrances {
            let (of, chain, rule) = ENTRANCES[*number];
            if of == table {
                let _ = writeln!(text, "-D {chain} {rule}");
            }
        }
        for name in names {
            let _ = writeln!(text, "-X {name}");
        }
        text += "COMMIT\n";
    }
    text
}

fn digest(rules: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    rules.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(chains: &[(&str, &[&str])]) -> Chains {
        let rules = |rules: &[&str]| rules.iter().map(|rule| (*rule).to_owned()).collect();
        chains
            .iter()
            .map(|(name, list)| ((Table::Nat, (*name).to_owned()), rules(list)))
            .collect()
    }

    #[test]
    fn only_what_differs_is_written_and_only_ours_is_read() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:SLUICE-FORWARD - [0:0]\n\
                     :SLUICE-A - [0:0]\n:SLUICE-B - [0:0]\n:SLUICE-OLD - [0:0]\n\
                     -A PREROUTING -j SLUICE-SERVICES\n-A KUBE-SERVICES -j RETURN\n\
                     -A SLUICE-A -j RETURN\n-A SLUICE-B -j SLUICE-OLD\nCOMMIT\n";
        let mut known = Known::default();
        known.add(Table::Nat, saved);
        let wanted = wanted(&[
            ("SLUICE-A", &["-j RETURN"]),
            ("SLUICE-B", &["-j DROP", "-j RETURN"]),
        ]);
        assert_eq!(known.differences(&Known::of(&wanted)), 2 + ENTRANCES.len() - 1);
        let text = change(&known, &wanted).unwrap();
        let nat = text.split("*filter").next().unwrap();
        assert_eq!(
            nat,
            "*nat\n:SLUICE-B - [0:0]\n:SLUICE-OLD - [0:0]\n-A SLUICE-B -j DROP\n-A SLUICE-B -j RETURN\n\
             -I OUTPUT -j SLUICE-SERVICES\n\
             -I POSTROUTING -m conntrack --ctstate DNAT -j SLUICE-SOURCE\n-X SLUICE-OLD\nCOMMIT\n"
        );
        assert_eq!(change(&Known::of(&wanted), &wanted), None);
    }
}
