//! What `sluicectl` shows is what the kernel does, not what the daemon believes it told it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use serde_json::Value;
use sluice_lab::{Lab, Node, Options, wait_until};
use sluice_tests::{PATIENCE, addresses, kubia_pods, manifest, service_entries, wait_for_answers};

const NAMES: [&str; 2] = ["kubia-a", "kubia-b"];
const NODE_PORT: u16 = 30123;

fn lab() -> Lab {
    let lab = Lab::up(Options::default()).unwrap();
    kubia_pods(&lab, &[("node1", "kubia-a"), ("node2", "kubia-b")]).unwrap();
    lab.apply(manifest("kubia-nodeport.yaml")).unwrap();
    lab
}

fn connections(lab: &Lab, node: &str, client: &str) -> Vec<Value> {
    let all = lab.ctl_json(node, &["conntrack"]).unwrap();
    let from_client = |entry: &&Value| entry["client"].to_string().contains(client);
    all.as_array()
        .unwrap()
        .iter()
        .filter(from_client)
        .cloned()
        .collect()
}

/// O2: connections of the live table, with their Services' names.
#[test]
fn connections_from_outside_are_shown_with_the_name_of_their_service() {
    let lab = lab();
    for (node, client) in addresses(&lab, "node3")
        .unwrap()
        .iter()
        .zip(addresses(&lab, "client").unwrap())
    {
        wait_for_answers(&lab.client(), node, NODE_PORT, &NAMES).unwrap();
        let all = connections(&lab, "node3", &client);
        assert!(all.len() >= NAMES.len(), "{all:?}");
        for entry in &all {
            assert_eq!(entry["service"], "default/kubia-nodeport/TCP", "{entry}");
            assert!(entry["frontend"].to_string().contains(node.as_str()), "{entry}");
            // node3 runs no endpoint: another node's sees node3.
            assert!(entry["standIn"].is_string(), "{entry}");
        }
        assert_eq!(connections(&lab, "node1", &client), [Value::Null; 0]);
    }
    let text = lab.node("node3").run(&["sluicectl", "conntrack"]).unwrap();
    assert!(text.starts_with("SERVICE PORT"), "{text}");
    assert!(text.contains("default/kubia-nodeport/TCP"), "{text}");
}

/// O2: Services of the live tables.
#[test]
fn a_service_that_the_kernel_lost_is_shown_as_such() {
    let lab = lab();
    let node = lab.node("node1");
    wait_for_answers(&node, "127.0.0.1", NODE_PORT, &NAMES).unwrap();
    let failures = || -> Vec<String> {
        service_entries(&lab, "node1", "kubia-nodeport")
            .unwrap()
            .iter()
            .map(|entry| entry["failure"].as_str().unwrap().to_owned())
            .collect()
    };
    assert!(failures().iter().all(String::is_empty), "{:?}", failures());
    delete_frontend(&node, [127, 0, 0, 1], NODE_PORT);
    let lost = format!("the kernel has no entry for 127.0.0.1:{NODE_PORT}");
    wait_until("the loss is shown", PATIENCE, || Ok(failures().contains(&lost))).unwrap();
}

/// O2: beside what `ip` and `bridge` say of the same.
#[test]
fn the_ways_to_pods_are_shown_as_the_kernel_has_them() {
    let lab = Lab::up(Options {
        subnets: 2,
        ..Options::default()
    })
    .unwrap();
    let node = lab.node("node1");
    let routes = lab.ctl_json("node1", &["routes"]).unwrap();
    let mut paths = BTreeMap::<&str, usize>::new();
    for route in routes.as_array().unwrap() {
        assert_eq!(route["failure"], "", "{route}");
        let field = |name: &str| route[name].as_str().unwrap_or_default();
        *paths.entry(field("path")).or_default() += 1;
        let cidr = field("podCIDR");
        let family = if cidr.contains(':') { "-6" } else { "-4" };
        let held = node.run(&["ip", family, "route", "show", cidr]).unwrap();
        let wanted = match field("path") {
            "this node" => "unreachable".to_owned(),
            _ => format!("via {} dev {}", field("via"), field("device")),
        };
        assert!(held.contains(&wanted), "{wanted}: {held}");
        if field("path") == "vxlan" {
            let entries = node
                .run(&["bridge", "fdb", "show", "dev", field("device")])
                .unwrap();
            let wanted = format!("dst {} ", field("tunnelEnd"));
            assert!(entries.contains(&wanted), "{wanted}: {entries}");
        }
    }
    assert_eq!(
        paths,
        BTreeMap::from([("this node", 2), ("direct", 2), ("vxlan", 2)])
    );
    let text = node.run(&["sluicectl", "routes"]).unwrap();
    assert!(text.starts_with("POD CIDR"), "{text}");
    assert_eq!(text.lines().count(), 1 + 6, "{text}");
}

/// O2: and a daemon that is given it goes by the same.
#[test]
fn the_configuration_that_is_in_force_is_shown_with_its_defaults() {
    let lab = lab();
    let node = lab.node("node1");
    let config = lab.ctl_json("node1", &["config"]).unwrap();
    assert_eq!(config["nodeName"], "node1");
    assert_eq!(config["network"]["vxlan"]["port"], 8472);
    let script = "sluicectl config > /run/config.yaml && sluiced --config /run/config.yaml --check-config";
    let checked = node.sh(script).unwrap();
    assert!(checked.ends_with("good, for node node1\n"), "{checked}");
}

/// Deletes a TCP frontend from the pinned table, behind the daemon's back.
fn delete_frontend(node: &Node<'_>, address: [u8; 4], port: u16) {
    let mut key = vec![0_u8; 10];
    key.extend([0xff, 0xff]);
    key.extend(address);
    key.extend(port.to_be_bytes());
    key.extend([6, 0]);
    let bytes: Vec<String> = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let pin = "/sys/fs/bpf/sluice/maps/frontends_v1";
    let script = format!("bpftool map delete pinned {pin} key hex {}", bytes.join(" "));
    node.sh(&script).unwrap();
}
