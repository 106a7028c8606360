//! Host ports as the plugin leaves them for the daemon.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use sluice_ipam::Attachment;

use crate::node::{Namespace, Node, addresses};
use crate::wiring::DUAL;

fn port(host_ip: &str, host_port: u16, protocol: &str) -> Value {
    json!({ "hostIP": host_ip, "hostPort": host_port, "containerPort": 80, "protocol": protocol })
}

fn asking(ports: &[Value]) -> Value {
    json!({ "portMappings": ports })
}

fn attachment(id: &str) -> Attachment {
    Attachment::new(id, "eth0").unwrap()
}

/// A node that has 192.0.2.1 and fd00:99::1 besides loopback.
fn node() -> Node {
    let node = Node::new(&DUAL);
    node.namespace.ip("link set lo up");
    node.namespace.ip("addr add 192.0.2.1/32 dev lo");
    node.namespace.ip("-6 addr add fd00:99::1/128 dev lo");
    // The kernel makes an IPv6 address's local route in a worker of its own.
    while !node.namespace.ip("-6 route get fd00:99::1").starts_with("local") {
        std::thread::yield_now();
    }
    node
}

/// C10 C6 C7
#[test]
fn host_ports_are_written_down_checked_and_forgotten() {
    let node = node();
    let pod = Namespace::new();
    let wish = asking(&[port("", 8080, "tcp"), port("fd00:99::1", 53, "UDP")]);
    let result = node.add_with("a", &pod, &wish).succeeded();
    let record = node.host_ports().get(&attachment("a")).unwrap().unwrap();
    let given: Vec<String> = record.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(given, addresses(&result));
    let shown: Vec<String> = record.mappings.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["*:8080/tcp", "[fd00:99::1]:53/udp"]);

    assert!(node.check_with("a", &pod, &wish, &result).success);
    node.host_ports().remove(&attachment("a")).unwrap();
    let answer = node.check_with("a", &pod, &wish, &result);
    assert_eq!(answer.code(), 102);
    assert!(
        answer.text().contains("the host port *:8080/tcp"),
        "{}",
        answer.text()
    );

    // Gone already is as good, and so is a directory that somebody made into something else.
    node.del("a").succeeded();
    node.add_with("a", &pod, &wish).succeeded();
    node.del("a").succeeded();
    node.del("a").succeeded();
    node.assert_empty();
    fs::remove_dir_all(node.host_ports().directory()).unwrap();
    fs::write(node.host_ports().directory(), "").unwrap();
    node.add("a", &pod).succeeded();
    node.del("a").succeeded();
    fs::remove_file(node.host_ports().directory()).unwrap();

    // The same through the args, for runtimes without capabilities.
    let config = node.with(json!({ "args": { "cni": wish } }));
    node.call("ADD", "b", &pod.path(), &config).succeeded();
    assert!(node.host_ports().get(&attachment("b")).unwrap().is_some());
    node.del("b").succeeded();
    node.assert_empty();
}

/// C10 C5 S25
#[test]
fn two_pods_share_a_port_on_different_addresses_or_protocols_alone() {
    let node = node();
    let (a, b, c) = (Namespace::new(), Namespace::new(), Namespace::new());
    node.add_with("a", &a, &asking(&[port("192.0.2.1", 8080, "tcp")]))
        .succeeded();
    let other = asking(&[port("127.0.0.1", 8080, "tcp"), port("192.0.2.1", 8080, "udp")]);
    node.add_with("b", &b, &other).succeeded();
    let held = node.store().list().unwrap().len();
    for (wish, says) in [
        (
            port("192.0.2.1", 8080, "tcp"),
            "192.0.2.1:8080/tcp was asked for by c/eth0 but a/eth0 has",
        ),
        (
            port("0.0.0.0", 8080, "udp"),
            "0.0.0.0:8080/udp was asked for by c/eth0 but b/eth0 has",
        ),
        (port("", 8080, "tcp"), "*:8080/tcp was asked for by c/eth0 but"),
    ] {
        let answer = node.add_with("c", &c, &asking(&[wish]));
        assert_eq!(answer.code(), 103);
        assert!(answer.text().contains(says), "{}", answer.text());
        assert_eq!(
            node.store().list().unwrap().len(),
            held,
            "its addresses are free again"
        );
        assert_eq!(node.devices().len(), 2, "its devices are gone");
        assert_eq!(node.host_ports().list().unwrap().len(), 2);
    }
    // What the holder gave up is to be had.
    node.del("a").succeeded();
    node.add_with("c", &c, &asking(&[port("192.0.2.1", 8080, "tcp")]))
        .succeeded();
    node.add_with("a", &a, &asking(&[port("::", 8080, "tcp")]))
        .succeeded();
}

/// C10
#[test]
fn a_host_port_opens_on_addresses_of_the_node_and_families_of_the_pod_alone() {
    let node = node();
    let pod = Namespace::new();
    for (wish, says) in [
        (
            port("192.0.2.2", 80, "tcp"),
            "192.0.2.2 is no address of this node",
        ),
        (
            port("fd00:99::2", 80, "tcp"),
            "fd00:99::2 is no address of this node",
        ),
        (port("node", 80, "tcp"), "hostIP must be an IP address"),
    ] {
        let answer = node.add_with("a", &pod, &asking(&[wish]));
        assert_eq!(answer.code(), 7);
        assert!(answer.text().contains(says), "{}", answer.text());
    }
    node.write(&node.file(&DUAL[..1]));
    let answer = node.add_with("a", &pod, &asking(&[port("fd00:99::1", 80, "tcp")]));
    assert!(
        answer.text().contains("no address of that family"),
        "{}",
        answer.text()
    );
    node.assert_empty();
    node.add_with("a", &pod, &asking(&[port("127.0.0.1", 80, "sctp")]))
        .succeeded();
}

/// C8 C9
#[test]
fn what_a_killed_call_left_is_nobodys_and_is_collected() {
    let node = node();
    let (a, b) = (Namespace::new(), Namespace::new());
    node.add_with("a", &a, &asking(&[port("", 80, "tcp")]))
        .succeeded();
    // As a DEL leaves it that was killed between its last steps; an ADD then takes the port over.
    let record = node.host_ports().get(&attachment("a")).unwrap().unwrap();
    node.del("a").succeeded();
    let store = node.store();
    fs::write(
        node.host_ports().directory().join("a@eth0"),
        serde_json::to_vec(&record).unwrap(),
    )
    .unwrap();
    node.add_with("b", &b, &asking(&[port("", 80, "tcp")]))
        .succeeded();
    let holders = |node: &Node| -> Vec<String> {
        let list = node.host_ports().list().unwrap();
        list.iter()
            .map(|(attachment, _)| attachment.to_string())
            .collect()
    };
    assert_eq!(holders(&node), ["b/eth0"]);

    // Cut short, as no rename leaves it: not understood, nobody's, and gone with the next collection.
    fs::write(node.host_ports().directory().join("lost@eth0"), "{\"addr").unwrap();
    node.gc(&["b"]).succeeded();
    assert_eq!(holders(&node), ["b/eth0"]);
    node.gc(&[]).succeeded();
    node.assert_empty();

    // The same by the collection of the dead: of pods without an allocation, at any age.
    node.add_with("b", &b, &asking(&[port("", 80, "tcp")]))
        .succeeded();
    store.free(&attachment("b")).unwrap();
    let done = node
        .namespace
        .run(|| sluice_cni::collect::collect_dead(Path::new(&node.ipam()), sluice_ipam::DEFAULT_REST));
    assert!(
        done.unwrap()
            .iter()
            .any(|what| what.contains("b/eth0: removed its host ports"))
    );
    assert_eq!(holders(&node), Vec::<String>::new());
}

/// C9
#[test]
fn of_many_at_once_one_gets_the_port() {
    let node = node();
    let pods: Vec<_> = (0..16).map(|_| Namespace::new()).collect();
    let config = node.with(json!({ "runtimeConfig": asking(&[port("", 80, "tcp")]) }));
    let calls: Vec<_> = pods
        .iter()
        .enumerate()
        .map(|(number, pod)| node.start("ADD", &format!("p{number}"), &pod.path(), &config))
        .collect();
    let answers: Vec<_> = calls.into_iter().map(crate::node::finish).collect();
    assert_eq!(answers.iter().filter(|answer| answer.success).count(), 1);
    for refused in answers.iter().filter(|answer| !answer.success) {
        assert_eq!(refused.code(), 103, "{}", refused.text());
    }
    assert_eq!(node.devices().len(), 1);
    assert_eq!(node.store().list().unwrap().len(), 1);
}
