//! What the eBPF backend attaches and pins, keeps in order, and takes away.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use ebpf_support::{Desired, device, ip, key, on_node, packet, port, sync};
use sluice_daemon::network::Device;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol};
use sluice_ebpf_types::{Address, Connection, ConnectionKey, direction};

fn backends() -> [SocketAddr; 3] {
    [1, 2, 3].map(|last| SocketAddr::new(IpAddr::from([10, 244, 1, last]), 8080))
}

fn named(name: &str) -> Device {
    Device {
        index: nix::net::if_::if_nametoindex(name).unwrap(),
        name: name.to_owned(),
    }
}

fn adjust(proxy: &mut EbpfProxy, devices: &[&str]) {
    let devices = devices.iter().copied().map(named).collect();
    proxy
        .adjust(&Surroundings {
            devices,
            ..Surroundings::default()
        })
        .unwrap();
}

fn pins(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn link(pin: &Path) -> (u32, u32) {
    let info = FdLink::from(PinnedLink::from_pin(pin).unwrap()).info().unwrap();
    (info.id(), info.program_id())
}

/// S2 S20
#[test]
fn devices_come_and_go_and_come_back_under_their_name() {
    on_node(|node| {
        ip("link add uplink type veth peer name fabric");
        ip("link add vxlan.1 type veth peer name tunnel");
        let mut proxy = EbpfProxy::open(&node.options).unwrap();
        let directory = node.options.pins.join("devices");
        adjust(&mut proxy, &["uplink", "vxlan.1"]);
        assert_eq!(
            pins(&directory),
            ["in-uplink", "in-vxlan:1", "out-uplink", "out-vxlan:1"]
        );
        // What comes in by one of them may be answered by another: the ways out were there first.
        let made = |pin: &str| link(&directory.join(pin)).0;
        let out = made("out-uplink").max(made("out-vxlan:1"));
        assert!(out < made("in-uplink").min(made("in-vxlan:1")));
        let before = link(&directory.join("in-uplink"));
        drop(proxy);
        // Another daemon: its program, by the same link.
        let mut proxy = EbpfProxy::open(&node.options).unwrap();
        adjust(&mut proxy, &["uplink", "vxlan.1"]);
        let after = link(&directory.join("in-uplink"));
        assert_eq!(after.0, before.0);
        assert_ne!(after.1, before.1);
        // Another device of that name.
        ip("link del uplink");
        ip("link add uplink type veth peer name fabric");
        adjust(&mut proxy, &["uplink"]);
        assert_ne!(link(&directory.join("in-uplink")).0, before.0);
        assert_eq!(pins(&directory), ["in-uplink", "out-uplink"]);
    });
}

/// S20
#[test]
fn removing_leaves_nothing_and_may_be_done_again() {
    on_node(|node| {
        ip("link add uplink type veth peer name fabric");
        let mut proxy = node.open();
        adjust(&mut proxy, &["uplink"]);
        let desired = Desired::from([(
            key("a", Protocol::Tcp, Family::V4),
            port(&[("10.96.0.1:80", FrontendKind::ClusterIp)], &backends()),
        )]);
        sync(&mut proxy, &desired);
        let sockets = pins(&node.options.pins.join("sockets"));
        assert_eq!(sockets.len(), 8);
        let ids: Vec<u32> = sockets
            .iter()
            .map(|name| link(&node.options.pins.join("sockets").join(name)).0)
            .collect();
        drop(proxy);
        EbpfProxy::remove(&node.options.pins).unwrap();
        assert!(!node.options.pins.exists());
        let left = || -> Vec<u32> {
            let links = aya::programs::loaded_links().filter_map(Result::ok);
            links
                .map(|link| link.id())
                .filter(|id| ids.contains(id))
                .collect()
        };
        // The kernel lets go of a link some time after its last pin is gone, and whoever lists links holds each for a moment.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !left().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(left(), Vec::<u32>::new());
        EbpfProxy::remove(&node.options.pins).unwrap();
    });
}

/// S13
#[test]
fn upkeep_forgets_the_idle_and_the_orphaned_and_nothing_else() {
    on_node(|node| {
        ip("link add uplink type veth peer name fabric");
        let mut proxy = node.open();
        let surroundings = Surroundings {
            devices: vec![named("uplink")],
            pod_network_addresses: vec!["10.244.1.0".parse().unwrap()],
            ..Surroundings::default()
        };
        proxy.adjust(&surroundings).unwrap();
        let mut service = port(&[("192.0.2.1:30053", FrontendKind::NodePort)], &backends());
        service
            .backends
            .iter_mut()
            .for_each(|backend| backend.place = Place::PodNetwork);
        let key = key("dns", Protocol::Udp, Family::V4);
        sync(&mut proxy, &Desired::from([(key, service)]));
        let programs = device::Device::attached(&node.options.pins, "uplink");
        for number in 1..=2 {
            programs
                .packet_in(&packet::udp(
                    &format!("198.51.100.{number}:5000"),
                    "192.0.2.1:30053",
                ))
                .unwrap();
        }
        let path = node.options.pins.join("maps/connections_v1");
        let map = Map::LruHashMap(MapData::from_pin(path).unwrap());
        let mut map: HashMap<_, ConnectionKey, Connection> = HashMap::try_from(map).unwrap();
        let all = |map: &HashMap<MapData, ConnectionKey, Connection>| {
            map.iter().map(Result::unwrap).collect::<Vec<_>>()
        };
        assert_eq!(all(&map).len(), 8);
        proxy.tend().unwrap();
        assert_eq!(all(&map).len(), 8, "nothing is idle yet");
        let client = |number: u8| Address::from(IpAddr::from([198, 51, 100, number]));
        let is_master =
            |key: &ConnectionKey, number| key.direction == direction::IN && key.source == client(number);
        // The first has been idle since the machine started, the second lost the entry that holds its state.
        for (key, value) in all(&map) {
            if is_master(&key, 1) {
                map.insert(
                    key,
                    Connection {
                        last_seen: 1,
                        ..value
                    },
                    0,
                )
                .unwrap();
            } else if is_master(&key, 2) {
                map.remove(&key).unwrap();
            }
        }
        proxy.tend().unwrap();
        assert_eq!(all(&map).len(), 3, "what is alone may be about to be completed");
        proxy.tend().unwrap();
        assert_eq!(all(&map), []);
    });
}

/// Instructions the verifier walks through per program, with some room: more is a reason to look, and old kernels stop
/// at a million.
#[test]
fn programs_stay_small() {
    on_node(|node| {
        ip("link add uplink type veth peer name fabric");
        let mut proxy = node.open();
        adjust(&mut proxy, &["uplink"]);
        for (pin, most) in [
            ("sockets/connect4", 1700),
            ("sockets/connect6", 1700),
            ("sockets/sendmsg4", 2000),
            ("sockets/sendmsg6", 2000),
            ("sockets/recvmsg4", 200),
            ("sockets/recvmsg6", 200),
            ("sockets/getpeername4", 200),
            ("sockets/getpeername6", 200),
            ("devices/in-uplink", 50_000),
            ("devices/out-uplink", 20_000),
        ] {
            let (_, id) = link(&node.options.pins.join(pin));
            let program = aya::programs::loaded_programs()
                .filter_map(Result::ok)
                .find(|program| program.id() == id)
                .unwrap();
            let verified = program.verified_instruction_count().unwrap();
            let size = program.size_translated().unwrap() / 8;
            println!("{pin}: {size} instructions, {verified} verified");
            assert!(
                verified <= most,
                "{pin}: {verified} instructions verified, {most} expected"
            );
        }
    });
}
