//! Any packet at all through the programs at a device. `./dev test --fuzz` runs this for a minute.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::net::{IpAddr, SocketAddr};

use ebpf_support::device::Device;
use ebpf_support::packet::{Packet, SYN, checksum, octets, udp};
use ebpf_support::{Desired, ip, key, on_node, port, sync};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseResult, TestRunner};
use sluice_daemon::network;
use sluice_daemon::proxy::{Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol, WhenEmpty};

const ETHERNET: usize = 14;
const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
const NODE_IN_POD_NETWORK: [&str; 2] = ["10.244.1.0", "fd10:1::"];

/// Services of both families and all protocols: with endpoints here and elsewhere, and with none.
fn services() -> Desired {
    let mut desired = Desired::new();
    for (family, node, here, elsewhere) in [
        (Family::V4, "192.0.2.1", "10.244.1.9:8080", "10.244.2.9:8080"),
        (
            Family::V6,
            "[2001:db8::1]",
            "[fd10:1::9]:8080",
            "[fd10:2::9]:8080",
        ),
    ] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let at = |number: u16| format!("{node}:{number}");
            let mut served = port(
                &[(&*at(30_080), FrontendKind::NodePort)],
                &[here.parse().unwrap(), elsewhere.parse().unwrap()],
            );
            served.backends[1].place = Place::PodNetwork;
            desired.insert(key("served", protocol, family), served);
            let mut nobody = port(&[(&*at(30_081), FrontendKind::NodePort)], &[]);
            nobody.when_empty = WhenEmpty::Drop;
            desired.insert(key("nobody", protocol, family), nobody);
        }
    }
    desired
}

/// A packet that makes sense.
fn sensible() -> impl Strategy<Value = Vec<u8>> {
    // Mostly for whom somebody serves, and mostly beginning something.
    let port = prop_oneof![4 => Just(30_080_u16), 1 => 30_079..30_082_u16];
    let flags = prop_oneof![2 => Just(None), 2 => Just(Some(SYN)), 1 => any::<Option<u8>>()];
    let packet = (any::<bool>(), flags, port, 1024..1124_u16, 0..2_u8);
    let rest = (
        prop::collection::vec(any::<u8>(), 0..60),
        any::<bool>(),
        0..3_usize,
    );
    (packet, rest).prop_map(
        |((v4, flags, port, client, host), (payload, checksum, options))| {
            let (peer, node) = if v4 {
                (format!("198.51.100.{host}:{client}"), "192.0.2.1".to_owned())
            } else {
                (
                    format!("[2001:db8:f::{host}]:{client}"),
                    "[2001:db8::1]".to_owned(),
                )
            };
            Packet {
                tcp: flags,
                options: match options {
                    0 => Vec::new(),
                    words if v4 => vec![1; words * 4],
                    eights => vec![1; eights * 8 - 2],
                },
                // TCP has no choice, nor has IPv6.
                checksum: checksum || flags.is_some() || !v4,
                payload,
                ..udp(&peer, &format!("{node}:{port}"))
            }
            .bytes()
        },
    )
}

/// One that may make none: bytes are others, its end is missing, or there is more behind it.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let headers = any::<prop::sample::Index>();
    let edits = prop::collection::vec((headers, any::<u8>()), 0..4);
    let cut = prop::option::weighted(0.3, any::<prop::sample::Index>());
    let protocol = prop::option::weighted(
        0.2,
        prop::sample::select(&[1_u8, 6, 17, 44, 58, 132, 0, 43, 60][..]),
    );
    (sensible(), edits, protocol, cut).prop_map(|(mut frame, edits, protocol, cut)| {
        if let Some(protocol) = protocol {
            let at = if frame[12] == 8 { 9 } else { 6 };
            frame[ETHERNET + at] = protocol;
        }
        for (place, byte) in edits {
            // Where headers are.
            let place = place.index(frame.len().min(80));
            frame[place] = byte;
        }
        if let Some(cut) = cut {
            // Less the kernel does not take in a test run.
            let least = match frame[12..14] {
                [0x08, 0x00] => ETHERNET + 20,
                [0x86, 0xdd] => ETHERNET + 40,
                _ => ETHERNET + 1,
            };
            frame.truncate(least + cut.index(frame.len() - least));
        }
        frame
    })
}

/// Where what is in a frame is, if it is whole.
struct Layout {
    v4: bool,
    protocol: u8,
    /// Of the header that ports stand in.
    l4: usize,
}

fn layout(frame: &[u8]) -> Option<Layout> {
    let ip = frame.get(ETHERNET..)?;
    let v4 = frame[12..14] == [8, 0];
    let (mut protocol, mut header) = if v4 {
        (*ip.get(9)?, usize::from(*ip.first()? & 15) * 4)
    } else {
        (*ip.get(6)?, 40)
    };
    // IPv6's options, for every hop and for the destination.
    for kind in [0, 60] {
        if !v4 && protocol == kind {
            protocol = *ip.get(header)?;
            header += (usize::from(*ip.get(header + 1)?) + 1) * 8;
        }
    }
    ip.get(header..header + 8)?;
    Some(Layout {
        v4,
        protocol,
        l4: ETHERNET + header,
    })
}

/// What a frame adds up to, as far as checksums go: that of IPv4's header, and that of addresses and all behind the header. Whatever is
/// translated, a sum that is right stays right, and one that is wrong is wrong by as much.
fn sums(frame: &[u8], layout: &Layout) -> (u16, u16) {
    let (addresses, length) = if layout.v4 { (12, 8) } else { (8, 32) };
    let header = if layout.v4 {
        &frame[ETHERNET..layout.l4]
    } else {
        &[][..]
    };
    let addresses = &frame[ETHERNET + addresses..ETHERNET + addresses + length];
    // Two ways to write nought.
    let folded = |parts: &[&[u8]]| checksum(parts) % 0xffff;
    (folded(&[header]), folded(&[addresses, &frame[layout.l4..]]))
}

fn endpoint(frame: &[u8], layout: &Layout, of_destination: bool) -> SocketAddr {
    let width = if layout.v4 { 4 } else { 16 };
    let addresses = ETHERNET + if layout.v4 { 12 } else { 8 };
    let at = addresses + if of_destination { width } else { 0 };
    let address: IpAddr = if layout.v4 {
        <[u8; 4]>::try_from(&frame[at..at + 4]).unwrap().into()
    } else {
        <[u8; 16]>::try_from(&frame[at..at + 16]).unwrap().into()
    };
    let port = layout.l4 + if of_destination { 2 } else { 0 };
    SocketAddr::new(address, u16::from_be_bytes([frame[port], frame[port + 1]]))
}

/// What a packet may become on its way in, and what on its way out again.
fn translated_rightly(device: &Device, frame: &[u8]) -> TestCaseResult {
    let Some(inside) = device.frame_in(frame) else {
        return Ok(());
    };
    prop_assert_eq!(inside.len(), frame.len());
    if inside != frame {
        let layout = layout(frame);
        prop_assert!(layout.is_some(), "what has no ports was changed");
        let layout = layout.unwrap();
        // Errors are about another packet, whose addresses are translated in them.
        if ![1, 58].contains(&layout.protocol) {
            only_one_end_is_another(frame, &inside, &layout, true)?;
            let asked = endpoint(frame, &layout, true);
            let stands_in = NODE_IN_POD_NETWORK
                .iter()
                .any(|address| asked.ip() == address.parse::<IpAddr>().unwrap());
            let is_served = asked.port() == 30_080
                && NODE
                    .iter()
                    .any(|address| asked.ip() == address.parse::<IpAddr>().unwrap());
            prop_assert!(is_served || stands_in, "{asked} is nobody's");
        }
    }
    let Some(outside) = device.frame_out(&inside) else {
        return Ok(());
    };
    prop_assert_eq!(outside.len(), frame.len());
    if outside != inside {
        let layout = layout(&inside).unwrap();
        if ![1, 58].contains(&layout.protocol) {
            only_one_end_is_another(&inside, &outside, &layout, false)?;
            let seen = endpoint(&outside, &layout, false).ip();
            let may_stand_in = NODE.iter().chain(&NODE_IN_POD_NETWORK);
            let stands_in = may_stand_in
                .map(|address| address.parse::<IpAddr>().unwrap())
                .any(|address| address == seen);
            prop_assert!(stands_in, "{seen} stands in for the client");
        }
    }
    Ok(())
}

/// Nothing but the destination, or the source, and checksums; and these as they should be.
fn only_one_end_is_another(
    before: &[u8],
    after: &[u8],
    layout: &Layout,
    of_destination: bool,
) -> TestCaseResult {
    prop_assert_eq!(
        endpoint(before, layout, !of_destination),
        endpoint(after, layout, !of_destination)
    );
    let width = octets(endpoint(before, layout, true).ip()).len();
    let address = ETHERNET + if layout.v4 { 12 } else { 8 } + if of_destination { width } else { 0 };
    let port = layout.l4 + if of_destination { 2 } else { 0 };
    let sum = layout.l4
        + match layout.protocol {
            6 => 16,
            17 => 6,
            _ => 8,
        };
    let may_differ = |place: usize| {
        (address..address + width).contains(&place)
            || (port..port + 2).contains(&place)
            || (sum..sum + if layout.protocol == 132 { 4 } else { 2 }).contains(&place)
            || layout.v4 && (ETHERNET + 10..ETHERNET + 12).contains(&place)
    };
    let strange = (0..before.len()).find(|place| before[*place] != after[*place] && !may_differ(*place));
    prop_assert_eq!(strange, None, "a byte that is none of ours");
    let (header, transport) = (sums(before, layout), sums(after, layout));
    prop_assert_eq!(header.0, transport.0, "the header's checksum");
    let without = layout.protocol == 17 && before[sum..sum + 2] == [0, 0];
    if without {
        prop_assert_eq!(&after[sum..sum + 2], &[0, 0]);
    } else if layout.protocol != 132 {
        prop_assert_eq!(header.1, transport.1, "the checksum over addresses and ports");
    }
    Ok(())
}

/// S22: cut short, with bytes that are wrong, of other protocols: it passes, is dropped, or is translated in the destination alone, and
/// what was wrong with it is wrong with it still.
#[test]
fn whatever_comes_is_passed_dropped_or_translated_and_nothing_else() {
    on_node(|node| {
        ip("link add uplink type veth peer name fabric");
        let mut proxy = node.open();
        let addresses = |all: [&str; 2]| all.map(|a| a.parse::<IpAddr>().unwrap()).to_vec();
        proxy
            .adjust(&Surroundings {
                devices: vec![network::Device {
                    index: nix::net::if_::if_nametoindex("uplink").unwrap(),
                    name: "uplink".to_owned(),
                }],
                pod_network_addresses: addresses(NODE_IN_POD_NETWORK),
                node_addresses: addresses(NODE),
                ..Surroundings::default()
            })
            .unwrap();
        sync(&mut proxy, &services());
        let device = Device::attached(&node.options.pins, "uplink");
        let settings = Config {
            failure_persistence: None,
            ..Config::default()
        };
        let result = TestRunner::new(settings).run(&packet(), |frame| translated_rightly(&device, &frame));
        if let Err(error) = result {
            panic!("{error}");
        }
        // Some of them made sense.
        let begun = proxy.connections().unwrap().len();
        assert!(begun > 20, "{begun} connections were begun by all that");
    });
}
