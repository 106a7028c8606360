//! Pods.

use compact_str::CompactString;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Metadata;
use super::fields::{addresses, endpoint_address, port_number, protocol};
use super::passed_over::PassedOver;
use crate::state::objects::{NamedPort, Pod};

/// A Pod as written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
pub struct RawPod {
    #[serde(default)]
    api_version: IgnoredAny,
    #[serde(default)]
    kind: IgnoredAny,
    metadata: Metadata,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct PodSpec {
    node_name: Option<String>,
    containers: Vec<Container>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Container {
    ports: Vec<ContainerPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<CompactString>,
    container_port: i64,
    protocol: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct PodStatus {
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
    conditions: Vec<PodCondition>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: String,
}

#[derive(Deserialize)]
struct PodCondition {
    r#type: String,
    status: String,
}

impl RawPod {
    /// Checks every field; `passed` takes the addresses and ports that are none.
    ///
    /// # Errors
    /// The object, the field, what it says and what would be right.
    pub fn check(self, passed: &mut PassedOver) -> Result<Pod, String> {
        let name = self.metadata.checked_name("Pod")?;
        passed.of(format!("Pod {name}"));
        let mut written: Vec<String> = self.status.pod_ips.into_iter().map(|entry| entry.ip).collect();
        if let (true, Some(single)) = (written.is_empty(), self.status.pod_ip) {
            written.push(single);
        }
        let addresses = addresses("status.podIPs", &written, endpoint_address, passed);
        let mut ports = Vec::new();
        for (c, container) in self.spec.containers.iter().enumerate() {
            for (p, port) in container.ports.iter().enumerate() {
                let field = format!("spec.containers[{c}].ports[{p}]");
                let number = passed.keep(&field, port_number(port.container_port));
                let protocol = passed.keep(&field, protocol(port.protocol.as_deref()));
                if let (Some(name), Some(number), Some(protocol)) = (&port.name, number, protocol) {
                    ports.push(NamedPort {
                        name: name.clone(),
                        protocol,
                        number,
                    });
                }
            }
        }
        let ready = self
            .status
            .conditions
            .iter()
            .any(|c| c.r#type == "Ready" && c.status == "True");
        Ok(Pod {
            name,
            labels: self.metadata.labels,
            node: self.spec.node_name,
            addresses,
            ready,
            terminating: self.metadata.deletion_timestamp.is_some(),
            ports,
        })
    }
}
