//! What a pod can ask for.

use serde_json::json;

use crate::node::{Namespace, Node, addresses, finish};
use crate::wiring::{DUAL, talk};

// C10 I5
#[test]
fn addresses_and_a_mac_can_be_asked_for() {
    let node = Node::new(&DUAL);
    let (a, b, c, d) = (
        Namespace::new(),
        Namespace::new(),
        Namespace::new(),
        Namespace::new(),
    );
    let config =
        node.with(json!({ "runtimeConfig": { "ips": ["10.244.1.77/24"], "mac": "C2:11:22:33:44:55" } }));
    let result = node.call("ADD", "a", &a.path(), &config).succeeded();
    assert_eq!(addresses(&result), ["10.244.1.77", "fd00:244:1::1"]);
    assert_eq!(result["interfaces"][1]["mac"], "c2:11:22:33:44:55");
    assert!(a.ip("link show eth0").contains("c2:11:22:33:44:55"));
    assert!(node.check("a", &a, &result).success);

    let taken = node.call("ADD", "b", &b.path(), &config);
    assert_eq!(taken.code(), 103);
    assert!(taken.text().contains("a/eth0 holds it"), "{}", taken.text());
    let config =
        node.with(json!({ "args": { "cni": { "ips": ["fd00:244:1::99"], "mac": "c2:00:00:00:00:01" } } }));
    let result = node.call("ADD", "b", &b.path(), &config).succeeded();
    assert_eq!(addresses(&result), ["10.244.1.1", "fd00:244:1::99"]);
    talk(&a, &b, "fd00:244:1::99");

    let annotations = json!({ "sluice/ips": "10.244.1.50, fd00:244:1::50", "other": "x" });
    let config = node.with(json!({ "runtimeConfig": { "io.kubernetes.cri.pod-annotations": annotations } }));
    let result = node.call("ADD", "c", &c.path(), &config).succeeded();
    assert_eq!(addresses(&result), ["10.244.1.50", "fd00:244:1::50"]);

    for (ips, code) in [
        (json!(["10.244.2.1"]), 7),
        (json!(["10.244.1.0"]), 7),
        (json!(["10.244.1.255"]), 7),
        (json!(["10.244.1.60", "10.244.1.61"]), 7),
        (json!(["x"]), 7),
        (json!([5]), 7),
        (json!("10.244.1.60"), 7),
    ] {
        let answer = node.call(
            "ADD",
            "d",
            &d.path(),
            &node.with(json!({ "runtimeConfig": { "ips": ips } })),
        );
        assert_eq!(answer.code(), code, "{}", answer.text());
    }
    assert_eq!(node.devices().len(), 3);
}

/// I5
#[test]
fn reserved_addresses_are_not_to_be_had() {
    let node = Node::new(&DUAL);
    let mut file = node.file(&DUAL);
    file.reserved = vec![
        "10.244.1.0/25".parse().unwrap(),
        "fd00:244:1::/65".parse().unwrap(),
    ];
    node.write(&file);
    let (a, b) = (Namespace::new(), Namespace::new());
    let result = node.add("a", &a).succeeded();
    assert_eq!(addresses(&result), ["10.244.1.128", "fd00:244:1:0:8000::"]);
    let config = node.with(json!({ "runtimeConfig": { "ips": ["10.244.1.7"] } }));
    let answer = node.call("ADD", "b", &b.path(), &config);
    assert_eq!(answer.code(), 103);
    assert!(
        answer
            .text()
            .contains("10.244.1.0/25 is reserved by ipam.reserved in the daemon's configuration"),
        "{}",
        answer.text()
    );
    // With all of a family reserved, none can be wired, and STATUS says so.
    file.reserved = vec!["10.244.0.0/16".parse().unwrap()];
    node.write(&file);
    assert_eq!(node.add("b", &b).code(), 101);
    let status = node.call("STATUS", "", std::path::Path::new(""), &node.with(json!({})));
    assert_eq!(status.code(), 50);
    assert!(
        status.text().contains("10.244.1.0/24 has 0 for pods"),
        "{}",
        status.text()
    );
}

// C10 C15 I5
#[test]
fn podman_asks_in_cni_args() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    let netns = pod.path();
    let ask = |verb: &str, arguments: &str, config: &str| {
        let variables = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "a"),
            ("CNI_NETNS", netns.to_str().unwrap()),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", arguments),
        ];
        finish(node.start_with(&variables, config.as_bytes()))
    };
    let plain = node.with(json!({}));
    let asked = "IgnoreUnknown=1;K8S_POD_NAME=web;MAC=c2:11:22:33:44:55;IP=10.244.1.99";
    let result = ask("ADD", asked, &plain).succeeded();
    assert_eq!(addresses(&result), ["10.244.1.99", "fd00:244:1::1"]);
    assert!(pod.ip("link show eth0").contains("c2:11:22:33:44:55"));
    assert!(node.check("a", &pod, &result).success);
    ask("DEL", asked, &plain).succeeded();

    let capability = node.with(json!({ "runtimeConfig": { "ips": ["10.244.1.98"] } }));
    let result = ask("ADD", asked, &capability).succeeded();
    assert_eq!(addresses(&result)[0], "10.244.1.98", "the newer way goes first");
    ask("DEL", asked, &plain).succeeded();
    let answer = ask("ADD", "IP=10.244.1.300", &plain);
    assert!(answer.text().contains("CNI_ARGS IP"), "{}", answer.text());
}
