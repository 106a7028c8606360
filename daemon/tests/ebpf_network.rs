//! NodePorts over real devices: a client host, this node, and another node with a pod, each a network namespace.
//!
//! The kernel's own stack routes in between, with a strict reverse-path filter, partial checksums and large segments.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use ebpf_support::neighbour::Neighbour;
use ebpf_support::{Desired, Node, ip, key, on_node, port, sync};
use sluice_daemon::network::Device;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol};

const PATIENCE: Duration = Duration::from_secs(20);
const BULK: usize = 1 << 20;

struct Hosts {
    client: Neighbour,
    /// The other node; it knows no way to the client.
    other: Neighbour,
}

fn hosts(node: &Node) -> Hosts {
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

fn open(node: &Node) -> EbpfProxy {
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
        })
        .unwrap();
    proxy
}

/// Accepts one connection, sends all it gets back, and says who the client was.
fn echo(listener: &TcpListener) -> SocketAddr {
    let (mut stream, client) = listener.accept().unwrap();
    let mut data = vec![0; BULK];
    stream.read_exact(&mut data).unwrap();
    stream.write_all(&data).unwrap();
    client
}

/// Sends a megabyte to `address` and must get it back.
fn bulk(address: SocketAddr) -> SocketAddr {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let data: Vec<u8> = (0..BULK).map(|byte| (byte % 251) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    let mut back = vec![0; BULK];
    stream.read_exact(&mut back).unwrap();
    writing.join().unwrap();
    assert!(back == data, "what came back is not what was sent");
    stream.local_addr().unwrap()
}

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
        let mut proxy = open(node);
        for (family, backend) in [(Family::V4, "10.244.1.9:8080"), (Family::V6, "[fd10:1::9]:8080")] {
            let listener = TcpListener::bind(backend).unwrap();
            let (desired, frontend) =
                desired(family, Protocol::Tcp, backend.parse().unwrap(), Place::ThisNode);
            sync(&mut proxy, &desired);
            let serving = std::thread::spawn(move || echo(&listener));
            let client = hosts.client.run(move || bulk(frontend));
            assert_eq!(serving.join().unwrap(), client, "the client's own address");
        }
    });
}

/// S2 S16 S17
#[test]
fn a_megabyte_each_way_through_a_node_port_to_an_endpoint_elsewhere() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = open(node);
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

/// S2 S13 S16
#[test]
fn datagrams_through_a_node_port_to_an_endpoint_elsewhere() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = open(node);
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

/// S10
#[test]
fn a_node_port_without_endpoints_refuses_at_once() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = open(node);
        for (family, any) in [(Family::V4, "0.0.0.0:0"), (Family::V6, "[::]:0")] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let (mut desired, frontend) =
                    desired(family, protocol, "192.0.2.9:1".parse().unwrap(), Place::Outside);
                desired.values_mut().for_each(|port| port.backends.clear());
                sync(&mut proxy, &desired);
                let error = hosts.client.run(move || match protocol {
                    Protocol::Tcp => TcpStream::connect_timeout(&frontend, PATIENCE).unwrap_err(),
                    _ => {
                        let socket = UdpSocket::bind(any).unwrap();
                        socket.connect(frontend).unwrap();
                        socket.set_read_timeout(Some(PATIENCE)).unwrap();
                        socket.send(b"?").unwrap();
                        socket.recv(&mut [0; 8]).unwrap_err()
                    }
                });
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            }
        }
    });
}

/// S3 S4 S10
#[test]
fn an_external_address_without_endpoints_refuses_tcp_at_once_and_serves_when_there_is_one() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = open(node);
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
            let _listener = TcpListener::bind(backend).unwrap();
            sync(
                &mut proxy,
                &Desired::from([(name, port(&frontends, &[backend.parse().unwrap()]))]),
            );
            hosts.client.run(connect).unwrap();
        }
    });
}
