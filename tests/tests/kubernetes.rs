//! A real API server, and all that happens to one: what the nodes know is never wrong for longer than it has to be, and never
//! less than it was.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use anyhow::bail;
use nix::sys::signal::Signal;
use sluice_lab::control_plane::Release;
use sluice_lab::{Datastore, Lab, Options, wait_until};
use sluice_tests::PATIENCE;
use sluice_tests::datastore::{
    known, reboot, service, wait_for_no_problem_with, wait_for_problem, wait_for_services,
};

/// A paused server, or a way to it that is cut, is found by probes of the connection.
const PATIENCE_WITH_SILENCE: Duration = Duration::from_secs(60);

fn lab() -> Lab {
    Lab::up(Options {
        nodes: 2,
        datastore: Datastore::Kubernetes,
        ..Options::default()
    })
    .unwrap()
}

fn wait_for_no_problem(lab: &Lab, node: &str, patience: Duration) {
    wait_for_no_problem_with(lab, node, "API server", patience);
}

/// Has the node's daemon ask these servers, in their order.
fn ask_servers(lab: &Lab, node: &str, numbers: &[u16]) {
    let servers: Vec<_> = numbers
        .iter()
        .map(|number| lab.api_server(*number).unwrap())
        .collect();
    let servers = servers.join(",");
    lab.stop_sluiced(node).unwrap();
    lab.node(node)
        .sh(&format!(
            "sed -i 's#kubernetes: {{ kubeconfig: \\([^ ,]*\\).*#kubernetes: {{ kubeconfig: \\1, apiServer: \"{servers}\" }}#' \
             /etc/sluice/config.yaml && sluiced --check-config"
        ))
        .unwrap();
    lab.start_sluiced(node).unwrap();
}

/// Makes more Services than one page of a list has, and gives their names.
fn make_many(lab: &Lab) -> Vec<String> {
    let names: Vec<String> = (0..300).map(|number| format!("s{number:03}")).collect();
    let address = |number: usize| format!("10.96.{}.{}", 2 + number / 250, number % 250);
    let many: Vec<String> = names
        .iter()
        .zip(0..)
        .map(|(name, number)| service(name, &address(number)))
        .collect();
    lab.apply_text(&many.join("---\n")).unwrap();
    names
}

fn asked(lab: &Lab, node: &str) -> String {
    let status = lab.ctl_json(node, &["status"]).unwrap();
    status["datastore"]["source"].as_str().unwrap().to_owned()
}

/// D1: killed, and started again; and what changed while the daemon did not listen, without a word about what is gone.
#[test]
fn a_server_that_goes_and_comes_back_takes_nothing_with_it() {
    let lab = lab();
    lab.pod_add("node1", "web", &[("app", "web")], &[]).unwrap();
    let asker = lab.node("node2");
    lab.apply_text(&service("one", "10.96.1.1")).unwrap();
    lab.apply_text(&service("two", "10.96.1.2")).unwrap();
    wait_for_services(&lab, "node2", &["one", "two"], PATIENCE);
    lab.signal_api_server(1, Signal::SIGKILL).unwrap();
    wait_for_problem(&lab, "node2", "Connection refused", PATIENCE);
    assert_eq!(known(&lab, "node2").unwrap(), ["one", "two"]);
    assert_eq!(asker.get("10.96.1.1", 80, "").unwrap(), "web");
    lab.start_api_server(1, Release::Usual, &[]).unwrap();
    wait_for_no_problem(&lab, "node2", PATIENCE_WITH_SILENCE);
    lab.apply_text(&service("three", "10.96.1.3")).unwrap();
    wait_for_services(&lab, "node2", &["one", "three", "two"], PATIENCE);

    // A server that has just started knows no history: what the daemon saw last is too old for it (410).
    lab.kill_sluiced("node2", Signal::SIGSTOP).unwrap();
    assert!(lab.delete_object("Service", "one").unwrap());
    lab.apply_text(&service("four", "10.96.1.4")).unwrap();
    lab.signal_api_server(1, Signal::SIGKILL).unwrap();
    lab.start_api_server(1, Release::Usual, &[]).unwrap();
    lab.kill_sluiced("node2", Signal::SIGCONT).unwrap();
    wait_for_services(&lab, "node2", &["four", "three", "two"], PATIENCE_WITH_SILENCE);
}

/// D1: of two servers the other takes over, be the first killed, paused, or cut off without a word.
#[test]
fn another_server_takes_over_and_a_list_in_pages_is_as_good() {
    let lab = lab();
    // The second one does as older releases do: it cannot stream a list.
    lab.start_api_server(2, Release::Usual, &["--feature-gates=WatchList=false"])
        .unwrap();
    let names = make_many(&lab);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    ask_servers(&lab, "node1", &[2, 1]);
    wait_for_services(&lab, "node1", &names, PATIENCE);
    assert!(
        asked(&lab, "node1").ends_with(":6444"),
        "{}",
        asked(&lab, "node1")
    );

    lab.signal_api_server(2, Signal::SIGKILL).unwrap();
    assert!(lab.delete_object("Service", "s000").unwrap());
    wait_for_services(&lab, "node1", &names[1..], PATIENCE);
    assert!(
        asked(&lab, "node1").ends_with(":6443"),
        "{}",
        asked(&lab, "node1")
    );

    lab.start_api_server(2, Release::Usual, &[]).unwrap();
    ask_servers(&lab, "node1", &[2, 1]);
    wait_for_services(&lab, "node1", &names[1..], PATIENCE);
    assert!(asked(&lab, "node1").ends_with(":6444"));
    lab.signal_api_server(2, Signal::SIGSTOP).unwrap();
    assert!(lab.delete_object("Service", "s001").unwrap());
    wait_for_services(&lab, "node1", &names[2..], PATIENCE_WITH_SILENCE);
    assert!(asked(&lab, "node1").ends_with(":6443"));
    lab.signal_api_server(2, Signal::SIGCONT).unwrap();

    ask_servers(&lab, "node1", &[2, 1]);
    wait_for_services(&lab, "node1", &names[2..], PATIENCE);
    assert!(asked(&lab, "node1").ends_with(":6444"));
    let cut = "iptables -I INPUT -p tcp --dport 6444 -j DROP; iptables -I OUTPUT -p tcp --sport 6444 -j DROP";
    lab.node("control").sh(cut).unwrap();
    assert!(lab.delete_object("Service", "s002").unwrap());
    wait_for_services(&lab, "node1", &names[3..], PATIENCE_WITH_SILENCE);
    assert!(asked(&lab, "node1").ends_with(":6443"));

    lab.start_api_server(3, Release::Newest, &[]).unwrap();
    ask_servers(&lab, "node1", &[3, 1]);
    wait_for_services(&lab, "node1", &names[3..], PATIENCE);
    assert!(lab.delete_object("Service", "s003").unwrap());
    wait_for_services(&lab, "node1", &names[4..], PATIENCE);
    assert!(asked(&lab, "node1").ends_with(":6445"));
}

/// D1: what a list was to go on from is forgotten between two of its pages (410), so it is begun again.
#[test]
fn a_list_that_cannot_go_on_is_begun_again() {
    let lab = lab();
    let names = make_many(&lab);
    // As older releases do: pages, and each of them from etcd.
    lab.start_api_server(
        2,
        Release::Usual,
        &["--feature-gates=WatchList=false,ListFromCacheSnapshot=false"],
    )
    .unwrap();
    let control = lab.node("control");
    let sent = || -> u64 {
        let counter = control
            .run(&["cat", "/sys/class/net/eth0/statistics/tx_bytes"])
            .unwrap();
        counter.trim().parse().unwrap()
    };
    let slow = "tc qdisc add dev eth0 root tbf rate 512kbit burst 8kb latency 400ms";
    control.run(&slow.split(' ').collect::<Vec<_>>()).unwrap();
    ask_servers(&lab, "node1", &[2]);
    // The first pages are under way by then, and not over: they are more than twice that long.
    let before = sent();
    wait_until("the first page is under way", PATIENCE_WITH_SILENCE, || {
        Ok(sent() > before + 60_000)
    })
    .unwrap();
    lab.apply_text(&service("late", "10.96.9.9")).unwrap();
    lab.compact_behind_api().unwrap();
    control
        .run(&["tc", "qdisc", "del", "dev", "eth0", "root"])
        .unwrap();
    let mut wanted: Vec<&str> = names.iter().map(String::as_str).collect();
    wanted.insert(0, "late");
    wait_for_services(&lab, "node1", &wanted, PATIENCE_WITH_SILENCE);
    wait_for_no_problem(&lab, "node1", PATIENCE_WITH_SILENCE);
    let log = lab.node("node1").run(&["cat", "/var/log/sluiced.log"]).unwrap();
    assert!(
        log.contains("The provided continue parameter is too old"),
        "no list was broken off:\n{log}"
    );
}

/// D1: a token that expires, and is renewed too late.
#[test]
fn a_token_that_expired_is_asked_for_again() {
    let lab = lab();
    lab.stop_sluiced("node1").unwrap();
    lab.renew_token("node1", Some(Duration::from_secs(15))).unwrap();
    lab.start_sluiced("node1").unwrap();
    lab.apply_text(&service("one", "10.96.1.1")).unwrap();
    wait_for_services(&lab, "node1", &["one"], PATIENCE);
    // While it watches nobody asks for the token.
    std::thread::sleep(Duration::from_secs(16));
    lab.signal_api_server(1, Signal::SIGKILL).unwrap();
    lab.start_api_server(1, Release::Usual, &[]).unwrap();
    wait_for_problem(&lab, "node1", "Unauthorized", PATIENCE_WITH_SILENCE);
    lab.renew_token("node1", None).unwrap();
    lab.apply_text(&service("two", "10.96.1.2")).unwrap();
    wait_for_services(&lab, "node1", &["one", "two"], PATIENCE_WITH_SILENCE);
    wait_for_no_problem(&lab, "node1", PATIENCE_WITH_SILENCE);
}

/// D1: a way that is slow, and one that comes and goes.
#[test]
fn a_poor_way_to_the_server_loses_nothing() {
    let lab = lab();
    let control = lab.node("control");
    let slow = "tc qdisc add dev eth0 root tbf rate 256kbit burst 8kb latency 400ms";
    control.run(&slow.split(' ').collect::<Vec<_>>()).unwrap();
    let mut wanted = Vec::new();
    let names: Vec<String> = (0..12).map(|number| format!("s{number:02}")).collect();
    for (number, name) in names.iter().enumerate() {
        let cut = number % 2 == 0;
        if cut {
            let rules = "iptables -I INPUT -s 172.30.0.11 -j DROP; iptables -I OUTPUT -d 172.30.0.11 -j DROP";
            control.sh(rules).unwrap();
        }
        lab.apply_text(&service(name, &format!("10.96.1.{number}")))
            .unwrap();
        wanted.push(name.as_str());
        if number % 4 == 3 {
            assert!(lab.delete_object("Service", name).unwrap());
            wanted.pop();
        }
        if !cut {
            control.sh("iptables -F").unwrap();
        }
        std::thread::sleep(Duration::from_millis(700));
    }
    wait_for_services(&lab, "node1", &wanted, PATIENCE_WITH_SILENCE);
    lab.stop_sluiced("node1").unwrap();
    lab.start_sluiced("node1").unwrap();
    wait_for_services(&lab, "node1", &wanted, PATIENCE_WITH_SILENCE);
}

/// D2: after a reboot while no server can be reached.
#[test]
fn a_node_without_a_server_serves_what_it_knew_and_catches_up() {
    let lab = lab();
    lab.pod_add("node1", "web", &[("app", "web")], &[]).unwrap();
    for (name, address) in [("one", "10.96.1.1"), ("two", "10.96.1.2")] {
        lab.apply_text(&service(name, address)).unwrap();
    }
    let node = lab.node("node2");
    wait_until("the Services answer", PATIENCE, || {
        Ok(node.get("10.96.1.1", 80, "")? == "web" && node.get("10.96.1.2", 80, "")? == "web")
    })
    .unwrap();
    wait_until("the state is saved", PATIENCE, || {
        let saved = node.run(&["cat", "/var/lib/sluice/cluster.jsonl"])?;
        Ok(saved.contains("10.96.1.2") && saved.matches("10.244.1.").count() > 2)
    })
    .unwrap();
    lab.stop_sluiced("node2").unwrap();
    reboot(&node);
    assert!(node.get("10.96.1.1", 80, "").is_err());
    assert!(lab.delete_object("Service", "two").unwrap());
    lab.signal_api_server(1, Signal::SIGKILL).unwrap();
    lab.start_sluiced("node2").unwrap();
    wait_for_problem(&lab, "node2", "is served", PATIENCE_WITH_SILENCE);
    wait_until("the Service answers", PATIENCE, || {
        Ok(node.get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();
    assert_eq!(known(&lab, "node2").unwrap(), ["one", "two"]);
    wait_until("pods can be wired", PATIENCE, || {
        Ok(node.sh("test -e /etc/cni/net.d/10-sluice.conflist").is_ok())
    })
    .unwrap();
    lab.start_api_server(1, Release::Usual, &[]).unwrap();
    wait_for_services(&lab, "node2", &["one"], PATIENCE_WITH_SILENCE);
    wait_for_no_problem(&lab, "node2", PATIENCE);
    assert_eq!(node.get("10.96.1.1", 80, "").unwrap(), "web");
}

/// D1 K2: what is refused is named, verb and resource, and over when it is allowed; and so is a token that is no good.
#[test]
fn who_may_not_read_says_what_and_who_is_not_known_asks_again() {
    let lab = lab();
    lab.pod_add("node2", "web", &[("app", "web")], &[]).unwrap();
    lab.apply_text(&service("one", "10.96.1.1")).unwrap();
    let node = lab.node("node1");
    wait_until("the Service answers", PATIENCE, || {
        Ok(node.get("10.96.1.1", 80, "")? == "web")
    })
    .unwrap();
    let role = include_str!("../../deploy/rbac.yaml");
    let less = role.replace("resources: [nodes, services]", "resources: [nodes]");
    assert_ne!(less, role);
    lab.apply_text(&less).unwrap();
    lab.stop_sluiced("node1").unwrap();
    lab.start_sluiced("node1").unwrap();
    wait_for_problem(
        &lab,
        "node1",
        "watching Services: services is forbidden: User",
        PATIENCE,
    );
    // What is in the kernel stays.
    assert_eq!(node.get("10.96.1.1", 80, "").unwrap(), "web");
    lab.apply_text(role).unwrap();
    wait_for_no_problem(&lab, "node1", PATIENCE_WITH_SILENCE);

    lab.stop_sluiced("node1").unwrap();
    node.sh("mv /etc/sluice/token /etc/sluice/good && printf not.a.token > /etc/sluice/token")
        .unwrap();
    lab.start_sluiced("node1").unwrap();
    wait_for_problem(&lab, "node1", "Unauthorized", PATIENCE);
    node.sh("mv /etc/sluice/good /etc/sluice/token").unwrap();
    wait_for_no_problem(&lab, "node1", PATIENCE_WITH_SILENCE);

    lab.stop_sluiced("node1").unwrap();
    node.sh(
        "mv /etc/sluice/ca.crt /etc/sluice/good && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
         -keyout /dev/null -subj /CN=other -out /etc/sluice/ca.crt 2>/dev/null",
    )
    .unwrap();
    lab.start_sluiced("node1").unwrap();
    wait_for_problem(&lab, "node1", "invalid peer certificate: UnknownIssuer", PATIENCE);
    node.sh("mv /etc/sluice/good /etc/sluice/ca.crt").unwrap();
    wait_for_no_problem(&lab, "node1", PATIENCE_WITH_SILENCE);
    lab.apply_text(&service("two", "10.96.1.2")).unwrap();
    wait_for_services(&lab, "node1", &["one", "two"], PATIENCE);
}

/// K4 N12: whether pods can be wired is a condition of the node, and so is what is in their way; of that there is an Event.
#[test]
fn the_node_object_says_how_the_node_does() {
    let lab = lab();
    let ask = |path: &str| -> anyhow::Result<serde_json::Value> {
        let answer = lab.node("control").sh(&format!(
            "curl -sk --cert /etc/kubernetes/pki/admin.crt --key /etc/kubernetes/pki/admin.key \
             https://127.0.0.1:6443{path}"
        ))?;
        Ok(serde_json::from_str(&answer)?)
    };
    let condition = |kind: &str| -> anyhow::Result<serde_json::Value> {
        let object = ask("/api/v1/nodes/node1")?;
        let conditions = object["status"]["conditions"].as_array().cloned();
        let mut conditions = conditions.unwrap_or_default().into_iter();
        Ok(conditions
            .find(|condition| condition["type"] == kind)
            .unwrap_or_default())
    };
    wait_until("the conditions are written", PATIENCE, || {
        let network = condition("NetworkUnavailable")?;
        let degraded = condition("SluiceDegraded")?;
        Ok(
            network["status"] == "False"
                && network["reason"] == "SluiceIsUp"
                && degraded["status"] == "False",
        )
    })
    .unwrap();

    let node = lab.node("node1");
    node.run(&["ip", "link", "add", "flannel.1", "type", "veth", "peer", "other"])
        .unwrap();
    let wanted = "the device flannel.1 is flannel's";
    wait_until(
        "the condition says what is in the way",
        PATIENCE_WITH_SILENCE,
        || {
            let degraded = condition("SluiceDegraded")?;
            Ok(degraded["status"] == "True" && degraded["message"].to_string().contains(wanted))
        },
    )
    .unwrap();
    wait_until("there is one Event", PATIENCE, || {
        let events = ask("/apis/events.k8s.io/v1/events")?;
        let ours = events["items"].as_array().into_iter().flatten().filter(|event| {
            event["reportingController"] == "sluice" && event["note"].to_string().contains(wanted)
        });
        let told: Vec<_> = ours.map(|event| event["regarding"]["name"].to_string()).collect();
        if told.len() > 1 {
            bail!("{told:?}");
        }
        Ok(told == ["\"node1\""])
    })
    .unwrap();
    node.run(&["ip", "link", "del", "flannel.1"]).unwrap();
    wait_until("it is over", PATIENCE_WITH_SILENCE, || {
        Ok(condition("SluiceDegraded")?["status"] == "False")
    })
    .unwrap();
}
