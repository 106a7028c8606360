//! `datastore`: where desired state comes from.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::address::{Cidrs, Family, MemberUrls, ServerUrls};

/// Where desired state comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Datastore {
    /// Which one.
    pub kind: DatastoreKind,
    /// For `kind: kubernetes`.
    pub kubernetes: Kubernetes,
    /// For `kind: etcd`.
    pub etcd: Etcd,
    /// For `kind: manifests`.
    pub manifests: Manifests,
}

impl Datastore {
    /// Which keys do not go together, and what would be right.
    pub(super) fn inconsistency(&self, cluster_cidrs: &Cidrs) -> Option<String> {
        match self.kind {
            DatastoreKind::Etcd => self.etcd.inconsistency(cluster_cidrs),
            DatastoreKind::Kubernetes | DatastoreKind::Manifests => None,
        }
    }
}

/// The datastores this build has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DatastoreKind {
    /// The cluster's API servers.
    #[default]
    Kubernetes,
    /// Kubernetes' objects in an etcd of one's own.
    Etcd,
    /// A folder of Kubernetes YAML.
    Manifests,
}

/// The cluster's API servers, and how this node is known to them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Kubernetes {
    /// A file with credentials; empty: those of the pod that the daemon runs in.
    pub kubeconfig: PathBuf,
    /// Where API servers are reached without a Service, tried in turn; several with commas between them. Empty: where the
    /// credentials say.
    pub api_server: ServerUrls,
}

impl Kubernetes {
    /// Where the credentials are from, for people.
    pub fn credentials(&self) -> String {
        if self.kubeconfig.as_os_str().is_empty() {
            "the pod's own credentials".to_owned()
        } else {
            self.kubeconfig.display().to_string()
        }
    }
}

/// An etcd of one's own, and how this node is known to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Etcd {
    /// Where its members are, tried in turn.
    pub endpoints: MemberUrls,
    /// What all keys begin with.
    pub prefix: String,
    /// The authority that signed the members' certificates, in PEM.
    pub ca_file: PathBuf,
    /// This client's certificate, in PEM; empty: it shows none.
    pub cert_file: PathBuf,
    /// The key of that certificate, in PEM.
    pub key_file: PathBuf,
    /// The user; empty: none.
    pub username: String,
    /// A file with the user's password, and nothing else but perhaps a line's end.
    pub password_file: PathBuf,
    /// How long a node that is not heard from keeps its pod CIDRs, in seconds.
    pub lease_seconds: u32,
    /// The length of a node's IPv4 pod CIDR; the same on all nodes.
    #[serde(rename = "nodeCIDRMaskSizeIPv4")]
    pub node_cidr_mask_size_ipv4: u8,
    /// The length of a node's IPv6 pod CIDR; the same on all nodes.
    #[serde(rename = "nodeCIDRMaskSizeIPv6")]
    pub node_cidr_mask_size_ipv6: u8,
    /// The addresses at which other nodes reach this one; empty: found, see docs/etcd.md.
    pub node_addresses: Vec<IpAddr>,
}

impl Default for Etcd {
    fn default() -> Self {
        Self {
            endpoints: MemberUrls::default(),
            prefix: "/sluice".to_owned(),
            ca_file: PathBuf::new(),
            cert_file: PathBuf::new(),
            key_file: PathBuf::new(),
            username: String::new(),
            password_file: PathBuf::new(),
            lease_seconds: 24 * 3600,
            node_cidr_mask_size_ipv4: 24,
            node_cidr_mask_size_ipv6: 64,
            node_addresses: Vec::new(),
        }
    }
}

impl Etcd {
    /// The least time that a lease can mean: etcd itself waits this long before it takes a member for dead.
    const SHORTEST_LEASE: u32 = 5;

    /// The length of a node's pod CIDR of `family`.
    pub fn mask_size(&self, family: Family) -> u8 {
        match family {
            Family::V4 => self.node_cidr_mask_size_ipv4,
            Family::V6 => self.node_cidr_mask_size_ipv6,
        }
    }

    fn inconsistency(&self, cluster_cidrs: &Cidrs) -> Option<String> {
        let is_set = |path: &PathBuf| !path.as_os_str().is_empty();
        let Some(first) = self.endpoints.first() else {
            return Some(
                "datastore.kind is etcd, but datastore.etcd.endpoints is empty; name the members, as in [https://192.0.2.1:2379]"
                    .to_owned(),
            );
        };
        let secure = first.starts_with("https:");
        if self
            .endpoints
            .iter()
            .any(|endpoint| endpoint.starts_with("https:") != secure)
        {
            return Some(
                "datastore.etcd.endpoints has https and http members; they are of one kind in a cluster"
                    .to_owned(),
            );
        }
        if secure && !is_set(&self.ca_file) {
            return Some(
                "datastore.etcd.caFile is empty; name the file with the authority that signed the members' certificates"
                    .to_owned(),
            );
        }
        if !secure && (is_set(&self.ca_file) || is_set(&self.cert_file)) {
            return Some(format!(
                "datastore.etcd has certificates, but {first} takes none; write https:// there, or leave them out"
            ));
        }
        for (one, name, other, other_name) in [
            (&self.cert_file, "certFile", &self.key_file, "keyFile"),
            (&self.key_file, "keyFile", &self.cert_file, "certFile"),
        ] {
            if is_set(one) && !is_set(other) {
                return Some(format!(
                    "datastore.etcd.{name} is set and {other_name} is not; they belong together"
                ));
            }
        }
        match (self.username.is_empty(), is_set(&self.password_file)) {
            (false, false) => {
                return Some(
                    "datastore.etcd.username is set and passwordFile is not; they belong together".to_owned(),
                );
            }
            (true, true) => {
                return Some(
                    "datastore.etcd.passwordFile is set and username is not; they belong together".to_owned(),
                );
            }
            _ => {}
        }
        if !self.prefix.starts_with('/') || self.prefix.ends_with('/') {
            return Some(format!(
                "datastore.etcd.prefix is {:?}; something like /sluice is wanted, with no slash at its end",
                self.prefix
            ));
        }
        if self.lease_seconds < Self::SHORTEST_LEASE {
            return Some(format!(
                "datastore.etcd.leaseSeconds is {}; {} is the least that is of use",
                self.lease_seconds,
                Self::SHORTEST_LEASE
            ));
        }
        cluster_cidrs.iter().find_map(|cidr| {
            let family = Family::of(cidr.ip());
            let (key, longest) = match family {
                Family::V4 => ("nodeCIDRMaskSizeIPv4", 30),
                Family::V6 => ("nodeCIDRMaskSizeIPv6", 126),
            };
            let size = self.mask_size(family);
            (!(cidr.prefix()..=longest).contains(&size)).then(|| {
                format!(
                    "datastore.etcd.{key} is {size}; {} to {longest} fit into {cidr}",
                    cidr.prefix()
                )
            })
        })
    }
}

/// A folder of Kubernetes YAML.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifests {
    /// Where it is; watched.
    pub directory: PathBuf,
}

impl Default for Manifests {
    fn default() -> Self {
        Self {
            directory: PathBuf::from("/etc/sluice/manifests"),
        }
    }
}
