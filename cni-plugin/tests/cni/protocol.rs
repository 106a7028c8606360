//! stdin, environment, stdout and exit codes, as runtimes use them.

use std::path::Path;

use serde_json::{Value, json};

use crate::node::{Namespace, Node, addresses, finish};
use crate::wiring::DUAL;

// C1 C3
#[test]
fn every_version_gets_the_result_in_its_own_shape() {
    let node = Node::new(&DUAL);
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = Namespace::new();
        let config = node.with(json!({ "cniVersion": version, "dns": { "nameservers": ["10.96.0.10"] } }));
        let result = node.call("ADD", version, &pod.path(), &config).succeeded();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["dns"], json!({ "nameservers": ["10.96.0.10"] }));
        if version < "0.3.0" {
            assert_eq!(
                result
                    .get("interfaces")
                    .or(result.get("ips"))
                    .or(result.get("routes")),
                None
            );
            assert_eq!(result["ip4"]["gateway"], "169.254.1.1");
            assert_eq!(
                result["ip6"]["routes"],
                json!([{ "dst": "::/0", "gw": "fe80::1" }])
            );
            assert!(result["ip4"]["ip"].as_str().unwrap().ends_with("/32"));
            assert!(result["ip6"]["ip"].as_str().unwrap().ends_with("/128"));
        } else {
            assert_eq!(addresses(&result).len(), 2);
            let family = |at: usize| result["ips"][at].get("version").cloned();
            let expected = (version < "1.0.0").then(|| (json!("4"), json!("6")));
            assert_eq!(family(0).zip(family(1)), expected, "{version}");
            let mtu = result["interfaces"][1].get("mtu").cloned();
            assert_eq!(mtu, (version == "1.1.0").then(|| json!(1450)), "{version}");
        }
        // The result of any version is one its CHECK understands; CHECK came with 0.4.0.
        let config = node.with(json!({ "cniVersion": version, "prevResult": result }));
        let checked = node.call("CHECK", version, &pod.path(), &config);
        if version < "0.4.0" {
            assert_eq!(checked.code(), 1, "{version}");
            assert_eq!(checked.json["cniVersion"], version);
        } else {
            checked.succeeded();
        }
        node.call("DEL", version, &pod.path(), &config).succeeded();
    }
    node.assert_empty();
}

// C1
#[test]
fn version_needs_nothing_and_gc_and_status_came_with_1_1_0() {
    let node = Node::new(&DUAL);
    let answer = finish(node.start_with(&[("CNI_COMMAND", "VERSION")], b"")).succeeded();
    let all = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    assert_eq!(answer, json!({ "cniVersion": "1.1.0", "supportedVersions": all }));
    for verb in ["GC", "STATUS"] {
        let config = node.with(json!({ "cniVersion": "1.0.0", "cni.dev/valid-attachments": [] }));
        assert_eq!(node.call(verb, "", Path::new(""), &config).code(), 1, "{verb}");
    }
    // A config as old as the specification's first version names none.
    let mut config = node.config();
    config.remove("cniVersion");
    let pod = Namespace::new();
    let result = node
        .call("ADD", "a", &pod.path(), &Value::Object(config).to_string())
        .succeeded();
    assert_eq!(result["cniVersion"], "0.1.0");
}

// C2 C12
#[test]
fn bad_variables_are_named() {
    let node = Node::new(&DUAL);
    let config = node.with(json!({}));
    let (pod, long) = (Namespace::new(), "x".repeat(300));
    let path = pod.path().to_str().unwrap().to_owned();
    let own = format!("/proc/{}/fd/{}", std::process::id(), 999_999);
    let cases: &[(&str, &str, &str, &str, u64, &str)] = &[
        ("ADD", "", &path, "eth0", 4, "CNI_CONTAINERID"),
        ("ADD", "a", "", "eth0", 4, "CNI_NETNS"),
        ("ADD", "a", &path, "", 4, "CNI_IFNAME"),
        ("ADD", "", "", "", 4, "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"),
        ("CHECK", "a", "", "eth0", 4, "CNI_NETNS"),
        ("DEL", "", "", "eth0", 4, "CNI_CONTAINERID"),
        ("DEL", "a", "", "", 4, "CNI_IFNAME"),
        ("add", "a", &path, "eth0", 4, "CNI_COMMAND"),
        ("ADD", "../../etc/passwd", &path, "eth0", 4, "CNI_CONTAINERID"),
        ("ADD", "a\n{\"code\":0}", &path, "eth0", 4, "CNI_CONTAINERID"),
        ("ADD", "a b", &path, "eth0", 4, "CNI_CONTAINERID"),
        ("ADD", &long, &path, "eth0", 4, "CNI_CONTAINERID"),
        ("ADD", "a", &path, "../eth0", 4, "CNI_IFNAME"),
        ("ADD", "a", &path, "..", 4, "CNI_IFNAME"),
        ("ADD", "a", &path, "sixteen-bytes-xx", 4, "CNI_IFNAME"),
        ("DEL", "a/../b", "", "eth0", 4, "CNI_CONTAINERID"),
        ("ADD", "a", "/none", "eth0", 3, "CNI_NETNS /none"),
        ("ADD", "a", &own, "eth0", 3, "CNI_NETNS"),
        ("ADD", "a", "/proc/self/ns/net", "eth0", 4, "the host's own"),
        ("ADD", "a", "/proc/self/ns/uts", "eth0", 100, "CNI_NETNS"),
        (
            "ADD",
            "a",
            "/etc/hostname",
            "eth0",
            4,
            "is not a network namespace",
        ),
        ("ADD", "a", "/dev/null/x", "eth0", 3, "CNI_NETNS"),
    ];
    for (command, id, netns, ifname, code, says) in cases {
        let variables = [
            ("CNI_COMMAND", *command),
            ("CNI_CONTAINERID", *id),
            ("CNI_NETNS", *netns),
            ("CNI_IFNAME", *ifname),
        ];
        let answer = finish(node.start_with(&variables, config.as_bytes()));
        assert_eq!(
            answer.code(),
            *code,
            "{command} {id} {netns} {ifname}: {}",
            answer.text()
        );
        assert!(answer.text().contains(says), "{}", answer.text());
    }
    node.assert_empty();
}

// C2
#[test]
fn without_a_verb_a_human_gets_one_line() {
    let node = Node::new(&DUAL);
    let answer = finish(node.start_with::<&str>(&[], b""));
    assert!(!answer.success);
    assert_eq!(answer.stdout, "");
    assert_eq!(answer.stderr.lines().count(), 1);
    assert!(
        answer.stderr.contains(env!("CARGO_PKG_VERSION")),
        "{}",
        answer.stderr
    );
}

// C2
#[test]
fn bad_configs_are_told_apart() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    let huge = format!("{{\"name\": \"{}\"}}", "x".repeat(1024 * 1024));
    let mut nameless = node.config();
    nameless.remove("name");
    let nameless = Value::Object(nameless).to_string();
    let mapping = json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 0, "containerPort": 80 }] } });
    let cases = [
        (String::new(), 6, "no network config"),
        (" \n".to_owned(), 6, "no network config"),
        ("{".to_owned(), 6, "no JSON object"),
        ("[]".to_owned(), 6, "no JSON object"),
        ("\u{0}".to_owned(), 6, "no JSON object"),
        ("[".repeat(100_000), 6, "no JSON object"),
        (huge, 6, "larger than"),
        (nameless, 7, "name: is missing"),
        (node.with(json!({ "name": "../x" })), 7, "name"),
        (node.with(json!({ "name": 5 })), 7, "name 5"),
        (node.with(json!({ "nodeFile": "relative" })), 7, "nodeFile"),
        (node.with(json!({ "ipamDirectory": 1 })), 7, "ipamDirectory"),
        (node.with(json!({ "cniVersion": "9.9.9" })), 1, "9.9.9"),
        (node.with(json!({ "cniVersion": 1 })), 1, "cniVersion 1"),
        (node.with(json!({ "runtimeConfig": [] })), 7, "runtimeConfig"),
        (
            node.with(json!({ "runtimeConfig": { "mac": "01:00:00:00:00:01" } })),
            7,
            "runtimeConfig.mac",
        ),
        (
            node.with(json!({ "runtimeConfig": { "mac": "zz" } })),
            7,
            "runtimeConfig.mac",
        ),
        (
            node.with(json!({ "prevResult": { "cniVersion": "1.1.0" } })),
            7,
            "prevResult",
        ),
        (node.with(mapping), 7, "runtimeConfig.portMappings {"),
        (
            node.with(json!({ "runtimeConfig": { "bandwidth": { "ingressRate": -1000 } } })),
            7,
            "runtimeConfig.bandwidth.ingressRate -1000",
        ),
    ];
    for (config, code, says) in cases {
        let answer = node.call("ADD", "a", &pod.path(), &config);
        assert_eq!(answer.code(), code, "{}", answer.text());
        assert!(answer.text().contains(says), "{}", answer.text());
    }
    node.assert_empty();
}

// C15 C10
#[test]
fn what_runtimes_really_send_is_taken() {
    let node = Node::new(&DUAL);
    let config = node.with(json!({
        "runtimeConfig": {
            "portMappings": [],
            "bandwidth": {},
            "ips": null,
            "mac": "",
            "cgroupPath": "/kubepods/x",
            "dns": { "servers": ["1.1.1.1"] },
            "io.kubernetes.cri.pod-annotations": { "a": "b" },
        },
        "args": { "cni": { "ips": [], "labels": [] }, "other": 1 },
        "somethingNew": { "a": 1 },
        "prevResult": null,
        "cni.dev/future": 1,
    }));
    let pod = Namespace::new();
    node.call("ADD", "a", &pod.path(), &config).succeeded();
    node.call("DEL", "a", &pod.path(), &config).succeeded();
    node.assert_empty();
}

// C8 I3
#[test]
fn status_says_ready_only_when_a_pod_could_be_wired() {
    let node = Node::new(&["10.244.1.0/31", "fd00:244:1::/64"]);
    let status = || node.call("STATUS", "", Path::new(""), &node.with(json!({})));
    status().succeeded();
    let pod = Namespace::new();
    node.add("a", &pod).succeeded();
    let full = status();
    assert_eq!(full.code(), 50);
    assert!(
        full.text()
            .contains("10.244.1.0/31 has 1 for pods, 1 held, 0 resting"),
        "{}",
        full.text()
    );

    let mut file = node.file(&DUAL);
    node.write(&file);
    status().succeeded();
    file.not_ready = "the API has not been reached".to_owned();
    node.write(&file);
    assert_eq!(status().code(), 50);
    assert!(status().text().contains("the API has not been reached"));
    let refused = node.add("b", &Namespace::new());
    assert_eq!(refused.code(), 11);
    assert!(
        refused.text().contains("the API has not been reached"),
        "{}",
        refused.text()
    );
    file.impaired = "the tunnel does not carry".to_owned();
    node.write(&file);
    assert_eq!(status().code(), 51);
    assert!(status().text().contains("the tunnel does not carry"));

    node.write(&node.file(&[]));
    assert_eq!(status().code(), 50);
    std::fs::write(node.node_file(), "{\"version\": 1").unwrap();
    assert_eq!(status().code(), 50);
    std::fs::remove_file(node.node_file()).unwrap();
    assert_eq!(status().code(), 50);
    assert_eq!(node.add("b", &Namespace::new()).code(), 11);
}

// C4
#[test]
fn an_mtu_too_small_for_ipv6_is_refused() {
    let node = Node::new(&DUAL);
    let mut file = node.file(&DUAL);
    file.mtu = 1279;
    node.write(&file);
    let answer = node.add("a", &Namespace::new());
    assert_eq!(answer.code(), 7);
    assert!(answer.text().contains("mtu 1279"), "{}", answer.text());
    node.assert_empty();
    file.mtu = 1280;
    node.write(&file);
    node.add("a", &Namespace::new()).succeeded();
}
