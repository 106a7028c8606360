//! Services in iptables: for hosts whose kernel has no nf_tables, and for operators whose tools know iptables alone.
//!
//! All is in chains called `SLUICE-*` of the tables `nat` and `filter`, in the flavour that is at work on the host. What is wanted is
//! drawn ([`drawing`]): all of it, or the chains that a change may have touched. It is compared with what stands there, chain by chain,
//! and only chains that differ are written ([`script`]). The tables are the memory: a starting daemon reads them back. Connections are kept by the kernel's connection
//! tracking.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::chains::{Chains, Table};
use self::drawing::Drawing;
use self::script::Known;
use crate::netfilter::wire::Netfilter;
use crate::proxy::netfilter::plan::{self, Plans, Update};
use crate::proxy::netfilter::{connections, loopback};
use crate::proxy::{Connection, Dirty, Programmed, Proxy, Surroundings, SyncReport};
use crate::state::service_port::{Family, FrontendKind, ServicePort, ServicePortKey};
use crate::xtables::{self, Tool};

mod chains;
mod drawing;
mod part;
mod rule;
mod script;
mod tree;

type Desired = BTreeMap<ServicePortKey, ServicePort>;

/// The iptables dataplane.
pub struct IptablesProxy {
    netfilter: Netfilter,
    firewalls: Vec<Firewall>,
    surroundings: Surroundings,
    plans: Plans,
    /// What has changed since stale connections were last looked for.
    unsettled: Update,
    /// How long the last sync took.
    took: Duration,
}

/// A tool is started for each sync, and the legacy flavour's writes whole tables: changes are gathered as long as one takes, but as
/// long as this at least and at most.
const GATHER: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_millis(200);

/// The tables of one family.
struct Firewall {
    family: Family,
    tool: Tool,
    /// What is there; nothing is known after a failure.
    known: Option<Known>,
}

impl Firewall {
    fn open(family: Family) -> Result<Self> {
        let tool = xtables::of_host(family, chains::SERVICES)
            .context("the iptables dataplane needs it (package iptables)")?;
        let mut firewall = Self {
            family,
            tool,
            known: None,
        };
        firewall.known = Some(firewall.read()?);
        Ok(firewall)
    }

    fn read(&self) -> Result<Known> {
        let mut known = Known::default();
        for table in Table::ALL {
            known.add(table, &self.tool.save(table.name())?);
        }
        Ok(known)
    }

    /// Brings the tables to `wanted`.
    fn apply(&mut self, wanted: &Chains) -> Result<()> {
        let known = match self.known.take() {
            Some(known) => known,
            None => self.read()?,
        };
        if let Some(text) = script::change(&known, wanted) {
            self.tool.restore(&text)?;
        }
        self.known = Some(Known::of(wanted));
        Ok(())
    }

    /// Brings the chains that `update` touched to what is drawn.
    fn follow(&mut self, mut known: Known, drawing: &Drawing<'_>, update: &Update) -> Result<()> {
        let (extent, wanted) = drawing.changed(update, &known.trees());
        if let Some(text) = script::change(&known.within(&extent), &wanted) {
            self.tool.restore(&text)?;
            known.put(&extent, &wanted);
        }
        self.known = Some(known);
        Ok(())
    }
}

impl IptablesProxy {
    /// Takes up the chains that are there.
    ///
    /// # Errors
    /// iptables is missing or refuses, or the kernel has no connection tracking.
    pub fn open() -> Result<Self> {
        let mut firewalls = vec![Firewall::open(Family::V4)?];
        // A host without IPv6 has no Services there.
        if Path::new("/proc/thread-self/net/if_inet6").exists() {
            firewalls.push(Firewall::open(Family::V6)?);
        }
        Ok(Self {
            netfilter: Netfilter::open()?,
            firewalls,
            surroundings: Surroundings::default(),
            plans: Plans::default(),
            unsettled: Update::default(),
            took: Duration::ZERO,
        })
    }

    /// Removes all of it from the kernel, whichever flavour it is in; says whether anything was there.
    ///
    /// # Errors
    /// iptables'.
    pub fn remove() -> Result<bool> {
        let mut any = false;
        for tool in xtables::in_use() {
            let mut known = Known::default();
            for table in Table::ALL {
                known.add(table, &tool.save(table.name())?);
            }
            if !known.is_empty() {
                tool.restore(&script::removal(&known))?;
                any = true;
            }
        }
        Ok(any)
    }

    /// The flavour that is at work, for people.
    pub fn flavour(&self) -> &'static str {
        self.firewalls.first().map_or("", |firewall| firewall.tool.name())
    }

    /// Brings all tables to what is wanted.
    fn apply(&mut self) -> Result<()> {
        for firewall in &mut self.firewalls {
            let wanted = Drawing::new(&self.plans, &self.surroundings, firewall.family).all();
            firewall.apply(&wanted)?;
        }
        Ok(())
    }

    /// The same, where all is as it was but for what has changed since.
    fn follow(&mut self) -> Result<()> {
        let update = &self.unsettled;
        for firewall in &mut self.firewalls {
            let drawing = Drawing::new(&self.plans, &self.surroundings, firewall.family);
            match firewall.known.take() {
                Some(known) => firewall.follow(known, &drawing, update)?,
                None => firewall.apply(&drawing.all())?,
            }
        }
        Ok(())
    }
}

impl Proxy for IptablesProxy {
    fn name(&self) -> &'static str {
        "iptables"
    }

    fn adjust(&mut self, surroundings: &Surroundings) -> Result<()> {
        loopback::ensure()?;
        // Pods come and go, and none of it is in the chains.
        self.surroundings = Surroundings {
            pods: Vec::new(),
            ..surroundings.clone()
        };
        // What is programmed before the first sync stays until then: it is a former daemon's, and served.
        if self.plans.iter().next().is_some() {
            self.apply()?;
        }
        Ok(())
    }

    fn tend(&mut self) -> Result<()> {
        Ok(())
    }

    fn gathers(&self) -> Option<Duration> {
        Some(self.took.clamp(*GATHER.start(), *GATHER.end()))
    }

    fn sync(&mut self, desired: &Desired, dirty: &Dirty) -> Result<SyncReport> {
        let began = Instant::now();
        let update = self.plans.update(desired, dirty, |_, _| None);
        let report = self.plans.report(&update);
        self.unsettled.take_in(update);
        match dirty {
            Dirty::All => self.apply()?,
            Dirty::Only(_) => self.follow()?,
        }
        self.took = began.elapsed();
        plan::forget_stale(&self.netfilter, &self.plans, &self.unsettled)?;
        self.unsettled = Update::default();
        Ok(report)
    }

    fn audit(&mut self) -> Result<usize> {
        let mut mended = usize::from(loopback::ensure()?);
        for number in 0..self.firewalls.len() {
            let firewall = &self.firewalls[number];
            let found = firewall.read()?;
            let wanted = Drawing::new(&self.plans, &self.surroundings, firewall.family).all();
            mended += found.differences(&Known::of(&wanted));
            let firewall = &mut self.firewalls[number];
            firewall.known = Some(found);
            firewall.apply(&wanted)?;
        }
        if mended > 0 {
            plan::forget_stale(&self.netfilter, &self.plans, &self.plans.as_new())?;
        }
        Ok(mended)
    }

    fn programmed(&self) -> Result<HashMap<ServicePortKey, Programmed>> {
        let mut all = HashMap::new();
        for firewall in &self.firewalls {
            let mut found = Chains::new();
            for table in Table::ALL {
                found.extend(script::read(table, &firewall.tool.save(table.name())?));
            }
            let rules = found.values().flatten();
            let packets: HashSet<&str> = rules
                .filter_map(|rule| Some(rule.split_once(" -j ")?.0))
                .collect();
            let of_family = self.plans.iter().filter(|(key, _)| key.family == firewall.family);
            for (key, plan) in of_family {
                // A ClusterIP that nobody serves has the one rule for all its ports.
                let is_there = |(address, kind): &(SocketAddr, FrontendKind)| {
                    let [port, all] = rule::packets_for(*address, key.protocol);
                    packets.contains(port.as_str())
                        || *kind == FrontendKind::ClusterIp && packets.contains(all.as_str())
                };
                let mut programmed = Programmed {
                    frontends: plan
                        .frontends
                        .iter()
                        .filter(|frontend| is_there(frontend))
                        .map(|(address, _)| *address)
                        .collect(),
                    backends: endpoints(&found, &chains::set_chain(key)).into_iter().collect(),
                };
                programmed.frontends.sort_unstable();
                all.insert(key.clone(), programmed);
            }
        }
        Ok(all)
    }

    fn connections(&self) -> Result<Vec<Connection>> {
        let holders = self.plans.holders();
        connections::list(&self.netfilter, |frontend, protocol| {
            holders.contains_key(&(frontend, protocol))
        })
    }
}

/// The endpoints that a chain, and those it leads to, translate to.
fn endpoints(chains: &Chains, name: &str) -> BTreeSet<SocketAddr> {
    let mut found = BTreeSet::new();
    for rule in chains.get(&(Table::Nat, name.to_owned())).into_iter().flatten() {
        if let Some((_, endpoint)) = rule.split_once("--to-destination ") {
            found.extend(endpoint.parse::<SocketAddr>());
        } else if let Some((_, next)) = rule.rsplit_once(" -j ").filter(|(_, next)| *next != name) {
            found.extend(endpoints(chains, next));
        }
    }
    found
}
