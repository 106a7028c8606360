//! Real runtimes: containerd with runc, by `ctr` and by CRI, and podman, with Sluice as their network.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::IpAddr;

use anyhow::Result;
use sluice_lab::{Lab, Node, Options, url};
use sluice_tests::containerd::Containerd;
use sluice_tests::oci_image::PORT;
use sluice_tests::podman::Podman;
use sluice_tests::{addresses, seen_as, serve_on_client};

/// Runs a busybox applet where the packets come from.
type Inside<'a> = dyn Fn(&[&str]) -> Result<String> + 'a;

fn lab() -> Lab {
    Lab::up(Options {
        nodes: 2,
        ..Options::default()
    })
    .unwrap()
}

fn get(inside: &Inside<'_>, host: &str, path: &str) -> String {
    let url = url(host, PORT, path);
    let answer = inside(&["timeout", "5", "wget", "-q", "-O", "-", &url]);
    answer
        .unwrap_or_else(|error| panic!("{url}: {error:#}"))
        .trim()
        .to_owned()
}

/// A container asks another at all its addresses, and is seen with its own.
fn reaches(inside: &Inside<'_>, own: &[IpAddr], name: &str, addresses: &[IpAddr]) {
    assert_eq!(own.len(), 2, "{own:?}: one address of each family");
    assert_eq!(addresses.len(), 2, "{addresses:?}: one address of each family");
    for address in addresses {
        assert_eq!(get(inside, &address.to_string(), ""), name, "at {address}");
        let seen = plain(&get(inside, &address.to_string(), "cgi-bin/source"));
        assert!(
            own.contains(&seen),
            "{name} at {address} saw {seen}, not one of {own:?}"
        );
    }
}

fn plain(reported: &str) -> IpAddr {
    sluice_lab::demo::checks::plain_address(reported).parse().unwrap()
}

/// What C4 says of a pod's end, seen from inside the container.
fn is_wired_as_any_pod(inside: &Inside<'_>, lab: &Lab, node: &str) -> Vec<IpAddr> {
    let shown = inside(&["ip", "-o", "address", "show", "dev", "eth0", "scope", "global"]).unwrap();
    let prefixes: Vec<&str> = shown
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3))
        .collect();
    let own: Vec<IpAddr> = prefixes
        .iter()
        .map(|prefix| {
            let (address, length) = prefix.split_once('/').unwrap();
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(length, if address.is_ipv4() { "32" } else { "128" }, "{shown}");
            address
        })
        .collect();
    let wanted = lab.ctl_json(node, &["status"]).unwrap()["network"]["podMtu"].to_string();
    let mtu = inside(&["cat", "/sys/class/net/eth0/mtu"]).unwrap();
    assert_eq!(mtu.trim(), wanted, "the MTU of the node's network");
    let v4 = inside(&["ip", "route"]).unwrap();
    assert!(v4.contains("default via 169.254.1.1 dev eth0"), "{v4}");
    let v6 = inside(&["ip", "-6", "route"]).unwrap();
    assert!(v6.contains("default via fe80::1 dev eth0"), "{v6}");
    own
}

/// Devices, routes, neighbours and allocations of pods that a node has.
fn wired(node: &Node<'_>) -> String {
    node.sh(
        "ip -o link show type veth | grep 'sluice' | sed 's/@.*//; s/^[0-9]*: //'; \
         { ip -4 route; ip -6 route; } | grep -o '^.* dev sluice[0-9a-f]\\{9\\}'; \
         { ip -4 neighbour; ip -6 neighbour; } | grep -o '^.* dev sluice[0-9a-f]\\{9\\}'; \
         sluicectl ipam -o json; true",
    )
    .unwrap()
}

fn leaves_the_cluster_as_its_node(inside: &Inside<'_>, lab: &Lab, node: &str) {
    let _outside = serve_on_client(lab).unwrap();
    let nodes_own = addresses(lab, node).unwrap();
    for client in addresses(lab, "client").unwrap() {
        assert_eq!(get(inside, &client, ""), "client");
        let seen = plain(&get(inside, &client, "cgi-bin/source")).to_string();
        assert!(
            nodes_own.contains(&seen),
            "{seen} is none of {node}'s {nodes_own:?}"
        );
    }
}

/// C3 C4 C6 C11 C15 N1 N8
#[test]
fn containers_of_containerd_and_podman_on_two_nodes_talk_to_each_other_and_out() {
    let lab = lab();
    let containerd = Containerd::start(&lab, "node1").unwrap();
    let podman = Podman::set_up(&lab, "node2").unwrap();
    let before = ["node1", "node2"].map(|node| wired(&lab.node(node)));
    let pod = lab.pod_add("node2", "pod", &[], &[]).unwrap();

    let first = containerd.run_cni("first").unwrap();
    let in_first = |applet: &[&str]| containerd.inside("default", "first", applet);
    let of_first = is_wired_as_any_pod(&in_first, &lab, "node1");
    let of_second = podman.start("second", "sluice").unwrap();
    let in_second = |applet: &[&str]| podman.inside("second", applet);
    assert_eq!(
        is_wired_as_any_pod(&in_second, &lab, "node2"),
        of_second,
        "as podman tells"
    );

    reaches(&in_first, &of_first, "second", &of_second);
    reaches(&in_first, &of_first, "pod", &pod.addresses);
    reaches(&in_second, &of_second, "first", &of_first);
    for address in of_first.iter().chain(&of_second).map(ToString::to_string) {
        let seen = seen_as(&lab.pod("pod").unwrap(), &address, PORT).unwrap();
        assert!(
            pod.addresses.contains(&seen),
            "the pod asked {address} and was seen as {seen}"
        );
    }
    leaves_the_cluster_as_its_node(&in_first, &lab, "node1");
    leaves_the_cluster_as_its_node(&in_second, &lab, "node2");

    for node in ["node1", "node2"] {
        let now = wired(&lab.node(node));
        assert!(
            now.contains(" dev sluice") && now.contains("containerId"),
            "{now}"
        );
    }
    containerd
        .ctr(&["task", "kill", "--signal", "KILL", "first"])
        .unwrap();
    // That the container was killed is how `ctr` ends; the DEL it makes on the way is what is looked at.
    first.finish().unwrap();
    podman.remove("second").unwrap();
    lab.pod_rm("pod").unwrap();
    for (node, before) in ["node1", "node2"].iter().zip(before) {
        // Who rests is no longer held.
        assert_eq!(wired(&lab.node(node)), before, "{node} after all were removed");
    }
}
