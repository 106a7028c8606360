//! Pods of different nodes, over each backend; what heals; who comes and goes; what `cleanup` leaves alone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::signal::Signal;
use sluice_lab::pods::Pod;
use sluice_lab::{Backend, Lab, Options, wait_until};
use sluice_tests::{PATIENCE, addresses, everybody_reaches_everybody, problems, seen_as, serve_on_client};

const PODS: [(&str, &str); 4] = [("node1", "a"), ("node1", "b"), ("node2", "c"), ("node3", "d")];

fn with_pods(backend: Backend, subnets: u8) -> (Lab, Vec<Pod>) {
    let lab = Lab::up(Options {
        backend,
        subnets,
        ..Options::default()
    })
    .unwrap();
    let pods = PODS
        .iter()
        .map(|(node, name)| lab.pod_add(node, name, &[], &[]).unwrap())
        .collect();
    (lab, pods)
}

/// What holds whichever way packets take.
fn the_network_model_holds(lab: &Lab, pods: &[Pod]) {
    everybody_reaches_everybody(lab, pods).unwrap();
    for node in lab.nodes() {
        for pod in pods {
            for address in &pod.addresses {
                let answer = lab.node(&node).get(&address.to_string(), 8080, "");
                assert_eq!(answer.unwrap(), pod.name, "{node} at {address}");
            }
        }
    }
    pods_leave_as_their_nodes(lab, pods);
    full_size_packets_get_through(lab, &pods[0], &pods[2]);
}

fn pods_leave_as_their_nodes(lab: &Lab, pods: &[Pod]) {
    let _outside = serve_on_client(lab).unwrap();
    for pod in pods {
        let nodes_own = addresses(lab, &pod.node).unwrap();
        for (client, own) in addresses(lab, "client").unwrap().iter().zip(nodes_own) {
            let seen = seen_as(&lab.pod(&pod.name).unwrap(), client, 8080).unwrap();
            assert_eq!(seen.to_string(), own, "{} on {}", pod.name, pod.node);
        }
    }
}

fn full_size_packets_get_through(lab: &Lab, from: &Pod, to: &Pod) {
    let place = lab.pod(&from.name).unwrap();
    let mtu: usize = place
        .run(&["cat", "/proc/sys/net/ipv6/conf/eth0/mtu"])
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    for address in &to.addresses {
        // Address and ICMP headers are part of the packet.
        let headers = if address.is_ipv4() { 28 } else { 48 };
        let ping = |size: usize| {
            let (size, address) = (size.to_string(), address.to_string());
            let command = ["ping", "-M", "do", "-c", "1", "-W", "2", "-s", &size, &address];
            place.exec(&command).unwrap()
        };
        assert!(ping(mtu - headers).status.success(), "{mtu} bytes to {address}");
        let output = ping(mtu - headers + 1);
        let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("too long") || said.contains("too big"), "{said}");
    }
}

fn routes_to(lab: &Lab, node: &str, cidr: &str) -> String {
    let family = if cidr.contains(':') { "-6" } else { "-4" };
    lab.node(node)
        .run(&["ip", family, "route", "show", cidr])
        .unwrap()
}

fn tunnels(lab: &Lab, node: &str) -> Vec<String> {
    let shown = lab
        .node(node)
        .run(&["ip", "-o", "link", "show", "type", "vxlan"])
        .unwrap();
    let name = |line: &str| Some(line.split(": ").nth(1)?.to_owned());
    shown.lines().filter_map(name).collect()
}

/// N1 N5 N6 N8 C4
#[test]
fn over_vxlan_and_what_is_taken_away_comes_back() {
    let (lab, pods) = with_pods(Backend::Vxlan, 1);
    the_network_model_holds(&lab, &pods);
    what_is_taken_away_comes_back(&lab, &pods);
    a_tunnel_that_another_keeps_from_being_made_is_told(&lab);
}

fn what_is_taken_away_comes_back(lab: &Lab, pods: &[Pod]) {
    let node = lab.node("node1");
    let cidrs = lab.host("node2").unwrap().pod_cidrs.clone();
    for cidr in &cidrs {
        let before = routes_to(lab, "node1", cidr);
        assert!(!before.is_empty(), "no route to {cidr}");
        let family = if cidr.contains(':') { "-6" } else { "-4" };
        node.run(&["ip", family, "route", "del", cidr]).unwrap();
        wait_until("the route is back", PATIENCE, || {
            Ok(routes_to(lab, "node1", cidr) == before)
        })
        .unwrap();
    }
    for tunnel in tunnels(lab, "node1") {
        let entries = || node.sh(&format!("bridge fdb show dev {tunnel} | grep ' dst ' | sort"));
        let before = entries().unwrap();
        let first: Vec<&str> = before.lines().next().unwrap().split(' ').collect();
        node.run(&["bridge", "fdb", "del", first[0], "dev", &tunnel])
            .unwrap();
        wait_until("the forwarding entry is back", PATIENCE, || {
            Ok(entries()? == before)
        })
        .unwrap();
        let mac = || node.run(&["cat", &format!("/sys/class/net/{tunnel}/address")]);
        let before = mac().unwrap();
        node.run(&["ip", "link", "del", &tunnel]).unwrap();
        wait_until("the tunnel is back, as it was", PATIENCE, || Ok(mac()? == before)).unwrap();
    }
    wait_until("all is well again", PATIENCE, || {
        everybody_reaches_everybody(lab, pods).map(|()| true)
    })
    .unwrap();
}

/// As on a node where flannel was: its device has the same number and port.
fn a_tunnel_that_another_keeps_from_being_made_is_told(lab: &Lab) {
    let node = lab.node("node1");
    lab.kill_sluiced("node1", Signal::SIGSTOP).unwrap();
    node.run(&["ip", "link", "del", "sluice-vxlan"]).unwrap();
    let theirs = "ip link add flannel.1 type vxlan id 1 dstport 8472 nolearning";
    node.run(&theirs.split(' ').collect::<Vec<_>>()).unwrap();
    lab.kill_sluiced("node1", Signal::SIGCONT).unwrap();
    wait_until("what is in the way is told", PATIENCE, || {
        Ok(problems(lab, "node1")?.contains("another vxlan device here has that vni and port: remove it"))
    })
    .unwrap();
    node.run(&["ip", "link", "del", "flannel.1"]).unwrap();
    wait_until("the tunnel is back and all is well", PATIENCE, || {
        Ok(tunnels(lab, "node1").contains(&"sluice-vxlan".to_owned()) && problems(lab, "node1")? == "[]")
    })
    .unwrap();
}

/// N1 N3 N4 N5 N8
#[test]
fn directly_and_nodes_come_and_go() {
    let (mut lab, pods) = with_pods(Backend::Direct, 1);
    assert_eq!(tunnels(&lab, "node1"), [""; 0]);
    the_network_model_holds(&lab, &pods);

    lab.join(4).unwrap();
    let newcomer = lab.pod_add("node4", "e", &[], &[]).unwrap();
    wait_until("the others know the newcomer", PATIENCE, || {
        let all = [&pods[..], std::slice::from_ref(&newcomer)].concat();
        everybody_reaches_everybody(&lab, &all).map(|()| true)
    })
    .unwrap();

    // A node that claims another's networks gets nothing; the rightful holder keeps what it has.
    let claimed = lab.host("node2").unwrap().pod_cidrs.clone();
    let before = routes_to(&lab, "node1", &claimed[0]);
    lab.apply_text(&format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: thief}}\nspec: {{podCIDRs: [{:?}]}}\n\
         status: {{addresses: [{{type: InternalIP, address: 172.30.0.99}}]}}\n",
        claimed[0]
    ))
    .unwrap();
    wait_until("the claim is reported", PATIENCE, || {
        Ok(problems(&lab, "node1")?.contains("thief"))
    })
    .unwrap();
    assert_eq!(routes_to(&lab, "node1", &claimed[0]), before);
    lab.delete_object("Node", "thief").unwrap();

    let gone = lab.host("node3").unwrap().pod_cidrs.clone();
    lab.leave("node3").unwrap();
    for cidr in gone {
        wait_until("its routes are gone", PATIENCE, || {
            Ok(routes_to(&lab, "node1", &cidr).is_empty())
        })
        .unwrap();
    }
    everybody_reaches_everybody(&lab, &pods[..3]).unwrap();
}

/// N1 N2 N5 N8
#[test]
fn auto_goes_directly_inside_a_subnet_and_through_a_tunnel_across() {
    let (lab, pods) = with_pods(Backend::Auto, 2);
    let through_tunnel = |node: &str| {
        let cidr = &lab.host(node).unwrap().pod_cidrs[0];
        let route = routes_to(&lab, "node1", cidr);
        tunnels(&lab, "node1")
            .iter()
            .any(|tunnel| route.contains(tunnel.as_str()))
    };
    assert!(through_tunnel("node2"), "another subnet");
    assert!(!through_tunnel("node3"), "the same subnet");
    the_network_model_holds(&lab, &pods);
}

/// N9
#[test]
fn cleanup_takes_what_is_sluices_and_nothing_else() {
    let lab = Lab::up(Options {
        nodes: 2,
        backend: Backend::Vxlan,
        ..Options::default()
    })
    .unwrap();
    let node = lab.node("node1");
    node.sh(
        "ip link add foreign type bridge && ip link set foreign up && ip addr add 198.18.0.1/24 dev foreign && \
         ip route add 198.51.100.0/24 via 172.30.0.1 && \
         nft add table inet foreign && nft add chain inet foreign here && nft add rule inet foreign here counter",
    )
    .unwrap();
    let routes = "{ ip -4 route; ip -6 route; } | grep -v -e 10.244. -e fd00:244: -e sluice | sort";
    let foreign = format!("nft list table inet foreign; ip -o link show foreign; {routes}");
    let before = node.sh(&foreign).unwrap();
    assert_ne!(tunnels(&lab, "node1"), [""; 0]);

    lab.stop_sluiced("node1").unwrap();
    node.run(&["sluiced", "cleanup"]).unwrap();
    assert_eq!(node.sh(&foreign).unwrap(), before);
    assert_eq!(tunnels(&lab, "node1"), [""; 0]);
    for (what, script) in [
        ("links", "ip -o link | grep sluice"),
        ("tables", "nft list tables | grep sluice"),
        (
            "routes",
            "{ ip -4 route; ip -6 route; } | grep -e 10.244. -e fd00:244:",
        ),
        ("pins", "ls -d /sys/fs/bpf/sluice"),
        ("files", "ls /etc/cni/net.d/10-sluice.conflist"),
    ] {
        let left = node.sh(&format!("{script} 2>/dev/null || true")).unwrap();
        assert_eq!(left, "", "{what} of Sluice's are left");
    }
    node.run(&["sluiced", "cleanup"]).unwrap();
}

/// N7
#[test]
fn a_node_that_does_not_forward_is_made_to() {
    let lab = Lab::up(Options {
        nodes: 2,
        ..Options::default()
    })
    .unwrap();
    let pods =
        [("node1", "a"), ("node2", "b")].map(|(node, name)| lab.pod_add(node, name, &[], &[]).unwrap());
    for node in lab.nodes() {
        let place = lab.node(&node);
        // As a hardened host's settings and Docker do, before the daemon starts.
        lab.stop_sluiced(&node).unwrap();
        place
            .sh(
                "cd /proc/sys/net; echo 0 > ipv4/ip_forward; echo 0 > ipv6/conf/all/forwarding; \
                 for f in ipv4/conf/*/rp_filter; do echo 1 > $f; done; \
                 iptables -P FORWARD DROP && ip6tables -P FORWARD DROP",
            )
            .unwrap();
        lab.start_sluiced(&node).unwrap();
    }
    wait_until("pods reach each other", PATIENCE, || {
        everybody_reaches_everybody(&lab, &pods).map(|()| true)
    })
    .unwrap();
}
