//! The ClusterIPs, whatever their ports: a connection to one at a port nobody serves is refused, not sent astray, and a ping is
//! answered while there is an endpoint behind any of its ports.
//!
//! Owns `addresses_v1`, which follows from the frontends and their sets alone.

use std::collections::HashMap;

use anyhow::Result;
use sluice_ebpf_types::{Address, Frontend, FrontendKey, frontend_flag};

use super::audit::mend;
use super::tables::Tables;

/// The frontends of each address: port, protocol, and whether there is an endpoint behind it.
#[derive(Default)]
pub(super) struct Addresses(HashMap<Address, Vec<(u16, u8, bool)>>);

/// Whether the frontend's address is a ClusterIP.
pub(super) fn is_cluster_ip(frontend: &Frontend) -> bool {
    frontend.flags & frontend_flag::CLUSTER_IP != 0
}

fn value(frontends: &[(u16, u8, bool)]) -> u32 {
    u32::from(frontends.iter().any(|(_, _, serves)| *serves))
}

impl Addresses {
    /// The addresses of these frontends, each with whether it has an endpoint; the kernel's table is made to say the same.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read<'a>(
        tables: &mut Tables,
        frontends: impl Iterator<Item = (&'a FrontendKey, &'a Frontend, bool)>,
    ) -> Result<Self> {
        let mut addresses = Self::default();
        for (key, frontend, serves) in frontends {
            if is_cluster_ip(frontend) {
                let own = addresses.0.entry(key.address).or_default();
                own.push((key.port, key.protocol, serves));
            }
        }
        mend(&mut tables.addresses, addresses.iter())?;
        Ok(addresses)
    }

    /// What the kernel's table is to hold.
    pub fn iter(&self) -> impl Iterator<Item = (Address, u32)> + '_ {
        self.0.iter().map(|(address, own)| (*address, value(own)))
    }

    /// Takes note of a ClusterIP's frontend: whether there is an endpoint behind it. What the kernel's table is to have by that, if
    /// it is not what it was.
    pub fn note(&mut self, key: &FrontendKey, serves: bool) -> Option<(Address, u32)> {
        let own = self.0.entry(key.address).or_default();
        let before = (!own.is_empty()).then(|| value(own));
        match own
            .iter_mut()
            .find(|(port, protocol, _)| (*port, *protocol) == (key.port, key.protocol))
        {
            Some(known) => known.2 = serves,
            None => own.push((key.port, key.protocol, serves)),
        }
        let now = value(own);
        (before != Some(now)).then_some((key.address, now))
    }

    /// Takes note that a frontend is none of a ClusterIP's any more; nothing happens if it never was.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&mut self, tables: &mut Tables, key: &FrontendKey) -> Result<()> {
        let Some(own) = self.0.get_mut(&key.address) else {
            return Ok(());
        };
        let before = value(own);
        own.retain(|(port, protocol, _)| (*port, *protocol) != (key.port, key.protocol));
        if own.is_empty() {
            self.0.remove(&key.address);
            tables.addresses.remove(&key.address)?;
        } else if value(own) != before {
            let now = value(own);
            tables.addresses.set(&key.address, &now)?;
        }
        Ok(())
    }
}
