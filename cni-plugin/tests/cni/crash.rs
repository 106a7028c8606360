//! Killed calls, many calls at once, and collecting what is left.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use sluice_cni::collect::collect_dead;
use sluice_ipam::{Attachment, DEFAULT_REST};

use crate::node::{Namespace, Node, addresses, device_of, finish};
use crate::wiring::DUAL;

// C9 I1
#[test]
fn sixty_four_at_once_get_an_address_each_and_all_go() {
    let node = Node::new(&DUAL);
    let pods: Vec<(String, Namespace)> = (0..64).map(|at| (format!("pod{at}"), Namespace::new())).collect();
    let config = node.with(json!({}));
    let started: Vec<_> = pods
        .iter()
        .map(|(id, pod)| node.start("ADD", id, &pod.path(), &config))
        .collect();
    let mut given = BTreeSet::new();
    for child in started {
        for address in addresses(&finish(child).succeeded()) {
            assert!(given.insert(address.clone()), "{address} was given twice");
        }
    }
    assert_eq!(given.len(), 128);
    assert_eq!(node.devices().len(), 64);
    let started: Vec<_> = pods
        .iter()
        .map(|(id, _)| node.start("DEL", id, Path::new(""), &config))
        .collect();
    for child in started {
        finish(child).succeeded();
    }
    node.assert_empty();
}

// C5 C9
#[test]
fn of_many_adds_for_one_attachment_one_wins_and_stays_whole() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    let config = node.with(json!({}));
    let started: Vec<_> = (0..16)
        .map(|_| node.start("ADD", "a", &pod.path(), &config))
        .collect();
    let answers: Vec<_> = started.into_iter().map(finish).collect();
    let (won, lost): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.success);
    assert_eq!(won.len(), 1);
    for answer in lost {
        assert_eq!(answer.code(), 4, "{}", answer.text());
    }
    assert!(node.check("a", &pod, &won[0].json).success);
    assert_eq!(node.store().list().unwrap().len(), 1);
}

/// A config that asks for all that ADD can make.
fn asking_for_all(node: &Node, host_port: u64) -> String {
    node.with(json!({ "runtimeConfig": {
        "portMappings": [{ "hostPort": host_port, "containerPort": 80 }],
        "bandwidth": { "ingressRate": 8_000_000, "egressRate": 8_000_000 },
    } }))
}

// C9 C10
#[test]
fn adds_and_dels_of_one_attachment_at_once_never_leave_half_a_pod() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    let config = asking_for_all(&node, 80);
    for _ in 0..20 {
        let add = node.start("ADD", "a", &pod.path(), &config);
        let del = node.start("DEL", "a", &pod.path(), &config);
        let (add, del) = (finish(add), finish(del));
        assert!(del.success, "{}", del.stderr);
        let held = node.store().list().unwrap().len();
        assert_eq!(
            node.devices().len(),
            held,
            "ADD {}: a device without an address or the reverse",
            add.success
        );
        assert_eq!(node.host_ports().list().unwrap().len(), held);
        let limits = node.namespace.ip("-o link show type ifb");
        assert_eq!(limits.lines().count(), held, "{limits}");
        node.del("a").succeeded();
        node.assert_empty();
    }
}

// C8 C9 C10
#[test]
fn killed_at_any_instant_gc_leaves_nothing_and_no_address_is_given_twice() {
    let node = Node::new(&DUAL);
    for round in 0..120 {
        let config = if round % 2 == 0 {
            node.with(json!({}))
        } else {
            asking_for_all(&node, 1000 + round)
        };
        let pod = Namespace::new();
        let id = format!("pod{round}");
        let mut add = node.start("ADD", &id, &pod.path(), &config);
        // From before the process has begun to after it has ended.
        std::thread::sleep(Duration::from_micros(round * 60));
        add.kill().unwrap();
        let _ = add.wait_with_output();
        if round % 3 == 0 {
            let mut del = node.start("DEL", &id, &pod.path(), &config);
            std::thread::sleep(Duration::from_micros(round * 60));
            del.kill().unwrap();
            let _ = del.wait_with_output();
        }
        let held: Vec<_> = node
            .store()
            .list()
            .unwrap()
            .into_iter()
            .flat_map(|a| a.addresses)
            .collect();
        let devices = node.devices();
        assert!(devices.len() <= held.len(), "a device without an address");
    }
    // One that lives through it all.
    let pod = Namespace::new();
    let result = node.add("alive", &pod).succeeded();
    node.gc(&["alive", "never-was"]).succeeded();
    assert_eq!(node.devices(), [device_of("alive")]);
    assert_eq!(node.store().list().unwrap().len(), 1);
    assert!(node.check("alive", &pod, &result).success);
    node.gc(&[]).succeeded();
    node.assert_empty();
    assert_eq!(node.store().repair().unwrap(), []);
}

// C5
#[test]
fn an_add_whose_result_nobody_reads_is_undone() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    let path = pod.path();
    let mut add = node.spawn(&[
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "a"),
        ("CNI_NETNS", path.to_str().unwrap()),
        ("CNI_IFNAME", "eth0"),
    ]);
    drop(add.stdout.take());
    add.stdin
        .take()
        .unwrap()
        .write_all(node.with(json!({})).as_bytes())
        .unwrap();
    let output = add.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && stderr.contains("writing the result"),
        "{stderr}"
    );
    node.assert_empty();
}

// C9
#[test]
fn a_device_left_without_an_allocation_is_replaced_by_the_next_add() {
    let node = Node::new(&DUAL);
    let (old, new) = (Namespace::new(), Namespace::new());
    node.add("a", &old).succeeded();
    // As if the store had been lost.
    std::fs::remove_dir_all(node.ipam()).unwrap();
    let result = node.add("a", &new).succeeded();
    assert_eq!(node.devices(), [device_of("a")]);
    assert!(node.check("a", &new, &result).success);
    assert!(!old.ip("-o link show").contains("eth0"));
}

// C8
#[test]
fn gc_takes_either_key_and_leaves_what_is_not_its_own() {
    let node = Node::new(&DUAL);
    let pods = [Namespace::new(), Namespace::new(), Namespace::new()];
    for (id, pod) in ["a", "b"].iter().zip(&pods) {
        node.add(id, pod).succeeded();
    }
    let other = node.with(json!({ "name": "other-network" }));
    node.call("ADD", "c", &pods[2].path(), &other).succeeded();
    // Names like Sluice's that are not: a tunnel, and a pair somebody made by hand.
    node.namespace
        .ip("link add sluice-vxlan type veth peer name peer0");
    node.namespace
        .ip("link add sluice012345678 type veth peer name peer1");
    node.namespace.ip("link set sluice012345678 alias x/eth0");

    let keep =
        |id: &str| json!([{ "containerID": id, "ifname": "eth0" }, { "containerID": "../x", "ifname": "y" }]);
    let older = node.with(json!({ "cni.dev/attachments": keep("a") }));
    node.call("GC", "", Path::new(""), &older).succeeded();
    let left = |ids: &[&str]| {
        let mut devices: BTreeSet<_> = ids.iter().map(|id| device_of(id)).collect();
        devices.extend(["sluice-vxlan".to_owned(), "sluice012345678".to_owned()]);
        assert_eq!(node.devices().into_iter().collect::<BTreeSet<_>>(), devices);
    };
    left(&["a", "c"]);
    let both = node.with(json!({ "cni.dev/valid-attachments": null, "cni.dev/attachments": keep("a") }));
    node.call("GC", "", Path::new(""), &both).succeeded();
    left(&["c"]);
    node.call(
        "GC",
        "",
        Path::new(""),
        &node.with(json!({ "name": "other-network", "cni.dev/attachments": [] })),
    )
    .succeeded();
    left(&[]);
    assert_eq!(node.store().list().unwrap(), []);

    assert_eq!(
        node.call("GC", "", Path::new(""), &node.with(json!({}))).code(),
        7
    );
    let broken = node.with(json!({ "cni.dev/valid-attachments": [{ "containerID": 5 }] }));
    assert_eq!(node.call("GC", "", Path::new(""), &broken).code(), 7);
}

// C8
#[test]
fn the_daemon_collects_only_what_is_dead_and_no_longer_young() {
    let node = Node::new(&DUAL);
    let alive = Namespace::new();
    let result = node.add("alive", &alive).succeeded();
    let dead = Namespace::new();
    // A path of its own: a closed descriptor's number is soon another test's.
    let path = node.directory.path().join("dead");
    std::os::unix::fs::symlink(dead.path(), &path).unwrap();
    node.call("ADD", "dead", &path, &node.with(json!({}))).succeeded();
    std::fs::remove_file(&path).unwrap();
    drop(dead);
    let collect = || {
        node.namespace
            .run(|| collect_dead(&node.ipam(), DEFAULT_REST).unwrap())
    };
    assert_eq!(collect(), Vec::<String>::new(), "young");
    // Age them all.
    for id in ["alive", "dead"] {
        let path = node.ipam().join(format!("owners/{id}@eth0"));
        let mut text: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        text["sinceBoot"] = json!(0);
        std::fs::write(&path, text.to_string()).unwrap();
    }
    // The kernel takes a namespace down in its own time, and its devices with it.
    while node.devices().len() > 1 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let collected = collect();
    assert_eq!(collected.len(), 1, "{collected:?}");
    assert!(collected[0].starts_with("dead/eth0: freed"), "{collected:?}");
    assert!(node.check("alive", &alive, &result).success);
    let held = node
        .store()
        .get(&Attachment::new("dead", "eth0").unwrap())
        .unwrap();
    assert_eq!(held, None);
    assert_eq!(
        collect_dead(Path::new("/none"), DEFAULT_REST).unwrap(),
        Vec::<String>::new()
    );
}
