//! Nodes.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Metadata;
use super::fields::parse_address;
use super::passed_over::PassedOver;
use crate::address::parse_cidr;
use crate::state::objects::Node;

/// A Node as written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
pub struct RawNode {
    #[serde(default)]
    api_version: IgnoredAny,
    #[serde(default)]
    kind: IgnoredAny,
    metadata: Metadata,
    #[serde(default)]
    spec: NodeSpec,
    #[serde(default)]
    status: NodeStatus,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct NodeStatus {
    addresses: Vec<NodeAddress>,
}

#[derive(Deserialize)]
struct NodeAddress {
    r#type: String,
    address: String,
}

/// Where a node says which zone it is in (Kubernetes, well-known labels).
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

impl RawNode {
    /// Checks every field; `passed` takes the addresses that are none. A pod CIDR is not passed over: a node's pods cannot
    /// do without.
    ///
    /// # Errors
    /// The object, the field, what it says and what would be right.
    pub fn check(self, passed: &mut PassedOver) -> Result<Node, String> {
        let name = self.metadata.checked_name("Node")?.name;
        passed.of(format!("Node {name}"));
        let zone = self
            .metadata
            .labels
            .get(ZONE_LABEL)
            .filter(|zone| !zone.is_empty())
            .cloned();
        let created = self.metadata.created(passed);
        let context = |what: &str, reason: String| format!("Node {name}: {what}: {reason}");
        let mut written = self.spec.pod_cidrs;
        if let (true, Some(single)) = (written.is_empty(), self.spec.pod_cidr) {
            written.push(single);
        }
        let mut pod_cidrs = Vec::new();
        for (i, text) in written.iter().enumerate() {
            pod_cidrs
                .push(parse_cidr(text).map_err(|reason| context(&format!("spec.podCIDRs[{i}]"), reason))?);
        }
        let mut addresses = Vec::new();
        for (i, address) in self.status.addresses.iter().enumerate() {
            if address.r#type == "InternalIP" {
                let field = format!("status.addresses[{i}].address");
                addresses.extend(passed.keep(field, parse_address(&address.address)));
            }
        }
        Ok(Node {
            name: name.into(),
            addresses,
            pod_cidrs,
            zone,
            created,
        })
    }
}
