//! What Services come to as elements of the table's sets and maps. Pure.
//!
//! A connection's first packet is looked up by address, protocol and port; the element names the chain that picks among
//! that many endpoints, and the endpoint is an element too, by the same key and a number. So neither what a packet costs nor
//! what a change costs depends on how many Services there are.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnetwork::IpNetwork;

use crate::netfilter::parts::Parts;
use crate::proxy::netfilter::loopback::asked;
use crate::proxy::netfilter::plan::Plan;
use crate::state::service_port::{Family, FrontendKind, Protocol, WhenEmpty};

/// Numbers of endpoints that stay local begin here, beside those of the whole cluster.
pub const LOCAL_OFFSET: u32 = 1 << 16;

/// One of the table's sets and maps; there is one of each per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetKind {
    /// What becomes of connections of pods and the node: frontend to verdict.
    Inside,
    /// What becomes of connections from other hosts: frontend to verdict.
    Outside,
    /// Endpoints by frontend and number.
    Endpoints,
    /// The frontends that serve other hosts.
    External,
    /// ClusterIPs.
    ClusterIps,
    /// Those of them with an endpoint.
    Ready,
    /// Frontends that have source ranges.
    Restricted,
    /// Who may connect to these.
    Sources,
    /// Frontends on loopback, which are balanced under another address.
    Loopback,
    /// Endpoints of this node, each paired with itself: who connects to itself must see somebody else.
    Hairpin,
    /// Frontends whose clients stay with an endpoint, by the time-out in seconds.
    Sticky(u32),
}

impl SetKind {
    /// All that are there from the start.
    pub const FIXED: [Self; 10] = [
        Self::Inside,
        Self::Outside,
        Self::Endpoints,
        Self::External,
        Self::ClusterIps,
        Self::Ready,
        Self::Restricted,
        Self::Sources,
        Self::Loopback,
        Self::Hairpin,
    ];

    /// What the set is called in the table.
    pub fn name(self, family: Family) -> String {
        let digit = digit(family);
        match self {
            Self::Inside => format!("inside{digit}"),
            Self::Outside => format!("outside{digit}"),
            Self::Endpoints => format!("endpoints{digit}"),
            Self::External => format!("external{digit}"),
            Self::ClusterIps => format!("clusterips{digit}"),
            Self::Ready => format!("ready{digit}"),
            Self::Restricted => format!("restricted{digit}"),
            Self::Sources => format!("sources{digit}"),
            Self::Loopback => format!("loopback{digit}"),
            Self::Hairpin => format!("hairpin{digit}"),
            Self::Sticky(seconds) => format!("sticky{digit}-{seconds}"),
        }
    }
}

/// 4 or 6.
pub fn digit(family: Family) -> u8 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}

/// The key of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// Address, protocol, port.
    Frontend(SocketAddr, Protocol),
    /// The same, and a number.
    Endpoint(SocketAddr, Protocol, u32),
    /// The same, and a network of clients.
    Source(SocketAddr, Protocol, IpNetwork),
    /// An address.
    Address(IpAddr),
    /// An address, twice.
    Pair(IpAddr),
}

impl Key {
    fn family(&self) -> Family {
        Family::of(match self {
            Self::Frontend(address, _) | Self::Endpoint(address, _, _) | Self::Source(address, _, _) => {
                address.ip()
            }
            Self::Address(address) | Self::Pair(address) => *address,
        })
    }
}

/// Which element of which set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// The set, or map.
    pub set: SetKind,
    /// The key in it.
    pub key: Key,
}

impl Element {
    /// The family of the set it is in.
    pub fn family(&self) -> Family {
        self.key.family()
    }
}

/// What an element maps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// Nothing: it is in a set.
    None,
    /// What becomes of the connection.
    Verdict(Verdict),
    /// The same, once it was asked who the client is: source ranges, session affinity. Never a drop, which needs no asking.
    Checked(Verdict),
    /// An endpoint.
    Endpoint(SocketAddr),
}

impl Data {
    /// The verdict, and the chain it goes to; no chain for a drop.
    pub fn verdict(self, family: Family) -> Option<(Verdict, Option<String>)> {
        match self {
            Self::Verdict(verdict) => Some((verdict, verdict.chain(family))),
            Self::Checked(verdict) => {
                let digit = digit(family);
                let chain = verdict.chain(family);
                Some((verdict, chain.map(|chain| format!("checked{digit}-{chain}"))))
            }
            Self::None | Self::Endpoint(_) => None,
        }
    }

    /// The verdict whose chain is called so.
    pub fn of_chain(name: &str) -> Option<Self> {
        match name.strip_prefix("checked").and_then(|rest| rest.split_once('-')) {
            Some((_, chain)) => Verdict::of_chain(chain).map(Self::Checked),
            None => Verdict::of_chain(name).map(Self::Verdict),
        }
    }
}

/// What becomes of a connection to a frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// One of that many endpoints of the whole cluster.
    Cluster(u32),
    /// One of that many endpoints of this node.
    Local(u32),
    /// It is refused.
    Refuse,
    /// It is dropped.
    Drop,
}

impl Verdict {
    /// The chain it goes to; none for a drop.
    pub fn chain(self, family: Family) -> Option<String> {
        let digit = digit(family);
        match self {
            Self::Cluster(count) => Some(format!("cluster{digit}-{count}")),
            Self::Local(count) => Some(format!("local{digit}-{count}")),
            Self::Refuse => Some("refuse".to_owned()),
            Self::Drop => None,
        }
    }

    /// The verdict whose chain is called so.
    fn of_chain(name: &str) -> Option<Self> {
        if name == "refuse" {
            return Some(Self::Refuse);
        }
        let (kind, count) = name.split_once('-')?;
        let count = count.parse().ok()?;
        match kind.get(..kind.len().checked_sub(1)?)? {
            "cluster" => Some(Self::Cluster(count)),
            "local" => Some(Self::Local(count)),
            _ => None,
        }
    }
}

/// All elements of a plan, in no order; those of [`SetKind::ClusterIps`], [`SetKind::Ready`] and [`SetKind::Hairpin`] may be
/// others' too.
pub fn of_plan(plan: &Plan, mut add: impl FnMut(Element, Data)) {
    let protocol = plan.protocol;
    let empty = || match plan.when_empty {
        WhenEmpty::Refuse => Verdict::Refuse,
        WhenEmpty::Drop => Verdict::Drop,
    };
    for (written, kind) in &plan.frontends {
        let loopback = written.ip().is_loopback();
        let address = &asked(*written);
        let frontend = Key::Frontend(*address, protocol);
        let ranges = plan
            .ranges
            .as_ref()
            .filter(|_| *kind == FrontendKind::LoadBalancer);
        let asks = ranges.is_some() || plan.affinity.is_some();
        let mut verdict = |set, verdict| {
            let data = match verdict {
                Verdict::Drop => Data::Verdict(verdict),
                _ if asks => Data::Checked(verdict),
                _ => Data::Verdict(verdict),
            };
            add(Element { set, key: frontend }, data);
        };
        let is_cluster_ip = *kind == FrontendKind::ClusterIp;
        let inside = plan.inside.as_ref().filter(|_| !is_cluster_ip);
        // Of one frontend the numbers from 0 are what pods and the node are served by.
        let (first, local) = match inside {
            Some(inside) => (inside, Some(&plan.outside)),
            None => (&plan.outside, None),
        };
        let when_empty = if inside.is_some() {
            Verdict::Refuse
        } else {
            empty()
        };
        let some = |count: usize, of: fn(u32) -> Verdict, none: Verdict| match count {
            0 => none,
            count => of(count as u32),
        };
        verdict(SetKind::Inside, some(first.len(), Verdict::Cluster, when_empty));
        if !is_cluster_ip && !loopback {
            let outside = match local {
                Some(local) => some(local.len(), Verdict::Local, empty()),
                None => some(first.len(), Verdict::Cluster, empty()),
            };
            verdict(SetKind::Outside, outside);
            let set = SetKind::External;
            add(Element { set, key: frontend }, Data::None);
        }
        let local = local.filter(|_| !loopback).map(Vec::as_slice).unwrap_or_default();
        let numbers = (0..).zip(first).chain((LOCAL_OFFSET..).zip(local));
        for (number, endpoint) in numbers {
            let (set, key) = (SetKind::Endpoints, Key::Endpoint(*address, protocol, number));
            add(Element { set, key }, Data::Endpoint(*endpoint));
        }
        let mut plain = |set, key| add(Element { set, key }, Data::None);
        if loopback {
            plain(SetKind::Loopback, Key::Frontend(*written, protocol));
        }
        if is_cluster_ip {
            plain(SetKind::ClusterIps, Key::Address(address.ip()));
            if !first.is_empty() {
                plain(SetKind::Ready, Key::Address(address.ip()));
            }
        }
        if let Some(seconds) = plan.affinity {
            plain(SetKind::Sticky(seconds), frontend);
        }
        if let Some(ranges) = ranges {
            plain(SetKind::Restricted, frontend);
            for range in ranges {
                plain(SetKind::Sources, Key::Source(*address, protocol, *range));
            }
        }
    }
    for address in &plan.here {
        let (set, key) = (SetKind::Hairpin, Key::Pair(*address));
        add(Element { set, key }, Data::None);
    }
}

/// Which elements to take out and which to put in.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Gone, or with other data.
    pub removed: Vec<Element>,
    /// New, or with other data.
    pub added: Vec<(Element, Data)>,
}

impl Changes {
    /// From what is there to what is wanted.
    pub fn between(before: &BTreeMap<Element, Data>, after: &BTreeMap<Element, Data>) -> Self {
        let mut changes = Self::default();
        for (element, data) in before {
            if after.get(element) != Some(data) {
                changes.removed.push(*element);
            }
        }
        for (element, data) in after {
            if before.get(element) != Some(data) {
                changes.added.push((*element, *data));
            }
        }
        changes
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }
}

/// The bytes of a key as nf_tables has them: every part padded to a multiple of four bytes; and for a range its last key.
pub fn key_bytes(key: &Key) -> (Vec<u8>, Option<Vec<u8>>) {
    let mut bytes = Vec::with_capacity(48);
    match key {
        Key::Frontend(address, protocol) => put_frontend(&mut bytes, *address, *protocol),
        Key::Endpoint(address, protocol, number) => {
            put_frontend(&mut bytes, *address, *protocol);
            // numgen(8) has the host's order.
            bytes.extend_from_slice(&number.to_ne_bytes());
        }
        Key::Source(address, protocol, network) => {
            put_frontend(&mut bytes, *address, *protocol);
            let mut last = bytes.clone();
            put_address(&mut bytes, network.network());
            put_address(&mut last, network.broadcast());
            return (bytes, Some(last));
        }
        Key::Address(address) => put_address(&mut bytes, *address),
        Key::Pair(address) => {
            put_address(&mut bytes, *address);
            put_address(&mut bytes, *address);
        }
    }
    (bytes, None)
}

/// The bytes of an endpoint as data.
pub fn endpoint_bytes(endpoint: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20);
    put_address(&mut bytes, endpoint.ip());
    put_port(&mut bytes, endpoint.port());
    bytes
}

fn put_frontend(bytes: &mut Vec<u8>, address: SocketAddr, protocol: Protocol) {
    put_address(bytes, address.ip());
    bytes.extend_from_slice(&[protocol.number(), 0, 0, 0]);
    put_port(bytes, address.port());
}

fn put_address(bytes: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => bytes.extend_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes.extend_from_slice(&v6.octets()),
    }
}

fn put_port(bytes: &mut Vec<u8>, port: u16) {
    bytes.extend_from_slice(&port.to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
}

/// The key that `bytes` are in a set; `last` is the last key of a range.
pub fn key_of(set: SetKind, family: Family, bytes: &[u8], last: Option<&[u8]>) -> Option<Key> {
    let mut parts = Parts(bytes);
    Some(match set {
        SetKind::Inside
        | SetKind::Outside
        | SetKind::External
        | SetKind::Restricted
        | SetKind::Loopback
        | SetKind::Sticky(_) => {
            let (address, protocol) = parts.frontend(family)?;
            Key::Frontend(address, protocol)
        }
        SetKind::Endpoints => {
            let (address, protocol) = parts.frontend(family)?;
            Key::Endpoint(address, protocol, u32::from_ne_bytes(parts.take()?))
        }
        SetKind::Sources => {
            let (address, protocol) = parts.frontend(family)?;
            let first = parts.address(family)?;
            let mut parts = Parts(last.unwrap_or(bytes));
            parts.frontend(family)?;
            Key::Source(address, protocol, network_between(first, parts.address(family)?)?)
        }
        SetKind::ClusterIps | SetKind::Ready => Key::Address(parts.address(family)?),
        SetKind::Hairpin => Key::Pair(parts.address(family)?),
    })
}

/// The network from its first to its last address.
fn network_between(first: IpAddr, last: IpAddr) -> Option<IpNetwork> {
    let prefix = match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => (first.to_bits() ^ last.to_bits()).leading_zeros(),
        (IpAddr::V6(first), IpAddr::V6(last)) => (first.to_bits() ^ last.to_bits()).leading_zeros(),
        _ => return None,
    };
    IpNetwork::new(first, prefix as u8).ok()
}
