//! What the plans come to as iptables' chains, in the very words of `iptables-save`, so that what is there can be compared with what
//! is wanted. Pure.
//!
//! A connection's first packet is led by a tree ([`tree`](super::tree)) to the chain of its set, and there one rule for each endpoint
//! translates it. What was not translated and is for a Service all the same is refused in the filter table: the nat table
//! neither drops nor refuses. No packet is marked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnetwork::IpNetwork;
use sluice_cni::stable_hash::stable_hash;

use super::tree::{By, Entry, grow};
use crate::proxy::Surroundings;
use crate::proxy::netfilter::loopback;
use crate::proxy::netfilter::plan::{Plan, Plans, of_scope};
use crate::state::service_port::{Family, FrontendKind, Protocol, Scope, ServicePortKey, WhenEmpty};

/// A table of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// `nat`.
    Nat,
    /// `filter`.
    Filter,
}

impl Table {
    /// Those that are used.
    pub const ALL: [Self; 2] = [Self::Nat, Self::Filter];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }
}

/// Rules by table and chain, each as it is behind `-A CHAIN`.
pub type Chains = BTreeMap<(Table, String), Vec<String>>;

/// What all our chains' names begin with.
pub const PREFIX: &str = "SLUICE-";

/// The chain by which packets come in.
pub const SERVICES: &str = "SLUICE-SERVICES";
const SOURCE: &str = "SLUICE-SOURCE";
const HAIRPIN: &str = "SLUICE-HAIRPIN";
const CLUSTER_IPS: &str = "SLUICE-CLUSTERIP";
const EXTERNAL: &str = "SLUICE-EXTERNAL";
const NODE_PORTS: &str = "SLUICE-NODEPORT";
const REFUSE: &str = "SLUICE-REFUSE";

/// The rules that lead from the kernel's chains to ours: table, chain, rule.
pub const ENTRANCES: [(Table, &str, &str); 6] = [
    (Table::Nat, "PREROUTING", "-j SLUICE-SERVICES"),
    (Table::Nat, "OUTPUT", "-j SLUICE-SERVICES"),
    (
        Table::Nat,
        "POSTROUTING",
        "-m conntrack --ctstate DNAT -j SLUICE-SOURCE",
    ),
    (
        Table::Filter,
        "INPUT",
        "-m conntrack --ctstate NEW -j SLUICE-SERVICES",
    ),
    (
        Table::Filter,
        "FORWARD",
        "-m conntrack --ctstate NEW -j SLUICE-SERVICES",
    ),
    (
        Table::Filter,
        "OUTPUT",
        "-m conntrack --ctstate NEW -j SLUICE-SERVICES",
    ),
];

/// One chain picks among as many endpoints; of more, it picks a group first.
const GROUP: usize = 32;

const MASQUERADE: &str = "-j MASQUERADE --random-fully";

/// The chain of a set's endpoints.
pub fn set_chain(key: &ServicePortKey) -> String {
    chain_of('S', key, &[])
}

/// A name of 28 characters at most (`XT_EXTENSION_MAXNAMELEN`): what people know the Service by, and what no two sets share.
fn chain_of(kind: char, key: &ServicePortKey, parts: &[&str]) -> String {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let protocol = key.protocol.to_string();
    let scope = match key.scope {
        Scope::Cluster => "cluster",
        Scope::Local => "local",
    };
    let identity = [&key.namespace, &key.name, &key.port, protocol.as_str(), scope];
    let hash = stable_hash(&[&identity[..], parts].concat());
    let readable: String = key.name.chars().take(9).collect();
    let unique: String = (0..9)
        .map(|place| char::from(DIGITS[(hash >> (place * 5) & 31) as usize]))
        .collect();
    format!("{PREFIX}{kind}-{readable}-{unique}")
}

/// How a rule says that it is about packets for `address`: those to its port, and those to any.
pub fn packets_for(address: SocketAddr, protocol: Protocol) -> [String; 2] {
    let rule = Packet::to(address, protocol).rule("");
    [rule.trim_end().to_owned(), format!("-d {}", host(address.ip()))]
}

/// All chains of a family.
pub fn draw(plans: &Plans, node: &Surroundings, family: Family) -> Chains {
    let mut drawing = Drawing {
        node,
        family,
        chains: Chains::new(),
        entries: BTreeMap::new(),
        cluster_ips: BTreeMap::new(),
        hairpins: BTreeSet::new(),
        strangers: BTreeSet::new(),
    };
    for (key, plan) in plans.iter().filter(|(key, _)| key.family == family) {
        drawing.endpoints(key, plan);
        drawing.frontends(key, plan);
        drawing.sources(plan);
    }
    drawing.finish()
}

struct Drawing<'a> {
    node: &'a Surroundings,
    family: Family,
    chains: Chains,
    /// The entries of the trees, by table and root.
    entries: BTreeMap<(Table, &'static str), Vec<Entry>>,
    /// ClusterIPs, and whether they have an endpoint.
    cluster_ips: BTreeMap<IpAddr, bool>,
    /// Endpoints of this node.
    hairpins: BTreeSet<IpAddr>,
    /// Endpoints outside the pod network.
    strangers: BTreeSet<IpAddr>,
}

impl Drawing<'_> {
    /// The chain of a set: one rule for each endpoint, of which a connection takes one.
    fn endpoints(&mut self, key: &ServicePortKey, plan: &Plan) {
        let protocol = words(plan.protocol);
        let translated = |endpoint: &SocketAddr| format!("-j DNAT --to-destination {endpoint}");
        let rules = if let Some(seconds) = plan.affinity {
            self.sticky(key, plan, seconds)
        } else if plan.outside.len() <= GROUP {
            picks(
                plan.outside.iter().map(|endpoint| (1, translated(endpoint))),
                protocol,
            )
        } else {
            let mut groups = Vec::new();
            for (number, group) in plan.outside.chunks(GROUP).enumerate() {
                let name = chain_of('G', key, &[&number.to_string()]);
                let rules = picks(group.iter().map(|endpoint| (1, translated(endpoint))), protocol);
                self.chains.insert((Table::Nat, name.clone()), rules);
                groups.push((group.len(), format!("-j {name}")));
            }
            picks(groups.into_iter(), protocol)
        };
        if !rules.is_empty() {
            self.chains.insert((Table::Nat, set_chain(key)), rules);
        }
    }

    /// With session affinity: a chain for each endpoint, which remembers its clients (xt_recent), and is taken first by those.
    fn sticky(&mut self, key: &ServicePortKey, plan: &Plan, seconds: u32) -> Vec<String> {
        let protocol = words(plan.protocol);
        let mask = match self.family {
            Family::V4 => "255.255.255.255",
            Family::V6 => "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        };
        let mut rules = Vec::new();
        let mut any = Vec::new();
        for endpoint in &plan.outside {
            let name = chain_of('E', key, &[&endpoint.to_string()]);
            let client = format!("--name {name} --mask {mask} --rsource");
            rules.push(format!(
                "-m recent --rcheck --seconds {seconds} --reap {client} -j {name}"
            ));
            let remember =
                format!("-p {protocol} -m recent --set {client} -j DNAT --to-destination {endpoint}");
            any.push((1, format!("-j {name}")));
            self.chains.insert((Table::Nat, name), vec![remember]);
        }
        rules.extend(picks(any.into_iter(), protocol));
        rules
    }

    /// What leads to the set, and what becomes of those whom nobody serves.
    fn frontends(&mut self, key: &ServicePortKey, plan: &Plan) {
        let set = (!plan.outside.is_empty()).then(|| set_chain(key));
        let external = self.external(key, plan);
        for (written, kind) in &plan.frontends {
            let address = loopback::asked(*written);
            let mut packet = Packet::to(address, plan.protocol);
            let tree = match kind {
                FrontendKind::ClusterIp => CLUSTER_IPS,
                FrontendKind::NodePort | FrontendKind::HostPort if address == *written => NODE_PORTS,
                _ => EXTERNAL,
            };
            let target = if tree == CLUSTER_IPS { &set } else { &external };
            if let Some(target) = target {
                let ranges = plan
                    .ranges
                    .as_ref()
                    .filter(|_| *kind == FrontendKind::LoadBalancer);
                let rules = match ranges {
                    None => vec![packet.rule(&format!("-j {target}"))],
                    Some(ranges) => packet.each_source(ranges, &[format!("-j {target}")]),
                };
                self.enter(Table::Nat, tree, address, plan.protocol, rules);
                if address != *written {
                    // Led round, and back in as a stranger's.
                    let to = format!("-j DNAT --to-destination {}", address.ip());
                    let rule = Packet::to(*written, plan.protocol).rule(&to);
                    self.enter(Table::Nat, NODE_PORTS, *written, plan.protocol, vec![rule]);
                }
            }
            if tree == CLUSTER_IPS {
                let ready = self.cluster_ips.entry(address.ip()).or_default();
                *ready |= set.is_some();
            }
            // Nobody on loopback listens there: the kernel refuses it by itself.
            if address == *written {
                let rules = self.refusals(plan, *kind, &mut packet);
                self.enter(Table::Filter, tree, address, plan.protocol, rules);
            }
        }
    }

    /// The chain for frontends that serve other hosts, where those are served by others than pods and the node are.
    fn external(&mut self, key: &ServicePortKey, plan: &Plan) -> Option<String> {
        let own = (!plan.outside.is_empty()).then(|| set_chain(key));
        let Some(inside) = &plan.inside else {
            return own;
        };
        if own.is_none() && inside.is_empty() {
            return None;
        }
        let outside = match &own {
            Some(own) => format!("-g {own}"),
            None => "-j RETURN".to_owned(),
        };
        let mut rules = self.by_devices(&outside);
        if !inside.is_empty() {
            rules.push(format!("-g {}", set_chain(&of_scope(key, Scope::Cluster))));
        }
        let name = chain_of('X', key, &[]);
        self.chains.insert((Table::Nat, name.clone()), rules);
        Some(name)
    }

    /// A rule for each device by which other hosts' packets come.
    fn by_devices(&self, target: &str) -> Vec<String> {
        let devices = self.node.devices.iter();
        devices
            .map(|device| format!("-i {} {target}", device.name))
            .collect()
    }

    /// What becomes of packets for a frontend that were not translated.
    fn refusals(&self, plan: &Plan, kind: FrontendKind, packet: &mut Packet) -> Vec<String> {
        let verdict = |when_empty| match when_empty {
            WhenEmpty::Drop => "-j DROP".to_owned(),
            WhenEmpty::Refuse => format!("-j {REFUSE}"),
        };
        let outside = plan.outside.is_empty().then_some(plan.when_empty);
        if kind == FrontendKind::ClusterIp {
            // Whatever else comes to a ClusterIP is refused.
            return match outside {
                Some(WhenEmpty::Drop) => vec![packet.rule(&verdict(WhenEmpty::Drop))],
                _ => Vec::new(),
            };
        }
        let inside = match &plan.inside {
            None => outside,
            Some(inside) => inside.is_empty().then_some(WhenEmpty::Refuse),
        };
        let all = inside.or(outside).map(verdict);
        let ranges = plan
            .ranges
            .as_ref()
            .filter(|_| kind == FrontendKind::LoadBalancer);
        let mut rules = Vec::new();
        if let (Some(inside), Some(outside)) = (inside, outside)
            && inside != outside
        {
            for device in &self.node.devices {
                packet.device = Some(device.name.clone());
                rules.push(packet.rule(&verdict(outside)));
            }
            packet.device = None;
        }
        match ranges {
            None => rules.extend(all.map(|target| packet.rule(&target))),
            Some(ranges) => {
                rules.extend(packet.each_source(ranges, all.as_slice()));
                rules.push(packet.rule("-j DROP"));
            }
        }
        rules
    }

    fn enter(
        &mut self,
        table: Table,
        tree: &'static str,
        address: SocketAddr,
        protocol: Protocol,
        rules: Vec<String>,
    ) {
        let by = match tree {
            NODE_PORTS => By::Port(protocol, address.port()),
            _ => By::Address(address.ip()),
        };
        if !rules.is_empty() {
            let entry = Entry { by, rules };
            self.entries.entry((table, tree)).or_default().push(entry);
        }
    }

    fn sources(&mut self, plan: &Plan) {
        self.hairpins.extend(&plan.here);
        let in_pods = |address: &IpAddr| self.node.pod_networks.iter().any(|net| net.contains(*address));
        let endpoints = plan.outside.iter().chain(plan.inside.iter().flatten());
        let strangers = endpoints
            .map(SocketAddr::ip)
            .filter(|address| !in_pods(address) && !plan.here.contains(address));
        self.strangers.extend(strangers);
    }

    fn finish(mut self) -> Chains {
        let ping = match self.family {
            Family::V4 => "-p icmp -m icmp --icmp-type 8",
            Family::V6 => "-p ipv6-icmp -m icmp6 --icmpv6-type 128",
        };
        let of_family = |address: &&IpAddr| Family::of(**address) == self.family;
        let node = self.node.node_addresses.iter().find(of_family).copied();
        let pinged = node.filter(|_| self.node.ping);
        for (address, ready) in std::mem::take(&mut self.cluster_ips) {
            let by = By::Address(address);
            let destination = host(address);
            if let (true, Some(node)) = (ready, pinged) {
                let rules = vec![format!("-d {destination} {ping} -j DNAT --to-destination {node}")];
                let entry = Entry { by, rules };
                self.entries
                    .entry((Table::Nat, CLUSTER_IPS))
                    .or_default()
                    .push(entry);
            }
            let rules = vec![format!("-d {destination} -j {REFUSE}")];
            let entry = Entry { by, rules };
            self.entries
                .entry((Table::Filter, CLUSTER_IPS))
                .or_default()
                .push(entry);
        }
        let hairpins: Vec<_> = std::mem::take(&mut self.hairpins)
            .into_iter()
            .map(|address| Entry {
                by: By::Address(address),
                rules: vec![format!("-s {0} -d {0} {MASQUERADE}", host(address))],
            })
            .collect();
        grow(&mut self.chains, Table::Nat, HAIRPIN, &hairpins);
        for ((table, root), entries) in std::mem::take(&mut self.entries) {
            grow(&mut self.chains, table, root, &entries);
        }
        let (kind, unreachable) = match self.family {
            Family::V4 => ("icmp", "icmp-host-unreachable"),
            Family::V6 => ("icmp6", "icmp6-addr-unreachable"),
        };
        let mut refuse = vec!["-p tcp -j REJECT --reject-with tcp-reset".to_owned()];
        for protocol in ["udp", "sctp"] {
            refuse.push(format!(
                "-p {protocol} -j REJECT --reject-with {kind}-port-unreachable"
            ));
        }
        if pinged.is_some() {
            refuse.push(format!("{ping} -j REJECT --reject-with {unreachable}"));
        }
        self.chains.insert((Table::Filter, REFUSE.to_owned()), refuse);
        for table in Table::ALL {
            let rules = self.root(table);
            self.chains.insert((table, SERVICES.to_owned()), rules);
        }
        let rules = self.source(node);
        self.chains.insert((Table::Nat, SOURCE.to_owned()), rules);
        self.chains
    }

    /// The chain by which packets come in: what serves everyone first, then what serves pods and the node.
    fn root(&self, table: Table) -> Vec<String> {
        let there = |root: &str| self.chains.contains_key(&(table, root.to_owned()));
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
            rules.extend(self.by_devices("-j RETURN"));
            rules.push(format!("-j {CLUSTER_IPS}"));
        }
        rules
    }

    /// Who sees another's address than the client's.
    fn source(&self, node: Option<IpAddr>) -> Vec<String> {
        let client = loopback::client(self.family);
        let mut rules = vec![format!("-o {} -j SNAT --to-source {client}", loopback::NEAR)];
        if let Some(node) = node {
            rules.push(format!("-s {} -j SNAT --to-source {node}", host(client)));
        }
        // A pod that connects to itself would answer itself past this host.
        if self.chains.contains_key(&(Table::Nat, HAIRPIN.to_owned())) {
            rules.push(format!("-j {HAIRPIN}"));
        }
        // Replies to what came from elsewhere and goes elsewhere would not come back by this node.
        let own: Vec<_> = self.networks(&self.node.own_networks);
        rules.extend(own.iter().map(|network| format!("-s {network} -j RETURN")));
        rules.push("-m addrtype --src-type LOCAL -j RETURN".to_owned());
        rules.extend(own.iter().map(|network| format!("-d {network} -j RETURN")));
        let pods = self.networks(&self.node.pod_networks);
        rules.extend(pods.iter().map(|network| format!("-d {network} {MASQUERADE}")));
        let strangers = self.strangers.iter();
        rules.extend(strangers.map(|address| format!("-d {} {MASQUERADE}", host(*address))));
        rules
    }

    fn networks(&self, all: &[IpNetwork]) -> Vec<String> {
        all.iter()
            .filter(|network| Family::of(network.ip()) == self.family)
            .map(|network| format!("{}/{}", network.network(), network.prefix()))
            .collect()
    }
}

/// The packets that a rule is about.
struct Packet {
    destination: SocketAddr,
    protocol: Protocol,
    source: Option<IpNetwork>,
    device: Option<String>,
}

impl Packet {
    fn to(destination: SocketAddr, protocol: Protocol) -> Self {
        Self {
            destination,
            protocol,
            source: None,
            device: None,
        }
    }

    /// The rule that sends them to `target`.
    fn rule(&self, target: &str) -> String {
        let mut rule = String::new();
        // iptables leaves out what matches everything.
        if let Some(source) = self.source.filter(|source| source.prefix() > 0) {
            rule += &format!("-s {}/{} ", source.network(), source.prefix());
        }
        rule += &format!("-d {} ", host(self.destination.ip()));
        if let Some(device) = &self.device {
            rule += &format!("-i {device} ");
        }
        let (protocol, port) = (words(self.protocol), self.destination.port());
        rule + &format!("-p {protocol} -m {protocol} --dport {port} {target}")
    }

    /// The rules that send those from any of `sources` to each of `targets`.
    fn each_source(&mut self, sources: &[IpNetwork], targets: &[String]) -> Vec<String> {
        let mut rules = Vec::new();
        for source in sources {
            self.source = Some(*source);
            rules.extend(targets.iter().map(|target| self.rule(target)));
        }
        self.source = None;
        rules
    }
}

/// Rules of which each connection takes one, each with the chance its weight gives it.
fn picks(targets: impl Iterator<Item = (usize, String)>, protocol: &str) -> Vec<String> {
    /// xt_statistic counts in parts of this.
    const WHOLE: f64 = 2_147_483_648.0;
    let targets: Vec<_> = targets.collect();
    let mut left: usize = targets.iter().map(|(weight, _)| weight).sum();
    let mut rules = Vec::new();
    for (weight, target) in targets {
        if weight == left {
            rules.push(format!("-p {protocol} {target}"));
        } else {
            let chance = (weight as f64 / left as f64 * WHOLE).round() / WHOLE;
            rules.push(format!(
                "-p {protocol} -m statistic --mode random --probability {chance:.11} {target}"
            ));
        }
        left -= weight;
    }
    rules
}

fn words(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// The network of one address.
fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(_) => format!("{address}/32"),
        IpAddr::V6(_) => format!("{address}/128"),
    }
}
