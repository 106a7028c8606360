//! Kubernetes objects as they are written, and their checking into [`crate::state::objects`].
//!
//! The shapes are trimmed to what Sluice reads. A key that does not belong beside `spec` is refused where people write, as `sepc` would
//! otherwise silently be an object without a spec; below that, and in what an API server sends, unknown keys are newer
//! Kubernetes' and pass.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use self::passed_over::PassedOver;
use crate::state::objects::{EndpointSlice, Kind, Object, ObjectName};
use crate::yaml::{self, YamlError};

mod endpoints;
mod fields;
mod node;
mod passed_over;
mod pod;
mod service;

/// What one YAML document came to.
pub enum Document {
    /// Objects Sluice uses; Endpoints may be several slices.
    Objects {
        /// The objects.
        objects: Vec<Object>,
        /// Which of their elements are not served, and why; the rest is.
        passed_over: Option<String>,
    },
    /// Something Sluice does not look at.
    Other,
}

/// Parses and checks one document; line numbers in errors are those of `text`.
///
/// # Errors
/// What is wrong, where, and what would be right.
pub fn parse(text: &str) -> Result<Document, YamlError> {
    let head: Head = yaml::parse(text)?;
    let mut passed = PassedOver::default();
    let checked = match (head.api_version.as_str(), head.kind.as_str()) {
        ("v1", "Node") => yaml::parse::<node::RawNode>(text)?
            .check(&mut passed)
            .map(|node| vec![Object::Node(node)]),
        ("v1", "Service") => yaml::parse::<service::RawService>(text)?
            .check(&mut passed)
            .map(|service| vec![Object::Service(service)]),
        ("v1", "Pod") => yaml::parse::<pod::RawPod>(text)?
            .check(&mut passed)
            .map(|pod| vec![Object::Pod(pod)]),
        ("v1", "Endpoints") => yaml::parse::<endpoints::RawEndpoints>(text)?
            .check(&mut passed)
            .map(|slices| slices.into_iter().map(Object::EndpointSlice).collect()),
        ("discovery.k8s.io/v1", "EndpointSlice") => yaml::parse::<endpoints::RawEndpointSlice>(text)?
            .check(&mut passed)
            .map(|slice| slice.map(Object::EndpointSlice).into_iter().collect()),
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
    let objects = checked.map_err(|message| YamlError { line: 0, message })?;
    Ok(Document::Objects {
        objects,
        passed_over: passed.told(),
    })
}

/// The keys beside which what an API server sends may have others.
const KEYS: [&str; 7] = [
    "metadata",
    "spec",
    "status",
    "addressType",
    "endpoints",
    "ports",
    "subsets",
];

/// What an API server's object came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The object; none if it is nothing for a proxy.
    pub object: Option<Object>,
    /// Which of its elements are not served, and why; the rest is.
    pub passed_over: Option<String>,
}

/// Checks one object that an API server sent; lists leave out its `kind`.
///
/// # Errors
/// The object, the field, what it says and what would be right.
pub fn check_sent(kind: Kind, object: Value) -> Result<Sent, String> {
    let object = trimmed(object);
    let name = object["metadata"]["name"].as_str().unwrap_or("?").to_owned();
    let misshapen = |error: serde_json::Error| format!("{kind} {name}: {error}");
    let mut passed = PassedOver::default();
    let object = match kind {
        Kind::Node => {
            let raw: node::RawNode = serde_json::from_value(object).map_err(misshapen)?;
            Some(Object::Node(raw.check(&mut passed)?))
        }
        Kind::Service => {
            let raw: service::RawService = serde_json::from_value(object).map_err(misshapen)?;
            Some(Object::Service(raw.check(&mut passed)?))
        }
        Kind::EndpointSlice => {
            let raw: endpoints::RawEndpointSlice = serde_json::from_value(object).map_err(misshapen)?;
            raw.check(&mut passed)?.map(Object::EndpointSlice)
        }
        Kind::Pod => {
            let raw: pod::RawPod = serde_json::from_value(object).map_err(misshapen)?;
            Some(Object::Pod(raw.check(&mut passed)?))
        }
    };
    Ok(Sent {
        object,
        passed_over: passed.told(),
    })
}

/// Checks Endpoints as Kubernetes has them in JSON: the slices they come to, and which of their elements are not served, and why.
///
/// # Errors
/// The object, the field, what it says and what would be right.
pub fn check_endpoints(object: Value) -> Result<(Vec<EndpointSlice>, Option<String>), String> {
    let object = trimmed(object);
    let name = object["metadata"]["name"].as_str().unwrap_or("?").to_owned();
    let raw: endpoints::RawEndpoints =
        serde_json::from_value(object).map_err(|error| format!("Endpoints {name}: {error}"))?;
    let mut passed = PassedOver::default();
    let slices = raw.check(&mut passed)?;
    Ok((slices, passed.told()))
}

/// Without keys of a later Kubernetes, and without what is nothing.
fn trimmed(mut object: Value) -> Value {
    if let Some(object) = object.as_object_mut() {
        object.retain(|key, _| KEYS.contains(&key.as_str()));
    }
    drop_nulls(&mut object);
    object
}

/// An API server writes a list with nothing in it as null, as in a slice whose last endpoint went.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(elements) => elements.iter_mut().for_each(drop_nulls),
        _ => {}
    }
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
    annotations: Annotations,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
}

/// Those that are read; objects have many, and large ones.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Annotations {
    /// Of an EndpointSlice: what it was written for happened then (RFC 3339).
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    last_change: Option<String>,
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

    /// When it was created, in seconds since 1970.
    fn created(&self, passed: &mut PassedOver) -> Option<i64> {
        let written = self.creation_timestamp.as_ref()?;
        let parsed: Result<jiff::Timestamp, _> = written.parse();
        let checked = parsed
            .map_err(|_| format!("{written:?} is no time; something like 2024-05-01T12:00:00Z is wanted"));
        passed
            .keep("metadata.creationTimestamp", checked)
            .map(jiff::Timestamp::as_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The only object in `text`, and what of it is passed over.
    fn parsed(text: &str) -> (Object, String) {
        let Document::Objects { objects, passed_over } = parse(text).unwrap() else {
            panic!("nothing of ours: {text}")
        };
        let [object] = objects.try_into().unwrap();
        (object, passed_over.unwrap_or_default())
    }

    fn service(spec: &str, status: &str) -> (crate::state::objects::Service, String) {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {spec}\nstatus: {status}\n"
        );
        match parsed(&text) {
            (Object::Service(service), told) => (service, told),
            other => panic!("{other:?}"),
        }
    }

    /// S3 S4 D5
    #[test]
    fn an_address_that_is_nobodys_in_particular_is_never_a_services() {
        let bad = [
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "169.254.169.254",
            "::1",
            "::",
            "ff02::1",
            "fe80::1",
            "::ffff:10.0.0.1",
            "10.96.0",
        ];
        for address in bad {
            let spec = format!(
                "{{clusterIPs: [10.96.0.1, '{address}'], externalIPs: ['{address}', 192.0.2.1], ports: [{{port: 80}}]}}"
            );
            let status = format!("{{loadBalancer: {{ingress: [{{ip: '{address}'}}, {{ip: 192.0.2.2}}]}}}}");
            let (service, told) = service(&spec, &status);
            let left = [
                &service.cluster_ips,
                &service.external_ips,
                &service.load_balancer_ips,
            ]
            .map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
            assert_eq!(left, ["10.96.0.1", "192.0.2.1", "192.0.2.2"], "beside {address}");
            for field in [
                "Service shop/web: served without",
                "spec.clusterIPs[1]: ",
                "spec.externalIPs[0]: ",
                "status.loadBalancer.ingress[0].ip: ",
            ] {
                assert!(told.contains(field), "{address}: {told}");
            }
        }
    }

    /// D5
    #[test]
    fn a_ports_nonsense_is_told_and_the_other_ports_are_served() {
        let ports = "[{name: a, port: 80}, {name: b, port: 0}, {name: c, port: 70000}, {name: d, port: 81, protocol: TPC},
                 {name: a, port: 82}, {name: f, port: 80}, {name: g, port: 80, protocol: UDP, nodePort: -1},
                 {name: h, port: 83, targetPort: 65536}, {name: i, port: 84}]";
        let (service, told) = service(&format!("{{type: NodePort, ports: {ports}}}"), "{}");
        let names: Vec<_> = service.ports.iter().map(|port| port.name.as_str()).collect();
        assert_eq!(names, ["a", "i"]);
        assert_eq!(
            told,
            "Service shop/web: served without spec.ports[1].port: 0 is not a port; 1 to 65535 is wanted; \
             spec.ports[2].port: 70000 is not a port; 1 to 65535 is wanted; \
             spec.ports[3].protocol: \"TPC\" is unknown; did you mean \"TCP\"?; and 4 more like it"
        );
    }

    /// S3 D5
    #[test]
    fn source_ranges_nobody_understands_let_nobody_in() {
        let (service, told) = service("{ports: [{port: 80}], loadBalancerSourceRanges: [office]}", "{}");
        assert_eq!(service.source_ranges, Some(Vec::new()));
        assert!(
            told.contains("spec.loadBalancerSourceRanges[0]: \"office\""),
            "{told}"
        );
    }

    /// D5 S14
    #[test]
    fn an_endpoints_nonsense_is_told_and_the_other_endpoints_are_served() {
        let (object, told) = parsed(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}\n\
             endpoints: [{addresses: [10.244.0.1]}, {addresses: ['fd00::1']}, {addresses: [127.0.0.1]}, {addresses: []}]\n\
             ports: [{name: a, port: 80}, {name: b, port: 0}, {name: c}]\n",
        );
        let Object::EndpointSlice(slice) = object else {
            panic!()
        };
        assert_eq!(slice.endpoints.len(), 1);
        assert_eq!(slice.ports.len(), 1);
        for wanted in [
            "EndpointSlice default/web-1",
            "endpoints[1].addresses[0]: fd00::1 is not of addressType IPv4",
            "endpoints[2].addresses[0]: 127.0.0.1 is a loopback address",
            "ports[1].port: 0",
        ] {
            assert!(told.contains(wanted), "{told:?} lacks {wanted:?}");
        }
    }

    /// D5
    #[test]
    fn what_says_how_an_object_is_meant_is_not_guessed_at() {
        let refused = |spec: &str, wanted: &str| {
            let text = format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {spec}\n"
            );
            let error = parse(&text)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default();
            assert!(
                error.contains("Service shop/web") && error.contains(wanted),
                "{spec}: {error}"
            );
        };
        refused(
            "{type: NodePrt, ports: [{port: 80}]}",
            "did you mean \"NodePort\"?",
        );
        refused(
            "{internalTrafficPolicy: local, ports: [{port: 80}]}",
            "internalTrafficPolicy",
        );
        refused(
            "{sessionAffinity: clientIP, ports: [{port: 80}]}",
            "did you mean \"ClientIP\"?",
        );
        refused("{ports: []}", "spec.ports: is empty");
        refused("{ports: [{port: 0}]}", "spec.ports[0].port: 0 is not a port");
    }

    /// D5
    #[test]
    fn what_an_api_server_sends_may_have_keys_of_a_later_kubernetes() {
        let sent = serde_json::json!({
            "metadata": {"name": "web-x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"},
                         "managedFields": [{"manager": "m"}]},
            "addressType": "IPv4",
            "shards": 3,
            "endpoints": [{"addresses": ["10.244.1.5"]}, {"addresses": ["10.244.1"]}],
            "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        });
        let checked = check_sent(Kind::EndpointSlice, sent).unwrap();
        let Some(Object::EndpointSlice(slice)) = checked.object else {
            panic!("{checked:?}")
        };
        assert_eq!(slice.name.to_string(), "shop/web-x");
        assert_eq!(slice.endpoints.len(), 1);
        let told = checked.passed_over.unwrap();
        assert!(
            told.starts_with("EndpointSlice shop/web-x: served without endpoints[1].addresses[0]: "),
            "{told}"
        );

        let wrong = serde_json::json!({"metadata": {"name": "n1"}, "spec": {"podCIDRs": "10.244.1.0/24"}});
        let error = check_sent(Kind::Node, wrong).unwrap_err();
        assert!(
            error.starts_with("Node n1: ") && error.contains("expected a sequence"),
            "{error}"
        );
    }

    /// S2 D1
    #[test]
    fn null_is_nothing() {
        let sent = serde_json::json!({
            "metadata": {"name": "web-x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "endpoints": null, "ports": null,
        });
        let checked = check_sent(Kind::EndpointSlice, sent).unwrap();
        let Some(Object::EndpointSlice(slice)) = checked.object else {
            panic!("{checked:?}")
        };
        assert!(slice.endpoints.is_empty() && slice.ports.is_empty());
        let (written, told) = parsed(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}\n\
             addressType: IPv4\nendpoints:\nports: null\n",
        );
        assert_eq!((written, told), (Object::EndpointSlice(slice), String::new()));
        let (service, told) = service("{ports: [{port: 80}], externalIPs: null, selector: ~}", "null");
        assert!(service.external_ips.is_empty() && told.is_empty());
    }

    /// D5
    #[test]
    fn names_are_as_long_as_kubernetes_has_them() {
        let named = |length| {
            let name = "a".repeat(length);
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n"
            )
        };
        assert!(parse(&named(253)).is_ok());
        assert!(parse(&named(254)).is_err());
    }
}
