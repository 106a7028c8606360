//! `sluicectl doctor` on hosts where others were at work: it names what they left, and its commands take that away and nothing
//! else.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_lab::{Datastore, Lab, Node, Options, ProxyMode, wait_until};
use sluice_tests::asking::{Asker, Asking};
use sluice_tests::{PATIENCE, switch_proxy_to};

/// What the host's operator has and keeps.
const OWN: &str = "iptables-nft -A INPUT -p tcp --dport 22 -m comment --comment 'the way in' -j ACCEPT && \
     iptables-nft -t nat -N MINE && iptables-nft -t nat -A MINE -j RETURN && \
     ip6tables-nft -N KUBE-FIREWALL && \
     ipset create mine hash:ip && ip link add br0 type bridge && ip route add 198.51.100.0/24 via 172.30.0.1 && \
     nft add table inet mine && nft add chain inet mine here && mkdir -p /etc/cni/net.d /var/lib/cni/networks && \
     echo '{}' > /etc/cni/net.d/87-podman-bridge.conflist";

/// What flannel makes in its vxlan backend with iptables (pkg/trafficmngr/iptables/iptables.go, pkg/backend/vxlan), and the
/// reference plugins that it calls.
const FLANNEL: &str = "ip link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 nolearning && \
     ip addr add 10.244.0.0/32 dev flannel.1 && ip link set flannel.1 up && \
     ip route add 10.244.9.0/24 via 10.244.9.0 dev flannel.1 onlink && \
     ip link add cni0 type bridge && ip addr add 10.244.0.1/24 dev cni0 && \
     mkdir -p /run/flannel /var/lib/cni/flannel /var/lib/cni/networks/cbr0 && \
     echo FLANNEL_NETWORK=10.244.0.0/16 > /run/flannel/subnet.env && \
     echo 10.244.0.2 > /var/lib/cni/networks/cbr0/10.244.0.2 && \
     echo '{}' > /etc/cni/net.d/10-flannel.conflist && \
     iptables-nft -t nat -N FLANNEL-POSTRTG && \
     iptables-nft -t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG && \
     iptables-nft -t nat -A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment 'flanneld masq' -j MASQUERADE && \
     iptables-nft -N FLANNEL-FWD && \
     iptables-nft -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD && \
     iptables-nft -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT && \
     ip6tables-nft -A POSTROUTING -t nat -m comment --comment 'flanneld masq' -j RETURN && \
     nft add table ip flannel-ipv4 && nft add chain ip flannel-ipv4 postrtg";

/// Calico's with iptables (felix/rules), its devices, sets and routes; those of its BIRD too.
const CALICO: &str = "ip link add cali0123456789a type bridge && ip link set cali0123456789a up && \
     ip route add 10.244.7.5 dev cali0123456789a proto 80 && \
     ip -6 route add fd00:244:0:7::5 dev cali0123456789a proto 80 && \
     ip route add blackhole 10.244.7.0/26 proto 12 && \
     ip link add vxlan.calico type vxlan id 4096 dev eth0 dstport 4789 nolearning && \
     ipset create cali40all-ipam-pools hash:net && ipset create cali60all-ipam-pools hash:net family inet6 && \
     iptables-nft -N cali-FORWARD && \
     iptables-nft -I FORWARD -m comment --comment cali:wUHhoiAYhphO9Mso -j cali-FORWARD && \
     iptables-nft -A FORWARD -m comment --comment cali:S93hcgKJrXEqnTfs -m mark --mark 0x10000/0x10000 -j ACCEPT && \
     iptables-nft -t nat -N cali-nat-outgoing && \
     iptables-nft -t nat -A cali-nat-outgoing -m set --match-set cali40all-ipam-pools src -j MASQUERADE && \
     ip6tables-nft -t raw -N cali-PREROUTING && \
     ip6tables-nft -t raw -I PREROUTING -m comment --comment cali:6gwbT8clXdHdC1b1 -j cali-PREROUTING && \
     mkdir -p /run/calico /var/lib/calico && touch /var/lib/calico/mtu /etc/cni/net.d/calico-kubeconfig && \
     echo '{}' > /etc/cni/net.d/10-calico.conflist";

/// What kube-proxy has in its ipvs mode beside the kernel's IPVS. Devices whose kind does not matter are bridges, which every kernel
/// has.
const IPVS: &str = "ip link add kube-ipvs0 type bridge && ip addr add 10.96.0.1/32 dev kube-ipvs0 && \
     ipset create KUBE-CLUSTER-IP hash:ip,port && \
     iptables-nft -t nat -N KUBE-SERVICES && iptables-nft -t nat -A PREROUTING -j KUBE-SERVICES && \
     iptables-nft -t nat -A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT";

/// Runs a script with the host's own tools: busybox's shell takes its own `ip`, which knows less.
fn shell(node: &Node<'_>, script: &str) -> Result<String> {
    node.run(&["sh", "-c", script])
}

/// All that could be somebody's on a node, without what changes by itself.
fn traces(node: &Node<'_>) -> Result<BTreeSet<String>> {
    let listed = shell(
        node,
        "for tool in iptables-nft ip6tables-nft; do $tool-save | grep -e '^-A' -e '^:.* -' | sed 's/ \\[.*//'; done; \
         nft list tables | grep -v -E 'ip6? (filter|nat|mangle|raw)$'; ipset list -name; \
         ip -o link | cut -d: -f2; ip -o address | tr -s ' ' | cut -d' ' -f2-4; \
         ip route show table all | grep -v ' proto kernel '; ip -6 route show table all | grep -v ' proto kernel '; \
         find /etc/cni /run/flannel /run/calico /var/lib/calico /var/lib/cni -mindepth 1 2>/dev/null; true",
    );
    // A drop of what must not be, which kube-proxy and the kubelet have alike.
    let kept = |line: &&str| !line.contains("KUBE-FIREWALL");
    Ok(listed?.lines().filter(kept).map(str::to_owned).collect())
}

/// What doctor says, and whether it is content.
fn examined(node: &Node<'_>) -> Result<(Value, bool)> {
    let output = node.exec(&["sluicectl", "-o", "json", "doctor"])?;
    let report = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok((report, output.status.success()))
}

fn leftovers(report: &Value) -> Vec<(&str, &str, &str)> {
    let list = report["leftovers"].as_array().into_iter().flatten();
    list.map(|leftover| {
        let part = |key: &str| leftover[key].as_str().unwrap_or_default();
        (part("whose"), part("what"), part("remove"))
    })
    .collect()
}

/// Each of `wanted` is named as the product's; then the commands run in order, and all is as it was `before`.
fn is_named_and_removed(
    node: &Node<'_>,
    product: &str,
    wanted: &[&str],
    before: &BTreeSet<String>,
) -> Result<()> {
    let (report, well) = examined(node)?;
    ensure!(!well, "{product} is in the way: {report:#}");
    let found = leftovers(&report);
    for (whose, what, _) in &found {
        ensure!(*whose == product, "{what} is {product}'s and not {whose}'s");
    }
    for what in wanted {
        ensure!(
            found.iter().any(|(_, found, _)| found.contains(what)),
            "{what} is not among {found:#?}"
        );
    }
    for (_, what, remove) in &found {
        shell(node, remove).with_context(|| format!("removing {what}"))?;
    }
    let (report, well) = examined(node)?;
    ensure!(
        well && leftovers(&report).is_empty(),
        "something is left: {report:#}"
    );
    let after = traces(node)?;
    let (more, less): (Vec<_>, Vec<_>) = (
        after.difference(before).collect(),
        before.difference(&after).collect(),
    );
    ensure!(after == *before, "{product} left {more:#?} and {less:#?} went");
    Ok(())
}

/// O2 O7 N12
#[test]
fn what_others_left_is_named_and_its_commands_remove_that_alone() {
    let lab = Lab::up(Options {
        nodes: 1,
        datastore: Datastore::Kubernetes,
        ..Options::default()
    })
    .unwrap();
    let node = lab.node("node1");
    lab.stop_sluiced("node1").unwrap();
    node.run(&["sluiced", "cleanup"]).unwrap();
    shell(&node, OWN).unwrap();
    let (report, well) = examined(&node).unwrap();
    assert!(well, "{report:#}");
    let before = traces(&node).unwrap();

    for (product, script, wanted) in [
        (
            "flannel",
            FLANNEL,
            &[
                "the conflist /etc/cni/net.d/10-flannel.conflist",
                "2 chains and 4 rules of iptables-nft",
                "0 chains and 1 rule of ip6tables-nft",
                "the nftables table ip flannel-ipv4",
                "the device flannel.1",
                "the device cni0",
                "/run/flannel",
                "/var/lib/cni/networks/cbr0",
            ][..],
        ),
        (
            "Calico",
            CALICO,
            &[
                "the conflist /etc/cni/net.d/10-calico.conflist",
                "2 chains and 3 rules of iptables-nft",
                "1 chain and 1 rule of ip6tables-nft",
                "the device cali0123456789a",
                "the device vxlan.calico",
                "1 route of protocol 12",
                "2 ipsets",
                "/var/lib/calico",
            ],
        ),
        (
            "kube-proxy",
            IPVS,
            &[
                "1 chain and 2 rules of iptables-nft",
                "the device kube-ipvs0",
                "1 ipset",
            ],
        ),
    ] {
        shell(&node, script).unwrap();
        is_named_and_removed(&node, product, wanted, &before).unwrap();
    }
    for (mode, shows, wanted) in [
        (
            "iptables",
            "iptables-nft-save | grep KUBE-SEP-",
            "rules of iptables-nft",
        ),
        (
            "nftables",
            "nft list table ip kube-proxy | grep 10.96.0.1",
            "the nftables table ip kube-proxy",
        ),
    ] {
        lab.start_kube_proxy("node1", mode).unwrap();
        wait_until("kube-proxy serves", PATIENCE, || {
            Ok(node.exec(&["busybox", "sh", "-c", shows])?.status.success())
        })
        .unwrap();
        let (report, _) = examined(&node).unwrap();
        let runs = leftovers(&report)[0];
        assert!(runs.1.starts_with("kube-proxy runs, process"), "{report:#}");
        assert_eq!(runs.2, "kubectl -n kube-system delete daemonset kube-proxy");
        lab.kill_kube_proxy("node1").unwrap();
        if mode == "iptables" {
            let noted = report
                .to_string()
                .contains("net.ipv4.conf.all.route_localnet is 1");
            assert!(noted, "{report:#}");
            node.run(&["sysctl", "-w", "net.ipv4.conf.all.route_localnet=0"])
                .unwrap();
        }
        is_named_and_removed(&node, "kube-proxy", &[wanted], &before).unwrap();
    }

    // And the node is Sluice's again.
    node.run(&["sluiced", "install"]).unwrap();
    lab.start_sluiced("node1").unwrap();
    wait_until("doctor finds the daemon healthy", PATIENCE, || {
        let (report, well) = examined(&node)?;
        Ok(well && report.to_string().contains("sluiced runs and is healthy"))
    })
    .unwrap();
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.1.1
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
";

/// O7 S24: as docs/migrate-from-kube-proxy.md has it.
#[test]
fn a_node_goes_from_kube_proxy_to_sluice_and_no_connection_fails() {
    let lab = Lab::up(Options {
        nodes: 2,
        datastore: Datastore::Kubernetes,
        proxy: ProxyMode::Off,
        ..Options::default()
    })
    .unwrap();
    for (name, node) in [("a", "node1"), ("b", "node2")] {
        let serve = ["sluice-lab", "talk-serve", name, "8080"];
        lab.pod_add(node, name, &[("app", "web")], &serve).unwrap();
        lab.start_kube_proxy(node, "iptables").unwrap();
    }
    lab.pod_add("node1", "asker", &[], &[]).unwrap();
    lab.apply_text(SERVICE).unwrap();
    let node1 = lab.node("node1");
    let node_port = format!("{}:30080", lab.host("node1").unwrap().addresses[0]);
    let cluster_ip = || "10.96.1.1:80".to_owned();
    let askers = [
        (lab.pod("asker").unwrap(), node1.clone(), cluster_ip()),
        (node1.clone(), node1.clone(), cluster_ip()),
        (lab.client(), lab.client(), node_port),
    ]
    .map(|(from, files, at)| Asker { from, files, at });
    let serves = |line: &str| line.starts_with("a ") || line.starts_with("b ");
    for asker in &askers {
        wait_until("kube-proxy serves", PATIENCE, || {
            Ok(asker.ask(20)?.lines().all(serves))
        })
        .unwrap();
    }

    let load = Asking::start(&askers).unwrap();
    switch_proxy_to(&lab, "node1", "off", "auto", "ebpf").unwrap();
    lab.kill_kube_proxy("node1").unwrap();
    let (report, _) = examined(&node1).unwrap();
    for (whose, what, remove) in leftovers(&report) {
        assert_eq!(whose, "kube-proxy", "{what}");
        shell(&node1, remove).unwrap();
    }
    wait_until("nothing is in the way any more", PATIENCE, || {
        Ok(examined(&node1)?.1)
    })
    .unwrap();
    for asker in &askers {
        assert!(asker.ask(20).unwrap().lines().all(serves));
    }
    load.end(serves).unwrap();
    lab.kill_kube_proxy("node2").unwrap();
}
