//! Anything at all on stdin and in the variables. `./dev test --fuzz` runs these for a minute each.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use crate::node::{Node, finish};
use crate::wiring::DUAL;

const VERBS: [&str; 7] = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "add"];

/// What a runtime may send, with everything in it that the plugin knows. The paths stand for the node's own: what is left of them
/// after a change leads nowhere else.
fn config() -> Value {
    json!({
        "cniVersion": "1.1.0",
        "name": "sluice",
        "type": "sluice",
        "capabilities": { "portMappings": true, "ips": true, "bandwidth": true },
        "nodeFile": "@NODE@",
        "ipamDirectory": "@IPAM@",
        "removalsSocket": "@SOCKET@",
        "clsact": true,
        "ipam": { "reserved": ["10.244.1.5"] },
        "dns": { "nameservers": ["10.96.0.10"] },
        "args": { "cni": { "ips": ["10.244.1.9"] } },
        "runtimeConfig": {
            "ips": ["10.244.1.9/24"],
            "mac": "02:00:00:00:00:01",
            "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "" }],
            "bandwidth": { "ingressRate": 1000000, "ingressBurst": 1000000, "egressRate": 1, "egressBurst": 1 },
        },
        "prevResult": {
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/nowhere" }],
            "ips": [{ "address": "10.244.1.9/32", "gateway": "169.254.1.1", "interface": 0 }],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }],
        },
        "cni.dev/valid-attachments": [{ "containerID": "a", "ifname": "eth0" }],
    })
}

/// Any JSON, none of it large.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        "[0-9a-f:./]{0,30}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z]{0,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A config of which something is something else.
fn changed_value() -> impl Strategy<Value = Vec<u8>> {
    const PLACES: [&str; 18] = [
        "/cniVersion",
        "/name",
        "/capabilities",
        "/ipam",
        "/ipam/reserved/0",
        "/dns",
        "/args/cni/ips/0",
        "/runtimeConfig",
        "/runtimeConfig/ips/0",
        "/runtimeConfig/mac",
        "/runtimeConfig/portMappings/0/hostPort",
        "/runtimeConfig/portMappings/0/hostIP",
        "/runtimeConfig/bandwidth/ingressRate",
        "/prevResult",
        "/prevResult/interfaces/0",
        "/prevResult/ips/0/address",
        "/prevResult/ips/0/interface",
        "/cni.dev~1valid-attachments/0",
    ];
    (prop::sample::select(&PLACES[..]), any_json()).prop_map(|(place, value)| {
        let mut config = config();
        if let Some(there) = config.pointer_mut(place) {
            *there = value;
        }
        config.to_string().into_bytes()
    })
}

/// A config of which bytes are others, and the end may be missing.
fn changed_bytes() -> impl Strategy<Value = Vec<u8>> {
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (edits, any::<prop::sample::Index>(), any::<bool>()).prop_map(|(edits, end, cut)| {
        let mut text = config().to_string().into_bytes();
        for (place, byte) in edits {
            let place = place.index(text.len());
            text[place] = byte;
        }
        if cut {
            text.truncate(end.index(text.len()));
        }
        text
    })
}

fn stdin() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => changed_value(),
        4 => changed_bytes(),
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ]
}

/// What `CNI_ARGS` may be: no NUL, which no variable holds.
fn arguments() -> impl Strategy<Value = Vec<u8>> {
    let pair = prop_oneof![
        Just(b"IgnoreUnknown=1".to_vec()),
        Just(b"K8S_POD_NAME=web".to_vec()),
        "IP=[0-9a-f:./,]{0,30}".prop_map(String::into_bytes),
        "MAC=[0-9a-fA-F:-]{0,20}".prop_map(String::into_bytes),
        prop::collection::vec(1..=u8::MAX, 0..20),
    ];
    prop::collection::vec(pair, 0..5).prop_map(|pairs| pairs.join(&b';'))
}

/// C2 C12: every answer is a result or the specification's error object and one line for people, and nothing comes of it.
#[test]
fn whatever_is_sent_the_answer_is_one_and_nothing_stays() {
    let node = Node::new(&DUAL);
    let paths = [
        ("@NODE@", node.node_file()),
        ("@IPAM@", node.ipam()),
        ("@SOCKET@", node.removals_socket()),
    ];
    let call = (prop::sample::select(&VERBS[..]), stdin(), arguments(), ".{0,20}");
    let settings = Config {
        failure_persistence: None,
        ..Config::default()
    };
    let result = TestRunner::new(settings).run(&call, |(verb, stdin, arguments, id)| {
        let mut stdin = stdin;
        for (name, path) in &paths {
            let at = stdin.windows(name.len()).position(|part| part == name.as_bytes());
            if let Some(at) = at {
                stdin.splice(at..at + name.len(), path.to_str().unwrap().bytes());
            }
        }
        let id = id.replace('\0', "");
        let variables = [
            ("CNI_COMMAND", OsString::from(verb)),
            ("CNI_CONTAINERID", OsString::from(id)),
            ("CNI_NETNS", OsString::from("/nowhere")),
            ("CNI_IFNAME", OsString::from("eth0")),
            ("CNI_ARGS", OsString::from_vec(arguments)),
            ("CNI_PATH", OsString::new()),
        ];
        let answer = finish(node.start_with(&variables, &stdin));
        if !answer.success {
            prop_assert!(answer.code() > 0);
            prop_assert!(!answer.text().is_empty());
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    node.assert_empty();
}
