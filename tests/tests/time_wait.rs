//! A node stands in for clients whose endpoint is elsewhere. What an endpoint remembers of one of their connections must not meet another.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use anyhow::{Context, Result};
use sluice_lab::demo::restart::{under_load, wait_for_requests};
use sluice_lab::{Lab, Node, Options, ProxyMode, url, wait_until};
use sluice_tests::PATIENCE;

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  clusterIPs: [10.96.1.1, 'fd00:96::1:1']
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
";

/// How many loops ask at each address.
const LOOPS: usize = 2;
/// Longer than a connection that is over is kept whole.
const A_WHILE: Duration = Duration::from_secs(16);

/// A pod on node1, and a Service of it that is asked for at node2.
fn lab_of(proxy: ProxyMode) -> Lab {
    let lab = Lab::up(Options {
        nodes: 2,
        proxy,
        ..Options::default()
    })
    .unwrap();
    lab.pod_add("node1", "web", &[("app", "web")], &[]).unwrap();
    lab.apply_text(SERVICE).unwrap();
    for address in &lab.host("node2").unwrap().addresses {
        wait_until("the node port answers", PATIENCE, || {
            Ok(lab.client().get(&address.to_string(), 30080, "").is_ok())
        })
        .unwrap();
    }
    lab
}

/// Loops of requests from outside to both of node2's addresses.
fn load(lab: &Lab) -> Result<Vec<(Node<'_>, String, String)>> {
    let mut load = Vec::new();
    for address in &lab.host("node2")?.addresses {
        for number in 0..LOOPS {
            let name = format!("client-{}-{number}", if address.is_ipv4() { 4 } else { 6 });
            load.push((lab.client(), name, url(&address.to_string(), 30080, "")));
        }
    }
    Ok(load)
}

/// A figure of `TcpExt` in /proc/net/netstat.
fn figure(place: &Node<'_>, name: &str) -> Result<u64> {
    let table = place.run(&["cat", "/proc/net/netstat"])?;
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let column = names.split_whitespace().position(|known| known == name);
    let value = column.and_then(|column| values.split_whitespace().nth(column));
    Ok(value.with_context(|| format!("there is no {name}"))?.parse()?)
}

/// Nothing that opened a connection was taken for a leftover of a former one; `made` of them were closed by the endpoint first.
fn has_met_none(lab: &Lab, made: usize) {
    let pod = lab.pod("web").unwrap();
    let waited = figure(&pod, "TW").unwrap();
    assert!(
        waited > made as u64 / 2,
        "{waited} of {made} closed by the endpoint"
    );
    assert_eq!(figure(&pod, "PAWSTimewait").unwrap(), 0, "of {made}");
    assert_eq!(figure(&lab.client(), "TCPSynRetrans").unwrap(), 0, "of {made}");
}

/// S5 S17: a client that has used up its ports begins with the first again, and its endpoint remembers every one of them. Through a node
/// port it is served at once all the same, as it would be without.
fn ports_used_again(proxy: ProxyMode) {
    let lab = lab_of(proxy);
    let range = ["sysctl", "-w", "net.ipv4.ip_local_port_range=40000 41999"];
    lab.client().run(&range).unwrap();
    let load = load(&lab).unwrap();
    let made = under_load(&load, || {
        load.iter()
            .try_for_each(|(place, name, _)| wait_for_requests(place, name, 800))
    })
    .unwrap();
    has_met_none(&lab, made);
}

/// S5 S17
#[test]
fn a_clients_port_is_served_again_at_once_in_ebpf() {
    ports_used_again(ProxyMode::Ebpf);
}

/// S5 S17
#[test]
fn a_clients_port_is_served_again_at_once_in_nftables() {
    ports_used_again(ProxyMode::Nftables);
}

/// S5 S17
#[test]
fn a_clients_port_is_served_again_at_once_in_iptables() {
    ports_used_again(ProxyMode::Iptables);
}

/// S5 S17: nor does one client's connection meet what is left of another's when that has been over for a while.
#[test]
fn a_stand_ins_port_rests_while_its_endpoint_remembers() {
    let lab = lab_of(ProxyMode::Ebpf);
    let load = load(&lab).unwrap();
    let made = under_load(&load, || {
        std::thread::sleep(A_WHILE);
        Ok(())
    })
    .unwrap();
    has_met_none(&lab, made);
}
