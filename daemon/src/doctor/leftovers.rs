//! What another network for pods or Service proxy left on a host, and the command that takes it away. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::host::products::{Product, fits_any};

/// What a host has by which others are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traces {
    /// Names of processes, with their ids.
    pub processes: BTreeSet<(String, u32)>,
    /// Network devices.
    pub devices: BTreeSet<String>,
    /// Those that have addresses.
    pub addressed: BTreeSet<String>,
    /// Chains and rules as `iptables-save` writes them, by the tool that shows them (`ip6tables-nft`).
    pub rules: BTreeMap<&'static str, String>,
    /// Tables of nftables, as `family name`.
    pub tables: BTreeSet<String>,
    /// Ipsets.
    pub sets: BTreeSet<String>,
    /// Of the files and folders of [`Product`]s those that are there.
    pub files: BTreeSet<PathBuf>,
    /// How many routes carry which protocol number.
    pub routes: BTreeMap<u8, usize>,
}

/// One thing that is another's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftover {
    /// Whose it is.
    pub whose: String,
    /// What it is.
    pub what: String,
    /// The command that removes it, for a root shell on the node.
    pub remove: String,
    /// Whether it is in Sluice's way; otherwise it is litter.
    pub harms: bool,
}

/// What of `product` is there, in the order in which it is best removed: what would make the rest again comes first.
pub fn find(product: &Product, traces: &Traces) -> Vec<Leftover> {
    let mut list = own(product, traces);
    if !list.is_empty() {
        list.extend(shared(product, traces));
    }
    list
}

fn own(product: &Product, traces: &Traces) -> Vec<Leftover> {
    let mut list = Vec::new();
    let mut in_the_way = |what: String, remove: String| list.push(Leftover::of(product, true, what, remove));
    for (name, id) in &traces.processes {
        if fits_any(product.processes, name) {
            in_the_way(format!("{name} runs, process {id}"), product.stop.to_owned());
        }
    }
    let files = product.files.iter().copied();
    let (conflists, litter): (Vec<&str>, Vec<&str>) = files
        .filter(|file| traces.files.contains(Path::new(file)))
        .partition(|file| file.ends_with(".conflist"));
    for file in conflists {
        in_the_way(format!("the conflist {file}"), format!("rm {file}"));
    }
    for (tool, saved) in &traces.rules {
        let names = names_in_rules(product);
        let lines = saved
            .lines()
            .filter(|line| names.iter().any(|name| line.contains(name)));
        let (chains, rules): (Vec<_>, Vec<_>) = lines.partition(|line| line.starts_with(':'));
        if !chains.is_empty() || !rules.is_empty() {
            let (chains, rules) = (counted(chains.len(), "chain"), counted(rules.len(), "rule"));
            in_the_way(
                format!("{chains} and {rules} of {tool}"),
                without_rules(tool, &names),
            );
        }
    }
    for table in fitting(&traces.tables, product.tables) {
        in_the_way(
            format!("the nftables table {table}"),
            format!("nft delete table {table}"),
        );
    }
    for device in fitting(&traces.devices, product.devices) {
        in_the_way(format!("the device {device}"), format!("ip link delete {device}"));
    }
    if let Some((what, remove)) = product.route_protocol.and_then(|number| routes(traces, number)) {
        in_the_way(what, remove);
    }
    let mut litters = |what: String, remove: String| list.push(Leftover::of(product, false, what, remove));
    // Sets that rules name cannot be destroyed: after the chains.
    let sets = fitting(&traces.sets, product.sets).count();
    if sets > 0 {
        let names: Vec<_> = product.sets.iter().map(|set| bare(set)).collect();
        let names = alternatives(&names);
        litters(
            counted(sets, "ipset"),
            format!("ipset list -n | grep -E '^{names}' | xargs -n 1 ipset destroy"),
        );
    }
    for file in litter {
        litters(file.to_owned(), format!("rm -r {file}"));
    }
    list
}

fn shared(product: &Product, traces: &Traces) -> Vec<Leftover> {
    let mut list = Vec::new();
    let mut in_the_way = |what: String, remove: String| list.push(Leftover::of(product, true, what, remove));
    let shared = &product.shared;
    for device in fitting(&traces.devices, shared.devices) {
        in_the_way(
            format!("the device {device}, which may be another's"),
            format!("ip link delete {device}"),
        );
    }
    for device in fitting(&traces.addressed, shared.addressed) {
        in_the_way(
            format!("addresses of the device {device}"),
            format!("ip address flush dev {device} && ip link set {device} down"),
        );
    }
    if let Some((what, remove)) = shared.route_protocol.and_then(|number| routes(traces, number)) {
        in_the_way(format!("{what}, which may be another's"), remove);
    }
    list
}

impl Leftover {
    fn of(product: &Product, harms: bool, what: String, remove: String) -> Self {
        Self {
            whose: product.name.to_owned(),
            what,
            remove,
            harms,
        }
    }
}

/// Those that one of the patterns stands for.
fn fitting<'a>(names: &'a BTreeSet<String>, patterns: &'a [&str]) -> impl Iterator<Item = &'a String> {
    names.iter().filter(|name| fits_any(patterns, name))
}

/// What there is of such routes, and how they are removed.
fn routes(traces: &Traces, protocol: u8) -> Option<(String, String)> {
    let count = *traces.routes.get(&protocol)?;
    Some((
        format!("{} of protocol {protocol}", counted(count, "route")),
        format!("ip route flush table all proto {protocol}; ip -6 route flush table all proto {protocol}"),
    ))
}

/// What its chains' names begin with, and its comments: in each of its rules there is one of them.
fn names_in_rules(product: &Product) -> Vec<&'static str> {
    product
        .chains
        .iter()
        .map(|chain| bare(chain))
        .chain(product.comments.iter().copied())
        .collect()
}

/// Puts all chains and rules but those with such a name in place of what there is.
fn without_rules(tool: &str, names: &[&str]) -> String {
    format!(
        "{tool}-save | grep -v -E '{}' | {tool}-restore",
        alternatives(names)
    )
}

fn bare(pattern: &str) -> &str {
    pattern.strip_suffix('*').unwrap_or(pattern)
}

fn counted(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}

/// As an extended regular expression: any of these names.
fn alternatives(names: &[&str]) -> String {
    match names {
        [one] => (*one).to_owned(),
        several => format!("({})", several.join("|")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::products::PRODUCTS;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    fn saved(list: &[(&'static str, &str)]) -> BTreeMap<&'static str, String> {
        list.iter()
            .map(|(tool, text)| (*tool, (*text).to_owned()))
            .collect()
    }

    fn found(traces: &Traces) -> Vec<(String, String, String)> {
        let all = PRODUCTS.iter().flat_map(|product| find(product, traces));
        all.map(|leftover| (leftover.whose, leftover.what, leftover.remove))
            .collect()
    }

    /// O2 N12
    #[test]
    fn a_host_of_its_own_has_no_leftovers() {
        let traces = Traces {
            processes: BTreeSet::from([("sluiced".to_owned(), 7), ("bird".to_owned(), 8)]),
            devices: names(&["lo", "eth0", "cni0", "docker0", "sluice-vxlan", "tunl0"]),
            addressed: names(&["lo", "eth0", "tunl0"]),
            rules: saved(&[(
                "iptables-nft",
                ":INPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\n",
            )]),
            tables: names(&["inet sluice-services", "ip nat"]),
            sets: names(&["f2b-sshd"]),
            files: BTreeSet::new(),
            routes: BTreeMap::from([(12, 3), (83, 4)]),
        };
        assert_eq!(found(&traces), []);
    }

    /// O2 N12
    #[test]
    fn what_is_left_is_named_with_the_command_that_removes_it() {
        let traces = Traces {
            processes: BTreeSet::from([("kube-proxy".to_owned(), 4711)]),
            devices: names(&["lo", "flannel.1", "cni0"]),
            rules: saved(&[
                (
                    "iptables-legacy",
                    ":FLANNEL-FWD - [0:0]\n-A FORWARD -j FLANNEL-FWD\n-A FLANNEL-FWD -j ACCEPT\n",
                ),
                (
                    "ip6tables-nft",
                    "-A POSTROUTING -m comment --comment \"flanneld masq\" -j RETURN\n",
                ),
                ("iptables-nft", ":INPUT ACCEPT [0:0]\n:KUBE-SVC-ABC - [0:0]\n"),
            ]),
            tables: names(&["ip6 calico"]),
            sets: names(&["cali40all-ipam-pools"]),
            files: ["/run/calico", "/etc/cni/net.d/10-flannel.conflist"]
                .map(PathBuf::from)
                .into(),
            routes: BTreeMap::from([(80, 2), (12, 1)]),
            addressed: names(&["tunl0"]),
        };
        let found = found(&traces);
        let of = |whose: &str| -> Vec<(&str, &str)> {
            let all = found.iter().filter(|(name, _, _)| name == whose);
            all.map(|(_, what, remove)| (what.as_str(), remove.as_str()))
                .collect()
        };
        let [(runs, stop), (chains, filter)] = of("kube-proxy")[..] else {
            panic!("{found:#?}");
        };
        assert_eq!((runs, stop), ("kube-proxy runs, process 4711", PRODUCTS[0].stop));
        assert_eq!(chains, "1 chain and 0 rules of iptables-nft");
        assert!(
            filter.starts_with("iptables-nft-save | grep -v -E '(KUBE-SERVICES|"),
            "{filter}"
        );
        assert_eq!(
            of("flannel"),
            [
                (
                    "the conflist /etc/cni/net.d/10-flannel.conflist",
                    "rm /etc/cni/net.d/10-flannel.conflist"
                ),
                (
                    "0 chains and 1 rule of ip6tables-nft",
                    "ip6tables-nft-save | grep -v -E '(FLANNEL-|flanneld )' | ip6tables-nft-restore"
                ),
                (
                    "1 chain and 2 rules of iptables-legacy",
                    "iptables-legacy-save | grep -v -E '(FLANNEL-|flanneld )' | iptables-legacy-restore"
                ),
                ("the device flannel.1", "ip link delete flannel.1"),
                ("the device cni0, which may be another's", "ip link delete cni0"),
            ]
        );
        let of_calico: Vec<_> = of("Calico").into_iter().map(|(what, _)| what).collect();
        assert_eq!(
            of_calico,
            [
                "the nftables table ip6 calico",
                "2 routes of protocol 80",
                "1 ipset",
                "/run/calico",
                "addresses of the device tunl0",
                "1 route of protocol 12, which may be another's",
            ]
        );
    }
}
