//! A real etcd of three members, and all that happens to one: no update is missed, no pod CIDR is given twice, and what the nodes have in
//! the kernel stays until something better is known.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use serde_json::Value;
use sluice_lab::{Datastore, Lab, Options, wait_until};
use sluice_tests::PATIENCE;
use sluice_tests::datastore::{
    known, reboot, service, wait_for_no_problem_with, wait_for_problem, wait_for_services,
};

/// A member that is paused, or a way to it that is cut, is found by probes of the connection.
const PATIENCE_WITH_SILENCE: Duration = Duration::from_secs(60);

fn lab(nodes: u8) -> Lab {
    Lab::up(Options {
        nodes,
        datastore: Datastore::Etcd,
        ..Options::default()
    })
    .unwrap()
}

/// Has a node's daemon start with more keys below `datastore.etcd`.
fn restart_with(lab: &Lab, node: &str, keys: &str) {
    lab.stop_sluiced(node).unwrap();
    lab.node(node)
        .sh(&format!(
            "sed -i 's#etcd: {{ endpoints#etcd: {{ {keys}, endpoints#' /etc/sluice/config.yaml && sluiced --check-config"
        ))
        .unwrap();
    lab.start_sluiced(node).unwrap();
}

/// The pod CIDRs of a node, as etcd has them.
fn pod_cidrs(lab: &Lab, node: &str) -> anyhow::Result<Vec<String>> {
    let text = lab.etcdctl(&format!("get --print-value-only /sluice/nodes/{node}"))?;
    let node: Value = serde_json::from_str(&text).context("the Node")?;
    let cidrs = node["spec"]["podCIDRs"].as_array().into_iter().flatten();
    Ok(cidrs.filter_map(|cidr| Some(cidr.as_str()?.to_owned())).collect())
}

/// All claims, as `CIDR node`.
fn claims(lab: &Lab) -> Vec<String> {
    let text = lab.etcdctl("get --prefix /sluice/podcidrs/").unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    lines
        .chunks(2)
        .map(|pair| {
            let key = pair[0].trim_start_matches("/sluice/podcidrs/");
            format!("{} {}", key.replacen('-', "/", 1), pair[1])
        })
        .collect()
}

/// D3 O1: a node registers, objects are written and read with `sluicectl`, and a Node that is deleted comes back with what it had.
#[test]
fn nodes_register_and_objects_are_written_read_and_deleted() {
    let lab = lab(2);
    let operator = |words: &str| {
        let command = format!("sluicectl --config /etc/sluice/operator.yaml {words}");
        lab.node("etcd1").sh(&command)
    };
    lab.pod_add("node1", "web", &[("app", "web")], &[]).unwrap();
    lab.apply_text(&service("one", "10.96.1.1")).unwrap();
    wait_for_services(&lab, "node2", &["one"], PATIENCE);
    wait_until("the Service answers", PATIENCE, || {
        Ok(lab.node("node2").get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();
    assert_eq!(
        claims(&lab),
        [
            "10.244.1.0/24 node1",
            "10.244.2.0/24 node2",
            "fd00:244:0:1::/64 node1",
            "fd00:244:0:2::/64 node2"
        ]
    );
    let shown = operator("get services").unwrap();
    assert!(
        shown.contains("default") && shown.contains("one") && shown.contains("10.96.1.1"),
        "{shown}"
    );
    let shown = operator("get pods web -o json").unwrap();
    assert!(shown.contains("\"nodeName\": \"node1\""), "{shown}");
    let shown = operator("get nodes").unwrap();
    assert!(
        shown.contains("node2") && shown.contains("172.30.0.12"),
        "{shown}"
    );
    for (words, wanted) in [
        ("get service two", "there is no Service called two"),
        ("get servces", "did you mean \\\"services\\\"?"),
        ("apply -f /etc/hostname", "/etc/hostname: line 1"),
    ] {
        let error = format!("{:#}", operator(words).unwrap_err());
        assert!(error.contains(&wanted.replace("\\\"", "\"")), "{words}: {error}");
    }
    // What is not understood is refused before it is written, and what is of no use to Sluice is left out.
    let wrong = service("two", "10.96.1.2").replace("spec:", "sepc:");
    let error = format!("{:#}", lab.apply_text(&wrong).unwrap_err());
    assert!(error.contains("unknown key \"sepc\""), "{error}");

    // The way to its pods is there again at once: it holds its claims while it lives.
    assert!(lab.delete_object("Node", "node1").unwrap());
    wait_until("node1 has registered again", PATIENCE, || {
        Ok(pod_cidrs(&lab, "node1")? == ["10.244.1.0/24", "fd00:244:0:1::/64"])
    })
    .unwrap();
    wait_until("the Service answers", PATIENCE, || {
        Ok(lab.node("node2").get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();
    assert!(
        operator("delete service one")
            .unwrap()
            .contains("service/one deleted")
    );
    wait_for_services(&lab, "node2", &[], PATIENCE);
    assert!(operator("delete service one").is_err());
}

/// D3: the leader killed, the majority lost and back, all members killed and the history compacted: nothing goes, nothing is missed.
#[test]
fn members_that_go_and_come_back_take_nothing_with_them() {
    let lab = lab(2);
    lab.pod_add("node1", "web", &[("app", "web")], &[]).unwrap();
    let asker = lab.node("node2");
    lab.apply_text(&service("one", "10.96.1.1")).unwrap();
    lab.apply_text(&service("two", "10.96.1.2")).unwrap();
    wait_for_services(&lab, "node2", &["one", "two"], PATIENCE);

    let killed = lab.etcd_leader().unwrap();
    lab.signal_etcd(killed, Signal::SIGKILL).unwrap();
    // Another one has to lead first.
    wait_until("objects can be written", PATIENCE_WITH_SILENCE, || {
        lab.apply_text(&service("three", "10.96.1.3")).map(|()| true)
    })
    .unwrap();
    wait_for_services(&lab, "node2", &["one", "three", "two"], PATIENCE_WITH_SILENCE);

    // Without a majority nothing can be written or known, and everything goes on.
    let mut second = killed;
    wait_until("another member leads", PATIENCE_WITH_SILENCE, || {
        second = lab.etcd_leader()?;
        Ok(second != killed)
    })
    .unwrap();
    lab.signal_etcd(second, Signal::SIGKILL).unwrap();
    wait_for_problem(&lab, "node2", "etcd", PATIENCE_WITH_SILENCE);
    assert_eq!(known(&lab, "node2").unwrap(), ["one", "three", "two"]);
    assert_eq!(asker.get("10.96.1.1", 80, "").unwrap(), "web");
    for number in [killed, second] {
        lab.start_etcd(number).unwrap();
    }
    wait_for_no_problem_with(&lab, "node2", "etcd", PATIENCE_WITH_SILENCE);
    wait_until("objects can be written", PATIENCE_WITH_SILENCE, || {
        lab.apply_text(&service("four", "10.96.1.4")).map(|()| true)
    })
    .unwrap();
    wait_for_services(&lab, "node2", &["four", "one", "three", "two"], PATIENCE);

    // What the daemon saw last is compacted away while it does not listen, and what it watched with is gone.
    lab.kill_sluiced("node2", Signal::SIGSTOP).unwrap();
    assert!(lab.delete_object("Service", "one").unwrap());
    lab.apply_text(&service("five", "10.96.1.5")).unwrap();
    let read: Value = serde_json::from_str(&lab.etcdctl("get / -w json").unwrap()).unwrap();
    let revision = read["header"]["revision"].as_i64().unwrap();
    lab.etcdctl(&format!("compact {revision}")).unwrap();
    for number in 1..=3 {
        lab.signal_etcd(number, Signal::SIGKILL).unwrap();
    }
    for number in 1..=3 {
        lab.start_etcd(number).unwrap();
    }
    lab.kill_sluiced("node2", Signal::SIGCONT).unwrap();
    wait_for_services(
        &lab,
        "node2",
        &["five", "four", "three", "two"],
        PATIENCE_WITH_SILENCE,
    );
    wait_for_no_problem_with(&lab, "node2", "etcd", PATIENCE_WITH_SILENCE);
    assert_eq!(claims(&lab).len(), 4);
}

/// D3: a node that is cut off keeps what it has, and so do the others; it catches up.
#[test]
fn a_node_that_is_cut_off_from_etcd_goes_on_and_catches_up() {
    let lab = lab(2);
    lab.pod_add("node1", "web", &[("app", "web")], &[]).unwrap();
    lab.apply_text(&service("one", "10.96.1.1")).unwrap();
    let node = lab.node("node2");
    wait_until("the Service answers", PATIENCE, || {
        Ok(node.get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();
    node.sh("iptables -I OUTPUT -p tcp --dport 2379 -j DROP; iptables -I INPUT -p tcp --sport 2379 -j DROP")
        .unwrap();
    lab.apply_text(&service("two", "10.96.1.2")).unwrap();
    wait_for_problem(&lab, "node2", "etcd", PATIENCE_WITH_SILENCE);
    assert_eq!(known(&lab, "node2").unwrap(), ["one"]);
    assert_eq!(node.get("10.96.1.1", 80, "").unwrap(), "web");
    // It may wire pods: its claims stand for as long as their lease, which is a day.
    let pod = lab.pod_add("node2", "late", &[], &[]).unwrap();
    assert_eq!(
        lab.node("node1")
            .get(&pod.addresses[0].to_string(), 8080, "")
            .unwrap(),
        "late"
    );
    node.sh("iptables -F").unwrap();
    wait_for_services(&lab, "node2", &["one", "two"], PATIENCE_WITH_SILENCE);
    wait_for_no_problem_with(&lab, "node2", "etcd", PATIENCE);
}

/// D3: a daemon that does not run for longer than its lease lasts uses nothing that another was given meanwhile.
#[test]
fn a_claim_is_confirmed_before_it_is_used_again() {
    let lab = lab(2);
    restart_with(&lab, "node2", "leaseSeconds: 6");
    wait_until("node2 is registered under the shorter lease", PATIENCE, || {
        let leases = lab.etcdctl("lease list")?;
        let granted = leases.lines().filter(|line| line.len() == 16).map(|lease| {
            lab.etcdctl(&format!("lease timetolive {lease}"))
                .map(|told| told.contains("granted with TTL(6s)"))
        });
        Ok(granted.collect::<anyhow::Result<Vec<_>>>()?.contains(&true))
    })
    .unwrap();
    assert_eq!(
        pod_cidrs(&lab, "node2").unwrap(),
        ["10.244.2.0/24", "fd00:244:0:2::/64"]
    );

    lab.kill_sluiced("node2", Signal::SIGSTOP).unwrap();
    wait_until("its lease has run out", PATIENCE, || Ok(claims(&lab).len() == 2)).unwrap();
    lab.etcdctl("put /sluice/podcidrs/10.244.2.0-24 node9").unwrap();
    lab.kill_sluiced("node2", Signal::SIGCONT).unwrap();
    wait_until("node2 is registered again", PATIENCE_WITH_SILENCE, || {
        Ok(pod_cidrs(&lab, "node2")?.len() == 2)
    })
    .unwrap();
    let cidrs = pod_cidrs(&lab, "node2").unwrap();
    assert_ne!(cidrs[0], "10.244.2.0/24");
    assert_eq!(cidrs[1], "fd00:244:0:2::/64", "nobody took that");
    wait_for_problem(
        &lab,
        "node2",
        "node node9 was given 10.244.2.0/24 after the lease of this node had run out",
        PATIENCE,
    );
    let pod = lab.pod_add("node2", "pod", &[], &[]).unwrap();
    let third = cidrs[0].split('.').nth(2).unwrap();
    assert!(
        pod.addresses[0]
            .to_string()
            .starts_with(&format!("10.244.{third}.")),
        "{:?} of {cidrs:?}",
        pod.addresses
    );
    lab.pod_rm("pod").unwrap();

    // Cut off for longer than the lease lasts: it gives no address any more, and says why.
    let node = lab.node("node2");
    node.sh("iptables -I OUTPUT -p tcp --dport 2379 -j DROP; iptables -I INPUT -p tcp --sport 2379 -j DROP")
        .unwrap();
    wait_until(
        "pods are not wired any more",
        PATIENCE_WITH_SILENCE,
        || match lab.pod_add("node2", "early", &[], &[]) {
            Ok(_) => {
                lab.pod_rm("early")?;
                Ok(false)
            }
            Err(error) => {
                let told = format!("{error:#}");
                if !told.contains("etcd to confirm this node's pod CIDRs") {
                    bail!("{told}");
                }
                Ok(true)
            }
        },
    )
    .unwrap();
    node.sh("iptables -F").unwrap();
    wait_until("pods are wired again", PATIENCE_WITH_SILENCE, || {
        Ok(lab.pod_add("node2", "again", &[], &[]).is_ok())
    })
    .unwrap();
}

/// D3: two hosts of one name are told apart, and the second waits.
#[test]
fn a_second_host_with_a_nodes_name_is_refused() {
    let lab = lab(2);
    let second = lab.node("node2");
    lab.stop_sluiced("node2").unwrap();
    second
        .sh("sed -i 's/^nodeName: node2/nodeName: node1/' /etc/sluice/config.yaml")
        .unwrap();
    lab.start_sluiced("node2").unwrap();
    wait_for_problem(
        &lab,
        "node2",
        "another host is node node1, at 172.30.0.11",
        PATIENCE,
    );
    assert!(lab.pod_add("node2", "pod", &[], &[]).is_err());
    let before = claims(&lab);
    assert!(before.contains(&"10.244.1.0/24 node1".to_owned()), "{before:?}");
    let first = lab.pod_add("node1", "first", &[], &[]).unwrap();
    assert!(
        first.addresses[0].to_string().starts_with("10.244.1."),
        "{first:?}"
    );
}

/// D3 O1: what is wrong with the way to etcd is one clear line.
#[test]
fn a_wrong_password_a_wrong_authority_and_a_missing_right_are_named() {
    let lab = lab(1);
    let node = lab.node("node1");
    let change = |command: &str| {
        lab.stop_sluiced("node1").unwrap();
        node.sh(command).unwrap();
        lab.start_sluiced("node1").unwrap();
    };
    change("cp /etc/sluice/etcd-password /etc/sluice/good && printf wrong > /etc/sluice/etcd-password");
    wait_for_problem(
        &lab,
        "node1",
        "logging in as sluice with the password in /etc/sluice/etcd-password: authentication failed",
        PATIENCE,
    );
    node.sh("cp /etc/sluice/good /etc/sluice/etcd-password").unwrap();
    wait_for_no_problem_with(&lab, "node1", "etcd", PATIENCE_WITH_SILENCE);

    let other = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout /dev/null -subj /CN=other";
    change(&format!(
        "cp /etc/sluice/etcd-ca.crt /etc/sluice/good.crt && {other} -out /etc/sluice/etcd-ca.crt 2>/dev/null"
    ));
    wait_for_problem(&lab, "node1", "invalid peer certificate: UnknownIssuer", PATIENCE);
    node.sh("cp /etc/sluice/good.crt /etc/sluice/etcd-ca.crt")
        .unwrap();
    wait_for_no_problem_with(&lab, "node1", "etcd", PATIENCE_WITH_SILENCE);

    lab.etcdctl("role revoke-permission sluice --prefix=true /sluice/")
        .unwrap();
    change("true");
    wait_for_problem(
        &lab,
        "node1",
        "reading the claims below /sluice/: permission denied",
        PATIENCE,
    );
    lab.etcdctl("role grant-permission sluice --prefix=true readwrite /sluice/")
        .unwrap();
    wait_for_no_problem_with(&lab, "node1", "etcd", PATIENCE_WITH_SILENCE);
}

/// D2 D3: after a reboot while no member can be reached.
#[test]
fn a_node_without_etcd_serves_what_it_knew() {
    let lab = lab(2);
    lab.pod_add("node1", "web", &[("app", "web")], &[]).unwrap();
    lab.apply_text(&service("one", "10.96.1.1")).unwrap();
    let node = lab.node("node2");
    wait_until("the Service answers", PATIENCE, || {
        Ok(node.get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();
    wait_until("the state is saved", PATIENCE, || {
        let saved = node.run(&["cat", "/var/lib/sluice/cluster.jsonl"])?;
        Ok(saved.contains("10.96.1.1") && saved.contains("10.244.1.") && saved.contains("\"web\""))
    })
    .unwrap();
    lab.stop_sluiced("node2").unwrap();
    reboot(&node);
    for number in 1..=3 {
        lab.signal_etcd(number, Signal::SIGSTOP).unwrap();
    }
    lab.start_sluiced("node2").unwrap();
    wait_for_problem(&lab, "node2", "is served", PATIENCE_WITH_SILENCE);
    wait_until("the Service answers", PATIENCE, || {
        Ok(node.get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();
    // Its claims are good for a day yet, so nobody else can have them.
    wait_until("pods can be wired", PATIENCE, || {
        Ok(node.sh("test -e /etc/cni/net.d/10-sluice.conflist").is_ok())
    })
    .unwrap();
    let status = lab.ctl_json("node2", &["status"]).unwrap();
    assert_eq!(status["awaiting"].as_array().map(Vec::len), Some(0), "{status:#}");

    // Rebooted long after: then they may be another's.
    lab.stop_sluiced("node2").unwrap();
    reboot(&node);
    node.sh("sed -i 's/\"heldUntil\":\"[^\"]*\"/\"heldUntil\":\"2020-01-01T00:00:00Z\"/' /var/lib/sluice/etcd.json")
        .unwrap();
    lab.start_sluiced("node2").unwrap();
    wait_until(
        "pods are not wired before etcd answers",
        PATIENCE_WITH_SILENCE,
        || {
            let status = lab.ctl_json("node2", &["status"])?;
            Ok(status["awaiting"]
                .to_string()
                .contains("etcd to confirm this node's pod CIDRs"))
        },
    )
    .unwrap();
    wait_until("the Service answers all the same", PATIENCE, || {
        Ok(node.get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();
    for number in 1..=3 {
        lab.signal_etcd(number, Signal::SIGCONT).unwrap();
    }
    wait_for_no_problem_with(&lab, "node2", "etcd", PATIENCE_WITH_SILENCE);
    sleep(Duration::from_millis(200));
    let status = lab.ctl_json("node2", &["status"]).unwrap();
    assert_eq!(status["awaiting"].as_array().map(Vec::len), Some(0), "{status:#}");
}
