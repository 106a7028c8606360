//! Objects of the datastore as tables.

use serde_json::Value;
use sluice_daemon::datastore::etcd::Stored;

use crate::tables::table;

/// One row per object.
pub fn objects(kind: Stored, objects: &[Value]) -> String {
    let all = objects.iter();
    match kind {
        Stored::Node => table(
            ["NAME", "ADDRESSES", "POD CIDRS"],
            all.map(|node| {
                [
                    text(node, "/metadata/name"),
                    list(node, "/status/addresses", "/address"),
                    list(node, "/spec/podCIDRs", ""),
                ]
            }),
        ),
        Stored::Service => table(
            ["NAMESPACE", "NAME", "TYPE", "CLUSTER IPS", "PORTS"],
            all.map(|service| {
                let [namespace, name] = names(service);
                let addresses = match list(service, "/spec/clusterIPs", "") {
                    none if none.is_empty() => text(service, "/spec/clusterIP"),
                    several => several,
                };
                let kind = text(service, "/spec/type");
                [
                    namespace,
                    name,
                    kind,
                    addresses,
                    list(service, "/spec/ports", "/port"),
                ]
            }),
        ),
        Stored::EndpointSlice => table(
            ["NAMESPACE", "NAME", "ENDPOINTS", "PORTS"],
            all.map(|slice| {
                let [namespace, name] = names(slice);
                let endpoints = list(slice, "/endpoints", "/addresses/0");
                [namespace, name, endpoints, list(slice, "/ports", "/port")]
            }),
        ),
        Stored::Endpoints => table(
            ["NAMESPACE", "NAME", "ENDPOINTS"],
            all.map(|endpoints| {
                let [namespace, name] = names(endpoints);
                let subsets = endpoints["subsets"].as_array().into_iter().flatten();
                let addresses: Vec<_> = subsets.map(|subset| list(subset, "/addresses", "/ip")).collect();
                [namespace, name, addresses.join(",")]
            }),
        ),
        Stored::Pod => table(
            ["NAMESPACE", "NAME", "NODE", "ADDRESSES"],
            all.map(|pod| {
                let [namespace, name] = names(pod);
                let node = text(pod, "/spec/nodeName");
                [namespace, name, node, list(pod, "/status/podIPs", "/ip")]
            }),
        ),
    }
}

fn names(object: &Value) -> [String; 2] {
    ["/metadata/namespace", "/metadata/name"].map(|pointer| text(object, pointer))
}

/// What is there, as people write it; empty if nothing is.
fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

fn list(value: &Value, pointer: &str, of_each: &str) -> String {
    let elements = value
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let texts: Vec<_> = elements.map(|element| text(element, of_each)).collect();
    texts.join(",")
}
