//! One Service into the kernel and out of it, in an order in which every packet in between finds its way.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Result;
use sluice_ebpf_types::UDP;

use super::{Desired, Entry, Holder, Services, Upheaval};
use crate::proxy::SyncReport;
use crate::proxy::ebpf::addresses::is_cluster_ip;
use crate::proxy::ebpf::tables::Tables;
use crate::proxy::ebpf::wanted;
use crate::state::service_port::{FrontendKind, Scope, ServicePort, ServicePortKey};

impl Services {
    /// Programs one Service, and takes what leads to it from whoever had that; whether something changed.
    pub(super) fn set(
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
    pub(super) fn note_addresses(
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
    pub(super) fn remove_stale(
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
    pub(super) fn discard(
        &mut self,
        tables: &mut Tables,
        entry: &Entry,
        upheaval: &mut Upheaval,
    ) -> Result<()> {
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
    pub(super) fn prune(&mut self, tables: &mut Tables, report: &mut SyncReport, upheaval: &mut Upheaval) {
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
