//! What the kernel holds of Services, read from the pinned maps as the programs read it.

use std::net::SocketAddrV4;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};
use sluice_ebpf_types::{Address, Backend, BackendKey, Frontend, FrontendKey, MemberKey, Service, TCP};

/// The maps that Services are in.
pub struct Kernel {
    frontends: HashMap<MapData, FrontendKey, Frontend>,
    addresses: HashMap<MapData, Address, u32>,
    services: HashMap<MapData, u32, Service>,
    backends: HashMap<MapData, BackendKey, Backend>,
    members: HashMap<MapData, MemberKey, u32>,
}

impl Kernel {
    /// Opens those pinned in `maps`.
    pub fn open(maps: &Path) -> Result<Self> {
        Ok(Self {
            frontends: open(maps, "frontends_v1")?,
            addresses: open(maps, "addresses_v1")?,
            services: open(maps, "services_v1")?,
            backends: open(maps, "backends_v1")?,
            members: open(maps, "members_v1")?,
        })
    }

    /// The backends behind `frontend` (TCP) now; none if nobody serves it.
    pub fn backends(&self, frontend: SocketAddrV4) -> Result<Vec<Backend>> {
        let Some((id, service)) = self.service(frontend)? else {
            return Ok(Vec::new());
        };
        let slots = (0..service.count).map(|slot| self.slot(id, service, slot));
        slots.filter_map(Result::transpose).collect()
    }

    /// Whether `backend` is one of those behind `frontend`.
    pub fn has_backend(&self, frontend: SocketAddrV4, backend: SocketAddrV4) -> Result<bool> {
        let Some((id, _)) = self.service(frontend)? else {
            return Ok(false);
        };
        let key = MemberKey {
            address: Address::from(std::net::IpAddr::from(*backend.ip())),
            service: id,
            port: backend.port().to_be(),
            zero: 0,
        };
        Ok(lookup(&self.members, &key)?.is_some())
    }

    /// How long it takes to write every entry once more, one a call.
    pub fn write_all_again(&mut self) -> Result<Duration> {
        Ok(rewrite(&mut self.frontends)?
            + rewrite(&mut self.addresses)?
            + rewrite(&mut self.services)?
            + rewrite(&mut self.backends)?
            + rewrite(&mut self.members)?)
    }

    fn service(&self, frontend: SocketAddrV4) -> Result<Option<(u32, Service)>> {
        let key = FrontendKey {
            address: Address::from(std::net::IpAddr::from(*frontend.ip())),
            port: frontend.port().to_be(),
            protocol: TCP,
            zero: 0,
        };
        let Some(frontend) = lookup(&self.frontends, &key)? else {
            return Ok(None);
        };
        let id = frontend.socket_service;
        Ok(lookup(&self.services, &id)?.map(|service| (id, service)))
    }

    fn slot(&self, id: u32, service: Service, slot: u32) -> Result<Option<Backend>> {
        let key = BackendKey {
            service: id,
            generation: service.generation,
            slot,
        };
        lookup(&self.backends, &key)
    }
}

fn open<K: Pod, V: Pod>(maps: &Path, name: &str) -> Result<HashMap<MapData, K, V>> {
    let pin = maps.join(name);
    let data = MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?;
    HashMap::try_from(Map::HashMap(data)).with_context(|| format!("map {name}"))
}

fn lookup<K: Pod, V: Pod>(map: &HashMap<MapData, K, V>, key: &K) -> Result<Option<V>> {
    match map.get(key, 0) {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn rewrite<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>) -> Result<Duration> {
    let entries: Vec<_> = map.iter().collect::<Result<_, _>>()?;
    let began = Instant::now();
    for (key, value) in entries {
        map.insert(key, value, 0)?;
    }
    Ok(began.elapsed())
}
