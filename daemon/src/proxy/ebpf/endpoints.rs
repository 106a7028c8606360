//! The pods of this node as the programs know them.
//!
//! Owns `endpoint_slots_v1` and `endpoints_v1`, but for the one word in each value that the programs write. An address is in one of
//! the two, and stays there: what a program writes is never on its way from one to the other.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};
use aya::maps::{Array, Map, MapData};
use sluice_ebpf_types::{Address, Endpoint, EndpointSlot, endpoint_flag};

use super::batch;
use super::tables::Tables;
use crate::network::pods::PodDevice;
use crate::network::vtep::Mac;

/// What the tables are to hold, the programs' word aside.
#[derive(Default)]
pub(super) struct Endpoints(BTreeMap<Address, Endpoint>);

impl Endpoints {
    /// Makes the kernel's tables say what is so of these pods.
    ///
    /// # Errors
    /// The kernel's.
    pub fn follow(&mut self, tables: &mut Tables, pods: &[PodDevice]) -> Result<()> {
        let wanted: BTreeMap<_, _> = pods.iter().flat_map(endpoints).collect();
        if wanted != self.0 {
            self.0 = wanted;
            self.audit(tables)?;
        }
        Ok(())
    }

    /// Puts right what differs; says how many entries did.
    ///
    /// # Errors
    /// The kernel's.
    pub fn audit(&self, tables: &mut Tables) -> Result<usize> {
        let mut slots = tables.endpoint_slots.taken()?;
        let mut table: BTreeMap<_, _> = tables.endpoints.entries()?.into_iter().collect();
        // Whoever is gone, or is where nobody looks for it, makes room first.
        let is_lost = |number: &u32, slot: &EndpointSlot| {
            !self.0.contains_key(&slot.address) || EndpointSlot::number(&slot.address) != *number
        };
        let lost: Vec<u32> = slots
            .extract_if(.., |number, slot| is_lost(number, slot))
            .map(|(number, _)| number)
            .collect();
        let has_slot = |address: &Address| {
            let slot = slots.get(&EndpointSlot::number(address));
            slot.is_some_and(|slot| slot.address == *address)
        };
        let stale: Vec<Address> = table
            .extract_if(.., |address, _| {
                !self.0.contains_key(address) || has_slot(address)
            })
            .map(|(address, _)| address)
            .collect();
        for number in &lost {
            tables.endpoint_slots.clear(*number)?;
        }
        for address in &stale {
            tables.endpoints.remove(address)?;
        }
        let mut changes = lost.len() + stale.len();
        for (address, endpoint) in &self.0 {
            let number = EndpointSlot::number(address);
            let slot = slots.get(&number);
            let own = slot
                .filter(|slot| slot.address == *address)
                .map(|slot| slot.endpoint);
            let known = own.or_else(|| table.get(address).copied());
            // The same pod goes on as it was; another one begins anew.
            let translated = known
                .filter(|known| known.device == endpoint.device)
                .map_or(0, |known| known.translated);
            let wanted = Endpoint {
                translated,
                ..*endpoint
            };
            if known == Some(wanted) {
                continue;
            }
            changes += 1;
            let filled = EndpointSlot {
                address: *address,
                endpoint: wanted,
            };
            if own.is_some() {
                tables.endpoint_slots.write(number, &filled)?;
            } else if slot.is_none() && known.is_none() {
                tables.endpoint_slots.fill(&filled)?;
                slots.insert(number, filled);
            } else {
                tables.endpoints.set(address, &wanted)?;
            }
        }
        Ok(changes)
    }
}

fn endpoints(pod: &PodDevice) -> impl Iterator<Item = (Address, Endpoint)> + '_ {
    let value = |address: &IpAddr, mac: &Mac| {
        let mut ethernet = [0; 12];
        ethernet[..6].copy_from_slice(&mac.0);
        ethernet[6..].copy_from_slice(&pod.mac.0);
        let endpoint = Endpoint {
            device: pod.device.index,
            flags: if pod.queues.any() {
                endpoint_flag::QUEUED
            } else {
                0
            },
            translated: 0,
            ethernet,
        };
        (Address::from(*address), endpoint)
    };
    pod.endpoints
        .iter()
        .map(move |(address, mac)| value(address, mac))
}

/// `endpoint_slots_v1`.
pub(super) struct Slots {
    map: Array<MapData, EndpointSlot>,
    /// The same map, to be read in one call.
    descriptor: OwnedFd,
}

impl Slots {
    /// The map's name.
    pub const NAME: &str = "endpoint_slots_v1";

    /// The slots in `map`.
    ///
    /// # Errors
    /// It is not of their kind and size.
    pub fn new(map: Map) -> Result<Self> {
        let Map::Array(data) = map else {
            bail!("the eBPF object's map {} is no array", Self::NAME)
        };
        let named = || format!("map {}", Self::NAME);
        let descriptor = data.fd().as_fd().try_clone_to_owned().with_context(named)?;
        let map = Array::try_from(Map::Array(data)).with_context(named)?;
        Ok(Self { map, descriptor })
    }

    /// Those that somebody has, by number.
    fn taken(&self) -> Result<BTreeMap<u32, EndpointSlot>> {
        let mut taken = BTreeMap::new();
        let each = |number: u32, slot: EndpointSlot| {
            if slot != EndpointSlot::default() {
                taken.insert(number, slot);
            }
        };
        batch::walk(&self.descriptor, each).with_context(|| format!("walking {}", Self::NAME))?;
        Ok(taken)
    }

    /// Gives an empty one to an address: programs read while this writes, byte by byte, so the address comes when all else is there.
    fn fill(&mut self, slot: &EndpointSlot) -> Result<()> {
        let number = EndpointSlot::number(&slot.address);
        let nobodys = EndpointSlot {
            address: Address::default(),
            ..*slot
        };
        self.write(number, &nobodys)?;
        self.write(number, slot)
    }

    /// Takes one from whoever has it.
    fn clear(&mut self, number: u32) -> Result<()> {
        self.write(number, &EndpointSlot::default())
    }

    fn write(&mut self, number: u32, slot: &EndpointSlot) -> Result<()> {
        self.map
            .set(number, slot, 0)
            .with_context(|| format!("writing {}", Self::NAME))
    }
}
