//! Upkeep of the connection table beside clients who use their ports again.

#![allow(clippy::unwrap_used, reason = "a test says by failing what went wrong")]

mod ebpf_support;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use ebpf_support::device::Device;
use ebpf_support::packet::{ACK, Packet, SYN, tcp};
use ebpf_support::{Desired, Node, ip, key, on_node, port, sync};
use nix::time::{ClockId, clock_gettime};
use sluice_daemon::network;
use sluice_daemon::proxy::ebpf::EbpfProxy;
use sluice_daemon::proxy::{Proxy, Surroundings};
use sluice_daemon::state::service_port::{Family, FrontendKind, Place, Protocol};
use sluice_ebpf_types::{Address, Connection, ConnectionKey, MAX_CONNECTIONS, TCP, direction, role, seen};

const FRONTEND: &str = "192.0.2.1:30080";
const BACKEND: &str = "10.244.2.9:8080";
const STAND_IN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 1, 0));
const CLIENTS: u16 = 200;

/// A node that stands in for the clients of an endpoint elsewhere.
struct Serving {
    proxy: EbpfProxy,
    device: Device,
    table: HashMap<MapData, ConnectionKey, Connection>,
}

impl Serving {
    fn new(node: &Node) -> Self {
        ip("link add uplink type veth peer name other");
        let mut proxy = node.open();
        let index = nix::net::if_::if_nametoindex("uplink").unwrap();
        proxy
            .adjust(&Surroundings {
                devices: vec![network::Device {
                    index,
                    name: "uplink".to_owned(),
                }],
                pod_network_addresses: vec![STAND_IN],
                ..Surroundings::default()
            })
            .unwrap();
        let mut set = port(&[(FRONTEND, FrontendKind::NodePort)], &[BACKEND.parse().unwrap()]);
        set.backends[0].place = Place::PodNetwork;
        let name = key("web", Protocol::Tcp, Family::V4);
        sync(&mut proxy, &Desired::from([(name, set)]));
        let path = node.options.pins.join("maps/connections_v1");
        let table = Map::LruHashMap(MapData::from_pin(path).unwrap());
        Self {
            proxy,
            device: Device::attached(&node.options.pins, "uplink"),
            table: HashMap::try_from(table).unwrap(),
        }
    }

    /// Has every client begin a connection.
    fn open(&self) {
        for opening in openings() {
            self.device.packet_in(&opening).unwrap();
        }
    }

    /// Lets these be over for a minute, closed by their endpoint first.
    fn close(&mut self) {
        let all: Vec<_> = self.table.iter().map(Result::unwrap).collect();
        let begun = all
            .into_iter()
            .filter(|(key, _)| key.source == client() || key.destination == stand_in());
        for (key, mut value) in begun {
            match value.role {
                role::FORWARD => value.seen = seen::REPLY | seen::CLIENT_FIN | seen::BACKEND_FIN,
                role::UNSOURCE => value.seen = seen::BACKEND_FIN,
                _ => continue,
            }
            value.last_seen = ago(Duration::from_secs(60));
            self.table.insert(key, value, 0).unwrap();
        }
    }

    /// Fills the table with ports that rest, as other connections leave them, until it is too full.
    fn fill(&mut self) {
        let entry = Connection {
            role: role::UNSOURCE,
            seen: seen::BACKEND_FIN,
            last_seen: ago(Duration::from_secs(20)),
            ..Connection::default()
        };
        for number in 0..MAX_CONNECTIONS * 5 / 8 {
            let key = ConnectionKey {
                source: Address::from(IpAddr::from(Ipv4Addr::from_bits(0x0b00_0000 + number))),
                protocol: TCP,
                direction: direction::IN,
                ..ConnectionKey::default()
            };
            self.table.insert(key, entry, 0).unwrap();
        }
    }

    /// Has every client begin another connection while upkeep runs; none may lack anything of it then.
    fn begin_anew(&mut self) {
        std::thread::scope(|scope| {
            let Self { proxy, device, .. } = &mut *self;
            scope.spawn(|| proxy.tend().unwrap());
            for opening in openings() {
                device.packet_in(&opening).unwrap();
            }
        });
        for opening in openings() {
            let routed = self.device.packet_in(&opening.flags(ACK)).unwrap();
            assert_eq!(routed.destination, BACKEND.parse().unwrap());
            let sent = self.device.packet_out(&routed).unwrap();
            assert_eq!(sent.source.ip(), STAND_IN);
            let answered = self.device.packet_in(&sent.reply(ACK)).unwrap();
            assert_eq!(answered, routed.reply(ACK));
            let answer = self.device.packet_out(&answered).unwrap();
            assert_eq!(answer, opening.reply(ACK));
        }
    }
}

fn client() -> Address {
    Address::from(IpAddr::from([198, 51, 100, 1]))
}

fn stand_in() -> Address {
    Address::from(STAND_IN)
}

fn openings() -> impl Iterator<Item = Packet> {
    (0..CLIENTS).map(|number| tcp(&format!("198.51.100.1:{}", 5000 + number), FRONTEND, SYN))
}

/// So long ago by `CLOCK_MONOTONIC`, nanoseconds.
fn ago(time: Duration) -> u64 {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    now.saturating_sub(time).as_nanos() as u64
}

/// S5 S13: at the very moment in which upkeep forgets what a client's port was used for, the client uses it again.
#[test]
fn what_begins_while_its_ports_last_use_is_forgotten_is_kept() {
    on_node(|node| {
        let mut serving = Serving::new(node);
        for _ in 0..100 {
            serving.open();
            serving.close();
            serving.begin_anew();
        }
    });
}

/// S5 S23: nor does a port that rested, and is a new connection's again, go with those that go to make room.
#[test]
fn what_begins_while_ports_that_rest_make_room_is_kept() {
    on_node(|node| {
        let mut serving = Serving::new(node);
        for _ in 0..10 {
            serving.open();
            serving.close();
            serving.fill();
            serving.begin_anew();
        }
    });
}
