//! Services in the dataplane: one trait, one backend per way of translating.

pub mod ebpf;
pub mod figures;
pub mod iptables;
pub(crate) mod netfilter;
pub mod nftables;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::network::Device;
use crate::network::pods::PodDevice;
use crate::state::service_port::{Family, Protocol, ServicePort, ServicePortKey};

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
    /// The devices of this node's pods.
    pub pods: Vec<PodDevice>,
    /// The networks of this node's pods.
    pub own_networks: Vec<IpNetwork>,
    /// The networks all pods are in.
    pub pod_networks: Vec<IpNetwork>,
    /// Whether packets from pod to pod may go past the host's stack.
    pub fast_path: bool,
    /// Whether a ClusterIP answers pings while it has an endpoint.
    pub ping: bool,
}

impl Surroundings {
    /// This node's own address of a family.
    pub fn node_address(&self, family: Family) -> Option<IpAddr> {
        let mut addresses = self.node_addresses.iter().copied();
        addresses.find(|address| Family::of(*address) == family)
    }
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

/// What the kernel holds for one Service port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Programmed {
    /// Addresses that lead to it, sorted.
    pub frontends: Vec<SocketAddr>,
    /// Endpoints behind them, sorted.
    pub backends: Vec<SocketAddr>,
}

/// A connection whose packets are translated on their way, as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Its protocol.
    pub protocol: Protocol,
    /// Who connected.
    pub client: SocketAddr,
    /// Where to.
    pub frontend: SocketAddr,
    /// The endpoint it was given.
    pub backend: SocketAddr,
    /// What the endpoint sees in the client's stead; none where it sees the client.
    pub stand_in: Option<SocketAddr>,
    /// How far it is.
    pub state: ConnectionState,
    /// Time since its last packet.
    pub idle: Duration,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionState {
    /// The endpoint has not answered yet.
    Opening,
    /// Both sides have spoken.
    Established,
    /// One side has said its last.
    Closing,
    /// Both sides have, or one has broken it off.
    Closed,
    /// Datagrams, none of them answered.
    Unanswered,
    /// Datagrams both ways.
    Answered,
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Unanswered => "unanswered",
            Self::Answered => "answered",
        })
    }
}

/// A way of balancing Services. Whatever it programs keeps working when the daemon is gone.
pub trait Proxy: Send {
    /// Its name in config, status and metrics.
    fn name(&self) -> &'static str;

    /// Fits the dataplane to the node; called whenever the surroundings changed, the first time by [`establish`](Self::establish).
    ///
    /// # Errors
    /// What makes the dataplane as a whole unusable.
    fn adjust(&mut self, surroundings: &Surroundings) -> anyhow::Result<()>;

    /// Regular upkeep: drops what has expired.
    ///
    /// # Errors
    /// The kernel's answer.
    fn tend(&mut self) -> anyhow::Result<()>;

    /// Brings the dataplane to `desired`, as far as `dirty` says. No address is in two sets of `desired`; one that moved from
    /// one set to another has both among the dirty, and leads to one of them throughout.
    ///
    /// # Errors
    /// What makes the dataplane as a whole unusable; a single Service's trouble is in the report.
    fn sync(
        &mut self,
        desired: &BTreeMap<ServicePortKey, ServicePort>,
        dirty: &Dirty,
    ) -> anyhow::Result<SyncReport>;

    /// [`adjust`](Self::adjust) and a [`sync`](Self::sync) of everything, as at the start. What does not wait for the other may be done beside it.
    ///
    /// # Errors
    /// As those two; then it is to be called again.
    fn establish(
        &mut self,
        surroundings: &Surroundings,
        desired: &BTreeMap<ServicePortKey, ServicePort>,
    ) -> anyhow::Result<SyncReport> {
        self.adjust(surroundings)?;
        self.sync(desired, &Dirty::All)
    }

    /// How long changes are gathered before a sync; none where one costs what it changes.
    fn gathers(&self) -> Option<Duration> {
        None
    }

    /// Reads back what the kernel holds of everything that was synced and puts right what differs, which somebody else must
    /// have changed; says how many entries that were.
    ///
    /// # Errors
    /// The kernel's.
    fn audit(&mut self) -> anyhow::Result<usize>;

    /// What the kernel holds now of every Service port that was synced, read back entry by entry: for a person who asks.
    ///
    /// # Errors
    /// The kernel's.
    fn programmed(&self) -> anyhow::Result<HashMap<ServicePortKey, Programmed>>;

    /// The connections translated on their way.
    ///
    /// # Errors
    /// The kernel's.
    fn connections(&self) -> anyhow::Result<Vec<Connection>>;
}
