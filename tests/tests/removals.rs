//! Many pods of one node removed at once, with the daemon there to gather them and with the daemon killed meanwhile.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::signal::Signal;
use sluice_lab::{Lab, Options, wait_until};
use sluice_tests::PATIENCE;

const PODS: usize = 60;

/// Runs a runtime's verb for all pods at once and fails if any does.
fn script(verb: &str, arguments: &str) -> String {
    format!(
        "pids=; for i in $(seq {PODS}); do sluice-lab {verb} pod$i {arguments} >/dev/null & pids=\"$pids $!\"; done; \
         for pid in $pids; do wait $pid || failed=1; done; [ -z \"${{failed:-}}\" ]"
    )
}

/// A node with one pod that stays, somebody else's devices, and the pods that will go.
fn crowded_lab() -> Lab {
    let lab = Lab::up(Options {
        nodes: 1,
        ..Options::default()
    })
    .unwrap();
    lab.pod_add("node1", "stays", &[], &[]).unwrap();
    let node = lab.node("node1");
    // One of them is named almost like Sluice's.
    node.run(&[
        "ip",
        "link",
        "add",
        "other",
        "type",
        "veth",
        "peer",
        "name",
        "sluice-other",
    ])
    .unwrap();
    node.sh(&script("cni-add", "id-$i '{}'")).unwrap();
    assert_eq!(pod_devices(&lab), PODS + 1);
    lab
}

fn pod_devices(lab: &Lab) -> usize {
    let links = lab
        .node("node1")
        .run(&["ip", "-o", "link", "show", "type", "veth"])
        .unwrap();
    // Those of pods have an alias.
    links
        .lines()
        .filter(|line| line.contains(": sluice") && line.contains("alias"))
        .count()
}

fn held(lab: &Lab) -> Vec<String> {
    let listed = lab.node("node1").run(&["ls", "/run/sluice/ipam/held"]).unwrap();
    listed.lines().map(str::to_owned).collect()
}

/// Only what was not to go is there, and works.
fn assert_only_the_rest_is_left(lab: &Lab) {
    let node = lab.node("node1");
    assert_eq!(pod_devices(lab), 1);
    node.run(&["ip", "link", "show", "other"]).unwrap();
    node.run(&["ip", "link", "show", "sluice-other"]).unwrap();
    let stays = sluice_lab::pods::find(lab.name(), "stays").unwrap();
    let mut addresses: Vec<String> = stays.addresses.iter().map(ToString::to_string).collect();
    addresses.sort();
    let mut held = held(lab);
    held.sort();
    assert_eq!(held, addresses);
    for address in &addresses {
        assert_eq!(node.get(address, 8080, "").unwrap(), "stays");
    }
    lab.node("node1")
        .run(&["sluice-lab", "cni-check", "stays"])
        .unwrap();
}

/// C6 C9
#[test]
fn sixty_pods_removed_at_once_share_the_kernels_wait() {
    let lab = crowded_lab();
    lab.node("node1").sh(&script("cni-del", "")).unwrap();
    assert_only_the_rest_is_left(&lab);
    let removals = lab.ctl_json("node1", &["status"]).unwrap()["removals"].clone();
    let count = |key: &str| removals[key].as_u64().unwrap();
    // One that the daemon was too busy for in time was removed by its plugin.
    assert!(
        count("devices") > 0 && count("groups") < count("devices"),
        "{removals}"
    );
}

/// C6 C9 C13
#[test]
fn a_daemon_killed_while_it_removes_leaves_nothing() {
    let lab = crowded_lab();
    let removing = lab
        .node("node1")
        .spawn(&["sh", "-ec", &script("cni-del", "")])
        .unwrap();
    wait_until("some are gone", PATIENCE, || Ok(pod_devices(&lab) < PODS)).unwrap();
    lab.kill_sluiced("node1", Signal::SIGKILL).unwrap();
    let output = removing.finish().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_only_the_rest_is_left(&lab);
    wait_until("another daemon serves", PATIENCE, || {
        Ok(lab.node("node1").exec(&["sluicectl", "status"])?.status.success())
    })
    .unwrap();
    assert_only_the_rest_is_left(&lab);
}
