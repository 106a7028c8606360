//! ICMP errors through the translation at the device, crafted packet by packet, and path MTU discovery over real devices.
//! Of every packet that comes out all checksums are recomputed and compared.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use ebpf_support::device::Device;
use ebpf_support::hosts::hosts;
use ebpf_support::icmp::IcmpError;
use ebpf_support::packet::{Packet, SYN, tcp, udp};
use ebpf_support::{Desired, Node, ip, key, on_node, port, sync};
use sluice_daemon::network;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol};

fn open(node: &Node) -> (EbpfProxy, Device) {
    ip("link add uplink type veth peer name fabric");
    let mut proxy = node.open();
    let addresses = |all: [&str; 2]| all.map(|a| a.parse().unwrap()).to_vec();
    proxy
        .adjust(&Surroundings {
            devices: vec![network::Device {
                index: nix::net::if_::if_nametoindex("uplink").unwrap(),
                name: "uplink".to_owned(),
            }],
            pod_network_addresses: addresses(["10.244.1.0", "fd10:1::"]),
            node_addresses: addresses(["192.0.2.1", "2001:db8::1"]),
            ..Surroundings::default()
        })
        .unwrap();
    (proxy, Device::attached(&node.options.pins, "uplink"))
}

struct Case {
    protocol: Protocol,
    family: Family,
    frontend: &'static str,
    backend: SocketAddr,
    first: Packet,
    /// A router on the way to the client, and one on the way to the endpoint.
    routers: [&'static str; 2],
}

fn cases() -> Vec<Case> {
    let v4 = (
        "198.51.100.7:40000",
        "192.0.2.1:30080",
        "10.244.2.9:8080",
        ["198.51.100.254", "10.244.2.0"],
    );
    let v6 = (
        "[2001:db8:f::7]:40000",
        "[2001:db8::1]:30080",
        "[fd10:2::9]:8080",
        ["2001:db8:f::fe", "fd10:2::"],
    );
    let mut cases = Vec::new();
    for (family, (client, frontend, backend, routers)) in [(Family::V4, v4), (Family::V6, v6)] {
        for (protocol, first) in [
            (Protocol::Tcp, tcp(client, frontend, SYN)),
            (Protocol::Udp, udp(client, frontend)),
        ] {
            cases.push(Case {
                protocol,
                family,
                frontend,
                backend: backend.parse().unwrap(),
                first,
                routers,
            });
        }
    }
    cases
}

impl Case {
    fn sync(&self, proxy: &mut EbpfProxy, place: Place) {
        let mut set = port(&[(self.frontend, FrontendKind::NodePort)], &[self.backend]);
        set.backends[0].place = place;
        sync(
            proxy,
            &Desired::from([(key("web", self.protocol, self.family), set)]),
        );
    }
}

/// How much of a packet routers quote: all, a TCP header, or the least there may be (RFC 792).
const QUOTED: [usize; 3] = [500, 20, 8];

/// S21
#[test]
fn an_error_about_a_request_reaches_the_client_as_the_frontends() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for case in cases() {
            case.sync(&mut proxy, Place::ThisNode);
            let sent = device.packet_in(&case.first).unwrap();
            for quoted in QUOTED {
                let error = IcmpError::too_big(&case.backend.ip().to_string(), &sent, quoted);
                let out = IcmpError::parse(&device.frame_out(&error.bytes()).unwrap());
                let frontend = case.first.destination;
                assert_eq!(out.quoted, (case.first.source, frontend));
                assert_eq!(
                    (out.source, out.destination),
                    (frontend.ip(), case.first.source.ip())
                );
            }
        }
    });
}

/// S21
#[test]
fn an_error_about_a_request_sent_on_elsewhere_finds_back_to_the_client() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for case in cases() {
            case.sync(&mut proxy, Place::PodNetwork);
            let sent = device
                .packet_out(&device.packet_in(&case.first).unwrap())
                .unwrap();
            for quoted in QUOTED {
                let error = IcmpError::too_big(case.routers[1], &sent, quoted);
                let routed = IcmpError::parse(&device.frame_in(&error.bytes()).unwrap());
                assert_eq!(routed.destination, case.first.source.ip());
                assert_eq!(routed.quoted, (case.first.source, case.backend));
                let out = IcmpError::parse(&device.frame_out(&routed.bytes()).unwrap());
                assert_eq!(out.quoted, (case.first.source, case.first.destination));
                assert_eq!(out.source, case.first.destination.ip());
            }
        }
    });
}

/// S21
#[test]
fn an_error_about_a_reply_reaches_the_endpoint_as_its_own() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for place in [Place::ThisNode, Place::PodNetwork] {
            for mut case in cases() {
                case.first
                    .source
                    .set_port(if place == Place::ThisNode { 40001 } else { 40002 });
                case.sync(&mut proxy, place);
                let sent = device
                    .packet_out(&device.packet_in(&case.first).unwrap())
                    .unwrap();
                let reply = case.first.reply(SYN);
                for quoted in QUOTED {
                    let error = IcmpError::too_big(case.routers[0], &reply, quoted);
                    let routed = IcmpError::parse(&device.frame_in(&error.bytes()).unwrap());
                    assert_eq!(routed.destination, case.backend.ip());
                    assert_eq!(routed.quoted, (case.backend, case.first.source));
                    // On its way to the endpoint's node it is about what that one sent: to the client's stand-in.
                    let out = IcmpError::parse(&device.frame_out(&routed.bytes()).unwrap());
                    assert_eq!(out.quoted, (case.backend, sent.source));
                }
            }
        }
    });
}

/// S21 S22
#[test]
fn errors_about_anything_else_and_those_cut_short_pass_untouched() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for case in cases() {
            case.sync(&mut proxy, Place::ThisNode);
            let sent = device.packet_in(&case.first).unwrap();
            let mut stranger = sent.clone();
            stranger.destination.set_port(9);
            let about_others = IcmpError::too_big(case.routers[1], &stranger, 500).bytes();
            assert_eq!(device.frame_out(&about_others).unwrap(), about_others);
            let frame = IcmpError::too_big(&case.backend.ip().to_string(), &sent, 8).bytes();
            // Anything shorter than the Ethernet and IP headers the kernel does not take in a test run.
            let ip_header = if case.first.source.is_ipv4() { 20 } else { 40 };
            for length in 14 + ip_header..frame.len() {
                let cut = &frame[..length];
                assert_eq!(
                    device.frame_out(cut).as_deref(),
                    Some(cut),
                    "cut to {length} bytes"
                );
            }
        }
    });
}

/// What the kernel knows of the way to the socket's peer.
fn path_mtu(socket: &std::net::UdpSocket, family: Family) -> i32 {
    let (level, name) = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu = 0_i32;
    let mut size = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the option's value is an int, and both pointers outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut mtu).cast(),
            &raw mut size,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    mtu
}

/// S21
#[test]
fn a_client_learns_the_paths_mtu_through_a_node_port() {
    on_node(|node| {
        let hosts = hosts(node);
        let mut proxy = hosts.open(node);
        ip("link set tunnel mtu 1400");
        for (family, frontend, backend, any) in [
            (Family::V4, "198.51.100.1:30080", "10.244.2.9:8080", "0.0.0.0:0"),
            (Family::V6, "[2001:db8:f::1]:30080", "[fd10:2::9]:8080", "[::]:0"),
        ] {
            let mut set = port(&[(frontend, FrontendKind::NodePort)], &[backend.parse().unwrap()]);
            set.backends[0].place = Place::PodNetwork;
            sync(
                &mut proxy,
                &Desired::from([(key("web", Protocol::Udp, family), set)]),
            );
            let learned = hosts.client.run(move || {
                let socket = std::net::UdpSocket::bind(any).unwrap();
                socket.connect(frontend).unwrap();
                let until = Instant::now() + Duration::from_secs(10);
                loop {
                    // What does not fit is an error once the way's MTU is known, or goes in fragments.
                    let _ = socket.send(&[0; 1440]);
                    let mtu = path_mtu(&socket, family);
                    if mtu != 1500 || Instant::now() > until {
                        return mtu;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            assert_eq!(learned, 1400);
        }
    });
}
