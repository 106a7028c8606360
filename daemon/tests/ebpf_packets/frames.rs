//! Packets with options, cut short, in fragments, of others: what is carried and what passes untouched.

use std::net::SocketAddr;

use sluice_daemon::state::service_port::{FrontendKind, Place};

use crate::cases::{cases, open};
use crate::ebpf_support::packet::{ACK, Packet, SYN, tcp, udp};
use crate::ebpf_support::{on_node, port, sync};

/// S22
#[test]
fn options_are_carried_and_no_fragment_is_misdirected() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for case in cases().into_iter().take(2) {
            sync(&mut proxy, &case.desired(Place::ThisNode));
            let options = Packet {
                options: vec![1; 8],
                ..case.first.clone()
            };
            assert_eq!(device.packet_in(&options).unwrap(), options.to(case.backend));
            // The first of several, without which the rest are nothing; the last one; don't fragment, which is none.
            let piece = |fragment, of: &Packet| Packet {
                fragment,
                ..of.clone()
            };
            let first = piece(0x2000, &case.first);
            assert_eq!(device.frame_in(&first.bytes()), None);
            let last = piece(0x0010, &case.first);
            assert_eq!(device.frame_in(&last.bytes()).unwrap(), last.bytes());
            let elsewhere = Packet {
                destination: SocketAddr::new(case.first.destination.ip(), 9),
                ..first.clone()
            };
            assert_eq!(device.frame_in(&elsewhere.bytes()).unwrap(), elsewhere.bytes());
            let whole = Packet {
                fragment: 0x4000,
                ..case.first.clone()
            };
            assert_eq!(device.packet_in(&whole).unwrap(), whole.to(case.backend));
        }
        let summary = proxy.summary().unwrap();
        assert!(
            summary.counters.contains(&("dropped_fragments", 2)),
            "{summary:?}"
        );
    });
}

/// S22
#[test]
fn options_before_the_ports_are_carried_too() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for case in cases().into_iter().filter(|case| case.first.source.is_ipv6()) {
            sync(&mut proxy, &case.desired(Place::ThisNode));
            for padding in [[1, 4].as_slice(), &[1, 12]] {
                let mut options = padding.to_vec();
                options.resize(2 + usize::from(padding[1]), 0);
                let asks = Packet {
                    options,
                    ..case.first.clone()
                };
                let inside = device.packet_in(&asks).unwrap();
                assert_eq!(inside, asks.to(case.backend));
                let answer = inside.reply(SYN | ACK);
                assert_eq!(device.packet_out(&answer).unwrap(), answer.from(asks.destination));
            }
        }
    });
}

/// S22
#[test]
fn frames_cut_short_anywhere_pass_untouched() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        for case in cases() {
            sync(&mut proxy, &case.desired(Place::ThisNode));
            let frame = Packet {
                payload: Vec::new(),
                ..case.first.clone()
            }
            .bytes();
            // Anything shorter than the Ethernet and IP headers the kernel does not take in a test run.
            let ip_header = if case.first.source.is_ipv4() { 20 } else { 40 };
            for length in 14 + ip_header..frame.len() {
                assert_eq!(
                    device.frame_in(&frame[..length]).unwrap(),
                    &frame[..length],
                    "{length} bytes"
                );
            }
        }
    });
}

/// S2 S22
#[test]
fn unrelated_packets_pass_untouched() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        let desired = cases()
            .iter()
            .flat_map(|case| {
                let mut desired = case.desired(Place::ThisNode);
                let mut internal = case.key.clone();
                internal.name = "internal".into();
                let address = if case.first.source.is_ipv4() {
                    "10.96.0.1:80"
                } else {
                    "[fd96::1]:80"
                };
                desired.insert(
                    internal,
                    port(&[(address, FrontendKind::ClusterIp)], &[case.backend]),
                );
                desired
            })
            .collect();
        sync(&mut proxy, &desired);
        for packet in [
            tcp("198.51.100.7:40000", "192.0.2.1:22", SYN),
            udp("198.51.100.7:40000", "192.0.2.1:53"),
            tcp("[2001:db8:f::7]:40000", "[2001:db8::1]:22", SYN),
            // A ClusterIP is not served to other hosts.
            tcp("198.51.100.7:40000", "10.96.0.1:80", SYN),
            // In mid-connection, without a beginning.
            tcp("198.51.100.7:40000", "192.0.2.1:30080", ACK),
            // The IPv4 frontend, mapped into IPv6.
            tcp("[2001:db8:f::7]:40000", "[::ffff:192.0.2.1]:30080", SYN),
        ] {
            assert_eq!(device.packet_in(&packet).unwrap(), packet);
            assert_eq!(device.packet_out(&packet).unwrap(), packet);
        }
    });
}

/// S22
#[test]
fn a_udp_packet_without_checksum_stays_without() {
    on_node(|node| {
        let (mut proxy, device) = open(node);
        let case = cases().remove(1);
        sync(&mut proxy, &case.desired(Place::ThisNode));
        let packet = Packet {
            checksum: false,
            ..case.first
        };
        assert_eq!(device.packet_in(&packet).unwrap(), packet.to(case.backend));
    });
}
