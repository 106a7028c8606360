//! Endpoints and EndpointSlices.

use std::sync::Arc;

use compact_str::CompactString;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Metadata;
use super::fields::{endpoint_address, one_of, port_number, protocol};
use super::passed_over::PassedOver;
use crate::state::objects::{Endpoint, EndpointSlice, NamedPort, ObjectName};
use crate::state::service_port::Family;
use crate::state::topology::Hints;

/// An EndpointSlice as written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
pub struct RawEndpointSlice {
    #[serde(default)]
    api_version: IgnoredAny,
    #[serde(default)]
    kind: IgnoredAny,
    metadata: Metadata,
    address_type: String,
    #[serde(default)]
    endpoints: Vec<RawEndpoint>,
    #[serde(default)]
    ports: Vec<RawEndpointPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    #[serde(default)]
    addresses: Vec<String>,
    #[serde(default)]
    conditions: Conditions,
    node_name: Option<CompactString>,
    hints: Option<RawHints>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawHints {
    #[serde(default)]
    for_nodes: Vec<Named>,
    #[serde(default)]
    for_zones: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize)]
struct RawEndpointPort {
    name: Option<CompactString>,
    protocol: Option<String>,
    port: Option<i64>,
}

impl RawEndpointSlice {
    /// Checks every field; `passed` takes the endpoints and ports that can be none. A slice of host names
    /// (`addressType: FQDN`) is nothing for a proxy.
    ///
    /// # Errors
    /// The object, the field, what it says and what would be right.
    pub fn check(self, passed: &mut PassedOver) -> Result<Option<EndpointSlice>, String> {
        let name = self.metadata.checked_name("EndpointSlice")?;
        passed.of(format!("EndpointSlice {name}"));
        let at = |field: &str, reason: String| format!("EndpointSlice {name}: {field}: {reason}");
        let service = self
            .metadata
            .labels
            .get("kubernetes.io/service-name")
            .cloned()
            .ok_or_else(|| {
                at(
                    "metadata.labels",
                    "kubernetes.io/service-name is missing; it names the Service".to_owned(),
                )
            })?;
        let family = match self.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            "FQDN" => return Ok(None),
            other => return Err(at("addressType", one_of(other, &["IPv4", "IPv6"]))),
        };
        let mut endpoints = Vec::new();
        for (i, raw) in self.endpoints.into_iter().enumerate() {
            let Some(text) = raw.addresses.first() else {
                continue;
            };
            let checked = endpoint_address(text).and_then(|address| match Family::of(address) == family {
                true => Ok(address),
                false => Err(format!("{address} is not of addressType {}", self.address_type)),
            });
            let Some(address) = passed.keep(format_args!("endpoints[{i}].addresses[0]"), checked) else {
                continue;
            };
            // Absent conditions mean ready (discovery/v1, EndpointConditions).
            let ready = raw.conditions.ready.unwrap_or(true);
            endpoints.push(Endpoint {
                address,
                ready,
                serving: raw.conditions.serving.unwrap_or(ready),
                terminating: raw.conditions.terminating.unwrap_or(false),
                node: raw.node_name,
                hints: raw.hints.map(|hints| Arc::new(hints.into())),
            });
        }
        let ports = endpoint_ports("ports", &self.ports, passed);
        Ok(Some(EndpointSlice {
            name,
            service: service.into(),
            family,
            ports,
            endpoints,
            // One that is no time is of no use.
            triggered: self
                .metadata
                .annotations
                .last_change
                .and_then(|time| time.parse().ok()),
        }))
    }
}

impl From<RawHints> for Hints {
    fn from(raw: RawHints) -> Self {
        let names = |list: Vec<Named>| list.into_iter().map(|named| named.name).collect();
        Self {
            nodes: names(raw.for_nodes),
            zones: names(raw.for_zones),
        }
    }
}

/// Endpoints as written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
pub struct RawEndpoints {
    #[serde(default)]
    api_version: IgnoredAny,
    #[serde(default)]
    kind: IgnoredAny,
    metadata: Metadata,
    #[serde(default)]
    subsets: Vec<Subset>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Subset {
    #[serde(default)]
    addresses: Vec<SubsetAddress>,
    #[serde(default)]
    ports: Vec<RawEndpointPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SubsetAddress {
    ip: String,
    node_name: Option<CompactString>,
}

impl RawEndpoints {
    /// Checks every field, and makes one slice of each subset and family, as Kubernetes' own mirroring controller does;
    /// `passed` takes the endpoints and ports that can be none.
    ///
    /// # Errors
    /// Its name cannot be one.
    pub fn check(self, passed: &mut PassedOver) -> Result<Vec<EndpointSlice>, String> {
        let name = self.metadata.checked_name("Endpoints")?;
        passed.of(format!("Endpoints {name}"));
        let mut slices = Vec::new();
        for (s, subset) in self.subsets.into_iter().enumerate() {
            let ports = endpoint_ports(&format!("subsets[{s}].ports"), &subset.ports, passed);
            let mut endpoints = Vec::new();
            for (i, raw) in subset.addresses.into_iter().enumerate() {
                let field = format!("subsets[{s}].addresses[{i}].ip");
                let address = passed.keep(field, endpoint_address(&raw.ip));
                endpoints.extend(address.map(|address| Endpoint {
                    address,
                    ready: true,
                    serving: true,
                    terminating: false,
                    node: raw.node_name,
                    hints: None,
                }));
            }
            for (family, suffix) in [(Family::V4, "ipv4"), (Family::V6, "ipv6")] {
                let of_family: Vec<_> = endpoints
                    .iter()
                    .filter(|e| Family::of(e.address) == family)
                    .cloned()
                    .collect();
                if !of_family.is_empty() {
                    slices.push(EndpointSlice {
                        name: ObjectName::new(
                            name.namespace.clone(),
                            format!("{}.endpoints.{s}.{suffix}", name.name),
                        ),
                        service: name.name.clone(),
                        family,
                        ports: ports.clone(),
                        endpoints: of_family,
                        triggered: None,
                    });
                }
            }
        }
        Ok(slices)
    }
}

fn endpoint_ports(field: &str, raw: &[RawEndpointPort], passed: &mut PassedOver) -> Vec<NamedPort> {
    raw.iter()
        .enumerate()
        .filter_map(|(i, port)| {
            let number = passed.keep(format_args!("{field}[{i}].port"), port_number(port.port?));
            let protocol = protocol(port.protocol.as_deref());
            let protocol = passed.keep(format_args!("{field}[{i}].protocol"), protocol);
            Some(NamedPort {
                name: port.name.clone().unwrap_or_default(),
                protocol: protocol?,
                number: number?,
            })
        })
        .collect()
}
