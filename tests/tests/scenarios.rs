//! The behaviour of Services, scenario by scenario (`tests/services`), the same for every dataplane.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use sluice_lab::{Datastore, Lab, Options, ProxyMode};
use sluice_tests::scenario::{self, Stage};
use sluice_tests::switch_proxy;

/// All scenarios, or those whose names contain what `SLUICE_SCENARIOS` says, in one lab.
fn play(lab: Lab) {
    let wanted = std::env::var("SLUICE_SCENARIOS").unwrap_or_default();
    let scenarios = scenario::all().unwrap();
    let stage = Stage::new(lab).unwrap();
    let mut failures = Vec::new();
    let mut played = 0;
    for (name, scenario) in scenarios.iter().filter(|(name, _)| name.contains(&wanted)) {
        let began = std::time::Instant::now();
        played += 1;
        let result = stage.play(scenario);
        let milliseconds = began.elapsed().as_millis();
        match result {
            Ok(()) => println!("{name}: ok, {milliseconds} ms"),
            Err(error) => {
                println!("{name}: FAILED");
                failures.push(format!("{name}: {error:#}"));
            }
        }
    }
    assert!(played > 0, "no scenario's name contains {wanted:?}");
    assert!(
        failures.is_empty(),
        "{} of {played} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

fn lab_of(proxy: ProxyMode) -> Lab {
    Lab::up(Options {
        proxy,
        ..Options::default()
    })
    .unwrap()
}

#[test]
fn ebpf() {
    play(lab_of(ProxyMode::Ebpf));
}

#[test]
fn nftables() {
    play(lab_of(ProxyMode::Nftables));
}

#[test]
fn iptables() {
    play(lab_of(ProxyMode::Iptables));
}

/// D1: what a real API server and its controllers make of the same objects.
#[test]
fn from_a_kubernetes_api() {
    let lab = Lab::up(Options {
        datastore: Datastore::Kubernetes,
        ..Options::default()
    });
    play(lab.unwrap());
}

/// D3: from an etcd of one's own, where endpoints come from pods.
#[test]
fn from_etcd() {
    let lab = Lab::up(Options {
        datastore: Datastore::Etcd,
        ..Options::default()
    });
    play(lab.unwrap());
}

/// S24: the third by the legacy flavour of iptables.
#[test]
fn a_node_of_each() {
    let lab = lab_of(ProxyMode::Ebpf);
    for tool in ["iptables-legacy", "ip6tables-legacy"] {
        // That makes the table: it is in use then.
        lab.node("node3").run(&[tool, "-t", "nat", "-S"]).unwrap();
    }
    for (node, mode) in [("node2", "nftables"), ("node3", "iptables")] {
        switch_proxy(&lab, node, "ebpf", mode).unwrap();
    }
    play(lab);
}
