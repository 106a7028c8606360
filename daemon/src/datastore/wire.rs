//! Kubernetes objects as they are written, and their checking into [`crate::state::objects`].
//!
//! The shapes are trimmed to what Sluice reads. A key that does not belong beside `spec` is refused, as `sepc` would
//! otherwise silently be an object without a spec; below that, unknown keys are newer Kubernetes' and pass.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::config::parse_cidr;
use crate::state::objects::{
    Endpoint, EndpointSlice, Node, Object, ObjectName, Pod, Service, ServicePortSpec, TargetPort,
};
use crate::state::service_port::{Family, Protocol};
use crate::yaml::{self, YamlError};

/// What one YAML document came to.
pub enum Document {
    /// Objects Sluice uses; Endpoints may be several slices.
    Objects(Vec<Object>),
    /// Something Sluice does not look at.
    Other,
}

/// Parses and checks one document; line numbers in errors are those of `text`.
///
/// # Errors
/// What is wrong, where, and what would be right.
pub fn parse(text: &str) -> Result<Document, YamlError> {
    let head: Head = yaml::parse(text)?;
    let checked = match (head.api_version.as_str(), head.kind.as_str()) {
        ("v1", "Node") => yaml::parse::<RawNode>(text)?
            .check()
            .map(|node| vec![Object::Node(node)]),
        ("v1", "Service") => yaml::parse::<RawService>(text)?
            .check()
            .map(|service| vec![Object::Service(service)]),
        ("v1", "Pod") => yaml::parse::<RawPod>(text)?
            .check()
            .map(|pod| vec![Object::Pod(pod)]),
        ("v1", "Endpoints") => yaml::parse::<RawEndpoints>(text)?
            .check()
            .map(|slices| slices.into_iter().map(Object::EndpointSlice).collect()),
        ("discovery.k8s.io/v1", "EndpointSlice") => yaml::parse::<RawEndpointSlice>(text)?
            .check()
            .map(|slice| vec![Object::EndpointSlice(slice)]),
        (version, kind @ ("Node" | "Service" | "Pod" | "Endpoints" | "EndpointSlice")) => {
            let wanted = if kind == "EndpointSlice" {
                "discovery.k8s.io/v1"
            } else {
                "v1"
            };
            Err(format!("{kind} with apiVersion {version:?}; {wanted} is wanted"))
        }
        (_, kind) => match yaml::likely(kind, ["Node", "Service", "Pod", "Endpoints", "EndpointSlice"]) {
            // Pods' controllers and the like share such folders: what resembles nothing of ours is not an error.
            Some(meant) => Err(format!("kind {kind:?} is unknown; did you mean {meant:?}?")),
            None => return Ok(Document::Other),
        },
    };
    checked
        .map(Document::Objects)
        .map_err(|message| YamlError { line: 0, message })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    api_version: String,
    kind: String,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: Option<String>,
    labels: BTreeMap<String, String>,
    deletion_timestamp: Option<String>,
}

impl Metadata {
    fn checked_name(&self, kind: &str) -> Result<ObjectName, String> {
        let namespace = self.namespace.clone().unwrap_or_else(|| "default".to_owned());
        for (field, value) in [("name", &self.name), ("namespace", &namespace)] {
            let fits = !value.is_empty()
                && value.len() <= 253
                && value
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b));
            if !fits {
                return Err(format!(
                    "{kind}: metadata.{field} is {value:?}; lower-case letters, digits, '-' and '.' are wanted"
                ));
            }
        }
        Ok(ObjectName::new(namespace, self.name.clone()))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
struct RawNode {
    api_version: IgnoredAny,
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

impl RawNode {
    fn check(self) -> Result<Node, String> {
        let name = self.metadata.checked_name("Node")?.name;
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
                addresses.push(parse_address(&address.address).map_err(|reason| context(&field, reason))?);
            }
        }
        Ok(Node {
            name,
            addresses,
            pod_cidrs,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
struct RawService {
    api_version: IgnoredAny,
    kind: IgnoredAny,
    metadata: Metadata,
    spec: ServiceSpec,
    #[serde(default)]
    status: ServiceStatus,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct ServiceSpec {
    r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    #[serde(rename = "externalIPs")]
    external_ips: Vec<String>,
    ports: Vec<RawPort>,
    selector: BTreeMap<String, String>,
    session_affinity: Option<String>,
    session_affinity_config: Option<AffinityConfig>,
    internal_traffic_policy: Option<String>,
    external_traffic_policy: Option<String>,
    load_balancer_source_ranges: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AffinityConfig {
    #[serde(rename = "clientIP")]
    client_ip: Option<ClientIp>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ClientIp {
    timeout_seconds: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    protocol: Option<String>,
    port: i64,
    target_port: Option<IntOrString>,
    node_port: Option<i64>,
}

#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum IntOrString {
    Int(i64),
    String(String),
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct ServiceStatus {
    load_balancer: LoadBalancerStatus,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct LoadBalancerStatus {
    ingress: Vec<Ingress>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ingress {
    ip: Option<String>,
    ip_mode: Option<String>,
}

/// `spec.sessionAffinityConfig.clientIP.timeoutSeconds` when it is not written (Kubernetes API reference).
const DEFAULT_AFFINITY: Duration = Duration::from_secs(10_800);

/// Labels that keep a Service from the node's proxy (KEP-2447, and the same in kube-proxy).
const NOT_OURS: [&str; 2] = [
    "service.kubernetes.io/service-proxy-name",
    "service.kubernetes.io/headless",
];

impl RawService {
    fn check(self) -> Result<Service, String> {
        let name = self.metadata.checked_name("Service")?;
        let at = |field: &str, reason: String| format!("Service {name}: {field}: {reason}");
        let spec = self.spec;

        let kind = spec.r#type.as_deref().unwrap_or("ClusterIP");
        let kinds = ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"];
        if !kinds.contains(&kind) {
            return Err(at("spec.type", one_of(kind, &kinds)));
        }
        let mut written = spec.cluster_ips;
        if let (true, Some(single)) = (written.is_empty(), spec.cluster_ip) {
            written.push(single);
        }
        let headless = written.first().is_some_and(|ip| ip == "None");
        let labelled = NOT_OURS
            .iter()
            .any(|label| self.metadata.labels.contains_key(*label));
        let served = kind != "ExternalName" && !headless && !labelled;

        let cluster_ips = if headless {
            Vec::new()
        } else {
            addresses("spec.clusterIPs", &written).map_err(|(f, r)| at(&f, r))?
        };
        let external_ips = addresses("spec.externalIPs", &spec.external_ips).map_err(|(f, r)| at(&f, r))?;
        let mut unserved = Vec::new();
        let mut load_balancer_ips = Vec::new();
        for (i, ingress) in self.status.load_balancer.ingress.iter().enumerate() {
            if let (Some(ip), true) = (&ingress.ip, ingress.ip_mode.as_deref() != Some("Proxy")) {
                let field = format!("status.loadBalancer.ingress[{i}].ip");
                load_balancer_ips.push(parse_address(ip).map_err(|reason| at(&field, reason))?);
            }
        }
        if !spec.load_balancer_source_ranges.is_empty() && !load_balancer_ips.is_empty() {
            // Serving them to everyone would be worse than not serving them.
            load_balancer_ips.clear();
            unserved
                .push("its LoadBalancer addresses: loadBalancerSourceRanges is not supported yet".to_owned());
        }

        if served && spec.ports.is_empty() {
            return Err(at(
                "spec.ports",
                "is empty; a Service has at least one port".to_owned(),
            ));
        }
        let mut ports = Vec::new();
        for (i, port) in spec.ports.iter().enumerate() {
            let checked = port
                .check(kind)
                .map_err(|(field, reason)| at(&format!("spec.ports[{i}].{field}"), reason))?;
            ports.push(checked);
        }
        for (i, port) in ports.iter().enumerate() {
            if ports[..i].iter().any(|other| other.name == port.name) {
                let reason = format!(
                    "{:?} names two ports; with several ports each has its own name",
                    port.name
                );
                return Err(at(&format!("spec.ports[{i}].name"), reason));
            }
        }
        let affinity = match spec.session_affinity.as_deref() {
            None | Some("None") => None,
            Some("ClientIP") => Some(
                match spec
                    .session_affinity_config
                    .and_then(|c| c.client_ip?.timeout_seconds)
                {
                    None => DEFAULT_AFFINITY,
                    Some(seconds @ 1..=86_400) => Duration::from_secs(seconds.unsigned_abs()),
                    Some(other) => {
                        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
                        return Err(at(field, format!("{other} is impossible; 1 to 86400 is wanted")));
                    }
                },
            ),
            Some(other) => return Err(at("spec.sessionAffinity", one_of(other, &["None", "ClientIP"]))),
        };
        let is_local = |field: &str, value: Option<&str>| match value {
            None | Some("Cluster") => Ok(false),
            Some("Local") => Ok(true),
            Some(other) => Err(at(field, one_of(other, &["Cluster", "Local"]))),
        };
        Ok(Service {
            internal_local: is_local(
                "spec.internalTrafficPolicy",
                spec.internal_traffic_policy.as_deref(),
            )?,
            external_local: is_local(
                "spec.externalTrafficPolicy",
                spec.external_traffic_policy.as_deref(),
            )?,
            served,
            cluster_ips,
            external_ips,
            load_balancer_ips,
            ports,
            selector: spec.selector,
            affinity,
            unserved,
            name,
        })
    }
}

impl RawPort {
    fn check(&self, kind: &str) -> Result<ServicePortSpec, (&'static str, String)> {
        let port = port_number(self.port).map_err(|reason| ("port", reason))?;
        let node_port = match self.node_port.filter(|port| *port != 0) {
            Some(number) if matches!(kind, "NodePort" | "LoadBalancer") => {
                Some(port_number(number).map_err(|reason| ("nodePort", reason))?)
            }
            _ => None,
        };
        let target = match self.target_port.clone() {
            None => TargetPort::Number(port),
            Some(IntOrString::Int(number)) => {
                TargetPort::Number(port_number(number).map_err(|reason| ("targetPort", reason))?)
            }
            Some(IntOrString::String(name)) => TargetPort::Name(name),
        };
        let protocol = protocol(self.protocol.as_deref()).map_err(|reason| ("protocol", reason))?;
        Ok(ServicePortSpec {
            name: self.name.clone().unwrap_or_default(),
            protocol,
            port,
            target,
            node_port,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
struct RawEndpointSlice {
    api_version: IgnoredAny,
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
    node_name: Option<String>,
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
    name: Option<String>,
    protocol: Option<String>,
    port: Option<i64>,
}

impl RawEndpointSlice {
    fn check(self) -> Result<EndpointSlice, String> {
        let name = self.metadata.checked_name("EndpointSlice")?;
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
            other => return Err(at("addressType", one_of(other, &["IPv4", "IPv6"]))),
        };
        let mut endpoints = Vec::new();
        for (i, raw) in self.endpoints.into_iter().enumerate() {
            let Some(text) = raw.addresses.first() else {
                continue;
            };
            let field = format!("endpoints[{i}].addresses[0]");
            let address = endpoint_address(text).map_err(|reason| at(&field, reason))?;
            if Family::of(address) != family {
                return Err(at(
                    &field,
                    format!("{address} is not of addressType {}", self.address_type),
                ));
            }
            // Absent conditions mean ready (discovery/v1, EndpointConditions).
            let ready = raw.conditions.ready.unwrap_or(true);
            endpoints.push(Endpoint {
                address,
                ready,
                serving: raw.conditions.serving.unwrap_or(ready),
                terminating: raw.conditions.terminating.unwrap_or(false),
                node: raw.node_name,
            });
        }
        let ports = endpoint_ports(&self.ports).map_err(|(i, reason)| at(&format!("ports[{i}]"), reason))?;
        Ok(EndpointSlice {
            name,
            service,
            family,
            ports,
            endpoints,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
struct RawEndpoints {
    api_version: IgnoredAny,
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
    node_name: Option<String>,
}

impl RawEndpoints {
    /// One slice per subset and family, as Kubernetes' own mirroring controller does.
    fn check(self) -> Result<Vec<EndpointSlice>, String> {
        let name = self.metadata.checked_name("Endpoints")?;
        let at = |field: &str, reason: String| format!("Endpoints {name}: {field}: {reason}");
        let mut slices = Vec::new();
        for (s, subset) in self.subsets.into_iter().enumerate() {
            let ports = endpoint_ports(&subset.ports)
                .map_err(|(i, reason)| at(&format!("subsets[{s}].ports[{i}]"), reason))?;
            let mut endpoints = Vec::new();
            for (i, raw) in subset.addresses.into_iter().enumerate() {
                let field = format!("subsets[{s}].addresses[{i}].ip");
                let address = endpoint_address(&raw.ip).map_err(|reason| at(&field, reason))?;
                endpoints.push(Endpoint {
                    address,
                    ready: true,
                    serving: true,
                    terminating: false,
                    node: raw.node_name,
                });
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
                    });
                }
            }
        }
        Ok(slices)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
struct RawPod {
    api_version: IgnoredAny,
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
    name: Option<String>,
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
    fn check(self) -> Result<Pod, String> {
        let name = self.metadata.checked_name("Pod")?;
        let at = |field: &str, reason: String| format!("Pod {name}: {field}: {reason}");
        let mut written: Vec<String> = self.status.pod_ips.into_iter().map(|entry| entry.ip).collect();
        if let (true, Some(single)) = (written.is_empty(), self.status.pod_ip) {
            written.push(single);
        }
        let addresses = addresses("status.podIPs", &written).map_err(|(f, r)| at(&f, r))?;
        let mut ports = Vec::new();
        for (c, container) in self.spec.containers.iter().enumerate() {
            for (p, port) in container.ports.iter().enumerate() {
                let field = format!("spec.containers[{c}].ports[{p}]");
                let number = port_number(port.container_port).map_err(|reason| at(&field, reason))?;
                let protocol = protocol(port.protocol.as_deref()).map_err(|reason| at(&field, reason))?;
                if let Some(name) = &port.name {
                    ports.push((name.clone(), protocol, number));
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

fn one_of(found: &str, wanted: &[&str]) -> String {
    match yaml::likely(found, wanted.iter().copied()) {
        Some(meant) => format!("{found:?} is unknown; did you mean {meant:?}?"),
        None => format!("{found:?} is unknown; one of {} is wanted", wanted.join(", ")),
    }
}

fn protocol(written: Option<&str>) -> Result<Protocol, String> {
    match written {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(one_of(other, &["TCP", "UDP", "SCTP"])),
    }
}

fn port_number(number: i64) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("{number} is not a port; 1 to 65535 is wanted")),
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is not an IP address"))
}

fn addresses(field: &str, written: &[String]) -> Result<Vec<IpAddr>, (String, String)> {
    written
        .iter()
        .enumerate()
        .filter(|(_, text)| !text.is_empty())
        .map(|(i, text)| parse_address(text).map_err(|reason| (format!("{field}[{i}]"), reason)))
        .collect()
}

/// What the API server refuses too: an endpoint there would let a Service's author reach the node itself or the
/// cloud's metadata service through the proxy.
fn endpoint_address(text: &str) -> Result<IpAddr, String> {
    let address = parse_address(text)?;
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_loopback() || address.is_multicast() || address.is_unspecified() || link_local {
        return Err(format!(
            "{address} cannot be an endpoint: loopback, link-local, multicast and unspecified are refused"
        ));
    }
    Ok(address)
}

fn endpoint_ports(raw: &[RawEndpointPort]) -> Result<Vec<(String, Protocol, u16)>, (usize, String)> {
    raw.iter()
        .enumerate()
        .filter_map(|(i, port)| port.port.map(|number| (i, port, number)))
        .map(|(i, port, number)| {
            let number = port_number(number).map_err(|reason| (i, reason))?;
            let protocol = protocol(port.protocol.as_deref()).map_err(|reason| (i, reason))?;
            Ok((port.name.clone().unwrap_or_default(), protocol, number))
        })
        .collect()
}
