//! Services in the dataplane: one trait, one backend per way of translating.

pub mod ebpf;

use std::collections::{BTreeMap, BTreeSet};

use std::net::IpAddr;

use crate::network::Device;
use crate::state::service_port::{ServicePort, ServicePortKey};

/// What of the node a dataplane must know beside the Services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Devices by which packets for Services arrive from other hosts: the uplink and the tunnels.
    pub devices: Vec<Device>,
    /// This node's addresses in the pod network, at most one per family: replies to them come back here through the
    /// pod network, so they stand in for a client whose packet goes on to a pod elsewhere.
    pub pod_network_addresses: Vec<IpAddr>,
    /// This node's own addresses, at most one per family: they stand in for a client whose packet leaves the pod
    /// network.
    pub node_addresses: Vec<IpAddr>,
}

/// What a sync must look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dirty {
    /// Everything: the first sync, or an audit. What the kernel holds beyond the desired set is removed.
    All,
    /// These alone: each is brought to what is desired now, or removed if it no longer is.
    Only(BTreeSet<ServicePortKey>),
}

/// What a sync did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SyncReport {
    /// Service ports written anew or changed.
    pub changed: usize,
    /// Service ports removed.
    pub removed: usize,
    /// What could not be programmed, and why; it is tried again at the next sync.
    pub failed: Vec<(ServicePortKey, String)>,
}

/// A way of balancing Services. Whatever it programs keeps working when the daemon is gone.
pub trait Proxy: Send {
    /// Its name in config, status and metrics.
    fn name(&self) -> &'static str;

    /// Fits the dataplane to the node; called before the first sync and whenever the surroundings changed.
    ///
    /// # Errors
    /// What makes the dataplane as a whole unusable.
    fn adjust(&mut self, surroundings: &Surroundings) -> anyhow::Result<()>;

    /// Regular upkeep: drops what has expired.
    ///
    /// # Errors
    /// The kernel's answer.
    fn tend(&mut self) -> anyhow::Result<()>;

    /// Brings the dataplane to `desired`, as far as `dirty` says.
    ///
    /// # Errors
    /// What makes the dataplane as a whole unusable; a single Service's trouble is in the report.
    fn sync(
        &mut self,
        desired: &BTreeMap<ServicePortKey, ServicePort>,
        dirty: &Dirty,
    ) -> anyhow::Result<SyncReport>;
}
