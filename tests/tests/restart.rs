//! Daemons that are killed, stopped and started: what runs goes on, what changed meanwhile is caught up with.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::signal::Signal;
use sluice_lab::demo::restart::{Load, allow, kill_and_wait, stop, wait_for_requests};
use sluice_lab::{Lab, Node, Options, url, wait_until};
use sluice_tests::datastore::reboot;
use sluice_tests::{PATIENCE, addresses, kubia_pods, manifest, wait_for_answers};

const KUBIA: &str = "10.96.0.10";
const KUBIA_WEB: &str = "10.96.0.11";
const PODS: [(&str, &str); 3] = [("node1", "kubia-a"), ("node1", "kubia-b"), ("node2", "kubia-c")];
const NAMES: [&str; 3] = ["kubia-a", "kubia-b", "kubia-c"];

fn kubia_lab() -> Lab {
    let lab = Lab::up(Options {
        nodes: 2,
        ..Options::default()
    })
    .unwrap();
    kubia_pods(&lab, &PODS).unwrap();
    for file in ["kubia.yaml", "kubia-web.yaml", "kubia-nodeport.yaml"] {
        lab.apply(manifest(file)).unwrap();
    }
    for node in lab.nodes() {
        wait_for_answers(&lab.node(&node), KUBIA_WEB, 80, &NAMES).unwrap();
    }
    lab
}

/// S5 S6 N1
#[test]
fn no_request_fails_while_daemons_are_killed() {
    let lab = kubia_lab();
    let nodes = lab.nodes();
    let pod = lab.pod("kubia-a").unwrap();
    let favourite = pod.get(KUBIA, 80, "").unwrap();
    let places: Vec<Node<'_>> = nodes
        .iter()
        .map(|node| lab.node(node))
        .chain([lab.client()])
        .collect();
    allow(&places).unwrap();
    let mut loads = Vec::new();
    let mut running = Vec::new();
    for name in ["kubia-a", "kubia-c"] {
        let from = lab.pod(name).unwrap();
        loads.push(Load::start(&from, name, &url(KUBIA_WEB, 80, "")).unwrap());
        running.push((from, name.to_owned()));
    }
    for node in &nodes {
        let name = format!("client-{node}");
        let address = &addresses(&lab, node).unwrap()[0];
        loads.push(Load::start(&lab.client(), &name, &url(address, 30123, "")).unwrap());
        running.push((lab.client(), name));
    }
    let all_go_on = || {
        for (place, name) in &running {
            wait_for_requests(place, name, 20).unwrap();
        }
    };
    for _ in 0..2 {
        for node in &nodes {
            all_go_on();
            kill_and_wait(&lab, node).unwrap();
        }
    }
    all_go_on();
    stop(&places).unwrap();
    for load in loads {
        let loaded = load.finish().unwrap();
        assert_eq!(loaded.failed, 0, "{loaded}");
    }
    assert_eq!(
        pod.get(KUBIA, 80, "").unwrap(),
        favourite,
        "affinity outlives the daemon"
    );
}

/// C13 C6
#[test]
fn pods_come_and_go_while_the_daemon_is_down_and_it_catches_up() {
    let lab = kubia_lab();
    lab.stop_sluiced("node1").unwrap();

    // The plugin answers all the same, and what it wired works.
    let pod = lab
        .pod_add("node1", "meanwhile", &[sluice_tests::KUBIA], &[])
        .unwrap();
    for address in &pod.addresses {
        let from = lab.pod("kubia-c").unwrap();
        assert_eq!(from.get(&address.to_string(), 8080, "").unwrap(), "meanwhile");
    }
    lab.pod_rm("kubia-b").unwrap();
    let interfaces = lab.node("node1").run(&["ip", "-o", "link"]).unwrap();
    // The other node knows already; this one serves what it knew, less what is gone.
    wait_for_answers(
        &lab.node("node2"),
        KUBIA_WEB,
        80,
        &["kubia-a", "kubia-c", "meanwhile"],
    )
    .unwrap();
    lab.delete(manifest("kubia.yaml")).unwrap();

    lab.start_sluiced("node1").unwrap();
    wait_for_answers(
        &lab.node("node1"),
        KUBIA_WEB,
        80,
        &["kubia-a", "kubia-c", "meanwhile"],
    )
    .unwrap();
    wait_until("the deleted Service is gone", PATIENCE, || {
        Ok(lab.node("node1").get(KUBIA, 80, "").is_err())
    })
    .unwrap();
    assert_eq!(
        lab.node("node1")
            .run(&["ip", "-o", "link"])
            .unwrap()
            .lines()
            .count(),
        interfaces.lines().count(),
        "the daemon left the pods' interfaces alone"
    );
    lab.pod_rm("meanwhile").unwrap();
    lab.kill_sluiced("node1", Signal::SIGTERM).unwrap();
    wait_until("a daemon told to end is started again", PATIENCE, || {
        Ok(lab.node("node1").exec(&["sluicectl", "status"])?.status.success())
    })
    .unwrap();
}

/// Pods of a full node.
const MANY: usize = 250;

/// Adds pods one after the other, as a kubelet does that finds none of its own running.
fn fill(node: &Node<'_>, name: &str) {
    let add = format!("sluice-lab cni-add {name}-$i id-{name}-$i '{{}}' >/dev/null || exit 1");
    node.sh(&format!("for i in $(seq {MANY}); do {add}; done"))
        .unwrap();
    let devices = node.run(&["ip", "-o", "link", "show", "type", "veth"]).unwrap();
    assert_eq!(
        devices.lines().filter(|line| line.contains("alias id-")).count(),
        MANY
    );
    // One of each family.
    let held = node.sh("ls /run/sluice/ipam/held | wc -l").unwrap();
    assert_eq!(held.trim(), (2 * MANY).to_string());
}

/// C13 C9
#[test]
fn a_node_that_is_rebooted_has_all_of_its_250_pods_back() {
    let lab = Lab::up(Options {
        nodes: 1,
        ..Options::default()
    })
    .unwrap();
    let node = lab.node("node1");
    fill(&node, "before");
    lab.stop_sluiced("node1").unwrap();
    reboot(&node);
    // Not the shell's own.
    let forget = format!("for i in $(seq {MANY}); do /sbin/ip netns del before-$i || exit 1; done");
    node.sh(&forget).unwrap();
    lab.start_sluiced("node1").unwrap();
    wait_until("the node takes pods", PATIENCE, || {
        Ok(node
            .exec(&["ls", "/etc/cni/net.d/10-sluice.conflist"])?
            .status
            .success())
    })
    .unwrap();
    fill(&node, "after");
    // There is room for a few more, and what is wired works.
    let pod = lab.pod_add("node1", "last", &[], &[]).unwrap();
    for address in &pod.addresses {
        assert_eq!(node.get(&address.to_string(), 8080, "").unwrap(), "last");
    }
    let checks = format!("for i in $(seq {MANY}); do sluice-lab cni-check after-$i || exit 1; done");
    node.sh(&checks).unwrap();
}
