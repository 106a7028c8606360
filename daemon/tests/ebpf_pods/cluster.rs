//! Two pods of a node and another node with one, and what they say to each other.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;

use sluice_daemon::network::Device;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};

use crate::ebpf_support::bulk::{self, echo};
use crate::ebpf_support::neighbour::Neighbour;
use crate::ebpf_support::pods::{Pod, pod};
use crate::ebpf_support::{Node, ip};

pub const A: [&str; 2] = ["10.244.1.2", "fd10:244:0:1::2"];
pub const B: [&str; 2] = ["10.244.1.3", "fd10:244:0:1::3"];
/// A pod of another node.
pub const FAR: [&str; 2] = ["10.244.2.9", "fd10:244:0:2::9"];

/// Two pods of this node, and another node with one.
pub struct Cluster {
    pub a: Pod,
    pub b: Pod,
    pub far: Neighbour,
    pub surroundings: Surroundings,
}

pub fn cluster(node: &Node) -> Cluster {
    for (key, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/forwarding", "1"),
    ] {
        fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
    }
    let (a, b) = (pod(node, "sluicea", A), pod(node, "sluiceb", B));
    let far = Neighbour::new(node);
    far.join("uplink", "eth0");
    for address in [
        "192.0.2.1/24",
        "2001:db8::1/64",
        "10.244.1.0/32",
        "fd10:244:0:1::/128",
    ] {
        ip(&format!(
            "addr add {address} dev uplink{}",
            if address.contains("::") { " nodad" } else { "" }
        ));
    }
    far.run(|| {
        ip("addr add 192.0.2.2/24 dev eth0");
        ip("addr add 2001:db8::2/64 dev eth0 nodad");
        ip("addr add 10.244.2.9/32 dev lo");
        ip("addr add fd10:244:0:2::9/128 dev lo nodad");
        ip("route add 10.244.1.0/24 via 192.0.2.1 src 10.244.2.9");
        ip("route add fd10:244:0:1::/64 via 2001:db8::1 src fd10:244:0:2::9");
    });
    ip("route add 10.244.2.0/24 via 192.0.2.2");
    ip("route add fd10:244:0:2::/64 via 2001:db8::2");
    let addresses = |all: [&str; 2]| all.map(|address| address.parse().unwrap()).to_vec();
    let surroundings = Surroundings {
        own_networks: Vec::new(),
        devices: vec![Device {
            index: nix::net::if_::if_nametoindex("uplink").unwrap(),
            name: "uplink".to_owned(),
        }],
        pod_network_addresses: addresses(["10.244.1.0", "fd10:244:0:1::"]),
        node_addresses: addresses(["192.0.2.1", "2001:db8::1"]),
        pods: vec![a.device.clone(), b.device.clone()],
        pod_networks: vec!["10.244.0.0/16".parse().unwrap(), "fd10:244::/48".parse().unwrap()],
        fast_path: true,
        ping: true,
    };
    Cluster {
        a,
        b,
        far,
        surroundings,
    }
}

impl Cluster {
    pub fn open(&self, node: &Node) -> EbpfProxy {
        let mut proxy = node.open();
        proxy.adjust(&self.surroundings).unwrap();
        proxy
    }
}

pub fn counter(proxy: &EbpfProxy, name: &str) -> u64 {
    let counters = proxy.summary().unwrap().counters;
    counters.iter().find(|(known, _)| *known == name).unwrap().1
}

/// Serves one connection: sends back all it gets. What the server saw as the client comes out of the thread.
pub fn serve(there: &Neighbour, at: SocketAddr) -> mpsc::Receiver<SocketAddr> {
    let listener = there.run(move || TcpListener::bind(at).unwrap());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(echo(&listener)));
    receiver
}

/// A megabyte from there and back; the client's own address and whom it saw.
pub fn bulk(there: &Neighbour, to: SocketAddr) -> (SocketAddr, SocketAddr) {
    there.run(move || bulk::bulk(to))
}

pub fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// What `ping` said.
pub fn ping(there: &Neighbour, arguments: &str) -> String {
    let arguments = arguments.to_owned();
    there.run(move || {
        let output = std::process::Command::new("ping")
            .args(arguments.split(' '))
            .output()
            .expect("ping must be installed");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    })
}
