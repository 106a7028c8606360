//! CHECK against pods that somebody meddled with.

use std::path::Path;

use serde_json::json;

use crate::node::{Namespace, Node, device_of};
use crate::wiring::DUAL;

// C7
#[test]
fn check_names_what_differs() {
    let node = Node::new(&DUAL);
    let breakages = [
        (
            "host",
            "neigh del 10.244.1.1 dev DEVICE",
            "no neighbour 10.244.1.1",
        ),
        (
            "host",
            "neigh replace fd00:244:1::2 lladdr 02:00:00:00:00:01 dev DEVICE nud reachable",
            "not permanent",
        ),
        ("host", "route del 10.244.1.3/32", "lacks its route to 10.244.1.3"),
        (
            "host",
            "-6 route del fd00:244:1::4/128 dev DEVICE",
            "lacks its route to fd00:244:1::4",
        ),
        (
            "host",
            "link set DEVICE mtu 1400",
            "has the MTU 1400 and not 1450",
        ),
        ("host", "link set DEVICE alias other", "serves \"other\""),
        ("host", "link set DEVICE down", "is switched off"),
        (
            "pod",
            "route del default",
            "lacks the default route via 169.254.1.1",
        ),
        (
            "pod",
            "-6 route del default",
            "lacks the default route via fe80::1",
        ),
        (
            "pod",
            "addr del 10.244.1.10/32 dev eth0",
            "lacks the address 10.244.1.10",
        ),
        (
            "pod",
            "-6 addr del fd00:244:1::b/128 dev eth0",
            "lacks the address fd00:244:1::b",
        ),
        (
            "pod",
            "neigh del 169.254.1.1 dev eth0",
            "no neighbour 169.254.1.1",
        ),
        (
            "pod",
            "link set eth0 address 02:00:00:00:00:07",
            "eth0 has the MAC 02:00:00:00:00:07",
        ),
        ("pod", "link del eth0", "the device eth0 is gone"),
    ];
    for (position, (place, command, says)) in breakages.into_iter().enumerate() {
        let (id, pod) = (format!("pod{position}"), Namespace::new());
        let result = node.add(&id, &pod).succeeded();
        assert!(node.check(&id, &pod, &result).success);
        let command = command.replace("DEVICE", &device_of(&id));
        let namespace = if place == "host" { &node.namespace } else { &pod };
        namespace.ip(&command);
        let answer = node.check(&id, &pod, &result);
        assert_eq!(answer.code(), 102, "{command}");
        assert!(answer.text().contains(says), "{command}: {}", answer.text());
    }
    let pod = Namespace::new();
    let result = node.add("last", &pod).succeeded();
    let attachment = sluice_ipam::Attachment::new("last", "eth0").unwrap();
    node.store().free(&attachment).unwrap();
    let answer = node.check("last", &pod, &result);
    assert!(
        answer.text().contains("holds no address in the store"),
        "{}",
        answer.text()
    );
    let gone = node.call(
        "CHECK",
        "last",
        Path::new("/none"),
        &node.with(json!({ "prevResult": result })),
    );
    assert_eq!(gone.code(), 3);
    assert_eq!(
        node.call("CHECK", "last", &pod.path(), &node.with(json!({})))
            .code(),
        7
    );
}
