//! SCTP through the device, by crafted packets: the kernel of a test machine need not have SCTP sockets.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::net::SocketAddr;

use ebpf_support::device::Device;
use ebpf_support::packet::{checksum, octets};
use ebpf_support::{Desired, ip, key, on_node, port, sync};
use sluice_daemon::network;
use sluice_daemon::proxy::{ConnectionState, Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
const DATA: u8 = 0;

/// CRC-32C (RFC 9260, appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 0 {
                crc >> 1
            } else {
                crc >> 1 ^ 0x82f6_3b78
            }
        })
    });
    !crc
}

/// A packet with one chunk and `data` behind it; `whole`: with its checksum, and not left to the device.
fn frame(source: SocketAddr, destination: SocketAddr, chunk: u8, data: usize, whole: bool) -> Vec<u8> {
    let mut sctp = Vec::new();
    sctp.extend(source.port().to_be_bytes());
    sctp.extend(destination.port().to_be_bytes());
    sctp.extend([1, 2, 3, 4, 0, 0, 0, 0, chunk, 0]);
    sctp.extend((4 + data as u16).to_be_bytes());
    sctp.extend((0..data).map(|byte| byte as u8));
    if whole {
        let crc = crc32c(&sctp);
        sctp[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let mut header = if source.is_ipv4() {
        frame.extend([0x08, 0x00]);
        let mut header = vec![0x45, 0];
        header.extend((20 + sctp.len() as u16).to_be_bytes());
        header.extend([0, 7, 0, 0, 64, 132, 0, 0]);
        header
    } else {
        frame.extend([0x86, 0xdd]);
        let mut header = vec![0x60, 0, 0, 0];
        header.extend((sctp.len() as u16).to_be_bytes());
        header.extend([132, 64]);
        header
    };
    header.extend(octets(source.ip()));
    header.extend(octets(destination.ip()));
    if source.is_ipv4() {
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    frame.extend(header);
    frame.extend(sctp);
    frame
}

/// S1 S2
#[test]
fn associations_are_translated_with_their_checksum_and_known_by_their_chunks() {
    on_node(|node| {
        ip("link add uplink type veth peer name other");
        let mut proxy = node.open();
        proxy
            .adjust(&Surroundings {
                devices: vec![network::Device {
                    index: nix::net::if_::if_nametoindex("uplink").unwrap(),
                    name: "uplink".to_owned(),
                }],
                pod_network_addresses: vec!["10.244.1.0".parse().unwrap(), "fd10:1::".parse().unwrap()],
                ..Surroundings::default()
            })
            .unwrap();
        let device = Device::attached(&node.options.pins, "uplink");
        for (family, client, frontend, backend) in [
            (
                Family::V4,
                "198.51.100.7:5000",
                "192.0.2.1:30132",
                "10.244.1.9:3868",
            ),
            (
                Family::V6,
                "[2001:db8:f::7]:5000",
                "[2001:db8::1]:30132",
                "[fd10:1::9]:3868",
            ),
        ] {
            let [client, at, backend]: [SocketAddr; 3] =
                [client, frontend, backend].map(|address| address.parse().unwrap());
            let set = port(&[(frontend, FrontendKind::NodePort)], &[backend]);
            sync(
                &mut proxy,
                &Desired::from([(key("diameter", Protocol::Sctp, family), set)]),
            );
            let state = |proxy: &dyn Proxy| {
                let all = proxy.connections().unwrap();
                all.iter()
                    .find(|connection| connection.client == client)
                    .map(|found| found.state)
            };
            // Not the beginning of an association: nothing is known of it.
            let stray = frame(client, at, DATA, 16, true);
            assert_eq!(device.frame_in(&stray), Some(stray.clone()));
            // Of any length, and with the checksum left to the device.
            for data in [0, 4, 1000, 1452] {
                for whole in [true, false] {
                    let sent = device.frame_in(&frame(client, at, INIT, data, whole)).unwrap();
                    assert_eq!(sent, frame(client, backend, INIT, data, whole), "{data} {whole}");
                }
            }
            assert_eq!(state(&proxy), Some(ConnectionState::Opening));
            let answered = device
                .frame_out(&frame(backend, client, INIT_ACK, 20, true))
                .unwrap();
            assert_eq!(answered, frame(at, client, INIT_ACK, 20, true));
            assert_eq!(state(&proxy), Some(ConnectionState::Established));
            device.frame_in(&frame(client, at, ABORT, 0, true)).unwrap();
            assert_eq!(state(&proxy), Some(ConnectionState::Closed));

            // To an endpoint elsewhere: another source, and its own port for it.
            let mut set = port(&[(frontend, FrontendKind::NodePort)], &[backend]);
            set.backends[0].place = Place::PodNetwork;
            sync(
                &mut proxy,
                &Desired::from([(key("diameter", Protocol::Sctp, family), set)]),
            );
            let client = SocketAddr::new(client.ip(), 5001);
            let inside = device.frame_in(&frame(client, at, INIT, 16, true)).unwrap();
            let outside = device.frame_out(&inside).unwrap();
            let stand_in = proxy.connections().unwrap();
            let stand_in = stand_in
                .iter()
                .find(|c| c.client == client)
                .unwrap()
                .stand_in
                .unwrap();
            assert_eq!(outside, frame(stand_in, backend, INIT, 16, true));
            let back = device
                .frame_in(&frame(backend, stand_in, INIT_ACK, 16, true))
                .unwrap();
            let back = device.frame_out(&back).unwrap();
            assert_eq!(back, frame(at, client, INIT_ACK, 16, true));
        }
    });
}
