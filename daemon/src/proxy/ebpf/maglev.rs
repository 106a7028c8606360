//! Which backend a packet from another host goes to, so that all nodes that have the same backends choose alike, and few
//! connections would go another way when a backend comes or goes (Eisenbud et al., "Maglev", NSDI 2016, section 3.4).
//!
//! Owns `maglev_v1`. A table names slots of its set, and is written after them: until then some of its places lead to another backend
//! than they will, or to none, and then chance decides.

use std::collections::BTreeMap;

use anyhow::Result;
use sluice_cni::stable_hash::stable_hash;
use sluice_ebpf_types::{Backend, MAGLEV_PART, MaglevKey, MaglevPart, maglev_places};

use super::backend_set::BackendSet;
use super::tables::Tables;
use super::wanted::socket_address;

/// The sets that have a table in the kernel.
#[derive(Debug, Default)]
pub(super) struct Maglev {
    /// In how many parts, by the set's id.
    parts: BTreeMap<u32, u32>,
}

impl Maglev {
    /// Reads which sets have one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(tables: &Tables) -> Result<Self> {
        let mut maglev = Self::default();
        tables.maglev.walk(|key, _| {
            let parts = maglev.parts.entry(key.service).or_default();
            *parts = (*parts).max(key.part + 1);
        })?;
        Ok(maglev)
    }

    /// Gives the set its table if `external`, if other hosts are served by it, or else takes it away. One that is there is right
    /// unless the set `changed`. True if something was written.
    ///
    /// # Errors
    /// The kernel's, which may have no room for more of them; the set has no table then.
    pub fn set(
        &mut self,
        tables: &mut Tables,
        set: &BackendSet,
        external: bool,
        changed: bool,
    ) -> Result<bool> {
        let places = if external { places(set.backends()) } else { 0 };
        let (had, wanted) = (self.parts_of(set.id), parts(places));
        if had == wanted && !(changed && wanted > 0) {
            return Ok(false);
        }
        if wanted > 0 {
            self.parts.insert(set.id, had.max(wanted));
            if let Err(error) = tables.maglev.set_all(&entries_of(set)) {
                // Half a table is worse than none.
                self.shorten(tables, set.id, 0)?;
                return Err(error.context("packets from other hosts get their endpoint by chance"));
            }
        }
        self.shorten(tables, set.id, wanted)?;
        Ok(true)
    }

    /// Takes away the table of a set that is going.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&mut self, tables: &mut Tables, id: u32) -> Result<()> {
        self.shorten(tables, id, 0)
    }

    /// What the kernel's table is to hold, given all sets.
    pub fn entries<'a>(
        &'a self,
        sets: impl Iterator<Item = &'a BackendSet> + 'a,
    ) -> impl Iterator<Item = (MaglevKey, MaglevPart)> + 'a {
        sets.filter(|set| self.parts.contains_key(&set.id))
            .flat_map(entries_of)
    }

    fn shorten(&mut self, tables: &mut Tables, id: u32, wanted: u32) -> Result<()> {
        for part in wanted..self.parts_of(id) {
            tables.maglev.remove(&MaglevKey { service: id, part })?;
        }
        match wanted {
            0 => self.parts.remove(&id),
            _ => self.parts.insert(id, wanted),
        };
        Ok(())
    }

    fn parts_of(&self, id: u32) -> u32 {
        self.parts.get(&id).copied().unwrap_or_default()
    }
}

fn places(backends: &[Backend]) -> u32 {
    // A set that large has no table.
    maglev_places(u32::try_from(backends.len()).unwrap_or(u32::MAX))
}

fn parts(places: u32) -> u32 {
    places.div_ceil(MAGLEV_PART as u32)
}

fn entries_of(set: &BackendSet) -> Vec<(MaglevKey, MaglevPart)> {
    let part = |(number, places): (usize, &[u16])| {
        let mut slots = [0; MAGLEV_PART];
        slots[..places.len()].copy_from_slice(places);
        let key = MaglevKey {
            service: set.id,
            part: number as u32,
        };
        (key, MaglevPart { slots })
    };
    table(set.backends())
        .chunks(MAGLEV_PART)
        .enumerate()
        .map(part)
        .collect()
}

/// For each place the slot of a backend: in turn each takes the next free place of an order of its own, which its address and port alone
/// decide.
fn table(backends: &[Backend]) -> Vec<u16> {
    struct Turn {
        slot: u16,
        /// Where it looks next, and how far it goes from there.
        place: usize,
        step: usize,
    }
    let places = places(backends) as usize;
    if places == 0 {
        return Vec::new();
    }
    // All nodes give them their turns in this order, whichever slots they have.
    let mut order: Vec<(u16, &Backend)> = (0..).zip(backends).collect();
    order.sort_unstable_by_key(|(_, backend)| (backend.address, backend.port));
    let mut turns: Vec<Turn> = order
        .into_iter()
        .map(|(slot, backend)| {
            let name = socket_address(backend.address, backend.port).to_string();
            let hash = stable_hash(&[&name]);
            Turn {
                slot,
                place: (hash >> 32) as usize % places,
                // As many places are a prime: whatever the step, all are reached.
                step: (hash as u32) as usize % (places - 1) + 1,
            }
        })
        .collect();
    let mut table: Vec<Option<u16>> = vec![None; places];
    let mut free = places;
    for turn in (0..turns.len()).cycle() {
        let turn = &mut turns[turn];
        while table[turn.place].is_some() {
            turn.place = (turn.place + turn.step) % places;
        }
        table[turn.place] = Some(turn.slot);
        free -= 1;
        if free == 0 {
            break;
        }
    }
    table.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;

    use sluice_ebpf_types::Address;

    use super::*;

    fn backends(numbers: impl IntoIterator<Item = u16>) -> Vec<Backend> {
        let backend = |number: u16| Backend {
            address: Address::from(std::net::IpAddr::from([
                10,
                244,
                (number >> 8) as u8,
                number as u8,
            ])),
            port: 8080_u16.to_be(),
            ..Backend::default()
        };
        numbers.into_iter().map(backend).collect()
    }

    /// Who is at each place.
    fn led_to(backends: &[Backend]) -> Vec<SocketAddr> {
        let at = |slot: u16| &backends[usize::from(slot)];
        let places = table(backends);
        places
            .into_iter()
            .map(|slot| socket_address(at(slot).address, at(slot).port))
            .collect()
    }

    /// S5: each has its share, to a few hundredths.
    #[test]
    fn every_place_is_taken_and_all_have_as_many() {
        for count in [2, 3, 8, 9, 64, 65, 640, 5_000] {
            let mut shares: BTreeMap<SocketAddr, usize> = BTreeMap::new();
            let led_to = led_to(&backends(0..count));
            assert_eq!(led_to.len(), maglev_places(count.into()) as usize);
            for backend in led_to {
                *shares.entry(backend).or_default() += 1;
            }
            assert_eq!(shares.len(), usize::from(count));
            let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
            assert!(most - least <= 1, "{count}: {least} to {most}");
        }
    }

    /// S5: nodes that came to their sets by other ways agree.
    #[test]
    fn neither_the_slots_nor_where_they_run_matters() {
        let sorted = backends(0..20);
        let mut other = sorted.clone();
        other.reverse();
        other.swap(3, 11);
        other.iter_mut().for_each(|backend| backend.place = 1);
        assert_eq!(led_to(&sorted), led_to(&other));
    }

    /// S5: whose backend stays nearly all go there still.
    #[test]
    fn a_backend_that_goes_leaves_the_places_of_the_others() {
        let before = led_to(&backends(0..50));
        let after = led_to(&backends((0..50).filter(|number| *number != 17)));
        let gone = "10.244.0.17:8080".parse().unwrap();
        let places = before.iter().zip(&after).filter(|(before, _)| **before != gone);
        let moved = places.filter(|(before, after)| before != after).count();
        assert!(moved * 20 < before.len(), "{moved} of {} moved", before.len());
    }
}
