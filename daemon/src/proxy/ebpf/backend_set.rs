//! One set of backends in the kernel's tables, and the ways to change it such that nobody ever sees half a change.
//!
//! Owns `services_v1`, `backends_v1` and `members_v1`. Knows nothing of frontends.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::Result;
use sluice_ebpf_types::{Backend, BackendKey, MemberKey, Service};

use super::audit::mend;
use super::tables::Tables;
use super::wanted::{member_key, socket_address};

/// From this size on, a change of a small part is made slot by slot, at the cost of what changed; each step is whole in
/// itself.
const LARGE: usize = 64;
/// A part is small if it is at most one in this many.
const SMALL_PART: usize = 8;

/// 0 stands for a set the kernel does not have.
const FIRST_GENERATION: u32 = 1;

/// A set the kernel does not have yet, and what is to be in it.
pub(super) struct NewSet<'a> {
    pub set: &'a mut BackendSet,
    /// Sorted, without duplicates.
    pub wanted: Vec<Backend>,
    pub affinity_seconds: u32,
}

/// A set of backends, as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BackendSet {
    /// Its id, never 0.
    pub id: u32,
    /// 0: not in the kernel yet.
    generation: u32,
    /// In the order of the slots.
    backends: Vec<Backend>,
    affinity_seconds: u32,
    /// Whether the kernel has a backend in every slot; an interrupted change may leave it otherwise.
    intact: bool,
}

impl BackendSet {
    /// A set the kernel knows nothing of yet.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            generation: 0,
            backends: Vec::new(),
            affinity_seconds: 0,
            intact: true,
        }
    }

    /// Its backends, in the order of their slots.
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }

    /// Its session affinity's time-out in seconds; 0: none.
    pub fn affinity_seconds(&self) -> u32 {
        self.affinity_seconds
    }

    /// Its entry in `services_v1`; none if the kernel knows nothing of it.
    pub fn service(&self) -> Option<Service> {
        (self.generation != 0).then_some(Service {
            generation: self.generation,
            // It came out of the kernel, or was checked on its way there.
            count: self.backends.len() as u32,
            affinity_seconds: self.affinity_seconds,
            zero: 0,
        })
    }

    /// Its entries in `backends_v1`.
    pub fn slots(&self) -> impl Iterator<Item = (BackendKey, Backend)> + '_ {
        self.backends
            .iter()
            .enumerate()
            .map(|(slot, backend)| (self.slot(self.generation, slot), *backend))
    }

    /// Its entries in `members_v1`.
    pub fn members(&self) -> impl Iterator<Item = (MemberKey, u32)> + '_ {
        self.backends
            .iter()
            .map(|backend| (member_key(self.id, backend), u32::from(backend.place)))
    }

    /// The backends that the programs may choose now, sorted.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(&self, tables: &Tables) -> Result<Vec<SocketAddr>> {
        let Some(service) = tables.services.get(&self.id)? else {
            return Ok(Vec::new());
        };
        let mut backends = Vec::new();
        for slot in 0..service.count {
            let key = BackendKey {
                service: self.id,
                generation: service.generation,
                slot,
            };
            if let Some(backend) = tables.backends.get(&key)? {
                backends.push(socket_address(backend.address, backend.port));
            }
        }
        backends.sort_unstable();
        Ok(backends)
    }

    /// Brings the set to these backends, which are sorted and without duplicates; true if something changed.
    ///
    /// # Errors
    /// The kernel's; what the programs see is then the old set, or the new one.
    pub fn set(&mut self, tables: &mut Tables, wanted: &[Backend], affinity_seconds: u32) -> Result<bool> {
        let mut now = self.backends.clone();
        // Stable, which is quick where little changed since the slots were given.
        now.sort();
        let steady = self.generation != 0 && self.intact;
        if steady && now == wanted {
            if self.affinity_seconds == affinity_seconds {
                return Ok(false);
            }
            let (generation, count) = (self.generation, self.backends.len());
            self.enact(tables, generation, count, affinity_seconds)?;
            return Ok(true);
        }
        let added = without(wanted, &now);
        let removed = without(&now, wanted);
        let few = (added.len() + removed.len()) * SMALL_PART <= self.backends.len();
        let one = added.len() <= 1 && removed.len() <= 1;
        if steady && self.affinity_seconds == affinity_seconds && (one || few && now.len() >= LARGE) {
            self.step_by_step(tables, added, &removed)?;
        } else {
            self.switch(tables, wanted.to_vec(), &removed, affinity_seconds)?;
        }
        Ok(true)
    }

    /// Puts many new sets into the kernel, in a few calls: nothing leads to them yet, so the order does not matter. Those
    /// the kernel knows already are left to [`set`](Self::set).
    ///
    /// # Errors
    /// The kernel's; then none counts as written, and each may be [`set`](Self::set) by itself.
    pub fn create_all(tables: &mut Tables, new: &mut [NewSet<'_>]) -> Result<()> {
        let (mut services, mut backends, mut members) = (Vec::new(), Vec::new(), Vec::new());
        for NewSet {
            set,
            wanted,
            affinity_seconds,
        } in new.iter()
        {
            let service = Service {
                generation: FIRST_GENERATION,
                count: u32::try_from(wanted.len())?,
                affinity_seconds: *affinity_seconds,
                zero: 0,
            };
            services.push((set.id, service));
            for (slot, backend) in wanted.iter().enumerate() {
                backends.push((set.slot(FIRST_GENERATION, slot), *backend));
                members.push((member_key(set.id, backend), u32::from(backend.place)));
            }
        }
        tables.members.set_all(&members)?;
        tables.backends.set_all(&backends)?;
        tables.services.set_all(&services)?;
        for NewSet {
            set,
            wanted,
            affinity_seconds,
        } in new
        {
            set.generation = FIRST_GENERATION;
            set.backends = std::mem::take(wanted);
            set.affinity_seconds = *affinity_seconds;
        }
        Ok(())
    }

    /// Writes all slots of the next generation, switches to it by one write, and clears the former away.
    fn switch(
        &mut self,
        tables: &mut Tables,
        wanted: Vec<Backend>,
        removed: &[Backend],
        affinity_seconds: u32,
    ) -> Result<()> {
        let generation = self.generation.wrapping_add(1).max(FIRST_GENERATION);
        let written = self.write_slots(tables, generation, &wanted);
        if let Err(error) =
            written.and_then(|()| self.enact(tables, generation, wanted.len(), affinity_seconds))
        {
            // The old set is in force: nobody saw the new one. If this fails too, the next start clears it away.
            let _ = self.clear_slots(tables, generation, wanted.len());
            for backend in wanted.iter().filter(|backend| !self.backends.contains(backend)) {
                let _ = tables.members.remove(&member_key(self.id, backend));
            }
            return Err(error);
        }
        let (old, count) = (self.generation, self.backends.len());
        self.generation = generation;
        self.backends = wanted;
        self.intact = true;
        for backend in removed {
            self.forget_member(tables, backend)?;
        }
        self.clear_slots(tables, old, count)
    }

    /// Replaces, adds and takes out backends one at a time.
    fn step_by_step(
        &mut self,
        tables: &mut Tables,
        mut added: Vec<Backend>,
        removed: &[Backend],
    ) -> Result<()> {
        // Where those are that go.
        let mut slots: BTreeMap<Backend, usize> = (self.backends.iter().copied().zip(0..))
            .filter(|(backend, _)| removed.binary_search(backend).is_ok())
            .collect();
        for gone in removed {
            let Some(slot) = slots.remove(gone) else { continue };
            if let Some(new) = added.pop() {
                self.write_slot(tables, self.generation, slot, &new)?;
                self.backends[slot] = new;
            } else {
                // The last one moves into the gap, then the set is one shorter.
                let last = self.backends.len() - 1;
                if slot != last {
                    let moved = self.backends[last];
                    self.write_slot(tables, self.generation, slot, &moved)?;
                    slots.entry(moved).and_modify(|at| *at = slot);
                }
                self.backends.swap_remove(slot);
                self.enact(tables, self.generation, last, self.affinity_seconds)?;
                tables.backends.remove(&self.slot(self.generation, last))?;
            }
            self.forget_member(tables, gone)?;
        }
        for new in added {
            let slot = self.backends.len();
            self.write_slot(tables, self.generation, slot, &new)?;
            self.enact(tables, self.generation, slot + 1, self.affinity_seconds)?;
            self.backends.push(new);
        }
        Ok(())
    }

    /// Removes the set. Its frontends must be gone before.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&self, tables: &mut Tables) -> Result<()> {
        tables.services.remove(&self.id)?;
        for backend in &self.backends {
            tables.members.remove(&member_key(self.id, backend))?;
        }
        self.clear_slots(tables, self.generation, self.backends.len())
    }

    /// The one write by which a generation and its size come into force.
    fn enact(
        &mut self,
        tables: &mut Tables,
        generation: u32,
        count: usize,
        affinity_seconds: u32,
    ) -> Result<()> {
        let count = u32::try_from(count)?;
        tables.services.set(
            &self.id,
            &Service {
                generation,
                count,
                affinity_seconds,
                zero: 0,
            },
        )?;
        self.affinity_seconds = affinity_seconds;
        Ok(())
    }

    fn slot(&self, generation: u32, slot: usize) -> BackendKey {
        // No set has more slots than the table has entries.
        BackendKey {
            service: self.id,
            generation,
            slot: slot as u32,
        }
    }

    fn write_slots(&self, tables: &mut Tables, generation: u32, backends: &[Backend]) -> Result<()> {
        backends
            .iter()
            .enumerate()
            .try_for_each(|(slot, backend)| self.write_slot(tables, generation, slot, backend))
    }

    /// Membership first: whoever is sent there may remember it.
    fn write_slot(&self, tables: &mut Tables, generation: u32, slot: usize, backend: &Backend) -> Result<()> {
        tables
            .members
            .set(&member_key(self.id, backend), &u32::from(backend.place))?;
        tables.backends.set(&self.slot(generation, slot), backend)
    }

    fn clear_slots(&self, tables: &mut Tables, generation: u32, count: usize) -> Result<()> {
        for slot in 0..count {
            tables.backends.remove(&self.slot(generation, slot))?;
        }
        Ok(())
    }

    /// Takes the endpoint's membership away, unless it stays in the set under another place.
    fn forget_member(&self, tables: &mut Tables, gone: &Backend) -> Result<()> {
        let stays = |backend: &Backend| (backend.address, backend.port) == (gone.address, gone.port);
        if !self.backends.iter().any(stays) {
            tables.members.remove(&member_key(self.id, gone))?;
        }
        Ok(())
    }

    /// All sets the kernel has, by id. What an interrupted change left behind is cleared away; a set with missing slots
    /// is written anew when it is next set.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read_all(tables: &mut Tables) -> Result<BTreeMap<u32, Self>> {
        let services: BTreeMap<u32, Service> = tables.services.entries()?.into_iter().collect();
        let mut slots: BTreeMap<u32, BTreeMap<u32, Backend>> = BTreeMap::new();
        let mut strays = Vec::new();
        tables
            .backends
            .walk(|key, backend| match services.get(&key.service) {
                Some(service) if service.generation == key.generation && key.slot < service.count => {
                    slots.entry(key.service).or_default().insert(key.slot, backend);
                }
                _ => strays.push(key),
            })?;
        for key in &strays {
            tables.backends.remove(key)?;
        }
        let mut sets = BTreeMap::new();
        for (id, service) in services {
            let backends: Vec<Backend> = slots.remove(&id).unwrap_or_default().into_values().collect();
            sets.insert(
                id,
                Self {
                    id,
                    generation: service.generation,
                    intact: backends.len() == service.count as usize,
                    backends,
                    affinity_seconds: service.affinity_seconds,
                },
            );
        }
        mend(&mut tables.members, sets.values().flat_map(Self::members))?;
        Ok(sets)
    }
}

/// Those that `others` does not have; both are sorted, and so is what comes of it.
fn without(backends: &[Backend], others: &[Backend]) -> Vec<Backend> {
    let mut others = others.iter().peekable();
    let is_other = |backend: &&Backend| {
        while others.next_if(|other| other < backend).is_some() {}
        others.peek() != Some(backend)
    };
    backends.iter().filter(is_other).copied().collect()
}
