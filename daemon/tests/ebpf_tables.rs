//! What the eBPF backend writes into its tables, and finds there again.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use ebpf_support::{Desired, Node, key, on_node, port, sync};
use sluice_daemon::proxy::{Dirty, Proxy};
use sluice_daemon::state::service_port::{Family, FrontendKind, Protocol, Scope, ServicePortKey};
use sluice_ebpf_types::{
    Address, Backend, BackendKey, Frontend, FrontendKey, MAGLEV_PART, MAX_BACKENDS, MAX_MAGLEV, MaglevKey,
    MaglevPart, MemberKey, Service, frontend_flag, maglev_places,
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
    maglev: BTreeMap<MaglevKey, MaglevPart>,
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
        maglev: table(node, "maglev_v1"),
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
    // Sets that serve other hosts, and no others, have a place for each of their slots.
    let external = kernel.frontends.values();
    let external = external.filter(|frontend| frontend.flags & frontend_flag::EXTERNAL != 0);
    let with_table: BTreeSet<_> = external
        .map(|frontend| frontend.service)
        .filter(|id| kernel.services[id].1 > 1)
        .collect();
    let found: BTreeSet<_> = kernel.maglev.keys().map(|key| key.service).collect();
    assert_eq!(found, with_table);
    for id in with_table {
        let count = kernel.services[&id].1;
        let parts = kernel.maglev.iter().filter(|(key, _)| key.service == id);
        let places = parts.flat_map(|(_, part)| part.slots);
        let places: Vec<_> = places.take(maglev_places(count) as usize).collect();
        assert_eq!(places.len(), maglev_places(count) as usize);
        let slots: BTreeSet<_> = places.into_iter().map(u32::from).collect();
        assert_eq!(slots, (0..count).collect());
    }
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
        let frontends = [
            ("10.96.0.1:80", CLUSTER_IP),
            ("192.0.2.1:30080", FrontendKind::NodePort),
        ];
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
            0..700,
            0..300,
            0..290,
            1..291,
        ] {
            let wanted = backends(range);
            let desired = Desired::from([(web("a"), port(&frontends, &wanted))]);
            sync(&mut proxy, &desired);
            assert_eq!(proxy.audit().unwrap(), 0);
            assert_eq!(in_force(&kernel(node), 1), wanted.into_iter().collect());
        }
        // A small change of a large set is no new generation.
        let generation = kernel(node).services[&1].0;
        let mut desired = Desired::from([(web("a"), port(&frontends, &backends(2..292)))]);
        sync(&mut proxy, &desired);
        assert_eq!(kernel(node).services[&1].0, generation);
        assert!(!kernel(node).maglev.is_empty());
        // Nobody outside is served any more.
        desired.insert(web("a"), port(&frontends[..1], &backends(2..292)));
        sync(&mut proxy, &desired);
        assert!(kernel(node).maglev.is_empty());
    });
}

/// S18 S19
#[test]
fn an_address_changes_hands_in_one_sync_and_over_a_restart_and_no_id_does() {
    on_node(|node| {
        let shared = ("203.0.113.1:80", FrontendKind::ExternalIp);
        let held_by = |holder: &str| -> Desired {
            [
                ("a", "10.96.0.1:80", backends(0..1)),
                ("b", "10.96.0.2:80", backends(1..2)),
            ]
            .map(|(name, address, backends)| {
                let frontends = [(address, CLUSTER_IP), shared];
                let count = if name == holder { 2 } else { 1 };
                (web(name), port(&frontends[..count], &backends))
            })
            .into()
        };
        let leads_to = |node: &Node, address: &str| {
            let address: Address = address.parse::<IpAddr>().unwrap().into();
            let all = kernel(node).frontends;
            all.iter()
                .find(|(key, _)| key.address == address)
                .map(|(_, frontend)| frontend.service)
        };
        let mut proxy = node.open();
        sync(&mut proxy, &held_by("b"));
        let ids = ["10.96.0.1", "10.96.0.2"].map(|address| leads_to(node, address).unwrap());
        assert_eq!(leads_to(node, "203.0.113.1"), Some(ids[1]));

        let both = Dirty::Only(BTreeSet::from([web("a"), web("b")]));
        for (holder, id) in [("a", ids[0]), ("b", ids[1]), ("a", ids[0])] {
            let report = proxy.sync(&held_by(holder), &both).unwrap();
            assert!(report.changed > 0 && report.failed.is_empty(), "{report:?}");
            assert_eq!(leads_to(node, "203.0.113.1"), Some(id));
            assert_eq!(proxy.audit().unwrap(), 0);
        }
        // Whose it is changes while no daemon is there: nobody takes up the other's set for it.
        for (holder, id) in [("b", ids[1]), ("a", ids[0])] {
            drop(proxy);
            proxy = node.open();
            sync(&mut proxy, &held_by(holder));
            assert_eq!(leads_to(node, "203.0.113.1"), Some(id));
            assert_eq!(leads_to(node, "10.96.0.1"), Some(ids[0]));
            assert_eq!(leads_to(node, "10.96.0.2"), Some(ids[1]));
            assert_eq!(kernel(node).services.len(), 2);
        }
        // One goes altogether and the other has its address, in one sync.
        let mut desired = held_by("b");
        desired.remove(&web("a"));
        sync(&mut proxy, &desired);
        assert_eq!(leads_to(node, "203.0.113.1"), Some(ids[1]));
        assert_eq!(kernel(node).frontends.len(), 2);
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

/// S18
#[test]
fn what_others_write_into_the_tables_is_found_and_put_right_and_nothing_else_is_touched() {
    on_node(|node| {
        let desired: Desired = (1..=20)
            .map(|number| {
                let frontend = format!("10.96.0.{number}:80");
                let node_port = format!("192.0.2.1:{}", 30_000 + number);
                let frontends = [(&*frontend, CLUSTER_IP), (&*node_port, FrontendKind::NodePort)];
                let set = port(&frontends, &backends(0..number));
                (web(&format!("web{number}")), set)
            })
            .collect();
        let mut proxy = node.open();
        sync(&mut proxy, &desired);
        let before = kernel(node);
        assert_eq!(proxy.audit().unwrap(), 0);

        let open =
            |name: &str| Map::HashMap(MapData::from_pin(node.options.pins.join("maps").join(name)).unwrap());
        let mut frontends: HashMap<_, FrontendKey, Frontend> =
            HashMap::try_from(open("frontends_v1")).unwrap();
        let mut slots: HashMap<_, BackendKey, Backend> = HashMap::try_from(open("backends_v1")).unwrap();
        let mut members: HashMap<_, MemberKey, u32> = HashMap::try_from(open("members_v1")).unwrap();
        let mut services: HashMap<_, u32, Service> = HashMap::try_from(open("services_v1")).unwrap();
        let (mine, value) = frontends.iter().next().unwrap().unwrap();
        let strange = FrontendKey { port: 1, ..mine };
        frontends.remove(&mine).unwrap();
        frontends.insert(strange, value, 0).unwrap();
        let (slot, backend) = slots.iter().next().unwrap().unwrap();
        slots.insert(slot, Backend { port: 9, ..backend }, 0).unwrap();
        let member = members.keys().next().unwrap().unwrap();
        members.remove(&member).unwrap();
        services.remove(&1).unwrap();
        let mut maglev: HashMap<_, MaglevKey, MaglevPart> = HashMap::try_from(open("maglev_v1")).unwrap();
        let part = maglev.keys().next().unwrap().unwrap();
        maglev
            .insert(
                part,
                MaglevPart {
                    slots: [0; MAGLEV_PART],
                },
                0,
            )
            .unwrap();
        assert_eq!(proxy.audit().unwrap(), 6);
        assert_eq!(kernel(node), before);
        assert_eq!(proxy.audit().unwrap(), 0);
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

/// S18: and it is told that other nodes may choose otherwise.
#[test]
fn without_room_for_its_maglev_table_a_service_is_served_by_chance() {
    on_node(|node| {
        let mut proxy = node.open();
        let pin = node.options.pins.join("maps").join("maglev_v1");
        let map = Map::HashMap(MapData::from_pin(pin).unwrap());
        let mut maglev: HashMap<_, MaglevKey, MaglevPart> = HashMap::try_from(map).unwrap();
        let slots = [0; MAGLEV_PART];
        for part in 0..MAX_MAGLEV {
            let service = u32::MAX;
            let stranger = MaglevKey { service, part };
            maglev.insert(stranger, MaglevPart { slots }, 0).unwrap();
        }
        let frontends = [
            ("10.96.0.1:80", CLUSTER_IP),
            ("192.0.2.1:30080", FrontendKind::NodePort),
        ];
        let desired = Desired::from([(web("a"), port(&frontends, &backends(0..3)))]);
        let report = proxy.sync(&desired, &Dirty::All).unwrap();
        let [(_, reason)] = report.failed.as_slice() else {
            panic!("{report:?}")
        };
        assert!(reason.contains("by chance"), "{reason}");
        assert_eq!(table::<FrontendKey, Frontend>(node, "frontends_v1").len(), 2);
        assert_eq!(table::<Address, u32>(node, "addresses_v1").len(), 1);
        // The strangers go, and there is room.
        assert!(proxy.audit().unwrap() > 0);
        sync(&mut proxy, &desired);
        assert!(!kernel(node).maglev.is_empty());
    });
}
