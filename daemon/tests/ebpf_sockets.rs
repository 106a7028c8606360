//! Services at the socket: real sockets in a cgroup and a network namespace of their own.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use ebpf_support::server::{PATIENCE, Server, addresses, ask_tcp, ask_udp, servers};
use ebpf_support::{Desired, ip, key, on_node, port, sync};
use nix::sched::{CloneFlags, unshare};
use sluice_daemon::state::service_port::{Family, FrontendKind, Protocol};

const CLUSTER_IP: FrontendKind = FrontendKind::ClusterIp;

/// S1 S5 S16
#[test]
fn tcp_connections_spread_over_all_endpoints() {
    on_node(|node| {
        addresses();
        let mut proxy = node.open();
        for (family, frontend, backends) in [
            (
                Family::V4,
                "10.96.0.1:80",
                ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"],
            ),
            (
                Family::V6,
                "[fd96::1]:80",
                ["[fd01::1]:8080", "[fd01::2]:8080", "[fd01::3]:8080"],
            ),
        ] {
            let (_servers, backends) = servers(Server::tcp, backends);
            let desired = Desired::from([(
                key("web", Protocol::Tcp, family),
                port(&[(frontend, CLUSTER_IP)], &backends),
            )]);
            sync(&mut proxy, &desired);
            let mut hits: BTreeMap<SocketAddr, u32> = BTreeMap::new();
            for _ in 0..300 {
                *hits.entry(ask_tcp(frontend).unwrap()).or_default() += 1;
            }
            assert_eq!(hits.keys().copied().collect::<Vec<_>>(), backends);
            // 100 expected; 50 is six standard deviations away.
            assert!(hits.values().all(|hits| *hits > 50), "{hits:?}");
        }
    });
}

/// S1 S5 S16
#[test]
fn a_udp_socket_stays_on_one_endpoint_and_sees_the_service() {
    on_node(|node| {
        addresses();
        let mut proxy = node.open();
        for (family, frontend, backends, any) in [
            (
                Family::V4,
                "10.96.0.1:53",
                ["10.1.0.1:53", "10.1.0.2:53", "10.1.0.3:53"],
                "0.0.0.0:0",
            ),
            (
                Family::V6,
                "[fd96::1]:53",
                ["[fd01::1]:53", "[fd01::2]:53", "[fd01::3]:53"],
                "[::]:0",
            ),
        ] {
            let (_servers, backends) = servers(Server::udp, backends);
            let desired = Desired::from([(
                key("dns", Protocol::Udp, family),
                port(&[(frontend, CLUSTER_IP)], &backends),
            )]);
            sync(&mut proxy, &desired);
            let mut seen = BTreeSet::new();
            for _ in 0..60 {
                let socket = UdpSocket::bind(any).unwrap();
                let first = ask_udp(&socket, frontend).unwrap();
                assert_eq!(first.1, frontend.parse().unwrap());
                for _ in 0..3 {
                    assert_eq!(ask_udp(&socket, frontend).unwrap(), first);
                }
                seen.insert(first.0);
            }
            assert_eq!(seen.into_iter().collect::<Vec<_>>(), backends);
        }
    });
}

/// S10
#[test]
fn without_endpoints_connections_are_refused_at_once() {
    on_node(|node| {
        addresses();
        let mut proxy = node.open();
        let mut desired = Desired::new();
        for (family, frontend) in [(Family::V4, "10.96.0.1:80"), (Family::V6, "[fd96::1]:80")] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                desired.insert(
                    key("empty", protocol, family),
                    port(&[(frontend, CLUSTER_IP)], &[]),
                );
            }
        }
        sync(&mut proxy, &desired);
        for (frontend, any) in [("10.96.0.1:80", "0.0.0.0:0"), ("[fd96::1]:80", "[::]:0")] {
            assert_eq!(
                ask_tcp(frontend).unwrap_err().kind(),
                io::ErrorKind::ConnectionRefused
            );
            let socket = UdpSocket::bind(any).unwrap();
            assert_eq!(
                ask_udp(&socket, frontend).unwrap_err().kind(),
                io::ErrorKind::ConnectionRefused
            );
            let refused = socket.connect(frontend).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        }
    });
}

/// S10
#[test]
fn a_port_of_a_cluster_ip_that_nobody_serves_refuses() {
    on_node(|node| {
        addresses();
        let (_servers, backends) = servers(Server::tcp, ["10.1.0.1:8080"]);
        let mut desired = Desired::from([
            (
                key("web", Protocol::Tcp, Family::V4),
                port(&[("10.96.0.1:80", CLUSTER_IP)], &backends),
            ),
            (
                key("more", Protocol::Tcp, Family::V4),
                port(&[("10.96.0.1:81", CLUSTER_IP)], &backends),
            ),
        ]);
        let mut proxy = node.open();
        for _ in 0..2 {
            sync(&mut proxy, &desired);
            let refused = ask_tcp("10.96.0.1:8080").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            let refused = ask_udp(&socket, "10.96.0.1:80").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            assert_eq!(ask_tcp("10.96.0.1:80").unwrap(), backends[0]);
            desired.remove(&key("more", Protocol::Tcp, Family::V4));
        }
        // No Service's any more: whoever has the address now answers.
        sync(&mut proxy, &Desired::new());
        ip("addr add 10.96.0.1/32 dev lo");
        let (_servers, own) = servers(Server::tcp, ["10.96.0.1:8080"]);
        assert_eq!(ask_tcp("10.96.0.1:8080").unwrap(), own[0]);
    });
}

/// S1 S17
#[test]
fn a_connected_client_sees_the_service_and_the_server_the_client() {
    on_node(|node| {
        addresses();
        let mut proxy = node.open();
        let listener = TcpListener::bind("10.1.0.1:8080").unwrap();
        let (_servers, [udp]) = servers(Server::udp, ["10.1.0.1:53"]);
        let desired = Desired::from([
            (
                key("web", Protocol::Tcp, Family::V4),
                port(&[("10.96.0.1:80", CLUSTER_IP)], &[listener.local_addr().unwrap()]),
            ),
            (
                key("dns", Protocol::Udp, Family::V4),
                port(&[("10.96.0.1:80", CLUSTER_IP)], &[udp]),
            ),
        ]);
        sync(&mut proxy, &desired);
        let frontend: SocketAddr = "10.96.0.1:80".parse().unwrap();
        let client = TcpStream::connect(frontend).unwrap();
        let (_, seen) = listener.accept().unwrap();
        assert_eq!(seen, client.local_addr().unwrap());
        assert_eq!(client.peer_addr().unwrap(), frontend);

        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.connect(frontend).unwrap();
        assert_eq!(client.peer_addr().unwrap(), frontend);
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.send(b"?").unwrap();
        assert_eq!(client.recv_from(&mut [0; 64]).unwrap().1, frontend);
    });
}

/// S1 S16
#[test]
fn an_ipv6_socket_reaches_an_ipv4_service_by_its_mapped_address() {
    on_node(|node| {
        addresses();
        let mut proxy = node.open();
        let (_tcp, [tcp]) = servers(Server::tcp, ["10.1.0.1:8080"]);
        let (_udp, [udp]) = servers(Server::udp, ["10.1.0.1:8080"]);
        let desired = Desired::from([
            (
                key("web", Protocol::Tcp, Family::V4),
                port(&[("10.96.0.1:80", CLUSTER_IP)], &[tcp]),
            ),
            (
                key("web", Protocol::Udp, Family::V4),
                port(&[("10.96.0.1:80", CLUSTER_IP)], &[udp]),
            ),
        ]);
        sync(&mut proxy, &desired);
        let mapped = "[::ffff:10.96.0.1]:80";
        assert_eq!(ask_tcp(mapped).unwrap(), tcp);
        let socket = UdpSocket::bind("[::]:0").unwrap();
        assert_eq!(ask_udp(&socket, mapped).unwrap(), (udp, mapped.parse().unwrap()));
    });
}

/// S2
#[test]
fn a_node_port_on_loopback_serves_the_host_alone() {
    on_node(|node| {
        addresses();
        let (_servers, backends) = servers(Server::tcp, ["10.1.0.1:8080"]);
        let frontends = [
            ("127.0.0.1:30080", FrontendKind::NodePort),
            ("10.1.0.5:30080", FrontendKind::NodePort),
        ];
        let mut proxy = node.open();
        sync(
            &mut proxy,
            &Desired::from([(key("web", Protocol::Tcp, Family::V4), port(&frontends, &backends))]),
        );
        assert_eq!(ask_tcp("127.0.0.1:30080").unwrap(), backends[0]);
        assert_eq!(ask_tcp("10.1.0.5:30080").unwrap(), backends[0]);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // A pod, whose loopback is its own: something else listens there.
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                ip("link set lo up");
                let (_servers, own) = servers(Server::tcp, ["127.0.0.1:30080"]);
                assert_eq!(ask_tcp("127.0.0.1:30080").unwrap(), own[0]);
            });
        });
    });
}
