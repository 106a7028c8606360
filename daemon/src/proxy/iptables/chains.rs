//! Our chains in iptables: where they are, what they are called, and what leads to them.

use std::collections::BTreeMap;

use sluice_cni::stable_hash::stable_hash;

use crate::state::service_port::{Scope, ServicePortKey};

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
/// Who sees another's address than the client's.
pub const SOURCE: &str = "SLUICE-SOURCE";
/// The reset, or the error, for whom nobody serves.
pub const REFUSE: &str = "SLUICE-REFUSE";
/// The top of a tree: frontends that serve pods and the node.
pub const CLUSTER_IPS: &str = "SLUICE-CLUSTERIP";
/// The top of another: frontends that serve everyone.
pub const EXTERNAL: &str = "SLUICE-EXTERNAL";
/// The top of another: this node's own ports.
pub const NODE_PORTS: &str = "SLUICE-NODEPORT";
/// The top of another: endpoints of this node.
pub const HAIRPIN: &str = "SLUICE-HAIRPIN";

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

/// The chain of a set's endpoints.
pub fn set_chain(key: &ServicePortKey) -> String {
    chain_of('S', key, &[])
}

/// A name of 28 characters at most (`XT_EXTENSION_MAXNAMELEN`): what people know the Service by, and what no two sets share.
pub fn chain_of(kind: char, key: &ServicePortKey, parts: &[&str]) -> String {
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
