//! Limits, as the kernel tells of them.

use std::path::Path;

use serde_json::{Value, json};
use sluice_cni::mac::rate_device;
use sluice_ipam::Attachment;

use crate::node::{Namespace, Node, device_of};
use crate::wiring::{DUAL, talk};

fn asking(limits: Value) -> Value {
    json!({ "bandwidth": limits })
}

fn rate_device_of(id: &str) -> String {
    rate_device(&Attachment::new(id, "eth0").unwrap())
}

/// What `tc` tells of a device's way out.
fn root(node: &Node, device: &str) -> String {
    node.namespace
        .tool("tc", &format!("qdisc show dev {device} root"))
}

/// C10 C6 C7
#[test]
fn both_directions_are_limited_on_the_host_checked_and_gone_with_the_pod() {
    let node = Node::new(&DUAL);
    let (a, b) = (Namespace::new(), Namespace::new());
    let wish = asking(json!({
        "ingressRate": 8_000_000, "ingressBurst": 1_600_000, "egressRate": 80_000_000, "egressBurst": 2_147_483_647,
    }));
    let result = node.add_with("a", &a, &wish).succeeded();
    let (device, rate_device) = (device_of("a"), rate_device_of("a"));
    let into = root(&node, &device);
    assert!(
        into.contains("qdisc tbf 1: root") && into.contains("rate 8Mbit burst 200000b"),
        "{into}"
    );
    let out = root(&node, &rate_device);
    assert!(
        out.contains("qdisc tbf 1: root") && out.contains("rate 80Mbit burst"),
        "{out}"
    );
    let filters = node
        .namespace
        .tool("tc", &format!("filter show dev {device} ingress"));
    assert!(
        filters.contains(&format!("Egress Redirect to device {rate_device}")),
        "{filters}"
    );
    assert!(
        !a.tool("tc", "qdisc show dev eth0").contains("tbf"),
        "nothing the pod could change"
    );
    let answer = node.check_with("a", &a, &wish, &result);
    assert!(answer.success, "{} {}", answer.stdout, answer.stderr);

    // Packets pass, by the device that limits them.
    node.add("b", &b).succeeded();
    for (from, to) in [(&a, &b), (&b, &a)] {
        for address in ["10.244.1.1", "10.244.1.2", "fd00:244:1::1", "fd00:244:1::2"] {
            if !to.ip("addr show eth0").contains(&format!("{address}/")) {
                continue;
            }
            talk(from, to, address);
        }
    }
    let sent = node
        .namespace
        .tool("tc", &format!("-s qdisc show dev {rate_device}"));
    assert!(!sent.contains("Sent 0 bytes"), "{sent}");

    let breakages = [
        (format!("qdisc del dev {device} root"), "has no limit"),
        (
            format!("qdisc replace dev {device} root tbf rate 9mbit burst 200000 limit 300000"),
            "1125000 bytes/s and not",
        ),
        (
            format!("qdisc replace dev {device} root tbf rate 8mbit burst 90000 limit 300000"),
            "has a burst of",
        ),
        (format!("filter del dev {device} ingress"), "is not led through"),
        (format!("qdisc del dev {rate_device} root"), "has no limit"),
    ];
    for (command, says) in breakages {
        node.namespace.tool("tc", &command);
        let answer = node.check_with("a", &a, &wish, &result);
        assert_eq!(answer.code(), 102, "{command}");
        assert!(answer.text().contains(says), "{command}: {}", answer.text());
    }
    node.namespace.ip(&format!("link del {rate_device}"));
    let answer = node.check_with("a", &a, &wish, &result);
    assert!(
        answer.text().contains(&format!("{rate_device}, which limits")),
        "{}",
        answer.text()
    );

    node.del("a").succeeded();
    let result = node.add_with("a", &a, &wish).succeeded();
    assert!(node.check_with("a", &a, &wish, &result).success);
    node.del("a").succeeded();
    node.del("b").succeeded();
    node.assert_empty();
}

/// C10 C5
#[test]
fn one_direction_alone_and_what_cannot_be() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    node.add_with(
        "in",
        &pod,
        &asking(json!({ "ingressRate": 40_000_000_000_000_u64 })),
    )
    .succeeded();
    // More than 32 bits of bytes per second.
    assert!(
        root(&node, &device_of("in")).contains("rate 40Tbit"),
        "{}",
        root(&node, &device_of("in"))
    );
    assert_eq!(node.namespace.ip("-o link show type ifb"), "");
    node.del("in").succeeded();
    let config = node.with(json!({ "args": { "cni": asking(json!({ "egressRate": 1000 })) } }));
    node.call("ADD", "out", &pod.path(), &config).succeeded();
    assert!(!root(&node, &device_of("out")).contains("tbf"));
    assert!(root(&node, &rate_device_of("out")).contains("rate 1Kbit"));
    node.del("out").succeeded();
    for (limits, says) in [
        (json!({ "ingressRate": 5 }), "must be 1000 to"),
        (
            json!({ "ingressRate": 8000, "ingressBurst": 8000 }),
            "is less than one packet of 1464 bytes",
        ),
        (
            json!({ "egressBurst": 8000 }),
            "needs runtimeConfig.bandwidth.egressRate",
        ),
    ] {
        let answer = node.add_with("bad", &pod, &asking(limits));
        assert_eq!(answer.code(), 7);
        assert!(answer.text().contains(says), "{}", answer.text());
    }
    node.assert_empty();
    // A limit of nothing is none, as Go writes it.
    node.add_with(
        "none",
        &pod,
        &asking(json!({ "ingressRate": 0, "egressRate": 0 })),
    )
    .succeeded();
}

/// C8 C9
#[test]
fn a_device_that_a_killed_call_left_is_replaced_or_collected() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    let wish = asking(json!({ "egressRate": 8_000_000 }));
    let left = rate_device_of("a");
    node.namespace.ip(&format!("link add name {left} type ifb"));
    node.add_with("a", &pod, &wish).succeeded();
    assert!(root(&node, &left).contains("tbf"));
    node.gc(&["a"]).succeeded();
    assert!(root(&node, &left).contains("tbf"), "the living keep theirs");
    node.gc(&[]).succeeded();
    node.assert_empty();
    node.namespace.ip(&format!("link add name {left} type ifb"));
    node.namespace.ip(&format!("link set {left} alias a/eth0"));
    node.namespace.ip("link add name sluicer00000000 type ifb");
    node.gc(&[]).succeeded();
    assert!(!node.namespace.ip("-o link show type ifb").contains(&left));
    assert!(
        node.namespace
            .ip("-o link show type ifb")
            .contains("sluicer00000000"),
        "one without our alias is left alone"
    );
}

/// C10 C11
#[test]
fn the_place_for_programs_is_made_where_the_conflist_says_so() {
    let node = Node::new(&DUAL);
    let clsact = |id: &str| {
        let shown = node
            .namespace
            .tool("tc", &format!("qdisc show dev {}", device_of(id)));
        shown.contains("qdisc clsact ffff:")
    };
    let pods = ["a", "b", "c"].map(|id| (id, Namespace::new()));
    let add = |(id, pod): &(&str, Namespace), config: Value| {
        node.call("ADD", id, &pod.path(), &node.with(config)).succeeded();
    };
    add(&pods[0], json!({}));
    assert!(
        !clsact("a"),
        "another plugin of the chain may want an ingress qdisc"
    );
    add(&pods[1], json!({ "clsact": true }));
    assert!(clsact("b"));
    // A limit hangs there as well.
    let limits = asking(json!({ "egressRate": 80_000_000, "egressBurst": 1_600_000 }));
    add(&pods[2], json!({ "clsact": true, "runtimeConfig": limits }));
    let filters = node
        .namespace
        .tool("tc", &format!("filter show dev {} ingress", device_of("c")));
    assert!(clsact("c") && filters.contains("Egress Redirect"), "{filters}");

    let other = Namespace::new();
    let wrong = node.with(json!({ "clsact": "yes" }));
    let answer = node.call("ADD", "d", &other.path(), &wrong);
    let told = r#"clsact \"yes\": must be true or false"#;
    assert!(
        !answer.success && answer.stdout.contains(told),
        "{}",
        answer.stdout
    );
    assert!(
        node.call("DEL", "d", Path::new(""), &wrong).success,
        "a DEL has no use for the key"
    );
}
