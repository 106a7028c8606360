//! The ClusterIPs, whatever their ports: a connection to one at a port nobody serves is refused, not sent astray.
//!
//! Owns `addresses_v1`, which follows from the frontends alone.

use std::collections::HashMap;

use anyhow::Result;
use sluice_ebpf_types::{Address, Frontend, FrontendKey, frontend_flag};

use super::audit::mend;
use super::tables::Tables;

/// Each address with the number of frontends that have it.
#[derive(Default)]
pub(super) struct Addresses(HashMap<Address, u32>);

fn counts(frontend: Option<&Frontend>) -> bool {
    frontend.is_some_and(|frontend| frontend.flags & frontend_flag::CLUSTER_IP != 0)
}

impl Addresses {
    /// The addresses of these frontends; the kernel's table is made to say the same.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read<'a>(
        tables: &mut Tables,
        frontends: impl Iterator<Item = (&'a FrontendKey, &'a Frontend)>,
    ) -> Result<Self> {
        let mut addresses = Self::default();
        for (key, _) in frontends.filter(|(_, frontend)| counts(Some(frontend))) {
            *addresses.0.entry(key.address).or_default() += 1;
        }
        mend(&mut tables.addresses, addresses.iter())?;
        Ok(addresses)
    }

    /// What the kernel's table is to hold.
    pub fn iter(&self) -> impl Iterator<Item = (Address, u32)> + '_ {
        self.0.keys().map(|address| (*address, 0))
    }

    /// Follows one frontend from `former` to `now`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn follow(
        &mut self,
        tables: &mut Tables,
        key: &FrontendKey,
        former: Option<&Frontend>,
        now: Option<&Frontend>,
    ) -> Result<()> {
        match (counts(former), counts(now)) {
            (false, true) => {
                let count = self.0.entry(key.address).or_default();
                *count += 1;
                if *count == 1 {
                    tables.addresses.set(&key.address, &0)?;
                }
            }
            (true, false) => {
                let count = self.0.entry(key.address).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.0.remove(&key.address);
                    tables.addresses.remove(&key.address)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
