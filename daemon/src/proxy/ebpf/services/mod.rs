//! Which Service holds which set and which frontends in the kernel, and how that follows what is desired.
//!
//! The kernel's tables are the memory: a starting daemon reads them back and takes up the sets it finds by the
//! frontends that lead to them, so ids stay and an unchanged Service is not written at all. Nothing it did not recognise is
//! removed before a sync of everything.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;
use litemap::LiteMap;
use sluice_ebpf_types::{Frontend, FrontendKey, UDP};

use super::addresses::{Addresses, is_cluster_ip};
use super::backend_set::BackendSet;
use super::maglev::Maglev;
use super::sources::Sources;
use super::tables::Tables;
use super::wanted;
use crate::proxy::{Dirty, Programmed, SyncReport};
use crate::state::service_port::{FrontendKind, Scope, ServicePort, ServicePortKey};

mod newcomers;

type Desired = BTreeMap<ServicePortKey, ServicePort>;

/// A set and the frontends that lead to it, as the kernel has them.
#[derive(Debug)]
struct Entry {
    set: BackendSet,
    /// Most have one, for which a tree would take the room of eleven.
    frontends: LiteMap<FrontendKey, Frontend>,
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
    maglev: Maglev,
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
                        frontends: LiteMap::new(),
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
            maglev: Maglev::read(tables)?,
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

    /// Which of them pick alike on all nodes.
    pub fn maglev(&self) -> &Maglev {
        &self.maglev
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
        let (wanted, unwanted) = self.looked_at(desired, dirty);
        for (key, port) in &wanted {
            self.take_up(key, port);
        }
        self.retry.clear();
        // What others may rely on is made before what is stale goes, so that an address which moves from one Service to
        // another leads somewhere throughout; scope Cluster comes before Local, which may use it.
        let new = self.welcome(tables, &wanted, &mut upheaval);
        let mut changed = new.clone();
        let others = || wanted.iter().enumerate().filter(|(position, _)| !new[*position]);
        for (position, (key, port)) in others() {
            match self.set(tables, key, port, desired, &mut upheaval) {
                Ok(now) => changed[position] |= now,
                Err(error) => report.failed.push(((*key).clone(), format!("{error:#}"))),
            }
        }
        for (key, error) in self.note_addresses(tables, &wanted) {
            report.failed.push((key, format!("{error:#}")));
        }
        for (position, (key, port)) in others() {
            match self.remove_stale(tables, key, port, &mut upheaval) {
                Ok(now) => changed[position] |= now,
                Err(error) => report.failed.push(((*key).clone(), format!("{error:#}"))),
            }
        }
        report.changed = changed.into_iter().filter(|changed| *changed).count();
        for key in unwanted {
            let Some(entry) = self.entries.remove(&key) else {
                continue;
            };
            match self.discard(tables, &entry, &mut upheaval) {
                Ok(()) => report.removed += 1,
                Err(error) => {
                    report.failed.push(((*key).clone(), format!("{error:#}")));
                    self.entries.insert(key, entry);
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

    /// What to look at, in order: Services that are wanted, and those the kernel has that no longer are.
    fn looked_at<'d>(
        &self,
        desired: &'d Desired,
        dirty: &Dirty,
    ) -> (
        Vec<(&'d ServicePortKey, &'d ServicePort)>,
        Vec<Arc<ServicePortKey>>,
    ) {
        let keys = match dirty {
            Dirty::All => {
                let known = self.entries.keys();
                let unwanted = known.filter(|key| !desired.contains_key(&***key));
                return (desired.iter().collect(), unwanted.cloned().collect());
            }
            Dirty::Only(keys) => keys.iter().chain(&self.retry),
        };
        let mut wanted = BTreeMap::new();
        let mut unwanted = BTreeSet::new();
        for key in keys {
            match desired.get_key_value(key) {
                Some((key, port)) => _ = wanted.insert(key, port),
                None => unwanted.extend(
                    self.entries
                        .get_key_value(key)
                        .map(|(known, _)| Arc::clone(known)),
                ),
            }
            // A Local set's frontends name the id of the Cluster set beside it.
            if key.scope == Scope::Cluster {
                let sibling = ServicePortKey {
                    scope: Scope::Local,
                    ..key.clone()
                };
                wanted.extend(desired.get_key_value(&sibling));
            }
        }
        (wanted.into_iter().collect(), unwanted.into_iter().collect())
    }

    /// Looks whether a former daemon left the Service's set: the one its ClusterIP leads to, or else most of its frontends,
    /// since one of them may have been another's then.
    fn take_up(&mut self, key: &ServicePortKey, port: &ServicePort) {
        if self.found.is_empty() || self.entries.contains_key(key) {
            return;
        }
        let mut votes: BTreeMap<u32, usize> = BTreeMap::new();
        for frontend in &port.frontends {
            let weight = match frontend.kind {
                FrontendKind::ClusterIp => port.frontends.len(),
                _ => 1,
            };
            let frontend = wanted::frontend_key(frontend.address, key.protocol);
            if let Some(Holder::Found(id)) = self.holders.get(&frontend) {
                *votes.entry(*id).or_default() += weight;
            }
        }
        let most = votes.into_iter().max_by_key(|(_, votes)| *votes);
        let id = most.map(|(id, _)| id);
        let Some(entry) = id.and_then(|id| self.found.remove(&id)) else {
            return;
        };
        let key = Arc::new(key.clone());
        for frontend in entry.frontends.keys() {
            self.holders.insert(*frontend, Holder::Known(Arc::clone(&key)));
        }
        self.entries.insert(key, entry);
    }

    fn new_entry(&mut self) -> Entry {
        let id = self.next_id;
        self.next_id += 1;
        Entry {
            set: BackendSet::new(id),
            frontends: LiteMap::new(),
        }
    }

    /// Programs one Service, and takes what leads to it from whoever had that; whether something changed.
    fn set(
        &mut self,
        tables: &mut Tables,
        key: &ServicePortKey,
        port: &ServicePort,
        desired: &Desired,
        upheaval: &mut Upheaval,
    ) -> Result<bool> {
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
    ) -> Result<bool> {
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
        for (frontend, value) in &frontends {
            if entry.frontends.get(frontend) == Some(value) {
                continue;
            }
            tables.frontends.set(frontend, value)?;
            changed = true;
            let former = self.holders.insert(*frontend, Holder::Known(Arc::clone(key)));
            if udp && former.is_none() {
                upheaval.new_udp_frontends.insert(*frontend);
            }
            let other = match former {
                Some(Holder::Known(other)) => self.entries.get_mut(&other),
                Some(Holder::Found(id)) => self.found.get_mut(&id),
                None => None,
            };
            let taken = other.and_then(|other| other.frontends.remove(frontend));
            // Sockets that the former holder sent to one of its endpoints do not belong there any more.
            upheaval.udp_lost |= udp && taken.is_some();
            let former = entry.frontends.insert(*frontend, *value).or(taken);
            if former.is_some_and(|former| is_cluster_ip(&former)) && !is_cluster_ip(value) {
                self.addresses.remove(tables, frontend)?;
            }
        }
        // Last, since without it the Service is served all the same.
        let external = port
            .frontends
            .iter()
            .any(|frontend| frontend.kind != FrontendKind::ClusterIp);
        changed |= self.maglev.set(tables, &entry.set, external, changed)?;
        Ok(changed)
    }

    /// Has the ClusterIPs known that lead to these Services, and says for which that failed. Only when all that leads anywhere is there: at
    /// a ClusterIP that is known, a port that is not is refused, and other ports of the same Service come after this one.
    fn note_addresses(
        &mut self,
        tables: &mut Tables,
        wanted: &[(&ServicePortKey, &ServicePort)],
    ) -> Vec<(ServicePortKey, anyhow::Error)> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (key, _) in wanted {
            let Some(entry) = self.entries.get(*key) else {
                continue;
            };
            let serves = !entry.set.backends().is_empty();
            for (frontend, _) in entry.frontends.iter().filter(|(_, value)| is_cluster_ip(value)) {
                if let Some(value) = self.addresses.note(frontend, serves) {
                    keys.push(*key);
                    values.push(value);
                }
            }
        }
        if tables.addresses.set_all(&values).is_ok() {
            for (address, value) in &values {
                self.addresses.written(address, *value);
            }
            return Vec::new();
        }
        let mut failed = Vec::new();
        for (key, (address, value)) in keys.into_iter().zip(&values) {
            match tables.addresses.set(address, value) {
                Ok(_) => self.addresses.written(address, *value),
                Err(error) => failed.push((key.clone(), error)),
            }
        }
        failed
    }

    /// Removes what leads to a Service and is not to any more; whether there was anything.
    fn remove_stale(
        &mut self,
        tables: &mut Tables,
        key: &ServicePortKey,
        port: &ServicePort,
        upheaval: &mut Upheaval,
    ) -> Result<bool> {
        let Some(entry) = self.entries.get_mut(key) else {
            return Ok(false);
        };
        let wanted: BTreeSet<_> = port
            .frontends
            .iter()
            .map(|frontend| wanted::frontend_key(frontend.address, key.protocol))
            .collect();
        let stale: Vec<_> = entry
            .frontends
            .keys()
            .filter(|key| !wanted.contains(key))
            .copied()
            .collect();
        for frontend in &stale {
            tables.frontends.remove(frontend)?;
            let former = entry.frontends.remove(frontend);
            self.holders.remove(frontend);
            if former.is_some_and(|former| is_cluster_ip(&former)) {
                self.addresses.remove(tables, frontend)?;
            }
            upheaval.udp_lost |= frontend.protocol == UDP;
        }
        Ok(!stale.is_empty())
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
        self.maglev.remove(tables, entry.set.id)?;
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
