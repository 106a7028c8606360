//! DEL and the daemon that gathers removals: what it says is never relied on.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Child;

use serde_json::json;
use sluice_cni::removals::{Ask, GONE};

use crate::node::{Namespace, Node, device_of, finish};
use crate::wiring::DUAL;

/// A wired pod whose DEL has asked the daemon that the test plays.
struct Asked {
    node: Node,
    pod: Namespace,
    del: Child,
    stream: UnixStream,
    ask: Ask,
}

/// The next who asks the daemon, and for what.
fn next(daemon: &UnixListener) -> (UnixStream, Ask) {
    let (stream, _) = daemon.accept().unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    let ask = line.trim_end().parse().unwrap();
    (stream, ask)
}

fn asked() -> Asked {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    node.add("a", &pod).succeeded();
    let daemon = UnixListener::bind(node.removals_socket()).unwrap();
    let del = node.start("DEL", "a", Path::new(""), &node.with(json!({})));
    let (stream, ask) = next(&daemon);
    Asked {
        node,
        pod,
        del,
        stream,
        ask,
    }
}

// C6 I2
#[test]
fn while_the_daemon_works_the_pod_is_cut_off_and_keeps_its_addresses() {
    let mut asked = asked();
    let node = &asked.node;
    assert_eq!(asked.ask.name, device_of("a"));
    let link = node.namespace.ip(&format!("-o link show {}", asked.ask.name));
    assert!(link.starts_with(&format!("{}: ", asked.ask.index)), "{link}");
    assert!(!link.contains(",UP"), "{link}");
    assert_eq!(node.namespace.ip("route show proto 83"), "");
    assert_eq!(node.namespace.ip("-6 route show proto 83"), "");
    assert!(asked.pod.ip("-o link show eth0").contains("NO-CARRIER"));
    assert_eq!(node.store().list().unwrap().len(), 1, "freed before it rests");
    node.namespace.ip(&format!("link del {}", asked.ask.name));
    asked.stream.write_all(GONE.as_bytes()).unwrap();
    finish(asked.del).succeeded();
    asked.node.assert_empty();
}

// C6 C9
#[test]
fn a_daemon_that_lies_refuses_hangs_up_or_says_nothing_changes_nothing() {
    for answer in ["gone\n", "no reason\n", "gone", "\0\u{ff}gone\n", ""] {
        let mut asked = asked();
        asked.stream.write_all(answer.as_bytes()).unwrap();
        drop(asked.stream);
        finish(asked.del).succeeded();
        asked.node.assert_empty();
    }
    let asked = asked();
    finish(asked.del).succeeded();
    asked.node.assert_empty();
    drop(asked.stream);
}

// C6 C13
#[test]
fn a_socket_that_a_dead_daemon_left_and_a_file_in_its_place_are_no_hindrance() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    node.add("a", &pod).succeeded();
    drop(UnixListener::bind(node.removals_socket()).unwrap());
    node.del("a").succeeded();
    node.assert_empty();
    std::fs::remove_file(node.removals_socket()).unwrap();
    std::fs::write(node.removals_socket(), "").unwrap();
    let other = Namespace::new();
    node.add("b", &other).succeeded();
    node.del("b").succeeded();
    node.assert_empty();
}

// C6 C8
#[test]
fn gc_asks_for_all_that_is_dead_before_the_first_is_gone() {
    let node = Node::new(&DUAL);
    let pods: Vec<_> = ["a", "b", "c", "lives"].map(|id| (id, Namespace::new())).into();
    for (id, pod) in &pods {
        node.add(id, pod).succeeded();
    }
    let daemon = UnixListener::bind(node.removals_socket()).unwrap();
    let keep = json!([{ "containerID": "lives", "ifname": "eth0" }]);
    let config = node.with(json!({ "cni.dev/valid-attachments": keep }));
    let gc = node.start("GC", "", Path::new(""), &config);
    let asked: Vec<_> = (0..3).map(|_| next(&daemon)).collect();
    let names: BTreeSet<_> = asked.iter().map(|(_, ask)| ask.name.clone()).collect();
    assert_eq!(names, ["a", "b", "c"].map(device_of).into());
    for (_, pod) in &pods[..3] {
        assert!(pod.ip("-o link show eth0").contains("NO-CARRIER"));
    }
    assert_eq!(node.store().list().unwrap().len(), 4, "freed before they rest");
    // It takes one, refuses one and hangs up on the last.
    let [mut one, mut other, last] = <[_; 3]>::try_from(asked).unwrap();
    node.namespace.ip(&format!("link del {}", one.1.name));
    one.0.write_all(GONE.as_bytes()).unwrap();
    other.0.write_all(b"no reason\n").unwrap();
    drop(last);
    finish(gc).succeeded();
    assert_eq!(node.devices(), [device_of("lives")]);
    assert_eq!(node.store().list().unwrap().len(), 1);
}
