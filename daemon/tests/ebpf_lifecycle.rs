//! What the eBPF backend leaves in the kernel, finds there again, and takes away.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use ebpf_support::{Desired, Node, device, ip, key, on_node, packet, port, sync};
use sluice_daemon::network::Device;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Dirty, Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol, Scope, ServicePortKey};
use sluice_ebpf_types::{
    Address, Backend, BackendKey, Connection, ConnectionKey, Frontend, FrontendKey, MAX_BACKENDS, MemberKey,
    Service, direction, frontend_flag,
};

const CLUSTER_IP: FrontendKind = FrontendKind::ClusterIp;

fn table<K: Pod + Ord, V: Pod>(node: &Node, name: &str) -> BTreeMap<K, V> {
    let map = Map::HashMap(MapData::from_pin(node.options.pins.join("maps").join(name)).unwrap());
    let map: HashMap<_, K, V> = HashMap::try_from(map).unwrap();
    map.iter().map(Result::unwrap).collect()
}

/// All the kernel says of Services: frontends, sets, and the backends of each set in force, by slot.
#[derive(Debug, PartialEq, Eq)]
struct Kernel {
    frontends: BTreeMap<FrontendKey, Frontend>,
    services: BTreeMap<u32, (u32, u32, u32)>,
    backends: BTreeMap<(u32, u32, u32), Backend>,
}

fn kernel(node: &Node) -> Kernel {
    let read = |name: &str| node.options.pins.join("maps").join(name);
    let services: HashMap<_, u32, Service> =
        HashMap::try_from(Map::HashMap(MapData::from_pin(read("services_v1")).unwrap())).unwrap();
    let backends: HashMap<_, BackendKey, Backend> =
        HashMap::try_from(Map::HashMap(MapData::from_pin(read("backends_v1")).unwrap())).unwrap();
    let kernel = Kernel {
        frontends: table(node, "frontends_v1"),
        services: services
            .iter()
            .map(Result::unwrap)
            .map(|(id, service)| (id, (service.generation, service.count, service.affinity_seconds)))
            .collect(),
        backends: backends
            .iter()
            .map(Result::unwrap)
            .map(|(key, backend)| ((key.service, key.generation, key.slot), backend))
            .collect(),
    };
    let cluster_ips: BTreeSet<_> = kernel
        .frontends
        .iter()
        .filter(|(_, frontend)| frontend.flags & frontend_flag::CLUSTER_IP != 0)
        .map(|(key, _)| key.address)
        .collect();
    assert_eq!(
        table::<Address, u32>(node, "addresses_v1")
            .into_keys()
            .collect::<BTreeSet<_>>(),
        cluster_ips
    );
    // Whatever was done: slots without gaps in the generation in force and no others, every backend a member and no other.
    let slots: BTreeSet<_> = kernel
        .services
        .iter()
        .flat_map(|(id, (generation, count, _))| (0..*count).map(move |slot| (*id, *generation, slot)))
        .collect();
    assert_eq!(kernel.backends.keys().copied().collect::<BTreeSet<_>>(), slots);
    let members: HashMap<_, MemberKey, u32> =
        HashMap::try_from(Map::HashMap(MapData::from_pin(read("members_v1")).unwrap())).unwrap();
    let members: BTreeSet<_> = members
        .keys()
        .map(Result::unwrap)
        .map(|member| (member.service, member.address, member.port))
        .collect();
    let expected: BTreeSet<_> = kernel
        .backends
        .iter()
        .map(|(key, backend)| (key.0, backend.address, backend.port))
        .collect();
    assert_eq!(members, expected);
    kernel
}

fn backends(range: std::ops::Range<u16>) -> Vec<SocketAddr> {
    range
        .map(|number| SocketAddr::new(IpAddr::from([10, 244, (number >> 8) as u8, number as u8]), 8080))
        .collect()
}

fn web(name: &str) -> ServicePortKey {
    key(name, Protocol::Tcp, Family::V4)
}

fn in_force(kernel: &Kernel, id: u32) -> BTreeSet<SocketAddr> {
    kernel
        .backends
        .iter()
        .filter(|(key, _)| key.0 == id)
        .map(|(_, backend)| SocketAddr::new(backend.address.to_ip(), u16::from_be(backend.port)))
        .collect()
}

/// S18
#[test]
fn a_restart_keeps_ids_and_writes_nothing_and_prunes_what_went_meanwhile() {
    on_node(|node| {
        let mut desired: Desired = (1..=20)
            .map(|number| {
                let frontend = format!("10.96.0.{number}:80");
                (
                    web(&format!("web{number}")),
                    port(&[(&frontend, CLUSTER_IP)], &backends(0..number)),
                )
            })
            .collect();
        let mut proxy = node.open();
        assert_eq!(sync(&mut proxy, &desired).changed, 20);
        let before = kernel(node);
        drop(proxy);

        let mut proxy = node.open();
        assert_eq!(kernel(node), before);
        let report = sync(&mut proxy, &desired);
        assert_eq!((report.changed, report.removed), (0, 0));
        assert_eq!(kernel(node), before);
        drop(proxy);

        let mut proxy = node.open();
        desired.remove(&web("web7"));
        desired.insert(web("new"), port(&[("10.96.1.1:80", CLUSTER_IP)], &backends(0..3)));
        // Not all is known yet: nothing is taken away.
        let only = Dirty::Only(BTreeSet::from([web("new")]));
        let report = proxy.sync(&desired, &only).unwrap();
        assert_eq!((report.changed, report.removed), (1, 0));
        assert!(
            before
                .services
                .keys()
                .all(|id| kernel(node).services.contains_key(id))
        );
        let report = sync(&mut proxy, &desired);
        assert_eq!((report.changed, report.removed), (0, 1));
        let after = kernel(node);
        assert_eq!(after.services.len(), 20);
        assert!(
            after
                .services
                .iter()
                .filter(|(id, _)| !before.services.contains_key(id))
                .count()
                == 1
        );
    });
}

/// S18
#[test]
fn a_sync_of_one_service_touches_no_other() {
    on_node(|node| {
        let a = port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(0..3));
        let b = port(&[("10.96.0.2:80", CLUSTER_IP)], &backends(3..6));
        let mut desired = Desired::from([(web("a"), a), (web("b"), b)]);
        let mut proxy = node.open();
        sync(&mut proxy, &desired);
        let before = kernel(node);
        // Both are other now, but one alone is said to be.
        desired.insert(web("a"), port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(7..9)));
        desired.remove(&web("b"));
        let report = proxy
            .sync(&desired, &Dirty::Only(BTreeSet::from([web("a")])))
            .unwrap();
        assert_eq!((report.changed, report.removed), (1, 0));
        let after = kernel(node);
        assert_eq!(in_force(&after, 1), backends(7..9).into_iter().collect());
        assert_eq!(in_force(&after, 2), in_force(&before, 2));
        let report = proxy
            .sync(&desired, &Dirty::Only(BTreeSet::from([web("b")])))
            .unwrap();
        assert_eq!((report.changed, report.removed), (0, 1));
        assert_eq!(kernel(node).services.keys().collect::<Vec<_>>(), [&1]);
        assert_eq!(sync(&mut proxy, &Desired::new()).removed, 1);
        let empty = kernel(node);
        assert!(empty.frontends.is_empty() && empty.services.is_empty() && empty.backends.is_empty());
    });
}

/// S5 S18 S26
#[test]
fn sets_of_any_size_end_up_as_desired_after_any_change() {
    on_node(|node| {
        let mut proxy = node.open();
        for range in [
            0..1,
            0..100,
            0..101,
            3..101,
            5..110,
            5..109,
            90..200,
            90..90,
            7..8,
            0..300,
            0..290,
            1..291,
        ] {
            let wanted = backends(range);
            let desired = Desired::from([(web("a"), port(&[("10.96.0.1:80", CLUSTER_IP)], &wanted))]);
            sync(&mut proxy, &desired);
            assert_eq!(in_force(&kernel(node), 1), wanted.into_iter().collect());
        }
        // A small change of a large set is no new generation.
        let generation = kernel(node).services[&1].0;
        let desired = Desired::from([(web("a"), port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(2..292)))]);
        sync(&mut proxy, &desired);
        assert_eq!(kernel(node).services[&1].0, generation);
    });
}

/// S19
#[test]
fn the_first_to_hold_an_address_keeps_it_until_it_gives_it_up() {
    on_node(|node| {
        let shared = ("203.0.113.1:80", FrontendKind::ExternalIp);
        let a = port(&[("10.96.0.1:80", CLUSTER_IP), shared], &backends(0..1));
        let b = port(&[("10.96.0.2:80", CLUSTER_IP), shared], &backends(1..2));
        let mut proxy = node.open();
        let mut desired = Desired::from([(web("b"), b.clone())]);
        sync(&mut proxy, &desired);
        desired.insert(web("a"), a);
        for _ in 0..2 {
            let report = proxy.sync(&desired, &Dirty::All).unwrap();
            let [(key, reason)] = report.failed.as_slice() else {
                panic!("{report:?}")
            };
            assert_eq!(*key, web("a"));
            assert_eq!(reason, "203.0.113.1:80 belongs to default/b/TCP");
        }
        let holder = |node: &Node| {
            kernel(node)
                .frontends
                .iter()
                .find(|(key, _)| key.address == "203.0.113.1".parse::<IpAddr>().unwrap().into())
                .map(|(_, frontend)| frontend.service)
        };
        assert_eq!(holder(node), Some(1));
        assert_eq!(
            kernel(node).frontends.len(),
            3,
            "its other address serves all the same"
        );
        // Given up in a sync that names the holder alone: the other has it at once.
        desired.insert(web("b"), port(&[("10.96.0.2:80", CLUSTER_IP)], &backends(1..2)));
        let report = proxy
            .sync(&desired, &Dirty::Only(BTreeSet::from([web("b")])))
            .unwrap();
        assert!(report.failed.is_empty(), "{report:?}");
        assert_eq!(holder(node), Some(2));
        // Removed altogether, and claimed by the other again, in one sync.
        desired.insert(web("b"), b);
        desired.remove(&web("a"));
        sync(&mut proxy, &desired);
        assert_eq!(holder(node), Some(1));
    });
}

/// S7
#[test]
fn a_local_services_outside_address_leads_sockets_to_all_endpoints() {
    on_node(|node| {
        let cluster = web("a");
        let local = ServicePortKey {
            scope: Scope::Local,
            ..cluster.clone()
        };
        let outside = ("192.0.2.1:30080", FrontendKind::NodePort);
        let mut desired = Desired::from([
            (
                cluster.clone(),
                port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(0..3)),
            ),
            (local.clone(), port(&[outside], &backends(0..1))),
        ]);
        let mut proxy = node.open();
        sync(&mut proxy, &desired);
        let frontend = |node: &Node| {
            let all = kernel(node).frontends;
            *all.iter()
                .find(|(key, _)| u16::from_be(key.port) == 30080)
                .unwrap()
                .1
        };
        assert_ne!(frontend(node).service, frontend(node).socket_service);
        desired.remove(&cluster);
        proxy
            .sync(&desired, &Dirty::Only(BTreeSet::from([cluster])))
            .unwrap();
        assert_eq!(frontend(node).service, frontend(node).socket_service);
    });
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
        let desired = Desired::from([(web("a"), port(&[("10.96.0.1:80", CLUSTER_IP)], &backends(0..3)))]);
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
        let left: Vec<u32> = aya::programs::loaded_links()
            .filter_map(Result::ok)
            .map(|link| link.id())
            .collect();
        assert!(ids.iter().all(|id| !left.contains(id)));
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
        let mut service = port(&[("192.0.2.1:30053", FrontendKind::NodePort)], &backends(0..3));
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

/// S18
#[test]
fn a_set_too_large_is_reported_and_the_old_one_serves_on() {
    on_node(|node| {
        let frontends = [("10.96.0.1:80", CLUSTER_IP)];
        let mut desired = Desired::from([
            (web("a"), port(&frontends, &backends(0..3))),
            (web("b"), port(&[("10.96.0.2:80", CLUSTER_IP)], &backends(3..5))),
        ]);
        let mut proxy = node.open();
        sync(&mut proxy, &desired);
        let before = kernel(node);
        let many: Vec<SocketAddr> = (0..=MAX_BACKENDS)
            .map(|number| SocketAddr::new(IpAddr::from((0x0a80_0000 + number).to_be_bytes()), 8080))
            .collect();
        desired.insert(web("a"), port(&frontends, &many));
        let report = proxy.sync(&desired, &Dirty::All).unwrap();
        let [(key, reason)] = report.failed.as_slice() else {
            panic!("{report:?}")
        };
        assert_eq!(*key, web("a"));
        assert!(reason.contains("is full (262144 entries)"), "{reason}");
        assert_eq!(kernel(node), before);
        // Tried again without being named.
        desired.insert(web("a"), port(&frontends, &backends(0..9)));
        let report = proxy.sync(&desired, &Dirty::Only(BTreeSet::new())).unwrap();
        assert_eq!((report.changed, report.failed.len()), (1, 0));
        assert_eq!(in_force(&kernel(node), 1).len(), 9);
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
            ("sockets/connect4", 1500),
            ("sockets/connect6", 1500),
            ("sockets/sendmsg4", 2000),
            ("sockets/sendmsg6", 2000),
            ("sockets/recvmsg4", 200),
            ("sockets/recvmsg6", 200),
            ("sockets/getpeername4", 200),
            ("sockets/getpeername6", 200),
            ("devices/in-uplink", 160_000),
            ("devices/out-uplink", 5000),
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
