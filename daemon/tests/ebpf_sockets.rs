//! Services at the socket: real sockets in a cgroup and a network namespace of their own.

mod ebpf_support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use ebpf_support::{Desired, ip, key, on_node, port, sync};
use sluice_daemon::state::service_port::{Family, FrontendKind, Protocol};

const PATIENCE: Duration = Duration::from_secs(20);

/// A TCP server that tells each client its own address; it ends with the process, its socket with the test's namespace.
fn tcp_server(address: &str) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client that has gone already is none of the server's business.
            let _ = stream.and_then(|mut stream| stream.write_all(address.to_string().as_bytes()));
        }
    });
    address
}

/// A UDP server that answers each datagram with its own address.
fn udp_server(address: &str) -> SocketAddr {
    let socket = UdpSocket::bind(address).unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((_, client)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(address.to_string().as_bytes(), client);
        }
    });
    address
}

fn addresses() {
    for last in 1..=5 {
        ip(&format!("addr add 10.1.0.{last}/32 dev lo"));
        ip(&format!("addr add fd01::{last}/128 dev lo nodad"));
    }
    // What is not local must have a route, or connect() gives up before anybody is asked.
    ip("route add default dev lo");
    ip("-6 route add default dev lo");
}

/// Which backend answers a connection.
fn ask_tcp(address: &str) -> io::Result<SocketAddr> {
    let mut stream = TcpStream::connect(address.parse::<SocketAddr>().unwrap())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.parse().unwrap())
}

/// Which backend answers a datagram, and who the answer seems to come from.
fn ask_udp(socket: &UdpSocket, address: &str) -> io::Result<(SocketAddr, SocketAddr)> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"?", address.parse::<SocketAddr>().unwrap())?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok((
        std::str::from_utf8(&buffer[..length]).unwrap().parse().unwrap(),
        from,
    ))
}

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
            let backends = backends.map(tcp_server);
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
            let backends = backends.map(udp_server);
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
