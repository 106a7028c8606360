//! The pinned maps, typed, with errors that say which of them is in trouble.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use aya::{Ebpf, Pod};
use sluice_ebpf_types::{
    Address, Affinity, AffinityKey, Backend, BackendKey, Choice, ChoiceKey, Connection, ConnectionKey,
    Counter, Endpoint, Frontend, FrontendKey, MAX_BACKENDS, MAX_CONNECTIONS, MAX_ENDPOINTS, MAX_FRONTENDS,
    MAX_MAGLEV, MAX_REMEMBERED, MAX_SOURCES, MaglevKey, MaglevPart, MemberKey, Node, Peer, PeerKey, Service,
    SourceKey,
};

use super::batch;
use super::endpoints::Slots;
use super::take::take as take_entry;

/// include/uapi/linux/bpf.h: only create what is not there.
const BPF_NOEXIST: u64 = 1;

/// One hash map of the kernel's, or a trie, which is asked the same way.
pub(super) struct Table<K: Pod, V: Pod> {
    map: HashMap<MapData, K, V>,
    /// The same map, for what is done to many entries at once.
    descriptor: OwnedFd,
    name: &'static str,
    capacity: u32,
}

impl<K: Pod, V: Pod> Table<K, V> {
    fn take(ebpf: &mut Ebpf, name: &'static str, capacity: u32) -> Result<Self> {
        match take(ebpf, name)? {
            Map::HashMap(data) | Map::LruHashMap(data) | Map::LpmTrie(data) => {
                Self::new(data, name, capacity)
            }
            _ => bail!("the eBPF object's map {name} is neither hash map nor trie"),
        }
    }

    /// The table pinned in `maps`, a second time.
    fn open(maps: &Path, name: &'static str, capacity: u32) -> Result<Self> {
        let pin = maps.join(name);
        let data = MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?;
        Self::new(data, name, capacity)
    }

    fn new(data: MapData, name: &'static str, capacity: u32) -> Result<Self> {
        let descriptor = data
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .with_context(|| format!("map {name}"))?;
        // What is asked of it is the same for all of these kinds. This checks the sizes of keys and values.
        let map = HashMap::try_from(Map::HashMap(data)).with_context(|| format!("map {name}"))?;
        Ok(Self {
            map,
            descriptor,
            name,
            capacity,
        })
    }

    /// The value under `key`.
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        match self.map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {}", self.name)),
        }
    }

    /// Creates or replaces the value under `key`.
    pub fn set(&mut self, key: &K, value: &V) -> Result<()> {
        match self.map.insert(key, value, 0) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                anyhow::bail!("the table {} is full ({} entries)", self.name, self.capacity)
            }
            result => result.with_context(|| format!("writing {}", self.name)),
        }
    }

    /// Creates the value under `key`; what is there already stays.
    pub fn add(&mut self, key: &K, value: &V) -> Result<()> {
        match self.map.insert(key, value, BPF_NOEXIST) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(())
            }
            result => result.with_context(|| format!("adding to {}", self.name)),
        }
    }

    /// Removes `key`; false if it was not there.
    pub fn remove(&mut self, key: &K) -> Result<bool> {
        match self.map.remove(key) {
            Ok(()) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
                Ok(false)
            }
            Err(error) => Err(error).with_context(|| format!("deleting from {}", self.name)),
        }
    }

    /// Removes `key` and gives what it had, in one.
    pub fn take_entry(&mut self, key: &K) -> Result<Option<V>> {
        take_entry(&self.descriptor, key).with_context(|| format!("taking from {}", self.name))
    }

    /// How many entries it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// Creates or replaces all these entries, in a few calls.
    pub fn set_all(&mut self, entries: &[(K, V)]) -> Result<()> {
        let (keys, values): (Vec<K>, Vec<V>) = entries.iter().copied().unzip();
        batch::update(&self.descriptor, &keys, &values)
            .with_context(|| format!("writing {} entries of {}", entries.len(), self.name))
    }

    /// Hands everything there is to `each`; what changes meanwhile may or may not be seen.
    pub fn walk(&self, each: impl FnMut(K, V)) -> Result<()> {
        batch::walk(&self.descriptor, each).with_context(|| format!("walking {}", self.name))
    }

    /// Everything there is, see [`walk`](Self::walk).
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        self.walk(|key, value| entries.push((key, value)))?;
        Ok(entries)
    }

    fn fill(&self) -> Result<Fill> {
        let mut entries = 0;
        self.walk(|_, _| entries += 1)?;
        Ok(Fill {
            name: self.name,
            entries,
            capacity: self.capacity as usize,
        })
    }
}

/// How full a table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Name of the map.
    pub name: &'static str,
    /// Entries in it.
    pub entries: usize,
    /// Entries it can hold.
    pub capacity: usize,
}

/// All of them.
pub(super) struct Tables {
    pub frontends: Table<FrontendKey, Frontend>,
    pub addresses: Table<Address, u32>,
    pub services: Table<u32, Service>,
    pub backends: Table<BackendKey, Backend>,
    pub maglev: Table<MaglevKey, MaglevPart>,
    pub members: Table<MemberKey, u32>,
    pub sources: Table<SourceKey, u32>,
    pub endpoints: Table<Address, Endpoint>,
    pub endpoint_slots: Slots,
    pub affinity: Table<AffinityKey, Affinity>,
    pub peers: Table<PeerKey, Peer>,
    pub choices: Table<ChoiceKey, Choice>,
    pub connections: Table<ConnectionKey, Connection>,
    node: Array<MapData, Node>,
    counters: PerCpuArray<MapData, u64>,
}

/// The tables that say where a socket's datagrams are to go, for a thread of their own.
pub(super) struct SocketTables {
    pub frontends: Table<FrontendKey, Frontend>,
    pub members: Table<MemberKey, u32>,
    pub peers: Table<PeerKey, Peer>,
}

impl SocketTables {
    /// Opens those pinned in `maps`.
    ///
    /// # Errors
    /// One is not there.
    pub fn open(maps: &Path) -> Result<Self> {
        Ok(Self {
            frontends: Table::open(maps, "frontends_v1", MAX_FRONTENDS)?,
            members: Table::open(maps, "members_v1", MAX_BACKENDS)?,
            peers: Table::open(maps, "socket_peers_v1", MAX_REMEMBERED)?,
        })
    }
}

/// The tables by which connections begin, those pinned in `maps`.
pub(super) struct Entrance {
    frontends: Table<FrontendKey, Frontend>,
    addresses: Table<Address, u32>,
    node: Array<MapData, Node>,
}

impl Entrance {
    /// Opens them.
    ///
    /// # Errors
    /// One is not there.
    pub fn open(maps: &Path) -> Result<Self> {
        let pin = maps.join("node_v2");
        let node = MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?;
        Ok(Self {
            frontends: Table::open(maps, "frontends_v1", MAX_FRONTENDS)?,
            addresses: Table::open(maps, "addresses_v1", MAX_FRONTENDS)?,
            node: Array::try_from(Map::Array(node)).context("map node_v2")?,
        })
    }

    /// Empties them: no connection begins any more, and no packet takes a short cut; those under way go on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn close(&mut self) -> Result<()> {
        let mut node = self.node.get(&0, 0).context("reading node_v2")?;
        node.flags = 0;
        self.node.set(0, node, 0).context("writing node_v2")?;
        // While an address is known, a port of it that is not is refused.
        for (key, _) in self.addresses.entries()? {
            self.addresses.remove(&key)?;
        }
        for (key, _) in self.frontends.entries()? {
            self.frontends.remove(&key)?;
        }
        Ok(())
    }
}

/// The connections alone, those pinned in `maps`.
///
/// # Errors
/// The table is not there.
pub(super) fn connections(maps: &Path) -> Result<Table<ConnectionKey, Connection>> {
    Table::open(maps, "connections_v1", MAX_CONNECTIONS)
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name)
        .with_context(|| format!("the eBPF object has no map {name}"))
}

impl Tables {
    /// Takes the maps out of the loaded object.
    pub fn take(ebpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            frontends: Table::take(ebpf, "frontends_v1", MAX_FRONTENDS)?,
            addresses: Table::take(ebpf, "addresses_v1", MAX_FRONTENDS)?,
            services: Table::take(ebpf, "services_v1", MAX_FRONTENDS)?,
            backends: Table::take(ebpf, "backends_v1", MAX_BACKENDS)?,
            maglev: Table::take(ebpf, "maglev_v1", MAX_MAGLEV)?,
            members: Table::take(ebpf, "members_v1", MAX_BACKENDS)?,
            sources: Table::take(ebpf, "sources_v1", MAX_SOURCES)?,
            endpoints: Table::take(ebpf, "endpoints_v1", MAX_ENDPOINTS)?,
            endpoint_slots: Slots::new(take(ebpf, Slots::NAME)?)?,
            affinity: Table::take(ebpf, "affinity_v1", MAX_REMEMBERED)?,
            peers: Table::take(ebpf, "socket_peers_v1", MAX_REMEMBERED)?,
            choices: Table::take(ebpf, "socket_choices_v1", MAX_REMEMBERED)?,
            connections: Table::take(ebpf, "connections_v1", MAX_CONNECTIONS)?,
            node: Array::try_from(take(ebpf, "node_v2")?).context("map node_v2")?,
            counters: PerCpuArray::try_from(take(ebpf, "counters_v2")?).context("map counters_v2")?,
        })
    }

    /// Tells the programs about the node.
    pub fn set_node(&mut self, node: &Node) -> Result<()> {
        self.node.set(0, node, 0).context("writing node_v2")
    }

    /// What the programs are told about the node.
    pub fn node(&self) -> Result<Node> {
        self.node.get(&0, 0).context("reading node_v2")
    }

    /// How full each table is.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fill(&self) -> Result<Vec<Fill>> {
        Ok(vec![
            self.frontends.fill()?,
            self.addresses.fill()?,
            self.services.fill()?,
            self.backends.fill()?,
            self.maglev.fill()?,
            self.members.fill()?,
            self.sources.fill()?,
            self.endpoints.fill()?,
            self.affinity.fill()?,
            self.peers.fill()?,
            self.choices.fill()?,
            self.connections.fill()?,
        ])
    }

    /// Every counter with its name, summed over the CPUs.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>> {
        Counter::ALL
            .iter()
            .map(|(counter, name)| {
                let values = self
                    .counters
                    .get(&(*counter as u32), 0)
                    .context("reading counters_v2")?;
                Ok((*name, values.iter().sum()))
            })
            .collect()
    }
}
