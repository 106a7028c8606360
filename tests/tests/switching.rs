//! Another `proxy.mode` on a running node: Services are served throughout, and nothing of the old one stays.

use anyhow::{Result, bail};
use sluice_lab::{Lab, Node, Options, ProxyMode, wait_until};
use sluice_tests::asking::{Asker, Asking, Kept};
use sluice_tests::{PATIENCE, switch_proxy};

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIPs: [10.96.1.1, 'fd00:96::1:1']
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
";

/// What a node has of the Services of eBPF, nftables and iptables, and of what the latter two share.
fn traces(node: &Node<'_>) -> Result<[String; 4]> {
    let list = |script: &str| node.sh(&format!("{script}; true"));
    Ok([
        list("ls /sys/fs/bpf/sluice 2>/dev/null")?,
        list("nft list tables | grep sluice-services")?,
        list("(iptables-save; ip6tables-save) | grep SLUICE- | grep -v SLUICE-FORWARD")?,
        list("ip -o link show | grep -o 'sluice-np[01]@'")?,
    ])
}

/// Waits until a node has something of these alone, in the order of [`traces`].
fn has_alone(node: &Node<'_>, wanted: [bool; 4]) {
    let gone = wait_until("what the old one had is gone", PATIENCE, || {
        let traces = traces(node)?;
        if traces.each_ref().map(|trace| !trace.is_empty()) != wanted {
            bail!("there is {traces:?}");
        }
        Ok(true)
    });
    if let Err(error) = gone {
        panic!("{error:#}");
    }
}

/// S20 S24
#[test]
fn through_all_three_no_connection_fails_and_nothing_is_left() {
    let lab = Lab::up(Options {
        nodes: 2,
        proxy: ProxyMode::Ebpf,
        ..Options::default()
    })
    .unwrap();
    for (name, node) in [("a", "node1"), ("b", "node2")] {
        let serve = ["sluice-lab", "talk-serve", name, "8080"];
        lab.pod_add(node, name, &[("app", "web")], &serve).unwrap();
    }
    lab.pod_add("node1", "asker", &[], &[]).unwrap();
    lab.apply_text(SERVICE).unwrap();
    let node1 = lab.node("node1");
    let serves = |line: &str| line.starts_with("a ") || line.starts_with("b ");
    let all_serve = |text: &str| text.lines().all(serves);
    let pod = || lab.pod("asker").unwrap();
    let node_port = format!("{}:30080", lab.host("node1").unwrap().addresses[0]);
    let askers = [
        (pod(), node1.clone(), "10.96.1.1:80".to_owned()),
        (pod(), node1.clone(), "[fd00:96::1:1]:80".to_owned()),
        (node1.clone(), node1.clone(), "10.96.1.1:80".to_owned()),
        (lab.client(), lab.client(), node_port),
    ]
    .map(|(from, files, at)| Asker { from, files, at });
    for asker in &askers {
        wait_until("the Service is served", PATIENCE, || {
            Ok(all_serve(&asker.ask(20)?))
        })
        .unwrap();
    }
    let before = traces(&node1).unwrap();
    has_alone(&node1, [true, false, false, false]);

    let load = Asking::start(&askers).unwrap();
    switch_proxy(&lab, "node1", "ebpf", "nftables").unwrap();
    has_alone(&node1, [false, true, false, true]);
    // One node of each now.
    for asker in &askers {
        assert!(all_serve(&asker.ask(20).unwrap()));
    }
    // Begun by nftables, these outlive it: connection tracking goes on translating them.
    let kept = Kept::start(&askers).unwrap();
    kept.go_on().unwrap();
    switch_proxy(&lab, "node1", "nftables", "iptables").unwrap();
    has_alone(&node1, [false, false, true, true]);
    kept.go_on().unwrap();
    switch_proxy(&lab, "node1", "iptables", "ebpf").unwrap();
    has_alone(&node1, [true, false, false, false]);
    assert_eq!(traces(&node1).unwrap(), before);
    kept.go_on().unwrap();
    drop(kept);
    load.end(serves).unwrap();
}

/// S24: who asked to connect before a change, and whose first packet has to come again after it, is served.
#[test]
fn what_was_begun_before_a_change_is_served_after_it() {
    const HOLD: &str = "nft -f - <<'END'
table inet hold {
  chain out {
    type filter hook output priority raw
    ip daddr 10.96.1.1 tcp flags syn counter drop
  }
}
END";
    let lab = Lab::up(Options {
        nodes: 1,
        proxy: ProxyMode::Nftables,
        ..Options::default()
    })
    .unwrap();
    lab.pod_add("node1", "web", &[("app", "web")], &[]).unwrap();
    lab.apply_text(SERVICE).unwrap();
    let node = lab.node("node1");
    wait_until("the Service is served", PATIENCE, || {
        Ok(node.get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();

    node.sh(HOLD).unwrap();
    let asks = [
        "timeout",
        "15",
        "busybox",
        "wget",
        "-q",
        "-O",
        "-",
        "http://10.96.1.1/",
    ];
    let asking = node.spawn(&asks).unwrap();
    wait_until("it has asked", PATIENCE, || {
        Ok(!node
            .run(&["nft", "list", "table", "inet", "hold"])?
            .contains("packets 0"))
    })
    .unwrap();
    switch_proxy(&lab, "node1", "nftables", "ebpf").unwrap();
    node.run(&["nft", "delete", "table", "inet", "hold"]).unwrap();
    let answer = asking.finish().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&answer.stdout).trim(),
        "web",
        "{answer:?}"
    );
    has_alone(&node, [true, false, false, false]);
}
