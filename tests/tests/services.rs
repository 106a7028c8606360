//! Services as tutorials have them, asked by pods, nodes and the outside host. One lab: each test brings Services and,
//! where it changes them, pods of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;

use sluice_lab::pods::Pod;
use sluice_lab::udp_name::ABORTED;
use sluice_lab::{Lab, Node, Options, url, wait_until};
use sluice_tests::{
    PATIENCE, addresses, answers, kubia_pods, manifest, problems, seen_as, serve_on_client, service_entries,
    wait_for_answers,
};

const KUBIA: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const KUBIA_WEB: [&str; 2] = ["10.96.0.11", "fd00:96::11"];
/// node3 has none of them.
const PODS: [(&str, &str); 4] = [
    ("node1", "kubia-a"),
    ("node1", "kubia-b"),
    ("node2", "kubia-c"),
    ("node2", "kubia-d"),
];
const NAMES: [&str; 4] = ["kubia-a", "kubia-b", "kubia-c", "kubia-d"];

/// A lab with the tutorial's pods and one more, `asker`, on node3.
fn kubia_lab() -> (Lab, Vec<Pod>) {
    let lab = Lab::up(Options::default()).unwrap();
    let mut pods = kubia_pods(&lab, &PODS).unwrap();
    pods.push(lab.pod_add("node3", "asker", &[], &[]).unwrap());
    for file in [
        "kubia.yaml",
        "kubia-web.yaml",
        "kubia-nodeport.yaml",
        "kubia-loadbalancer.yaml",
    ] {
        lab.apply(manifest(file)).unwrap();
    }
    for node in lab.nodes() {
        for address in KUBIA_WEB {
            wait_for_answers(&lab.node(&node), address, 80, &NAMES).unwrap();
        }
    }
    (lab, pods)
}

/// A pod of the Service, one that is not, and a node.
fn askers(lab: &Lab) -> [Node<'_>; 3] {
    [
        lab.pod("kubia-a").unwrap(),
        lab.pod("asker").unwrap(),
        lab.node("node3"),
    ]
}

/// S1 S5 S6 S12 S16 S17
#[test]
fn cluster_ips_serve_pods_and_nodes() {
    let (lab, pods) = kubia_lab();
    spread_named_ports_and_udp(&lab);
    each_client_stays_at_one_pod(&lab);
    sources_are_kept(&lab, &pods);
    hairpin(&lab);
    of_one_family_only(&lab);
}

fn spread_named_ports_and_udp(lab: &Lab) {
    for from in askers(lab) {
        for address in KUBIA_WEB {
            let counts = answers(&from, address, 80, 80).unwrap();
            // Evenly it would be 20 each.
            assert_eq!(counts.len(), 4, "{counts:?}");
            assert!(counts.values().all(|count| *count >= 4), "{counts:?}");
            for connected in [true, false] {
                let who = from.ask_udp(address, 80, connected).unwrap();
                assert!(NAMES.contains(&who.as_str()), "UDP: {who:?}");
            }
        }
        for address in KUBIA {
            // http and https lead to different ports by name.
            for port in [80, 443] {
                let who = from.get(address, port, "").unwrap();
                assert!(NAMES.contains(&who.as_str()), "port {port}: {who:?}");
            }
        }
    }
}

fn each_client_stays_at_one_pod(lab: &Lab) {
    for from in askers(lab) {
        for address in KUBIA {
            let counts = answers(&from, address, 80, 20).unwrap();
            assert_eq!(counts.len(), 1, "{counts:?}");
        }
    }
}

fn sources_are_kept(lab: &Lab, pods: &[Pod]) {
    for pod in pods {
        let place = lab.pod(&pod.name).unwrap();
        for address in KUBIA_WEB {
            let seen = seen_as(&place, address, 80).unwrap();
            assert!(pod.addresses.contains(&seen), "{} was seen as {seen}", pod.name);
        }
    }
}

/// A Service whose only pod asks it.
fn hairpin(lab: &Lab) {
    lab.apply_text(&service("own", "10.96.0.50", "me: only", ""))
        .unwrap();
    lab.pod_add("node1", "only", &[("me", "only")], &[]).unwrap();
    wait_for_answers(&lab.pod("only").unwrap(), "10.96.0.50", 80, &["only"]).unwrap();
}

fn of_one_family_only(lab: &Lab) {
    lab.apply_text(&service(
        "six",
        "fd00:96::60",
        "app: kubia",
        "  ipFamilies: [IPv6]\n",
    ))
    .unwrap();
    wait_for_answers(&lab.node("node3"), "fd00:96::60", 80, &NAMES).unwrap();
    for entry in service_entries(lab, "node3", "six").unwrap() {
        let text = entry["backends"].to_string();
        assert!(text.contains("[fd00:") && !text.contains("10.244."), "{text}");
    }
}

/// S2 S8 S14
#[test]
fn from_outside_by_any_node_and_without_selectors() {
    let (lab, _) = kubia_lab();
    // node3 runs no endpoint.
    for node in lab.nodes() {
        for address in addresses(&lab, &node).unwrap() {
            wait_for_answers(&lab.client(), &address, 30123, &NAMES).unwrap();
            wait_for_answers(&lab.client(), &address, 30124, &NAMES).unwrap();
            for from in askers(&lab) {
                wait_for_answers(&from, &address, 30123, &NAMES).unwrap();
            }
        }
        for loopback in ["127.0.0.1", "::1"] {
            wait_for_answers(&lab.node(&node), loopback, 30123, &NAMES).unwrap();
        }
    }

    health_checks_say_who_has_endpoints(&lab);

    let _outside = serve_on_client(&lab).unwrap();
    for file in [
        "external-service.yaml",
        "kubia-headless.yaml",
        "kubia-externalname.yaml",
    ] {
        lab.apply(manifest(file)).unwrap();
    }
    for from in askers(&lab) {
        wait_for_answers(&from, "10.96.0.13", 80, &["client"]).unwrap();
    }
    // Applied together: what serves external-service has seen the other two.
    for nothing in ["kubia-headless", "kubia-externalname"] {
        assert_eq!(
            service_entries(&lab, "node1", nothing).unwrap(),
            [serde_json::Value::Null; 0]
        );
    }
}

/// What a load balancer in front asks each node.
fn health_checks_say_who_has_endpoints(lab: &Lab) {
    let policy = "  type: LoadBalancer\n  externalTrafficPolicy: Local\n  healthCheckNodePort: 32123\n";
    lab.apply_text(&service("checked", "10.96.0.80", "app: kubia", policy))
        .unwrap();
    let answer = |node: &str| -> anyhow::Result<String> {
        let mut said = String::new();
        for address in addresses(lab, node)? {
            let url = url(&address, 32123, "");
            said += &lab
                .client()
                .run(&["curl", "-s", "-m", "5", "-w", " %{http_code}\n", &url])?;
        }
        Ok(said)
    };
    for (node, endpoints, code) in [("node1", 2, 200), ("node2", 2, 200), ("node3", 0, 503)] {
        wait_until("each node says how many endpoints it has", PATIENCE, || {
            let said = answer(node)?;
            let wanted = format!("\"localEndpoints\": {endpoints}");
            Ok(said.matches(&wanted).count() == 2 && said.matches(&format!(" {code}\n")).count() == 2)
        })
        .unwrap();
    }
    lab.delete_object("Service", "checked").unwrap();
    wait_until("nobody listens any more", PATIENCE, || {
        Ok(answer("node1").is_err())
    })
    .unwrap();
}

/// S10
#[test]
fn endpoints_come_and_go_and_none_means_refused() {
    let (lab, _) = kubia_lab();
    let asker = lab.pod("asker").unwrap();
    lab.apply_text(&service("nobody", "10.96.0.70", "app: nobody", ""))
        .unwrap();
    let refused = |from: &Node<'_>, host: &str, port: u16| {
        let url = url(host, port, "");
        let output = from.exec(&["timeout", "10", "busybox", "wget", "-O", "-", &url])?;
        Ok(String::from_utf8_lossy(&output.stderr).contains("refused"))
    };
    for from in askers(&lab) {
        wait_until("a Service without endpoints refuses", PATIENCE, || {
            refused(&from, "10.96.0.70", 80)
        })
        .unwrap();
    }

    lab.pod_rm("kubia-d").unwrap();
    for address in KUBIA_WEB {
        wait_for_answers(&asker, address, 80, &NAMES[..3]).unwrap();
        for number in 0..12 {
            let who = asker.ask_udp(address, 80, number % 2 == 0).unwrap();
            assert!(NAMES[..3].contains(&who.as_str()), "UDP: {who:?}");
        }
    }
    lab.pod_add("node3", "kubia-d", &[sluice_tests::KUBIA], &[])
        .unwrap();
    wait_for_answers(&asker, KUBIA_WEB[0], 80, &NAMES).unwrap();

    // The pods whose client stays with one: when that one goes, another takes over.
    let favourite = asker.get(KUBIA[0], 80, "").unwrap();
    lab.pod_rm(&favourite).unwrap();
    let others: BTreeSet<&str> = NAMES.into_iter().filter(|name| *name != favourite).collect();
    wait_until("another pod takes the client over", PATIENCE, || {
        let counts = answers(&asker, KUBIA[0], 80, 10)?;
        Ok(counts.len() == 1 && counts.keys().all(|who| others.contains(who.as_str())))
    })
    .unwrap();

    lab.delete(manifest("kubia-web.yaml")).unwrap();
    wait_until("a deleted Service serves nobody", PATIENCE, || {
        Ok(asker.get(KUBIA_WEB[0], 80, "").is_err())
    })
    .unwrap();
}

/// S13
#[test]
fn no_udp_client_stays_with_a_pod_that_is_gone_and_no_other_is_disturbed() {
    let (lab, _) = kubia_lab();
    let asker = lab.node("node3");
    // A node's sockets and a pod's; enough of them that with near certainty two are with different pods.
    let mut keepers: Vec<(Node<'_>, &str, String)> = Vec::new();
    for from in [lab.node("node3"), lab.pod("asker").unwrap()] {
        for address in KUBIA_WEB.into_iter().cycle().take(12) {
            keepers.push((from.clone(), address, format!("/run/keeper-{}", keepers.len())));
        }
    }
    let said = |keeper: &(Node<'_>, &str, String)| -> anyhow::Result<Vec<String>> {
        let text = asker.run(&["cat", &keeper.2])?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let running: Vec<_> = keepers
        .iter()
        .map(|(from, address, file)| {
            let script = format!("exec sluice-lab udp-keep {address} 80 > {file}");
            from.spawn(&["busybox", "sh", "-c", &script]).unwrap()
        })
        .collect();
    wait_until("all have answers", PATIENCE, || {
        Ok(keepers
            .iter()
            .all(|keeper| said(keeper).is_ok_and(|lines| lines.len() > 3)))
    })
    .unwrap();
    let first: Vec<String> = keepers
        .iter()
        .map(|keeper| said(keeper).unwrap()[0].clone())
        .collect();
    let gone = first[0].clone();
    assert!(first.iter().any(|name| *name != gone), "all are with {gone}");

    lab.pod_rm(&gone).unwrap();
    for (keeper, first) in keepers.iter().zip(&first) {
        if *first == gone {
            wait_until("who was with it is told and goes elsewhere", PATIENCE, || {
                let lines = said(keeper)?;
                let last = lines.last().map_or("", String::as_str);
                if lines.iter().any(|line| line == ABORTED) && NAMES.contains(&last) && last != gone {
                    return Ok(true);
                }
                let end = lines.len().saturating_sub(5);
                anyhow::bail!("{} was with {gone} and ended with {:?}", keeper.2, &lines[end..])
            })
            .unwrap();
        }
    }
    for (keeper, first) in keepers.iter().zip(&first) {
        if *first != gone {
            let lines = said(keeper).unwrap();
            assert!(
                lines.iter().all(|line| line == first),
                "was with {first}: {lines:?}"
            );
        }
    }
    drop(running);
}

/// D4 D5
#[test]
fn a_broken_manifest_is_named_and_what_was_there_stands() {
    let (lab, _) = kubia_lab();
    let asker = lab.pod("asker").unwrap();
    let path = lab.manifests().join("service-default-kubia-web.yaml");
    let good = fs::read_to_string(&path).unwrap();
    let line_of = |word: &str| good.lines().position(|line| line.starts_with(word)).unwrap() + 1;
    for (bad, wanted) in [
        (
            good.replace("\nspec:", "\nsepc:"),
            format!("line {}", line_of("spec:")),
        ),
        (
            good.replace("\n  ports:", "\n\tports:"),
            format!("line {}", line_of("  ports:")),
        ),
        (good.replace("port: 80\n", "port: 80000\n"), "80000".to_owned()),
    ] {
        assert_ne!(bad, good);
        fs::write(&path, bad).unwrap();
        wait_until("the file and the place in it are named", PATIENCE, || {
            let said = problems(&lab, "node3")?;
            Ok(said.contains("service-default-kubia-web.yaml") && said.contains(&wanted))
        })
        .unwrap();
        assert_eq!(
            lab.node("node3")
                .exec(&["sluicectl", "status"])
                .unwrap()
                .status
                .code(),
            Some(1)
        );
        assert_eq!(answers(&asker, KUBIA_WEB[0], 80, 60).unwrap().len(), 4);
    }
    fs::write(&path, &good).unwrap();
    wait_until("all is well again", PATIENCE, || {
        Ok(lab.node("node3").exec(&["sluicectl", "status"])?.status.success())
    })
    .unwrap();
}

fn service(name: &str, address: &str, selector: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: {address:?}\n{more}\
         \x20 ports:\n  - port: 80\n    targetPort: 8080\n  selector:\n    {selector}\n"
    )
}
