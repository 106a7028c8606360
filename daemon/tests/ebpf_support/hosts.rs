//! Real devices around a node: a client host, and another node with a pod, each a network namespace.
//!
//! The kernel's own stack routes in between, with a strict reverse-path filter, partial checksums and large segments.

use std::fs;
use std::net::IpAddr;

use sluice_daemon::network::Device;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};

use super::neighbour::Neighbour;
use super::{Node, ip};

/// A client host and another node beside this one.
pub struct Hosts {
    /// It reaches this node's uplink.
    pub client: Neighbour,
    /// The other node; it knows no way to the client.
    pub other: Neighbour,
}

/// Makes them, and joins them to `node`.
pub fn hosts(node: &Node) -> Hosts {
    let client = Neighbour::new(node);
    client.join("uplink", "eth0");
    ip("addr add 198.51.100.1/24 dev uplink");
    ip("addr add 2001:db8:f::1/64 dev uplink nodad");
    client.run(|| {
        ip("addr add 198.51.100.7/24 dev eth0");
        ip("addr add 2001:db8:f::7/64 dev eth0 nodad");
    });
    let other = Neighbour::new(node);
    other.join("tunnel", "eth0");
    ip("addr add 10.244.1.0/32 dev tunnel");
    ip("addr add fd10:1::/128 dev tunnel nodad");
    ip("route add 10.244.2.0/24 dev tunnel");
    ip("route add fd10:2::/64 dev tunnel");
    // Pods of this node, for the sake of the test on its own loopback.
    ip("addr add 10.244.1.9/32 dev lo");
    ip("addr add fd10:1::9/128 dev lo nodad");
    other.run(|| {
        ip("addr add 10.244.2.9/32 dev eth0");
        ip("addr add fd10:2::9/128 dev eth0 nodad");
        ip("route add 10.244.1.0/24 dev eth0");
        ip("route add fd10:1::/64 dev eth0");
    });
    for (key, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/all/rp_filter", "1"),
        ("ipv4/conf/uplink/rp_filter", "1"),
        ("ipv4/conf/tunnel/rp_filter", "1"),
    ] {
        fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
    }
    Hosts { client, other }
}

impl Hosts {
    /// The backend, with the programs at the devices towards both.
    pub fn open(&self, node: &Node) -> EbpfProxy {
        let mut proxy = node.open();
        let device = |name: &str| Device {
            index: nix::net::if_::if_nametoindex(name).unwrap(),
            name: name.to_owned(),
        };
        let addresses = |all: [&str; 2]| all.map(|a| a.parse::<IpAddr>().unwrap()).to_vec();
        proxy
            .adjust(&Surroundings {
                devices: vec![device("uplink"), device("tunnel")],
                pod_network_addresses: addresses(["10.244.1.0", "fd10:1::"]),
                node_addresses: addresses(["198.51.100.1", "2001:db8:f::1"]),
                ..Surroundings::default()
            })
            .unwrap();
        proxy
    }
}
