//! Sets of the desired state as netfilter's dataplanes program them, and what a change of them leaves stale. Pure but for the
//! removal of stale entries from the connection table.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use ipnetwork::IpNetwork;

use super::loopback::asked;
use crate::netfilter::conntrack;
use crate::netfilter::wire::Netfilter;
use crate::proxy::{Dirty, SyncReport};
use crate::state::service_port::{
    Backend, FrontendKind, Place, Protocol, Scope, ServicePort, ServicePortKey, WhenEmpty,
};

type Desired = BTreeMap<ServicePortKey, ServicePort>;

/// One set of the desired state as it is programmed: endpoints have numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Of all its frontends and endpoints.
    pub protocol: Protocol,
    /// Where clients connect, and why it leads here.
    pub frontends: Vec<(SocketAddr, FrontendKind)>,
    /// By number: what other hosts are served by.
    pub outside: Vec<SocketAddr>,
    /// What becomes of connections from other hosts while there is no endpoint for them.
    pub when_empty: WhenEmpty,
    /// What pods and the node are served by at outside addresses, where that differs.
    pub inside: Option<Vec<SocketAddr>>,
    /// Endpoints on this node.
    pub here: Vec<IpAddr>,
    /// Session affinity in seconds.
    pub affinity: Option<u32>,
    /// Who may connect to the frontends of load balancers, none of these networks in another; none: everyone.
    pub ranges: Option<Vec<IpNetwork>>,
}

impl Plan {
    /// The plan for `port`; endpoints keep the numbers they have in `before`. `beside` is the set of the whole cluster's
    /// endpoints for the same port, if there is one beside a local one.
    pub fn new(
        key: &ServicePortKey,
        port: &ServicePort,
        beside: Option<&ServicePort>,
        before: Option<&Self>,
    ) -> Self {
        let addresses = |backends: &[Backend]| backends.iter().map(|b| b.address).collect::<Vec<_>>();
        let outside = addresses(&port.backends);
        let inside = beside
            .filter(|_| key.scope == Scope::Local)
            .map(|beside| addresses(&beside.backends));
        let all = port
            .backends
            .iter()
            .chain(beside.into_iter().flat_map(|beside| &beside.backends));
        let mut here: Vec<_> = all
            .filter(|backend| backend.place == Place::ThisNode)
            .map(|backend| backend.address.ip())
            .collect();
        here.sort_unstable();
        here.dedup();
        let former = |numbers: Option<&Vec<SocketAddr>>, wanted: &[SocketAddr]| {
            numbered(numbers.map(Vec::as_slice).unwrap_or_default(), wanted)
        };
        Self {
            protocol: key.protocol,
            frontends: port.frontends.iter().map(|f| (f.address, f.kind)).collect(),
            outside: former(before.map(|before| &before.outside), &outside),
            when_empty: port.when_empty,
            inside: inside.map(|inside| former(before.and_then(|before| before.inside.as_ref()), &inside)),
            here,
            affinity: port
                .affinity
                .map(|timeout| u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1)),
            ranges: port.source_ranges.as_deref().map(apart),
        }
    }

    /// One that knows nothing but which endpoint has which number.
    pub fn of_numbers(numbers: Vec<SocketAddr>) -> Self {
        Self {
            protocol: Protocol::Tcp,
            frontends: Vec::new(),
            outside: numbers.clone(),
            when_empty: WhenEmpty::Refuse,
            inside: Some(numbers),
            here: Vec::new(),
            affinity: None,
            ranges: None,
        }
    }

    /// The frontends.
    pub fn frontends(&self) -> impl Iterator<Item = SocketAddr> {
        self.frontends.iter().map(|(address, _)| *address)
    }

    /// The addresses under which connections to these are balanced.
    pub fn asked(&self) -> impl Iterator<Item = SocketAddr> {
        self.frontends().map(asked)
    }

    /// Whether connections to its frontends may be with `endpoint`.
    pub fn has(&self, endpoint: SocketAddr) -> bool {
        self.outside.contains(&endpoint)
            || self
                .inside
                .as_ref()
                .is_some_and(|inside| inside.contains(&endpoint))
    }
}

/// The plans of all sets.
#[derive(Debug, Default)]
pub struct Plans(BTreeMap<ServicePortKey, Plan>);

/// What a sync makes of the plans.
#[derive(Debug, Default)]
pub struct Update {
    /// The plans as they were of the sets that changed or went.
    pub former: BTreeMap<ServicePortKey, Plan>,
    /// The sets that changed, came or went.
    pub changed: BTreeSet<ServicePortKey>,
    /// Frontends of sets that came and changed again: nobody knows whether they were ever programmed.
    pub tried: BTreeSet<(SocketAddr, Protocol)>,
}

impl Update {
    /// Takes in a later one, after which nothing was programmed for certain.
    pub fn take_in(&mut self, later: Self) {
        for (key, plan) in later.former {
            if self.changed.contains(&key) && !self.former.contains_key(&key) {
                self.tried
                    .extend(plan.asked().map(|frontend| (frontend, key.protocol)));
            } else {
                self.former.entry(key).or_insert(plan);
            }
        }
        self.changed.extend(later.changed);
        self.tried.extend(later.tried);
    }
}

impl Plans {
    /// Follows `desired`, as far as `dirty` says. `numbers` knows the numbers that a former daemon gave the endpoints of a set.
    pub fn update(
        &mut self,
        desired: &Desired,
        dirty: &Dirty,
        numbers: impl Fn(&ServicePortKey, &ServicePort) -> Option<Plan>,
    ) -> Update {
        let mut update = Update::default();
        for key in self.keys(desired, dirty) {
            let old = self.0.remove(&key);
            let new = desired.get(&key).map(|port| {
                let beside = desired.get(&of_scope(&key, Scope::Cluster));
                let found = old.is_none().then(|| numbers(&key, port)).flatten();
                Plan::new(&key, port, beside, old.as_ref().or(found.as_ref()))
            });
            let same = old == new;
            self.0.extend(new.map(|plan| (key.clone(), plan)));
            if !same {
                update.former.extend(old.map(|plan| (key.clone(), plan)));
                update.changed.insert(key);
            }
        }
        update
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&ServicePortKey, &Plan)> {
        self.0.iter()
    }

    /// Those of the sets that changed or came.
    pub fn of<'a>(&'a self, update: &'a Update) -> impl Iterator<Item = (&'a ServicePortKey, &'a Plan)> {
        update
            .changed
            .iter()
            .filter_map(|key| self.0.get(key).map(|plan| (key, plan)))
    }

    /// All of them as though they came only now.
    pub fn as_new(&self) -> Update {
        Update {
            changed: self.0.keys().cloned().collect(),
            ..Update::default()
        }
    }

    /// What the update comes to.
    pub fn report(&self, update: &Update) -> SyncReport {
        let changed = self.of(update).count();
        SyncReport {
            changed,
            removed: update.changed.len() - changed,
            failed: Vec::new(),
        }
    }

    /// Which plan has which frontend.
    pub fn holders(&self) -> Holders<'_> {
        let plans = self.0.iter();
        plans
            .flat_map(|(key, plan)| {
                plan.asked()
                    .map(move |frontend| ((frontend, key.protocol), Some(plan)))
            })
            .collect()
    }

    /// Whose each frontend is that these had or have: nobody's, where the plan is none. An address that moved has both its
    /// Services among the changed.
    pub fn touched<'a>(&'a self, update: &'a Update) -> Holders<'a> {
        let tried = update.tried.iter().map(|frontend| (*frontend, None));
        let mut touched: Holders<'a> = tried.collect();
        for (key, plan) in &update.former {
            touched.extend(plan.asked().map(|frontend| ((frontend, key.protocol), None)));
        }
        for (key, plan) in self.of(update) {
            touched.extend(
                plan.asked()
                    .map(|frontend| ((frontend, key.protocol), Some(plan))),
            );
        }
        touched
    }

    /// The keys to look at: a local set follows the cluster's set beside it.
    fn keys(&self, desired: &Desired, dirty: &Dirty) -> BTreeSet<ServicePortKey> {
        let mut keys: BTreeSet<ServicePortKey> = match dirty {
            Dirty::All => desired.keys().chain(self.0.keys()).cloned().collect(),
            Dirty::Only(keys) => keys.clone(),
        };
        let beside: Vec<_> = keys
            .iter()
            .filter(|key| key.scope == Scope::Cluster)
            .map(|key| of_scope(key, Scope::Local))
            .filter(|key| desired.contains_key(key))
            .collect();
        keys.extend(beside);
        keys
    }
}

/// Whose a frontend is.
pub type Holders<'a> = HashMap<(SocketAddr, Protocol), Option<&'a Plan>>;

/// The key of the same port's other set.
pub fn of_scope(key: &ServicePortKey, scope: Scope) -> ServicePortKey {
    ServicePortKey { scope, ..key.clone() }
}

/// Removes from the connection table what a change of the plans leaves stale: UDP's entries that lead where nobody is any more, and
/// those of connections that were begun before anybody served them. What was taken from the kernel by others and put back is as new.
///
/// # Errors
/// The kernel's.
pub fn forget_stale(netfilter: &Netfilter, plans: &Plans, update: &Update) -> Result<()> {
    let touched = plans.touched(update);
    let udp: HashSet<SocketAddr> = touched
        .keys()
        .filter(|(_, protocol)| *protocol == Protocol::Udp)
        .map(|(frontend, _)| *frontend)
        .collect();
    let belongs = |frontend, endpoint| match touched.get(&(frontend, Protocol::Udp)) {
        Some(Some(plan)) => plan.has(endpoint),
        // Nobody's any more: an entry that was not translated is as it should be.
        _ => frontend == endpoint,
    };
    let mut removed = 0;
    if !udp.is_empty() {
        removed += conntrack::remove_stale(netfilter, &udp, belongs)?;
    }
    let mut new: HashSet<_> = touched
        .keys()
        .copied()
        .filter(|(_, protocol)| *protocol != Protocol::Udp)
        .collect();
    for (key, plan) in &update.former {
        for frontend in plan.asked() {
            new.remove(&(frontend, key.protocol));
        }
    }
    if !new.is_empty() {
        removed += conntrack::remove_unanswered(netfilter, &new)?;
    }
    if removed > 0 {
        tracing::info!(removed, "connections that led where nobody is were forgotten");
    }
    Ok(())
}

/// The networks that lie in no other of them: nf_tables takes no ranges that overlap.
fn apart(networks: &[IpNetwork]) -> Vec<IpNetwork> {
    let inside = |inner: &IpNetwork, outer: &IpNetwork| {
        outer.contains(inner.ip())
            && (outer.prefix() < inner.prefix() || outer < inner && outer.prefix() == inner.prefix())
    };
    let lone = |network: &&IpNetwork| !networks.iter().any(|outer| inside(network, outer));
    networks.iter().filter(lone).copied().collect()
}

/// `wanted` in an order where as many as can keep the numbers they have in `before`.
fn numbered(before: &[SocketAddr], wanted: &[SocketAddr]) -> Vec<SocketAddr> {
    let there: HashMap<SocketAddr, usize> = before.iter().copied().zip(0..).collect();
    let mut numbered: Vec<Option<SocketAddr>> = vec![None; wanted.len()];
    let mut others = Vec::new();
    for address in wanted {
        match there.get(address).and_then(|number| numbered.get_mut(*number)) {
            Some(place) => *place = Some(*address),
            None => others.push(*address),
        }
    }
    let mut others = others.into_iter();
    numbered
        .into_iter()
        .filter_map(|place| place.or_else(|| others.next()))
        .collect()
}
