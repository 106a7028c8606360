//! This node's Node, as it is stored. Pure.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

/// The Node as it is written: an operator's labels stay, and so does what was there of other addresses.
pub fn node_object(existing: Option<Value>, name: &str, cidrs: &[IpNetwork], addresses: &[IpAddr]) -> Value {
    let mut object = existing.filter(Value::is_object).unwrap_or_else(|| {
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        json!({"metadata": {"creationTimestamp": now, "labels": {"kubernetes.io/hostname": name}}})
    });
    // Somebody may have written anything there.
    for part in ["metadata", "spec", "status"] {
        if !object[part].is_object() {
            object[part] = json!({});
        }
    }
    object["apiVersion"] = json!("v1");
    object["kind"] = json!("Node");
    object["metadata"]["name"] = json!(name);
    object["spec"]["podCIDR"] = json!(cidrs.first());
    object["spec"]["podCIDRs"] = json!(cidrs);
    let others = object["status"]["addresses"].as_array().into_iter().flatten();
    let others: Vec<Value> = others
        .filter(|other| other["type"] != "InternalIP")
        .cloned()
        .collect();
    let own = addresses
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}));
    object["status"]["addresses"] = own.chain(others).collect();
    object
}

/// The pod CIDRs that a Node, as it is stored, says it has.
pub fn pod_cidrs(node: &[u8]) -> Vec<IpNetwork> {
    let node: Value = serde_json::from_slice(node).unwrap_or_default();
    let written = node["spec"]["podCIDRs"].as_array().into_iter().flatten();
    written.filter_map(|cidr| cidr.as_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D3
    #[test]
    fn a_node_keeps_what_an_operator_wrote_and_nonsense_is_written_over() {
        let cidrs = ["10.244.1.0/24".parse().unwrap()];
        let addresses = ["192.0.2.7".parse().unwrap()];
        let existing = json!({
            "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}},
            "spec": "nonsense",
            "status": {"addresses": [
                {"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "192.0.2.1"}]},
        });
        let object = node_object(Some(existing), "n1", &cidrs, &addresses);
        assert_eq!(object["metadata"]["labels"]["topology.kubernetes.io/zone"], "a");
        assert_eq!(object["spec"]["podCIDRs"], json!(["10.244.1.0/24"]));
        let shown = object["status"]["addresses"].to_string();
        assert!(
            shown.contains("192.0.2.7") && shown.contains("Hostname") && !shown.contains("192.0.2.1\""),
            "{shown}"
        );
        assert_eq!(pod_cidrs(object.to_string().as_bytes()), cidrs);
        let again = node_object(Some(object.clone()), "n1", &cidrs, &addresses);
        assert_eq!(again, object, "nothing is written twice");
    }
}
