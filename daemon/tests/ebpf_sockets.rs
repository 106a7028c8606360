//! Services at the socket: real sockets in a cgroup and a network namespace of their own.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ebpf_support::{Desired, ip, key, on_node, port, sync};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{Shutdown, shutdown};
use sluice_daemon::proxy::Proxy;
use sluice_daemon::state::service_port::{Family, FrontendKind, Protocol};

const PATIENCE: Duration = Duration::from_secs(20);

/// A server that tells each client its own address; it ends with this.
struct Server {
    address: SocketAddr,
    socket: OwnedFd,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn new(
        address: SocketAddr,
        socket: OwnedFd,
        serve: impl FnMut() -> io::Result<()> + Send + 'static,
    ) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let mut serve = serve;
        let ending = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            while !ending.load(Ordering::Acquire) {
                // A client that has gone already is none of the server's business.
                let _ = serve();
            }
        });
        Self {
            address,
            socket,
            over,
            thread: Some(thread),
        }
    }

    fn tcp(address: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let socket = listener.try_clone().unwrap().into();
        Self::new(address, socket, move || {
            listener.accept()?.0.write_all(address.to_string().as_bytes())
        })
    }

    fn udp(address: &str) -> Self {
        let server = UdpSocket::bind(address).unwrap();
        let address = server.local_addr().unwrap();
        let socket = server.try_clone().unwrap().into();
        Self::new(address, socket, move || {
            let (_, client) = server.recv_from(&mut [0; 16])?;
            server.send_to(address.to_string().as_bytes(), client).map(drop)
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        // Wakes whoever waits on the socket; ENOTCONN is all a UDP socket has to say to it.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn servers<const N: usize>(
    start: fn(&str) -> Server,
    addresses: [&str; N],
) -> (Vec<Server>, [SocketAddr; N]) {
    let servers = addresses.map(start);
    let addresses = std::array::from_fn(|index| servers[index].address);
    (servers.into(), addresses)
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

/// S6
#[test]
fn session_affinity_holds_over_a_restart_and_ends_with_the_endpoint() {
    on_node(|node| {
        addresses();
        let (_servers, backends) = servers(
            Server::tcp,
            ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080", "10.1.0.4:8080"],
        );
        let mut service = port(&[("10.96.0.1:80", CLUSTER_IP)], &backends);
        service.affinity = Some(Duration::from_secs(10_800));
        let name = key("web", Protocol::Tcp, Family::V4);
        let mut desired = Desired::from([(name.clone(), service)]);
        let mut proxy = node.open();
        sync(&mut proxy, &desired);
        let chosen = ask_tcp("10.96.0.1:80").unwrap();
        let stays = || (0..20).all(|_| ask_tcp("10.96.0.1:80").unwrap() == chosen);
        assert!(stays());
        drop(proxy);
        let mut proxy = node.open();
        sync(&mut proxy, &desired);
        proxy.tend().unwrap();
        assert!(stays());
        desired
            .get_mut(&name)
            .unwrap()
            .backends
            .retain(|backend| backend.address != chosen);
        sync(&mut proxy, &desired);
        let anew = ask_tcp("10.96.0.1:80").unwrap();
        assert_ne!(anew, chosen);
        assert!((0..20).all(|_| ask_tcp("10.96.0.1:80").unwrap() == anew));
    });
}

/// Connects again and again while `change` runs; every connection must succeed.
fn under_load(change: impl FnOnce()) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loads: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut count = 0_u32;
                    while !over.load(Ordering::Acquire) || count == 0 {
                        ask_tcp("10.96.0.1:80").unwrap();
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(change));
        over.store(true, Ordering::Release);
        assert!(loads.into_iter().all(|load| load.join().unwrap() > 0));
        result.unwrap();
    });
}

/// S5 S18
#[test]
fn backends_are_replaced_while_clients_connect_and_none_fails() {
    on_node(|node| {
        addresses();
        let (_servers, backends) = servers(
            Server::tcp,
            ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080", "10.1.0.4:8080"],
        );
        let name = key("web", Protocol::Tcp, Family::V4);
        let with = |backends: &[SocketAddr]| {
            Desired::from([(name.clone(), port(&[("10.96.0.1:80", CLUSTER_IP)], backends))])
        };
        let mut proxy = node.open();
        sync(&mut proxy, &with(&backends));
        under_load(|| {
            for _ in 0..200 {
                // All others at once, one added, one replaced, one taken out.
                for some in [
                    &[0, 1][..],
                    &[2, 3],
                    &[1, 2, 3],
                    &[0, 1, 3],
                    &[1, 3],
                    &[0, 1, 2, 3],
                ] {
                    let some: Vec<_> = some.iter().map(|index| backends[*index]).collect();
                    sync(&mut proxy, &with(&some));
                }
            }
        });
        sync(&mut proxy, &with(&backends[3..]));
        assert!((0..20).all(|_| ask_tcp("10.96.0.1:80").unwrap() == backends[3]));
    });
}

/// S5 S18
#[test]
fn a_restart_disturbs_no_client() {
    on_node(|node| {
        addresses();
        let (_servers, backends) = servers(Server::tcp, ["10.1.0.1:8080", "10.1.0.2:8080"]);
        let name = key("web", Protocol::Tcp, Family::V4);
        let desired = Desired::from([(name, port(&[("10.96.0.1:80", CLUSTER_IP)], &backends))]);
        let mut proxy = Some(node.open());
        sync(proxy.as_mut().unwrap(), &desired);
        under_load(|| {
            for _ in 0..10 {
                drop(proxy.take());
                ask_tcp("10.96.0.1:80").unwrap();
                let mut next = node.open();
                let report = sync(&mut next, &desired);
                assert_eq!((report.changed, report.removed), (0, 0));
                proxy = Some(next);
            }
        });
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

/// S13
#[test]
fn no_udp_client_stays_on_an_endpoint_that_went() {
    on_node(|node| {
        addresses();
        let (_servers, backends) = servers(Server::udp, ["10.1.0.1:53", "10.1.0.2:53"]);
        let frontend = "10.96.0.1:53";
        let name = key("dns", Protocol::Udp, Family::V4);
        let with = |backends: &[SocketAddr]| {
            Desired::from([(name.clone(), port(&[(frontend, CLUSTER_IP)], backends))])
        };
        let connected = || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect(frontend).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        let mut proxy = node.open();
        // From before there was such a Service.
        let early = connected();
        sync(&mut proxy, &with(&backends[..1]));
        assert_eq!(
            early.recv(&mut [0; 1]).unwrap_err().kind(),
            io::ErrorKind::ConnectionAborted
        );

        let unconnected = UdpSocket::bind("0.0.0.0:0").unwrap();
        assert_eq!(ask_udp(&unconnected, frontend).unwrap().0, backends[0]);
        let doomed = connected();
        sync(&mut proxy, &with(&backends));
        let direct = UdpSocket::bind("0.0.0.0:0").unwrap();
        direct.connect(backends[0]).unwrap();
        direct.set_read_timeout(Some(PATIENCE)).unwrap();
        // Healthy as yet.
        doomed.send(b"?").unwrap();
        doomed.recv(&mut [0; 64]).unwrap();
        assert_eq!(ask_udp(&unconnected, frontend).unwrap().0, backends[0]);

        sync(&mut proxy, &with(&backends[1..]));
        assert_eq!(
            doomed.recv(&mut [0; 1]).unwrap_err().kind(),
            io::ErrorKind::ConnectionAborted
        );
        assert_eq!(
            ask_udp(&unconnected, frontend).unwrap(),
            (backends[1], frontend.parse().unwrap())
        );
        // Who talks to the endpoint itself is none of the Service's clients.
        direct.send(b"?").unwrap();
        direct.recv(&mut [0; 64]).unwrap();

        sync(&mut proxy, &with(&[]));
        assert_eq!(
            ask_udp(&unconnected, frontend).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        sync(&mut proxy, &with(&backends[..1]));
        assert_eq!(ask_udp(&unconnected, frontend).unwrap().0, backends[0]);
    });
}
