//! Where the eBPF backend keeps the pods of its node, and what the programs make of it.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData};
use ebpf_support::pods::{Pod, pod};
use ebpf_support::{Node, on_node};
use sluice_daemon::network::pods::PodDevice;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};
use sluice_ebpf_types::{Address, Endpoint, EndpointSlot};

/// The first two have the same slots: their addresses are 512 apart.
const A: [&str; 2] = ["10.244.1.2", "fd10:244:0:1::2"];
const B: [&str; 2] = ["10.244.3.2", "fd10:244:0:1::202"];
const C: [&str; 2] = ["10.244.1.3", "fd10:244:0:1::3"];

fn surroundings(pods: &[&PodDevice]) -> Surroundings {
    Surroundings {
        own_networks: Vec::new(),
        devices: Vec::new(),
        pod_network_addresses: Vec::new(),
        node_addresses: Vec::new(),
        pods: pods.iter().copied().cloned().collect(),
        pod_networks: vec!["10.244.0.0/16".parse().unwrap(), "fd10:244::/48".parse().unwrap()],
        fast_path: true,
        ping: true,
    }
}

fn map(node: &Node, name: &str) -> MapData {
    MapData::from_pin(node.options.pins.join("maps").join(name)).unwrap()
}

fn slots(node: &Node) -> Array<MapData, EndpointSlot> {
    Array::try_from(Map::Array(map(node, "endpoint_slots_v1"))).unwrap()
}

fn table(node: &Node) -> HashMap<MapData, Address, Endpoint> {
    HashMap::try_from(Map::HashMap(map(node, "endpoints_v1"))).unwrap()
}

/// All addresses with their devices: those in slots, and those in the table.
fn kernel(node: &Node) -> [BTreeMap<IpAddr, u32>; 2] {
    let slots = slots(node);
    let taken = (0..EndpointSlot::COUNT)
        .map(|number| (number, slots.get(&number, 0).unwrap()))
        .filter(|(_, slot)| *slot != EndpointSlot::default())
        .map(|(number, slot)| {
            assert_eq!(EndpointSlot::number(&slot.address), number);
            (slot.address.to_ip(), slot.endpoint.device)
        });
    let table = table(node);
    let others = table.iter().map(Result::unwrap);
    [
        taken.collect(),
        others
            .map(|(address, endpoint)| (address.to_ip(), endpoint.device))
            .collect(),
    ]
}

fn of(pods: &[&Pod]) -> BTreeMap<IpAddr, u32> {
    let each = |pod: &&Pod| pod.addresses.map(|address| (address, pod.device.device.index));
    pods.iter().flat_map(each).collect()
}

fn fast(proxy: &EbpfProxy) -> u64 {
    let counters = proxy.summary().unwrap().counters;
    counters
        .iter()
        .find(|(known, _)| *known == "fast_local")
        .unwrap()
        .1
}

/// A question and its answer in either family, both of them past the stack.
fn talk(proxy: &EbpfProxy, from: &Pod, to: &Pod) {
    for (own, there) in from.addresses.into_iter().zip(to.addresses) {
        let before = fast(proxy);
        let server = to.host.run(move || UdpSocket::bind((there, 7)).unwrap());
        let client = from.host.run(move || UdpSocket::bind((own, 0)).unwrap());
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        client.send_to(b"?", (there, 7)).unwrap();
        let (_, asker) = server.recv_from(&mut [0; 8]).unwrap();
        server.send_to(b"!", asker).unwrap();
        client.recv(&mut [0; 8]).unwrap();
        assert_eq!(fast(proxy) - before, 2);
    }
}

/// N1
#[test]
fn whose_slot_another_has_is_found_in_the_table_and_stays_there() {
    on_node(|node| {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let (a, b, c) = (
            pod(node, "sluicea", A),
            pod(node, "sluiceb", B),
            pod(node, "sluicec", C),
        );
        let mut proxy = node.open();
        let follow = |proxy: &mut EbpfProxy, pods: &[&Pod]| {
            let devices: Vec<_> = pods.iter().map(|pod| &pod.device).collect();
            proxy.adjust(&surroundings(&devices)).unwrap();
        };
        follow(&mut proxy, &[&a, &b, &c]);
        assert_eq!(kernel(node), [of(&[&a, &c]), of(&[&b])]);
        for (from, to) in [(&a, &b), (&b, &a), (&a, &c), (&c, &b)] {
            talk(&proxy, from, to);
        }

        // Its slot is free, but it stays: what a program is writing about it must not be lost.
        follow(&mut proxy, &[&b, &c]);
        assert_eq!(kernel(node), [of(&[&c]), of(&[&b])]);
        talk(&proxy, &b, &c);
        follow(&mut proxy, &[&c]);
        assert_eq!(kernel(node), [of(&[&c]), of(&[])]);
        follow(&mut proxy, &[&b, &c]);
        assert_eq!(kernel(node), [of(&[&b, &c]), of(&[])]);
        talk(&proxy, &b, &c);

        // A daemon that starts finds them there.
        drop(proxy);
        let mut proxy = node.open();
        follow(&mut proxy, &[&a, &b, &c]);
        assert_eq!(kernel(node), [of(&[&b, &c]), of(&[&a])]);
        talk(&proxy, &a, &b);
    });
}

/// N6 S18
#[test]
fn what_others_write_of_pods_is_found_and_put_right() {
    on_node(|node| {
        let (a, b) = (pod(node, "sluicea", A), pod(node, "sluiceb", B));
        let mut proxy = node.open();
        proxy.adjust(&surroundings(&[&a.device, &b.device])).unwrap();
        let as_it_should_be = [of(&[&a]), of(&[&b])];
        let address = Address::from(a.addresses[0]);
        let number = EndpointSlot::number(&address);
        let slot = slots(node).get(&number, 0).unwrap();
        let elsewhere = EndpointSlot {
            endpoint: Endpoint {
                device: slot.endpoint.device + 1,
                ..slot.endpoint
            },
            ..slot
        };
        let half_written = EndpointSlot {
            address: Address::default(),
            ..slot
        };
        for (number, wrong) in [
            (number, EndpointSlot::default()),
            (number, elsewhere),
            (number, half_written),
            (number + 1, slot),
        ] {
            slots(node).set(number, wrong, 0).unwrap();
            assert!(proxy.audit().unwrap() > 0, "{number} {wrong:?}");
            assert_eq!(proxy.audit().unwrap(), 0, "{number} {wrong:?}");
            assert_eq!(kernel(node), as_it_should_be, "{number} {wrong:?}");
        }
        table(node).insert(address, slot.endpoint, 0).unwrap();
        table(node).remove(&Address::from(b.addresses[0])).unwrap();
        assert_eq!(proxy.audit().unwrap(), 2);
        assert_eq!(kernel(node), as_it_should_be);

        // What the programs have noted is theirs.
        let noted = EndpointSlot {
            endpoint: Endpoint {
                translated: 1,
                ..slot.endpoint
            },
            ..slot
        };
        slots(node).set(number, noted, 0).unwrap();
        assert_eq!(proxy.audit().unwrap(), 0);
        assert_eq!(slots(node).get(&number, 0).unwrap(), noted);
    });
}
