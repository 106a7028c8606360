//! The pinned maps. Who writes which: frontends, addresses, services, backends, maglev, members, sources and node are the daemon's, and so
//! are endpoints and endpoint slots but for one word (`translated`); the rest is written here and expired by the daemon.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use sluice_ebpf_types::{
    Address, Affinity, AffinityKey, Backend, BackendKey, Choice, ChoiceKey, Connection, ConnectionKey,
    Endpoint, EndpointSlot, Frontend, FrontendKey, MAX_BACKENDS, MAX_CONNECTIONS, MAX_COUNTERS,
    MAX_ENDPOINTS, MAX_FRONTENDS, MAX_MAGLEV, MAX_REMEMBERED, MAX_SOURCES, MaglevKey, MaglevPart, MemberKey,
    Node, Peer, PeerKey, Service, Source,
};

#[map(name = "frontends_v1")]
pub static FRONTENDS: HashMap<FrontendKey, Frontend> = HashMap::pinned(MAX_FRONTENDS, BPF_F_NO_PREALLOC);

#[map(name = "addresses_v1")]
pub static ADDRESSES: HashMap<Address, u32> = HashMap::pinned(MAX_FRONTENDS, BPF_F_NO_PREALLOC);

#[map(name = "services_v1")]
pub static SERVICES: HashMap<u32, Service> = HashMap::pinned(MAX_FRONTENDS, BPF_F_NO_PREALLOC);

#[map(name = "backends_v1")]
pub static BACKENDS: HashMap<BackendKey, Backend> = HashMap::pinned(MAX_BACKENDS, BPF_F_NO_PREALLOC);

#[map(name = "maglev_v1")]
pub static MAGLEV: HashMap<MaglevKey, MaglevPart> = HashMap::pinned(MAX_MAGLEV, BPF_F_NO_PREALLOC);

#[map(name = "members_v1")]
pub static MEMBERS: HashMap<MemberKey, u32> = HashMap::pinned(MAX_BACKENDS, BPF_F_NO_PREALLOC);

#[map(name = "sources_v1")]
pub static SOURCES: LpmTrie<Source, u32> = LpmTrie::pinned(MAX_SOURCES, 0);

#[map(name = "endpoints_v1")]
pub static ENDPOINTS: HashMap<Address, Endpoint> = HashMap::pinned(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

#[map(name = "endpoint_slots_v1")]
pub static ENDPOINT_SLOTS: Array<EndpointSlot> = Array::pinned(EndpointSlot::COUNT, 0);

#[map(name = "node_v2")]
pub static NODE: Array<Node> = Array::pinned(1, 0);

#[map(name = "affinity_v1")]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::pinned(MAX_REMEMBERED, 0);

#[map(name = "socket_peers_v1")]
pub static SOCKET_PEERS: LruHashMap<PeerKey, Peer> = LruHashMap::pinned(MAX_REMEMBERED, 0);

#[map(name = "socket_choices_v1")]
pub static SOCKET_CHOICES: LruHashMap<ChoiceKey, Choice> = LruHashMap::pinned(MAX_REMEMBERED, 0);

#[map(name = "connections_v1")]
pub static CONNECTIONS: LruHashMap<ConnectionKey, Connection> = LruHashMap::pinned(MAX_CONNECTIONS, 0);

#[map(name = "counters_v2")]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(MAX_COUNTERS, 0);
