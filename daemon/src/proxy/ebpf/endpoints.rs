//! The pods of this node as the programs know them.
//!
//! Owns `endpoints_v1`, but for the one word in each value that the programs write.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Result;
use sluice_ebpf_types::{Address, Endpoint, endpoint_flag};

use super::tables::Tables;
use crate::network::pods::PodDevice;
use crate::network::vtep::Mac;

/// What the table is to hold, the programs' word aside.
#[derive(Default)]
pub(super) struct Endpoints(BTreeMap<Address, Endpoint>);

impl Endpoints {
    /// Makes the kernel's table say what is so of these pods.
    ///
    /// # Errors
    /// The kernel's.
    pub fn follow(&mut self, tables: &mut Tables, pods: &[PodDevice]) -> Result<()> {
        let wanted: BTreeMap<_, _> = pods.iter().flat_map(endpoints).collect();
        if wanted != self.0 {
            self.0 = wanted;
            self.audit(tables)?;
        }
        Ok(())
    }

    /// Puts right what differs; says how many entries did.
    ///
    /// # Errors
    /// The kernel's.
    pub fn audit(&self, tables: &mut Tables) -> Result<usize> {
        let mut found: BTreeMap<_, _> = tables.endpoints.entries()?.into_iter().collect();
        let mut changes = 0;
        for (address, wanted) in &self.0 {
            let known = found.remove(address);
            // The same pod goes on as it was; another one begins anew.
            let translated = known
                .filter(|known| known.device == wanted.device)
                .map_or(0, |known| known.translated);
            let wanted = Endpoint {
                translated,
                ..*wanted
            };
            if known != Some(wanted) {
                tables.endpoints.set(address, &wanted)?;
                changes += 1;
            }
        }
        for address in found.keys() {
            tables.endpoints.remove(address)?;
            changes += 1;
        }
        Ok(changes)
    }
}

fn endpoints(pod: &PodDevice) -> impl Iterator<Item = (Address, Endpoint)> + '_ {
    let value = |address: &IpAddr, mac: &Mac| {
        let mut ethernet = [0; 12];
        ethernet[..6].copy_from_slice(&mac.0);
        ethernet[6..].copy_from_slice(&pod.mac.0);
        let endpoint = Endpoint {
            device: pod.device.index,
            flags: if pod.queues.any() {
                endpoint_flag::QUEUED
            } else {
                0
            },
            translated: 0,
            ethernet,
        };
        (Address::from(*address), endpoint)
    };
    pod.endpoints
        .iter()
        .map(move |(address, mac)| value(address, mac))
}
