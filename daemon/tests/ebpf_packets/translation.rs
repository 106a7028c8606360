//! Which endpoint a packet comes to, under which addresses, and how its replies find back.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use sluice_daemon::proxy::Proxy;
use sluice_daemon::state::service_port::{
    Family, Place, Protocol, Scope, ServicePort, ServicePortKey, WhenEmpty,
};

use crate::cases::{NODE_PORT, cases, open, surroundings};
use crate::ebpf_support::packet::{ACK, FIN, RST, SYN, tcp};
use crate::ebpf_support::{Desired, key, on_node, port, sync};

/// S2 S16 S17
#[test]
fn a_local_endpoint_sees_the_client_and_the_client_the_node_port() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for case in cases() {
            sync(&mut proxy, &case.desired(Place::ThisNode));
            for packet in [case.first.clone(), case.first.clone()] {
                let inside = device.packet_in(&packet).unwrap();
                assert_eq!(
                    inside,
                    packet.to(case.backend),
                    "no other change than the destination"
                );
                let reply = inside.reply(SYN | ACK);
                let outside = device.packet_out(&reply).unwrap();
                assert_eq!(outside, reply.from(packet.destination));
            }
            let data = if case.first.tcp.is_some() {
                case.first.flags(ACK)
            } else {
                case.first.clone()
            };
            assert_eq!(device.packet_in(&data).unwrap(), data.to(case.backend));
        }
    });
}

/// S5: whichever node a load balancer sends a client's packet to, and however that node came to its endpoints; and all of them have
/// their share.
#[test]
fn every_node_sends_the_same_client_to_the_same_endpoint() {
    let backends = |numbers: std::ops::Range<u8>| -> Vec<SocketAddr> {
        numbers
            .map(|number| SocketAddr::new([10, 244, 1, number].into(), 8080))
            .collect()
    };
    let web = key("web", Protocol::Tcp, Family::V4);
    let chosen = |frontend: &str, history: &[Vec<SocketAddr>]| {
        let mut chosen = Vec::new();
        on_node(|node| {
            let (mut proxy, device) = open(node);
            for backends in history {
                let desired = Desired::from([(web.clone(), port(&[(frontend, NODE_PORT)], backends))]);
                sync(&mut proxy, &desired);
                assert_eq!(proxy.audit().unwrap(), 0);
            }
            for number in 0..600_u16 {
                let client = format!("198.51.100.{}:{}", number % 7 + 1, 40_000 + number);
                let packet = device.packet_in(&tcp(&client, frontend, SYN)).unwrap();
                chosen.push(packet.destination);
            }
        });
        chosen
    };
    let one = chosen("192.0.2.1:30080", &[backends(1..11)]);
    let history = [backends(5..17), backends(4..17), backends(4..12), backends(1..11)];
    let other = chosen("192.0.2.2:30080", &history);
    assert_eq!(one, other);
    for backend in backends(1..11) {
        let share = one.iter().filter(|chosen| **chosen == backend).count();
        assert!((30..=90).contains(&share), "{backend} has {share} of 600");
    }
}

/// S2 S16 S17
#[test]
fn an_endpoint_elsewhere_sees_this_node_and_its_replies_find_back() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for (place, addresses) in [
            (Place::PodNetwork, surroundings().pod_network_addresses),
            (Place::Outside, surroundings().node_addresses),
        ] {
            for mut case in cases() {
                sync(&mut proxy, &case.desired(place));
                // Another connection than the other place's.
                let port = if place == Place::Outside { 40001 } else { 40002 };
                case.first.source.set_port(port);
                let routed = device.packet_in(&case.first).unwrap();
                assert_eq!(routed, case.first.to(case.backend));
                let sent = device.packet_out(&routed).unwrap();
                let stand_in = sent.source;
                assert_eq!(sent, routed.from(stand_in));
                assert!(addresses.contains(&stand_in.ip()), "{stand_in}");
                assert!((1024..=32767).contains(&stand_in.port()), "{stand_in}");

                let reply = sent.reply(SYN | ACK);
                let back = device.packet_in(&reply).unwrap();
                assert_eq!(back, reply.to(case.first.source));
                let answer = device.packet_out(&back).unwrap();
                assert_eq!(answer, back.from(case.first.destination));

                assert_eq!(
                    device.packet_out(&routed).unwrap().source,
                    stand_in,
                    "the same all along"
                );
            }
        }
    });
}

/// S5
#[test]
fn a_tcp_connection_stays_whatever_becomes_of_the_service() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        let case = cases().remove(0);
        sync(&mut proxy, &case.desired(Place::ThisNode));
        device.packet_in(&case.first).unwrap();
        let data = case.first.flags(ACK);
        let other: SocketAddr = "10.244.1.10:8080".parse().unwrap();
        let moved = Desired::from([(case.key.clone(), port(&[(case.frontend, NODE_PORT)], &[other]))]);
        for desired in [moved.clone(), Desired::new(), moved.clone()] {
            sync(&mut proxy, &desired);
            assert_eq!(device.packet_in(&data).unwrap().destination, case.backend);
            let reply = data.to(case.backend).reply(ACK);
            assert_eq!(device.packet_out(&reply).unwrap().source, case.first.destination);
        }
        // A new connection from the same port, the old endpoint being gone: chosen anew.
        assert_eq!(device.packet_in(&case.first).unwrap().destination, other);
        assert_eq!(device.packet_in(&data).unwrap().destination, other);
    });
}

/// S5
#[test]
fn a_closed_connections_port_may_be_used_again() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        let case = cases().remove(0);
        let backends: Vec<SocketAddr> = (1..=50)
            .map(|last| SocketAddr::new(IpAddr::from([10, 244, 1, last]), 8080))
            .collect();
        let mut serve_without = |gone: Option<SocketAddr>| {
            let rest: Vec<_> = backends
                .iter()
                .copied()
                .filter(|one| Some(*one) != gone)
                .collect();
            let web = port(&[(case.frontend, NODE_PORT)], &rest);
            sync(&mut proxy, &Desired::from([(case.key.clone(), web)]));
        };
        for round in 0..20 {
            serve_without(None);
            let opened = device.packet_in(&case.first).unwrap();
            // A repeated SYN is the same connection.
            assert_eq!(device.packet_in(&case.first).unwrap(), opened);
            if round % 2 == 0 {
                device.packet_in(&case.first.flags(FIN | ACK)).unwrap();
                device.packet_out(&opened.reply(FIN | ACK)).unwrap();
            } else {
                device.packet_out(&opened.reply(RST)).unwrap();
            }
            // Who asks again would be sent there again, if it still served.
            serve_without(Some(opened.destination));
            let anew = device.packet_in(&case.first).unwrap();
            assert_ne!(
                anew.destination, opened.destination,
                "a new connection is balanced"
            );
            device.packet_out(&anew.reply(RST)).unwrap();
        }
    });
}

/// S13
#[test]
fn a_datagram_never_follows_an_entry_that_no_longer_holds() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        let case = cases().remove(1);
        sync(&mut proxy, &case.desired(Place::PodNetwork));
        assert_eq!(device.packet_in(&case.first).unwrap().destination, case.backend);
        let other: SocketAddr = "10.244.1.10:8080".parse().unwrap();
        let moved = Desired::from([(case.key.clone(), port(&[(case.frontend, NODE_PORT)], &[other]))]);
        sync(&mut proxy, &moved);
        assert_eq!(device.packet_in(&case.first).unwrap().destination, other);
        let both = Desired::from([(
            case.key.clone(),
            port(&[(case.frontend, NODE_PORT)], &[case.backend, other]),
        )]);
        sync(&mut proxy, &both);
        for _ in 0..20 {
            assert_eq!(
                device.packet_in(&case.first).unwrap().destination,
                other,
                "a healthy flow stays"
            );
        }
        sync(&mut proxy, &Desired::new());
        assert_eq!(device.packet_in(&case.first).unwrap(), case.first);
    });
}

/// S10
#[test]
fn without_endpoints_the_host_refuses_and_a_local_service_drops() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for case in cases() {
            let empty = Desired::from([(case.key.clone(), port(&[(case.frontend, NODE_PORT)], &[]))]);
            sync(&mut proxy, &empty);
            assert_eq!(device.packet_in(&case.first).unwrap(), case.first);
            let local = ServicePortKey {
                scope: Scope::Local,
                ..case.key.clone()
            };
            let elsewhere = ServicePort {
                when_empty: WhenEmpty::Drop,
                ..port(&[(case.frontend, NODE_PORT)], &[])
            };
            sync(&mut proxy, &Desired::from([(local, elsewhere)]));
            assert_eq!(device.packet_in(&case.first), None);
        }
    });
}

/// S6
#[test]
fn session_affinity_goes_by_the_clients_address() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        let case = cases().remove(0);
        let backends: Vec<SocketAddr> = (1..=50)
            .map(|last| SocketAddr::new(IpAddr::from([10, 244, 1, last]), 8080))
            .collect();
        let mut port = port(&[(case.frontend, NODE_PORT)], &backends);
        port.affinity = Some(Duration::from_secs(3600));
        sync(&mut proxy, &Desired::from([(case.key.clone(), port.clone())]));
        let mut packet = case.first.clone();
        let mut at = |source_port: u16| {
            packet.source.set_port(source_port);
            device.packet_in(&packet).unwrap().destination
        };
        let chosen = at(50000);
        assert!((50001..50020).all(|port| at(port) == chosen));
        port.backends.retain(|backend| backend.address != chosen);
        sync(&mut proxy, &Desired::from([(case.key, port)]));
        let anew = at(50020);
        assert_ne!(anew, chosen);
        assert!((50021..50040).all(|port| at(port) == anew));
    });
}

/// S5
#[test]
fn one_client_port_to_two_frontends_is_two_connections() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        let case = cases().remove(0);
        let frontends = [("192.0.2.1:30080", NODE_PORT), ("192.0.2.1:30081", NODE_PORT)];
        sync(
            &mut proxy,
            &Desired::from([(case.key, port(&frontends, &[case.backend]))]),
        );
        let first = tcp("198.51.100.7:40000", "192.0.2.1:30080", SYN);
        let second = tcp("198.51.100.7:40000", "192.0.2.1:30081", SYN);
        let opened = device.packet_in(&first).unwrap();
        assert_eq!(
            device.packet_in(&second),
            None,
            "replies to the two could not be told apart"
        );
        assert_eq!(
            device.packet_out(&opened.reply(RST)).unwrap().source,
            first.destination
        );
        let opened = device.packet_in(&second).unwrap();
        assert_eq!(
            device.packet_out(&opened.reply(SYN | ACK)).unwrap().source,
            second.destination
        );
    });
}
