//! What one set comes to: chains of its own, and what it puts into those that all sets share. Pure.
//!
//! A connection's first packet is led by a tree ([`tree`](super::tree)) to the chain of its set, and there one rule for each endpoint
//! translates it. What was not translated and is for a Service all the same is refused in the filter table: the nat table
//! neither drops nor refuses. No packet is marked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::chains::{CLUSTER_IPS, Chains, EXTERNAL, NODE_PORTS, REFUSE, Table, chain_of, set_chain};
use super::rule::{Packet, picks, words};
use super::tree::{By, Entry};
use crate::proxy::Surroundings;
use crate::proxy::netfilter::loopback;
use crate::proxy::netfilter::plan::{Plan, of_scope};
use crate::state::service_port::{Family, FrontendKind, Protocol, Scope, ServicePortKey, WhenEmpty};

/// One chain picks among as many endpoints; of more, it picks a group first.
const GROUP: usize = 32;

/// The top of a tree.
pub type Root = (Table, &'static str);

/// What sets put into the chains that all share.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// The entries of the trees.
    pub entries: BTreeMap<Root, Vec<Entry>>,
    /// ClusterIPs, and whether they have an endpoint.
    pub cluster_ips: BTreeMap<IpAddr, bool>,
    /// Endpoints of this node.
    pub hairpins: BTreeSet<IpAddr>,
    /// Endpoints outside the pod network.
    pub strangers: BTreeSet<IpAddr>,
}

/// What a set comes to.
pub struct Part<'a> {
    node: &'a Surroundings,
    key: &'a ServicePortKey,
    plan: &'a Plan,
}

impl<'a> Part<'a> {
    /// What `plan`, that of `key`, comes to on this node.
    pub fn new(node: &'a Surroundings, key: &'a ServicePortKey, plan: &'a Plan) -> Self {
        Self { node, key, plan }
    }

    /// Adds the chains that are its own.
    pub fn own(&self, chains: &mut Chains) {
        let rules = self.endpoints(chains);
        if !rules.is_empty() {
            chains.insert((Table::Nat, set_chain(self.key)), rules);
        }
        if let (Some(inside), Some(name)) = (&self.plan.inside, self.external()) {
            chains.insert((Table::Nat, name), self.by_origin(inside));
        }
    }

    /// The chain of the set: one rule for each endpoint, of which a connection takes one.
    fn endpoints(&self, chains: &mut Chains) -> Vec<String> {
        let plan = self.plan;
        let protocol = words(plan.protocol);
        let translated = |endpoint: &SocketAddr| format!("-j DNAT --to-destination {endpoint}");
        if let Some(seconds) = plan.affinity {
            return self.sticky(chains, seconds);
        }
        if plan.outside.len() <= GROUP {
            let endpoints = plan.outside.iter();
            return picks(endpoints.map(|endpoint| (1, translated(endpoint))), protocol);
        }
        let mut groups = Vec::new();
        for (number, group) in plan.outside.chunks(GROUP).enumerate() {
            let name = chain_of('G', self.key, &[&number.to_string()]);
            let rules = picks(group.iter().map(|endpoint| (1, translated(endpoint))), protocol);
            chains.insert((Table::Nat, name.clone()), rules);
            groups.push((group.len(), format!("-j {name}")));
        }
        picks(groups.into_iter(), protocol)
    }

    /// With session affinity: a chain for each endpoint, which remembers its clients (xt_recent), and is taken first by those.
    fn sticky(&self, chains: &mut Chains, seconds: u32) -> Vec<String> {
        let protocol = words(self.plan.protocol);
        let mask = match self.key.family {
            Family::V4 => "255.255.255.255",
            Family::V6 => "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        };
        let mut rules = Vec::new();
        let mut any = Vec::new();
        for endpoint in &self.plan.outside {
            let name = chain_of('E', self.key, &[&endpoint.to_string()]);
            let client = format!("--name {name} --mask {mask} --rsource");
            rules.push(format!(
                "-m recent --rcheck --seconds {seconds} --reap {client} -j {name}"
            ));
            let remember =
                format!("-p {protocol} -m recent --set {client} -j DNAT --to-destination {endpoint}");
            any.push((1, format!("-j {name}")));
            chains.insert((Table::Nat, name), vec![remember]);
        }
        rules.extend(picks(any.into_iter(), protocol));
        rules
    }

    /// Adds what leads to it, and what becomes of those whom nobody serves.
    pub fn frontends(&self, shared: &mut Shared) {
        let plan = self.plan;
        let set = self.set();
        let external = self.external();
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
                shared.enter((Table::Nat, tree), address, plan.protocol, rules);
                if address != *written {
                    // Led round, and back in as a stranger's.
                    let to = format!("-j DNAT --to-destination {}", address.ip());
                    let rule = Packet::to(*written, plan.protocol).rule(&to);
                    shared.enter((Table::Nat, NODE_PORTS), *written, plan.protocol, vec![rule]);
                }
            }
            if tree == CLUSTER_IPS {
                let ready = shared.cluster_ips.entry(address.ip()).or_default();
                *ready |= set.is_some();
            }
            // Nobody on loopback listens there: the kernel refuses it by itself.
            if address == *written {
                let rules = self.refusals(*kind, &mut packet);
                shared.enter((Table::Filter, tree), address, plan.protocol, rules);
            }
        }
    }

    /// The set's own chain, where there is one.
    fn set(&self) -> Option<String> {
        (!self.plan.outside.is_empty()).then(|| set_chain(self.key))
    }

    /// The chain for frontends that serve other hosts, where those are served by others than pods and the node are.
    fn external(&self) -> Option<String> {
        let set = self.set();
        match &self.plan.inside {
            None => set,
            Some(inside) if set.is_none() && inside.is_empty() => None,
            Some(_) => Some(chain_of('X', self.key, &[])),
        }
    }

    /// The rules of that chain.
    fn by_origin(&self, inside: &[SocketAddr]) -> Vec<String> {
        let outside = match self.set() {
            Some(set) => format!("-g {set}"),
            None => "-j RETURN".to_owned(),
        };
        let mut rules = by_devices(self.node, &outside);
        if !inside.is_empty() {
            rules.push(format!("-g {}", set_chain(&of_scope(self.key, Scope::Cluster))));
        }
        rules
    }

    /// What becomes of packets for a frontend that were not translated.
    fn refusals(&self, kind: FrontendKind, packet: &mut Packet) -> Vec<String> {
        let plan = self.plan;
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

    /// Adds the endpoints whose clients may have to be seen as another.
    pub fn sources(&self, shared: &mut Shared) {
        let plan = self.plan;
        shared.hairpins.extend(&plan.here);
        let in_pods = |address: &IpAddr| self.node.pod_networks.iter().any(|net| net.contains(*address));
        let endpoints = plan.outside.iter().chain(plan.inside.iter().flatten());
        let strangers = endpoints
            .map(SocketAddr::ip)
            .filter(|address| !in_pods(address) && !plan.here.contains(address));
        shared.strangers.extend(strangers);
    }
}

impl Shared {
    fn enter(&mut self, root: Root, address: SocketAddr, protocol: Protocol, rules: Vec<String>) {
        let by = match root.1 {
            NODE_PORTS => By::Port(protocol, address.port()),
            _ => By::Address(address.ip()),
        };
        if !rules.is_empty() {
            self.entries.entry(root).or_default().push(Entry { by, rules });
        }
    }
}

/// A rule for each device by which other hosts' packets come.
pub fn by_devices(node: &Surroundings, target: &str) -> Vec<String> {
    let devices = node.devices.iter();
    devices
        .map(|device| format!("-i {} {target}", device.name))
        .collect()
}
