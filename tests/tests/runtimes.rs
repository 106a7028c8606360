//! Real runtimes: containerd with runc, by `ctr` and by CRI, and podman, with Sluice as their network.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use sluice_lab::images::web::PORT;
use sluice_lab::{Lab, Node, Options, url, wait_until};
use sluice_tests::containerd::Containerd;
use sluice_tests::cri::{Client, PodSandboxConfig};
use sluice_tests::podman::Podman;
use sluice_tests::{PATIENCE, addresses, pod_traces, seen_as, serve_on_client};

/// How long the daemon may take to collect what nobody removes.
const COLLECTED: Duration = Duration::from_secs(180);

/// Runs a busybox applet where the packets come from.
type Inside<'a> = dyn Fn(&[&str]) -> Result<String> + 'a;

fn lab() -> Lab {
    Lab::up(Options {
        nodes: 2,
        ..Options::default()
    })
    .unwrap()
}

fn get(inside: &Inside<'_>, host: &str, path: &str) -> String {
    let url = url(host, PORT, path);
    let answer = inside(&["timeout", "5", "wget", "-q", "-O", "-", &url]);
    answer
        .unwrap_or_else(|error| panic!("{url}: {error:#}"))
        .trim()
        .to_owned()
}

/// A container asks another at all its addresses, and is seen with its own.
fn reaches(inside: &Inside<'_>, own: &[IpAddr], name: &str, addresses: &[IpAddr]) {
    assert_eq!(own.len(), 2, "{own:?}: one address of each family");
    assert_eq!(addresses.len(), 2, "{addresses:?}: one address of each family");
    for address in addresses {
        assert_eq!(get(inside, &address.to_string(), ""), name, "at {address}");
        let seen = plain(&get(inside, &address.to_string(), "cgi-bin/source"));
        assert!(
            own.contains(&seen),
            "{name} at {address} saw {seen}, not one of {own:?}"
        );
    }
}

fn plain(reported: &str) -> IpAddr {
    sluice_lab::demo::checks::plain_address(reported).parse().unwrap()
}

/// What C4 says of a pod's end, seen from inside the container.
fn is_wired_as_any_pod(inside: &Inside<'_>, lab: &Lab, node: &str) -> Vec<IpAddr> {
    let shown = inside(&["ip", "-o", "address", "show", "dev", "eth0", "scope", "global"]).unwrap();
    let prefixes: Vec<&str> = shown
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3))
        .collect();
    let own: Vec<IpAddr> = prefixes
        .iter()
        .map(|prefix| {
            let (address, length) = prefix.split_once('/').unwrap();
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(length, if address.is_ipv4() { "32" } else { "128" }, "{shown}");
            address
        })
        .collect();
    let wanted = lab.ctl_json(node, &["status"]).unwrap()["network"]["podMtu"].to_string();
    let mtu = inside(&["cat", "/sys/class/net/eth0/mtu"]).unwrap();
    assert_eq!(mtu.trim(), wanted, "the MTU of the node's network");
    let v4 = inside(&["ip", "route"]).unwrap();
    assert!(v4.contains("default via 169.254.1.1 dev eth0"), "{v4}");
    let v6 = inside(&["ip", "-6", "route"]).unwrap();
    assert!(v6.contains("default via fe80::1 dev eth0"), "{v6}");
    own
}

fn leaves_the_cluster_as_its_node(inside: &Inside<'_>, lab: &Lab, node: &str) {
    let _outside = serve_on_client(lab).unwrap();
    let nodes_own = addresses(lab, node).unwrap();
    for client in addresses(lab, "client").unwrap() {
        assert_eq!(get(inside, &client, ""), "client");
        let seen = plain(&get(inside, &client, "cgi-bin/source")).to_string();
        assert!(
            nodes_own.contains(&seen),
            "{seen} is none of {node}'s {nodes_own:?}"
        );
    }
}

/// C4 C6 C10 C11 C15 N1 N8
#[test]
fn containers_of_containerd_and_podman_on_two_nodes_talk_to_each_other_and_out() {
    let lab = lab();
    let containerd = Containerd::start(&lab, "node1").unwrap();
    let podman = Podman::set_up(&lab, "node2").unwrap();
    let before = ["node1", "node2"].map(|node| pod_traces(&lab.node(node)).unwrap());
    let pod = lab.pod_add("node2", "pod", &[], &[]).unwrap();

    let first = containerd.run_cni("first").unwrap();
    let in_first = |applet: &[&str]| containerd.inside("default", "first", applet);
    let of_first = is_wired_as_any_pod(&in_first, &lab, "node1");
    let of_second = podman.start("second", "sluice").unwrap();
    let in_second = |applet: &[&str]| podman.inside("second", applet);
    assert_eq!(
        is_wired_as_any_pod(&in_second, &lab, "node2"),
        of_second,
        "as podman tells"
    );

    reaches(&in_first, &of_first, "second", &of_second);
    reaches(&in_first, &of_first, "pod", &pod.addresses);
    reaches(&in_second, &of_second, "first", &of_first);
    for address in of_first.iter().chain(&of_second).map(ToString::to_string) {
        let seen = seen_as(&lab.pod("pod").unwrap(), &address, PORT).unwrap();
        assert!(
            pod.addresses.contains(&seen),
            "the pod asked {address} and was seen as {seen}"
        );
    }
    leaves_the_cluster_as_its_node(&in_first, &lab, "node1");
    leaves_the_cluster_as_its_node(&in_second, &lab, "node2");

    for node in ["node1", "node2"] {
        let now = pod_traces(&lab.node(node)).unwrap();
        assert!(
            now.contains(" dev sluice") && now.contains("containerId"),
            "{now}"
        );
    }
    containerd
        .ctr(&["task", "kill", "--signal", "KILL", "first"])
        .unwrap();
    // That the container was killed is how `ctr` ends; the DEL it makes on the way is what is looked at.
    first.finish().unwrap();
    podman.remove("second").unwrap();
    let asked = podman
        .start("asking", "sluice:ip=10.244.2.99,mac=c2:11:22:33:44:55")
        .unwrap();
    assert_eq!(asked[0].to_string(), "10.244.2.99", "{asked:?}");
    let link = podman.inside("asking", &["ip", "link", "show", "eth0"]).unwrap();
    assert!(link.contains("c2:11:22:33:44:55"), "{link}");
    podman.remove("asking").unwrap();
    lab.pod_rm("pod").unwrap();
    for (node, before) in ["node1", "node2"].iter().zip(before) {
        // Who rests is no longer held.
        assert_eq!(
            pod_traces(&lab.node(node)).unwrap(),
            before,
            "{node} after all were removed"
        );
    }
}

/// A sandbox without the hostPort that one sandbox of a node alone can have.
fn without_host_port(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        port_mappings: Vec::new(),
        ..PodSandboxConfig::of_pod(name)
    }
}

/// What the runtime tells of a sandbox's addresses.
fn told_addresses(cri: &Client, id: &str) -> Vec<IpAddr> {
    let status = cri.pod_sandbox_status(id).unwrap();
    assert_eq!(status.state, 0, "{id} is ready");
    let network = status.network.unwrap();
    let others = network.additional_ips.into_iter().map(|ip| ip.ip);
    [network.ip]
        .into_iter()
        .chain(others)
        .map(|ip| ip.parse().unwrap())
        .collect()
}

fn network_is_ready(cri: &Client) -> bool {
    let conditions = cri.conditions().unwrap();
    let condition = conditions
        .iter()
        .find(|condition| condition.r#type == "NetworkReady")
        .unwrap();
    condition.status
}

/// Puts a plugin in front of the plugin that notes what it is given.
fn spy(node: &Node<'_>) {
    node.sh(
        "cd /opt/cni/bin && mv sluice .sluice && mkdir -p /run/spy && cat > sluice <<'END'
#!/bin/busybox sh
f=/run/spy/$CNI_COMMAND
/bin/busybox cat > $f.json
/bin/busybox env > $f.env
exec /opt/cni/bin/.sluice < $f.json
END
chmod +x sluice",
    )
    .unwrap();
}

fn given(node: &Node<'_>, verb: &str) -> (String, Value) {
    let env = node.run(&["cat", &format!("/run/spy/{verb}.env")]).unwrap();
    let config = node.run(&["cat", &format!("/run/spy/{verb}.json")]).unwrap();
    (env, serde_json::from_str(&config).unwrap())
}

/// C8 C10 C11 C14 C15 I5: the conflist is noticed, what CRI sends is taken, nothing stays.
#[test]
fn sandboxes_by_cri_from_a_conflist_that_comes_late_to_their_removal() {
    let lab = lab();
    let node = lab.node("node1");
    lab.stop_sluiced("node1").unwrap();
    node.run(&["rm", "/etc/cni/net.d/10-sluice.conflist"]).unwrap();
    let containerd = Containerd::start(&lab, "node1").unwrap();
    let cri = containerd.cri().unwrap();
    assert!(!network_is_ready(&cri), "without a conflist");
    lab.start_sluiced("node1").unwrap();
    wait_until("containerd has seen the conflist", PATIENCE, || {
        Ok(network_is_ready(&cri))
    })
    .unwrap();
    let before = pod_traces(&node).unwrap();
    let pod = lab.pod_add("node2", "pod", &[], &[]).unwrap();
    spy(&node);

    let id = cri.run_pod_sandbox(PodSandboxConfig::of_pod("web")).unwrap();
    let in_web = |applet: &[&str]| containerd.inside("k8s.io", &id, applet);
    let of_web = is_wired_as_any_pod(&in_web, &lab, "node1");
    assert_eq!(
        told_addresses(&cri, &id),
        of_web,
        "as containerd tells the kubelet"
    );
    reaches(&in_web, &of_web, "pod", &pod.addresses);
    for address in &of_web {
        let answer = lab.pod("pod").unwrap().get(&address.to_string(), PORT, "");
        assert_eq!(answer.unwrap(), "web");
    }
    leaves_the_cluster_as_its_node(&in_web, &lab, "node1");
    for address in addresses(&lab, "node1").unwrap() {
        let answer = lab.client().get(&address, 18080, "");
        assert_eq!(answer.unwrap(), "web", "its hostPort at {address}");
    }
    let (env, config) = given(&node, "ADD");
    for set in [
        "CNI_CONTAINERID=",
        "CNI_IFNAME=eth0",
        "CNI_NETNS=",
        "CNI_PATH=/opt/cni/bin",
    ] {
        assert!(env.contains(set), "{set} in {env}");
    }
    assert!(
        env.contains("K8S_POD_NAME=web") && env.contains("IgnoreUnknown=1"),
        "{env}"
    );
    assert_eq!(config["capabilities"]["ips"], true, "left in");
    assert_eq!(
        config["runtimeConfig"]["io.kubernetes.cri.pod-annotations"]["example.com/multi-line"],
        "a;b=c\n\"d\""
    );

    let mut asking = without_host_port("asking");
    let wish = "10.244.1.77, fd00:244:0:1::77";
    asking
        .annotations
        .insert("sluice/ips".to_owned(), wish.to_owned());
    let asking = cri.run_pod_sandbox(asking).unwrap();
    let got: Vec<String> = told_addresses(&cri, &asking)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(got.join(", "), wish);
    let mut taken = without_host_port("taken");
    taken.annotations.insert("sluice/ips".to_owned(), wish.to_owned());
    let refused = format!("{:#}", cri.run_pod_sandbox(taken).unwrap_err());
    assert!(refused.contains("10.244.1.77"), "{refused}");

    for id in [&id, &asking] {
        cri.stop_pod_sandbox(id).unwrap();
        // As kubelets do when in doubt.
        cri.stop_pod_sandbox(id).unwrap();
        cri.remove_pod_sandbox(id).unwrap();
    }
    assert_eq!(pod_traces(&node).unwrap(), before);
    let (env, config) = given(&node, "DEL");
    assert!(env.contains("CNI_NETNS="), "{env}");
    assert_eq!(config["name"], json!("sluice"));
}

/// C6 C8 C11
#[test]
fn whatever_becomes_of_containerd_nothing_stays() {
    let lab = lab();
    let node = lab.node("node1");
    let containerd = Containerd::start(&lab, "node1").unwrap();
    let before = pod_traces(&node).unwrap();
    // Its `ctr` is killed before the container: nobody is left who would call DEL.
    let abandoned = containerd.run_cni("abandoned").unwrap();
    drop(abandoned);
    containerd
        .ctr(&["task", "kill", "--signal", "KILL", "abandoned"])
        .unwrap();

    let cri = containerd.cri().unwrap();
    let [kept, wrecked] =
        ["kept", "wrecked"].map(|name| cri.run_pod_sandbox(without_host_port(name)).unwrap());
    let of_kept = told_addresses(&cri, &kept);
    let pod = lab.pod_add("node2", "pod", &[], &[]).unwrap();
    let kept_serves = || {
        for address in &of_kept {
            let answer = lab.pod("pod").unwrap().get(&address.to_string(), PORT, "");
            assert_eq!(answer.unwrap(), "kept");
        }
    };
    kept_serves();
    containerd.kill().unwrap();
    kept_serves();
    containerd.wreck(&wrecked).unwrap();
    containerd.run().unwrap();
    assert_eq!(told_addresses(&cri, &kept), of_kept, "as before");
    let in_kept = |applet: &[&str]| containerd.inside("k8s.io", &kept, applet);
    reaches(&in_kept, &of_kept, "pod", &pod.addresses);
    assert_eq!(cri.pod_sandbox_status(&wrecked).unwrap().state, 1, "not ready");
    for id in [&kept, &wrecked] {
        cri.stop_pod_sandbox(id).unwrap();
        cri.remove_pod_sandbox(id).unwrap();
    }
    // The daemon looks every minute, and spares what is younger than one.
    wait_until("the abandoned one is collected", COLLECTED, || {
        Ok(pod_traces(&node)? == before)
    })
    .unwrap();
}
