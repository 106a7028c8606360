//! Services at the socket: real sockets in a cgroup and a network namespace of their own.

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
use nix::sys::socket::{Shutdown, shutdown};
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
