//! Packets of pods at the pods' own devices: the fast path from pod to pod, and Services for sockets that no program sees.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ebpf_support::neighbour::Neighbour;
use ebpf_support::pods::{Pod, pod};
use ebpf_support::{Desired, Node, ip, key, on_node, port, sync};
use nix::sys::socket::{setsockopt, sockopt};
use sluice_daemon::network::Device;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol, ServicePort};

const PATIENCE: Duration = Duration::from_secs(20);
const BULK: usize = 1 << 20;
const A: [&str; 2] = ["10.244.1.2", "fd10:244:0:1::2"];
const B: [&str; 2] = ["10.244.1.3", "fd10:244:0:1::3"];
/// A pod of another node.
const FAR: [&str; 2] = ["10.244.2.9", "fd10:244:0:2::9"];

/// Two pods of this node, and another node with one.
struct Cluster {
    a: Pod,
    b: Pod,
    far: Neighbour,
    surroundings: Surroundings,
}

fn cluster(node: &Node) -> Cluster {
    for (key, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/forwarding", "1"),
    ] {
        fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
    }
    let (a, b) = (pod(node, "sluicea", A), pod(node, "sluiceb", B));
    let far = Neighbour::new(node);
    far.join("uplink", "eth0");
    for address in [
        "192.0.2.1/24",
        "2001:db8::1/64",
        "10.244.1.0/32",
        "fd10:244:0:1::/128",
    ] {
        ip(&format!(
            "addr add {address} dev uplink{}",
            if address.contains("::") { " nodad" } else { "" }
        ));
    }
    far.run(|| {
        ip("addr add 192.0.2.2/24 dev eth0");
        ip("addr add 2001:db8::2/64 dev eth0 nodad");
        ip("addr add 10.244.2.9/32 dev lo");
        ip("addr add fd10:244:0:2::9/128 dev lo nodad");
        ip("route add 10.244.1.0/24 via 192.0.2.1 src 10.244.2.9");
        ip("route add fd10:244:0:1::/64 via 2001:db8::1 src fd10:244:0:2::9");
    });
    ip("route add 10.244.2.0/24 via 192.0.2.2");
    ip("route add fd10:244:0:2::/64 via 2001:db8::2");
    let addresses = |all: [&str; 2]| all.map(|address| address.parse().unwrap()).to_vec();
    let surroundings = Surroundings {
        own_networks: Vec::new(),
        devices: vec![Device {
            index: nix::net::if_::if_nametoindex("uplink").unwrap(),
            name: "uplink".to_owned(),
        }],
        pod_network_addresses: addresses(["10.244.1.0", "fd10:244:0:1::"]),
        node_addresses: addresses(["192.0.2.1", "2001:db8::1"]),
        pods: vec![a.device.clone(), b.device.clone()],
        pod_networks: vec!["10.244.0.0/16".parse().unwrap(), "fd10:244::/48".parse().unwrap()],
        fast_path: true,
        ping: true,
    };
    Cluster {
        a,
        b,
        far,
        surroundings,
    }
}

impl Cluster {
    fn open(&self, node: &Node) -> EbpfProxy {
        let mut proxy = node.open();
        proxy.adjust(&self.surroundings).unwrap();
        proxy
    }
}

fn counter(proxy: &EbpfProxy, name: &str) -> u64 {
    let counters = proxy.summary().unwrap().counters;
    counters.iter().find(|(known, _)| *known == name).unwrap().1
}

/// Serves one connection: sends back all it gets. What the server saw as the client comes out of the thread.
fn serve(there: &Neighbour, at: SocketAddr) -> std::sync::mpsc::Receiver<SocketAddr> {
    let listener = there.run(move || TcpListener::bind(at).unwrap());
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, client) = listener.accept().unwrap();
        let mut data = vec![0; BULK];
        stream.read_exact(&mut data).unwrap();
        stream.write_all(&data).unwrap();
        let _ = sender.send(client);
    });
    receiver
}

/// A megabyte there and back; the client's own address and whom it saw.
fn bulk(there: &Neighbour, to: SocketAddr) -> (SocketAddr, SocketAddr) {
    there.run(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let data: Vec<u8> = (0..BULK).map(|byte| (byte % 251) as u8).collect();
        let mut writer = stream.try_clone().unwrap();
        let sent = data.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut back = vec![0; BULK];
        stream.read_exact(&mut back).unwrap();
        writing.join().unwrap();
        assert!(back == data, "what came back is not what was sent");
        (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
    })
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// N1
#[test]
fn a_megabyte_from_pod_to_pod_goes_past_the_stack_and_without_the_fast_path_through_it() {
    on_node(|node| {
        let mut cluster = cluster(node);
        let mut proxy = cluster.open(node);
        let fast = |proxy: &EbpfProxy| (counter(proxy, "fast_local"), counter(proxy, "fast_remote"));
        for family in 0..2 {
            // On this node: every packet into a pod is handed over.
            let before = fast(&proxy);
            let seen = serve(&cluster.b.host, at(B[family], 8080));
            let (own, _) = bulk(&cluster.a.host, at(B[family], 8080));
            assert_eq!(seen.recv().unwrap(), own);
            assert_eq!(own.ip(), cluster.a.addresses[family]);
            let after = fast(&proxy);
            assert!(after.0 > before.0 + 10, "{before:?} {after:?}");
            assert_eq!(after.1, before.1);

            // To another node and back.
            let seen = serve(&cluster.far, at(FAR[family], 8080));
            let (own, _) = bulk(&cluster.a.host, at(FAR[family], 8080));
            assert_eq!(seen.recv().unwrap(), own);
            let then = fast(&proxy);
            assert!(
                then.0 > after.0 + 10 && then.1 > after.1 + 10,
                "{after:?} {then:?}"
            );
        }
        cluster.surroundings.fast_path = false;
        proxy.adjust(&cluster.surroundings).unwrap();
        let before = fast(&proxy);
        for family in 0..2 {
            let seen = serve(&cluster.b.host, at(B[family], 8081));
            bulk(&cluster.a.host, at(B[family], 8081));
            seen.recv().unwrap();
            let seen = serve(&cluster.far, at(FAR[family], 8081));
            bulk(&cluster.a.host, at(FAR[family], 8081));
            seen.recv().unwrap();
        }
        assert_eq!(fast(&proxy), before);
    });
}

/// C10
#[test]
fn a_limited_pods_packets_pass_what_limits_them() {
    on_node(|node| {
        let mut cluster = cluster(node);
        cluster.surroundings.pods[1].queues.outgoing = true;
        let proxy = cluster.open(node);
        let seen = serve(&cluster.b.host, at(B[0], 8080));
        bulk(&cluster.a.host, at(B[0], 8080));
        seen.recv().unwrap();
        assert_eq!(counter(&proxy, "fast_local"), 0);
    });
}

fn ping(there: &Neighbour, arguments: &str) -> String {
    let arguments = arguments.to_owned();
    there.run(move || {
        let output = std::process::Command::new("ping")
            .args(arguments.split(' '))
            .output()
            .expect("ping must be installed");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    })
}

/// N5 S21
#[test]
fn each_node_is_a_hop_and_a_packet_too_large_is_answered() {
    on_node(|node| {
        let cluster = cluster(node);
        let proxy = cluster.open(node);
        let (a, far) = (&cluster.a.host, FAR[0]);
        assert!(ping(a, &format!("-c 1 -W 5 {}", B[0])).contains("ttl=63"));
        assert!(ping(a, &format!("-c 1 -W 5 {far}")).contains("ttl=63"));
        assert!(counter(&proxy, "fast_local") >= 3 && counter(&proxy, "fast_remote") >= 1);
        assert!(ping(a, &format!("-c 1 -W 5 -t 1 {}", B[0])).contains("Time to live exceeded"));
        assert!(ping(a, &format!("-c 1 -W 5 -t 1 {}", B[1])).contains("Hop limit"));
        ip("link set uplink mtu 1400");
        assert!(ping(a, &format!("-c 1 -W 5 -M do -s 1400 {far}")).contains("mtu = 1400"));
        assert!(ping(a, &format!("-c 1 -W 5 -M do -s 1400 {}", FAR[1])).contains("mtu=1400"));
    });
}

/// A packet with another's address is none of the fast path's.
#[test]
fn what_a_pod_sends_in_anothers_name_is_left_to_the_stack() {
    on_node(|node| {
        let cluster = cluster(node);
        let proxy = cluster.open(node);
        let stranger = "10.244.1.77";
        cluster.a.host.run(move || {
            ip(&format!("addr add {stranger}/32 dev eth0"));
            let socket = UdpSocket::bind((stranger, 0)).unwrap();
            socket.send_to(b"not me", (B[0], 9)).unwrap();
        });
        assert_eq!(counter(&proxy, "fast_local"), 0);
    });
}

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

/// N6 S20
#[test]
fn programs_at_pods_come_back_and_go() {
    on_node(|node| {
        let cluster = cluster(node);
        let mut proxy = cluster.open(node);
        let tc = |arguments: &str| {
            let output = std::process::Command::new("tc")
                .args(arguments.split(' '))
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "tc {arguments}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let shown = |way: &str| tc(&format!("filter show dev sluicea {way}"));
        assert!(shown("ingress").contains("sluice/pod_in") && shown("egress").contains("sluice/pod_out"));
        assert_eq!(proxy.audit().unwrap(), 0);
        tc("filter del dev sluicea ingress");
        tc("qdisc del dev sluiceb clsact");
        assert_eq!(proxy.audit().unwrap(), 2);
        assert!(shown("ingress").contains("sluice/pod_in"));
        // Adopted, and replaced in place.
        drop(proxy);
        let proxy = cluster.open(node);
        assert_eq!(shown("ingress").matches("sluice/pod_in").count(), 1);
        drop(proxy);
        EbpfProxy::remove(&node.options.pins).unwrap();
        for (device, way) in [
            ("sluicea", "ingress"),
            ("sluicea", "egress"),
            ("sluiceb", "ingress"),
        ] {
            assert_eq!(
                tc(&format!("filter show dev {device} {way}")),
                "",
                "{device} {way}"
            );
        }
    });
}

/// N6 S20
#[test]
fn nothing_is_lost_while_programs_come_to_a_pod_and_go() {
    on_node(|node| {
        let cluster = cluster(node);
        // As the plugin does it before the pod's device is up.
        for device in ["sluicea", "sluiceb"] {
            let arguments = ["qdisc", "add", "dev", device, "clsact"];
            let output = std::process::Command::new("tc").args(arguments).output().unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let socket = cluster.a.host.run(|| UdpSocket::bind((A[0], 9)).unwrap());
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let received = Arc::new(AtomicU64::new(0));
        let receiver = {
            let received = received.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 8];
                while socket.recv(&mut buffer).is_ok() {
                    received.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let done = Arc::new(AtomicBool::new(false));
        let sender = {
            let (done, received) = (done.clone(), received.clone());
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect((A[0], 9)).unwrap();
            std::thread::spawn(move || {
                let mut sent = 0_u64;
                while !done.load(Ordering::Relaxed) {
                    socket.send(&sent.to_ne_bytes()).unwrap();
                    sent += 1;
                    // Shorter than the moment for which the kernel stops a device, and never more than the socket has room for.
                    let next = Instant::now() + Duration::from_micros(8);
                    let full =
                        || sent > received.load(Ordering::Relaxed) + 10_000 && !done.load(Ordering::Relaxed);
                    while Instant::now() < next || full() {
                        std::hint::spin_loop();
                    }
                }
                sent
            })
        };
        for _ in 0..10 {
            drop(cluster.open(node));
            EbpfProxy::remove(&node.options.pins).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        let sent = sender.join().unwrap();
        receiver.join().unwrap();
        assert_eq!(received.load(Ordering::Relaxed), sent, "received and sent");
    });
}
