//! Services of every sort, for the dataplanes by netfilter.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use sluice_daemon::proxy::{Dirty, Proxy, Surroundings};
use sluice_daemon::state::service_port::{
    Family, FrontendKind, Protocol, Scope, ServicePort, ServicePortKey, WhenEmpty,
};

use crate::ebpf_support::{Desired, ip, key, port};

const CLUSTER_IP: FrontendKind = FrontendKind::ClusterIp;
const NODE_PORT: FrontendKind = FrontendKind::NodePort;

/// The node they are on.
pub fn surroundings() -> Surroundings {
    Surroundings {
        own_networks: vec!["10.244.1.0/24".parse().unwrap(), "fd10:1::/64".parse().unwrap()],
        node_addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        ping: true,
        ..Surroundings::default()
    }
}

/// The proxy on that node.
pub fn adjusted<P: Proxy>(opened: anyhow::Result<P>) -> P {
    let mut proxy = opened.unwrap_or_else(|error| panic!("{error:#}"));
    let adjusted = proxy.adjust(&surroundings());
    adjusted.unwrap_or_else(|error| panic!("{error:#}"));
    proxy
}

/// Has it serve what is desired.
pub fn sync(proxy: &mut impl Proxy, desired: &Desired, dirty: &Dirty) {
    let report = proxy
        .sync(desired, dirty)
        .unwrap_or_else(|error| panic!("{error:#}"));
    assert!(report.failed.is_empty(), "{report:?}");
}

/// Endpoints, the first so many.
pub fn backends(count: u16) -> Vec<SocketAddr> {
    (0..count)
        .map(|i| SocketAddr::from(([10, 244, 1 + (i >> 8) as u8, i as u8], 8080)))
        .collect()
}

fn v6(count: u16) -> Vec<SocketAddr> {
    (0..count)
        .map(|i| format!("[fd10:1::{i:x}]:8080").parse().unwrap())
        .collect()
}

/// Of every sort one.
pub fn variety() -> Desired {
    let local = ServicePortKey {
        scope: Scope::Local,
        ..key("local", Protocol::Tcp, Family::V4)
    };
    let sticky = ServicePort {
        affinity: Some(Duration::from_secs(60)),
        ..port(&[("10.96.0.2:53", CLUSTER_IP)], &backends(2))
    };
    let ranged = ServicePort {
        source_ranges: Some(vec![
            "192.0.2.0/24".parse().unwrap(),
            "192.0.2.128/25".parse().unwrap(),
        ]),
        ..port(&[("203.0.113.1:80", FrontendKind::LoadBalancer)], &backends(1))
    };
    let elsewhere = ServicePort {
        when_empty: WhenEmpty::Drop,
        ..port(&[("192.0.2.1:30080", NODE_PORT)], &[])
    };
    Desired::from([
        (
            key("web", Protocol::Tcp, Family::V4),
            port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(3)),
        ),
        (
            key("web", Protocol::Tcp, Family::V6),
            port(&[("[fd96::1]:80", CLUSTER_IP)], &v6(3)),
        ),
        (key("dns", Protocol::Udp, Family::V4), sticky),
        (key("lb", Protocol::Tcp, Family::V4), ranged),
        (
            key("local", Protocol::Tcp, Family::V4),
            port(&[("10.96.0.3:80", CLUSTER_IP)], &backends(2)),
        ),
        (local, elsewhere),
        (
            key("none", Protocol::Sctp, Family::V4),
            port(&[("10.96.0.4:80", CLUSTER_IP)], &[]),
        ),
    ])
}

/// Makes a way out, to nobody.
fn lead_out() {
    ip("link add way type veth peer name beyond");
    ip("address add 192.0.2.1/24 dev way");
    ip("link set way up");
    ip("link set beyond up");
    ip("route add default dev way");
}

/// Sends a datagram that nobody answers.
pub fn send_in_vain(to: &str) {
    lead_out();
    let socket = UdpSocket::bind("192.0.2.1:5353").unwrap();
    socket.send_to(b"anybody?", to).unwrap();
}

/// Begins a connection that nobody answers.
pub fn ask_in_vain(at: &str) {
    lead_out();
    let asked = TcpStream::connect_timeout(&at.parse().unwrap(), Duration::from_millis(50));
    assert!(asked.is_err());
}

/// How many connections to this address the kernel knows that nobody has answered.
pub fn unanswered(address: &str) -> usize {
    let output = Command::new("conntrack")
        .args(["-L", "--orig-dst", address])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| line.contains("UNREPLIED")).count()
}
