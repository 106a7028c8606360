//! Services that the kernel knows nothing of: written many in one call, since at the start they are nearly all there is to do.

use std::sync::Arc;

use sluice_ebpf_types::{Frontend, FrontendKey, UDP};

use super::{Entry, Holder, Services, Upheaval};
use crate::proxy::ebpf::backend_set::{BackendSet, NewSet};
use crate::proxy::ebpf::tables::Tables;
use crate::proxy::ebpf::wanted;
use crate::state::service_port::{FrontendKind, Scope, ServicePort, ServicePortKey};

/// How many go to the kernel together: the most of what a call costs is shared by then, and what is gathered for it stays small
/// beside the sets.
const AT_ONCE: usize = 512;

/// A Service on its way to the kernel.
struct Newcomer<'d> {
    /// Which of those that are wanted.
    position: usize,
    key: Arc<ServicePortKey>,
    port: &'d ServicePort,
    entry: Entry,
}

impl Services {
    /// Writes the sets of all Services that have none yet, and what leads to them where that is simple. Says of each of `wanted`
    /// whether it is done with thereby; the others come one by one.
    pub(super) fn welcome(
        &mut self,
        tables: &mut Tables,
        wanted: &[(&ServicePortKey, &ServicePort)],
        upheaval: &mut Upheaval,
    ) -> Vec<bool> {
        let mut done = vec![false; wanted.len()];
        let numbered: Vec<_> = wanted.iter().enumerate().collect();
        for ports in numbered.chunks(AT_ONCE) {
            let mut newcomers = Vec::new();
            for (position, (key, port)) in ports {
                if !self.entries.contains_key(*key) {
                    newcomers.push(Newcomer {
                        position: *position,
                        key: Arc::new((*key).clone()),
                        port,
                        entry: self.new_entry(),
                    });
                }
            }
            let mut sets: Vec<NewSet<'_>> = newcomers
                .iter_mut()
                .map(|new| NewSet {
                    set: &mut new.entry.set,
                    wanted: wanted::backends(new.port),
                    affinity_seconds: wanted::affinity_seconds(new.port),
                })
                .collect();
            match BackendSet::create_all(tables, &mut sets) {
                Ok(()) => self.lead_to(tables, &mut newcomers, &mut done, upheaval),
                // One by one it will turn out which of them is the trouble.
                Err(error) => tracing::debug!(
                    error = format!("{error:#}"),
                    "new sets could not be written together"
                ),
            }
            let entries = newcomers.into_iter().map(|new| (new.key, new.entry));
            self.entries.extend(entries);
        }
        done
    }

    /// Writes what leads to these sets, which the kernel has, as far as nobody else has it and there is no more to it.
    fn lead_to(
        &mut self,
        tables: &mut Tables,
        newcomers: &mut [Newcomer<'_>],
        done: &mut [bool],
        upheaval: &mut Upheaval,
    ) {
        let mut simple = Vec::new();
        let mut led: Vec<(FrontendKey, Frontend)> = Vec::new();
        for new in newcomers.iter_mut().filter(|new| is_simple(&new.key, new.port)) {
            let frontends =
                wanted::frontends(&new.key, new.port, new.entry.set.id, None, &self.node_addresses);
            if frontends.keys().any(|key| self.holders.contains_key(key)) {
                continue;
            }
            for (key, value) in frontends {
                self.holders.insert(key, Holder::Known(Arc::clone(&new.key)));
                new.entry.frontends.insert(key, value);
                led.push((key, value));
            }
            simple.push(new);
        }
        if let Err(error) = tables.frontends.set_all(&led) {
            tracing::debug!(
                error = format!("{error:#}"),
                "what leads to new sets could not be written together"
            );
            for new in simple {
                for key in std::mem::take(&mut new.entry.frontends).keys() {
                    self.holders.remove(key);
                }
            }
            return;
        }
        let udp = led.iter().map(|(key, _)| *key).filter(|key| key.protocol == UDP);
        upheaval.new_udp_frontends.extend(udp);
        for new in simple {
            if let Some(done) = done.get_mut(new.position) {
                *done = true;
            }
        }
    }
}

/// Whether a set and the ClusterIPs that lead to it are all that the Service comes to: no networks that it keeps out, no table
/// for other hosts, no other set that it names.
fn is_simple(key: &ServicePortKey, port: &ServicePort) -> bool {
    key.scope == Scope::Cluster
        && port.source_ranges.is_none()
        && port
            .frontends
            .iter()
            .all(|frontend| frontend.kind == FrontendKind::ClusterIp)
}
