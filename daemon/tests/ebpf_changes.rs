//! Changes and restarts, as clients at the socket live through them.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ebpf_support::server::{PATIENCE, Server, addresses, ask_tcp, ask_udp, servers};
use ebpf_support::{Desired, key, on_node, port, sync};
use sluice_daemon::proxy::Proxy;
use sluice_daemon::state::service_port::{Family, FrontendKind, Protocol};

const CLUSTER_IP: FrontendKind = FrontendKind::ClusterIp;

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

/// S13 S19
#[test]
fn no_udp_client_stays_with_a_service_that_lost_its_address_to_another() {
    on_node(|node| {
        addresses();
        let (_servers, backends) = servers(Server::udp, ["10.1.0.1:53", "10.1.0.2:53"]);
        let shared = "203.0.113.1:53";
        let held_by = |holder: usize| -> Desired {
            [("a", "10.96.0.1:53"), ("b", "10.96.0.2:53")]
                .into_iter()
                .enumerate()
                .map(|(i, (name, address))| {
                    let frontends = [(address, CLUSTER_IP), (shared, FrontendKind::ExternalIp)];
                    let count = if i == holder { 2 } else { 1 };
                    let set = port(&frontends[..count], &backends[i..=i]);
                    (key(name, Protocol::Udp, Family::V4), set)
                })
                .collect()
        };
        let connected = |frontend: &str| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect(frontend).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        let mut proxy = node.open();
        sync(&mut proxy, &held_by(1));
        let (doomed, healthy) = (connected(shared), connected("10.96.0.2:53"));
        sync(&mut proxy, &held_by(0));
        assert_eq!(
            doomed.recv(&mut [0; 1]).unwrap_err().kind(),
            io::ErrorKind::ConnectionAborted
        );
        healthy.send(b"?").unwrap();
        healthy.recv(&mut [0; 64]).unwrap();
        let anew = UdpSocket::bind("0.0.0.0:0").unwrap();
        assert_eq!(ask_udp(&anew, shared).unwrap().0, backends[0]);
    });
}

/// S10 S20: none of a Service's ports is refused while another of them is there already.
#[test]
fn while_a_service_of_many_ports_comes_none_of_them_is_refused() {
    on_node(|node| {
        addresses();
        let (_servers, backends) = servers(Server::udp, ["10.1.0.1:8080"]);
        let desired: Desired = (0..60)
            .map(|number| {
                let frontend = format!("10.96.0.1:{}", 1000 + number);
                let name = key(&format!("port-{number:02}"), Protocol::Udp, Family::V4);
                (name, port(&[(&*frontend, CLUSTER_IP)], &backends))
            })
            .collect();
        let mut proxy = node.open();
        for _ in 0..20 {
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let asking = scope.spawn(|| {
                    while !over.load(Ordering::Acquire) {
                        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                        // The last of them to come.
                        socket.send_to(b"?", "10.96.0.1:1059").unwrap();
                    }
                });
                sync(&mut proxy, &desired);
                over.store(true, Ordering::Release);
                asking.join().unwrap();
            });
            sync(&mut proxy, &Desired::new());
        }
    });
}
