//! Services in nftables: for hosts without what eBPF needs, and for operators who want to read their rules.
//!
//! The table `inet sluice-services` has a handful of chains; all that changes with Services are elements of its sets and maps
//! ([`elements`]), and each change of one is a transaction of elements alone. The table is the memory: a starting daemon
//! reads it back and writes what differs. Connections are kept by the kernel's connection tracking.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use anyhow::Result;

pub use self::skeleton::TABLE;

use self::elements::{Changes, Data, Element, Key, SetKind, Verdict};
use self::table::Table;
use crate::proxy::netfilter::plan::{self, Plan, Plans, Update};
use crate::proxy::netfilter::{connections, loopback};
use crate::proxy::{Connection, Dirty, Programmed, Proxy, Surroundings, SyncReport};
use crate::state::service_port::{ServicePort, ServicePortKey};

mod elements;
mod rules;
mod skeleton;
mod table;

type Desired = BTreeMap<ServicePortKey, ServicePort>;

/// The nftables dataplane.
pub struct NftablesProxy {
    table: Table,
    surroundings: Option<Surroundings>,
    plans: Plans,
    /// What has changed since stale connections and clients were last looked for.
    unsettled: Update,
    /// Elements that several sets may want, and how many do.
    shared: HashMap<Element, u32>,
    /// What a former daemon left, until the first sync.
    found: Option<BTreeMap<Element, Data>>,
}

impl NftablesProxy {
    /// Takes up the table that is there, or makes it.
    ///
    /// # Errors
    /// nft(8) is missing or refuses, or the kernel has no nf_tables.
    pub fn open() -> Result<Self> {
        let (table, there) = Table::open()?;
        let found = if there { table.elements()? } else { BTreeMap::new() };
        Ok(Self {
            table,
            surroundings: None,
            plans: Plans::default(),
            unsettled: Update::default(),
            shared: HashMap::new(),
            found: Some(found),
        })
    }

    /// Removes the table from the kernel; says whether it was there.
    ///
    /// # Errors
    /// nft(8)'s.
    pub fn remove() -> Result<bool> {
        table::remove()
    }

    /// Takes a plan's elements out of `wanted` and `shared`, or puts them in.
    fn count(
        shared: &mut HashMap<Element, u32>,
        plan: &Plan,
        into: &mut BTreeMap<Element, Data>,
        adds: bool,
    ) {
        elements::of_plan(plan, |element, data| {
            if !matches!(
                element.set,
                SetKind::ClusterIps | SetKind::Ready | SetKind::Hairpin
            ) {
                into.insert(element, data);
                return;
            }
            let count = shared.entry(element).or_default();
            if adds {
                *count += 1;
            } else {
                *count = count.saturating_sub(1);
            }
        });
    }

    /// Makes the table anew, empty, if its rules are not as they were made; says whether it had to.
    fn make_whole(&mut self) -> Result<bool> {
        if self.table.is_whole()? {
            return Ok(false);
        }
        self.table.make()?;
        if let Some(surroundings) = &self.surroundings {
            self.table.adjust(surroundings)?;
        }
        self.found = self.found.take().map(|_| BTreeMap::new());
        Ok(true)
    }

    /// What all plans together come to.
    fn all_elements(&self) -> BTreeMap<Element, Data> {
        let mut all = BTreeMap::new();
        for (_, plan) in self.plans.iter() {
            elements::of_plan(plan, |element, data| _ = all.insert(element, data));
        }
        all
    }

    /// Sees to what connections and clients of the sets that changed must not be left with.
    fn settle(&mut self) -> Result<()> {
        let update = &self.unsettled;
        let sticky = |plan: &Plan| plan.affinity.is_some();
        if update.former.values().any(sticky) || self.plans.of(update).any(|(_, plan)| sticky(plan)) {
            let touched = self.plans.touched(update);
            self.table.forget_clients(|frontend, protocol, endpoint| {
                match touched.get(&(frontend, protocol)) {
                    Some(Some(plan)) => sticky(plan) && plan.has(endpoint),
                    Some(None) => false,
                    None => true,
                }
            })?;
        }
        plan::forget_stale(self.table.netfilter(), &self.plans, update)?;
        self.unsettled = Update::default();
        Ok(())
    }

    /// Numbers that a former daemon gave the endpoints of this set.
    fn numbers_found(
        found: &BTreeMap<Element, Data>,
        key: &ServicePortKey,
        port: &ServicePort,
    ) -> Vec<SocketAddr> {
        let Some(frontend) = port.frontends.first() else {
            return Vec::new();
        };
        (0..)
            .map_while(|number| {
                let key = Key::Endpoint(loopback::asked(frontend.address), key.protocol, number);
                let set = SetKind::Endpoints;
                match found.get(&Element { set, key }) {
                    Some(Data::Endpoint(endpoint)) => Some(*endpoint),
                    _ => None,
                }
            })
            .collect()
    }
}

impl Proxy for NftablesProxy {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn adjust(&mut self, surroundings: &Surroundings) -> Result<()> {
        // Pods come and go, and none of it is in the table.
        let relevant = Surroundings {
            pods: Vec::new(),
            ..surroundings.clone()
        };
        loopback::ensure()?;
        if self.surroundings.as_ref() != Some(&relevant) {
            self.table.adjust(&relevant)?;
            self.surroundings = Some(relevant);
        }
        Ok(())
    }

    fn tend(&mut self) -> Result<()> {
        Ok(())
    }

    fn sync(&mut self, desired: &Desired, dirty: &Dirty) -> Result<SyncReport> {
        // A sync that failed may have because the table was not there.
        if self.found.is_some() && self.make_whole()? {
            tracing::warn!("the table of Services was changed by others and is made anew");
        }
        let found = self.found.take();
        let update = self.plans.update(desired, dirty, |key, port| {
            let numbers = Self::numbers_found(found.as_ref()?, key, port);
            Some(Plan::of_numbers(numbers))
        });
        let mut shared = std::mem::take(&mut self.shared);
        let mut shared_before: BTreeMap<Element, u32> = BTreeMap::new();
        let new = || self.plans.of(&update).map(|(_, plan)| plan);
        for plan in update.former.values().chain(new()) {
            elements::of_plan(plan, |element, _| {
                let count = shared.get(&element).copied().unwrap_or_default();
                shared_before.insert(element, count);
            });
        }
        let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
        for plan in update.former.values() {
            Self::count(&mut shared, plan, &mut before, false);
        }
        for plan in new() {
            Self::count(&mut shared, plan, &mut after, true);
        }
        for (element, count) in shared_before {
            if count > 0 {
                before.insert(element, Data::None);
            }
            if shared.get(&element).is_some_and(|count| *count > 0) {
                after.insert(element, Data::None);
            }
        }
        shared.retain(|_, count| *count > 0);
        self.shared = shared;
        let report = self.plans.report(&update);
        self.unsettled.take_in(update);
        let changes = Changes::between(found.as_ref().unwrap_or(&before), &after);
        if let Err(error) = self.table.apply(&changes) {
            // What the kernel holds is what it held: the next sync begins from there.
            self.plans.clear();
            self.shared.clear();
            self.found = Some(self.table.elements().unwrap_or_default());
            return Err(error);
        }
        self.settle()?;
        Ok(report)
    }

    fn audit(&mut self) -> Result<usize> {
        let mut mended = usize::from(loopback::ensure()?);
        mended += usize::from(self.make_whole()?);
        if self.found.is_some() {
            // What it serves is a former daemon's, or from before a failure, until the next sync says what is wanted.
            return Ok(mended);
        }
        let changes = Changes::between(&self.table.elements()?, &self.all_elements());
        mended += changes.removed.len().max(changes.added.len());
        self.table.apply(&changes)?;
        if mended > 0 {
            plan::forget_stale(self.table.netfilter(), &self.plans, &self.plans.as_new())?;
        }
        Ok(mended)
    }

    fn programmed(&self) -> Result<HashMap<ServicePortKey, Programmed>> {
        let found = self.table.elements()?;
        let backends = |frontend: SocketAddr, protocol, from: u32, count: u32| {
            (from..from + count).filter_map({
                let found = &found;
                move |number| {
                    let (set, key) = (SetKind::Endpoints, Key::Endpoint(frontend, protocol, number));
                    match found.get(&Element { set, key }) {
                        Some(Data::Endpoint(endpoint)) => Some(*endpoint),
                        _ => None,
                    }
                }
            })
        };
        let of_plan = |(key, plan): (&ServicePortKey, &Plan)| {
            let mut programmed = Programmed::default();
            let mut behind = BTreeSet::new();
            for frontend in plan.frontends() {
                let asked = loopback::asked(frontend);
                let lookup = |set| {
                    let key = Key::Frontend(asked, key.protocol);
                    found.get(&Element { set, key })
                };
                // Where both are there, what other hosts are served by is the set's own.
                let verdict = lookup(SetKind::Outside).or_else(|| lookup(SetKind::Inside));
                let Some(Data::Verdict(verdict) | Data::Checked(verdict)) = verdict else {
                    continue;
                };
                programmed.frontends.push(frontend);
                match verdict {
                    Verdict::Cluster(count) => behind.extend(backends(asked, key.protocol, 0, *count)),
                    Verdict::Local(count) => {
                        behind.extend(backends(asked, key.protocol, elements::LOCAL_OFFSET, *count));
                    }
                    Verdict::Refuse | Verdict::Drop => {}
                }
            }
            programmed.frontends.sort_unstable();
            programmed.backends = behind.into_iter().collect();
            (key.clone(), programmed)
        };
        Ok(self.plans.iter().map(of_plan).collect())
    }

    fn connections(&self) -> Result<Vec<Connection>> {
        let holders = self.plans.holders();
        connections::list(self.table.netfilter(), |frontend, protocol| {
            holders.contains_key(&(frontend, protocol))
        })
    }
}
