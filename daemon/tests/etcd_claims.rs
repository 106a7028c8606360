//! Many nodes that claim pod CIDRs at once, from a real etcd.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use jiff::Timestamp;
use sluice_daemon::config::Config;
use sluice_daemon::datastore::etcd::Members;
use sluice_daemon::datastore::etcd::Stored;
use sluice_daemon::datastore::etcd::objects::Objects;
use sluice_daemon::datastore::etcd::record::Record;
use sluice_daemon::datastore::etcd::registration::{Outcome, Registrar};
use sluice_daemon::state::objects::ObjectName;
use tempfile::TempDir;

/// An etcd of one member on loopback.
struct Etcd {
    process: Child,
    url: String,
    _data: TempDir,
}

impl Etcd {
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let [client, peer] = free_urls();
        let process = Command::new(program())
            .arg(format!("--data-dir={}", data.path().join("etcd").display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=default={peer}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            process,
            url: client,
            _data: data,
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

/// Debian's, where `./dev setup` unpacks it, else from `PATH`.
fn program() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let unpacked = cache.or(home).unwrap().join("sluice/etcd/usr/bin/etcd");
    if unpacked.is_file() {
        unpacked
    } else {
        PathBuf::from("etcd")
    }
}

fn free_urls() -> [String; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| format!("http://{}", listener.local_addr().unwrap()))
}

fn config(etcd: &Etcd, node: &str, more: &str) -> Config {
    let text = format!(
        "nodeName: {node}\nclusterCIDRs: [10.244.0.0/18, 'fd00:244::/58']\nserviceCIDRs: []\n\
         datastore:\n  kind: etcd\n  etcd: {{ endpoints: [{:?}], nodeAddresses: [192.0.2.7]{more} }}\n",
        etcd.url
    );
    Config::parse(Path::new("test.yaml"), &text).unwrap()
}

/// As the host `id` with the name `node` registers.
async fn register(etcd: &Etcd, node: &str, id: &str, more: &str) -> Outcome {
    let config = config(etcd, node, more);
    let record = Record {
        id: id.to_owned(),
        pod_cidrs: Vec::new(),
        held_until: Timestamp::UNIX_EPOCH,
    };
    let members = Members::new(config.datastore.etcd.clone());
    let mut registrar = Registrar::new(members.clone(), &config, &record);
    let mut tries = 0;
    loop {
        // It takes a moment until the server listens, and another until it has a leader.
        let registered = match members.connect().await {
            Ok(client) => registrar.register(&client).await,
            Err(error) => Err(error),
        };
        match registered {
            Ok(outcome) => return outcome,
            Err(error) if tries > 100 => panic!("{error:#}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
        tries += 1;
    }
}

async fn objects(etcd: &Etcd) -> Objects {
    Objects::connect(&config(etcd, "operator", "").datastore.etcd)
        .await
        .unwrap()
}

fn cidrs(outcome: &Outcome) -> Vec<String> {
    outcome
        .as_ref()
        .unwrap()
        .cidrs
        .iter()
        .map(ToString::to_string)
        .collect()
}

/// D3: no pod CIDR is given twice, whoever comes at the same time; what is full says so, and what is given back is given again.
#[tokio::test]
async fn fifty_nodes_at_once_get_a_pod_cidr_each() {
    let etcd = Etcd::start();
    let nodes: Vec<String> = (0..64).map(|number| format!("node{number}")).collect();
    let all_at_once = |nodes: Vec<String>| {
        let etcd = &etcd;
        futures_util::future::join_all(
            nodes
                .into_iter()
                .map(|node| async move { register(etcd, &node, &node, "").await }),
        )
    };
    let mut granted = all_at_once(nodes[..50].to_vec()).await;
    let distinct: BTreeSet<String> = granted.iter().flat_map(cidrs).collect();
    assert_eq!(
        distinct.len(),
        100,
        "one of each family for each of 50: {distinct:?}"
    );
    assert_eq!(
        objects(&etcd)
            .await
            .get(Stored::Node, None, None)
            .await
            .unwrap()
            .len(),
        50
    );

    // The same again is the same again, and the last free ones are found.
    let again = all_at_once(nodes[..50].to_vec()).await;
    assert_eq!(
        again.iter().map(cidrs).collect::<Vec<_>>(),
        granted.iter().map(cidrs).collect::<Vec<_>>()
    );
    granted.extend(all_at_once(nodes[50..].to_vec()).await);
    let distinct: BTreeSet<String> = granted.iter().flat_map(cidrs).collect();
    assert_eq!(distinct.len(), 128, "{distinct:?}");
    let full = register(&etcd, "late", "late", "").await.unwrap_err();
    assert!(
        full.contains("all pod CIDRs of length 24 in 10.244.0.0/18 are held"),
        "{full}"
    );

    let gone = ObjectName::new("", "node7");
    assert!(objects(&etcd).await.delete(Stored::Node, &gone).await.unwrap());
    let late = register(&etcd, "late", "late", "").await;
    assert_eq!(cidrs(&late), cidrs(&granted[7]));
}

/// D3: a host is not taken for another of its name, and nodes that would cut the network differently are told.
#[tokio::test]
async fn whoever_does_not_fit_is_told_why() {
    let etcd = Etcd::start();
    let first = register(&etcd, "node1", "a", "").await;
    let namesake = register(&etcd, "node1", "b", "").await.unwrap_err();
    assert!(
        namesake.contains("another host is node node1, at 192.0.2.7"),
        "{namesake}"
    );
    assert_eq!(cidrs(&register(&etcd, "node1", "a", "").await), cidrs(&first));
    let other = register(&etcd, "node2", "c", ", nodeCIDRMaskSizeIPv4: 25")
        .await
        .unwrap_err();
    assert!(
        other.contains("of length 24, and datastore.etcd.nodeCIDRMaskSizeIPv4 is 25 here"),
        "{other}"
    );

    // What an operator writes before the node comes is what it gets, and what is written of it stays.
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: node3, labels: {topology.kubernetes.io/zone: a}}\n\
                spec: {podCIDRs: [10.244.9.0/24, 'fd00:244:0:9::/64']}\n";
    objects(&etcd).await.apply(node, "test").await.unwrap();
    let third = register(&etcd, "node3", "d", "").await;
    assert_eq!(cidrs(&third), ["10.244.9.0/24", "fd00:244:0:9::/64"]);
    let stored = objects(&etcd)
        .await
        .get(Stored::Node, None, Some("node3"))
        .await
        .unwrap();
    assert_eq!(
        stored[0]["metadata"]["labels"]["topology.kubernetes.io/zone"],
        "a"
    );
    let labels = node.replace("zone: a", "zone: b").replace("spec:", "#");
    let applied = objects(&etcd).await.apply(&labels, "test").await.unwrap();
    assert_eq!(applied[0].what, "configured");
    let stored = objects(&etcd)
        .await
        .get(Stored::Node, None, Some("node3"))
        .await
        .unwrap();
    assert_eq!(stored[0]["spec"]["podCIDRs"][0], "10.244.9.0/24");
    assert_eq!(stored[0]["status"]["addresses"][0]["address"], "192.0.2.7");
}
