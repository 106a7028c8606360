//! What nftables and iptables have to do with a running daemon beyond the scenarios: others that take their rules away, and many
//! changes at once.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sluice_lab::{Lab, Options, ProxyMode, wait_until};
use sluice_tests::asking::{Asker, Kept};
use sluice_tests::{PATIENCE, service_entries};

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIPs: [10.96.1.1]
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
";

fn lab(proxy: ProxyMode) -> Lab {
    Lab::up(Options {
        nodes: 1,
        proxy,
        ..Options::default()
    })
    .unwrap()
}

/// Half of the time after which a daemon reads the kernel back though it heard nothing of it.
const BEFORE_ANY_AUDIT: Duration = Duration::from_secs(15);

/// K4 S18: and whoever was connected notices nothing.
#[test]
fn a_table_that_is_deleted_under_load_is_back_before_anybody_looks() {
    let lab = lab(ProxyMode::Nftables);
    let serve = ["sluice-lab", "talk-serve", "web", "8080"];
    lab.pod_add("node1", "web", &[("app", "web")], &serve).unwrap();
    lab.pod_add("node1", "asker", &[], &[]).unwrap();
    lab.apply_text(SERVICE).unwrap();
    let node = lab.node("node1");
    let asker = Asker {
        from: lab.pod("asker").unwrap(),
        files: node.clone(),
        at: "10.96.1.1:80".to_owned(),
    };
    let serves = |asker: &Asker<'_>| Ok(asker.ask(20)?.lines().all(|line| line.starts_with("web ")));
    wait_until("the Service is served", PATIENCE, || serves(&asker)).unwrap();
    let drift = || {
        lab.ctl_json("node1", &["status"])
            .map(|status| status["driftRepaired"].as_u64())
    };
    let before = drift().unwrap().unwrap();

    let script = "while :; do sluice-lab talk-ask --patience 1 TCP 10.96.1.1:80 5 1; done";
    let load = asker.from.spawn(&["busybox", "sh", "-c", script]).unwrap();
    let askers = [asker];
    let kept = Kept::start(&askers).unwrap();
    // It has begun: one that begins while there is no table is nobody's.
    kept.go_on().unwrap();
    for round in 1..=3 {
        node.run(&["nft", "delete", "table", "inet", "sluice-services"])
            .unwrap();
        let began = Instant::now();
        wait_until("the table is back, and full", BEFORE_ANY_AUDIT, || {
            let table = node.sh("nft list table inet sluice-services 2>&1; true")?;
            Ok(table.contains("10.96.1.1"))
        })
        .unwrap();
        eprintln!("back after {:?}", began.elapsed());
        wait_until("the Service is served", PATIENCE, || serves(&askers[0])).unwrap();
        kept.go_on().unwrap();
        assert!(drift().unwrap().unwrap() >= before + round);
    }
    drop(load);
}

/// K4 N8: whatever translates Services.
#[test]
fn rules_of_egress_that_are_flushed_are_back_before_anybody_looks() {
    for proxy in [ProxyMode::Nftables, ProxyMode::Ebpf] {
        let lab = lab(proxy);
        let node = lab.node("node1");
        let masquerades = || {
            let table = node.sh("nft list table inet sluice-egress 2>&1; true")?;
            Ok(table.contains("masquerade fully-random"))
        };
        wait_until("what leaves is masqueraded", PATIENCE, masquerades).unwrap();
        for what in [
            "flush chain inet sluice-egress postrouting",
            "delete table inet sluice-egress",
        ] {
            node.sh(&format!("nft {what}")).unwrap();
            wait_until("the rules of egress are back", BEFORE_ANY_AUDIT, masquerades).unwrap();
        }
    }
}

/// S18
#[test]
fn a_burst_of_changes_is_one_sync_of_iptables() {
    const MANY: usize = 100;
    let lab = lab(ProxyMode::Iptables);
    let manifests = |endpoint: u8| {
        let mut text = String::new();
        for number in 1..=MANY {
            let _ = write!(
                text,
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\n\
                 spec: {{clusterIPs: [10.96.2.{number}], ports: [{{port: 80}}]}}\n\
                 ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
                 metadata: {{name: s{number}, labels: {{kubernetes.io/service-name: s{number}}}}}\n\
                 ports: [{{port: 80}}]\nendpoints: [{{addresses: [198.51.100.{endpoint}]}}]\n"
            );
        }
        text
    };
    let is_programmed = |endpoint: u8| -> Result<bool> {
        let entries = service_entries(&lab, "node1", &format!("s{MANY}"))?;
        Ok(format!("{entries:?}").contains(&format!("198.51.100.{endpoint}:80")))
    };
    let syncs = || -> Result<u64> {
        let status = lab.ctl_json("node1", &["status"])?;
        status["proxy"]["syncs"].as_u64().context("no number")
    };
    lab.apply_text(&manifests(1)).unwrap();
    wait_until("the Services are programmed", PATIENCE, || is_programmed(1)).unwrap();
    let before = syncs().unwrap();
    lab.apply_text(&manifests(2)).unwrap();
    wait_until("all have another endpoint", PATIENCE, || is_programmed(2)).unwrap();
    assert_eq!(syncs().unwrap() - before, 1);
}
