//! Which Service holds which set and which frontends in the kernel, and how that follows what is desired.
//!
//! The kernel's tables are the memory: a starting daemon reads them back and takes up the sets it finds by the
//! frontends that lead to them, so ids stay and an unchanged Service is not written at all. Nothing it did not recognise is
//! removed before a sync of everything.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;
use sluice_ebpf_types::{Frontend, FrontendKey, UDP};

use super::addresses::{Addresses, is_cluster_ip};
use super::backend_set::{BackendSet, NewSet};
use super::sources::Sources;
use super::tables::Tables;
use super::wanted;
use crate::proxy::{Dirty, Programmed, SyncReport};
use crate::state::service_port::{Scope, ServicePort, ServicePortKey};

type Desired = BTreeMap<ServicePortKey, ServicePort>;

/// A set and the frontends that lead to it, as the kernel has them.
#[derive(Debug)]
struct Entry {
    set: BackendSet,
    frontends: BTreeMap<FrontendKey, Frontend>,
}

/// Who holds a frontend.
#[derive(Debug, Clone)]
enum Holder {
    /// A Service.
    Known(Arc<ServicePortKey>),
    /// A set a former daemon left, by id, that no Service has taken up yet.
    Found(u32),
}

/// What a sync means for sockets that are connected already.
#[derive(Debug, Default)]
pub(super) struct Upheaval {
    /// UDP frontends that were not there before: sockets may be connected to them untranslated.
    pub new_udp_frontends: BTreeSet<FrontendKey>,
    /// Whether a UDP Service lost a backend or a frontend.
    pub udp_lost: bool,
}

impl Upheaval {
    /// Whether there can be anything to do.
    pub fn is_any(&self) -> bool {
        self.udp_lost || !self.new_udp_frontends.is_empty()
    }
}

/// All Services in the kernel.
pub(super) struct Services {
    entries: BTreeMap<Arc<ServicePortKey>, Entry>,
    found: BTreeMap<u32, Entry>,
    holders: HashMap<FrontendKey, Holder>,
    addresses: Addresses,
    sources: Sources,
    next_id: u32,
    /// The node's own addresses: whether its own sockets are within a Service's source ranges.
    node_addresses: Vec<IpAddr>,
    /// What failed, or only did in part; looked at again in every sync.
    retry: BTreeSet<ServicePortKey>,
}

impl Services {
    /// Reads the kernel's tables.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(tables: &mut Tables) -> Result<Self> {
        let mut found: BTreeMap<u32, Entry> = BackendSet::read_all(tables)?
            .into_iter()
            .map(|(id, set)| {
                (
                    id,
                    Entry {
                        set,
                        frontends: BTreeMap::new(),
                    },
                )
            })
            .collect();
        let mut holders = HashMap::new();
        for (key, value) in tables.frontends.entries()? {
            // A frontend without a set is what an interrupted removal leaves; it serves nobody.
            match found.get_mut(&value.service) {
                Some(entry) => {
                    entry.frontends.insert(key, value);
                    holders.insert(key, Holder::Found(value.service));
                }
                None => {
                    tables.frontends.remove(&key)?;
                }
            }
        }
        let led = found.values().flat_map(|entry| {
            let serves = !entry.set.backends().is_empty();
            let frontends = entry.frontends.iter();
            frontends.map(move |(key, value)| (key, value, serves))
        });
        let addresses = Addresses::read(tables, led)?;
        let next_id = found.keys().next_back().map_or(1, |id| id.wrapping_add(1));
        Ok(Self {
            entries: BTreeMap::new(),
            found,
            holders,
            addresses,
            sources: Sources::read(tables)?,
            next_id,
            node_addresses: Vec::new(),
            retry: BTreeSet::new(),
        })
    }

    /// Takes note of the node's own addresses. What changes by that is written at the next sync of everything.
    pub fn set_node_addresses(&mut self, addresses: &[IpAddr]) {
        self.node_addresses = addresses.to_vec();
    }

    /// Session affinity's time-out in seconds of the set `id`; `None` if it has none, or is not there.
    pub fn affinity_by_id(&self) -> HashMap<u32, u32> {
        self.all_entries()
            .map(|entry| (entry.set.id, entry.set.affinity_seconds()))
            .filter(|(_, seconds)| *seconds != 0)
            .collect()
    }

    /// All sets the kernel knows of.
    pub fn sets(&self) -> impl Iterator<Item = &BackendSet> {
        self.all_entries().map(|entry| &entry.set)
    }

    /// All that leads to them.
    pub fn frontends(&self) -> impl Iterator<Item = (FrontendKey, Frontend)> + '_ {
        let frontends = self.all_entries().flat_map(|entry| &entry.frontends);
        frontends.map(|(key, value)| (*key, *value))
    }

    /// The ClusterIPs among those.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Who may connect to those of them that are restricted.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    fn all_entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().chain(self.found.values())
    }

    /// What the kernel holds now of each Service.
    ///
    /// # Errors
    /// The kernel's.
    pub fn programmed(&self, tables: &Tables) -> Result<HashMap<ServicePortKey, Programmed>> {
        self.entries
            .iter()
            .map(|(key, entry)| {
                let mut programmed = Programmed {
                    frontends: Vec::new(),
                    backends: entry.set.read(tables)?,
                };
                for (frontend, value) in &entry.frontends {
                    if tables.frontends.get(frontend)?.as_ref() == Some(value) {
                        programmed
                            .frontends
                            .push(wanted::socket_address(frontend.address, frontend.port));
                    }
                }
                programmed.frontends.sort_unstable();
                Ok((ServicePortKey::clone(key), programmed))
            })
            .collect()
    }

    /// Brings the kernel to `desired`, as far as `dirty` says.
    pub fn sync(&mut self, tables: &mut Tables, desired: &Desired, dirty: &Dirty) -> (SyncReport, Upheaval) {
        let mut report = SyncReport::default();
        let mut upheaval = Upheaval::default();
        let keys = self.keys(desired, dirty);
        for key in &keys {
            if let Some(port) = desired.get(key) {
                self.take_up(key, port);
            }
        }
        self.retry.clear();
        self.create_sets(tables, &keys, desired);
        // What others may rely on is made before what is stale goes; scope Cluster comes before Local, which may use it.
        for key in &keys {
            let Some(port) = desired.get(key) else { continue };
            match self.set(tables, key, port, desired, &mut upheaval) {
                Ok((changed, contested)) => {
                    report.changed += usize::from(changed);
                    report
                        .failed
                        .extend(contested.map(|reason| (key.clone(), reason)));
                }
                Err(error) => report.failed.push((key.clone(), format!("{error:#}"))),
            }
        }
        for key in keys.iter().filter(|key| !desired.contains_key(key)) {
            let Some((known, entry)) = self.entries.remove_entry(key) else {
                continue;
            };
            match self.discard(tables, &entry, &mut upheaval) {
                Ok(()) => report.removed += 1,
                Err(error) => {
                    report.failed.push((key.clone(), format!("{error:#}")));
                    self.entries.insert(known, entry);
                }
            }
        }
        if *dirty == Dirty::All {
            self.prune(tables, &mut report, &mut upheaval);
        }
        self.retry
            .extend(report.failed.iter().map(|(key, _)| key.clone()));
        (report, upheaval)
    }

    /// The keys to look at, in order.
    fn keys(&self, desired: &Desired, dirty: &Dirty) -> BTreeSet<ServicePortKey> {
        let mut keys = match dirty {
            Dirty::All => desired
                .keys()
                .cloned()
                .chain(self.entries.keys().map(|key| (**key).clone()))
                .collect(),
            Dirty::Only(keys) => keys.clone(),
        };
        keys.extend(self.retry.iter().cloned());
        // A Local set's frontends name the id of the Cluster set beside it.
        let siblings: Vec<_> = keys
            .iter()
            .filter(|key| key.scope == Scope::Cluster)
            .map(|key| ServicePortKey {
                scope: Scope::Local,
                ..key.clone()
            })
            .filter(|key| desired.contains_key(key))
            .collect();
        keys.extend(siblings);
        keys
    }

    /// Looks whether a former daemon left the Service's set: the one its frontends lead to.
    fn take_up(&mut self, key: &ServicePortKey, port: &ServicePort) {
        if self.found.is_empty() || self.entries.contains_key(key) {
            return;
        }
        let id = port.frontends.iter().find_map(|frontend| {
            match self
                .holders
                .get(&wanted::frontend_key(frontend.address, key.protocol))
            {
                Some(Holder::Found(id)) => Some(*id),
                _ => None,
            }
        });
        let Some(entry) = id.and_then(|id| self.found.remove(&id)) else {
            return;
        };
        let key = Arc::new(key.clone());
        for frontend in entry.frontends.keys() {
            self.holders.insert(*frontend, Holder::Known(Arc::clone(&key)));
        }
        self.entries.insert(key, entry);
    }

    /// Writes the sets of all Services that have none yet, in as few calls as can be: at the start this is nearly all there
    /// is to do. What leads to them comes after, Service by Service.
    fn create_sets(&mut self, tables: &mut Tables, keys: &BTreeSet<ServicePortKey>, desired: &Desired) {
        let mut created: Vec<(Arc<ServicePortKey>, Entry)> = Vec::new();
        for key in keys.iter().filter(|key| desired.contains_key(key)) {
            if !self.entries.contains_key(key) {
                created.push((Arc::new(key.clone()), self.new_entry()));
            }
        }
        let mut new: Vec<NewSet<'_>> = created
            .iter_mut()
            .filter_map(|(key, entry)| {
                let port = desired.get(&**key)?;
                Some(NewSet {
                    set: &mut entry.set,
                    wanted: wanted::backends(port),
                    affinity_seconds: wanted::affinity_seconds(port),
                })
            })
            .collect();
        if let Err(error) = BackendSet::create_all(tables, &mut new) {
            // One by one it will turn out which of them is the trouble.
            tracing::debug!(
                error = format!("{error:#}"),
                "new sets could not be written together"
            );
        }
        self.entries.extend(created);
    }

    fn new_entry(&mut self) -> Entry {
        let id = self.next_id;
        self.next_id += 1;
        Entry {
            set: BackendSet::new(id),
            frontends: BTreeMap::new(),
        }
    }

    /// Programs one Service; whether something changed, and which frontends others hold.
    fn set(
        &mut self,
        tables: &mut Tables,
        key: &ServicePortKey,
        port: &ServicePort,
        desired: &Desired,
        upheaval: &mut Upheaval,
    ) -> Result<(bool, Option<String>)> {
        let (known, mut entry) = match self.entries.remove_entry(key) {
            Some(known) => known,
            None => (Arc::new(key.clone()), self.new_entry()),
        };
        let result = self.program(tables, &known, &mut entry, port, desired, upheaval);
        self.entries.insert(known, entry);
        result
    }

    fn program(
        &mut self,
        tables: &mut Tables,
        key: &Arc<ServicePortKey>,
        entry: &mut Entry,
        port: &ServicePort,
        desired: &Desired,
        upheaval: &mut Upheaval,
    ) -> Result<(bool, Option<String>)> {
        let udp = key.protocol.number() == UDP;
        let backends = wanted::backends(port);
        let had_backends = !entry.set.backends().is_empty();
        let mut changed = entry.set.set(tables, &backends, wanted::affinity_seconds(port))?;
        upheaval.udp_lost |= udp && changed && had_backends;

        let cluster = (key.scope == Scope::Local)
            .then(|| ServicePortKey {
                scope: Scope::Cluster,
                ..(**key).clone()
            })
            .filter(|sibling| desired.contains_key(sibling))
            .and_then(|sibling| self.entries.get(&sibling))
            .map(|sibling| sibling.set.id);
        // Before a frontend that is restricted: who is let in must not be kept out for a moment.
        let ranges = port.source_ranges.as_deref().unwrap_or_default();
        changed |= self.sources.set(tables, entry.set.id, ranges)?;
        let frontends = wanted::frontends(key, port, entry.set.id, cluster, &self.node_addresses);
        let mut contested = Vec::new();
        for (frontend, value) in &frontends {
            if entry.frontends.get(frontend) == Some(value) {
                continue;
            }
            if let Some(holder) = self.rival(key, frontend, desired) {
                contested.push(format!(
                    "{} belongs to {holder}",
                    wanted::socket_address(frontend.address, frontend.port)
                ));
                continue;
            }
            tables.frontends.set(frontend, value)?;
            changed = true;
            let other = match self.holders.insert(*frontend, Holder::Known(Arc::clone(key))) {
                Some(Holder::Known(other)) => self.entries.get_mut(&other),
                Some(Holder::Found(id)) => self.found.get_mut(&id),
                None => {
                    if udp {
                        upheaval.new_udp_frontends.insert(*frontend);
                    }
                    None
                }
            };
            let taken = other.and_then(|other| other.frontends.remove(frontend));
            let former = entry.frontends.insert(*frontend, *value).or(taken);
            if former.is_some_and(|former| is_cluster_ip(&former)) && !is_cluster_ip(value) {
                self.addresses.remove(tables, frontend)?;
            }
        }
        let serves = !entry.set.backends().is_empty();
        for (frontend, _) in entry.frontends.iter().filter(|(_, value)| is_cluster_ip(value)) {
            self.addresses.set(tables, frontend, serves)?;
        }
        let stale: Vec<_> = entry
            .frontends
            .keys()
            .filter(|key| !frontends.contains_key(key))
            .copied()
            .collect();
        for frontend in stale {
            tables.frontends.remove(&frontend)?;
            let former = entry.frontends.remove(&frontend);
            self.holders.remove(&frontend);
            if former.is_some_and(|former| is_cluster_ip(&former)) {
                self.addresses.remove(tables, &frontend)?;
            }
            changed = true;
            upheaval.udp_lost |= udp;
        }
        Ok((changed, (!contested.is_empty()).then(|| contested.join(", "))))
    }

    /// Another Service that holds `frontend` and means to keep it.
    fn rival(
        &self,
        key: &ServicePortKey,
        frontend: &FrontendKey,
        desired: &Desired,
    ) -> Option<Arc<ServicePortKey>> {
        let Some(Holder::Known(holder)) = self.holders.get(frontend) else {
            return None;
        };
        let claims = |port: &ServicePort| {
            port.frontends
                .iter()
                .any(|f| wanted::frontend_key(f.address, holder.protocol) == *frontend)
        };
        (**holder != *key && desired.get(&**holder).is_some_and(claims)).then(|| Arc::clone(holder))
    }

    /// Removes a set and what leads to it, the way in first.
    fn discard(&mut self, tables: &mut Tables, entry: &Entry, upheaval: &mut Upheaval) -> Result<()> {
        for (frontend, former) in &entry.frontends {
            // After a failure this comes by here again.
            if tables.frontends.remove(frontend)? && is_cluster_ip(former) {
                self.addresses.remove(tables, frontend)?;
            }
            self.holders.remove(frontend);
            upheaval.udp_lost |= frontend.protocol == UDP;
        }
        self.sources.set(tables, entry.set.id, &[])?;
        entry.set.remove(tables)
    }

    /// Removes what a former daemon left and no Service has taken up.
    fn prune(&mut self, tables: &mut Tables, report: &mut SyncReport, upheaval: &mut Upheaval) {
        for (id, entry) in std::mem::take(&mut self.found) {
            match self.discard(tables, &entry, upheaval) {
                Ok(()) => report.removed += 1,
                Err(error) => {
                    tracing::warn!(
                        id,
                        error = format!("{error:#}"),
                        "cannot remove a set nobody wants; trying again"
                    );
                    self.found.insert(id, entry);
                }
            }
        }
    }
}
