//! Services.

use std::collections::BTreeMap;
use std::time::Duration;

use compact_str::CompactString;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Metadata;
use super::fields::{addresses, networks, one_of, port_number, protocol, service_address};
use super::passed_over::PassedOver;
use crate::state::objects::{Service, ServicePortSpec, TargetPort};
use crate::state::topology::TrafficDistribution;

/// A Service as written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "named so that they are not unknown")]
pub struct RawService {
    #[serde(default)]
    api_version: IgnoredAny,
    #[serde(default)]
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
    health_check_node_port: Option<i64>,
    traffic_distribution: Option<String>,
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
    name: Option<CompactString>,
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
    /// Checks every field; `passed` takes the ports, addresses and ranges that can be none.
    ///
    /// # Errors
    /// The object, the field, what it says and what would be right.
    pub fn check(self, passed: &mut PassedOver) -> Result<Service, String> {
        let name = self.metadata.checked_name("Service")?;
        passed.of(format!("Service {name}"));
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

        if headless {
            written.clear();
        }
        let cluster_ips = addresses("spec.clusterIPs", &written, service_address, passed);
        let external_ips = addresses("spec.externalIPs", &spec.external_ips, service_address, passed);
        let mut load_balancer_ips = Vec::new();
        for (i, ingress) in self.status.load_balancer.ingress.iter().enumerate() {
            if let (Some(ip), true) = (&ingress.ip, ingress.ip_mode.as_deref() != Some("Proxy")) {
                let field = format_args!("status.loadBalancer.ingress[{i}].ip");
                load_balancer_ips.extend(passed.keep(field, service_address(ip)));
            }
        }
        // Ranges none of which can be understood let nobody in, and not everybody.
        let source_ranges = (!spec.load_balancer_source_ranges.is_empty()).then(|| {
            let field = "spec.loadBalancerSourceRanges";
            networks(field, &spec.load_balancer_source_ranges, passed)
        });
        let ports = checked_ports(&spec.ports, kind, passed);
        if served && spec.ports.is_empty() {
            let reason = "is empty; a Service has at least one port";
            return Err(at("spec.ports", reason.to_owned()));
        }
        if served && ports.is_empty() {
            return Err(passed.nothing_left("spec.ports"));
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
        // Advice, and newer Kubernetes may know more of it: without it the Service is served from everywhere.
        let distribution = match spec.traffic_distribution.as_deref() {
            None => None,
            Some("PreferClose" | "PreferSameZone") => Some(TrafficDistribution::PreferSameZone),
            Some("PreferSameNode") => Some(TrafficDistribution::PreferSameNode),
            Some(other) => {
                let known = ["PreferClose", "PreferSameZone", "PreferSameNode"];
                passed.add("spec.trafficDistribution", one_of(other, &known));
                None
            }
        };
        let external_local = is_local(
            "spec.externalTrafficPolicy",
            spec.external_traffic_policy.as_deref(),
        )?;
        // Elsewhere the API server does not take one.
        let health_check_port = match spec.health_check_node_port.filter(|port| *port != 0) {
            Some(port) if kind == "LoadBalancer" && external_local => {
                passed.keep("spec.healthCheckNodePort", port_number(port))
            }
            _ => None,
        };
        Ok(Service {
            created: self.metadata.created(passed),
            internal_local: is_local(
                "spec.internalTrafficPolicy",
                spec.internal_traffic_policy.as_deref(),
            )?,
            external_local,
            served,
            cluster_ips,
            external_ips,
            load_balancer_ips,
            source_ranges,
            ports,
            selector: spec.selector,
            affinity,
            distribution,
            health_check_port,
            name,
        })
    }
}

/// Those of the ports that can be one; of two with one name, or one number and protocol, the first.
fn checked_ports(written: &[RawPort], kind: &str, passed: &mut PassedOver) -> Vec<ServicePortSpec> {
    let mut ports: Vec<ServicePortSpec> = Vec::new();
    for (i, raw) in written.iter().enumerate() {
        let checked = raw.check(kind).and_then(|port| {
            let same = |other: &&ServicePortSpec| (other.port, other.protocol) == (port.port, port.protocol);
            if ports.iter().any(|other| other.name == port.name) {
                let reason = format!("{:?} names two ports; each has its own name", port.name);
                return Err(("name", reason));
            }
            if let Some(other) = ports.iter().find(same) {
                let reason = format!("{}/{} is port {:?} already", port.port, port.protocol, other.name);
                return Err(("port", reason));
            }
            Ok(port)
        });
        match checked {
            Ok(port) => ports.push(port),
            Err((field, reason)) => passed.add(format_args!("spec.ports[{i}].{field}"), reason),
        }
    }
    ports
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
