//! Pods that are wired, talk, are checked and unwired; calls that fail and leave nothing.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket};
use serde_json::json;

use crate::node::{Namespace, Node, addresses, device_of};

pub const DUAL: [&str; 2] = ["10.244.1.0/24", "fd00:244:1::/64"];

/// Sends bytes from one pod to the other and back, over TCP.
pub fn talk(client: &Namespace, server: &Namespace, address: &str) {
    let address: IpAddr = address.parse().unwrap();
    let listener = server.run(|| TcpListener::bind((address, 0)).unwrap());
    let at = listener.local_addr().unwrap();
    let echo = std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().unwrap();
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        from.ip()
    });
    client.run(|| {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(10)).unwrap();
        stream.write_all(b"hello").unwrap();
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
    });
    echo.join().unwrap();
}

// C3 C4 C6 C7 I1
#[test]
fn two_pods_are_wired_talk_check_and_vanish() {
    let node = Node::new(&DUAL);
    // As the daemon gives a node its own addresses.
    node.namespace.ip("link set lo up");
    node.namespace.ip("addr add 10.244.1.0/32 dev lo");
    node.namespace.ip("addr add fd00:244:1::/128 dev lo nodad");
    let (a, b) = (Namespace::new(), Namespace::new());
    let first = node.add("a", &a).succeeded();
    let second = node.add("b", &b).succeeded();
    assert_eq!(addresses(&first), ["10.244.1.1", "fd00:244:1::1"]);
    assert_eq!(addresses(&second), ["10.244.1.2", "fd00:244:1::2"]);
    for address in addresses(&second) {
        talk(&a, &b, &address);
    }
    for address in addresses(&first) {
        talk(&b, &a, &address);
        // The node reaches its pods too.
        talk(&node.namespace, &a, &address);
    }
    assert!(node.check("a", &a, &first).success);
    assert!(node.check("b", &b, &second).success);
    assert_eq!(node.del("a").succeeded(), json!(null));
    assert_eq!(node.devices(), [device_of("b")]);
    assert!(node.check("b", &b, &second).success);
    node.del("b").succeeded();
    node.assert_empty();
}

// C3 C4
#[test]
fn the_result_says_what_the_kernel_holds() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    let result = node.add("a", &pod).succeeded();
    let device = device_of("a");
    assert_eq!(result["cniVersion"], "1.1.0");
    assert_eq!(result["interfaces"][0]["name"], device.as_str());
    assert_eq!(result["interfaces"][0].get("sandbox"), None);
    assert_eq!(result["interfaces"][1]["name"], "eth0");
    assert_eq!(result["interfaces"][1]["sandbox"], json!(pod.path()));
    assert_eq!(
        result["ips"],
        json!([
            { "address": "10.244.1.1/32", "gateway": "169.254.1.1", "interface": 1 },
            { "address": "fd00:244:1::1/128", "gateway": "fe80::1", "interface": 1 },
        ])
    );
    assert_eq!(
        result["routes"],
        json!([{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }, { "dst": "::/0", "gw": "fe80::1" }])
    );
    assert_eq!(result["dns"], json!({}));
    let (host, inside) = (
        node.namespace.ip(&format!("link show {device}")),
        pod.ip("link show eth0"),
    );
    for (shown, interface) in [
        (host, &result["interfaces"][0]),
        (inside, &result["interfaces"][1]),
    ] {
        assert!(shown.contains(interface["mac"].as_str().unwrap()), "{shown}");
        assert!(
            shown.contains("mtu 1450") && shown.contains(",UP,LOWER_UP"),
            "{shown}"
        );
        assert_eq!(interface["mtu"], 1450);
    }
    assert!(
        node.namespace
            .ip(&format!("link show {device}"))
            .contains("alias a/eth0")
    );
    assert!(pod.ip("link show lo").contains("LOOPBACK,UP"));
    assert_eq!(
        pod.ip("-4 -o addr show dev eth0")
            .matches("inet 10.244.1.1/32")
            .count(),
        1
    );
    let v6 = pod.ip("-6 -o addr show dev eth0");
    assert_eq!(
        (v6.lines().count(), v6.contains("fd00:244:1::1/128")),
        (1, true),
        "{v6}"
    );
    assert!(!v6.contains("tentative"), "{v6}");
    // Not the kernel's own, which may come later than the first packet.
    let local = pod.ip("-6 route show table local proto 83");
    assert!(local.starts_with("local fd00:244:1::1 dev eth0"), "{local}");
    assert_eq!(node.namespace.ip(&format!("-o addr show dev {device}")), "");
}

// C4
#[test]
fn the_first_packets_need_no_arp_no_neighbour_discovery_and_no_duplicate_detection() {
    let node = Node::new(&DUAL);
    // Sees every packet of every device of the node, from before the pods exist.
    let watch = node.namespace.run(|| {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        socket(
            AddressFamily::Packet,
            SockType::Datagram,
            flags,
            SockProtocol::EthAll,
        )
        .unwrap()
    });
    let (a, b) = (Namespace::new(), Namespace::new());
    node.add("a", &a).succeeded();
    let second = node.add("b", &b).succeeded();
    for address in addresses(&second) {
        // A datagram is sent once: it would be lost if anything had to be asked first for too long.
        let to: IpAddr = address.parse().unwrap();
        let receiver = b.run(|| UdpSocket::bind((to, 4000)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        a.run(|| {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any)
                .unwrap()
                .send_to(b"first", (to, 4000))
                .unwrap();
        });
        assert_eq!(receiver.recv_from(&mut [0; 16]).unwrap().0, 5);
        talk(&a, &b, &address);
    }
    let mut seen = 0;
    let mut packet = [0; 2048];
    loop {
        match recvfrom::<LinkAddr>(watch.as_raw_fd(), &mut packet) {
            Ok((length, from)) => {
                let protocol = u16::from_be(from.unwrap().protocol());
                assert_ne!(protocol, 0x0806, "an ARP packet");
                // ICMPv6 behind a bare IPv6 header: router and neighbour solicitations and advertisements.
                let discovery = protocol == 0x86dd && length > 40 && packet[6] == 58;
                assert!(
                    !(discovery && (133..=136).contains(&packet[40])),
                    "{:?}",
                    &packet[..length]
                );
                seen += 1;
            }
            Err(nix::errno::Errno::EAGAIN) => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(seen > 10, "the watch saw {seen} packets");
    for shown in [
        a.ip("neigh show"),
        b.ip("neigh show"),
        node.namespace.ip("neigh show nud all"),
    ] {
        let unicast = shown.lines().filter(|line| !line.contains("NOARP"));
        assert!(unicast.clone().count() >= 2, "{shown}");
        assert!(unicast.clone().all(|line| line.contains("PERMANENT")), "{shown}");
    }
}

// C5 C9
#[test]
fn an_add_that_fails_leaves_nothing() {
    let node = Node::new(&["10.244.1.0/29"]);
    // Somebody else's route to the only address the pool gives next.
    node.namespace.ip("link set lo up");
    node.namespace.ip("route add 10.244.1.1/32 dev lo");
    let pod = Namespace::new();
    let answer = node.add("a", &pod);
    assert_eq!(answer.code(), 100);
    assert!(
        answer.text().contains("adding the route to 10.244.1.1/32"),
        "{}",
        answer.text()
    );
    assert!(answer.text().contains("File exists"), "{}", answer.text());
    node.assert_empty();
    assert_eq!(
        pod.ip("-o link show")
            .lines()
            .filter(|line| line.contains("eth0"))
            .count(),
        0
    );
    assert!(
        node.namespace
            .ip("route show table all")
            .contains("10.244.1.1 dev lo scope link")
    );

    // The name is taken in the pod.
    pod.ip("link add eth0 type bridge");
    let answer = node.add("a", &pod);
    assert_eq!(answer.code(), 4);
    assert!(answer.text().contains("CNI_IFNAME eth0"), "{}", answer.text());
    node.assert_empty();
    assert!(pod.ip("-d link show eth0").contains("bridge"));

    // The retry goes on with the next address.
    pod.ip("link del eth0");
    assert_eq!(addresses(&node.add("a", &pod).succeeded()), ["10.244.1.3"]);
    assert_eq!(node.devices(), [device_of("a")]);
}

// C5
#[test]
fn a_second_add_of_the_same_is_an_error_that_changes_nothing() {
    let node = Node::new(&DUAL);
    let pod = Namespace::new();
    let result = node.add("a", &pod).succeeded();
    let answer = node.add("a", &pod);
    assert_eq!(answer.code(), 4);
    assert!(
        answer
            .text()
            .contains("a/eth0 holds 10.244.1.1, fd00:244:1::1 already"),
        "{}",
        answer.text()
    );
    assert!(node.check("a", &pod, &result).success);
}

// I3 I2
#[test]
fn a_full_pool_says_so_and_changes_nothing() {
    let node = Node::new(&["10.244.1.0/30"]);
    let pods = [Namespace::new(), Namespace::new(), Namespace::new()];
    node.add("a", &pods[0]).succeeded();
    node.add("b", &pods[1]).succeeded();
    let answer = node.add("c", &pods[2]);
    assert_eq!(answer.code(), 101);
    assert!(
        answer
            .text()
            .contains("10.244.1.0/30 has 2 for pods, 2 held, 0 resting"),
        "{}",
        answer.text()
    );
    assert_eq!(node.devices().len(), 2);
    node.del("a").succeeded();
    let answer = node.add("c", &pods[2]);
    assert_eq!(answer.code(), 11);
    assert!(
        answer.text().contains("1 held, 1 resting; try again in 1"),
        "{}",
        answer.text()
    );
    assert_eq!(node.devices().len(), 1);
}

// C6
#[test]
fn del_needs_no_namespace_no_node_file_and_no_intact_state() {
    let node = Node::new(&DUAL);
    let missing = Path::new("/run/netns/never-was");
    // Never added; no store yet.
    node.call("DEL", "a", missing, &node.with(json!({}))).succeeded();
    assert!(!node.ipam().exists());

    let pod = Namespace::new();
    let result = node.add("a", &pod).succeeded();
    std::fs::remove_file(node.node_file()).unwrap();
    let owner = node.ipam().join("owners/a@eth0");
    std::fs::OpenOptions::new()
        .write(true)
        .open(owner)
        .unwrap()
        .set_len(20)
        .unwrap();
    // Wishes and results that ADD would refuse are no matter either.
    let config = node.with(json!({
        "prevResult": "nonsense",
        "runtimeConfig": { "portMappings": [{ "hostPort": 80, "containerPort": 80 }], "mac": 5 },
    }));
    node.call("DEL", "a", missing, &config).succeeded();
    node.call("DEL", "a", missing, &config).succeeded();
    node.assert_empty();
    let usage = node.store().usage("10.244.1.0/24".parse().unwrap()).unwrap();
    assert_eq!((usage.held, usage.resting), (0, 1), "{result}");

    // The namespace went first and took the devices along.
    node.write(&node.file(&DUAL));
    node.add("b", &Namespace::new()).succeeded();
    node.del("b").succeeded();
    node.assert_empty();
}

// I4 I7
#[test]
fn a_pod_cidr_that_changes_counts_at_once_and_old_addresses_stay() {
    let node = Node::new(&["10.244.1.0/31"]);
    let (a, b) = (Namespace::new(), Namespace::new());
    let first = node.add("a", &a).succeeded();
    assert_eq!(node.add("b", &b).code(), 101);
    node.write(&node.file(&["10.244.1.0/31", "10.244.9.0/24"]));
    assert_eq!(addresses(&node.add("b", &b).succeeded()), ["10.244.9.1"]);
    node.write(&node.file(&["10.244.9.0/24"]));
    assert!(node.check("a", &a, &first).success);
    talk(&b, &a, "10.244.1.1");
    node.del("a").succeeded();
    node.del("b").succeeded();
    node.assert_empty();
}
