//! Host ports: a port of one node that leads to one pod there, asked from everywhere.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::IpAddr;

use anyhow::Result;
use serde_json::{Map, Value, json};
use sluice_lab::demo::restart::{Load, allow, kill_and_wait, stop, wait_for_requests};
use sluice_lab::pods::{Pod, Wanted};
use sluice_lab::{Lab, Node, Options, url, wait_until};
use sluice_tests::{PATIENCE, addresses, problems, seen_as, wait_for_answers};

/// The port that the default process of a lab's pod serves, over TCP and UDP.
const SERVED: u16 = 8080;

fn lab() -> Lab {
    Lab::up(Options {
        nodes: 2,
        ..Options::default()
    })
    .unwrap()
}

fn mapping(host_ip: &str, host_port: u16, protocol: &str) -> Value {
    json!({ "hostIP": host_ip, "hostPort": host_port, "containerPort": SERVED, "protocol": protocol })
}

fn add_as(lab: &Lab, node: &str, name: &str, runtime_config: &Value) -> Result<Pod> {
    lab.pod_add_as(&Wanted {
        name: name.to_owned(),
        node: node.to_owned(),
        runtime_config: runtime_config.as_object().cloned().unwrap_or_default(),
        ..Wanted::default()
    })
}

fn add(lab: &Lab, name: &str, mappings: &[Value]) -> Result<Pod> {
    add_as(lab, "node1", name, &json!({ "portMappings": mappings }))
}

fn is_refused(from: &Node<'_>, host: &str, port: u16) -> Result<bool> {
    let url = url(host, port, "");
    let output = from.exec(&["timeout", "5", "busybox", "wget", "-O", "-", &url])?;
    Ok(String::from_utf8_lossy(&output.stderr).contains("refused"))
}

fn wait_until_refused(from: &Node<'_>, host: &str, port: u16) {
    let what = format!("{host} port {port} is refused");
    wait_until(&what, PATIENCE, || is_refused(from, host, port)).unwrap();
}

/// Waits until `name` answers over UDP, then asks in the other way too.
fn udp_answers(from: &Node<'_>, host: &str, port: u16, name: &str) {
    let what = format!("{name} answers at {host} port {port} over UDP");
    wait_until(&what, PATIENCE, || Ok(from.ask_udp(host, port, false)? == name)).unwrap();
    assert_eq!(from.ask_udp(host, port, true).unwrap(), name);
}

/// What `sluicectl services` lists of host ports on node1: address, and the pod's address behind it.
fn listed(lab: &Lab) -> Result<Vec<(String, String)>> {
    let all = lab.ctl_json("node1", &["services"])?;
    let mut found = Vec::new();
    for entry in all.as_array().into_iter().flatten() {
        for frontend in entry["frontends"].as_array().into_iter().flatten() {
            if frontend["kind"] == "HostPort" {
                let protocol = entry["protocol"].as_str().unwrap_or_default();
                let address = frontend["address"].as_str().unwrap_or_default();
                let backend = entry["backends"][0].as_str().unwrap_or_default();
                found.push((format!("{address}/{protocol}"), backend.to_owned()));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// S25 C10 S12
#[test]
fn a_host_port_leads_to_its_pod_from_everywhere_until_the_pod_goes() {
    let lab = lab();
    let mappings = [
        mapping("", 8088, "TCP"),
        mapping("", 8088, "udp"),
        mapping("", 8088, "sctp"),
    ];
    let web = add(&lab, "web", &mappings).unwrap();
    lab.pod_add("node1", "near", &[], &[]).unwrap();
    lab.pod_add("node2", "far", &[], &[]).unwrap();
    let own = addresses(&lab, "node1").unwrap();
    let places = [
        lab.client(),
        lab.pod("far").unwrap(),
        lab.pod("near").unwrap(),
        lab.pod("web").unwrap(),
        lab.node("node1"),
        lab.node("node2"),
    ];
    for from in &places {
        for address in &own {
            wait_for_answers(from, address, 8088, &["web"]).unwrap();
            udp_answers(from, address, 8088, "web");
        }
    }
    for loopback in ["127.0.0.1", "::1"] {
        wait_for_answers(&lab.node("node1"), loopback, 8088, &["web"]).unwrap();
        udp_answers(&lab.node("node1"), loopback, 8088, "web");
    }
    // The pod sees who asks, and it is this node's port alone.
    for (address, client) in own.iter().zip(addresses(&lab, "client").unwrap()) {
        let seen = seen_as(&lab.client(), address, 8088).unwrap();
        assert_eq!(seen, client.parse::<IpAddr>().unwrap());
    }
    for address in addresses(&lab, "node2").unwrap() {
        assert!(is_refused(&lab.client(), &address, 8088).unwrap());
    }
    let found = listed(&lab).unwrap();
    // Three protocols on one address and loopback, in two families.
    assert_eq!(found.len(), 12, "{found:?}");
    for (frontend, backend) in found {
        let served = web.addresses.iter().map(|address| match address {
            IpAddr::V4(address) => format!("{address}:{SERVED}"),
            IpAddr::V6(address) => format!("[{address}]:{SERVED}"),
        });
        assert!(
            served.into_iter().any(|address| address == backend),
            "{frontend} {backend}"
        );
    }
    lab.node("node1")
        .run(&["sluice-lab", "cni-check", "web"])
        .unwrap();

    lab.pod_rm("web").unwrap();
    for from in [lab.client(), lab.node("node1"), lab.pod("far").unwrap()] {
        for address in &own {
            wait_until_refused(&from, address, 8088);
            assert!(from.ask_udp(address, 8088, true).is_err());
        }
    }
    wait_until(
        "no host port is listed",
        PATIENCE,
        || Ok(listed(&lab)?.is_empty()),
    )
    .unwrap();
}

/// S25 C10 C5
#[test]
fn pods_share_a_port_by_address_and_protocol_and_a_third_is_refused() {
    let lab = lab();
    let own = addresses(&lab, "node1").unwrap();
    let (v4, v6) = (own[0].as_str(), own[1].as_str());
    add(&lab, "local", &[mapping("127.0.0.1", 54323, "TCP")]).unwrap();
    add(&lab, "by-v4", &[mapping(v4, 54323, "TCP")]).unwrap();
    add(&lab, "by-udp", &[mapping(v4, 54323, "UDP")]).unwrap();
    add(&lab, "by-v6", &[mapping(v6, 54323, "TCP")]).unwrap();
    let asks = || {
        wait_for_answers(&lab.node("node1"), "127.0.0.1", 54323, &["local"]).unwrap();
        for from in [lab.client(), lab.node("node2"), lab.node("node1")] {
            wait_for_answers(&from, v4, 54323, &["by-v4"]).unwrap();
            udp_answers(&from, v4, 54323, "by-udp");
            wait_for_answers(&from, v6, 54323, &["by-v6"]).unwrap();
        }
    };
    asks();
    let interfaces = |lab: &Lab| {
        lab.node("node1")
            .run(&["ip", "-o", "link"])
            .unwrap()
            .lines()
            .count()
    };
    let before = interfaces(&lab);
    let refused = add(&lab, "third", &[mapping("0.0.0.0", 54323, "TCP")]).unwrap_err();
    let said = format!("{refused:#}");
    assert!(
        said.contains("0.0.0.0:54323/tcp was asked for by third-") && said.contains("103"),
        "{said}"
    );
    assert_eq!(interfaces(&lab), before, "the refused pod left nothing");
    asks();
    // What the holder gives up, another may have.
    lab.pod_rm("by-v4").unwrap();
    add(&lab, "next", &[mapping(v4, 54323, "TCP")]).unwrap();
    wait_for_answers(&lab.client(), v4, 54323, &["next"]).unwrap();
}

/// S25 C13 S5
#[test]
fn host_ports_outlive_the_daemon_and_open_when_it_is_back() {
    let lab = lab();
    let own = addresses(&lab, "node1").unwrap();
    add(&lab, "web", &[mapping("", 8088, "tcp")]).unwrap();
    add(&lab, "going", &[mapping("", 8090, "tcp")]).unwrap();
    for address in &own {
        wait_for_answers(&lab.client(), address, 8088, &["web"]).unwrap();
        wait_for_answers(&lab.client(), address, 8090, &["going"]).unwrap();
    }
    let client = [lab.client()];
    allow(&client).unwrap();
    let names = ["by-v4", "by-v6"];
    let loads: Vec<Load> = names
        .iter()
        .zip(&own)
        .map(|(name, address)| Load::start(&client[0], name, &url(address, 8088, "")).unwrap())
        .collect();
    let all_go_on = || {
        for name in names {
            wait_for_requests(&client[0], name, 20).unwrap();
        }
    };
    for _ in 0..3 {
        all_go_on();
        kill_and_wait(&lab, "node1").unwrap();
    }
    all_go_on();

    lab.stop_sluiced("node1").unwrap();
    add(&lab, "late", &[mapping("", 8089, "tcp")]).unwrap();
    lab.pod_rm("going").unwrap();
    all_go_on();
    lab.start_sluiced("node1").unwrap();
    for address in &own {
        wait_for_answers(&lab.client(), address, 8089, &["late"]).unwrap();
        wait_until_refused(&lab.client(), address, 8090);
    }
    all_go_on();
    stop(&client).unwrap();
    for load in loads {
        let loaded = load.finish().unwrap();
        assert_eq!(loaded.failed, 0, "{loaded}");
    }
}

/// S19 S25
#[test]
fn a_node_port_keeps_its_number_and_the_host_port_gets_it_afterwards() {
    let lab = lab();
    let own = addresses(&lab, "node1").unwrap();
    lab.pod_add("node2", "behind", &[("app", "kubia")], &[]).unwrap();
    add(
        &lab,
        "web",
        &[mapping("", 30123, "tcp"), mapping("", 30200, "tcp")],
    )
    .unwrap();
    for address in &own {
        wait_for_answers(&lab.client(), address, 30123, &["web"]).unwrap();
    }
    lab.apply(sluice_tests::manifest("kubia-nodeport.yaml")).unwrap();
    let service_has_it = || {
        for address in &own {
            wait_for_answers(&lab.client(), address, 30123, &["behind"]).unwrap();
            wait_for_answers(&lab.client(), address, 30200, &["web"]).unwrap();
        }
        wait_for_answers(&lab.node("node1"), "127.0.0.1", 30123, &["behind"]).unwrap();
    };
    service_has_it();
    let is_told = || {
        let said = problems(&lab, "node1")?;
        Ok(said.contains(":30123/TCP is not served: it belongs to Service default/kubia-nodeport"))
    };
    wait_until("who lost the port is told", PATIENCE, is_told).unwrap();
    // The same after a restart, whoever was read first. It is a problem, so the daemon is not called healthy.
    let before = lab.daemon_number("node1").unwrap();
    lab.kill_sluiced("node1", nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    wait_until("another daemon tells it", PATIENCE, || {
        Ok(lab.daemon_number("node1")? != before && is_told()?)
    })
    .unwrap();
    service_has_it();

    lab.delete(sluice_tests::manifest("kubia-nodeport.yaml")).unwrap();
    for address in &own {
        wait_for_answers(&lab.client(), address, 30123, &["web"]).unwrap();
    }
    wait_until("all is well", PATIENCE, || Ok(problems(&lab, "node1")? == "[]")).unwrap();
}

/// C10 C6
#[test]
fn a_limited_pod_is_reached_from_everywhere_and_leaves_no_limit_behind() {
    let lab = lab();
    let mut wish = Map::new();
    wish.insert("portMappings".to_owned(), json!([mapping("", 8088, "tcp")]));
    let limits =
        json!({ "ingressRate": 80_000_000, "egressRate": 40_000_000, "egressBurst": 4_294_967_295_u64 });
    wish.insert("bandwidth".to_owned(), limits);
    let pod = add_as(&lab, "node1", "slow", &Value::Object(wish)).unwrap();
    lab.pod_add("node2", "far", &[], &[]).unwrap();
    let limits = |lab: &Lab| lab.node("node1").run(&["tc", "qdisc", "show"]).unwrap();
    let there = limits(&lab);
    assert!(
        there.contains("rate 80Mbit") && there.contains("rate 40Mbit"),
        "{there}"
    );
    for address in &addresses(&lab, "node1").unwrap() {
        wait_for_answers(&lab.client(), address, 8088, &["slow"]).unwrap();
    }
    for address in &pod.addresses {
        for from in [lab.pod("far").unwrap(), lab.node("node1")] {
            wait_for_answers(&from, &address.to_string(), SERVED, &["slow"]).unwrap();
        }
    }
    lab.node("node1")
        .run(&["sluice-lab", "cni-check", "slow"])
        .unwrap();
    lab.pod_rm("slow").unwrap();
    // The daemon removed both: the pair and what limits it.
    let status = lab.ctl_json("node1", &["status"]).unwrap();
    assert_eq!(status["removals"]["devices"], 2, "{}", status["removals"]);
    let left = limits(&lab) + &lab.node("node1").run(&["ip", "-o", "link"]).unwrap();
    assert!(!left.contains("tbf") && !left.contains("sluicer"), "{left}");
}
