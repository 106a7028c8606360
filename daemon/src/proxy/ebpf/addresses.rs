//! The ClusterIPs, whatever their ports: a connection to one at a port nobody serves is refused, not sent astray, and a ping is
//! answered while there is an endpoint behind any of its ports.
//!
//! Owns `addresses_v1`, which follows from the frontends and their sets alone.

use std::collections::HashMap;

use anyhow::Result;
use sluice_ebpf_types::{Address, Frontend, FrontendKey, frontend_flag};

use super::audit::mend;
use super::tables::Tables;

/// What is known of each address.
#[derive(Default)]
pub(super) struct Addresses(HashMap<Address, Known>);

#[derive(Default)]
struct Known {
    /// Its frontends: port, protocol, and whether there is an endpoint behind it.
    frontends: Vec<(u16, u8, bool)>,
    /// What the kernel's table has of it.
    written: Option<u32>,
}

impl Known {
    fn value(&self) -> u32 {
        u32::from(self.frontends.iter().any(|(_, _, serves)| *serves))
    }
}

/// Whether the frontend's address is a ClusterIP.
pub(super) fn is_cluster_ip(frontend: &Frontend) -> bool {
    frontend.flags & frontend_flag::CLUSTER_IP != 0
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
                let known = addresses.0.entry(key.address).or_default();
                known.frontends.push((key.port, key.protocol, serves));
            }
        }
        mend(&mut tables.addresses, addresses.iter())?;
        for known in addresses.0.values_mut() {
            known.written = Some(known.value());
        }
        Ok(addresses)
    }

    /// What the kernel's table is to hold.
    pub fn iter(&self) -> impl Iterator<Item = (Address, u32)> + '_ {
        self.0.iter().map(|(address, known)| (*address, known.value()))
    }

    /// Takes note of a ClusterIP's frontend: whether there is an endpoint behind it. What the kernel's table is to have by that, if
    /// it is not what it has; who writes it says so with [`Self::written`].
    pub fn note(&mut self, key: &FrontendKey, serves: bool) -> Option<(Address, u32)> {
        let known = self.0.entry(key.address).or_default();
        match known
            .frontends
            .iter_mut()
            .find(|(port, protocol, _)| (*port, *protocol) == (key.port, key.protocol))
        {
            Some(frontend) => frontend.2 = serves,
            None => known.frontends.push((key.port, key.protocol, serves)),
        }
        let value = known.value();
        (known.written != Some(value)).then_some((key.address, value))
    }

    /// Takes note that the kernel's table has this value for the address.
    pub fn written(&mut self, address: &Address, value: u32) {
        if let Some(known) = self.0.get_mut(address) {
            known.written = Some(value);
        }
    }

    /// Takes note that a frontend is none of a ClusterIP's any more; nothing happens if it never was.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&mut self, tables: &mut Tables, key: &FrontendKey) -> Result<()> {
        let Some(known) = self.0.get_mut(&key.address) else {
            return Ok(());
        };
        known
            .frontends
            .retain(|(port, protocol, _)| (*port, *protocol) != (key.port, key.protocol));
        let value = known.value();
        if known.frontends.is_empty() {
            self.0.remove(&key.address);
            tables.addresses.remove(&key.address)?;
        } else if known.written != Some(value) {
            tables.addresses.set(&key.address, &value)?;
            known.written = Some(value);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sluice_ebpf_types::TCP;

    use super::*;

    /// S10, S27
    #[test]
    fn what_the_kernel_refused_to_take_is_said_again() {
        let key = |port| FrontendKey {
            port,
            protocol: TCP,
            ..FrontendKey::default()
        };
        let address = key(0).address;
        let mut addresses = Addresses::default();
        assert_eq!(addresses.note(&key(80), false), Some((address, 0)));
        assert_eq!(addresses.note(&key(80), false), Some((address, 0)), "not written");
        addresses.written(&address, 0);
        assert_eq!(addresses.note(&key(80), false), None);
        assert_eq!(addresses.note(&key(81), true), Some((address, 1)));
        // Not written: the port that serves says so again, and the other one too.
        assert_eq!(addresses.note(&key(80), false), Some((address, 1)));
        addresses.written(&address, 1);
        assert_eq!(addresses.note(&key(81), true), None);
    }
}
