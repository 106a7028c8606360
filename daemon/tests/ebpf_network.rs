//! NodePorts over real devices: a client host, this node, and another node with a pod, each a network namespace.
//!
//! The kernel's own stack routes in between, with a strict reverse-path filter, partial checksums and large segments.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use ebpf_support::bulk::{PATIENCE, bulk, echo};
use ebpf_support::hosts::hosts;
use ebpf_support::{Desired, ip, key, on_node, port, sync};
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol};

fn desired(family: Family, protocol: Protocol, backend: SocketAddr, place: Place) -> (Desired, SocketAddr) {
    let frontend = match family {
        Family::V4 => "198.51.100.1:30080",
        Family::V6 => "[2001:db8:f::1]:30080",
    };
    let mut port = port(&[(frontend, FrontendKind::NodePort)], &[backend]);
    port.backends[0].place = place;
    (
        Desired::from([(key("web", protocol, family), port)]),
        frontend.parse().unwrap(),
    )
}

/// S2 S16 S17
#[test]
fn a_megabyte_each_way_through_a_node_port_to_a_local_endpoint() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = hosts.open(node);
        for (family, backend) in [(Family::V4, "10.244.1.9:8080"), (Family::V6, "[fd10:1::9]:8080")] {
            let listener = TcpListener::bind(backend).unwrap();
            let (desired, frontend) =
                desired(family, Protocol::Tcp, backend.parse().unwrap(), Place::ThisNode);
            sync(&mut proxy, &desired);
            let serving = std::thread::spawn(move || echo(&listener));
            let (client, _) = hosts.client.run(move || bulk(frontend));
            assert_eq!(serving.join().unwrap(), client, "the client's own address");
        }
    });
}

/// S2 S16 S17
#[test]
fn a_megabyte_each_way_through_a_node_port_to_an_endpoint_elsewhere() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = hosts.open(node);
        for (family, backend, stand_in) in [
            (Family::V4, "10.244.2.9:8080", "10.244.1.0"),
            (Family::V6, "[fd10:2::9]:8080", "fd10:1::"),
        ] {
            let listener = hosts.other.run(move || TcpListener::bind(backend).unwrap());
            let (desired, frontend) =
                desired(family, Protocol::Tcp, backend.parse().unwrap(), Place::PodNetwork);
            sync(&mut proxy, &desired);
            let serving = std::thread::spawn(move || echo(&listener));
            hosts.client.run(move || bulk(frontend));
            assert_eq!(serving.join().unwrap().ip(), stand_in.parse::<IpAddr>().unwrap());
        }
    });
}

/// S20: what another `proxy.mode` left serves the connections it has until they end, and begins none.
#[test]
fn who_retires_serves_on_those_it_has() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = hosts.open(node);
        let backend = "10.244.2.9:8080";
        let (listener, socket) = hosts.other.run(move || {
            (
                TcpListener::bind(backend).unwrap(),
                UdpSocket::bind(backend).unwrap(),
            )
        });
        let (mut all, frontend) = desired(
            Family::V4,
            Protocol::Tcp,
            backend.parse().unwrap(),
            Place::PodNetwork,
        );
        let (datagrams, _) = desired(
            Family::V4,
            Protocol::Udp,
            backend.parse().unwrap(),
            Place::PodNetwork,
        );
        all.extend(datagrams);
        sync(&mut proxy, &all);
        drop(proxy);
        let (mut client, asker) = hosts.client.run(move || {
            let asker = UdpSocket::bind("198.51.100.7:0").unwrap();
            asker.send_to(b"?", frontend).unwrap();
            (TcpStream::connect(frontend).unwrap(), asker)
        });
        let (mut server, _) = listener.accept().unwrap();
        let mut byte = [0];
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let (_, stand_in) = socket.recv_from(&mut byte).unwrap();
        let mut there_and_back = || {
            client.write_all(b"x").unwrap();
            server.read_exact(&mut byte).unwrap();
            server.write_all(b"y").unwrap();
            client.read_exact(&mut byte).unwrap();
        };
        there_and_back();

        EbpfProxy::retire(&node.options.pins).unwrap();
        assert!(EbpfProxy::let_go(&node.options.pins).unwrap());
        there_and_back();
        let refused = hosts
            .client
            .run(move || TcpStream::connect(frontend).unwrap_err());
        assert_eq!(
            refused.kind(),
            ErrorKind::ConnectionRefused,
            "nobody else is here"
        );
        // An answer to datagrams that it does not know any more goes astray.
        socket.send_to(b"!", stand_in).unwrap();
        asker.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        asker.recv_from(&mut [0]).unwrap_err();

        drop((client, server));
        let began = Instant::now();
        while EbpfProxy::let_go(&node.options.pins).unwrap() {
            assert!(began.elapsed() < PATIENCE, "the connection has ended");
        }
        EbpfProxy::remove(&node.options.pins).unwrap();
    });
}

/// S2 S13 S16
#[test]
fn datagrams_through_a_node_port_to_an_endpoint_elsewhere() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = hosts.open(node);
        for (family, backend, any) in [
            (Family::V4, "10.244.2.9:8080", "0.0.0.0:0"),
            (Family::V6, "[fd10:2::9]:8080", "[::]:0"),
        ] {
            let server = hosts.other.run(move || UdpSocket::bind(backend).unwrap());
            let (desired, frontend) =
                desired(family, Protocol::Udp, backend.parse().unwrap(), Place::PodNetwork);
            sync(&mut proxy, &desired);
            let client = hosts.client.run(move || UdpSocket::bind(any).unwrap());
            for socket in [&server, &client] {
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
            }
            // Connected, so that nothing but an answer from the frontend itself is taken.
            client.connect(frontend).unwrap();
            let mut buffer = [0; 64];
            for _ in 0..3 {
                client.send(b"question").unwrap();
                let (length, from) = server.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"question");
                server.send_to(b"answer", from).unwrap();
                let length = client.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"answer");
            }
        }
    });
}

/// Sends a datagram and waits for the error that must come back.
fn refused_datagram(address: SocketAddr) -> std::io::Error {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send(b"?").unwrap();
    socket.recv(&mut [0; 8]).unwrap_err()
}

/// S10
#[test]
fn a_node_port_without_endpoints_refuses_at_once() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = hosts.open(node);
        for family in [Family::V4, Family::V6] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let (mut desired, frontend) =
                    desired(family, protocol, "192.0.2.9:1".parse().unwrap(), Place::Outside);
                desired.values_mut().for_each(|port| port.backends.clear());
                sync(&mut proxy, &desired);
                let error = hosts.client.run(move || match protocol {
                    Protocol::Tcp => TcpStream::connect_timeout(&frontend, PATIENCE).unwrap_err(),
                    _ => refused_datagram(frontend),
                });
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            }
        }
    });
}

/// S3 S4 S10
#[test]
fn an_external_address_without_endpoints_refuses_at_once_and_serves_when_there_is_one() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = hosts.open(node);
        // Routed to this node, but not an address of it; the node itself would send it on.
        hosts.client.run(|| {
            ip("route add 203.0.113.1 via 198.51.100.1");
            ip("route add 2001:db8:e::1 via 2001:db8:f::1");
        });
        ip("route add default via 198.51.100.7");
        ip("route add default via 2001:db8:f::7");
        for (family, frontend, backend) in [
            (Family::V4, "203.0.113.1:80", "10.244.1.9:8080"),
            (Family::V6, "[2001:db8:e::1]:80", "[fd10:1::9]:8080"),
        ] {
            let name = key("web", Protocol::Tcp, family);
            let frontends = [(frontend, FrontendKind::ExternalIp)];
            let address: SocketAddr = frontend.parse().unwrap();
            sync(
                &mut proxy,
                &Desired::from([(name.clone(), port(&frontends, &[]))]),
            );
            let connect = move || TcpStream::connect_timeout(&address, PATIENCE).map(drop);
            for _ in 0..3 {
                let error = hosts.client.run(connect).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            }
            let name_of_udp = key("web", Protocol::Udp, family);
            sync(&mut proxy, &Desired::from([(name_of_udp, port(&frontends, &[]))]));
            let error = hosts.client.run(move || refused_datagram(address));
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            let _listener = TcpListener::bind(backend).unwrap();
            sync(
                &mut proxy,
                &Desired::from([(name, port(&frontends, &[backend.parse().unwrap()]))]),
            );
            hosts.client.run(connect).unwrap();
        }
    });
}
