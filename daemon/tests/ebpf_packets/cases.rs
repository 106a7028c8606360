//! A node with a device attached, and a first packet for it per family and protocol.

use std::net::{IpAddr, SocketAddr};

use sluice_daemon::network;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol, ServicePortKey};

use crate::ebpf_support::device::Device;
use crate::ebpf_support::packet::{Packet, SYN, tcp, udp};
use crate::ebpf_support::{Desired, Node, ip, key, port};

pub const NODE_PORT: FrontendKind = FrontendKind::NodePort;

/// The backend with a device attached.
pub fn open(node: &Node) -> (EbpfProxy, Device) {
    ip("link add uplink type veth peer name fabric");
    let mut proxy = node.open();
    proxy.adjust(&surroundings()).unwrap();
    let device = Device::attached(&node.options.pins, "uplink");
    (proxy, device)
}

pub fn surroundings() -> Surroundings {
    let index = nix::net::if_::if_nametoindex("uplink").unwrap();
    let addresses = |all: [&str; 2]| all.map(|a| a.parse::<IpAddr>().unwrap()).to_vec();
    Surroundings {
        devices: vec![network::Device {
            index,
            name: "uplink".to_owned(),
        }],
        pod_network_addresses: addresses(["10.244.1.0", "fd10:1::"]),
        node_addresses: addresses(["192.0.2.1", "2001:db8::1"]),
        ..Surroundings::default()
    }
}

/// One case per family and protocol.
pub struct Case {
    pub key: ServicePortKey,
    pub frontend: &'static str,
    pub backend: SocketAddr,
    /// The first packet of a connection to the frontend.
    pub first: Packet,
}

pub fn cases() -> Vec<Case> {
    let v4 = ("198.51.100.7:40000", "192.0.2.1:30080", "10.244.1.9:8080");
    let v6 = ("[2001:db8:f::7]:40000", "[2001:db8::1]:30080", "[fd10:1::9]:8080");
    let mut cases = Vec::new();
    for (family, (client, frontend, backend)) in [(Family::V4, v4), (Family::V6, v6)] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let first = match protocol {
                Protocol::Tcp => tcp(client, frontend, SYN),
                _ => udp(client, frontend),
            };
            cases.push(Case {
                key: key("web", protocol, family),
                frontend,
                backend: backend.parse().unwrap(),
                first,
            });
        }
    }
    cases
}

impl Case {
    pub fn desired(&self, place: Place) -> Desired {
        let mut port = port(&[(self.frontend, NODE_PORT)], &[self.backend]);
        port.backends[0].place = place;
        Desired::from([(self.key.clone(), port)])
    }
}
