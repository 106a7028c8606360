//! Services, for sockets that no program sees.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use sluice_daemon::proxy::Proxy;
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol, ServicePort};

use crate::cluster::{A, B, FAR, at, bulk, cluster, counter, ping, serve};
use crate::ebpf_support::bulk::PATIENCE;
use crate::ebpf_support::{Desired, ip, key, on_node, port, sync};

fn service(frontends: &[(&str, FrontendKind)], backends: &[(SocketAddr, Place)]) -> ServicePort {
    let addresses: Vec<_> = backends.iter().map(|(address, _)| *address).collect();
    let mut service = port(frontends, &addresses);
    for backend in &mut service.backends {
        backend.place = backends
            .iter()
            .find(|(address, _)| *address == backend.address)
            .unwrap()
            .1;
    }
    service
}

fn web(family: Family, set: ServicePort) -> Desired {
    Desired::from([(key("web", Protocol::Tcp, family), set)])
}

/// S1 S12 S17
#[test]
fn sockets_out_of_reach_are_served_at_the_pods_device() {
    on_node(|node| {
        let cluster = cluster(node);
        let mut proxy = cluster.open(node);
        for (index, (family, frontend)) in [(Family::V4, "10.96.0.10:80"), (Family::V6, "[fd10:96::10]:80")]
            .into_iter()
            .enumerate()
        {
            let there = [
                (&cluster.b.host, at(B[index], 8080), Place::ThisNode),
                (&cluster.far, at(FAR[index], 8080), Place::PodNetwork),
            ];
            for (host, backend, place) in there {
                let set = service(&[(frontend, FrontendKind::ClusterIp)], &[(backend, place)]);
                sync(&mut proxy, &web(family, set));
                let seen = serve(host, backend);
                let (own, peer) = bulk(&cluster.a.host, frontend.parse().unwrap());
                assert_eq!(seen.recv().unwrap(), own, "the client's own address");
                assert_eq!(peer, frontend.parse().unwrap());
            }
            // Its own backend: the node's address stands in, or the pod would get a packet from itself.
            let own = at(A[index], 8080);
            let set = service(&[(frontend, FrontendKind::ClusterIp)], &[(own, Place::ThisNode)]);
            sync(&mut proxy, &web(family, set));
            let seen = serve(&cluster.a.host, own);
            let (_, peer) = bulk(&cluster.a.host, frontend.parse().unwrap());
            let stand_in: IpAddr = ["10.244.1.0", "fd10:244:0:1::"][index].parse().unwrap();
            assert_eq!(seen.recv().unwrap().ip(), stand_in);
            assert_eq!(peer, frontend.parse().unwrap());
        }
        // Pods whose packets were translated still talk to each other by the fast path.
        let before = counter(&proxy, "fast_local");
        let seen = serve(&cluster.b.host, at(B[0], 9090));
        bulk(&cluster.a.host, at(B[0], 9090));
        seen.recv().unwrap();
        assert!(counter(&proxy, "fast_local") > before + 10);
    });
}

/// S10
#[test]
fn what_nobody_serves_is_refused_at_the_pods_device() {
    on_node(|node| {
        let cluster = cluster(node);
        let mut proxy = cluster.open(node);
        for (family, frontend, unserved) in [
            (Family::V4, "10.96.0.10:80", "10.96.0.10:81"),
            (Family::V6, "[fd10:96::10]:80", "[fd10:96::10]:81"),
        ] {
            let mut desired = web(family, service(&[(frontend, FrontendKind::ClusterIp)], &[]));
            let udp = service(&[(frontend, FrontendKind::ClusterIp)], &[]);
            desired.insert(key("dns", Protocol::Udp, family), udp);
            sync(&mut proxy, &desired);
            for to in [frontend, unserved] {
                let to: SocketAddr = to.parse().unwrap();
                let refused = cluster.a.host.run(move || {
                    let tcp = TcpStream::connect_timeout(&to, PATIENCE).unwrap_err().kind();
                    let any: SocketAddr = if to.is_ipv4() {
                        at("0.0.0.0", 0)
                    } else {
                        at("::", 0)
                    };
                    let socket = UdpSocket::bind(any).unwrap();
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    socket.connect(to).unwrap();
                    socket.send(b"question").unwrap();
                    [tcp, socket.recv(&mut [0; 64]).unwrap_err().kind()]
                });
                assert_eq!(refused, [std::io::ErrorKind::ConnectionRefused; 2], "{to}");
            }
        }
    });
}

/// S27
#[test]
fn a_cluster_ip_answers_pings_while_it_has_an_endpoint() {
    on_node(|node| {
        let mut cluster = cluster(node);
        let mut proxy = cluster.open(node);
        // The node's own pings leave by the uplink, towards a gateway.
        ip("route add default via 192.0.2.2");
        ip("-6 route add default via 2001:db8::2");
        let ping_here = |arguments: &str| {
            let output = std::process::Command::new("ping")
                .args(arguments.split(' '))
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        for (index, family, address) in [(0, Family::V4, "10.96.0.10"), (1, Family::V6, "fd10:96::10")] {
            let frontend = SocketAddr::new(address.parse().unwrap(), 80).to_string();
            let backend = (at(B[index], 8080), Place::ThisNode);
            let serving = web(
                family,
                service(&[(&frontend, FrontendKind::ClusterIp)], &[backend]),
            );
            let empty = web(family, service(&[(&frontend, FrontendKind::ClusterIp)], &[]));
            for size in [0, 56, 1400] {
                let asked = format!("-c 2 -i 0.2 -W 5 -s {size} {address}");
                sync(&mut proxy, &serving);
                for said in [ping(&cluster.a.host, &asked), ping_here(&asked)] {
                    assert!(said.contains(&format!("bytes from {address}")), "{said}");
                    assert!(said.contains("2 received"), "{said}");
                }
                sync(&mut proxy, &empty);
                for said in [ping(&cluster.a.host, &asked), ping_here(&asked)] {
                    assert!(
                        said.contains("nreachable") && said.contains("+2 errors"),
                        "{said}"
                    );
                }
            }
            // A second port with an endpoint is enough.
            let mut two = empty.clone();
            let other = SocketAddr::new(address.parse().unwrap(), 53).to_string();
            let set = service(&[(&other, FrontendKind::ClusterIp)], &[backend]);
            two.insert(key("dns", Protocol::Udp, family), set);
            sync(&mut proxy, &two);
            let asked = format!("-c 1 -W 5 {address}");
            assert!(ping(&cluster.a.host, &asked).contains("1 received"));
            drop(proxy);
            proxy = cluster.open(node);
            assert!(ping(&cluster.a.host, &asked).contains("1 received"), "adopted");
            sync(&mut proxy, &Desired::new());
            assert!(!ping(&cluster.a.host, "-c 1 -W 1 10.96.0.10").contains("1 received"));
            sync(&mut proxy, &two);
        }
        cluster.surroundings.ping = false;
        proxy.adjust(&cluster.surroundings).unwrap();
        assert!(!ping(&cluster.a.host, "-c 1 -W 1 fd10:96::10").contains("1 received"));
    });
}

/// S3
#[test]
fn source_ranges_count_for_pods_hosts_and_the_node() {
    on_node(|node| {
        let cluster = cluster(node);
        let mut proxy = cluster.open(node);
        let frontend = "203.0.113.10:80";
        cluster.far.run(|| ip("route add 203.0.113.10/32 via 192.0.2.1"));
        let mut set = service(
            &[
                (frontend, FrontendKind::LoadBalancer),
                ("10.96.0.10:80", FrontendKind::ClusterIp),
            ],
            &[(at(B[0], 8080), Place::ThisNode)],
        );
        // It ends with the test's process.
        let listener = cluster.b.host.run(|| TcpListener::bind((B[0], 8080)).unwrap());
        std::thread::spawn(move || listener.incoming().for_each(drop));
        let mut may = |ranges: &[&str]| {
            set.source_ranges = Some(ranges.iter().map(|range| range.parse().unwrap()).collect());
            sync(&mut proxy, &web(Family::V4, set.clone()));
            let connects =
                || TcpStream::connect_timeout(&frontend.parse().unwrap(), Duration::from_millis(500)).is_ok();
            let results = [
                cluster.a.host.run(connects),
                cluster.b.host.run(connects),
                cluster.far.run(move || {
                    ip("route replace 203.0.113.10/32 via 192.0.2.1 src 192.0.2.2");
                    connects()
                }),
                connects(),
            ];
            let inside = cluster
                .a
                .host
                .run(|| TcpStream::connect_timeout(&at("10.96.0.10", 80), PATIENCE).is_ok());
            assert!(inside, "the ClusterIP has no source ranges");
            results
        };
        assert_eq!(may(&["10.244.1.2/32"]), [true, false, false, false]);
        assert_eq!(may(&["10.244.0.0/16"]), [true, true, false, false]);
        assert_eq!(
            may(&["192.0.2.2/32", "198.51.100.0/24"]),
            [false, false, true, false]
        );
        assert_eq!(may(&["192.0.2.0/24"]), [false, false, true, true]);
        assert_eq!(may(&["0.0.0.0/0"]), [true, true, true, true]);
        assert_eq!(may(&[]), [false, false, false, false]);
    });
}
