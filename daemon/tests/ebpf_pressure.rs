//! More connections than the table holds.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::net::{Ipv4Addr, SocketAddr};

use ebpf_support::device::Device;
use ebpf_support::packet::{ACK, SYN, tcp};
use ebpf_support::{Desired, ip, key, on_node, port, sync};
use sluice_daemon::network;
use sluice_daemon::proxy::{ConnectionState, Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Protocol};

/// Two entries each: more than twice what the table holds.
const STRANGERS: u32 = 150_000;

/// S23
#[test]
fn a_flood_of_new_connections_leaves_those_that_live() {
    on_node(|node| {
        ip("link add uplink type veth peer name other");
        let mut proxy = node.open();
        proxy
            .adjust(&Surroundings {
                devices: vec![network::Device {
                    index: nix::net::if_::if_nametoindex("uplink").unwrap(),
                    name: "uplink".to_owned(),
                }],
                ..Surroundings::default()
            })
            .unwrap();
        let device = Device::attached(&node.options.pins, "uplink");
        let backend = "10.244.1.9:8080";
        let set = port(
            &[("192.0.2.1:30080", FrontendKind::NodePort)],
            &[backend.parse().unwrap()],
        );
        sync(
            &mut proxy,
            &Desired::from([(key("web", Protocol::Tcp, Family::V4), set)]),
        );

        let sent = tcp("198.51.100.7:5000", "192.0.2.1:30080", SYN);
        let inside = device.packet_in(&sent).unwrap();
        assert_eq!(inside.destination, backend.parse().unwrap());
        let answer = inside.reply(SYN | ACK);
        assert_eq!(device.packet_out(&answer).unwrap().source, sent.destination);
        let live = |when: u32| {
            let data = device.packet_in(&sent.flags(ACK)).unwrap();
            assert_eq!(
                data.destination,
                backend.parse().unwrap(),
                "after {when} strangers"
            );
            let answer = device.packet_out(&data.reply(ACK)).unwrap();
            assert_eq!(answer.source, sent.destination, "after {when} strangers");
        };
        for stranger in 0..STRANGERS {
            let client = SocketAddr::new(Ipv4Addr::from_bits(0x0b00_0000 + stranger).into(), 4000);
            assert!(
                device.packet_in(&sent.from(client)).is_some(),
                "stranger {stranger}"
            );
            if stranger % 500 == 0 {
                live(stranger);
            }
        }
        live(STRANGERS);

        let fill = |summary: &sluice_daemon::proxy::ebpf::Summary| {
            let table = summary
                .tables
                .iter()
                .find(|table| table.name == "connections_v1")
                .unwrap();
            (table.entries, table.capacity)
        };
        let (entries, capacity) = fill(&proxy.summary().unwrap());
        assert!(entries * 10 > capacity * 6, "{entries} of {capacity}");
        // Twice, since what stands alone is only then known for an orphan.
        proxy.tend().unwrap();
        proxy.tend().unwrap();
        let summary = proxy.summary().unwrap();
        let (entries, _) = fill(&summary);
        assert!(entries * 10 <= capacity * 5, "{entries} of {capacity}");
        assert!(summary.given_up > 0);
        let connections = proxy.connections().unwrap();
        let ours = connections
            .iter()
            .find(|connection| connection.client == sent.source)
            .unwrap();
        assert_eq!(ours.state, ConnectionState::Established);
        live(STRANGERS);
    });
}
