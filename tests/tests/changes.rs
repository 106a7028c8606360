//! A running cluster whose network changes under its pods: MTU, backend, addresses, pod CIDRs, a thousand nodes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write;

use sluice_lab::pods::Pod;
use sluice_lab::{Backend, Lab, Node, Options, wait_until};
use sluice_tests::{PATIENCE, everybody_reaches_everybody, problems};

fn two_nodes(backend: Backend) -> (Lab, Vec<Pod>) {
    let lab = Lab::up(Options {
        nodes: 2,
        backend,
        ..Options::default()
    })
    .unwrap();
    let pods = [("node1", "a"), ("node2", "b")];
    let pods = pods.map(|(node, name)| lab.pod_add(node, name, &[], &[]).unwrap());
    (lab, pods.into())
}

fn node_object(name: &str, addresses: &[&str], pod_cidrs: &[&str]) -> String {
    let mut text = format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec:\n  podCIDRs:\n");
    pod_cidrs
        .iter()
        .for_each(|cidr| writeln!(text, "  - {cidr}").unwrap());
    text.push_str("status:\n  addresses:\n");
    addresses
        .iter()
        .for_each(|address| writeln!(text, "  - {{type: InternalIP, address: '{address}'}}").unwrap());
    text
}

/// Each pod's own MTU and that of its end on the node.
fn mtus(lab: &Lab, pod: &Pod) -> [String; 2] {
    let mtu = |place: &Node<'_>, device: &str| {
        // Not below /sys, which shows the node's devices to pods too.
        let path = format!("/proc/sys/net/ipv6/conf/{device}/mtu");
        place.run(&["cat", &path]).unwrap().trim().to_owned()
    };
    let node = lab.node(&pod.node);
    // By the route, as a packet would find it: `ADDRESS dev DEVICE src …`.
    let route = node
        .run(&["ip", "-o", "route", "get", &pod.addresses[0].to_string()])
        .unwrap();
    let mut words = route.split(' ').skip_while(|word| *word != "dev");
    let device = words.nth(1).unwrap();
    [mtu(&lab.pod(&pod.name).unwrap(), "eth0"), mtu(&node, device)]
}

/// N5
#[test]
fn the_uplinks_mtu_is_followed_running_pods_included() {
    let (lab, pods) = two_nodes(Backend::Vxlan);
    // An IPv6 underlay costs 70 bytes: IPv6 40, UDP 8, VXLAN 8, Ethernet 14.
    for (uplink, wanted) in [("1500", "1430"), ("1400", "1330"), ("1480", "1410")] {
        for node in lab.nodes() {
            lab.node(&node)
                .run(&["ip", "link", "set", "eth0", "mtu", uplink])
                .unwrap();
        }
        wait_until("pods follow", PATIENCE, || {
            Ok(pods.iter().all(|pod| mtus(&lab, pod) == [wanted; 2]))
        })
        .unwrap();
        let place = lab.pod("a").unwrap();
        for (address, headers) in pods[1].addresses.iter().zip([28, 48]) {
            let (size, address) = (
                (wanted.parse::<u32>().unwrap() - headers).to_string(),
                address.to_string(),
            );
            place
                .run(&["ping", "-M", "do", "-c", "1", "-W", "2", "-s", &size, &address])
                .unwrap();
        }
        let newcomer = lab.pod_add("node1", &format!("n{wanted}"), &[], &[]).unwrap();
        assert_eq!(mtus(&lab, &newcomer), [wanted; 2]);
    }
}

/// N2
#[test]
fn the_backend_changes_under_running_pods() {
    let (lab, pods) = two_nodes(Backend::Direct);
    let ways = || -> anyhow::Result<Vec<String>> {
        let cidrs = &lab.host("node2")?.pod_cidrs;
        let family = |cidr: &str| if cidr.contains(':') { "-6" } else { "-4" };
        let way = |cidr: &String| {
            lab.node("node1")
                .run(&["ip", family(cidr), "route", "show", cidr])
        };
        cidrs.iter().map(way).collect()
    };
    for (from, to, device) in [
        ("direct", "vxlan", "dev sluice-vxlan"),
        ("vxlan", "auto", "dev eth0"),
        ("auto", "direct", "dev eth0"),
    ] {
        for node in lab.nodes() {
            let script = format!(
                "sed -i 's/backend: {from}/backend: {to}/' /etc/sluice/config.yaml && grep -q {to} /etc/sluice/config.yaml"
            );
            lab.node(&node).sh(&script).unwrap();
            lab.stop_sluiced(&node).unwrap();
            lab.start_sluiced(&node).unwrap();
        }
        wait_until("packets take the other way", PATIENCE, || {
            Ok(ways()?.iter().all(|way| way.contains(device)))
        })
        .unwrap();
        wait_until("pods reach each other", PATIENCE, || {
            everybody_reaches_everybody(&lab, &pods).map(|()| true)
        })
        .unwrap();
    }
    wait_until("what a backend no longer needs is gone", PATIENCE, || {
        let tunnels = lab
            .node("node1")
            .run(&["ip", "-o", "link", "show", "type", "vxlan"])?;
        Ok(tunnels.is_empty())
    })
    .unwrap();
    assert_eq!(problems(&lab, "node1").unwrap(), "[]");
}

/// N3
#[test]
fn a_node_moves_to_another_address() {
    for backend in [Backend::Vxlan, Backend::Direct] {
        let (lab, pods) = two_nodes(backend);
        let node = lab.node("node2");
        for command in [
            "ip addr del 172.30.0.12/24 dev eth0",
            "ip addr add 172.30.0.77/24 dev eth0",
            "ip addr add fd00:30::77/64 dev eth0 nodad",
            "ip addr del fd00:30::12/64 dev eth0",
            "ip route replace default via 172.30.0.1",
            "ip -6 route replace default via fd00:30::1",
        ] {
            node.run(&command.split(' ').collect::<Vec<_>>()).unwrap();
        }
        let cidrs: Vec<&str> = lab
            .host("node2")
            .unwrap()
            .pod_cidrs
            .iter()
            .map(String::as_str)
            .collect();
        lab.apply_text(&node_object("node2", &["172.30.0.77", "fd00:30::77"], &cidrs))
            .unwrap();
        wait_until("pods reach each other", PATIENCE, || {
            everybody_reaches_everybody(&lab, &pods).map(|()| true)
        })
        .unwrap();
    }
}

/// N3
#[test]
fn two_nodes_swap_their_pod_cidrs() {
    let lab = Lab::up(Options {
        nodes: 3,
        backend: Backend::Vxlan,
        ..Options::default()
    })
    .unwrap();
    let swapped = [
        node_object(
            "node2",
            &["172.30.0.12", "fd00:30::12"],
            &["10.244.3.0/24", "fd00:244:0:3::/64"],
        ),
        node_object(
            "node3",
            &["172.30.0.13", "fd00:30::13"],
            &["10.244.2.0/24", "fd00:244:0:2::/64"],
        ),
    ];
    lab.apply_text(&swapped.join("---\n")).unwrap();
    for node in ["node2", "node3"] {
        let third = if node == "node2" { "10.244.3." } else { "10.244.2." };
        wait_until("the node's own pools are swapped", PATIENCE, || {
            Ok(lab
                .node(node)
                .run(&["cat", "/run/sluice/node.json"])?
                .contains(third))
        })
        .unwrap();
    }
    let pods = [("node1", "a"), ("node2", "b"), ("node3", "c")]
        .map(|(node, name)| lab.pod_add(node, name, &[], &[]).unwrap());
    assert!(
        pods[1].addresses[0].to_string().starts_with("10.244.3."),
        "{pods:?}"
    );
    wait_until("pods reach each other", PATIENCE, || {
        everybody_reaches_everybody(&lab, &pods).map(|()| true)
    })
    .unwrap();
    assert_eq!(problems(&lab, "node1").unwrap(), "[]");
}

/// N10
#[test]
fn a_thousand_nodes_come_change_and_go() {
    let lab = Lab::up(Options {
        nodes: 1,
        backend: Backend::Vxlan,
        ..Options::default()
    })
    .unwrap();
    let name = |n: usize| format!("far-{n}");
    // Beside the lab's own numbers, in the network it gives its pods: /26 each.
    let cidr = |n: usize| format!("10.244.{}.{}/26", 2 + n / 4, n % 4 * 64);
    let object = |n: usize, address: &str| node_object(&name(n), &[address], &[&cidr(n)]);
    let address = |n: usize| format!("192.0.{}.{}", 2 + n / 250, n % 250 + 1);
    let all: Vec<String> = (0..1000).map(|n| object(n, &address(n))).collect();
    lab.apply_text(&all.join("---\n")).unwrap();
    let node = lab.node("node1");
    let count = |what: &str| node.sh(&format!("{what} | wc -l")).map(|n| n.trim().to_owned());
    let routes = "ip -4 route show proto 83 | grep sluice-vxlan";
    let fdb = "bridge fdb show dev sluice-vxlan | grep ' dst '";
    wait_until("all are known", PATIENCE, || {
        Ok([count(routes)?, count(fdb)?] == ["1000", "1000"])
    })
    .unwrap();
    lab.apply_text(&object(500, "198.51.100.7")).unwrap();
    wait_until("one moves", PATIENCE, || {
        Ok(count(&format!("{fdb} | grep -w 198.51.100.7"))? == "1")
    })
    .unwrap();
    assert_eq!([count(routes).unwrap(), count(fdb).unwrap()], ["1000", "1000"]);
    for n in 0..1000 {
        lab.delete_object("Node", &name(n)).unwrap();
    }
    wait_until("all are gone", PATIENCE, || {
        Ok([count(routes)?, count(fdb)?] == ["0", "0"])
    })
    .unwrap();
}
