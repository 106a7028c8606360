//! Who may connect to the restricted frontends of each set.
//!
//! Owns `sources_v1`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use ipnetwork::IpNetwork;
use sluice_ebpf_types::{Address, Source, SourceKey};

use super::audit::mend;
use super::tables::Tables;

/// The networks of each set that has any, by the set's id.
#[derive(Default)]
pub(super) struct Sources(BTreeMap<u32, BTreeSet<SourceKey>>);

impl Sources {
    /// Takes over what a former daemon left.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(tables: &Tables) -> Result<Self> {
        let mut sources = Self::default();
        tables.sources.walk(|key, _: u32| {
            let id = u32::from_be(key.source.service);
            sources.0.entry(id).or_default().insert(key);
        })?;
        Ok(sources)
    }

    /// What the kernel's table is to hold.
    pub fn iter(&self) -> impl Iterator<Item = (SourceKey, u32)> + '_ {
        self.0.values().flatten().map(|key| (*key, 0))
    }

    /// Lets these networks connect to set `id`, and no other; true if something changed. Whom it lets in comes before whom
    /// it keeps out.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set(&mut self, tables: &mut Tables, id: u32, networks: &[IpNetwork]) -> Result<bool> {
        let wanted: BTreeSet<_> = networks.iter().map(|network| key(id, network)).collect();
        let known = self.0.entry(id).or_default();
        let changed = *known != wanted;
        for new in wanted.difference(&known.clone()) {
            tables.sources.set(new, &0)?;
            known.insert(*new);
        }
        for old in known.clone().difference(&wanted) {
            tables.sources.remove(old)?;
            known.remove(old);
        }
        if known.is_empty() {
            self.0.remove(&id);
        }
        Ok(changed)
    }

    /// Puts right what differs in the kernel's table; says how many entries did.
    ///
    /// # Errors
    /// The kernel's.
    pub fn audit(&self, tables: &mut Tables) -> Result<usize> {
        mend(&mut tables.sources, self.iter())
    }
}

fn key(id: u32, network: &IpNetwork) -> SourceKey {
    let prefix = u32::from(network.prefix()) + if network.is_ipv4() { 96 } else { 0 };
    SourceKey {
        bits: u32::BITS + prefix,
        source: Source {
            service: id.to_be(),
            address: Address::from(network.network()),
        },
    }
}
