//! Sluice first in a chain with the reference plugins, and its results beside those of the reference `ptp`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use sluice_lab::pods::{Pod, Wanted};
use sluice_lab::{Lab, Node, Options, wait_until};
use sluice_tests::containerd::Containerd;
use sluice_tests::cri::PodSandboxConfig;
use sluice_tests::{PATIENCE, addresses, everybody_reaches_everybody, install_conflist, pod_traces};

/// The version that Debian 12's plugins and Sluice have in common.
const VERSION: &str = "1.0.0";
const HOST_PORT: u16 = 18080;
const RATE: u32 = 80_000_000;
const MAC: &str = "c2:11:22:33:44:55";

fn lab() -> Lab {
    let lab = Lab::up(Options {
        nodes: 2,
        ..Options::default()
    })
    .unwrap();
    let plugins = ["portmap", "bandwidth", "tuning", "firewall", "ptp", "host-local"];
    sluice_lab::cni::install_reference_plugins(lab.record(), "node1", &plugins).unwrap();
    lab
}

fn chain(others: &[Value]) -> Value {
    let sluice = json!({ "type": "sluice", "capabilities": { "ips": true, "mac": true } });
    let plugins = [&[sluice], others].concat();
    json!({ "cniVersion": VERSION, "name": "sluice", "plugins": plugins })
}

fn all_of_them() -> Value {
    chain(&[
        json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }),
        json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" }, "mtu": 1400, "allmulti": true }),
        json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }),
        json!({ "type": "firewall", "backend": "iptables" }),
    ])
}

fn asked() -> Map<String, Value> {
    let burst = RATE / 10;
    let asked = json!({
        "mac": MAC,
        "portMappings": [{ "hostPort": HOST_PORT, "containerPort": 8080, "protocol": "tcp" }],
        "bandwidth": { "ingressRate": RATE, "ingressBurst": burst, "egressRate": RATE, "egressBurst": burst },
    });
    asked.as_object().unwrap().clone()
}

fn add(lab: &Lab, name: &str, runtime_config: Map<String, Value>) -> Pod {
    let wanted = Wanted {
        name: name.to_owned(),
        node: "node1".to_owned(),
        runtime_config,
        ..Wanted::default()
    };
    lab.pod_add_as(&wanted).unwrap()
}

/// Everything the reference plugins and Sluice have on a node, but for the chains and counters they share among pods.
fn traces(node: &Node<'_>) -> String {
    let others = node
        .run(&[
            "sh",
            "-c",
            "{ iptables-save; ip6tables-save; } | grep -v '^#' | grep -e CNI-DN -e 10.244. -e fd00:244; \
             ip -o link | sed 's/^[0-9]*: //; s/[@:].*//' | sort; tc qdisc show | grep -e tbf -e ingress; \
             find /var/lib/cni /run/cni -type f 2>/dev/null; true",
        ])
        .unwrap();
    pod_traces(node).unwrap() + &others
}

/// Bytes through the shaping queues (towards the pod, and from it).
fn shaped(node: &Node<'_>) -> Vec<u64> {
    let shown = node
        .run(&["sh", "-c", "tc -s qdisc show | grep -A 1 'qdisc tbf'"])
        .unwrap();
    assert_eq!(shown.matches("rate 80Mbit").count(), 2, "{shown}");
    let sent = |line: &str| line.trim().strip_prefix("Sent ")?.split(' ').next()?.parse().ok();
    shown.lines().filter_map(sent).collect()
}

fn every_plugin_does_its_job(lab: &Lab, pod: &Pod) {
    let node = lab.node("node1");
    let inside = lab.pod(&pod.name).unwrap();
    // portmap, over whichever of the node's addresses.
    for address in addresses(lab, "node1").unwrap() {
        for from in [lab.client(), lab.node("node2")] {
            let answer = from.get(&address, HOST_PORT, "");
            assert_eq!(answer.unwrap(), pod.name, "hostPort at {address}");
        }
    }
    // tuning; the MAC is Sluice's own.
    assert_eq!(
        inside.run(&["cat", "/proc/sys/net/core/somaxconn"]).unwrap(),
        "500\n"
    );
    let link = inside.run(&["ip", "-o", "link", "show", "eth0"]).unwrap();
    for tuned in ["ALLMULTI", "mtu 1400", MAC] {
        assert!(link.contains(tuned), "{tuned} in {link}");
    }
    // firewall.
    let rules = node.sh("iptables-save; ip6tables-save").unwrap();
    for address in &pod.addresses {
        let length = if address.is_ipv4() { 32 } else { 128 };
        let rule = format!("-A CNI-FORWARD -s {address}/{length} -j ACCEPT");
        assert!(rules.contains(&rule), "{rule} in {rules}");
    }
    // bandwidth: nothing the dataplane does goes past the queues.
    for address in &pod.addresses {
        let address = address.to_string();
        let before = shaped(&node);
        assert_eq!(before.len(), 2);
        let ping = ["ping", "-c", "5", "-i", "0.01", "-W", "2", "-s", "1000", &address];
        lab.node("node2").run(&ping).unwrap();
        let grown = shaped(&node)
            .iter()
            .zip(&before)
            .all(|(now, before)| now - before >= 5000);
        assert!(grown, "to {address}: {before:?}, then {:?}", shaped(&node));
    }
}

/// C6 C7 C11
#[test]
fn first_in_a_chain_with_portmap_tuning_bandwidth_and_firewall() {
    let lab = lab();
    let node = lab.node("node1");
    install_conflist(&lab, "node1", &all_of_them()).unwrap();
    let before = traces(&node);
    for name in ["first", "second"] {
        let pod = add(&lab, name, asked());
        every_plugin_does_its_job(&lab, &pod);
        let now = traces(&node);
        for trace in ["CNI-DN-", "qdisc tbf", "bwp", " dev sluice", "containerId"] {
            assert!(now.contains(trace), "{trace} in {now}");
        }
        let other = lab.pod_add("node2", &format!("beside-{name}"), &[], &[]).unwrap();
        everybody_reaches_everybody(&lab, &[pod, other]).unwrap();
        lab.pod_rm(name).unwrap();
        assert_eq!(traces(&node), before, "after the {name}");
    }

    // portmap 1.1.1 finds fault with every CHECK where there is an ip6tables: it looks for each rule in both families.
    let mut others = all_of_them();
    others["plugins"].as_array_mut().unwrap().remove(1);
    install_conflist(&lab, "node1", &others).unwrap();
    add(&lab, "checked", asked());
    node.run(&["sluice-lab", "cni-check", "checked"]).unwrap();
    lab.pod_rm("checked").unwrap();
    assert_eq!(traces(&node), before, "after the checked");
}

/// C6 C7 C11: a MAC is Sluice's to set; what `tuning` breaks by setting one later, CHECK names and DEL removes.
#[test]
fn a_mac_changed_by_tuning_is_named() {
    let lab = lab();
    let node = lab.node("node1");
    install_conflist(&lab, "node1", &chain(&[json!({ "type": "tuning", "mac": MAC })])).unwrap();
    let before = traces(&node);
    let pod = add(&lab, "changed", Map::new());
    let said = node.exec(&["sluice-lab", "cni-check", "changed"]).unwrap();
    let said = String::from_utf8(said.stderr).unwrap();
    for address in pod.addresses.iter().map(ToString::to_string) {
        let named = format!("the neighbour {address} behind");
        assert!(
            said.contains(&named) && said.contains(&format!("not {MAC}")),
            "{said}"
        );
    }
    lab.pod_rm("changed").unwrap();
    assert_eq!(traces(&node), before);
}

/// C11 C15
#[test]
fn the_chain_under_containerd() {
    let lab = lab();
    let node = lab.node("node1");
    install_conflist(&lab, "node1", &all_of_them()).unwrap();
    let containerd = Containerd::start(&lab, "node1").unwrap();
    let cri = containerd.cri().unwrap();
    let before = traces(&node);
    let mut config = PodSandboxConfig::of_pod("web");
    for direction in ["ingress", "egress"] {
        let key = format!("kubernetes.io/{direction}-bandwidth");
        config.annotations.insert(key, RATE.to_string());
    }
    let id = cri.run_pod_sandbox(config).unwrap();
    for address in addresses(&lab, "node1").unwrap() {
        wait_until("the sandbox serves", PATIENCE, || {
            Ok(lab.client().get(&address, HOST_PORT, "")? == "web")
        })
        .unwrap();
    }
    assert!(shaped(&node).iter().all(|sent| *sent > 0));
    cri.stop_pod_sandbox(&id).unwrap();
    cri.remove_pod_sandbox(&id).unwrap();
    assert_eq!(traces(&node), before);
}

/// Which fields a result has, and of which kind; places in lists do not matter.
fn shape(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                shape(value, &format!("{path}.{key}"), found);
            }
        }
        Value::Array(list) => {
            for value in list {
                shape(value, &format!("{path}[]"), found);
            }
        }
        Value::String(_) => drop(found.insert(format!("{path}: text"))),
        Value::Number(_) => drop(found.insert(format!("{path}: number"))),
        other => drop(found.insert(format!("{path}: {other}"))),
    }
}

/// C1 C3: each version's result has the fields that the reference's has, the routes' gateway besides.
#[test]
fn results_have_the_shape_of_the_reference_plugins() {
    let lab = lab();
    let ipam = json!({
        "type": "host-local",
        "dataDir": "/run/host-local",
        "ranges": [[{ "subnet": "10.99.0.0/24" }], [{ "subnet": "fd99::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
    });
    let ptp = json!({ "type": "ptp", "ipam": ipam });
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
        let shapes = [json!({ "type": "sluice" }), ptp.clone()].map(|plugin| {
            let list = json!({ "cniVersion": version, "name": "compared", "plugins": [plugin] });
            install_conflist(&lab, "node1", &list).unwrap();
            let pod = add(&lab, "compared", Map::new());
            lab.pod_rm("compared").unwrap();
            assert_eq!(pod.result["cniVersion"], version);
            let ends: Vec<bool> = pod.result["interfaces"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|interface| interface["sandbox"].is_string())
                .collect();
            let mut found = BTreeSet::new();
            shape(&pod.result, "", &mut found);
            (
                found,
                ends,
                pod.result["ips"]
                    .as_array()
                    .map(|ips| ips[1]["interface"].clone()),
            )
        });
        let [(ours, our_ends, our_end), (theirs, their_ends, their_end)] = shapes;
        assert_eq!(
            (our_ends, our_end),
            (their_ends, their_end),
            "{version}: host's end, pod's end"
        );
        let missing: Vec<&String> = theirs.difference(&ours).collect();
        assert_eq!(missing, [""; 0], "{version}");
        let more: Vec<&str> = ours.difference(&theirs).map(String::as_str).collect();
        let routes: &[&str] = if version < "0.3.0" {
            &[".ip4.routes[].gw: text", ".ip6.routes[].gw: text"]
        } else {
            &[".routes[].gw: text"]
        };
        assert_eq!(more, routes, "{version}");
    }
}
