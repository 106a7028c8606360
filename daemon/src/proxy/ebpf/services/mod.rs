//! Which Service holds which set and which frontends in the kernel, and how that follows what is desired.
//!
//! The kernel's tables are the memory: a starting daemon reads them back and takes up the sets it finds by the
//! frontends that lead to them, so ids stay and an unchanged Service is not written at all. Nothing it did not recognise is
//! removed before a sync of everything. [`programming`] has a Service's way into the kernel and out of it, [`newcomers`] that of many
//! at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;
use litemap::LiteMap;
use sluice_ebpf_types::{Frontend, FrontendKey};

use super::addresses::Addresses;
use super::backend_set::BackendSet;
use super::maglev::Maglev;
use super::sources::Sources;
use super::tables::Tables;
use super::wanted;
use crate::proxy::{Dirty, Programmed, SyncReport};
use crate::state::service_port::{FrontendKind, Scope, ServicePort, ServicePortKey};

mod newcomers;
mod programming;

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
}
