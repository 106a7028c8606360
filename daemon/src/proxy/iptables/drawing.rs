//! What the plans come to as chains, in the very words of `iptables-save`, so that what is there can be compared with what is wanted:
//! all of them, or those that a change of the plans may have touched. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::chains::{CLUSTER_IPS, Chains, EXTERNAL, HAIRPIN, NODE_PORTS, REFUSE, SERVICES, SOURCE, Table};
use super::part::{Part, Root, Shared, by_devices};
use super::rule::{MASQUERADE, host};
use super::tree::{By, Entry, grow};
use crate::proxy::Surroundings;
use crate::proxy::netfilter::loopback;
use crate::proxy::netfilter::plan::{Plan, Plans, Update};
use crate::state::service_port::{Family, ServicePortKey};

const HAIRPINS: Root = (Table::Nat, HAIRPIN);
/// All trees.
pub const ROOTS: [Root; 7] = [
    (Table::Nat, CLUSTER_IPS),
    (Table::Nat, EXTERNAL),
    (Table::Nat, NODE_PORTS),
    HAIRPINS,
    (Table::Filter, CLUSTER_IPS),
    (Table::Filter, EXTERNAL),
    (Table::Filter, NODE_PORTS),
];

/// Some of the chains.
#[derive(Debug, Default)]
pub struct Extent {
    /// By name.
    pub named: BTreeSet<(Table, String)>,
    /// Trees: all chains of each.
    pub trees: BTreeSet<Root>,
}

/// A family's tables, as they are to be.
pub struct Drawing<'a> {
    plans: &'a Plans,
    node: &'a Surroundings,
    family: Family,
}

impl<'a> Drawing<'a> {
    /// That of these plans on this node.
    pub fn new(plans: &'a Plans, node: &'a Surroundings, family: Family) -> Self {
        Self { plans, node, family }
    }

    /// All chains.
    pub fn all(&self) -> Chains {
        let mut chains = Chains::new();
        for part in self.parts(self.plans.iter()) {
            part.own(&mut chains);
        }
        let trees = ROOTS.into_iter().collect();
        let shared = self.shared(&trees);
        let planted = self.plant(&mut chains, &shared, &trees);
        self.frame(&mut chains, &shared, &planted);
        chains
    }

    /// The chains that `update` may have touched, and what they are to be; those of them that are not to be are not among these.
    /// `there` is the trees that there are now.
    ///
    /// An endpoint that changes touches its set's chains alone. Only where frontends change is there a tree to be drawn, of
    /// which again most chains stay as they are.
    pub fn changed(&self, update: &Update, there: &BTreeSet<Root>) -> (Extent, Chains) {
        let (mut before, mut after) = (Shared::default(), Shared::default());
        let (mut former, mut chains) = (Chains::new(), Chains::new());
        for part in self.parts(update.former.iter()) {
            part.own(&mut former);
            part.frontends(&mut before);
            part.sources(&mut before);
        }
        for part in self.parts(self.plans.of(update)) {
            part.own(&mut chains);
            part.frontends(&mut after);
            part.sources(&mut after);
        }
        let trees = differing(&before, &after);
        let mut named: BTreeSet<_> = former.into_keys().chain(chains.keys().cloned()).collect();
        if !trees.is_empty() || before.strangers != after.strangers {
            let shared = self.shared(&trees);
            let mut there = there - &trees;
            there.extend(self.plant(&mut chains, &shared, &trees));
            let mut frame = Chains::new();
            self.frame(&mut frame, &shared, &there);
            named.extend(frame.keys().cloned());
            chains.extend(frame);
        }
        (Extent { named, trees }, chains)
    }

    fn parts<'b>(
        &self,
        plans: impl Iterator<Item = (&'b ServicePortKey, &'b Plan)>,
    ) -> impl Iterator<Item = Part<'b>>
    where
        'a: 'b,
    {
        let (node, family) = (self.node, self.family);
        plans
            .filter(move |(key, _)| key.family == family)
            .map(move |(key, plan)| Part::new(node, key, plan))
    }

    /// What all sets together put into these trees, and about sources.
    fn shared(&self, trees: &BTreeSet<Root>) -> Shared {
        let mut shared = Shared::default();
        let led_to = trees.iter().any(|root| *root != HAIRPINS);
        for part in self.parts(self.plans.iter()) {
            if led_to {
                part.frontends(&mut shared);
            }
            part.sources(&mut shared);
        }
        shared
    }

    /// Draws those of `trees` that have an entry; says which.
    fn plant(&self, chains: &mut Chains, shared: &Shared, trees: &BTreeSet<Root>) -> BTreeSet<Root> {
        let mut planted = BTreeSet::new();
        for root in trees {
            let mut entries = shared.entries.get(root).cloned().unwrap_or_default();
            entries.extend(self.entries_of_addresses(*root, shared));
            if !entries.is_empty() {
                grow(chains, root.0, root.1, &entries);
                planted.insert(*root);
            }
        }
        planted
    }

    /// What a tree has for addresses, whosever they are.
    fn entries_of_addresses(&self, root: Root, shared: &Shared) -> Vec<Entry> {
        let entry = |address: IpAddr, rule: String| Entry {
            by: By::Address(address),
            rules: vec![rule],
        };
        let destination = |address: &IpAddr| format!("-d {}", host(*address));
        let cluster_ips = shared.cluster_ips.iter();
        match root {
            HAIRPINS => shared
                .hairpins
                .iter()
                .map(|address| entry(*address, format!("-s {0} -d {0} {MASQUERADE}", host(*address))))
                .collect(),
            (Table::Filter, CLUSTER_IPS) => cluster_ips
                .map(|(address, _)| entry(*address, format!("{} -j {REFUSE}", destination(address))))
                .collect(),
            (Table::Nat, CLUSTER_IPS) => {
                let Some(node) = self.node.node_address(self.family).filter(|_| self.node.ping) else {
                    return Vec::new();
                };
                let answered = format!("{} -j DNAT --to-destination {node}", self.ping());
                cluster_ips
                    .filter(|(_, ready)| **ready)
                    .map(|(address, _)| entry(*address, format!("{} {answered}", destination(address))))
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    /// Draws the fixed chains around the trees that there are.
    fn frame(&self, chains: &mut Chains, shared: &Shared, trees: &BTreeSet<Root>) {
        chains.insert((Table::Filter, REFUSE.to_owned()), self.refuse());
        for table in Table::ALL {
            chains.insert((table, SERVICES.to_owned()), self.entrance(table, trees));
        }
        let source = self.source(&shared.strangers, trees.contains(&HAIRPINS));
        chains.insert((Table::Nat, SOURCE.to_owned()), source);
    }

    /// What is answered to whom nobody serves.
    fn refuse(&self) -> Vec<String> {
        let (kind, unreachable) = match self.family {
            Family::V4 => ("icmp", "icmp-host-unreachable"),
            Family::V6 => ("icmp6", "icmp6-addr-unreachable"),
        };
        let mut rules = vec!["-p tcp -j REJECT --reject-with tcp-reset".to_owned()];
        for protocol in ["udp", "sctp"] {
            rules.push(format!(
                "-p {protocol} -j REJECT --reject-with {kind}-port-unreachable"
            ));
        }
        if self.node.ping && self.node.node_address(self.family).is_some() {
            rules.push(format!("{} -j REJECT --reject-with {unreachable}", self.ping()));
        }
        rules
    }

    /// The chain by which packets come in: what serves everyone first, then what serves pods and the node.
    fn entrance(&self, table: Table, trees: &BTreeSet<Root>) -> Vec<String> {
        let there = |root| trees.contains(&(table, root));
        let mut rules = Vec::new();
        if table == Table::Filter {
            rules.push("-m conntrack --ctstate DNAT -j RETURN".to_owned());
        }
        if there(EXTERNAL) {
            rules.push(format!("-j {EXTERNAL}"));
        }
        if there(NODE_PORTS) {
            rules.push(format!("-m addrtype --dst-type LOCAL -j {NODE_PORTS}"));
        }
        if there(CLUSTER_IPS) {
            rules.extend(by_devices(self.node, "-j RETURN"));
            rules.push(format!("-j {CLUSTER_IPS}"));
        }
        rules
    }

    /// Who sees another's address than the client's.
    fn source(&self, strangers: &BTreeSet<IpAddr>, hairpins: bool) -> Vec<String> {
        let client = loopback::client(self.family);
        let mut rules = vec![format!("-o {} -j SNAT --to-source {client}", loopback::NEAR)];
        if let Some(node) = self.node.node_address(self.family) {
            rules.push(format!("-s {} -j SNAT --to-source {node}", host(client)));
        }
        // A pod that connects to itself would answer itself past this host.
        if hairpins {
            rules.push(format!("-j {HAIRPIN}"));
        }
        // Replies to what came from elsewhere and goes elsewhere would not come back by this node.
        let own: Vec<_> = self.networks(&self.node.own_networks);
        rules.extend(own.iter().map(|network| format!("-s {network} -j RETURN")));
        rules.push("-m addrtype --src-type LOCAL -j RETURN".to_owned());
        rules.extend(own.iter().map(|network| format!("-d {network} -j RETURN")));
        let pods = self.networks(&self.node.pod_networks);
        rules.extend(pods.iter().map(|network| format!("-d {network} {MASQUERADE}")));
        let strangers = strangers.iter();
        rules.extend(strangers.map(|address| format!("-d {} {MASQUERADE}", host(*address))));
        rules
    }

    fn ping(&self) -> &'static str {
        match self.family {
            Family::V4 => "-p icmp -m icmp --icmp-type 8",
            Family::V6 => "-p ipv6-icmp -m icmp6 --icmpv6-type 128",
        }
    }

    fn networks(&self, all: &[IpNetwork]) -> Vec<String> {
        all.iter()
            .filter(|network| Family::of(network.ip()) == self.family)
            .map(|network| format!("{}/{}", network.network(), network.prefix()))
            .collect()
    }
}

/// The trees in which the two differ.
fn differing(before: &Shared, after: &Shared) -> BTreeSet<Root> {
    let differs = |(table, root): &Root| {
        before.entries.get(&(*table, *root)) != after.entries.get(&(*table, *root))
            || *root == CLUSTER_IPS && before.cluster_ips != after.cluster_ips
            || *root == HAIRPIN && before.hairpins != after.hairpins
    };
    ROOTS.into_iter().filter(differs).collect()
}
